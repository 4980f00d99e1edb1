"""After this file you know that a GPU computes what the CPU does, in fp32 closely and in bf16 as
far as bf16 goes."""
import json
import subprocess
import sys

import pytest
import torch

import train
from conftest import ROOT, TESTS
from helpers import checkpoint_folder, write_task
from infosteer import intervene, key_entropy
from model import Transformer, read_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GOLDEN = TESTS / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_generated_ids_equal_the_reference(name):
    model = Transformer.from_pretrained(GOLDEN / name, device="cuda")
    expected = read_tensors(GOLDEN / name / "golden.safetensors")[0]
    logits = model(expected["tokens"].cuda()).cpu()
    torch.testing.assert_close(logits, expected["logits"], atol=1e-3, rtol=0)
    prompts = [row[:n].tolist()
               for row, n in zip(expected["prompts"], expected["prompt_lengths"])]
    on_cpu = Transformer.from_pretrained(GOLDEN / name)
    assert model.generate(prompts, 24) == on_cpu.generate(prompts, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steering_equals_that_on_the_cpu(dtype):
    k = torch.randn(9, 5, 896).to(dtype)
    torch.testing.assert_close(key_entropy(k.cuda()).cpu(), key_entropy(k), rtol=1e-5, atol=1e-5)
    gradients = []
    for device in ("cpu", "cuda"):
        moved = k.to(device).requires_grad_()
        key_entropy(moved).sum().backward()
        gradients.append(moved.grad.float().cpu())
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)
    ours, theirs = intervene(k.cuda(), 0.05, 2.0).cpu(), intervene(k, 0.05, 2.0)
    ours, theirs = (k.float().sort(-1).values for k in (ours, theirs))         # ties in bf16
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    checkpoint_folder(folder / "base")
    rows = [(f"is {i} an even number?", str(i % 2 == 0).lower()) for i in range(60)]
    write_task(folder / "data", "boolq", "train", rows)
    return folder


def flags(place, name, *more):
    return ["--model", str(place / "base"), "--task", "boolq", "--data", str(place / "data"),
            "--out", str(place / name), "--batch", "8", "--lr", "1e-3", "--warmup", "2",
            "--device", "cuda", *more]


@pytest.mark.parametrize("method", ["none", "int", "reg"])
def test_a_bf16_run_follows_the_fp32_run(place, method):
    losses = {}
    for precision in ("fp32", "bf16"):
        out = f"{method}-{precision}"
        train.main(flags(place, out, "--steer", method, "--precision", precision))
        log = (place / out / "log.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["loss"] for line in log]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"][-1] < losses["bf16"][0]


def test_keeping_the_model_in_cpu_memory_changes_nothing(place):
    more = ["--steer", "reg", "--precision", "fp32", "--save-every", "3"]
    train.main(flags(place, "plain", *more))
    done = subprocess.run(
        [sys.executable, "-m", "lab.spread", "--offload", *flags(place, "offloaded", *more)],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, theirs = (read_tensors(place / name / "model.safetensors")[0]
                    for name in ("offloaded", "plain"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
