"""Is it better?

One run is better than another. Would it be so again? In lab/stats.py, write the mean and its
standard error (`mean_and_error`), the interval of Student's t (`interval`, by `estimate`), the
difference to another arm, paired by seed (`by_seed`, `against_other`; `scan` says what runs are,
`by_item` and `levels` are for runs that have their items), and the mean of tokens that come in
texts (`clustered_mean`). Work out the interval of 1, 2, 3 on paper first. Then plan an experiment,
in writing, before you run it.
"""
import re

import torch

from lab.course import ROOT
from lab.course.probe import draw

MINUTES, POINTS, REMOVE = 120, 12, []
BLANK = dict.fromkeys(f"lab/stats.py::{name}" for name in (
    "mean_and_error", "interval", "clustered_mean", "against_other", "by_seed"))
HINTS = (
    "The mean uses up one of n numbers: n - 1 are free. Numbers that share something, such as the "
    "order of the data or a text, are fewer than they look. What both of a pair share disappears "
    "in their difference.",
    "s^2 = sum (x - mean)^2 / (n - 1), error = s / sqrt(n), n - 1 degrees of freedom. Pairs: "
    "d_seed = arm_seed - none_seed. Texts: sum the deviations within each one, then square.",
    "`estimate` takes the square of the error and its degrees of freedom. Look the other arm's run "
    "up by seed, then take `interval` of the differences. If a run lacks what others have, its "
    "arm has nothing. bincount with weights sums by text; G / (G - 1) stands below the root.")


def numbers(values):                   # None says that there is nothing to say
    return torch.tensor([float("nan") if one is None else float(one) for one in values]).double()


def intervals(seed):
    from lab.stats import interval, mean_and_error
    for values in [1, 2, 3], [0.5], [], [2.0, 4.0], *(draw(seed, n).tolist() for n in (6, 24)):
        yield f"mean and error of {str(values)[:60]}", numbers(mean_and_error(values))
        yield f"mean and interval of {str(values)[:60]}", numbers(interval(values).values())


def told(runs):                        # what `compare` says of [(arm, seed, accuracies, losses)]
    from lab.stats import compare
    tasks = "toy-cloze", "toy-plain"
    for row in compare([{"model": "m", "arm": arm, "seed": seed, "scores": dict(zip(tasks, right)),
                         "nll": dict(zip(tasks, nll))} for arm, seed, right, nll in runs]):
        for what in ("mean", "standard_error", "difference", "interval", "p", "nll",
                     "nll_standard_error", "nll_difference", "nll_interval"):
            value = row[what] if isinstance(row[what], list) else [row[what]]
            yield f"{row['arm']}: {what}", numbers(value)


def pairs(seed):
    level, gain, none = draw(seed, 4).tolist(), (0.01 * draw(seed, 4)).tolist(), [None, None]
    yield from told([*(("none", n, [one, one / 2], none) for n, one in enumerate(level)), *(
        ("int", n, [level[n % 4] + gain[n % 4], level[n % 4] / 2], none) for n in (2, 0, 9, 3))])


def losses(seed):
    here = (draw(seed, 6).abs() + 0.1).tolist()
    runs = [(arm, n, [0.5, 0.5], here[at + n:][:2]) for at, arm in ((0, "none"), (3, "reg"))
            for n in range(2)]
    yield from told(runs)
    for case, value in told([*runs, ("reg", 2, [0.5, 0.5], [1.0, None])]):
        yield f"a run of reg lacks one loss; {case}", value


def texts(seed):
    from lab.stats import clustered_mean
    small = torch.tensor([1.0, 1, 1, 1, 4, 4]), torch.tensor([0, 0, 0, 0, 1, 1])
    yield "x = [1, 1, 1, 1, 4, 4] of texts 0 0 0 0 1 1", numbers(clustered_mean(*small))
    x, text = draw(seed, 40), (draw(seed, 40).cos() * 1000).long() % 7 * 10 + 3
    for what, x, text in (("ragged texts", x + text / 20, text), ("one text", x, text * 0),
                          ("no token", x[:0], text[:0])):
        yield what, numbers(clustered_mean(x, text))


