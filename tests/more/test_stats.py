"""After this file you know how numbers become a statement: means, intervals, pairs, folders."""
import json
import math

import pytest
import torch

from data import BadInput
from data.tasks import TOY
from eval import which_model
from helpers import checkpoint_folder
from infosteer import Steering
from lab.stats import (T975, clustered_mean, compare, comparison_table, difference, find_runs,
                       grouped_correlation, interval, mean_and_error, percent, runs_from, scan,
                       suites_of, terciles)


def scored(arm, accuracies, model="m", tasks=("toy-cloze", "toy-plain"), nll={}):
    """Runs as find_runs gives them, from {seed: accuracy} and {seed: nll}."""
    return [{"model": model, "arm": arm, "seed": seed, "scores": dict.fromkeys(tasks, accuracy),
             "nll": dict.fromkeys(tasks, nll.get(seed))} for seed, accuracy in accuracies.items()]


def by_arm(rows):
    return {row["arm"]: row for row in rows}


# ----------------------------------------------------------------------- means and intervals


def test_an_interval_is_student_s():
    # mean 2, standard deviation 1, three values: t = 4.303 with two degrees of freedom
    assert mean_and_error([1, 2, 3]) == (2, pytest.approx(1 / math.sqrt(3)))
    half = 4.303 / math.sqrt(3)
    assert interval([1, 2, 3]) == (2, pytest.approx(2 - half), pytest.approx(2 + half))
    assert T975[0] == 12.706 and T975[4] == 2.571                  # one degree of freedom, and five


def test_one_value_has_no_error_and_no_interval():
    assert mean_and_error([0.5]) == (0.5, None) and interval([0.5]) == (0.5, None, None)


def test_more_values_than_the_table_knows_take_its_last_quantile():
    values = [0.0, 1.0] * 40
    mean, error = mean_and_error(values)
    assert interval(values)[2] == pytest.approx(mean + T975[-1] * error)


# ------------------------------------------------------------------------------ comparing runs


