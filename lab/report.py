"""One page about a folder of runs: DIR/report.html, which opens in a browser without a network.

    python -m lab.report out

It shows what was run, what the paper claims and what is seen here, accuracies, training curves, key
regions, information flux, and the memories of the base model.
"""
import json
from contextlib import suppress
from itertools import product
from pathlib import Path

from data import BadInput, Parser, command, progress, write_whole
from data.tasks import find, load as load_examples
from eval import load, pick_device, set_threads, split_names, steering_from, which_model
from lab import machine_flags, page
from lab.flux import POSITIONS, first_runs, flux_of, flux_sections
from lab.memories import LISTED, choose_decoding, decodable, decode, describe, row_of
from lab.regions import REGIONS, regions_of, shift_lines, shifts
from lab.stats import (FOOTNOTE, LEVEL, NOT_SHOWN, compare, difference, find_runs, holm, left_out,
                       lines_of, points, suites_of)
from train import RIVALS

ITEMS = 60                             # test items whose tokens are looked at
MOST_CURVES, MOST_MODELS = 20, 6       # curves in a chart, fine-tuned models whose flux is shown
SHOWN = 3                              # items whose tokens are shown
MOST_LAYERS = 4                        # layers of the base model whose memories are decoded
CURVES = {"lm_loss": "loss of the language model, nats per token",
          "flux": "information flux (key entropy), nats"}
INTRO = """InfoSteer steers how much of its feed-forward memory a language model uses while it is
fine-tuned. This page shows the runs in {}: what was done, what came out, and how sure that is."""


class Notes(list):
    """What is left out of a page, and why: each is said once, and kept for the page."""

    def __call__(self, text):
        if str(text) not in self:
            self.append(str(text))
            left_out(text)


# ----------------------------------------------------------------------------------- claims

BEATS = {"int": "Raising the smallest coefficients beats plain fine-tuning (Tables 1, 2, 4)",
         "reg": "Rewarding the key entropy beats plain fine-tuning (Tables 1, 2, 4)"}
PAIRED = "int", "int-value"            # they differ from RANDOM in the choice of memories only
RANDOM = "int-random"
IDLE = "Raising the smallest coefficients beats raising random ones (not in the paper)"
RIVALRY = "A control or rival beats plain fine-tuning (not in the paper)"
MOVES = (                              # Fig. 4: method, region of |k|, sign of the change, claim
    ("none", "low", 1, "Plain fine-tuning moves coefficients into the low region (Fig. 4)"),
    ("int", "low", -1, "int moves coefficients out of the low region (Fig. 4)"),
    ("int", "high", 1, "int moves coefficients into the high region (Fig. 4)"),
    ("reg", "low", -1, "reg takes coefficients from the low region (Fig. 4)"),
    ("reg", "high", -1, "reg takes coefficients from the high region (Fig. 4)"),
    ("reg", "middle", 1, "reg moves coefficients into the middle region (Fig. 4)"))
LESS_FLUX = {"punctuation": "punctuation", "function": "function words",
             "copied": "words copied from the prompt"}
CONTROL = "", "dropout", "knowledge", "resuscitation"          # what `method_of` says of one
LEAST = 30                             # tokens of a class, for a claim about their flux
AS_CLAIMED, OPPOSITE = "as claimed", "the opposite"
VERDICTS = (AS_CLAIMED, OPPOSITE, NOT_SHOWN)


def verdict(difference, p, sign=1):
    """What a difference, and its p value after Holm's correction, say of the claim that it has this
    sign."""
    if p is None or p >= LEVEL:
        return NOT_SHOWN
    return AS_CLAIMED if (difference > 0) == (sign > 0) else OPPOSITE


def method_of(arm):
    """The method of an arm of the paper; "" for controls, rivals, and one that repeats another."""
    others = " ", "-random", *(f"-{name}=" for name in RIVALS)
    return "" if any(part in arm for part in others) else arm.partition("-")[0]


