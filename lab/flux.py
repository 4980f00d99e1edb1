"""Information flux: how many memories each token of a text activates (section 6.2, Table 5).

    python -m lab.flux --text "The town of Ulmo Zeller is Kestow."     start here: one text
    python -m lab.flux                   answers of the base model and of the runs in out/
    python -m lab.flux --task toy-cloze --html flux.html               a page to open in a browser
    python -m lab.flux --model DIR --prompt "Why is the sky blue?"     a real model's answer
    python -m lab.flux --model DIR --task boolq,ARC-Easy,piqa,gsm8k --data data/public --items 25
                         reading comprehension, knowledge, common sense and mathematics
"""
import json
import math
import os
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F

from data import BadInput, Parser, command, not_negative, positive, progress, write_whole
from data.tasks import TASKS, TOY, load as load_examples
from eval import (TOY_FOLDER, Watch, load, pick_device, pick_dtype, read_run, set_threads,
                  split_names, steering_from)
from infosteer import METHODS, Steering, key_entropy
from lab import machine_flags, page, steerings_of
from lab.stats import (alike, clustered_mean, grouped_correlation, interval, left_out, recipe_of,
                       runs_from, terciles)
from lab.words import CLASSES, TITLES, token_classes
from model import Config

SHOWN, KEPT = 3, 10                    # items in the terminal; items in --json and --html
POSITIONS = {"generating": "where each token is generated", "fed": "where each token is fed"}
ABOUT = """The flux of a token is the entropy of its key distribution in nats, averaged over layers.
It is 0 where one memory does all the work and log d_m where all memories are equally active. It is
read at two positions. Generating: where the token before it is fed, for there the model predicts
it. This is our reading of section 6.2, where memories are active "during token generation". Fed:
where the token itself is fed. The two rank words differently, so all tables have both. The very
first place is not read: models rest their attention there, and its flux is far below all others. So
nothing is known of how the first token of a text is generated, nor of where it is fed if the
tokenizer puts nothing before it. The levels low, middle and high are thirds of all tokens that a
model has read. So compare levels within a model, and means between models."""
ABOUT_CLASSES = """In nats ± standard error (number of tokens). A token has the class of its word,
the first of these that fits: punctuation (with symbols and white space), function words, copied
from the prompt (a content word or number that stands there), digits, content words. Errors are
clustered by item, because the tokens of one answer are not independent."""
ABOUT_SURPRISAL = """Their correlation ± jackknife error over items (number of tokens). Surprisal is
-log p of a token given what precedes it. Within classes, both are centred on their class means.
Greedy answers have small surprisals, since a model chooses what it finds likely. It did not choose
the text of --text."""
ABOUT_LEVELS = """Where low and middle flux end, in nats. If few of the answers are different texts,
all errors rest on few texts."""


def readable(tokenizer, ids):
    """Ids -> [(text, number of ids)]. The bytes of one character are one piece."""
    pieces, start = [], 0
    while start < len(ids):
        ends = range(start + 1, min(start + 8, len(ids)) + 1)  # 4 bytes, and tokens may overlap
        whole = (end for end in ends if "\ufffd" not in tokenizer.decode(ids[start:end]))
        end = next(whole, start + 1)
        pieces.append((tokenizer.decode(ids[start:end]), end - start))
        start = end
    return pieces


@torch.inference_mode()
def token_flux(model, prompt, ids, steering=Steering()):
    """Feed the ids of a prompt, which may have none, and `ids` after them -> ({position: flux [T]}
    of POSITIONS, surprisal [T]) of `ids`, in nats. The surprisal of a token that nothing precedes
    is NaN, and so is a flux at the very first place. Raises BadInput for any other NaN."""
    tokens = torch.tensor([[*prompt, *ids]], device=model.embed.weight.device)     # [1, P + T]
    of_layers = []                                             # [P + T] each
    watch = Watch(lambda layer, k: of_layers.append(key_entropy(k[0])), steering)
    hidden, *_ = model.hidden(tokens, watch)
    flux = torch.stack(of_layers).mean(0).cpu()                # [P + T]
    if not flux.isfinite().all():
        raise BadInput("a flux is not a number; a weight is none, or try --dtype float32")
    flux[0] = torch.nan
    first = max(len(prompt), 1)                                # the first that something precedes
    unknown = torch.full((first - len(prompt),), torch.nan)
    surprisal = [unknown]
    # The logits of all tokens at once could take more memory than the model.
    for h, target in zip(hidden[0, first - 1:-1].split(512), tokens[0, first:].split(512)):
        surprisal.append(F.cross_entropy(model.logits(h), target, reduction="none").cpu())
    return {"generating": torch.cat([unknown, flux[first - 1:-1]]),
            "fed": flux[len(prompt):]}, torch.cat(surprisal)


