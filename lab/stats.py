"""Means, standard errors and intervals, and the comparison of the runs in a folder."""
import json
import math
import sys
from functools import cache
from pathlib import Path

import torch

from data import BadInput, read_json
from data.runs import MACHINE
from data.tasks import OWN_NAME, TASKS, TOY
from eval import steering_from, suite_of, which_model, with_error
from lab import page
from train import RIVALS

# ----------------------------------------------------------------------- means and intervals

NOT_SHOWN = "not shown"                # the verdict on a difference that may well be zero
LEVEL = 0.05                           # an interval holds the rest, 95%


def mean_and_error(values):
    """Mean of a few numbers, and its standard error (None for a single one); None of none."""
    mean = sum(values) / len(values) if values else None
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def tail(t, df):
    """P(|T| > t) of Student's t with df >= 1 degrees of freedom, whole or not: with t = sqrt(df)
    cot y, it is the integral of sin(u)^(df - 1) from 0 to y, over that from 0 to pi / 2."""
    grid = torch.linspace(0, 1, 4001, dtype=torch.double) ** 4                 # fine near 0
    part, whole = (torch.trapezoid((end * grid).sin() ** (df - 1), end * grid).item()
                   for end in (math.atan2(math.sqrt(df), t), math.pi / 2))
    return part / whole


@cache
def quantile(df):
    """The t of which `tail` is LEVEL: 12.7 for one degree of freedom, 1.96 for very many."""
    low, high = 1.9, 13.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, df) > LEVEL else (low, middle)
    return high


def estimate(mean, parts):
    """A mean with its 95% interval and two-sided p value, by Student's t -> {"mean", "low", "high",
    "p"}. parts: [(variance, degrees of freedom)] of the sources of its error. Variances add up to
    v, and df = v^2 / sum_i (v_i^2 / df_i) (Satterthwaite 1946). Without parts, there is the mean
    alone. Without variance, p is 0, or 1 if the mean is 0."""
    if not parts:
        return {"mean": mean, "low": None, "high": None, "p": None}
    if not (v := sum(variance for variance, _ in parts)):
        return {"mean": mean, "low": mean, "high": mean, "p": float(mean == 0)}
    df = 1 / sum((variance / v) ** 2 / df for variance, df in parts)
    df, error = min(max(df, 1.0), 1000.0), math.sqrt(v)        # of 1000, t is 1.963
    width, p = quantile(df) * error, tail(abs(mean) / error, df)
    return {"mean": mean, "low": mean - width, "high": mean + width, "p": p}


def interval(values):
    """The `estimate` of the mean of a few independent numbers, such as one of each seed."""
    mean, error = mean_and_error(values)
    return estimate(mean, [] if error is None else [(error**2, len(values) - 1)])


def levels(d, step=0):
    """The mean of paired differences d, a tensor [S, I_t] of S seeds and I_t items for each of T
    tasks -> {"seeds", "items", "seeds and items"}: its `estimate` over either, and over both.

        v_seeds = var(a) / S                       a [S]: for each seed the mean over items
        v_items = sum_t var(b_t) / (I_t T^2)       b_t [I_t]: for each item the mean over seeds
        both:     v_seeds + v_items

    Over both, seeds and items are crossed random factors, and t^2 is min F' (Clark 1973, Journal of
    Verbal Learning 12:335). What is due to one seed at one item is in both terms (Owen's bootstrap
    of 2007 has it three times). In simulations this interval held the truth in 93 to 99% with three
    seeds, and with two in 89 to 98%. All is conditional on one checkpoint and one world: what a
    seed draws is the order of the training data.

    step: what a single item of a single run counts, of accuracies. Each task then has two items
    more, on which one seed differs by +step and -step, as Bonett & Price (2012) would have it. Else
    a few items that differ in one direction, or none that do, would look too sure."""
    S, a = len(d[0]), torch.stack([task.mean(1) for task in d]).mean(0)        # [S]
    more = torch.tensor([step, -step] if step else []).double() / S
    b = [torch.cat([task.mean(0), more]) for task in d]
    seeds = [(a.var().item() / S, S - 1)] if S > 1 else []
    items = [(of.var().item() / len(of) / len(b) ** 2, len(of) - 1)
             for of in b if min(map(len, b)) > 1]
    return {name: estimate(a.mean().item(), parts) for name, parts in (
        ("seeds", seeds), ("items", items), ("seeds and items", seeds and items and seeds + items))}