def claims(rows, regions, flux):
    """What the paper claims, what controls have to say, and every comparison of ours: [[claim,
    where, difference, verdict]]. rows: of `compare`, with plain fine-tuning and with the control of
    int; regions, flux: of regions_of and flux_of, or None."""
    found, moves, gaps = [], [], []
    for row, (measure, sign) in product(rows, (("", 1), ("nll_", -1))):
        method = method_of(row["arm"])
        claim = IDLE if row["against"] == RANDOM else BEATS.get(method) or (
            RIVALRY if method in CONTROL and " " not in row["arm"] else None)
        if claim and row[f"{measure}difference"] is not None:
            found.append([claim, f"{row['arm']}, {row['suite']}" + ", nll" * bool(measure),
                          difference(row, measure, verdict=False),
                          verdict(row[f"{measure}difference"], row[f"{measure}holm"], sign)])
    for (method, region, sign, claim), (arm, against, *changes) in product(
            MOVES, shifts(regions["arms"]) if regions else ()):
        if method == method_of(arm):
            of = changes[REGIONS.index(region)]
            moves.append((claim, f"{arm} against {against}", points(of), of, sign))
    for model, at, name in product(flux["models"] if flux else (), POSITIONS, LESS_FLUX):
        of, classes = model[at]["content_against"][name], model[at]["classes"]
        where = (f"Content words have more flux than {LESS_FLUX[name]} (section 6)",
                 f"answers of {model['title']}, {at}")
        if (n := min(classes["content"]["n"], classes[name]["n"])) < LEAST:
            found.append([*where, "", f"too few tokens ({n})"])
        elif of["p"] is None:
            found.append([*where, "", "too few texts that have both"])
        else:
            gaps.append((*where, f"{points(of, 1, 3)} nats in {of['texts']} texts", of, 1))
    for family in (moves, gaps):
        for (*words, of, sign), p in zip(family, holm([of["p"] for *_, of, _ in family])):
            found.append([*words, verdict(of["mean"], p, sign)])
    return found


def claims_section(found):
    """What `claims` found: a line for each claim, and every comparison behind a click."""
    lines = []
    for claim in dict.fromkeys(row[0] for row in found):
        verdicts = [row[3] for row in found if row[0] == claim and row[3] in VERDICTS]
        lines.append([claim, len(verdicts), *map(verdicts.count, VERDICTS)])
    every = page.table(["claim", "here", "difference", "verdict"], found, note=(
        "Differences have 95% intervals: of accuracies, in points, and of nll, as in the tables "
        "below; of shares of the coefficients, in points, over seeds; of flux, over texts. "
        "Verdicts are after Holm's correction, of all accuracies, all nll, all shares, all flux."))
    return page.table(["claim", "comparisons here", *VERDICTS], lines) + (
        f"<details><summary>Every comparison</summary>{every}</details>")


# --------------------------------------------------------------------------------- sections


def runs_section(trained):
    """What was run. Runs that differ in nothing but the seed share a line."""
    lines = {}
    for run in trained:
        of = run["settings"]
        versions = of.get("versions") or {}
        line = (run["arm"], str(steering_from(of["steering"], run["folder"])),
                *(of.get(key) for key in ("steps_total", "batch", "lr", "warmup", "examples")),
                f"{of.get('precision')}, {of.get('device')}",
                f"{versions.get('torch')}, {versions.get('python')}")
        lines.setdefault(line, []).append(run["seed"])
    header = ["arm", "seeds", "steering", "steps", "batch", "lr", "warm-up", "examples",
              "precision, device", "torch, Python"]
    rows = [[line[0], " ".join(map(str, sorted(seeds))), *line[1:]]
            for line, seeds in lines.items()]
    commands = dict.fromkeys(str(run["settings"].get("command")) for run in trained)
    return page.table(header, rows) + page.preformatted("\n".join(commands))