def measure_flux(model, tokenizer, items, max_new_tokens=32, cache_bytes=2 << 30,
                 steering=Steering()):
    """The flux of texts, or of the model's own answers, token by token.

    items: [(prompt, text)]. The text is read after its prompt, which may be empty. Where the text
    is None the model answers greedily. -> for each item a dict:

        prompt             as given
        generating, fed    [T] each: the flux at either position in nats, NaN where there is none
        surprisal          [T] in nats, NaN where nothing precedes
        pieces             [{"text", "tokens", "class", "generating", "fed"}], as `readable` cuts
                           the text; None where there is no flux

    Raises BadInput for a text of fewer than two tokens, and where a flux is not a number.
    """
    prompts = [tokenizer.encode(prompt, special=False) for prompt, _ in items]
    texts = [text and tokenizer.encode(text, bos=False, special=False) for _, text in items]
    if any(ids is not None and len(ids) < 2 for ids in texts):
        raise BadInput("the text is one token to this model; flux is compared between tokens, so "
                       "give two or more")
    asked = [ids for ids, text in zip(prompts, texts) if text is None]
    with progress(total=len(asked), leave=bool(asked), desc="answering", unit="item") as bar:
        answers = iter(model.generate(asked, max_new_tokens, steering, cache_bytes,
                                      done=bar.update))
    measured = []
    for (prompt, text), before, ids in zip(progress(items, desc="reading flux", unit="item"),
                                           prompts, texts):
        ids = next(answers) if text is None else ids
        flux, surprisal = token_flux(model, before, ids, steering)
        T = len(ids) - (text is None and ids[-1] in model.config.eos_ids)  # its end is not shown
        pieces = readable(tokenizer, ids[:T])
        classes = token_classes([text for text, _ in pieces], prompt)
        item = {
            "prompt": prompt, **{at: of[:T] for at, of in flux.items()}, "surprisal": surprisal[:T],
            "pieces": [{"text": text, "tokens": n, "class": name}
                       for (text, n), name in zip(pieces, classes)]}
        for at in POSITIONS:
            for piece, part in zip(item["pieces"], item[at].split([n for _, n in pieces])):
                piece[at] = None if part.isnan().all() else part.nanmean().item()
        measured.append(item)
    return measured


def flux_numbers(measured, position):
    """What `measure_flux` found at a position -> {"mean", "standard_error", "n": tokens, "cuts":
    between low, middle and high, "classes": {name: mean, standard_error, n}, "content_against":
    {another class: {"texts", and the `estimate` of content words' mean less its mean, text by text
    where a text has both}}, "correlations" with surprisal: {"raw", "within": {"r",
    "standard_error", "n"}}}. What is undefined is None."""
    flux, surprisal = (torch.cat([item[key] for item in measured]).double()
                       for key in (position, "surprisal"))                         # [N] each
    text = torch.tensor([i for i, item in enumerate(measured) for _ in item[position]]).long()
    known = ~flux.isnan()
    group = torch.tensor([CLASSES.index(piece["class"]) for item in measured
                          for piece in item["pieces"] for _ in range(piece["tokens"])]).long()

    def average(inside):
        mean, error = clustered_mean(flux[inside], text[inside])
        return {"mean": mean, "standard_error": error, "n": int(inside.sum())}

    def correlate(group):
        there = known & ~surprisal.isnan()
        r, error = grouped_correlation(flux[there], surprisal[there], group[there], text[there])
        return {"r": r, "standard_error": error, "n": int(there.sum())}

    inside = {name: known & (group == i) for i, name in enumerate(CLASSES)}
    of_texts = {name: text[here].bincount(flux[here], len(measured))
                / text[here].bincount(minlength=len(measured)) for name, here in inside.items()}
    gaps = {name: of_texts["content"] - of for name, of in of_texts.items() if name != "content"}
    gaps = {name: gap[~gap.isnan()].tolist() for name, gap in gaps.items()}        # 0/0: has none
    return {**average(known), "cuts": terciles(flux[known])[1].tolist() if known.any() else None,
            "classes": {name: average(here) for name, here in inside.items()},
            "content_against": {name: {"texts": len(gap), **interval(gap)}
                                for name, gap in gaps.items()},
            "correlations": {"raw": correlate(torch.zeros_like(group)), "within": correlate(group)}}


