"""After this file you know how numbers become a statement: means, intervals, pairs, folders."""
import json
import math

import pytest
import torch

from data import BadInput
from data.tasks import TOY
from eval import which_model, with_error
from helpers import checkpoint_folder
from infosteer import Steering
from lab.stats import (by_item, clustered_mean, compare, comparison_table, difference, estimate,
                       excluded, find_runs, grouped_correlation, holm, interval, items_of, levels,
                       mean_and_error, quantile, runs_from, scan, suites_of, tail, terciles)


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
    half, of = 4.3027 / math.sqrt(3), interval([1, 2, 3])
    assert (of["mean"], of["low"], of["high"]) == (
        2, pytest.approx(2 - half, abs=1e-4), pytest.approx(2 + half, abs=1e-4))
    # With two degrees of freedom, P(|T| > t) = 1 - t / sqrt(2 + t^2); here t is 2 sqrt(3).
    assert of["p"] == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14), abs=1e-6)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (5, 2.57058),
                                   (20, 2.08596), (120, 1.97993)])
def test_quantiles_are_those_of_the_printed_tables(df, t):
    assert quantile(df) == pytest.approx(t, abs=1e-4) and tail(t, df) == pytest.approx(0.05, 1e-4)


def test_tails_have_a_closed_form_for_one_and_two_degrees_of_freedom():
    for t in (0.0, 0.1, 1.0, 3.0, 50.0):
        assert tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-6)
        assert tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)
    assert tail(2, 2) < tail(2, 1.5) < tail(2, 1)              # and parts of one lie between


def test_one_value_has_no_error_and_no_interval():
    assert mean_and_error([0.5]) == (0.5, None)
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "p": None}


def test_equal_values_divide_by_no_zero():
    assert interval([0.0, 0.0]) == {"mean": 0, "low": 0, "high": 0, "p": 1}
    assert interval([0.5, 0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5, "p": 0}


def test_degrees_of_freedom_of_two_variances_are_welch_s():
    # Welch (1947): two samples of 5 and 10, s^2 / n of 0.4 and 0.1: df = 0.25 / (0.04 + 0.01 / 9)
    of = estimate(1.0, [(0.4, 4), (0.1, 9)])
    df = 0.25 / (0.16 / 4 + 0.01 / 9)
    assert of["high"] - 1 == pytest.approx(quantile(df) * math.sqrt(0.5), rel=1e-4)
    assert of["p"] == pytest.approx(tail(1 / math.sqrt(0.5), df))


# ---------------------------------------------------------------------------- seeds and items


def drawn_differences(S, I, seed=0, seeds=0.3, items=1.0, both=1.0, mean=0.5):
    g = torch.Generator().manual_seed(seed)
    a, b, e = (torch.randn(*shape, generator=g, dtype=torch.double)
               for shape in ((S, 1), (1, I), (S, I)))
    return mean + seeds * a + items * b + both * e


def width(of):
    return of["high"] - of["low"]


def test_the_three_intervals_by_another_formula():
    """The sums of squares of a two-way analysis of variance, by hand, and min F' = F1 F2 / (F1 +
    F2) with its own degrees of freedom (Clark 1973, his equation)."""
    d = [[1.0, 2.0, 0.0, 3.0], [2.0, 4.0, 1.0, 1.0], [0.0, 3.0, -1.0, 4.0]]
    S, I, found = 3, 4, levels([torch.tensor(d).double()])
    mean = sum(map(sum, d)) / 12
    rows, columns = [sum(row) / I for row in d], [sum(column) / S for column in zip(*d)]
    of_seeds = sum((row - mean) ** 2 for row in rows) * I / (S - 1)            # mean squares
    of_items = sum((column - mean) ** 2 for column in columns) * S / (I - 1)
    F1, F2 = (12 * mean**2 / square for square in (of_seeds, of_items))
    for name, F, df in (("seeds", F1, 2), ("items", F2, 3), (
            "seeds and items", F1 * F2 / (F1 + F2), (F1 + F2) ** 2 / (F1**2 / 3 + F2**2 / 2))):
        assert found[name]["mean"] == pytest.approx(mean)
        assert found[name]["p"] == pytest.approx(tail(math.sqrt(F), df)), name
        half = quantile(df) * mean / math.sqrt(F)
        assert width(found[name]) == pytest.approx(2 * half, rel=1e-6), name


@pytest.mark.parametrize("seed", [0, 4])
def test_over_items_it_agrees_with_the_exact_permutation_test(seed):
    """All 2^12 ways to give the twelve differences their signs."""
    d = drawn_differences(1, 12, seed=seed, mean=0.6)[0]
    signs = torch.tensor([[1 - 2 * (i >> k & 1) for k in range(12)] for i in range(2**12)]).double()
    exact = ((signs @ d).abs() >= d.sum().abs() - 1e-12).double().mean().item()
    assert 0.05 < exact < 0.1
    assert levels([d[None]])["items"]["p"] == pytest.approx(exact, rel=0.1)


def mcnemar(b, c):
    """The exact test: of b + c items that differ, is b too many or too few?"""
    n = b + c
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n)