def test_seeds_become_a_mean_a_standard_error_and_a_paired_interval():
    rows = by_arm(compare(
        scored("none", {0: 0.50, 1: 0.60, 2: 0.70}) + scored("reg", {0: 0.52, 1: 0.63, 2: 0.71})
        + scored("base", {None: 0.1})))
    none, reg, base = rows["none"], rows["reg"], rows["base"]
    assert list(rows) == ["base", "none", "reg"]               # whatever the order of the runs
    assert none["mean"] == pytest.approx(0.6)
    assert none["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert none["difference"] is None and none["interval"] is None
    assert base["standard_error"] is None and base["difference"] is None
    # the differences are 0.02, 0.03 and 0.01: mean 0.02, standard deviation 0.01
    half = 4.303 * 0.01 / math.sqrt(3)
    assert reg["difference"] == pytest.approx(0.02)
    assert reg["interval"] == pytest.approx([0.02 - half, 0.02 + half])


def test_differences_are_paired_by_seed_not_by_order():
    none = scored("none", {0: 0.1, 1: 0.5, 2: 0.9})
    reg = scored("reg", {2: 0.92, 0: 0.12, 1: 0.52, 7: 0.0})   # in another order, and one more
    row = by_arm(compare(none + reg))["reg"]
    assert row["seeds"] == 4
    assert row["difference"] == pytest.approx(0.02)
    assert row["interval"] == pytest.approx([0.02, 0.02])          # every pair differs by 0.02


def test_without_a_common_seed_there_is_no_difference():
    row = by_arm(compare(scored("none", {0: 0.5}) + scored("reg", {1: 0.6})))["reg"]
    assert row["difference"] is None and difference(row) == ""


def test_a_run_that_lacks_a_task_of_a_suite_is_left_out_of_that_suite():
    runs = scored("reg", {0: 0.5}) + scored("reg", {1: 0.9}, tasks=["toy-cloze"])
    row, = compare(runs)
    assert (row["seeds"], row["mean"]) == (1, 0.5)


def test_the_accuracy_of_a_suite_is_the_mean_over_its_tasks():
    run = {"model": "m", "arm": "none", "seed": 0, "scores": {"toy-cloze": 0.2, "toy-plain": 0.6},
           "nll": {"toy-cloze": 1.5, "toy-plain": 0.5}}
    assert len({TOY[name].suite for name in run["scores"]}) == 1
    assert [row["mean"] for row in compare([run])] == [pytest.approx(0.4)]
    assert [row["nll"] for row in compare([run])] == [1]
    single = compare([run], {name: [name] for name in run["scores"]})
    assert [(row["suite"], row["mean"]) for row in single] == [
        ("toy-cloze", 0.2), ("toy-plain", 0.6)]


def test_the_nll_is_averaged_and_paired_by_seed_as_the_accuracy_is():
    none = scored("none", {0: 0.5, 1: 0.5, 2: 0.5}, nll={0: 1.0, 1: 2.0, 2: 3.0})
    reg = scored("reg", {2: 0.5, 0: 0.5, 1: 0.5}, nll={2: 2.99, 0: 0.98, 1: 1.97})
    rows = by_arm(compare(none + reg))
    assert (rows["none"]["nll"], rows["none"]["nll_difference"]) == (2, None)
    assert rows["none"]["nll_standard_error"] == pytest.approx(1 / math.sqrt(3))
    # the differences are -0.02, -0.03 and -0.01: mean -0.02, standard deviation 0.01
    half = 4.303 * 0.01 / math.sqrt(3)
    assert rows["reg"]["nll_difference"] == pytest.approx(-0.02)
    assert rows["reg"]["nll_interval"] == pytest.approx([-0.02 - half, -0.02 + half])
    assert difference(rows["reg"], "nll_", 1, 3) == "not shown: -0.020 [-0.045, +0.005]"


def test_a_task_without_responses_has_no_part_in_the_nll_of_its_suite():
    run = {"model": "m", "arm": "none", "seed": 0, "scores": {"mawps": 0.2, "AddSub": 0.6},
           "nll": {"mawps": None, "AddSub": 0.5}}
    row, = compare([run], {"out": ["mawps", "AddSub"]})
    assert (row["mean"], row["nll"]) == (pytest.approx(0.4), 0.5)
    row, = compare([run], {"out": ["mawps"]})
    assert (row["mean"], row["nll"], row["nll_standard_error"]) == (0.2, None, None)


def test_an_arm_of_which_a_run_has_no_nll_shows_none():
    none = scored("none", {0: 0.5, 1: 0.5}, nll={0: 1.0, 1: 2.0})
    rows = by_arm(compare(none + scored("reg", {0: 0.5, 1: 0.6}, nll={0: 1.0})))   # one is older
    assert rows["none"]["nll"] == 1.5 and rows["reg"]["nll"] is None
    assert (rows["reg"]["difference"], rows["reg"]["nll_difference"]) == (pytest.approx(0.05), None)
    line = comparison_table([*rows.values()]).splitlines()[10]
    assert line.split() == ["reg", "2", "-"]


def test_runs_of_two_models_are_never_compared():
    rows = compare(scored("none", {0: 0.1}, "a") + scored("reg", {0: 0.5}, "b"))
    assert [row["difference"] for row in rows] == [None, None]


def test_suites_are_in_the_order_of_the_tasks():
    suites = suites_of(["boolq", "toy-plain", "toy-facts", "toy-cloze"])
    assert list(suites.items())[1:] == [(TOY["toy-cloze"].suite, ["toy-cloze", "toy-plain"]),
                                        ("boolq", ["boolq"])]


# --------------------------------------------------------------------------------- what is said


def row(difference, interval=None, **more):
    return {"mean": 0.5, "standard_error": None, "difference": difference, "interval": interval,
            **more}


def test_an_interval_that_covers_zero_shows_nothing():
    assert difference(row(0.02, [-0.005, 0.045])) == "not shown: +2.0 [-0.5, +4.5]"
    assert difference(row(0.02, [0.0, 0.04])) == "not shown: +2.0 [+0.0, +4.0]"
    assert difference(row(-0.1, [-0.125, -0.075])) == "-10.0 [-12.5, -7.5]"
    assert difference(row(0.02)) == "+2.0 (one seed)"


def test_accuracies_are_percents_with_one_decimal():
    assert percent(row(None)) == "50.0" and difference(row(None)) == ""
    assert percent(row(None, mean=0.1234, standard_error=0.0049)) == "12.3 ± 0.5"


def test_in_the_table_the_word_none_is_an_arm_and_never_a_verdict():
    runs = (scored("none", {0: 0.5, 1: 0.6}, nll={0: 1, 1: 2})
            + scored("int", {0: 0.5, 1: 0.7}, nll={0: 1.25, 1: 1.5})
            + scored("reg", {0: 0.7, 1: 0.8}, nll={0: 0.5, 1: 1.5}))
    text = comparison_table(compare(runs))
    assert [line.split() for line in text.splitlines()[:7]] == [
        ["m"], [],
        ["arm", "seeds", "accuracy,", "%", "difference", "to", "none"],
        TOY["toy-cloze"].suite.split(),
        ["none", "2", "55.0", "±", "5.0"],
        ["int", "2", "60.0", "±", "10.0", "not", "shown:", "+5.0", "[-58.5,", "+68.5]"],
        ["reg", "2", "75.0", "±", "5.0", "+20.0", "[+20.0,", "+20.0]"]]
    assert [line.split() for line in text.splitlines()[7:13]] == [
        [],
        ["arm", "seeds", "nll", "difference", "to", "none"],
        TOY["toy-cloze"].suite.split(),
        ["none", "2", "1.500", "±", "0.500"],
        ["int", "2", "1.375", "±", "0.125", "not", "shown:", "-0.125", "[-4.890,", "+4.640]"],
        ["reg", "2", "1.000", "±", "0.500", "-0.500", "[-0.500,", "-0.500]"]]


def test_the_paper_s_figures_stand_beside_ours():
    suite = TOY["toy-cloze"].suite
    rows = compare(scored("none", {0: 0.5}) + scored("int", {0: 0.6}))
    lines = comparison_table(rows, {("int", suite): 83.3}).splitlines()[2:]
    assert lines[0].endswith("the paper")
    assert lines[2].split() == ["none", "1", "50.0"]
    assert lines[3].split() == ["int", "1", "60.0", "+10.0", "(one", "seed)", "83.3"]


# ---------------------------------------------------------------------------- a folder of runs


def make_run(folder, steering="none", seed=0, scores={"boolq": 0.5}, model="x/m", sha="1", nll={},
             **more):
    """A finished run's folder, without weights."""
    (folder / "eval").mkdir(parents=True)
    settings = {"model": model, "model_sha256": sha * 64, "seed": seed, **more}
    if "base" not in more:
        settings["steering"] = Steering(steering).settings
    (folder / "args.json").write_text(json.dumps(settings))
    for task, accuracy in scores.items():
        summary = {"task": task, "accuracy": accuracy, **nll}
        (folder / "eval" / f"{task}.json").write_text(json.dumps(summary))
    return folder


def means(folder):
    return {row["arm"]: row["mean"] for row in compare(find_runs(folder))}


def test_two_runs_of_one_arm_and_seed_are_two_arms(tmp_path):
    make_run(tmp_path / "faster", scores={"boolq": 0.7})
    make_run(tmp_path / "m-none-seed0")
    make_run(tmp_path / "m-reg-seed0", "reg", scores={"boolq": 0.6})
    assert means(tmp_path) == {"none": 0.5, "none (faster)": 0.7, "reg": 0.6}


def test_scores_of_a_part_or_under_other_settings_do_not_count(tmp_path):
    make_run(tmp_path / "m-none-seed0", scores={"boolq": 0.5, "boolq-first10": 1, "more": 1})
    run, = find_runs(tmp_path)
    assert run["scores"] == {"boolq": 0.5}


def test_the_nll_of_a_summary_counts_and_an_older_one_has_none(tmp_path):
    make_run(tmp_path / "m-none-seed0", nll={"nll": 1.25})
    make_run(tmp_path / "m-reg-seed0", "reg")
    make_run(tmp_path / "m-int-seed0", "int", nll={"nll": None})           # nothing to take it of
    assert {row["arm"]: row["nll"] for row in compare(find_runs(tmp_path))} == {
        "none": 1.25, "int": None, "reg": None}


def test_a_base_model_is_an_arm_without_a_seed(tmp_path):
    make_run(tmp_path / "m-base", base=True, seed=None)
    make_run(tmp_path / "m-semantic-seed0", "semantic", scores={"boolq": 0.6})
    assert {(run["arm"], run["seed"]) for run in find_runs(tmp_path)} == {
        ("base", None), ("semantic", 0)}


def test_runs_in_the_making_and_other_folders_are_no_runs(tmp_path):
    make_run(tmp_path / "m-none-seed0.partial")
    make_run(tmp_path / "m-none-seed0.old")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "args.json").write_text('{"port": 80}')
    assert scan(tmp_path) == []
    with pytest.raises(BadInput, match="no scored run"):
        find_runs(tmp_path)


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        find_runs(tmp_path / "nowhere")


