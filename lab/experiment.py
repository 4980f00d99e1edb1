"""Arms times seeds: train what is missing, score it, compare it.

    python -m lab.experiment --steer none int reg --seed 0 1 2      arms of your own
    python -m lab.experiment table2                                 the arms of the paper's Table 2
    python -m lab.experiment table1 --model DIR --task boolq --data data/public --lr 1e-5
    python -m lab.experiment --compare out                          what a folder holds already

An arm is a way to steer. A seed draws the order of the training examples. Each arm and seed is a
run of train.py, in a folder of its own in --out. All runs have one recipe: every flag of train.py
that is not listed below goes to all of them. A flag of a steering, such as --p, --lam or --rank-by,
goes to the arms for which it means something. Finished runs are not trained again, and interrupted
ones go on. Then the base model and all runs are scored, on all tasks of the toy world, or on the
named tasks. Of a folder, --compare shows the runs of one recipe, scored alike: those of which there
are most. It says which runs and scores it leaves out, and why.

Differences to none are paired by seed and by item. The tables have their intervals over seeds and
items together, and of one seed over items; "not shown" is said after Holm's correction. --json has
the intervals over either and over both, p values, and all items of all runs.

The tables:
    table1    none, int, reg: the main comparison
    table2    weak and strong steering
    table4    in and out of distribution, task by task (of the real tasks: --task gsm8k)
    table6    semantic, activation: a strength for each group of memories
    table7    surrogate, surrogate-entropy: steering by what each memory says
    table8    steering of early, middle and late layers, and all with alpha 2, 3 and 1
    controls  no table of the paper: what int and reg have to be compared with
Where int stands in them, it is trained in both readings of eq. 4.
"""
import contextlib
import json
import shlex
import sys
from argparse import SUPPRESS
from dataclasses import replace
from pathlib import Path

from data import BadInput, Parser, command, positive, progress, whole
from data.runs import read_run, same_run
from data.tasks import SUITES, TOY, load as load_examples
from eval import items_file, score, set_threads, split_names
from infosteer import GENERIC, METHODS, Steering, format_layers, meaningful
from lab.page import visible
from lab.stats import (alike, compare, comparison_table, find_runs, items_of,
                       mean_and_error, recipe_of, suites_of)
from model import Config
from train import (STEERING_FLAGS, base_folder, finished, flag, read_settings, run_folder,
                   settings_of, train)

# --------------------------------------------------------------------------- the paper's tables

BASE = None                            # the arm of the base model, which needs no training


def table8(n_layers):
    """Table 8 for a model of so many layers. Of 24, early is 1-8, middle 9-16 and late 17-24."""
    first, second = round(n_layers / 3), round(2 * n_layers / 3)
    if not 0 < first < second < n_layers:
        raise BadInput(f"table8: {n_layers} layers cannot be divided into early, middle and late")
    early, middle = [*range(1, first + 1)], [*range(first + 1, second + 1)]
    late = [*range(second + 1, n_layers + 1)]

    def at(layers, **strengths):
        return dict.fromkeys(layers, strengths)

    return [(Steering(), 72.6),                                # this one stands in Table 2
            (Steering("int", layers=at(early)), 73.8),
            (Steering("int", layers=at(middle)), 75.2),
            (Steering("int", layers=at(late)), 72.9),
            (Steering("int", layers=at(early + middle)), 76.3),
            (Steering("int", layers=at(middle + late)), 74.5),
            # The strengths that the paper's text states. It has no figure for them together.
            (Steering("int", layers={**at(early, alpha=2.0), **at(middle, alpha=3.0),
                                     **at(late, alpha=1.0)}), None),
            (Steering("reg", lam=0.05, layers=at(middle)), 74.9),
            (Steering("reg", lam=0.05), 74.7)]


