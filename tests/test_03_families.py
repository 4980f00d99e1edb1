"""After this file you know that five families are one transformer with a few traits, and that ours computes what theirs do.

The golden files under golden/models were made once by golden/make_models.py with Hugging Face transformers (versions in
made_by.json). Every tensor in them is random, norms and biases too, and sequences are longer than the sliding windows.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import BadInput
from infosteer import Steering
from model import GLOBAL, LOCAL, Config, Transformer

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path.name for path in (GOLDEN / "models").iterdir() if path.is_dir())


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    folder = GOLDEN / "models" / request.param
    return folder, Transformer.from_pretrained(folder), load_file(folder / "golden.safetensors")


def test_every_family_is_there():
    types = {json.loads((GOLDEN / "models" / name / "config.json").read_text())["model_type"] for name in MODELS}
    assert types == {"llama", "qwen2", "qwen3", "gemma2", "gemma3_text"}


def test_logits_equal_the_reference(golden):
    _, model, expected = golden
    logits = model(expected["tokens"])
    assert logits.dtype == torch.float32 and expected["logits"].std() > 0.5        # something to be equal about
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


def test_classic_and_newer_config_keys_mean_the_same(golden):
    folder, model, expected = golden
    classic = json.loads((folder / "config_classic.json").read_text())
    assert "rope_parameters" not in classic and "layer_types" not in classic
    same = Transformer(Config.from_dict(classic))
    same.load_state_dict(model.state_dict())
    torch.testing.assert_close(same(expected["tokens"]), expected["logits"], atol=1e-4, rtol=0)


def test_reading_token_by_token_from_the_cache_gives_the_same_logits(golden):
    _, model, expected = golden
    tokens, B, T = expected["tokens"], *expected["tokens"].shape
    cache = model.new_cache(B, T)
    with torch.no_grad():
        hidden = [model.hidden(tokens[:, :11], cache=cache)[0]]
        for at in range(11, T):
            hidden.append(model.hidden(tokens[:, at:at + 1], positions=torch.full((B, 1), at), cache=cache)[0])
        torch.testing.assert_close(model.logits(torch.cat(hidden, 1)), expected["logits"], atol=1e-4, rtol=0)


def test_padding_on_the_right_changes_nothing(golden):
    _, model, expected = golden
    padded = torch.nn.functional.pad(expected["tokens"][:, :20], (0, 7), value=3)
    torch.testing.assert_close(model(padded)[:, :20], expected["logits"][:, :20], atol=1e-4, rtol=0)


def test_recomputing_activations_changes_no_gradient(golden):
    _, model, expected = golden
    gradients = []
    for checkpoint in (False, True):
        hidden, flux, _ = model.hidden(expected["tokens"], Steering("reg"), checkpoint=checkpoint)
        (model.logits(hidden).logsumexp(-1).mean() - flux.mean()).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
        model.zero_grad()
    for one, other in zip(*gradients):
        assert torch.equal(one, other) and one.any()


# ----------------------------------------------------------------------------------------- configurations as published

PUBLISHED = json.loads((GOLDEN / "configs" / "parameters.json").read_text())
PARAMETERS = PUBLISHED.get("parameters", PUBLISHED)


@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDEN / "configs").glob("*.json") if path.stem != "parameters"))
def test_published_configurations_have_as_many_parameters_as_the_reference(name):
    config = Config.from_dict(json.loads((GOLDEN / "configs" / f"{name}.json").read_text()))
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Transformer(config).parameters()) == PARAMETERS[name]


def test_layer_types_of_the_published_gemmas():
    two, three = (Config.from_dict(json.loads((GOLDEN / "configs" / f"{name}.json").read_text())) for name in ("gemma-2-2b", "gemma-3-1b-pt"))
    assert two.layer_types == (LOCAL, GLOBAL) * 13 and two.window == 4096
    assert three.layer_types[:7] == (LOCAL,) * 5 + (GLOBAL, LOCAL) and three.window == 512
    assert three.rope[LOCAL]["rope_theta"] == 10_000 and three.rope[GLOBAL]["rope_theta"] == 1_000_000


LLAMA = dict(model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("change, word", [
    (dict(model_type="mamba"), "known families are llama, qwen2"), (dict(model_type=None), "model_type"),
    (dict(hidden_size="big"), "hidden_size is 'big'"), (dict(hidden_size=None), "hidden_size is None"),
    (dict(hidden_size=True), "hidden_size"), (dict(vocab_size=0), "vocab_size is 0"), (dict(num_hidden_layers=-1), "num_hidden_layers"),
    (dict(intermediate_size=24.5), "intermediate_size"), (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
    (dict(num_key_value_heads=3), "not a multiple"), (dict(head_dim=5), "even"), (dict(hidden_act="relu6"), "relu6"),
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"), (dict(quantization_config={"bits": 4}), "quantization"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4}), "yarn"), (dict(rope_scaling={"type": "linear"}), "factor"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}), "high_freq_factor"), (dict(rope_scaling=[8]), "rope"),
    (dict(rope_theta="10000"), "rope_theta"), (dict(rope_parameters=3), "rope"), (dict(layer_types=["full_attention"]), "each of the 2 layers"),
    (dict(layer_types=["full_attention", "ssm"]), "layer_types"), (dict(layer_types=["sliding_attention"] * 2), "sliding_window"),
    (dict(eos_token_id="</s>"), "eos_token_id"), (dict(eos_token_id=[1, -2]), "eos_token_id"),
])
def test_a_configuration_that_cannot_be_built_is_refused_in_one_line(change, word):
    with pytest.raises(BadInput, match=word) as error:
        Config.from_dict({**LLAMA, **change}, "DIR/config.json")
    assert str(error.value).startswith("DIR/config.json: ") and "\n" not in str(error.value)


def test_a_model_without_memory_tells_its_shapes():
    with torch.device("meta"):
        model, tokens = Transformer(Config.from_pretrained(GOLDEN / "models" / "llama3")), torch.zeros(2, 9, dtype=torch.long)
    assert model(tokens).shape == (2, 9, model.config.vocab_size)