@pytest.mark.parametrize("file, text, message", [
    ("args.json", "{", "not JSON, or cut short"),
    ("args.json", '{"steering": {"method": "none"}, "model": 3}', "model is 3"),
    ("args.json", '{"steering": {"method": "none"}, "model": "m"}', "model_sha256 is None"),
    ("args.json", '{"steering": {}, "model": "m", "model_sha256": "1", "seed": ""}', "seed is ''"),
    ("args.json", '{"steering": 5, "model": "m", "model_sha256": "1", "seed": 0}', "steering is 5"),
    ("eval/boolq.json", "[]", "a JSON object is needed"),
    ("eval/boolq.json", '{"accuracy": 7}', "accuracy is 7"),
    ("eval/boolq.json", '{"accuracy": true}', "accuracy is True"),
    ("eval/boolq.json", '{"accuracy": 1, "nll": "1"}', "nll is '1'"),
    ("eval/boolq.json", '{"accuracy": 1, "nll": -1}', "nll is -1"),
    ("eval/boolq.json", '{"accuracy": 1, "nll": NaN}', "nll is nan"),
])
def test_one_damaged_run_costs_a_line_and_not_the_others(tmp_path, capsys, file, text, message):
    make_run(tmp_path / "m-none-seed0")
    (make_run(tmp_path / "m-none-seed1") / file).write_text(text)
    runs, error = find_runs(tmp_path), capsys.readouterr().err
    assert [run["seed"] for run in runs] == [0]
    assert error.startswith("left out: ") and error.count("\n") == 1
    assert message in error and str(tmp_path / "m-none-seed1") in error