def holm(ps):
    """The p values of a family of comparisons, corrected as by Holm (1979): the smallest of n is
    multiplied by n, the next by n - 1, and none gets smaller than the one before. That a true zero
    comes below 0.05 has a probability of 0.05 at most. None stays None."""
    ordered, corrected, least = sorted(p for p in ps if p is not None), {None: None}, 0.0
    for i, p in enumerate(ordered):
        corrected[p] = least = max(least, min(1.0, p * (len(ordered) - i)))
    return [corrected[p] for p in ps]


def terciles(x):
    """Cut numbers [N] into three equal parts -> (the part of each [N] long: 0, 1, 2; two cuts)."""
    cuts = x.quantile(torch.tensor([1 / 3, 2 / 3], dtype=x.dtype, device=x.device))
    return torch.bucketize(x, cuts), cuts


def clustered_mean(x, text):
    """Mean over tokens, and its standard error clustered by text: x [N], text [N] long -> (mean,
    error). The error is None for one text, both are None for no token.

        error^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / N^2      g: the G texts
    """
    if not len(x):
        return None, None
    x, (_, text) = x.double(), text.unique(return_inverse=True)
    sums = text.bincount(weights=x - x.mean())                         # [G]
    G, error = len(sums), sums.square().sum().sqrt().item() / len(x)
    return x.mean().item(), math.sqrt(G / (G - 1)) * error if G > 1 else None


def grouped_correlation(x, y, group, text):
    """Pearson's correlation within groups, and its jackknife error over texts: x, y [N], group,
    text [N] long -> (r, error).

        r        of x and y after each is centred on its mean in the token's group
        error^2  = (G - 1) / G * sum_g (r without text g - their mean)^2       g: the G texts

    What is undefined is None: r where x or y does not vary within groups, or for fewer than three
    tokens; the error for one text, or where r without one of the texts is undefined.
    """
    def r(x, y, group):
        n = group.bincount()
        parts = []
        for values in (x.double(), y.double()):
            centred = values - (group.bincount(weights=values) / n)[group]
            if len(x) < 3 or centred.abs().max() <= 1e-9 * values.abs().max():
                return math.nan
            parts.append(centred / centred.norm())
        return (parts[0] @ parts[1]).item()

    if len(x) < 3:
        return None, None
    texts = text.unique()
    without = torch.tensor([r(*(v[text != one] for v in (x, y, group))) for one in texts]).double()
    error = ((len(texts) - 1) * without.var(correction=0)).sqrt().item()
    return tuple(None if math.isnan(value) or len(texts) < least else value
                 for value, least in ((r(x, y, group), 1), (error, 2)))


# -------------------------------------------------------------------------- a folder of runs
# Only what was made alike is compared: runs of one recipe, scores of the same items in the same
# way. Of what is there, the largest group is kept. The others are left out, with a line.

# An arm is a steering and its rivals. What is neither it, the seed nor the machine is the recipe.
NO_RECIPE = MACHINE | {"steering", "seed", *RIVALS}
KINDS = {"steering": [dict], "versions": [dict], "arm": [str]}
PLAIN = [str, int, float, bool, type(None)]
SCORED_BY = ("items_sha256", "task_json", "n", "score", "dtype", "max_new_tokens", "steered")


def left_out(text):
    """Say on standard error what has no part in what is shown."""
    print(f"left out: {BadInput(str(text))}", file=sys.stderr)


def recipe_of(settings):
    """What the args.json of runs must have in common to be compared."""
    return {key: value for key, value in settings.items() if key not in NO_RECIPE}


def differences(settings, others):
    """In what settings differ from others, as words: "lr 0.001 instead of 0.0002"; "" if in
    nothing."""
    keys = [key for key in {**others, **settings} if settings.get(key) != others.get(key)]
    return ", ".join(f"another {key}" if key.endswith("sha256") else
                     f"{key} {settings.get(key)!s:.20} instead of {others.get(key)!s:.20}"
                     for key in keys)