@pytest.mark.parametrize("b, c", [(0, 0), (3, 0), (5, 0), (6, 0), (8, 1), (12, 3), (20, 20),
                                  (40, 20)])
def test_of_accuracies_of_one_seed_it_agrees_with_mcnemar_s_exact_test(b, c):
    d = torch.tensor([1.0] * b + [-1.0] * c + [0.0] * (300 - b - c)).double()[None]
    found, exact = levels([d], step=1)["items"], mcnemar(b, c)
    assert found["low"] < found["high"] and abs(found["p"] - exact) < 0.08
    assert (found["p"] < 0.05) == (exact < 0.05)
    if (b, c) == (5, 0):               # without the two items, five of a kind would seem enough
        assert levels([d])["items"]["p"] < 0.05 < exact


def test_items_of_several_tasks_count_as_their_suite_does():
    """T^2 times the variance of a mean over T tasks is the sum of those of the tasks."""
    one, other = drawn_differences(1, 50, seed=1), drawn_differences(1, 20, seed=2)
    found = levels([one, other])["items"]
    v, w = one.var().item() / 50, other.var().item() / 20
    df = (v + w) ** 2 / (v**2 / 49 + w**2 / 19)
    assert found["mean"] == pytest.approx((one.mean() + other.mean()).item() / 2)
    assert width(found) == pytest.approx(quantile(df) * math.sqrt(v + w))
    assert levels([one])["seeds"]["p"] is levels([one])["seeds and items"]["p"] is None
    assert levels([drawn_differences(3, 1)])["items"]["p"] is None             # one item


@pytest.mark.parametrize("seeds, items, both, blind", [
    (0.05, 1.0, 0.2, "seeds"), (0.3, 0.3, 0.3, "items"), (0.1, 1.0, 1.0, "seeds"),
    (0.0, 0.0, 1.0, None)])
def test_the_interval_over_both_holds_the_truth_as_often_as_it_says(seeds, items, both, blind):
    """250 times six seeds and 40 items: the interval over both holds the truth in 92% or more,
    whatever varies. The one that is blind to what varies most does not."""
    held = dict.fromkeys(("seeds", "items", "seeds and items"), 0)
    for seed in range(250):
        found = levels([drawn_differences(6, 40, seed, seeds, items, both, mean=0.0)])
        for name, of in found.items():
            held[name] += of["low"] <= 0 <= of["high"]
    assert held["seeds and items"] >= 0.92 * 250
    assert blind is None or held[blind] < 0.9 * 250


def test_holm_by_hand():
    # 0.005 * 4, 0.01 * 3, 0.03 * 2; 0.04 * 1 would be smaller than the one before
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.02, 0.02]) == [0.04, 0.04] and holm([0.6, 0.9]) == [1, 1] and holm([]) == []


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
    half = quantile(2) * 0.01 / math.sqrt(3)
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
    half = quantile(2) * 0.01 / math.sqrt(3)
    assert rows["reg"]["nll_difference"] == pytest.approx(-0.02)
    assert rows["reg"]["nll_interval"] == pytest.approx([-0.02 - half, -0.02 + half])
    assert difference(rows["reg"], "nll_") == "not shown: -0.020 [-0.045, +0.005] (seeds)"


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


