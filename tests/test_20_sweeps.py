"""After this file you know how the paper's tables are made here: key regions, sweeps that train what is missing, and the page about it all."""
import html.parser
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import eval as evaluation
import train
from conftest import ROOT
from data import BadInput
from data.tasks import SUITES, TOY, load
from infosteer import Steering


def arms_of(name, n_layers=24):
    return evaluation.sweep_arms(name, n_layers)


# ------------------------------------------------------------------------------------------------------------- key regions


def test_regions_of_the_base_model_are_quarters_and_those_of_another_are_counted_at_its_cuts():
    model, tokenizer = evaluation.load(evaluation.TOY_FOLDER / "llama")
    texts = evaluation.task_texts(tokenizer, ["toy-facts"], evaluation.TOY_FOLDER, 6)
    shares, cuts = evaluation.key_regions(model, texts, None)
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.5, 0.25]).double().expand(4, 2, 3), rtol=0, atol=0.002)
    other, _ = evaluation.load(evaluation.TOY_FOLDER / "qwen")
    shares, _ = evaluation.key_regions(other, texts, cuts)
    keys = [[] for _ in other.blocks]
    handles = [block.memory.values.register_forward_pre_hook(lambda _, inputs, layer=layer: keys[layer].append(inputs[0][0])) for layer, block in enumerate(other.blocks)]
    with torch.no_grad():
        for ids in texts:
            other(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    for layer in range(4):
        for reading, of in enumerate((torch.cat(keys[layer]).abs(), torch.cat(keys[layer]))):
            low, high = cuts[layer, reading]
            expected = torch.stack([(of <= low).sum(), ((of > low) & (of <= high)).sum(), (of > high).sum()]) / of.numel()
            torch.testing.assert_close(shares[layer, reading].float(), expected)


# ------------------------------------------------------------------------------------------------------------------ sweeps


def test_thirds_of_the_layers_are_those_of_table_8():
    arms = arms_of("layers")
    for label, first, last in (("early", 1, 8), ("middle", 9, 16), ("late", 17, 24), ("early+middle", 1, 16), ("middle+late", 9, 24)):
        assert arms[f"int {label}"].layers == {layer: {} for layer in range(first, last + 1)}
    assert [len(arms_of("layers", 4)[f"int {label}"].layers) for label in ("early", "middle", "late")] == [1, 2, 1]
    with pytest.raises(BadInput, match="2 layers cannot be divided"):
        arms_of("layers", 2)


@pytest.mark.parametrize("name", evaluation.PAPER_TABLES)
def test_every_arm_of_the_paper_is_trained_and_int_in_both_readings(name):
    arms = arms_of(name)
    assert set(evaluation.PAPER_TABLES[name]) - {"base"} <= set(arms)
    for label, steering in arms.items():
        if steering.method == "int":
            other = arms[label.removesuffix(" (by value)") if "value" in label else f"{label} (by value)"]
            assert {steering.rank_by, other.rank_by} == {"magnitude", "value"} and steering.layers == other.layers and steering.alpha == other.alpha
    names = [evaluation.arm_name(steering) for steering in arms.values()]
    assert len(set(names)) == len(names)                                       # each has a folder of its own


@pytest.mark.parametrize("steering", [
    Steering(), Steering("int", p=0.02, alpha=5.0, rank_by="value"), Steering("reg", lam=-0.01, normalise="softmax"), Steering("surrogate", lambda_1=0.5),
    Steering("semantic", base="reg", lam=0.3, groups=3, layers={1: {}, 2: {"lam": 0.1}}), Steering("surrogate-entropy", buckets=8)], ids=str)
def test_flags_of_a_steering_ask_for_it(steering, tmp_path):
    run, = train.plan(train.read_settings([*evaluation.flags(steering), "--out", str(tmp_path / "x")]))
    assert run[0].steering == steering


def command(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()
    return capsys.readouterr().out


def in_process(command, **settings):
    """train.py without starting a Python for each run, which takes longer than the run. (The test of bad flags starts a real one.)"""
    assert command[:2] == [sys.executable, str(ROOT / "train.py")]
    train.main(command[2:])
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of short runs on the toy world, made by a sweep, and its result."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_examples", lambda data, name, split: load(data, name, split)[:20])
        patch.setattr(evaluation, "TOY", {name: TOY[name] for name in ("toy-facts", "toy-facts-new", "toy-common")})
        patch.setattr(evaluation.subprocess, "run", in_process)
        patch.setattr(sys, "argv", ["eval.py", "--analyse", "ood", "--runs", str(folder), "--seed", "0", "1", "--device", "cpu", "--json",
                                    "--train-flags=--steps 2 --warmup 1 --limit 30"])
        out = []
        patch.setattr("builtins.print", lambda *what, **how: out.append(what[0]) if "file" not in how else None)
        evaluation.main()
    return folder, json.loads(out[-1])


def test_a_sweep_trains_what_is_missing_and_compares_it(runs, monkeypatch, capsys):
    folder, result = runs
    assert sorted(path.name for path in folder.iterdir()) == sorted(["llama-base"] + [
        f"llama-{arm}-seed{seed}" for arm in ("none", "int", "int-value", "reg") for seed in (0, 1)])
    cells = {(row["label"], row["suite"]): row for row in result["rows"]}
    assert {suite for _, suite in cells} == {*SUITES, "toy-facts", "toy-facts-new", "toy-common"}
    for seed in (0, 1):
        assert json.loads((folder / f"llama-int-value-seed{seed}" / "args.json").read_text())["steering"]["rank_by"] == "value"
    scores = [json.loads((folder / f"llama-reg-seed{seed}" / "eval" / "toy-facts.json").read_text())["accuracy"] for seed in (0, 1)]
    assert cells["reg", "toy-facts"]["mean"] == pytest.approx(sum(scores) / 2) and cells["reg", "toy-facts"]["seeds"] == 2
    assert result["paper"]["reg"] == [66.1, 86.0]
    text = evaluation.sweep_text(result)
    assert "int (by value)" in text and "66.8 / 86.6" in text or "[66.8, 86.6]" in text

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")}
    monkeypatch.setattr(evaluation.subprocess, "run", None)                    # nothing is missing, so nothing is trained
    monkeypatch.setattr(evaluation, "load_examples", lambda data, name, split: load(data, name, split)[:20])
    monkeypatch.setattr(evaluation, "TOY", {name: TOY[name] for name in ("toy-facts", "toy-facts-new", "toy-common")})
    command(monkeypatch, capsys, "--analyse", "ood", "--runs", folder, "--seed", 0, 1, "--device", "cpu")
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")}


def test_runs_of_different_recipes_are_not_compared(runs, tmp_path, monkeypatch):
    shutil.copytree(runs[0], tmp_path / "out")
    path = tmp_path / "out" / "llama-reg-seed1" / "args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 0.5}))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--analyse", "ood", "--runs", str(tmp_path / "out"), "--seed", "0", "1", "--device", "cpu"])
    with pytest.raises(BadInput, match=r"differ in lr \(0.0002, 0.5\)"):
        evaluation.main()