def alike(found):
    """Of [(what, settings)] those with the settings that most have; of two equally large groups the
    first -> (what is kept, {words of `differences`: what else there is})."""
    groups, others = {}, {}
    for what, settings in found:
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append((what, settings))
    kept, *rest = sorted(groups.values(), key=len, reverse=True) or [[]]
    for group in rest:
        words = differences(group[0][1], kept[0][1])
        others.setdefault(words, []).extend(what for what, _ in group)
    return [what for what, _ in kept], others


def of_models(runs):
    """[run] -> the runs of each base model, as lists. A model is its content, not its path."""
    return [[run for run in runs if run["model_sha256"] == sha]
            for sha in dict.fromkeys(run["model_sha256"] for run in runs)]


def scan(folder, say=left_out):
    """What train.py left in a folder: [{"model", "model_sha256", "arm", "seed", "folder",
    "settings", "scores", "nll", "scored_by", "files"}], one for each finished run and each base
    model. The arm is that of train.py or "base", settings are its args.json, scores {task:
    accuracy}, nll {task: nll or None} and scored_by {task: {of SCORED_BY}} are from its
    eval/TASK.json, files are {task: eval/TASK.jsonl}. A damaged run costs a line."""
    found = []
    for path in sorted(Path(folder).glob("*/args.json")):
        try:
            if path.parent.suffix not in (".partial", ".old"):
                found += describe(path, read_json(path))
        except BadInput as error:
            say(error)
    return found


def describe(path, settings):
    """The entry of `scan` for one args.json, or none for that of something else."""
    base = settings.get("base") is True
    if not base and "steering" not in settings:
        return []
    needed = {"model": [str], "model_sha256": [str], **({} if base else {"seed": [int]})}
    for name, value in {**dict.fromkeys(needed), **settings}.items():
        if type(value) not in {**KINDS, **needed}.get(name, PLAIN):
            raise BadInput(f"{path}: {name} is {value!r}, which train.py does not write; if an "
                           "older one made this run, train it again")
    arm = "base" if base else settings.get("arm", steering_from(settings["steering"], path).name)
    scores, losses, scored_by = {}, {}, {}
    for file in path.parent.glob("eval/*.json"):
        summary = read_json(file)
        own = summary.get("task_json") and OWN_NAME.fullmatch(file.stem)
        if file.stem in TASKS or file.stem in TOY or own and summary.get("task") == file.stem:
            scores[file.stem], losses[file.stem] = summary.get("accuracy"), summary.get("nll")
            for name, most in (("accuracy", 1), ("nll", 1e30)):
                value = summary.get(name)
                fits = type(value) in (int, float) and 0 <= value <= most
                if not fits and (value is not None or name != "nll" != summary.get("score")):
                    raise BadInput(f"{file}: {name} is {value!r}; score it again (--overwrite)")
            if base and summary.get("model_sha256", sha := settings["model_sha256"]) != sha:
                raise BadInput(f"{file}: holds scores of another model than {path} names; score it "
                               "again (--overwrite)")
            scored_by[file.stem] = {key: summary.get(key) for key in SCORED_BY}
    return [{"arm": arm, "folder": path.parent, "settings": settings, "scores": scores,
             "nll": losses, "scored_by": scored_by,
             "files": {task: path.parent / "eval" / f"{task}.jsonl" for task in scores},
             **{name: settings.get(name) for name in ("model", "model_sha256", "seed")}}]


def plain_first(arm):
    """A sort key for arms: the base model, plain fine-tuning, the others."""
    return {"base": 0, "none": 1}.get(arm, 2)