# Each arm and the paper's accuracy in %; in Table 4 on GSM8K, and the mean over five other sets.
TABLES = {
    "table1": [(BASE, 76.8), (Steering(), 81.2), (Steering("int"), 83.3), (Steering("reg"), 82.6)],
    "table2": [(BASE, 71.4), (Steering(), 72.6), (Steering("int"), 73.8),
               (Steering("int", alpha=2.0), 75.5), (Steering("int", p=0.02, alpha=5.0), 72.8),
               (Steering("reg", lam=-0.01), 72.3), (Steering("reg"), 73.4),
               (Steering("reg", lam=0.05), 74.7)],
    "table4": [(BASE, (63.7, 85.3)), (Steering(), (65.7, 83.7)), (Steering("int"), (66.8, 86.6)),
               (Steering("reg"), (66.1, 86.0))],
    "table6": [(Steering(), None), (Steering("semantic"), 84.6), (Steering("activation"), 83.7)],
    "table7": [(Steering(), None), (Steering("surrogate"), 84.3),
               (Steering("surrogate-entropy"), 83.3)],
    "table8": table8,
}
OF_TABLE_2 = "Table 2, mean accuracy; it does not say over what"
MARGINAL = ' of the fine-grained methods; a footnote speaks of "only marginal improvements"'
SOURCES = {
    "table1": "Table 1, mean over its models", "table2": OF_TABLE_2, "controls": OF_TABLE_2,
    "table4": "Table 4, GSM8K and mean of five other sets",
    "table6": "mean over Table 6" + MARGINAL, "table7": "mean over Table 7" + MARGINAL,
    "table8": "Table 8, mean accuracy; it does not say over what; for none, that of Table 2. That "
              "its rows have alpha 1 is our reading: the text has 2, 3, 1 for early, middle, late"}
# What separates steering from its rivals. The strengths were fixed before any of these was run: of
# section 5.1 and Table 2 for int and reg, the same for their controls, and else the usual ones.
CONTROLS = [                           # flags of train.py
    "--steer none", "--steer int", "--steer int --rank-by value", "--steer int --rank-by random",
    "--steer dropout", "--steer dropout --p 0.1",  # in as many memories as int; as is usual
    "--steer reg", "--steer reg --lam 0.05", "--steer knowledge-entropy",
    "--steer resuscitation --p 0.5 --alpha 2",     # the example of its authors' code
    "--anchor 70",                                 # the weights of a toy run move half as far
    "--label-smoothing 0.1", "--confidence-penalty 0.1", "--loss-on all"]
# Table 1 task by task, mean over its six models: base, none, int, reg.
TABLE1 = {
    "boolq": (67.9, 71.6, 73.7, 73.5), "piqa": (81.0, 85.1, 87.0, 86.3),
    "social_i_qa": (75.5, 80.1, 80.4, 79.7), "hellaswag": (85.0, 89.4, 93.3, 92.5),
    "winogrande": (79.6, 83.9, 86.0, 85.3), "ARC-Easy": (80.4, 85.1, 87.4, 86.6),
    "ARC-Challenge": (67.2, 71.8, 74.5, 73.7), "openbookqa": (77.8, 82.9, 84.2, 83.4)}
OUT_TASKS = ["AddSub", "SingleEq", "MultiArith", "mawps", "SVAMP"]     # those that Table 4 averages


def arms_of(table, n_layers):
    """A table's arms and the paper's figures: [(steering or BASE, figure)]. Behind each arm that
    raises the smallest coefficients stands the literal reading of eq. 4, without a figure."""
    arms = []
    for steering, figure in table(n_layers) if callable(table) else table:
        arms.append((steering, figure))
        if steering and "rank_by" in steering.settings:
            arms.append((replace(steering, rank_by="value"), None))
    return arms


def tasks_tested(table, names):
    """What is scored after training on the named tasks -> {suite: its tasks}. Raises BadInput."""
    if all(name in TOY for name in names):
        return suites_of(TOY) | ({name: [name] for name in TOY} if table == "table4" else {})
    if table == "table4":
        if names != ["gsm8k"]:
            raise BadInput("table4 trains on gsm8k (--task gsm8k) or on the toy world")
        return {"in distribution": names, "out of distribution": OUT_TASKS,
                **{name: [name] for name in (*OUT_TASKS, "AQuA")}}
    if "commonsense" in names:         # all rows of Table 1's tasks: likely its recipe, lab/README
        names = list(TABLE1)
    return {**({"mean": names} if len(names) > 1 else {}), **{name: [name] for name in names}}


def figures(table, arms, suites):
    """The paper's figures where they belong: {(arm, suite): %}."""
    found = {}
    for i, (steering, figure) in enumerate(arm for arm in arms if arm[1]):
        if table == "table1" and SUITES[0] not in suites:      # of real tasks there is one for each
            there = {suite: round(mean_and_error([TABLE1[task][i] for task in tasks])[0], 1)
                     for suite, tasks in suites.items() if TABLE1.keys() >= set(tasks)}
        else:                                                  # for the first suite, or first two
            there = dict(zip(suites, figure if table == "table4" else [figure]))
        found |= {(steering.name if steering else "base", suite): value
                  for suite, value in there.items()}
    return found


# -------------------------------------------------------------------------------- arms and seeds