def arm_of(folder):
    """(arm, seed) of a run of train.py; ("base", None) of a model that began with no other."""
    settings = read_run(folder)
    if "steering" not in settings or Path(folder, "pretraining.json").is_file():
        return "base", None
    steering = steering_from(settings["steering"], Path(folder, "args.json"))
    return settings.get("arm", steering.name), settings.get("seed")


def first_runs(runs):
    """Of runs, as runs_from gives them, the first seed of each arm -> {arm: the run's folder}."""
    found = {}
    for run in runs:
        found.setdefault(run["arm"], str(run["folder"]))
    return found


def flux_of(folders, items, max_new_tokens=32, device="cpu", dtype="auto", cache_bytes=2 << 30,
            say=None, position="generating", steered=False, tasks=()):
    """The flux of several models on the same `items` of `measure_flux`. -> {"settings", "models"}:
    each model has what `flux_numbers` says of either position and, of the first KEPT items, the
    tokens "shown", with the level at `position`. tasks: the name of each item's task, if they have
    any. steered: a run keeps the steering of its forward pass. With `say`, a model behind the first
    that cannot be loaded is left out, with a line. Raises BadInput."""
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"                                      # to look, there is time to be exact
    dtype = pick_dtype(dtype, torch.device(device), Config.from_pretrained(folders[0]))
    (arms, seeds), models = zip(*map(arm_of, folders)), []
    steerings = steerings_of(folders, device) if steered else [Steering()] * len(folders)
    for folder, arm, seed, steering in zip(folders, arms, seeds, steerings):
        try:
            model, tokenizer = load(folder, getattr(torch, dtype), device)
        except BadInput as error:
            if not (say and models):
                raise
            say(error)
            continue
        measured = measure_flux(model, tokenizer, items, max_new_tokens, cache_bytes, steering)
        numbers, texts = {at: flux_numbers(measured, at) for at in POSITIONS}, set()
        for item in measured:
            texts.add("".join(piece["text"] for piece in item["pieces"]))
            for piece in item["pieces"]:
                flux, cuts = piece[position], numbers[position]["cuts"]
                piece["level"] = 3 if flux is None else sum(flux > cut for cut in cuts)
        of_tasks = {task: [item for item, of in zip(measured, tasks) if of == task]
                    for task in dict.fromkeys(tasks)}
        title = arm + ", steered" * bool(METHODS[steering.method].change)
        models.append({"model": str(folder), "arm": arm, "seed": seed,
                       "title": title if arms.count(arm) == 1 else f"{title} ({folder})",
                       "largest": math.log(model.config.d_m), "distinct": len(texts), **numbers,
                       "tasks": {task: {at: flux_numbers(of, at) for at in POSITIONS}
                                 for task, of in of_tasks.items()},
                       "shown": [{"prompt": item["prompt"], "tokens": item["pieces"]}
                                 for item in measured[:KEPT]]})
    return {"settings": {"text": None, "prompt": None, "task": [*dict.fromkeys(tasks)],
                         "data": None, "items": len(items), "position": position,
                         "steered": steered, "max_new_tokens": max_new_tokens, "dtype": dtype},
            "models": models}