def comparable(runs, say=left_out):
    """Of each base model the runs of one recipe, which is that of most (of plain fine-tuning, if it
    is a draw), plain fine-tuning first. Of two runs of one arm and seed the one whose folder has a
    name of its own is an arm of its own."""
    kept, seen = [], set()
    runs = sorted(runs, key=lambda run: (plain_first(run["arm"]), not run["folder"].name.endswith(
        f"-{run['arm']}-seed{run['seed']}")))                  # as train.run_folder names them
    for ours in of_models(runs):
        trained = {run["folder"]: run for run in ours if run["arm"] != "base"}
        like, others = alike((of, recipe_of(run["settings"])) for of, run in trained.items())
        for words, folders in others.items():
            say(f"{', '.join(str(of / 'args.json') for of in folders)}: another recipe, {words}; "
                f"compared are the {len(like)} like {like[0]}; other recipes need another folder")
        kept += [run for run in ours if run["arm"] == "base" or run["folder"] in like]
    for run in kept:
        arm = run["model_sha256"], run["arm"], run["seed"]
        if arm in seen:
            run["arm"] += f" ({run['folder'].name})"
        seen.add(arm)
    return sorted(kept, key=lambda run: (plain_first(run["arm"]), run["arm"], run["seed"] or 0))


def like_scores(runs, say=left_out):
    """Take from the runs of one base model the scores that were not made as most of the same task
    were, and say which runs have no score of a task that others have."""
    said = {}
    for task in in_order(task for run in runs for task in run["scores"]):
        here = {run["folder"]: run for run in sorted(runs, key=lambda run: run["arm"] != "none")}
        scored = [of for of in here if task in here[of]["scores"]]
        _, others = alike((of, here[of]["scored_by"][task]) for of in scored)
        for words, folders in others.items():
            for of in folders:
                del here[of]["scores"][task]
            said.setdefault((words, *folders), []).append(task)
        if lacking := [of for of in here if of not in scored]:
            said.setdefault(("no score", *lacking), []).append(task)
    for (words, *folders), tasks in said.items():
        say(f"{', '.join(str(of / 'eval') for of in folders)}: {', '.join(tasks)}: {words}")


def runs_from(folder, model, say=left_out):
    """The finished runs in a folder, as `scan` gives them, that began with a model of this content,
    whatever its path, and have one recipe; plain fine-tuning first."""
    found = [run for run in scan(folder, say) if run["arm"] != "base"]
    model = which_model(model) if found else None
    return comparable([run for run in found if run["model_sha256"] == model], say)


def find_runs(folder, say=left_out):
    """The scored entries of `scan` that may be compared. One content has one "model" in them, two
    contents have two. Raises BadInput where there is nothing."""
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder")
    runs = comparable([run for run in scan(folder, say) if run["scores"]], say)
    if not runs:
        what_to_do = ("it is a run itself, so give the folder it lies in"
                      if Path(folder, "args.json").exists() else
                      "python train.py --steer reg makes one")
        raise BadInput(f"{folder}: no scored run in it; {what_to_do}")
    titles = {}
    for ours in of_models(runs):
        like_scores(ours, say)
        title = ours[0]["model"]
        if title in titles.values():
            title += f" ({ours[0]['model_sha256'][:8]})"
        titles[ours[0]["model_sha256"]] = title
    for run in runs:
        run["model"] = titles[run["model_sha256"]]
    return [run for run in runs if run["scores"]]


def in_order(tasks):
    """Task names, each once: the toy world's, the public ones, and one's own by their names."""
    known = {task: place for place, task in enumerate((*TOY, *TASKS))}
    return sorted(set(tasks), key=lambda task: (known.get(task, len(known)), task))


def suites_of(tasks):
    """Task names -> {suite: its tasks}, the toy world's suites first."""
    suites = {}
    for task in in_order(tasks):
        suites.setdefault(suite_of(task), []).append(task)
    return suites


def items_of(run, task):
    """A run's items of a task, from its eval/TASK.jsonl, which is read once: {index: (correct, nll
    or None)}; {} without that file. Raises BadInput."""
    path, kept, found, row = run.get("files", {}).get(task), run.setdefault("items", {}), {}, 0
    if task in kept or not (path and path.is_file()):
        return kept.setdefault(task, {})
    kept[task] = {}                                            # what is damaged is said once
    try:
        for row, line in enumerate(path.read_bytes().splitlines(), 1):
            item = dict(json.loads(line))
            right, nll = item.get("correct"), item.get("nll")  # no answers; by an older version
            if type(right) not in (bool, type(None)) or not 0 <= (nll or 0) <= 1e30:
                raise ValueError(f"correct is {right!r}, nll {nll!r}")
            found[item["index"]] = None if right is None else float(right), nll
        rights, accuracy = [right for right, _ in found.values()], run["scores"][task]
        if None in rights or accuracy is None:
            if accuracy is not None or {*rights} != {None}:
                raise ValueError("no answers")
        elif abs(sum(rights) / row - accuracy) > 1e-9:
            raise ValueError("another accuracy")
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise BadInput(f"{path}, line {row}: not the items of its summary ({error}); score it "
                       "again (--overwrite)") from None
    kept[task] = found
    return found


