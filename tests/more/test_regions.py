"""After this file you know what the key regions of Fig. 4 are and how runs are compared by them."""
import json
import shutil

import pytest
import torch

import train
from data import BadInput
from data.tasks import load
from eval import TOY_FOLDER, keys_of
from eval import load as load_model
from infosteer import Steering
from lab import regions


@pytest.fixture(scope="module")
def texts():
    _, tokenizer = load_model(TOY_FOLDER / "llama")
    examples = load(TOY_FOLDER, "toy-facts", "test")[:6]
    return [ids for ids, _ in train.encode(examples, tokenizer, 256)]


def test_the_regions_of_the_base_model_are_quarters(texts):
    model, _ = load_model(TOY_FOLDER / "llama")
    shares, cuts = regions.key_regions(model, texts)
    quarters = torch.tensor([0.25, 0.5, 0.25]).double().expand(4, 2, 3)
    torch.testing.assert_close(shares, quarters, rtol=0, atol=0.002)
    assert cuts.shape == (4, 2, 2)
    assert (cuts[:, 0] > 0).all()                              # the ends in |k|
    assert (cuts[:, 1, 0] < 0).all() and (cuts[:, 1, 1] > 0).all()             # the ends in k


def test_another_model_is_counted_at_the_ends_of_the_base_model(texts):
    base, _ = load_model(TOY_FOLDER / "llama")
    other, _ = load_model(TOY_FOLDER / "qwen")
    _, cuts = regions.key_regions(base, texts)
    shares, the_same = regions.key_regions(other, texts, cuts)
    assert the_same is cuts
    with torch.no_grad():
        keys = [torch.cat(of_texts) for of_texts in zip(*keys_of(other, texts))]
    for layer, k in enumerate(keys):                           # [tokens, d_m]
        for reading, of in enumerate((k.abs(), k)):
            low, high = cuts[layer, reading]
            inside = [of <= low, (of > low) & (of <= high), of > high]
            expected = torch.stack(inside).flatten(1).double().mean(1)
            torch.testing.assert_close(shares[layer, reading], expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two arms of two seeds, trained for two large steps."""
    out = tmp_path_factory.mktemp("regions") / "out"
    for arm in ("none", "reg"):
        for seed in (0, 1):
            train.main(["--steer", arm, "--seed", str(seed), "--steps", "2", "--warmup", "1",
                        "--lr", "0.01", "--limit", "20", "--device", "cpu", "--train-only",
                        "--out", str(out / f"llama-{arm}-seed{seed}")])
    return out


def test_regions_of_a_folder_of_runs(runs, capsys):
    flags = ["--runs", str(runs), "--items", "9", "--device", "cpu"]
    regions.main([*flags, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result["arms"]) == ["base", "none", "reg"] and result["texts"] == 9
    assert [arm["seeds"] for arm in result["arms"].values()] == [1, 2, 2]
    for arm in result["arms"].values():
        for shares in (arm["mean"], *arm["layers"], *arm["by_seed"].values()):
            assert [sum(reading) for reading in shares] == pytest.approx([1, 1])
    reg = result["arms"]["reg"]
    assert abs(reg["mean"][0][0] - 0.25) > 0.01                # at the ends of the base model
    seeds = [reg["by_seed"][seed][0][1] for seed in ("0", "1")]
    assert reg["mean"][0][1] == pytest.approx(sum(seeds) / 2)
    assert reg["standard_error"][0][1] == pytest.approx(abs(seeds[0] - seeds[1]) / 2)
    regions.main([*flags, "--per-layer"])
    text = capsys.readouterr().out
    assert text.count("layer 4") == 2 * 3 and "±" in text


def test_regions_without_runs_say_how_to_make_some(tmp_path):
    with pytest.raises(BadInput, match="no finished run of train.py that began with"):
        regions.main(["--runs", str(tmp_path)])


def test_a_steered_run_is_counted_with_its_coefficients_changed(texts):
    model, _ = load_model(TOY_FOLDER / "llama")
    raised = Steering("int", p=0.2, alpha=4.0)
    plain, cuts = regions.key_regions(model, texts)
    shares, _ = regions.key_regions(model, texts, cuts, raised)
    with torch.no_grad():
        keys = [torch.cat(of_texts) for of_texts in zip(*keys_of(model, texts, raised))]
    for layer, k in enumerate(keys):
        low = (k.abs() <= cuts[layer, 0, 0]).double().mean().item()
        assert shares[layer, 0, 0].item() == pytest.approx(low)
    assert (shares[:, 0, 0] < plain[:, 0, 0] - 0.1).all()      # the idle fifth has left


def test_the_steering_of_runs_is_kept_when_asked_to(runs, tmp_path, capsys):
    runs = shutil.copytree(runs, tmp_path / "out")
    with pytest.raises(BadInput, match="--steered: none of these models was trained with"):
        regions.main(["--runs", str(runs), "--items", "3", "--steered"])
    train.main(["--steer", "int", "--p", "0.2", "--alpha", "4", "--steps", "2", "--warmup", "1",
                "--lr", "0.01", "--limit", "20", "--device", "cpu", "--train-only",
                "--out", str(runs / "llama-int-seed0")])
    capsys.readouterr()
    results = []
    for flags in ([], ["--steered"]):
        regions.main(["--runs", str(runs), "--items", "3", "--device", "cpu", "--json", *flags])
        results.append(json.loads(capsys.readouterr().out)["arms"])
    plain, steered = results
    assert plain["reg"] == steered["reg"] and plain["base"] == steered["base"]
    assert steered["int-p0.2-alpha4"]["mean"][0][0] < plain["int-p0.2-alpha4"]["mean"][0][0] - 0.1
