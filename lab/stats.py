"""Means, standard errors and intervals, and the comparison of the runs in a folder."""
import json
import math
import sys
from pathlib import Path

import torch

from data import BadInput, read_json
from data.runs import MACHINE
from data.tasks import OWN_NAME, TASKS, TOY
from eval import steering_from, suite_of, which_model, with_error
from lab import page
from train import RIVALS

# ----------------------------------------------------------------------- means and intervals

# Quantiles of Student's t for 95% intervals, by degrees of freedom from 1. The last one serves for
# all larger numbers, for which it is a little too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
NOT_SHOWN = "not shown"                # the verdict on a difference whose interval covers zero


def mean_and_error(values):
    """Mean of a few numbers, and its standard error (None for a single one); None of none."""
    mean = sum(values) / len(values) if values else None
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def interval(values):
    """Mean and 95% interval (Student's t) of a few numbers -> (mean, low, high); the ends are None
    for a single one."""
    mean, error = mean_and_error(values)
    if error is None:
        return mean, None, None
    width = T975[min(len(values) - 1, len(T975)) - 1] * error
    return mean, mean - width, mean + width


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
    "settings", "scores", "nll", "scored_by"}], one for each finished run and each base model. The
    arm is that of train.py or "base", settings are its args.json, scores {task: accuracy}, nll
    {task: nll or None} and scored_by {task: {of SCORED_BY}} are from its eval/TASK.json. A damaged
    run costs a line, not the other runs."""
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
                if not fits and (name, value) != ("nll", None):
                    raise BadInput(f"{file}: {name} is {value!r}; score it again (--overwrite)")
            if base and summary.get("model_sha256", sha := settings["model_sha256"]) != sha:
                raise BadInput(f"{file}: holds scores of another model than {path} names; score it "
                               "again (--overwrite)")
            scored_by[file.stem] = {key: summary.get(key) for key in SCORED_BY}
    return [{"arm": arm, "folder": path.parent, "settings": settings, "scores": scores,
             "nll": losses, "scored_by": scored_by,
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


MEASURED = ("mean", "standard_error", "difference", "interval",
            "nll", "nll_standard_error", "nll_difference", "nll_interval")


def compare(runs, suites=None):
    """Mean over seeds with standard error, and the difference to plain fine-tuning (the arm none),
    paired by seed, with its 95% interval.

    runs: [{"model", "arm", "seed", "scores": {task: accuracy}, "nll": {task: nll or None}}].
    suites: {name: its tasks}; None: those of the tasks. The accuracy of a suite is the mean over
    its tasks, its nll that over those that have one. A run that was not scored on all of them is
    left out of that suite; an arm of which a run has no nll shows none.
    -> [{"model", "arm", "suite", "seeds", of MEASURED}], accuracies as shares of one, losses in
    nats per token, None where there is nothing to say."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        ours = [run for run in runs if run["model"] == model]
        chosen = suites or suites_of(task for run in ours for task in run["scores"])
        for arm in sorted(dict.fromkeys(run["arm"] for run in ours), key=plain_first):
            for suite, tasks in chosen.items():
                scored = [run for run in ours if set(tasks) <= run["scores"].keys()]
                seeds = {run["seed"] for run in scored if run["arm"] == arm}
                if not seeds:
                    continue
                accuracy, nll = (against_plain(scored, arm, tasks, of) for of in ("scores", "nll"))
                rows.append({"model": model, "arm": arm, "suite": suite, "seeds": len(seeds),
                             **dict(zip(MEASURED, (*accuracy, *nll)))})
    return rows


def against_plain(runs, arm, tasks, measure):
    """What `compare` says of an arm: mean, standard error, difference, interval."""
    at, plain = by_seed(runs, arm, tasks, measure), by_seed(runs, "none", tasks, measure)
    pairs = [at[seed] - plain[seed] for seed in at if seed in plain and arm != "none"]
    difference, low, high = interval(pairs)
    return *mean_and_error([*at.values()]), difference, None if low is None else [low, high]


def by_seed(runs, arm, tasks, measure):
    """{seed: mean over the tasks} of an arm's runs; {} if one of them lacks what others have."""
    tasks = [task for task in tasks if any(run[measure][task] is not None for run in runs)]
    found = {run["seed"]: [run[measure][task] for task in tasks]
             for run in runs if run["arm"] == arm}
    if not tasks or any(None in values for values in found.values()):
        return {}
    return {seed: sum(values) / len(tasks) for seed, values in found.items()}


# ------------------------------------------------------------------- the one number format

FOOTNOTE = """Accuracy, and nll, the loss of the right response in nats per token (less is better):
mean ± standard error over seeds. The difference to none, plain fine-tuning, is paired by seed; "not
shown" means that its 95% interval covers zero. A seed draws the order of the training data only: no
interval says anything of other checkpoints, data or test items."""


def points(mean, low, high, scale=100, digits=1):
    """A difference of shares in percentage points: "+2.0 [-0.5, +4.5]", or "+2.0 (one seed)". One
    of losses has scale 1 and 3 digits."""
    mean, *ends = ("" if x is None else f"{scale * x:+.{digits}f}" for x in (mean, low, high))
    return f"{mean} (one seed)" if low is None else f"{mean} [{', '.join(ends)}]"


def percent(row):
    """The accuracy of a row of `compare`: "12.3 ± 0.4"."""
    return with_error(row["mean"], row["standard_error"])


def difference(row, measure="", *form):
    """The difference of a row of `compare` to plain fine-tuning; "" where there is none."""
    mean, ends = row[f"{measure}difference"], row[f"{measure}interval"]
    if mean is None:
        return ""
    low, high = ends or (None, None)
    verdict = f"{NOT_SHOWN}: " if low is not None and low <= 0 <= high else ""
    return verdict + points(mean, low, high, *form)


def lines_of(rows, paper={}, nll=False):
    """The rows of `compare` about one model -> header and lines of a table, suite by suite, of the
    accuracies or the losses. paper: {(arm, suite): the paper's figure in %}, a column of its own.
    """
    header, lines = ["arm", "seeds", "nll" if nll else "accuracy, %", "difference to none"], []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        lines.append([suite])
        for row in (row for row in rows if row["suite"] == suite):
            cells = [percent(row), difference(row)]
            if nll:
                cells = [with_error(row["nll"], row["nll_standard_error"], 1, 3),
                         difference(row, "nll_", 1, 3)]
            lines.append([f"  {row['arm']}", row["seeds"], *cells])
            if (row["arm"], suite) in paper:
                lines[-1].append(f"{paper[row['arm'], suite]:.1f}")
    return header + ["the paper"] * bool(paper), lines


def comparison_table(rows, paper={}):
    """The rows of `compare`, and figures of the paper, as a text for people."""
    texts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ours = [row for row in rows if row["model"] == model]
        texts += [page.visible(model), page.columns(*lines_of(ours, paper)),
                  page.columns(*lines_of(ours, nll=True))]
    return "\n\n".join([*texts, FOOTNOTE])