PARTS = {"mean, error, interval": intervals, "pairs": pairs, "losses": losses, "texts": texts}
WRITTEN = {
    "half": ("First write a plan under `why`: what is compared, by which number, on which suite, "
             "with how many seeds, and what counts as better? Then make the nine runs. How long is "
             "half the interval of int's difference in nll, new format?",
             "python -m lab.experiment --steer none int reg --seed 0 1 2 --steps 20 --items 40 "
             "--out out/7"),
    "chance": ("Six differences in nll have an interval there. If nothing differed, how many of "
               "six would leave out zero by chance? In what share of such experiments, in percent, "
               "does at least one? The table corrects for that, by Holm's method.",
               "python -m lab.course.a7_better")}
if __name__ == "__main__":             # nothing differs: how often is something shown all the same?
    from lab.stats import interval
    normal = torch.randn(1000, 6, 3, generator=torch.Generator().manual_seed(0)).tolist()
    found = [[not one["low"] <= 0 <= one["high"] for one in map(interval, six)] for six in normal]
    print(f"1,000 experiments of six differences of three seeds: {sum(map(sum, found)) / 1e3:.2f} "
          f"of six are shown, and in {sum(map(any, found)) / 10:.1f}% at least one")

# ------------------------------------------------------------------------------- not handed out
NUMBERS = {"half": (lambda said: float.__sub__(*map(float, re.search(
    r"int .*\[(\S+), (\S+)\]", said.split("new format")[2]).group(2, 1))) / 2, 0.15),
    "chance": (lambda said: float(re.search(r"in (\S+)%", said)[1]), 0.02)}
CODE = (ROOT / "lab" / "stats.py").read_text("utf-8")          # wrong answers change one line of it
ERROR, PAIRS = "math.sqrt(variance / len(values))", "[at[seed] - plain[seed] for seed in shared]"
FREE, SUMS = "(error**2, len(values) - 1)", "text.bincount(weights=x - x.mean())"
RIGHT = {"statistics.stdev": CODE.replace("import math", "import math\nimport statistics").replace(
    ERROR, "statistics.stdev(values) / math.sqrt(len(values))"),
    "std of a tensor, sums by text": CODE.replace(
    ERROR, "torch.tensor(values, dtype=torch.double).std().item() / len(values) ** 0.5").replace(
    SUMS, "torch.stack([(x - x.mean())[text == one].sum() for one in text.unique()])")}
WRONG = {why: CODE.replace(line, new) for line, new, why in (
    ("in values) / (len(values) - 1)", "in values) / len(values)",
     "squares are divided by n; one number went into the mean"),
    (ERROR, "math.sqrt(variance)", "this is the standard deviation; a mean is surer than that"),
    (FREE, "(error**2, 10**6)", "1.96 is for many numbers; a few do not know their own spread, so "
     "Student's t is wider"),
    (FREE, "(error**2, len(values))", "this is t with n degrees of freedom; there are n - 1"),
    (PAIRS, "[a - b for a, b in zip(at.values(), plain.values()) if shared]",
     "runs are paired by the order in which they come; a pair has the same seed"),
    (PAIRS, "[at[seed] - mean_and_error([*plain.values()])[0] for seed in shared]",
     "each run is compared with plain's mean; with its own seed's run, what they share disappears"),
    (PAIRS, "[at[seed] - plain[seed] for seed in shared if at[seed] > plain[seed]]",
     "seeds that lost are left out; all that was planned is reported, not the winners only"),
    (PAIRS, "[plain[seed] - at[seed] for seed in shared]", "this is plain minus the other arm"),
    ("not tasks or any(None in values for values in found.values())", "not tasks",
     "a run that was scored half is kept, and None is no number; its arm shows none"),
    (SUMS, "x - x.mean()", "tokens count as independent; those of one text are alike, so sum "
     "within a text before you square"),
    ("math.sqrt(G / (G - 1)) * error", "error", "G / (G - 1) is missing; few are unsure"),
    ("return x.mean().item(), math", "return (text.bincount(weights=x) / text.bincount())"
     ".mean().item(), math", "this is the mean of the texts' means; it is that of all tokens"))}
