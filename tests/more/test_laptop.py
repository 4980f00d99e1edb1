"""After this file you know the laptop experiment: what the shipped models know, what steering does
to a model that knows something, and what the default command does."""
import hashlib
import json
import math

import pytest
import torch

import eval as evaluation
import train
from data.tasks import SUITES, TOY, load
from eval import TOY_FOLDER
from helpers import run_of
from infosteer import Steering, intervene, key_entropy

MODELS = ("llama", "qwen", "gemma")
LLAMA = ["--model", str(TOY_FOLDER / "llama")]


# ------------------------------------------------------------------------- the shipped models


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_models_are_small_and_know_the_toy_world(name, tmp_path):
    folder = TOY_FOLDER / name
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "log.jsonl"]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    summary, = evaluation.score(folder, ["toy-cloze"], TOY_FOLDER, tmp_path, device="cpu",
                                limit=100)
    stated = json.loads((folder / "pretraining.json").read_text())["cloze_accuracy"]
    assert summary["accuracy"] > 0.9 and abs(summary["accuracy"] - stated) < 0.05


@pytest.fixture(scope="module")
def llama():
    """The shipped Llama, and eight prompts."""
    model, tokenizer = evaluation.load(TOY_FOLDER / "llama")
    examples = load(TOY_FOLDER, "toy-facts", "test")[:8]
    return model, [tokenizer.encode(example.prompt, special=False) for example in examples]


def test_flux_of_the_shipped_model_equals_the_entropy_of_its_keys(llama):
    model, prompts = llama
    _, flux, _ = model.hidden(torch.tensor(prompts[:1]), Steering())
    keys, = evaluation.keys_of(model, prompts[:1])
    for layer, k in enumerate(keys):
        torch.testing.assert_close(flux[layer, 0], key_entropy(k))
        assert 1 < flux[layer].min() and flux[layer].max() < math.log(384)


# --------------------------------------------------------------- the two readings of eq. 4


def test_magnitude_raises_idle_memories_and_value_the_most_negative_which_are_busy(llama):
    model, prompts = llama
    keys, = evaluation.keys_of(model, prompts[:1])
    n = round(0.01 * 384)
    for k in keys:                                                             # [T, 384]
        idle, negative = (intervene(k, 0.01, 1.0, rank_by) != k
                          for rank_by in ("magnitude", "value"))
        assert idle.sum(-1).eq(n).all() and negative.sum(-1).eq(n).all()
        weakest = k.abs().sort(-1).values[:, n - 1:n]
        assert (k.abs()[idle].view(len(k), n) <= weakest).all()
        assert (k[negative] < 0).all() and k.abs()[negative].mean() > 3 * k.abs().mean()


def test_change_says_how_far_each_reading_moves_what_the_memories_answer(capsys):
    evaluation.main([*LLAMA, "--change", "--task", "toy-facts,toy-sums"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    changes = []
    for line, name in zip(lines, ("int", "int-value")):
        assert line.startswith(f"{name} changes what the memories of this model answer by ")
        mean, layers = line.split(" answer by ")[1].split("% ")[0], line.split("per layer ")[1]
        layers = [float(share.rstrip("%")) for share in layers.rstrip(")").split()]
        assert len(layers) == 4 and float(mean) == pytest.approx(sum(layers) / 4, abs=0.1)
        changes.append(layers)
    assert max(changes[0]) < 10 < min(changes[1])


# ------------------------------------------------------------------------ the default command


def test_the_default_command_scores_base_and_run_on_three_suites(tmp_path, capsys):
    train.main(["--steer", "reg", "--steps", "4", "--out", str(tmp_path / "run"),
                "--device", "cpu"])
    out = capsys.readouterr().out
    assert "recipe     4 steps of 32, lr 0.0002" in out
    *_, last = out.rstrip().splitlines()
    assert last == "next       python -m lab.experiment --steer none int reg --seed 0 1 2"
    table = out[out.index("accuracy, %"):].splitlines()
    assert table[0].split() == ["accuracy,", "%", "n", "chance", "base", "nll", "reg", "nll"]
    rows = {line.strip().split("  ")[0] for line in table[1:]}
    assert {*SUITES, *TOY} <= rows
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"llama-base", "run"}
    scored = {path.stem for path in (tmp_path / "run" / "eval").glob("*.json")}
    assert scored == {path.stem for path in (tmp_path / "llama-base" / "eval").glob("*.json")}
    assert scored == {*TOY}


def toy_run(out, *more):
    """A short run on the toy world -> its weights as bytes, the log."""
    train.main(["--steps", "6", "--warmup", "2", "--train-only", "--device", "cpu",
                "--out", str(out), *more])
    return (out / "model.safetensors").read_bytes(), run_of(out)[1]


def test_reg_raises_the_flux_of_the_shipped_model_and_a_negative_lambda_lowers_it(tmp_path):
    flux = {lam: toy_run(tmp_path / lam, "--steer", "reg", "--lam", lam, "--steps", "9")[1][-1]
            ["flux"] for lam in ("-1", "0", "1")}
    assert flux["-1"] < flux["0"] - 0.01 and flux["0"] + 0.01 < flux["1"]


def test_the_same_bytes_on_one_core_and_on_two_unless_threads_says_otherwise(tmp_path):
    digests = set()
    try:
        for cores in (1, 2):
            torch.set_num_threads(cores)           # what PyTorch does on so many cores
            weights, _ = toy_run(tmp_path / str(cores))
            digests.add(hashlib.sha256(weights).hexdigest())
            assert torch.get_num_threads() == 1
        toy_run(tmp_path / "threads", "--threads", "2", "--steps", "1")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(digests) == 1