def test_one_model_under_two_paths_is_one_and_two_under_one_path_are_two(tmp_path):
    make_run(tmp_path / "m-none-seed0", model="here/m")
    make_run(tmp_path / "m-none-seed1", model="there/m", seed=1)
    make_run(tmp_path / "m-reg-seed0", "reg", model="here/m", sha="2")
    runs = find_runs(tmp_path)
    assert [(run["model"], run["seed"]) for run in runs] == [
        ("here/m", 0), ("here/m", 1), ("here/m (22222222)", 0)]
    assert {row["seeds"] for row in compare(runs) if row["model"] == "here/m"} == {2}


def test_what_a_run_began_with_is_decided_by_content_not_by_path(tmp_path):
    model = checkpoint_folder(tmp_path / "model")
    out = tmp_path / "out"
    make_run(out / "m-reg-seed0", "reg")
    for name, method, seed in (("x", "int", 3), ("a", "reg", 0), ("b", "none", 1)):
        folder = make_run(out / name, method, seed, scores={}, model="gone/away")
        settings = json.loads((folder / "args.json").read_text())
        settings["model_sha256"] = which_model(model)
        (folder / "args.json").write_text(json.dumps(settings))
    assert [(run["arm"], run["seed"], run["folder"]) for run in runs_from(out, model)] == [
        ("none", 1, out / "b"), ("int", 3, out / "x"), ("reg", 0, out / "a")]
    assert runs_from(tmp_path / "nowhere", model) == []


# ------------------------------------------------------------------------------------- terciles


def test_thirds_of_the_tokens_are_low_middle_and_high():
    x = torch.randperm(30).double()
    levels, cuts = terciles(x)
    assert levels.bincount().tolist() == [10, 10, 10]
    assert x[levels == 0].max() < x[levels == 1].min() < x[levels == 2].min()
    assert torch.equal(levels, (x[:, None] > cuts).sum(1))
    assert terciles(torch.ones(5))[0].tolist() == [0] * 5
    assert terciles(torch.ones(1))[0].tolist() == [0]


# ----------------------------------------------------------------- means over tokens, by text