def flags(method, settings):
    """The flags of train.py that ask for a method with these settings, {name: value}."""
    return ["--steer", method] + [f"{flag(name)}={value}" for name, value in settings.items()]


def flags_of(steering):
    """The flags of train.py that ask for a steering."""
    usual = vars(Steering(steering.method))
    settings = {name: value for name, value in steering.settings.items() if value != usual[name]}
    if steering.layers:
        settings["layers"] = format_layers(steering.layers)
    return flags(steering.method, settings)


def arms_asked(parser, args):
    """The arms of --steer as flags of train.py, each with the settings that it knows."""
    given = {name: vars(args)[name] for name in STEERING_FLAGS if vars(args)[name] is not None}
    known = {method: meaningful(method, args.generic or "int") for method in args.steer or ()}
    for name in given:
        if not any(name in names for names in known.values()):
            parser.error(f"{flag(name)} means nothing with --steer {' '.join(known)}")
    return [flags(method, {name: value for name, value in given.items() if name in names})
            for method, names in known.items()]


def runs_planned(arms, seeds, recipe, out):
    """The settings of a run for each arm and seed. arms: flags of train.py. Raises BadInput."""
    runs = []
    for arm in arms:
        for seed in seeds:
            argv = [*recipe, *arm, "--seed", str(seed)]
            run = read_settings(argv)
            folder = run_folder(out, run.model, run.arm, seed)
            runs.append(read_settings([*argv, "--out", str(folder)]))
    return runs


def runs_finished(runs):
    """Those that need no training. Raises BadInput where another recipe has been begun."""
    done = [run for run in runs if finished(run)]
    check_one_recipe(done)
    for run in runs:
        if before := not run.overwrite and read_run(f"{run.out}.partial"):
            same_run(settings_of(run) | {"precision": before.get("precision")}, before, run.out)
    return done


def train_missing(missing, done):
    """Train what is missing beside the runs done. Raises BadInput if the recipes differ."""
    print(f"{len(done) + len(missing)} runs, {len(done)} of them finished; {len(missing)} to train",
          file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):               # rows alone go to standard output
        for run in progress(missing, desc="runs", unit="run"):
            if run.overwrite or not finished(run):             # another process may have trained it
                run.resume = not run.overwrite and Path(f"{run.out}.partial").exists()
                train(run)
            check_one_recipe(done := [*done, run])


def check_one_recipe(runs):
    """Raises BadInput for finished runs that differ in more than arm and seed: the data and the
    precision are not determined by flags alone."""
    _, others = alike((run.out, recipe_of(read_run(run.out))) for run in runs)
    for words, folders in others.items():
        raise BadInput(f"{', '.join(folders)}: another recipe than the others, {words}; "
                       "--overwrite trains all of them again, another --out keeps them")


def scores_of(arm, seed, run, tested, args, folder, where=None):
    """The scores of a run or a base model in `folder` on the tasks tested, {name: their examples},
    as lab.stats.compare takes them."""
    where, items = where or Path(folder, "eval"), args.items
    summaries = score(folder, tested, run.data, where, args.score, device=run.device, limit=items,
                      overwrite=run.overwrite)
    return {"model": run.model, "arm": arm, "seed": seed, "folder": str(folder),
            "scores": {one["task"]: one["accuracy"] for one in summaries},
            "nll": {one["task"]: one.get("nll") for one in summaries},
            "scored_by": {one["task"]: one for one in summaries},
            "files": {task: items_file(where, task, examples, args.score, items)
                      for task, examples in tested.items()}}


def in_full(run):
    """A run's scores and its items, for --json."""
    items = {task: [{"index": index, "correct": right and bool(right), "nll": nll}
                    for index, (right, nll) in items_of(run, task).items()]
             for task in run["scores"]}
    kept = {name: run[name] for name in ("model", "arm", "seed", "scores", "nll")}
    return {**kept, "folder": str(run["folder"]), "items": items}


# --------------------------------------------------------------------------------------- command