def accuracy_chart(rows):
    rows = [row for row in rows if row["mean"] is not None]    # plain text has none
    if not rows:
        return page.paragraph(page.NOTHING)
    found = {(row["arm"], row["suite"]): as_bar(row["mean"], row["standard_error"]) for row in rows}
    arms, suites = (dict.fromkeys(names) for names in zip(*found))
    series = {arm: [found.get((arm, suite)) for suite in suites] for arm in arms}
    return page.bars(list(suites), series)


def as_bar(mean, error):
    """A share and its standard error or None, as page.bars takes them."""
    return round(100 * mean, 1), error and 100 * error


def read_log(run):
    """[(step, loss, flux)] of a run's log. Raises BadInput."""
    path = run["folder"] / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines()]
        lines[0]                       # there is no run without a step
        return [tuple(float(line[key]) for key in ("step", *CURVES))
                for line in lines if line["step"]]             # before step 1: held-out loss only
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path}: not a whole log of train.py ({error}), so there is no curve of "
                       "this run") from None


def training_section(trained, notes):
    drawn, note = trained, ""
    if len(trained) > MOST_CURVES:
        drawn = list({run["arm"]: run for run in reversed(trained)}.values())[::-1][:MOST_CURVES]
        note = f"the first seed of each arm; {len(trained)} runs in all"
    logs = {}
    for run in drawn:
        try:
            logs[f"{run['arm']} seed {run['seed']}"] = read_log(run)
        except BadInput as error:
            notes(error)
    return "".join(page.curves({name: [(line[0], line[i]) for line in log]
                                for name, log in logs.items()}, "step", label, note=note)
                   for i, label in enumerate(CURVES.values(), 1))


def regions_section(regions):
    body = ""
    for reading, name in enumerate(("of |k|: low is idle", "of k: low is strongly negative")):
        series = {arm: [as_bar(found["mean"][reading][i], found["standard_error"]
                               and found["standard_error"][reading][i]) for i in range(3)]
                  for arm, found in regions["arms"].items()}
        body += page.bars(list(REGIONS), series, note=(
            f"share of the key coefficients in the base model's quartile regions, {name}"))
    return body + page.table(*shift_lines(regions), "paired by seed, with 95% intervals over seeds")


def clear_memories(model, device):
    """The clearest memories of some layers of the base model."""
    base, tokenizer = load(model, device=device)
    (how, why), head, rows = choose_decoding(base), base.decode.float(), []
    last = base.config.n_layers - 1
    layers = sorted({round(last * i / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)})
    for layer in progress(layers, desc="decoding memories", unit="layer"):
        v, cap = decodable(base, layer, how)
        said = {name: of[None] for name, of in decode(v, head, cap).items()}   # as of one layer
        for memory in said["clarity"][0].topk(min(LISTED, len(v))).indices.tolist():
            one = describe(tokenizer, len(head), said, 0, memory) | {"layer": layer + 1}
            rows.append(row_of(one, f"{one['clarity']:.1f}"))
    return page.table(["memory", "clarity", "specificity", "says, decoded alone"], rows, note=(
        f"layer:memory, of {len(layers)} of the {last + 1} layers of the base model; all would "
        f"take long. Decoded {how}, {why}. x830: 830 times as probable as if all {len(head):,} "
        "tokens were equally probable. python -m lab.memories --help explains the rest."))


def base_of(runs):
    """Where the model is that these runs began with, or None."""
    for path in dict.fromkeys(run["settings"]["model"] for run in runs):
        with suppress(BadInput, OSError):
            if which_model(path) == runs[0]["model_sha256"]:
                return path