def row(difference, interval=None, holm=None, level="seeds and items", **more):
    low, high = interval or (None, None)
    level, of = level if interval else None, {"mean": difference, "low": low, "high": high}
    return {"arm": "int", "suite": "s", "interval": interval, "holm": holm, "level": level,
            "levels": {level or "seeds": of}, **more}


def test_what_holm_s_correction_does_not_leave_is_not_shown():
    assert difference(row(0.02, [-0.005, 0.045], 0.3)) == "not shown: +2.0 [-0.5, +4.5]"
    assert difference(row(0.02, [0.005, 0.035], 0.051)) == "not shown: +2.0 [+0.5, +3.5]"
    assert difference(row(-0.1, [-0.125, -0.075], 0.049)) == "-10.0 [-12.5, -7.5]"
    assert difference(row(-0.1, [-0.125, -0.075], 0, "items")) == "-10.0 [-12.5, -7.5] (items)"
    assert difference(row(0.02)) == "+2.0 (one seed)" and difference(row(None)) == ""


def test_the_correction_is_for_all_suites_of_a_model_and_each_measure_alone():
    tasks = "toy-cloze", "toy-sums"                            # of two suites
    runs = [run for arm, by in (("none", (0, 0, 0)), ("int", (9, 10, 11)), ("reg", (2, 9, 13)))
            for run in scored(arm, {seed: 0.5 + 0.01 * x for seed, x in enumerate(by)}, "m", tasks,
                              {seed: 0.1 * x * x for seed, x in enumerate(by)})]
    other = [{**run, "model": "other"} for run in runs if run["arm"] != "reg"]
    rows = compare(runs + other)
    for measure in ("", "nll_"):
        for model, n in (("m", 4), ("other", 2)):
            ours = [row for row in rows if row["model"] == model and row["arm"] != "none"]
            least = min(ours, key=lambda row: row[f"{measure}p"])
            assert least[f"{measure}holm"] == pytest.approx(n * least[f"{measure}p"]) and n == len(
                ours)
    assert all(row["holm"] is row["p"] is None for row in rows if row["arm"] == "none")


def test_what_the_paper_says_is_excluded_where_the_interval_lies_elsewhere():
    paper = {("int", "s"): 73.8, ("none", "s"): 72.6, ("reg", "s"): 73.4}      # int: +1.2
    assert excluded(row(0.005, [-0.001, 0.011]), paper) == "+1.2"
    assert excluded(row(0.02, [0.013, 0.03]), paper) == "+1.2"
    assert excluded(row(0.005, [-0.001, 0.013]), paper) is None
    assert excluded(row(0.005), paper) is None                 # there is no interval
    assert excluded(row(0.005, [0, 0.001], suite="t"), paper) is None
    assert excluded(row(0.0, [0, 0.001]), {("int", "s"): 73.8}) is None


def test_in_the_table_the_word_none_is_an_arm_and_never_a_verdict():
    runs = (scored("none", {0: 0.5, 1: 0.6}, nll={0: 1, 1: 2})
            + scored("int", {0: 0.5, 1: 0.7}, nll={0: 1.25, 1: 1.5})
            + scored("reg", {0: 0.75, 1: 0.85}, nll={0: 0.5, 1: 1.5}))
    text = comparison_table(compare(runs))
    assert [line.split(None, 5) for line in text.splitlines()[:7]] == [
        ["m"], [],
        ["arm", "seeds", "accuracy,", "%", "difference", "to none"],
        TOY["toy-cloze"].suite.split(),
        ["none", "2", "55.0", "±", "5.0"],
        ["int", "2", "60.0", "±", "10.0", "not shown: +5.0 [-58.5, +68.5] (seeds)"],
        ["reg", "2", "80.0", "±", "5.0", "+25.0 [+25.0, +25.0] (seeds)"]]
    assert [line.split(None, 5) for line in text.splitlines()[7:13]] == [
        [],
        ["arm", "seeds", "nll", "difference", "to", "none"],
        TOY["toy-cloze"].suite.split(),
        ["none", "2", "1.500", "±", "0.500"],
        ["int", "2", "1.375", "±", "0.125", "not shown: -0.125 [-4.890, +4.640] (seeds)"],
        ["reg", "2", "1.000", "±", "0.500", "-0.500 [-0.500, -0.500] (seeds)"]]