def plus_minus(cell, form):
    """A mean or a correlation as text: "5.12 ± 0.01", and below it "(234)"."""
    value, error = cell.get("mean", cell.get("r")), cell["standard_error"]
    text = "n/a" if value is None else f"{value:{form}}"
    return text + ("" if error is None else f" ± {error:.3f}") + f"\n({cell['n']})"


def flux_tables(result):
    """The result's numbers, two lines for each model: [(heading, note, header, rows)]."""
    means, links, levels, tasks = [], [], [], []
    for model in result["models"]:
        for at in POSITIONS:
            here, name = model[at], [model["title"], at]
            means += [[*name, *(plus_minus(cell, ".3f")
                                for cell in (here, *here["classes"].values()))]]
            links += [[*name, *(plus_minus(r, "+.3f") for r in here["correlations"].values())]]
            levels += [[*name, *(here["cuts"] or (None, None)), model["largest"],
                        f"{model['distinct']} of {result['settings']['items']}", model["model"]]]
            tasks += [[*name, *(plus_minus(of[at], ".3f") for of in model["tasks"].values())]]
    header = ["model", "position"]
    of_tasks = [("Mean flux of tasks", "As below, all tokens of a task's answers.",
                 [*header, *result["settings"]["task"]], tasks)]
    return [*of_tasks[:len(result["settings"]["task"]) > 1],
            ("Mean flux of kinds of words", ABOUT_CLASSES,
             [*header, "all tokens", *TITLES.values()], means),
            ("Flux and surprisal", ABOUT_SURPRISAL,
             [*header, "raw", "within classes"], links),
            ("Levels", ABOUT_LEVELS, [*header, "low up to", "middle up to", "log d_m",
                                      "different texts", "folder"], levels)]


def flux_subject(settings):
    """What was read, and where, in two sentences."""
    what = "A text that was given." if settings["text"] is not None else (
        "Each model's own greedy answer." if settings["prompt"] is not None else
        f"Each model's own greedy answers to {settings['items']} items of "
        f"{', '.join(settings['task'])}.")
    return f"{what} Levels are those of the flux {POSITIONS[settings['position']]}."


def shown_item(model, i):
    """(texts, levels) of the tokens of one item, as the heat maps take them."""
    tokens = model["shown"][i]["tokens"] or [{"text": "(nothing)", "level": 0}]
    return [token["text"] for token in tokens], [token["level"] for token in tokens]


def flux_text(result, colour=False):
    """The result for a terminal: heat maps of the first items, a line per model, and the tables."""
    models, most = result["models"], max(SHOWN, len(result["settings"]["task"]))
    width = max(len(title) for title in ("prompt", *(model["title"] for model in models))) + 2
    marks = ("light is low, dark is high, none was not measured" if colour else
             "low is plain, [middle], [[high]], (not measured)")
    lines = [textwrap.fill(ABOUT, 100), "", textwrap.fill(
        f"{flux_subject(result['settings'])} Here {marks}.", 100)]
    for i, item in enumerate(models[0]["shown"][:most]):
        prompt = page.visible(item["prompt"].rstrip().replace("\n", "↵"))
        lines += ["", f"{'prompt':<{width}}{prompt}"] if prompt else [""]
        for model in models:
            heat = page.heat_terminal(*shown_item(model, i), colour).lstrip(" ")
            lines.append(f"{page.visible(model['title']):<{width}}{heat}")
    for heading, note, header, rows in flux_tables(result):
        lines += ["", textwrap.fill(f"{heading}. {note}", 100), "", page.columns(header, rows)]
    return "\n".join(lines)


def flux_sections(result):
    """The result as sections of a page, [(heading, HTML)]: the heat maps, then the tables."""
    body = page.paragraph(" ".join(ABOUT.split()))
    for i, item in enumerate(result["models"][0]["shown"]):
        body += page.paragraph(f"Item {i + 1}. {item['prompt']}") if item["prompt"] else ""
        for model in result["models"]:
            body += page.heat(*shown_item(model, i), model["title"])
    return [("Flux, token by token", body),
            *((heading, page.table(header, rows, " ".join(note.split())))
              for heading, note, header, rows in flux_tables(result))]