def drawn(n_texts=7, seed=0):
    """x, y, group, text of tokens that share something with their text and with their group."""
    g = torch.Generator().manual_seed(seed)
    text = torch.arange(n_texts).repeat_interleave(torch.randint(2, 9, (n_texts,), generator=g))
    group = torch.randint(4, text.shape, generator=g)
    level = torch.tensor([5.0, 1.0, 0.0, 3.0])[group]
    x, y = (torch.randn(len(text), generator=g, dtype=torch.double)
            + torch.randn(n_texts, generator=g)[text] + level for _ in range(2))
    return x, y, group, text


def test_the_error_of_a_mean_counts_every_pair_of_tokens_of_one_text():
    x, _, _, text = drawn()
    mean, error = clustered_mean(x, text * 10 + 3)             # what texts are called plays no role
    e, n, G = x - x.mean(), len(x), 7
    pairs = sum((e[i] * e[j]).item() for i in range(n) for j in range(n) if text[i] == text[j])
    assert mean == pytest.approx(x.mean().item())
    assert error == pytest.approx((G / (G - 1) * pairs) ** 0.5 / n)


def test_with_one_token_in_each_text_it_is_the_usual_error():
    x = drawn()[0]
    _, error = clustered_mean(x, torch.arange(len(x)))
    assert error == pytest.approx(x.std().item() / len(x) ** 0.5)


def test_tokens_said_twice_make_a_mean_no_surer():
    x, _, _, text = drawn()
    twice = clustered_mean(torch.cat([x, x]), torch.cat([text, text]))
    assert twice == pytest.approx(clustered_mean(x, text))


def test_without_a_second_text_there_is_no_error():
    x, y, group, _ = drawn()
    one = torch.zeros_like(group)
    assert clustered_mean(x, one) == (pytest.approx(x.mean().item()), None)
    assert clustered_mean(x[:0], one[:0]) == (None, None)
    r, error = grouped_correlation(x, y, group, one)
    assert r is not None and error is None


def by_hand(x, y, group):
    """r after centring on the groups' means."""
    x, y = (v - torch.stack([v[group == g].mean() for g in group]) for v in (x, y))
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


@pytest.mark.parametrize("grouped", [False, True])
def test_correlation_and_jackknife_are_those_of_leaving_texts_out_by_hand(grouped):
    x, y, group, text = drawn()
    group = group if grouped else torch.zeros_like(group)
    without = torch.tensor([by_hand(x[text != t], y[text != t], group[text != t])
                            for t in range(7)], dtype=torch.double)
    jackknife = (6 / 7 * (without - without.mean()).square().sum()).sqrt().item()
    r, error = grouped_correlation(1000 + x, y / 1000, group, text)    # level and scale: no matter
    assert r == pytest.approx(by_hand(x, y, group), abs=1e-6)
    assert error == pytest.approx(jackknife, abs=1e-6)


def test_what_is_a_multiple_of_the_other_correlates_fully():
    x, _, group, text = drawn()
    for groups in (group, torch.zeros_like(group)):
        r, error = grouped_correlation(x, x, groups, text)
        assert (r, error) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
        assert grouped_correlation(x, 3 - 2 * x, groups, text)[0] == pytest.approx(-1)


def test_what_only_the_groups_differ_in_disappears_within_them():
    g = torch.Generator().manual_seed(0)
    group, text = torch.randint(5, (4000,), generator=g), torch.arange(4000) // 20
    x, y = (torch.randn(4000, generator=g, dtype=torch.double) + 3 * group for _ in range(2))
    raw, _ = grouped_correlation(x, y, torch.zeros_like(group), text)
    within, error = grouped_correlation(x, y, group, text)
    assert raw > 0.9 and abs(within) < 3 * error < 0.1


def test_what_does_not_vary_within_groups_has_no_correlation():
    _, y, group, text = drawn()
    assert grouped_correlation(5.1 + 0.1 * group, y, group, text) == (None, None)
    assert grouped_correlation(torch.full((len(y),), 0.1), y, group, text) == (None, None)
    assert grouped_correlation(y[:2], y[:2], group[:2], text[:2]) == (None, None)
    assert grouped_correlation(y[:0], y[:0], group[:0], text[:0]) == (None, None)