def test_the_paper_s_figures_stand_beside_ours():
    suite = TOY["toy-cloze"].suite
    rows = compare(scored("none", {0: 0.5, 1: 0.6}) + scored("int", {0: 0.6, 1: 0.7}))
    text = comparison_table(rows, {("int", suite): 83.3, ("none", suite): 81.2})
    lines = text.splitlines()[2:]
    assert lines[0].endswith("the paper  excludes")
    assert lines[2].split() == ["none", "2", "55.0", "±", "5.0", "81.2"]
    assert lines[3].split()[5:] == ["+10.0", "[+10.0,", "+10.0]", "(seeds)", "83.3", "+2.1"]
    assert text.endswith("if the interval here does not hold it.")


# --------------------------------------------------------------------------------- item by item


def with_items(arm, by_seed, shuffled=False, sha="x"):
    """Runs on toy-cloze from {seed: [(correct, nll)]}; shuffled: the last item stands first."""
    runs = []
    for seed, items in by_seed.items():
        losses = [nll for _, nll in items if nll is not None]
        order = [*range(len(items))]
        runs.append({
            "model": "m", "arm": arm, "seed": seed,
            "scored_by": {"toy-cloze": {"items_sha256": sha}},
            "scores": {"toy-cloze": sum(correct for correct, _ in items) / len(items)},
            "nll": {"toy-cloze": sum(losses) / len(losses) if losses else None},
            "items": {"toy-cloze": {i: (float(items[i][0]), items[i][1])
                                    for i in (reversed(order) if shuffled else order)}}})
    return runs


PLAIN = {0: [(1, 1.0), (0, 2.0), (0, 3.0), (1, 4.0)], 1: [(1, 1.5), (0, 2.5), (1, 3.0), (1, 4.5)]}
STEERED = {seed: [(correct, nll - less) for (correct, nll), less in zip(PLAIN[seed], by)]
           for seed, by in {0: (0.1, 0.2, 0.3, 0.4), 1: (0.2, 0.2, 0.4, 0.6)}.items()}


@pytest.mark.parametrize("shuffled", [False, True])
def test_items_are_paired_by_what_they_are_not_by_their_order(shuffled):
    """The losses of an arm are below those of none by 0.1 to 0.6, though items differ by 3."""
    runs = with_items("none", PLAIN) + with_items("int", STEERED, shuffled)
    row = by_arm(compare(runs))["int"]
    gaps = torch.tensor([[-0.1, -0.2, -0.3, -0.4], [-0.2, -0.2, -0.4, -0.6]], dtype=torch.double)
    assert row["nll_level"] == "seeds and items" and row["nll_difference"] == pytest.approx(-0.3)
    expected = levels([gaps])
    assert row["nll_levels"].keys() == expected.keys()
    for name, of in expected.items():
        assert row["nll_levels"][name] == pytest.approx(of), name
    assert row["nll_interval"] == pytest.approx([expected["seeds and items"][end]
                                                 for end in ("low", "high")])
    # The accuracies are the same: no difference, but an interval that is not a point.
    assert (row["difference"], row["holm"]) == (0, 1)
    assert row["interval"][0] < 0 < row["interval"][1]
    assert difference(row).startswith("not shown: +0.0 [-")


def test_one_seed_has_an_interval_over_its_items():
    row = by_arm(compare(with_items("none", {0: PLAIN[0]}) + with_items("int", {0: STEERED[0]})
                         ))["int"]
    # the differences are -0.1, -0.2, -0.3 and -0.4: variance 0.05 / 3
    half = quantile(3) * math.sqrt(0.05 / 3 / 4)
    assert row["nll_level"] == "items" and row["nll_levels"]["seeds"]["p"] is None
    assert row["nll_interval"] == pytest.approx([-0.25 - half, -0.25 + half])
    assert difference(row, "nll_").endswith("] (items)")


def test_seeds_without_a_partner_have_no_part_in_the_difference():
    runs = with_items("none", {0: PLAIN[0]}) + with_items("int", {1: PLAIN[1], 0: STEERED[0]})
    row = by_arm(compare(runs))["int"]
    assert (row["seeds"], row["nll_level"]) == (2, "items")
    assert row["nll_difference"] == pytest.approx(-0.25)