def test_what_train_says_of_bad_flags_reaches_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--analyse", "magnitude", "--runs", str(tmp_path), "--train-flags=--lr x"])
    with pytest.raises(BadInput, match="--lr: 'x' is not a number"):
        evaluation.main()
    assert not list(tmp_path.iterdir())


def test_regions_of_a_folder_of_runs(runs, monkeypatch, capsys):
    result = json.loads(command(monkeypatch, capsys, "--analyse", "regions", "--runs", runs[0], "--items", 9, "--json", "--device", "cpu"))
    assert list(result["arms"]) == ["base", "none", "int", "int-value", "reg"] and result["arms"]["int"]["seeds"] == 2 and result["texts"] == 9
    for arm in result["arms"].values():
        for reading in arm["mean"]:
            assert sum(reading) == pytest.approx(1)
    seeds = [result["arms"]["reg"]["by_seed"][seed][0][1] for seed in ("0", "1")]
    assert result["arms"]["reg"]["standard_error"][0][1] == pytest.approx(abs(seeds[0] - seeds[1]) / 2)
    text = command(monkeypatch, capsys, "--analyse", "regions", "--runs", runs[0], "--items", 9, "--per-layer", "--device", "cpu")
    assert text.count("layer 4") == 2 * 5


def test_regions_without_runs_say_how_to_make_some(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--analyse", "regions", "--runs", str(tmp_path)])
    with pytest.raises(BadInput, match="no finished run of train.py that began with"):
        evaluation.main()


# ------------------------------------------------------------------------------------------------------------------ report


def test_verdicts_follow_the_interval():
    assert evaluation.verdict([0.01, 0.02, 0.03]) == ("not shown", "+2.0 [-0.5, +4.5]")
    assert evaluation.verdict([0.02, 0.021, 0.022])[0] == "as in the paper" and evaluation.verdict([0.02, 0.021, 0.022], -1)[0] == "the opposite"
    assert evaluation.verdict([-0.02, -0.021, -0.022], -1)[0] == "as in the paper"
    assert evaluation.verdict([0.5]) == ("not shown: one seed", "+50.0")


class Links(html.parser.HTMLParser):
    """Collects what a page would ask of somebody else, and its headings."""

    def __init__(self):
        super().__init__()
        self.asked, self.headings, self.inside = [], [], None

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        if tag in ("script", "link", "img", "iframe", "object"):
            self.asked.append(tag)
        self.asked += [value for name, value in attributes if name in ("src", "href", "srcset", "action") and not value.startswith("#")]

    def handle_data(self, text):
        if self.inside == "h2":
            self.headings.append(text.strip())


def test_the_report_shows_everything_and_asks_nobody(runs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "<script>alert(1)</script>"
    shutil.copytree(runs[0], folder)
    command(monkeypatch, capsys, "--report", folder, "--device", "cpu")
    page = (folder / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert not links.asked and "<script" not in page and "://" not in re.sub(r'xmlns="[^"]*"', "", page)
    for heading in ("What was run", "What the paper claims, and what is seen here", "Accuracy", "In and out of distribution", "Set by set (the paper's Fig. 3)",
                    "Training", "Key regions (the paper's Fig. 4)", "Flux, token by token", "Mean flux of kinds of words", "The most specific memories"):
        assert heading in links.headings
    assert "--steps 2" in page and "int-value" in page and f"{torch.__version__}" in page
    accuracy = evaluation.compare(evaluation.find_runs(folder))
    for row in accuracy:
        assert evaluation.percent(row) in page


def test_a_report_about_nothing_is_refused(tmp_path, monkeypatch):
    for folder, message in ((tmp_path, "no scored run"), (tmp_path / "nowhere", "no such folder")):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--report", str(folder)])
        with pytest.raises(BadInput, match=message):
            evaluation.main()
    assert not (tmp_path / "report.html").exists()
