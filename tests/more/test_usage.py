"""After this file you know what `lab.usage` prints: how many memories one token uses, and how many
all tokens together use."""
import json
import math

import pytest
import torch

from data import BadInput
from data.tasks import load as load_examples
from eval import TOY_FOLDER, load
from lab import usage
from model import Transformer


def by_hand(model, texts):
    """What the page says, from k of every layer and token, in float64 and without a loop."""
    found = []
    for layer in range(model.config.n_layers):
        seen = []
        memory = model.blocks[layer].memory.values
        handle = memory.register_forward_pre_hook(lambda _, k: seen.append(k[0][0].double()))
        for ids in texts:
            model(torch.tensor([ids]))
        handle.remove()
        q = torch.cat(seen).abs()                                                  # [tokens, d_m]
        q = q / q.sum(-1, keepdim=True)
        found.append(tuple(-torch.special.xlogy(p, p).sum(-1).mean().item()
                           for p in (q, q.mean(0))))
    return found


@torch.inference_mode()
def test_both_entropies_are_those_by_hand():
    model, tokenizer = load(TOY_FOLDER / "llama")
    texts = [tokenizer.encode(one.prompt, special=False)
             for one in load_examples(TOY_FOLDER, "toy-facts", "test")[:7]]
    for found, expected in zip(usage.usage(model, texts), by_hand(model, texts), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
        assert found[0] < found[1] < math.log(384)         # a mean is more even than its parts


def test_equal_tokens_use_together_what_each_uses():
    model = Transformer.from_pretrained(TOY_FOLDER / "llama")
    for alone, together in usage.usage(model, [[7], [7], [7]]):
        assert alone == pytest.approx(together, abs=1e-5)


def test_the_command_prints_every_layer_and_json(capsys):
    argv = ["--task", "toy-sums", "--items", "3"]
    usage.main(argv)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    usage.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == 3 and found["log_d_m"] == pytest.approx(math.log(384))
    for layer, of in enumerate(found["layers"], 1):
        row = next(line for line in shown if line[:1] == [str(layer)])
        assert row[1:3] == [f"{of['of_tokens']:.3f}", f"{of['of_the_mean']:.3f}"]
        assert row[4] == f"{math.exp(of['of_the_mean']) / 384:.0%}"


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(BadInput):
        usage.main(["--model", str(tmp_path / "none")])
