"""After this file you know the laptop experiment: what the default command does, what steering does to a model that knows something,
and how seeds become an interval."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from data.tasks import SUITES, TOY, load
from infosteer import Steering, intervene, key_entropy

MODELS = ("llama", "qwen", "gemma")


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_models_are_small_and_know_the_toy_world(name, tmp_path):
    folder = evaluation.TOY_FOLDER / name
    assert sum(path.stat().st_size for path in folder.iterdir() if path.name != "log.jsonl") < 4_000_000
    summary, = evaluation.score(folder, ["toy-cloze"], evaluation.TOY_FOLDER, tmp_path, device="cpu", limit=100)
    stated = json.loads((folder / "pretraining.json").read_text())
    assert summary["accuracy"] > 0.9 and abs(summary["accuracy"] - stated["cloze_accuracy"]) < 0.05


def keys_of(model, ids):
    """The key coefficients [T, d_m] of every layer, caught at the down projection."""
    keys = []
    hooks = [block.memory.values.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0])) for block in model.blocks]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return keys


def test_the_two_readings_of_eq_4_on_a_model_that_knows_something():
    model, tokenizer = evaluation.load(evaluation.TOY_FOLDER / "llama")
    prompts = [tokenizer.encode(example.prompt, special=False) for example in load(evaluation.TOY_FOLDER, "toy-facts", "test")[:8]]
    for k in keys_of(model, prompts[0]):
        raised = {rank_by: intervene(k, 0.01, 1.0, rank_by) for rank_by in ("magnitude", "value")}
        for rank_by, new in raised.items():
            assert (new != k).sum(-1).eq(round(0.01 * 384)).all()              # 4 of 384 memories, for each token
        weakest = k.abs().sort(-1).values[:, 3:4]
        assert (k.abs()[raised["magnitude"] != k].view(len(k), 4) <= weakest).all()          # idle ones
        assert (k[raised["value"] != k] < 0).all()                             # the most negative, which are not idle at all
        assert k.abs()[raised["value"] != k].mean() > 3 * k.abs().mean()
    moved = {rank_by: evaluation.intervention_change(model, prompts, Steering("int", rank_by=rank_by)) for rank_by in ("magnitude", "value")}
    assert len(moved["value"]) == 4 and max(moved["magnitude"]) < 0.1 < min(moved["value"])


def test_flux_of_the_shipped_model_equals_the_entropy_of_its_keys():
    model, tokenizer = evaluation.load(evaluation.TOY_FOLDER / "llama")
    ids = tokenizer.encode("Where does Pavo Dellin live?")
    _, flux, _ = model.hidden(torch.tensor([ids]), Steering("none"))
    for layer, k in enumerate(keys_of(model, ids)):
        torch.testing.assert_close(flux[layer, 0], key_entropy(k))
        assert 1 < flux[layer].min() and flux[layer].max() < math.log(384)


def run(tmp_path, capsys, *flags):
    """train.py with the toy defaults and few steps: (what it printed, the logs of its runs)"""
    train.main([*flags, "--device", "cpu", "--out", str(tmp_path)])
    return capsys.readouterr().out, {path.parent.name: [json.loads(line) for line in open(path)] for path in tmp_path.glob("**/log.jsonl")}


def test_reg_raises_the_key_entropy_of_the_shipped_model_and_a_negative_lambda_lowers_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "score", lambda folder, names, data, *rest, **settings: [
        dict(task=name, n=1, chance=0.5, accuracy=0.5, standard_error=0.5) for name in names])
    last = {}
    for lam in ("-1", "0", "1"):
        last[lam] = run(tmp_path / lam, capsys, "--steer", "reg", "--lam", lam, "--steps", "12", "--warmup", "2")[1]
    entropy = {lam: next(iter(logs.values()))[-1]["key_entropy"] if logs else None for lam, logs in last.items()}
    assert entropy["-1"] < entropy["0"] - 0.01 and entropy["0"] + 0.01 < entropy["1"]


def test_the_default_command_scores_base_and_run_on_three_suites(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "TOY_TASKS", {name: TOY[name] for name in ("toy-facts", "toy-sums-new", "toy-common")})
    monkeypatch.setattr(evaluation, "load_examples", lambda data, name, split: load(data, name, split)[:40])
    train.main(["--steer", "reg", "--steps", "4", "--out", str(tmp_path / "run"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "recipe     4 steps of 32, lr 0.0002" in out and out.rstrip().splitlines()[-1].startswith("next       python train.py --steer none int reg")
    for suite, task in zip(SUITES, ("toy-facts", "toy-sums-new", "toy-common")):
        assert suite in out and task in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-base", "run"]


def test_several_arms_and_seeds_end_in_a_comparison_and_finished_runs_are_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "TOY_TASKS", {"toy-facts": TOY["toy-facts"]})
    monkeypatch.setattr(evaluation, "load_examples", lambda data, name, split: load(data, name, split)[:20])
    flags = ["--steer", "none", "int", "--rank-by", "value", "--seed", "0", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    train.main(flags)
    out = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-base", "llama-int-value-seed0", "llama-int-value-seed1", "llama-none-seed0", "llama-none-seed1"]
    assert "int-value changes what the memories of this model answer by" in out
    comparison = out[out.index("accuracy in %"):]
    train.main(flags)
    again = capsys.readouterr().out
    assert again.count("is a finished run") == 4 and again[again.index("accuracy in %"):] == comparison
    monkeypatch.setattr(sys, "argv", ["eval.py", "--compare", str(tmp_path), "--json"])
    evaluation.main()
    rows = json.loads(capsys.readouterr().out)
    assert [(row["arm"], row["seeds"]) for row in rows] == [("base", 1), ("none", 2), ("int-value", 2)]
    with pytest.raises(evaluation.BadInput, match="another lr"):
        train.main([*flags, "--lr", "1e-3"])


def test_seeds_become_a_mean_a_standard_error_and_a_paired_interval():
    def runs(arm, *accuracies):
        return [dict(model="m", arm=arm, seed=seed, scores={"toy-cloze": accuracy, "toy-plain": accuracy}) for seed, accuracy in enumerate(accuracies)]

    rows = {row["arm"]: row for row in evaluation.compare(runs("none", 0.50, 0.60, 0.70) + runs("reg", 0.52, 0.63, 0.71) + runs("int", 0.40, 0.51, 0.59) + runs("base", 0.1)
                                                 + [dict(model="m", arm="reg", seed=3, scores={"toy-cloze": 0.9})])}      # half scored: left out
    assert rows["none"]["mean"] == pytest.approx(0.6) and rows["none"]["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert rows["none"]["difference"] is None and rows["base"]["standard_error"] is None
    # differences of reg: 0.02, 0.03, 0.01: mean 0.02, standard deviation 0.01, and t(0.975, 2) = 4.303
    assert rows["reg"]["difference"] == pytest.approx(0.02)
    assert rows["reg"]["interval"] == pytest.approx([0.02 - 4.303 * 0.01 / math.sqrt(3), 0.02 + 4.303 * 0.01 / math.sqrt(3)])
    table = evaluation.comparison_table(list(rows.values()))
    assert "none +2.0 [-0.5, +4.5]" in table and "-10.0 [-12.5, -7.5]" in table and "none -10.0" not in table


def test_arms_have_short_names():
    assert evaluation.arm_name(Steering("none")) == "none"
    assert evaluation.arm_name(Steering("reg", lam=0.05)) == "reg-lam0.05"
    assert evaluation.arm_name(Steering("reg", layers={1: {}, 2: {"lam": 0.05}}, normalise="softmax")) == "reg-softmax-layers1,2@lam=0.05"
    assert evaluation.arm_name(Steering("int", p=0.05, alpha=2.0, rank_by="value")) == "int-p0.05-alpha2-value"


def test_two_runs_of_one_arm_and_seed_are_two_arms(tmp_path):
    for name, accuracy in (("m-none-seed0", 0.5), ("faster", 0.7), ("m-reg-seed0", 0.6)):
        (tmp_path / name / "eval").mkdir(parents=True)
        steering = Steering("reg" if "reg" in name else "none").settings
        (tmp_path / name / "args.json").write_text(json.dumps({"model": "x/m", "seed": 0, "steering": steering}))
        (tmp_path / name / "eval" / "boolq.json").write_text(json.dumps({"task": "boolq", "accuracy": accuracy}))
    rows = {row["arm"]: row["mean"] for row in evaluation.compare(evaluation.find_runs(tmp_path))}
    assert rows == {"none": 0.5, "none (faster)": 0.7, "reg": 0.6}


def test_a_run_whose_steering_has_a_base_is_no_base_model(tmp_path):
    (tmp_path / "m-semantic-reg-seed0" / "eval").mkdir(parents=True)
    settings = {"model": "x/m", "seed": 0, "base": "reg", "steering": Steering("semantic", base="reg").settings}
    (tmp_path / "m-semantic-reg-seed0" / "args.json").write_text(json.dumps(settings))
    (tmp_path / "m-semantic-reg-seed0" / "eval" / "boolq.json").write_text(json.dumps({"task": "boolq", "accuracy": 0.5}))
    assert [run["arm"] for run in evaluation.find_runs(tmp_path)] == ["semantic-reg"]