def by_item(pairs, tasks, measure):
    """The differences of [(run, other)], each of one seed, item by item -> (of each task a tensor
    [S, I] of the items that all of the runs have a value for, how many items are left out); None
    where a run lacks its items, or has others than the rest. Raises BadInput."""
    found, without, runs = [], 0, [run for pair in pairs for run in pair]
    for task in tasks:
        same = {run.get("scored_by", {}).get(task, {}).get("items_sha256") for run in runs}
        values = [{index: of[measure == "nll"] for index, of in items_of(run, task).items()}
                  for run in runs]
        known = [index for index in values[0] if all(of.get(index) is not None for of in values)]
        if len(same) > 1 or not known:
            return None, 0
        x = torch.tensor([[of[index] for index in known] for of in values], dtype=torch.double)
        found.append(x[::2] - x[1::2])
        without += len(values[0]) - len(known)
    return found, without


FORMS = {"": (100, 1), "nll_": (1, 3)}             # of accuracies and losses: scale, decimals


def compare(runs, suites=None, against="none", say=left_out):
    """Mean over seeds with standard error, and the difference to plain fine-tuning (the arm none)
    or another arm, paired by seed and by item, with its 95% interval.

    runs: as `scan` gives them. suites: {name: its tasks}; None: those of the tasks. The accuracy of
    a suite is the mean over its tasks, its nll that over those that have one. A run that was not
    scored on all of them is left out of that suite; an arm of which a run has no nll shows none.
    -> [{"model", "arm", "suite", "seeds", "against", and of `against_other`, for the nll with nll_
    before each name}], accuracies as shares of one, losses in nats per token, None where there is
    nothing to say. "holm" is p after Holm's correction for all rows of a model."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        ours, first = [run for run in runs if run["model"] == model], len(rows)
        chosen = suites or suites_of(task for run in ours for task in run["scores"])
        for arm in sorted(dict.fromkeys(run["arm"] for run in ours), key=plain_first):
            for suite, tasks in chosen.items():
                scored = [run for run in ours if set(tasks) <= run["scores"].keys()]
                seeds = {run["seed"] for run in scored if run["arm"] == arm}
                if not seeds:
                    continue
                accuracy, nll = (against_other(scored, arm, against, tasks, of, say)
                                 for of in ("scores", "nll"))
                rows.append({"model": model, "arm": arm, "suite": suite, "seeds": len(seeds),
                             "against": against, **accuracy, "nll": nll.pop("mean"),
                             **{f"nll_{name}": value for name, value in nll.items()}})
        for measure in FORMS:
            for row, p in zip(rows[first:], holm([row[f"{measure}p"] for row in rows[first:]])):
                row[f"{measure}holm"] = p
    return rows


def against_other(runs, arm, other, tasks, measure, say):
    """What `compare` says of an arm: {"mean", "standard_error", "by_seed", "difference",
    "interval", "p", "level", "levels", "left_out"}: the last are all that `levels` found and how
    many items have no nll. The level shown is over seeds and items, or what there is of it."""
    tasks = [task for task in tasks if any(run[measure][task] is not None for run in runs)]
    at, plain = (by_seed(runs, name, tasks, measure) for name in (arm, other))
    shared = [seed for seed in at if seed in plain and arm != other]
    found, d, without = {"seeds": interval([at[seed] - plain[seed] for seed in shared])}, None, 0
    if shared:
        run_of = {(run["arm"], run["seed"]): run for run in runs}
        try:
            d, without = by_item([(run_of[arm, seed], run_of[other, seed]) for seed in shared],
                                 tasks, measure)
        except BadInput as error:
            say(error)
    if d:
        found = levels(d, step=measure == "scores")
    level = next((name for name in reversed(found) if found[name]["p"] is not None), None)
    chosen, (mean, error) = found[level or "seeds"], mean_and_error([*at.values()])
    return {"mean": mean, "standard_error": error, "by_seed": at, "difference": chosen["mean"],
            "interval": level and [chosen["low"], chosen["high"]], "p": chosen["p"],
            "level": level, "levels": found, "left_out": without}


def by_seed(runs, arm, tasks, measure):
    """{seed: mean over the tasks} of an arm's runs; {} if one of them lacks what others have."""
    found = {run["seed"]: [run[measure][task] for task in tasks]
             for run in runs if run["arm"] == arm}
    if not tasks or any(None in values for values in found.values()):
        return {}
    return {seed: sum(values) / len(tasks) for seed, values in found.items()}


