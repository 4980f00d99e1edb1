"""After this file you know that a GPU computes what the CPU does, in fp32 closely and in bf16 as far as bf16 goes. Skipped without one."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from helpers import checkpoint_folder, write_task
from infosteer import Steering, intervene, key_entropy
from model import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GOLDEN = Path(__file__).parent / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_generated_ids_equal_the_reference(name):
    model, expected = Transformer.from_pretrained(GOLDEN / name, device="cuda"), load_file(GOLDEN / name / "golden.safetensors")
    torch.testing.assert_close(model(expected["tokens"].cuda()).cpu(), expected["logits"], atol=1e-3, rtol=0)
    prompts = [row[:n].tolist() for row, n in zip(expected["prompts"], expected["prompt_lengths"])]
    assert model.generate(prompts, 24) == Transformer.from_pretrained(GOLDEN / name).generate(prompts, 24)


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
    torch.testing.assert_close(ours.float().sort(-1).values, theirs.float().sort(-1).values, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["none", "int", "reg"])
def test_a_bf16_run_follows_the_fp32_run(tmp_path, method):
    checkpoint_folder(tmp_path / "base")
    write_task(tmp_path / "data", "boolq", "train", [(f"is {i} an even number?", str(i % 2 == 0).lower()) for i in range(60)])
    losses = {}
    for precision in ("fp32", "bf16"):
        train.main([
            "--model", str(tmp_path / "base"), "--task", "boolq", "--data", str(tmp_path / "data"), "--out", str(tmp_path / precision),
            "--batch", "8", "--lr", "1e-3", "--warmup", "2", "--steer", method, "--precision", precision, "--device", "cuda"])
        losses[precision] = [json.loads(line)["loss"] for line in open(tmp_path / precision / "log.jsonl")]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02) and losses["bf16"][-1] < losses["bf16"][0]
    assert Steering(method).method == json.loads((tmp_path / "bf16" / "args.json").read_text())["steering"]["method"]
