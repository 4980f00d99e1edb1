"""Is it better?

One run is better than another. Would it be so again? In lab/stats.py, write the mean and its
standard error (`mean_and_error`), the interval of Student's t (`interval`), the difference to plain
fine-tuning, paired by seed (`by_seed`, `against_plain`; `compare` shows what runs are), and the
mean of tokens that come in texts (`clustered_mean`). The docstrings are the specification. Work out
the interval of 1, 2, 3 on paper first. Then plan an experiment, in writing, before you run it.
"""
import re

import torch

from lab.course.probe import draw

MINUTES, POINTS, REMOVE = 120, 12, []
BLANK = dict.fromkeys(f"lab/stats.py::{name}" for name in (
    "mean_and_error", "interval", "clustered_mean", "against_plain", "by_seed"))
HINTS = (
    "The mean uses up one of n numbers: n - 1 are free. Numbers that share something, such as the "
    "order of the data or a text, are fewer than they look. What both of a pair share disappears "
    "in their difference.",
    "s^2 = sum (x - mean)^2 / (n - 1), error = s / sqrt(n), mean -+ T975[n - 2] * error. Pairs: "
    "d_seed = arm_seed - none_seed. Texts: sum the deviations within each one, then square.",
    "The place in T975 is the degrees of freedom minus one, at most the last. Look plain's run up "
    "by the seed of the other. If a run lacks what others have, its arm has nothing. bincount with "
    "weights sums by text; G / (G - 1) stands below the root.")


def numbers(values):                   # None says that there is nothing to say
    return torch.tensor([float("nan") if one is None else float(one) for one in values]).double()


def intervals(seed):
    from lab.stats import interval, mean_and_error
    for values in [1, 2, 3], [0.5], [], [2.0, 4.0], *(draw(seed, n).tolist() for n in (6, 24)):
        yield f"mean and error of {str(values)[:60]}", numbers(mean_and_error(values))
        yield f"mean and interval of {str(values)[:60]}", numbers(interval(values))


def told(runs):                        # what `compare` says of [(arm, seed, accuracies, losses)]
    from lab.stats import compare
    tasks = "toy-cloze", "toy-plain"
    for row in compare([{"model": "m", "arm": arm, "seed": seed, "scores": dict(zip(tasks, right)),
                         "nll": dict(zip(tasks, nll))} for arm, seed, right, nll in runs]):
        for what in [*row][3:]:
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
               "does at least one?", "python -m lab.course.a7_better")}
if __name__ == "__main__":             # nothing differs: how often is something shown all the same?
    from lab.stats import interval
    normal = torch.randn(4000, 6, 3, generator=torch.Generator().manual_seed(0)).tolist()
    found = [[low > 0 or high < 0 for _, low, high in map(interval, six)] for six in normal]
    print(f"4,000 experiments of six differences of three seeds: {sum(map(sum, found)) / 4e3:.2f} "
          f"of six are shown, and in {sum(map(any, found)) / 40:.1f}% at least one")

# ------------------------------------------------------------------------------- not handed out
NUMBERS = {"half": (lambda said: float.__sub__(*map(float, re.search(
    r"int .*\[(\S+), (\S+)\]", said.split("new format")[2]).group(2, 1))) / 2, 0.15),
    "chance": (lambda said: float(re.search(r"in (\S+)%", said)[1]), 0.02)}
CODE = """
def mean_and_error(values):
    n, mean = len(values), sum(values) / len(values) if values else None
    s = (sum((value - mean) ** 2 for value in values) / max(1, n - 1)) ** 0.5
    return mean, s / n ** 0.5 if n > 1 else None
def interval(values):
    mean, error = mean_and_error(values)
    if len(values) < 2:
        return mean, None, None
    width = T975[min(len(values) - 2, len(T975) - 1)] * error
    return mean, mean - width, mean + width
def clustered_mean(x, text):
    if not len(x):
        return None, None
    mean, names = x.double().mean(), text.unique()
    sums = torch.stack([(x[text == one].double() - mean).sum() for one in names])
    few = len(names) / max(1, len(names) - 1)
    return mean, few ** 0.5 * sums.norm() / len(x) if len(names) > 1 else None
def by_seed(runs, arm, tasks, measure):
    asked = [one for one in tasks if any(run[measure][one] is not None for run in runs)]
    found = {run["seed"]: [run[measure][one] for one in asked] for run in runs if run["arm"] == arm}
    if not asked or any(None in some for some in found.values()):
        return {}
    return {seed: sum(some) / len(asked) for seed, some in found.items()}
def against_plain(runs, arm, tasks, measure):
    at, plain = (by_seed(runs, one, tasks, measure) for one in (arm, "none"))
    both = [seed for seed in at if seed in plain and arm != "none"]
    mean, low, high = interval([at[one] - plain[one] for one in both])
    return *mean_and_error(list(at.values())), mean, None if low is None else [low, high]
"""
ROOT, PAIRS = "s / n ** 0.5", "[at[one] - plain[one] for one in both]"
SUMS = "(x[text == one].double() - mean).sum() for one in names"
RIGHT = {"sums by hand": CODE, "statistics.stdev": CODE.replace(
    ROOT, "statistics.stdev(values) / n ** 0.5") + "import statistics", "std of a tensor":
    CODE.replace(ROOT, "torch.tensor(values, dtype=torch.float64).std() / n ** 0.5")}
WRONG = {why: (why, CODE.replace(line, new)) for line, new, why in (
    ("max(1, n - 1)", "max(1, n)", "squares are divided by n; one number went into the mean"),
    (ROOT, "s", "this is the standard deviation; the mean of n numbers is surer"),
    ("T975[min(len(values) - 2, len(T975) - 1)]", "1.96", "1.96 is for many numbers; a few do not "
     "know their own spread well, so Student's t is wider"),
    ("len(values) - 2", "len(values) - 1", "this is t with n degrees of freedom; there are n - 1"),
    (PAIRS, "[a - b for a, b in zip(at.values(), plain.values()) if both]",
     "runs are paired by the order in which they come; a pair has the same seed"),
    (PAIRS, "[one - mean_and_error([*plain.values()])[0] for one in at.values() if both]",
     "each run is compared with plain's mean; with its own seed's run, what they share disappears"),
    (PAIRS, "[at[one] - plain[one] for one in both if at[one] > plain[one]]",
     "seeds that lost are left out; all that was planned is reported, not the winners only"),
    (PAIRS, "[plain[one] - at[one] for one in both]", "this is plain minus the other arm"),
    ("or any(None in some for some in found.values())", "", "a run that was scored half is kept, "
     "and None is no number; its arm shows none"),
    (SUMS, "one - mean for one in x.double()", "tokens count as independent; those of one text are "
     "alike, so sum within a text before you square"),
    ("len(names) / max(1, len(names) - 1)", "1", "G / (G - 1) is missing; few are unsure"),
    ("x.double().mean()", "sum(x[text == one].mean() for one in text.unique()) / "
     "len(text.unique())", "this is the mean of the texts' means; it is that of all tokens"))}