def main(argv=None):
    parser = Parser(prog="python -m lab.flux", description=__doc__, epilog=ABOUT)
    models, read = (parser.add_mutually_exclusive_group().add_argument for _ in range(2))
    add = parser.add_argument
    models("--model", metavar="DIR", nargs="+", help="runs or published checkpoints (default: "
           "data/toy/llama, and of --runs the first seed of each arm)")
    models("--runs", metavar="DIR", help="a folder of train.py's runs (default: out)")
    read("--text", help="a text to read, on one thread, in place of the models' own answers")
    read("--prompt", help="an instruction for the models to answer")
    read("--task", metavar="A,B", help=f"tasks to answer, of: {', '.join(TASKS)}; or of the toy "
         f"world's: {', '.join(TOY)} (default: toy-sums)")
    add("--data", metavar="DIR", help="the folder with TASK/test.json (default: data/toy)")
    add("--items", type=positive, default=100, metavar="N", help="of each task (default: 100)")
    add("--max-new-tokens", type=positive, metavar="N", help="(default: 32, or the tasks' own)")
    add("--position", choices=POSITIONS, default="generating", help="where the levels are read: "
        "where a token is generated or where it is fed (default: generating)")
    add("--steered", action="store_true", help="runs keep the steering of the forward pass that "
        "they were trained with (default: unsteered)")
    add("--html", metavar="FILE", help=f"write a page with heat maps of {KEPT} items in colour")
    add("--json", action="store_true", help="print JSON")
    machine_flags(add)
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights (default: bfloat16 on a GPU that has it, else float32)")
    add("--cache-gb", type=not_negative, default=2.0, metavar="X",
        help="memory for keys and values in decoding (default: 2)")
    args = parser.parse_args(argv)

    given = next((text for text in (args.text, args.prompt) if text is not None), None)
    if given is not None and not given.strip():
        raise BadInput("the --text or --prompt is empty; give one of two tokens or more")
    if args.html:
        page.check_page(args.html, "--html")
    if args.runs and not Path(args.runs).is_dir():
        raise BadInput(f"--runs {args.runs}: no such folder; python train.py makes runs")
    base = os.path.relpath(TOY_FOLDER / "llama")
    folders = args.model or [base, *first_runs(runs_from(args.runs or "out", base)).values()]
    _, others = alike((folder, recipe_of(read_run(folder))) for folder in args.model or ()
                      if arm_of(folder)[0] != "base")
    for words, found in others.items():
        print(BadInput(f"note: {', '.join(found)}: another recipe, {words}"), file=sys.stderr)
    data = args.data or os.path.relpath(TOY_FOLDER)
    names = [] if given is not None else split_names(args.task or "toy-sums", data)
    turns = zip_longest(*(load_examples(data, name, "test")[:args.items] for name in names))
    examples = [one for turn in turns for one in turn if one]  # tasks take turns
    items = [(example.prompt, None) for example in examples] or [
        (args.prompt, None) if args.prompt is not None else ("", args.text)]
    longest = args.max_new_tokens or max([32, *(one.task.max_new_tokens for one in examples)])
    set_threads(args.threads, names)
    result = flux_of(folders, items, longest, pick_device(args.device), args.dtype,
                     int(args.cache_gb * 2**30), None if args.model else left_out, args.position,
                     args.steered, [one.task.name for one in examples])
    result["settings"] |= {"text": args.text, "prompt": args.prompt,
                           "data": data if names else None}
    if args.html:
        write_whole(args.html, page.document("Information flux", flux_subject(result["settings"]),
                                             flux_sections(result)))
    if args.json:
        return print(json.dumps(result, indent=2))
    print(flux_text(result, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if folders == [base] and not args.model:
        print(f"\nNo run in {args.runs or 'out'} began with this model. train.py makes some.")
    if args.html:
        print(f"\nThe same as a page, with heat maps of up to {KEPT} items: {args.html}")


if __name__ == "__main__":
    command(main)