def test_items_without_an_nll_in_either_run_are_left_out_of_both_and_counted():
    plain = [[(1, 1.0), (0, None), (0, 3.0), (1, 4.0), (1, 9.0)]]
    steered = [[(1, 0.9), (0, 1.8), (0, 2.9), (1, 3.6), (0, None)]]
    row = by_arm(compare(with_items("none", {0: plain[0]}) + with_items("int", {0: steered[0]})
                         ))["int"]
    assert row["nll_left_out"] == 2 and row["left_out"] == 0
    assert row["nll_difference"] == pytest.approx(-0.2)        # of the first, third and fourth
    assert row["difference"] == pytest.approx(-0.2)            # of all five


@pytest.mark.parametrize("lacking", [{"sha": "another"}, {"items": {"toy-cloze": {}}}])
def test_other_items_or_none_leave_the_seeds(lacking):
    other = with_items("int", STEERED, sha=lacking.get("sha", "x"))
    other[1].update(lacking)
    row = by_arm(compare(with_items("none", PLAIN) + other))["int"]
    assert row["nll_level"] == "seeds" and list(row["nll_levels"]) == ["seeds"]
    assert row["nll_difference"] == pytest.approx(-0.3)


def test_another_arm_than_none_can_be_what_is_compared_with():
    runs = with_items("int-random", PLAIN) + with_items("int", STEERED)
    rows = by_arm(compare(runs, against="int-random"))
    assert rows["int"]["nll_difference"] == pytest.approx(-0.3)
    assert rows["int-random"]["difference"] is None
    assert by_arm(compare(runs))["int"]["difference"] is None


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


def write_items(folder, lines, task="boolq"):
    path = folder / "eval" / f"{task}.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n"
                            for line in lines))
    return path


def test_the_items_of_a_folder_are_read_once_and_only_where_there_is_a_pair(tmp_path):
    lines = [{"index": i, "correct": i > 0, "nll": 0.5 * i} for i in range(2)]
    paths = {name: write_items(make_run(tmp_path / name, **more), lines) for name, more in {
        "m-base": {"base": True}, "m-none-seed0": {}, "m-none-seed1": {"seed": 1},
        "m-reg-seed0": {"steering": "reg"}}.items()}
    runs = find_runs(tmp_path)
    paths["m-base"].unlink()
    paths["m-none-seed1"].write_text("never read")
    rows = by_arm(compare(runs))
    assert rows["reg"]["level"] == "items" and rows["reg"]["difference"] == 0
    for path in tmp_path.glob("*/eval/*.jsonl"):
        path.unlink()
    assert compare(runs) == [*rows.values()]
    assert items_of(runs[1], "boolq") == {0: (0.0, 0.0), 1: (1.0, 0.5)}


@pytest.mark.parametrize("lines, message", [
    ([{"index": 0, "correct": True, "nll": 1}, '{"index": 1, "cor'], "line 2: "),
    ([{"index": 0, "correct": True}, {"index": 1}], "line 2: "),
    ([{"index": 0, "correct": 1, "nll": 1}], "line 1: .*correct is 1"),
    ([{"index": 0, "correct": True, "nll": -1}], "nll -1"),
    ([{"index": 0, "correct": True, "nll": "1"}], "line 1: "),
    (["[]\n"], "line 1: "),
    ([{"index": 0, "correct": True, "nll": 1}], "another accuracy"),
    ([{"index": 0, "correct": True}, {"index": 0, "correct": False}], "another accuracy"),
    ([], "line 0: "),
])
def test_damaged_items_cost_a_line_and_leave_the_seeds(tmp_path, lines, message):
    good = [{"index": 0, "correct": True, "nll": 1.0}, {"index": 1, "correct": False, "nll": 2.0}]
    for name, method, found in (("m-none-seed0", "none", good), ("m-reg-seed0", "reg", lines)):
        write_items(make_run(tmp_path / name, method, nll={"nll": 1.5}), found)
    said = []
    row = by_arm(compare(find_runs(tmp_path), say=said.append))["reg"]
    assert row["difference"] == 0 and row["interval"] is None
    assert len(said) == 1 and str(tmp_path / "m-reg-seed0" / "eval" / "boolq.jsonl") in str(said[0])
    with pytest.raises(BadInput, match=message):
        raise said[0]


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