def memory_sections(model, runs, names, data, device, notes):
    """What memories do in a base model and in its runs -> regions, flux, [(heading, HTML)]. Raises
    BadInput."""
    bar = progress(total=3, desc="looking inside models", unit="stage")
    regions = regions_of(model, runs, names, data, ITEMS, device, notes)
    bar.update()
    known, found = ("none", "int", "int-value", "reg"), first_runs(runs)
    first = [found[arm] for arm in sorted(found, key=lambda arm: arm not in known)]
    examples = [example for name in names for example in
                load_examples(data, name, "test")[:max(1, ITEMS // len(names))]]
    flux = flux_of([model, *first[:MOST_MODELS]], [(one.prompt, None) for one in examples],
                   max(one.task.max_new_tokens for one in examples), device, say=notes)
    flux["settings"] |= {"task": names, "data": data}
    for seen in flux["models"]:
        seen["shown"] = seen["shown"][:SHOWN]
    bar.update()
    sections = [("Key regions (the paper's Fig. 4)", regions_section(regions)),
                *flux_sections(flux), ("Clear memories", clear_memories(model, device))]
    bar.update()
    bar.close()
    return regions, flux, sections


def sections_of(runs, device, notes):
    """The sections about one base model: [(heading, HTML)]. runs: those of `find_runs` that began
    with it, and itself."""
    trained = [run for run in runs if run["settings"].get("base") is not True]
    model = base_of(runs)
    rows, tasks = compare(runs, say=notes), {task for run in runs for task in run["scores"]}
    random = compare([run for run in runs if run["arm"] in (*PAIRED, RANDOM)], against=RANDOM)
    singles = {task: [task] for tasks in suites_of(tasks).values() for task in tasks}
    sections = [
        ("Accuracy", page.table(*lines_of(rows)) + page.table(
            *lines_of(rows, measure="nll_"), " ".join(FOOTNOTE.split()))),
        ("Suite by suite", accuracy_chart(rows)),
        ("Task by task (the paper's Fig. 3)", accuracy_chart(compare(runs, singles)))]
    regions = flux = None
    if trained:
        sections = [("What was run", runs_section(trained)), *sections,
                    ("Training", training_section(trained, notes))]
    try:
        if not model or not trained:
            raise BadInput("there is no fine-tuned run" if model else "the model that these runs "
                           f"began with is not at {runs[0]['settings']['model']}")
        of = trained[0]["settings"]
        data = str(of.get("data", ""))
        names = [name for name in split_names(str(of.get("task")), data)
                 if "test" in find(name, data).splits]
        regions, flux, more = memory_sections(model, trained, names or list(singles), data, device,
                                              notes)
        sections += more
    except BadInput as error:
        sections.append(("Memories", page.paragraph(f"What memories do cannot be shown: {error}.")))
    found = claims_section(claims(rows + random, regions, flux))
    return [*sections[:1], ("What the paper claims, and what is seen here", found), *sections[1:]]


def report(folder, runs, device="cpu", notes=None):
    """The page, as text, about the runs that `find_runs` found in a folder. What is left out of it
    goes to `notes` and stands in front."""
    notes = Notes() if notes is None else notes
    sections, models = [], list(dict.fromkeys(run["model"] for run in runs))
    for title in models:
        ours = [run for run in runs if run["model"] == title]
        for heading, body in sections_of(ours, device, notes):
            sections.append((f"{title}: {heading}" if len(models) > 1 else heading, body))
    if notes:
        sections.insert(0, ("Left out of this page", page.table(["what, and why"], [
            [note] for note in notes])))
    intro = " ".join(INTRO.split()).format(folder)
    return page.document("InfoSteer: what came out", intro, sections)


def main(argv=None):
    parser = Parser(prog="python -m lab.report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="a folder of scored runs of train.py")
    parser.add_argument("--out", metavar="FILE", help="the page (default: DIR/report.html)")
    machine_flags(parser.add_argument)
    args = parser.parse_args(argv)
    out, notes = Path(args.out or Path(args.folder, "report.html")), Notes()
    runs = find_runs(args.folder, notes)
    page.check_page(out, "--out")      # now, not after minutes
    set_threads(args.threads, {task for run in runs for task in run["scores"]})
    write_whole(out, report(args.folder, runs, pick_device(args.device), notes))
    print(f"{page.visible(out)}: open it in a browser")


if __name__ == "__main__":
    command(main)