# ------------------------------------------------------------------- the one number format

FOOTNOTE = """Accuracy, and nll, the loss of the right response in nats per token (less is better):
mean ± standard error over seeds. The difference to none, plain fine-tuning, is paired by seed and
by item. Its 95% interval is over seeds and items together; if it says (items), over the items of
one seed, and nothing is said of other seeds; if (seeds), over seeds alone. "not shown": p is 0.05
or more after Holm's correction for all differences in the table. A seed draws the order of the
training data only: no interval says anything of other checkpoints or worlds."""
EXCLUDES = "\nexcludes: the paper's difference to none, if the interval here does not hold it."


def points(of, scale=100, digits=1):
    """An `estimate` of shares in percentage points: "+2.0 [-0.5, +4.5]", or "+2.0 (one seed)". One
    of losses has scale 1 and 3 digits."""
    mean, *ends = ("" if of[name] is None else f"{scale * of[name]:+.{digits}f}"
                   for name in ("mean", "low", "high"))
    return f"{mean} [{', '.join(ends)}]" if ends[0] else f"{mean} (one seed)"


def difference(row, measure="", verdict=True):
    """The difference of a row of `compare` to plain fine-tuning; "" where there is none."""
    level, p, found = (row[measure + name] for name in ("level", "holm", "levels"))
    of = found[level or "seeds"]
    if of["mean"] is None:
        return ""
    return (f"{NOT_SHOWN}: " * (verdict and bool(level) and p >= LEVEL)
            + points(of, *FORMS[measure]) + f" ({level})" * (level in ("items", "seeds")))


def excluded(row, paper):
    """The paper's difference to none in points, if a row's interval does not hold it; else None.
    paper: {(arm, suite): %}."""
    figure, plain = (paper.get((arm, row["suite"])) for arm in (row["arm"], "none"))
    if row["interval"] and None not in (figure, plain):
        low, high = row["interval"]
        return None if 100 * low <= figure - plain <= 100 * high else f"{figure - plain:+.1f}"


def lines_of(rows, paper={}, measure=""):
    """The rows of `compare` about one model -> header and lines of a table, suite by suite, of the
    accuracies or, if the measure is "nll_", the losses. paper: {(arm, suite): the paper's figure in
    %}, a column of its own, and one of what the interval excludes."""
    header = ["arm", "seeds", "nll" if measure else "accuracy, %", "difference to none"]
    lines, names = [], ("nll", "nll_standard_error") if measure else ("mean", "standard_error")
    for suite in dict.fromkeys(row["suite"] for row in rows):
        lines.append([suite])
        for row in (row for row in rows if row["suite"] == suite):
            lines.append([f"  {row['arm']}", row["seeds"], with_error(
                *(row[name] for name in names), *FORMS[measure]), difference(row, measure)])
            if (row["arm"], suite) in paper:
                lines[-1] += [f"{paper[row['arm'], suite]:.1f}", excluded(row, paper)]
    return header + ["the paper", "excludes"] * bool(paper), lines


def comparison_table(rows, paper={}):
    """The rows of `compare`, and figures of the paper, as a text for people."""
    texts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ours = [row for row in rows if row["model"] == model]
        texts += [page.visible(model)]
        texts += [page.columns(*lines_of(ours, paper if not measure else {}, measure))
                  for measure, mean in (("", "mean"), ("nll_", "nll"))
                  if any(row[mean] is not None for row in ours)]
    return "\n\n".join([*texts, FOOTNOTE + EXCLUDES * bool(paper)])
