"""After this file you know that published models are computed right: against the transformers
library, which runs in a Python of its own, on real weights."""
import json
from dataclasses import replace

import pytest
import torch

import train
from eval import load
from helpers import reference, write_task
from model import read_tensors

pytestmark = pytest.mark.real
NAMES = ("smollm2-135m-instruct", "gemma-3-270m")
TEXTS = ("The capital of France is Paris, and the capital of Italy is",
         "A baker sells 12 loaves in the morning and 7 in the afternoon. How many are that?\n",
         "Il était une fois, 1234567 naïve cœurs — déjà vu?\n\n\tdef f(x):\n        return x ** 2",
         "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 東京は日本の首都です。")
NEW = 64                               # tokens that are decoded

THEIRS = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, texts, new = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
found, said = {}, {}
with torch.inference_mode():
    for n, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        found[f"ids{n}"] = ids[0]
        found[f"logits{n}"] = model(ids).logits[0].contiguous()
        if new:
            model.generation_config.eos_token_id = None        # all of them, whatever comes
            all = model.generate(ids, max_new_tokens=new, do_sample=False)
            found[f"new{n}"] = all[0, ids.shape[1]:].contiguous()
save_file(found, out)
print("{}")
"""


def theirs(models, folder, out, new=0):
    """{idsN, logitsN, newN} of text N, as transformers computes them."""
    reference(models, ["torch", "transformers"], THEIRS, folder, out, json.dumps(TEXTS), new)
    return read_tensors(out)[0]


@torch.inference_mode()
def compare_logits(model, tokenizer, found, most):
    for n, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        assert ids == found[f"ids{n}"].tolist()
        ours = model.logits(model.hidden(torch.tensor([ids]))[0])[0]           # [T, V]
        assert (ours - found[f"logits{n}"]).abs().max() < most, text


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_text_are_those_of_transformers(name, real_models, tmp_path):
    found = theirs(real_models, real_models / name, tmp_path / "theirs.safetensors", NEW)
    model, tokenizer = load(real_models / name)
    compare_logits(model, tokenizer, found, 2e-4)
    model.config = replace(model.config, eos_ids=())           # all of them, whatever comes
    said = model.generate([tokenizer.encode(text) for text in TEXTS], NEW)
    assert said == [found[f"new{n}"].tolist() for n in range(len(TEXTS))]
    assert {len(ids) for ids in said} == {NEW}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_a_real_model_loads_in_transformers(name, real_models, tmp_path):
    write_task(tmp_path / "data", "boolq", "train", [
        (f"Is {n} an even number?", "false" if n % 2 else "true") for n in range(8)])
    train.main(["--model", str(real_models / name), "--task", "boolq", "--steps", "2",
                "--data", str(tmp_path / "data"), "--batch", "4", "--precision", "fp32",
                "--warmup", "0", "--lr", "1e-4", "--out", str(tmp_path / "run")])
    model, tokenizer = load(tmp_path / "run")
    base, _ = load(real_models / name)
    assert not torch.equal(model.embed.weight, base.embed.weight)
    compare_logits(model, tokenizer, theirs(
        real_models, tmp_path / "run", tmp_path / "theirs.safetensors"), 2e-4)