def make_parser():
    parser = Parser(prog="python -m lab.experiment", description=__doc__,
                    usage="%(prog)s [TABLE | --steer METHOD ... | --compare DIR] [flags]",
                    epilog="python train.py --help explains the flags of recipe and steering.")
    add = parser.add_argument
    add("--steer", nargs="+", choices=METHODS, help="the arms, without a table")
    add("--arm", action="append", metavar="FLAGS", help="one more arm, as flags of train.py in "
        "quotes: --arm \"--steer int --rank-by random\" --arm \"--anchor 70\"")
    add("--seed", type=whole, nargs="+", help="(default: 0 1 2)")
    add("--test", metavar="A,B", help="score on these tasks (default: on those that are trained)")
    add("--score", choices=("nll",), help="only the loss of the right responses, which takes a "
        "fraction of the time (default: accuracies too)")
    add("--out", metavar="DIR", help="the folder of the runs (default: out)")
    add("--items", type=positive, metavar="N", help="score the first N items of each task only")
    add("--compare", metavar="DIR", help="train nothing: compare the scored runs in a folder")
    add("--json", action="store_true", help="print JSON: the rows of the tables, and the runs with "
        "all of their items; accuracies as shares of one, losses in nats per token")
    for name in STEERING_FLAGS:        # train.py's parser checks their values
        add(flag(name), help=SUPPRESS, choices=GENERIC if name == "generic" else None)
    return parser


def main(argv=None):
    argv, parser = list(sys.argv[1:] if argv is None else argv), make_parser()
    table = argv.pop(0) if argv and not argv[0].startswith("-") else None
    args, recipe = parser.parse_known_args(argv)
    out = args.compare or args.out or "out"
    if bool(table) + bool(args.steer or args.arm) + bool(args.compare) != 1:
        parser.error(f"give one of these: a table ({', '.join(TABLES)}), --steer or --arm, or "
                     "--compare")
    if table and table not in (*TABLES, "controls"):
        parser.error(f"{table!r} is no table; there are {', '.join(TABLES)} and controls")
    for name in ("steer", "seed"):
        if len(set(vars(args)[name] or ())) < len(vars(args)[name] or ()):
            parser.error(f"--{name} names something twice")
    if args.compare:
        given = [flag(name) for name in ("seed", "out", "items", "test", "score", *STEERING_FLAGS)
                 if vars(args)[name] is not None]
        if given or recipe:
            parser.error(f"--compare trains nothing, so {[*given, *recipe][0]} means nothing")
        runs, suites, paper = find_runs(args.compare), None, {}
    else:
        runs, suites, paper = experiment(parser, args, table, recipe, out)
    rows = compare(runs, suites)
    if args.json:
        rows = [{**row, "paper": paper.get((row["arm"], row["suite"]))} for row in rows]
        return print(json.dumps({"rows": rows, "runs": [*map(in_full, runs)]}))
    print(comparison_table(rows, paper))
    if table in SOURCES:
        print(f"The paper: {SOURCES[table]}.\nIts models and tasks are others: compare signs, not "
              "sizes.")
    if not args.items:
        folder = shlex.quote(f"./{out}" if out.startswith("-") else out)
        print(f"\nnext       python -m lab.report {visible(folder)}")


def experiment(parser, args, table, recipe, out):
    """Train what is missing and score -> runs and suites for `compare`, the paper's figures."""
    plain = read_settings(recipe)                              # what all runs have in common
    names = split_names(plain.task, plain.data)
    set_threads(plain.threads, names)
    suites = ({name: [name] for name in split_names(args.test, plain.data)} if args.test
              else tasks_tested(table, names))
    # A missing file shows before hours of training, not after.
    tested = {task: load_examples(plain.data, task, "test")
              for tasks in suites.values() for task in tasks}
    if table:
        if given := [name for name in STEERING_FLAGS if vars(args)[name] is not None]:
            parser.error(f"{flag(given[0])} means nothing with {table}, whose arms are the paper's")
        pairs = arms_of(TABLES.get(table, TABLES["table2"]),
                        Config.from_pretrained(plain.model).n_layers)
        arms = [flags_of(arm) for arm, _ in pairs if arm]
        arms = arms if table in TABLES else [arm.split() for arm in CONTROLS]
        paper = figures(table, pairs, suites)
    else:
        arms, paper = arms_asked(parser, args) + [*map(shlex.split, args.arm or ())], {}
    runs = runs_planned(arms, args.seed or [0, 1, 2], recipe, out)
    done = runs_finished(runs)
    missing, base = [run for run in runs if run not in done], base_folder(out, plain.model) / "eval"
    scored = {"base": scores_of("base", None, plain, tested, args, plain.model, base)}
    for some in (done, missing):       # what is wrong with scores that are there shows at once
        if some is missing:
            train_missing(missing, done)
        for run in progress(some, desc="scoring", unit="model"):
            scored[run.out] = scores_of(run.arm, run.seed, run, tested, args, run.out)
    return [scored["base"], *(scored[run.out] for run in runs)], suites, paper


if __name__ == "__main__":
    command(main)
