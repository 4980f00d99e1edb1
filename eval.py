"""Score a model on the paper's tasks.

    python eval.py --model out/boolq-reg --task boolq,ARC-Easy --data data/public
    python eval.py --compare out/                              the runs in a folder, over their seeds
    python eval.py --analyse flux                              the paper's analyses and tables: flux, memories, regions, layers, magnitude, ood
    python eval.py --report out/                               all of it as one page, out/report.html

Every response is kept beside its verdict in MODEL/eval/, and an interrupted evaluation goes on where it stopped. The model runs
unsteered, as in the paper, unless --steered keeps the intervention it was trained with.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data import BadInput, page, read_json
from data.tasks import SUITES, TASKS, TOY, chance, find, judge, load as load_examples, make_response
from data.tokenizer import Tokenizer
from data.words import CLASSES, TITLES, token_classes
from infosteer import (METHODS, RANKINGS, Steering, agreement, clustered_mean, divergence, entropy, format_layers, grouped_correlation, keep_largest,
                       specificity, spherical_kmeans, split_groups, surrogates, terciles, token_log_probability)
from model import Config, Transformer, save_tensors

TOY_FOLDER = Path(__file__).resolve().parent / "data" / "toy"        # the toy world's tasks and models, which ship with the project
TOY_TRAINING = ",".join(name for name, task in TOY.items() if "train" in task.splits)
CHUNK = 256                            # items answered between two writes to disk

# --------------------------------------------------------------------------------------------- shared with train.py

# torchrun starts WORLD processes, each with its number; started alone, there is this one. Number 0 does all writing and talking.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BAR = None if RANK == 0 else True      # tqdm(disable=BAR): a bar where somebody looks


def join(device, alone=False):
    """Meet the other processes that torchrun started, if any, on a CPU or on GPUs; with `alone`, be a group of one."""
    if not dist.is_initialized() and (WORLD > 1 or alone):
        meeting = {} if WORLD > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        patience = timedelta(hours=12)                         # process 0 may load a large model, or look at its memories, while the others wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience, **meeting)
        if device.type == "cuda":
            torch.cuda.set_device(device)


def wait():
    """Go on when all processes have come here."""
    if WORLD > 1:
        dist.barrier()


class Parser(argparse.ArgumentParser):
    """Command lines whose errors are one line, and whose flags are never guessed from a prefix."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        self.exit(2, "" if RANK else f"{self.prog}: error: {message} (--help explains every flag)\n")


def command(main):
    """Run a command's main(): what the user got wrong becomes one line on standard error and exit status 2."""
    name = Path(sys.argv[0]).name + (f" (process {RANK})" if RANK else "")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (BadInput, OSError) as error:
        time.sleep(5 * bool(RANK))                             # process 0 says the same first, and torchrun ends this one before it can
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):      # so says a CPU
            raise
        print(f"{name}: error: out of memory; first lower --micro-tokens (training) or --cache-gb (evaluation), "
              "then add --checkpoint, then, on a GPU, --offload (training)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what was saved is kept", file=sys.stderr)
        sys.exit(130)


def positive(text):
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def finite(text):
    """An argparse type: a number at or above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number at or above 0")
    return value


def pick_device(name):
    if name != "auto":
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
        return torch.device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def load(folder, dtype=torch.float32, device="cpu", weights=True):
    """A checkpoint folder -> (model, tokenizer), checked to fit together. Without weights: the model on the meta device. Raises BadInput."""
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder; --model takes a checkpoint folder as published (config.json, safetensors, tokenizer files)")
    tokenizer = Tokenizer.from_pretrained(folder)
    if weights:
        model = Transformer.from_pretrained(folder, dtype, device)
    else:
        with torch.device("meta"):
            model = Transformer(Config.from_pretrained(folder))
    if tokenizer.max_id >= model.config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has ids up to {tokenizer.max_id}, but the embedding ends at "
                       f"{model.config.vocab_size - 1}; these are not the tokenizer files of this model")
    if tokenizer.eos_id is None:
        raise BadInput(f"{folder}: the tokenizer names no end-of-sequence token; set eos_token in tokenizer_config.json")
    model.config = model.config.with_eos(tokenizer.eos_id)      # what training appends to a response must stop the decoding
    return model, tokenizer


def split_names(text):
    """"a,b" -> ["a", "b"], refusing repetitions and unknown names."""
    names = [find(name.strip()).name for name in text.split(",") if name.strip()]
    if len(set(names)) < len(names) or len(names) <= text.count(","):
        raise BadInput(f"--task {text!r}: a comma list of different task names is needed; known are {', '.join(TASKS)}")
    return names


def read_run(folder):
    """A run's settings, or {} where `folder` is no run of train.py."""
    path = Path(folder, "args.json")
    return read_json(path) if path.is_file() else {}


def need(settings, where, **kinds):
    """What was read from the file `where` must have a value of each kind under each of these names; raises BadInput otherwise."""
    for name, kind in kinds.items():
        value = settings.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):    # no path has these
            raise BadInput(f"{where}: {name} is {value!r}, which train.py and eval.py do not write; make it again, or remove it")


def write_whole(path, text):
    """Write a file so that it is either there completely or not at all."""
    if RANK:
        return
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# ----------------------------------------------------------------------------------------------------------- answering


def answer(model, tokenizer, examples, score, max_new_tokens, steering, cache_bytes, bar):
    """Responses of the model to a list of examples, in their order.

    score "generate" decodes greedily; "choice" takes the allowed answer whose response is most likely (for models that have never
    seen the format of the answers).
    """
    prompts = [tokenizer.encode(example.prompt, special=False) for example in examples]
    if score == "generate":
        outputs = model.generate(prompts, max_new_tokens, steering, cache_bytes, done=bar.update)
        stop = set(model.config.eos_ids)                        # and rows of the embedding beyond the tokenizer are padding, without a text
        return [tokenizer.decode([i for i in ids if i not in stop and i <= tokenizer.max_id]) for ids in outputs]
    responses = [[make_response(find(example.task), choice, "") for choice in example.choices] for example in examples]
    asked, continued = [], []
    for prompt, candidates in zip(prompts, responses):
        ids = [tokenizer.encode(text, bos=False, special=False) for text in candidates]
        same = len(os.path.commonprefix(ids))                   # the trigger: read once, it says nothing about the choice
        same = min(same, min(map(len, ids)) - 1)
        asked += [prompt + one[:same] for one in ids]
        continued += [one[same:] for one in ids]
    scores = iter(model.log_likelihood(asked, continued))
    best = [max(zip([next(scores) for _ in candidates], candidates), key=lambda pair: pair[0])[1] for candidates in responses]
    bar.update(len(examples))
    return best


def evaluate(model, tokenizer, examples, path, settings, steering=None, cache_bytes=2 << 30):
    """Score `examples` and write one JSON line per item to `path`; return its summary, which is also written, to `path`.json.

    Items are answered longest first, a few hundred at a time, and kept in `path`.partial until all are there, so that an interrupted
    evaluation with the same settings goes on.
    """
    part, lines = Path(f"{path}.partial"), {}
    head = json.dumps(settings, sort_keys=True)
    if part.is_file():
        kept = part.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if kept and kept[0] == head + "\n":
            lines = {item["index"]: item for item in (json.loads(line) for line in kept[1:] if line.endswith("\n"))}
    pending = sorted((e for e in examples if e.index not in lines), key=lambda e: -len(e.prompt))
    path.parent.mkdir(parents=True, exist_ok=True)
    wait()                                                      # until all have read what is to be written now
    with open(os.devnull if RANK else part, "w", encoding="utf-8") as file, tqdm(
            total=-(-len(examples) // WORLD), initial=len(lines) // WORLD, desc=settings["task"], unit="item", disable=BAR) as bar:
        file.write("".join([head + "\n"] + [json.dumps(item) + "\n" for item in lines.values()]))
        for start in range(0, len(pending), CHUNK * WORLD):
            chunk = pending[start:start + CHUNK * WORLD]
            responses = answer(model, tokenizer, chunk[RANK::WORLD], settings["score"], settings["max_new_tokens"], steering, cache_bytes, bar)
            for example, response in zip(chunk, gather(responses, len(chunk))):
                item = {"index": example.index, "prompt": example.prompt, "response": response, "answer": example.answer,
                        **judge(example, response)}
                lines[example.index] = item
                file.write(json.dumps(item) + "\n")
            file.flush()
    items = [lines[example.index] for example in examples]
    summary = {**settings, **summarise(items), "chance": chance(examples)}
    write_whole(path, "".join(json.dumps(item) + "\n" for item in items))
    write_whole(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
    if RANK == 0:
        part.unlink()
    wait()
    return summary


def gather(mine, n):
    """The n things of which each process has every WORLD-th -> all of them, in order."""
    if WORLD == 1:
        return mine
    parts = [None] * WORLD
    dist.all_gather_object(parts, mine)
    return [parts[i % WORLD][i // WORLD] for i in range(n)]


def summarise(items):
    """n, accuracy and its standard error sqrt(p (1 - p) / n), strict accuracy, and how many responses held no answer at all."""
    n = len(items)
    accuracy = sum(item["correct"] for item in items) / n
    return {"n": n, "accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
            "strict_accuracy": sum(item["strict_correct"] for item in items) / n,
            "unparsed": sum(item["prediction"] is None for item in items)}


def score(folder, names, data, out=None, how=None, device="auto", dtype="auto", limit=None, max_new_tokens=None, steering=None,
          cache_gb=2.0, overwrite=False):
    """Summaries of the named tasks' test splits, in order; what was scored before with the same settings is read, not scored again.

    how: "generate", "choice" or None, each task's own. Results go to `out`, or else to FOLDER/eval. Raises BadInput.
    """
    tasks = {name: load_examples(data, name, "test")[:limit] for name in names}
    if how == "choice" and (open_ended := [name for name, examples in tasks.items() if not all(e.choices for e in examples) or find(name).kind == "arithmetic"]):
        raise BadInput(f"--score choice: {open_ended[0]} has no short list of answers to rank; use --score generate")
    device = pick_device(device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    out = Path(out or Path(folder, "eval"))
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(Path(folder).glob("*.safetensors"))]
    summaries, model = [], None
    for name, examples in tasks.items():
        text = json.dumps([[e.prompt, e.answer] for e in examples])
        settings = {"task": name, "score": how or find(name).score, "dtype": dtype, "steered": str(steering) if steering else None,
                    "max_new_tokens": max_new_tokens or find(name).max_new_tokens, "model": str(folder),
                    "items_sha256": hashlib.sha256(text.encode()).hexdigest(), "weights": weights}
        variant = "".join([f"-{how}" * (how not in (None, find(name).score)), "-steered" * bool(steering), f"-first{limit}" * bool(limit)])
        path = out / f"{name}{variant}.jsonl"
        done = path.with_suffix(".json")
        if done.is_file() and not overwrite:
            summary = read_json(done)
            if any(summary.get(key) != value for key, value in settings.items() if key != "model"):
                raise BadInput(f"{done}: holds scores of other weights, items or settings; --overwrite replaces them, --out puts these elsewhere")
        else:
            if model is None:
                model, tokenizer = load(folder, getattr(torch, dtype), device)
                if steering and METHODS[steering.method].needs:
                    steering = steering.knowing(load_profile(Path(folder, PROFILE), model, steering, own=True))
            summary = evaluate(model, tokenizer, examples, path, settings, steering, int(cache_gb * 2**30))
        summaries.append(summary)
    return summaries


def table(summaries):
    """Summaries -> the lines of a table for people."""
    lines = [f"{'task':<14}{'n':>6}  {'accuracy':>14}  {'chance':>7}  {'strict':>7}  {'unparsed':>8}"]
    for s in summaries:
        lines.append(f"{s['task']:<14}{s['n']:>6}  {s['accuracy']:>7.1%} ± {s['standard_error']:>4.1%}  {s['chance']:>7.1%}  "
                     f"{s['strict_accuracy']:>7.1%}  {s['unparsed']:>8}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- comparing runs

# Quantiles of Student's t for 95% intervals, by degrees of freedom; the last serves for all larger ones, a little too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def as_steering(settings, where="args.json"):
    """The Steering that a run's args.json describes. Raises BadInput, naming the file, for what describes none."""
    try:
        layers = settings.get("layers")
        steering = Steering(**{"method": None, **settings, "layers": None if layers is None else {int(layer): here for layer, here in layers.items()}})
        for layer in steering.layers or ():
            steering.at(layer - 1)                                             # its own strengths are checked there
        if not settings.items() <= json.loads(json.dumps(steering.settings)).items():
            raise ValueError("not all of it means something to the method")
        return steering
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: steering is {settings!r}, which train.py does not write ({error})") from None


def arm_name(steering):
    """A short name of a steering: its method and what differs from the defaults. Steering("int", p=0.05) -> "int-p0.05"."""
    usual = vars(Steering(steering.method))
    unusual = {key: value for key, value in steering.settings.items() if key != "method" and value != usual[key]}
    if "layers" in unusual:
        unusual["layers"] = format_layers(unusual["layers"]).replace(":", "@")             # a folder's name may hold no colon everywhere
    return "-".join([steering.method, *(str(value) if isinstance(usual[key], str) else f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"
                                        for key, value in unusual.items())])


def run_folder(out, model, steering, seed):
    """Where the run of one arm and seed lives in a folder of several."""
    return Path(out, f"{Path(model).name}-{arm_name(steering)}-seed{seed}")


def base_folder(out, model):
    """The folder beside the runs that holds their base model's scores, made and marked as such."""
    base = Path(out, f"{Path(model).name}-base")
    base.mkdir(parents=True, exist_ok=True)
    write_whole(base / "args.json", json.dumps({"model": model, "base": True}) + "\n")
    return base


def finished(folder):
    """The folders in a folder that have settings and are not in the making: [(folder, settings, the file they are in)]."""
    return [(path.parent, read_run(path.parent), path) for path in sorted(Path(folder).glob("*/args.json")) if path.parent.suffix not in (".partial", ".old")]


def runs_from(folder, model):
    """The finished runs of train.py in a folder that began with this model: [(arm, seed, their folder)], plain fine-tuning first."""
    found = []
    for run, settings, path in finished(folder):
        if "steering" not in settings:
            continue
        need(settings, path, model=str, seed=int)
        if Path(settings["model"]).resolve() == Path(model).resolve():
            found.append((arm_name(as_steering(settings["steering"], path)), settings["seed"], run))
    return sorted(found, key=lambda run: (run[0] != "none", run[0], run[1]))


def suite_of(task):
    """The suite in which a task is reported: one of three for the toy world's, itself for the others."""
    return find(task).suite or task


def find_runs(folder):
    """Finished, scored runs in a folder: [{"model", "arm", "seed", "scores": {task: accuracy}}]. Of two runs of one arm and seed (of other
    recipes, say) the one in the folder of another name is an arm of its own, called after it.
    """
    runs = []
    for run, settings, path in finished(folder):
        summaries = {file: read_json(file) for file in sorted((run / "eval").glob("*.json")) if find_plain(file.stem)}
        if not summaries or "model" not in settings:
            continue
        need(settings, path, model=str, **({} if is_base(settings) else {"seed": int}))
        for file, summary in summaries.items():
            need(summary, file, accuracy=(int, float))
            if summary.get("task") != file.stem or not 0 <= summary["accuracy"] <= 1:
                raise BadInput(f"{file}: an accuracy of {summary['accuracy']} for the task {summary.get('task')!r}, which eval.py does not write; score it again")
        arm = "base" if is_base(settings) else arm_name(as_steering(settings.get("steering"), path))
        runs.append({"model": settings["model"], "arm": arm, "seed": settings.get("seed"), "folder": run,
                     "scores": {summary["task"]: summary["accuracy"] for summary in summaries.values()}})
    runs.sort(key=lambda run: not run["folder"].name.startswith(f"{Path(run['model']).name}-{run['arm']}"))     # the usual names first
    seen = set()
    for run in runs:
        if (key := (run["model"], run["arm"], run["seed"])) in seen:
            run["arm"] += f" ({run['folder'].name})"
        seen.add(key)
        del run["folder"]
    if not runs:
        raise BadInput(f"{folder}: no scored run of train.py in this folder; python train.py --steer reg makes one")
    return runs


def is_base(settings):
    """Are these not a run's settings but the mark of a folder that holds a base model's scores? (A run's "base" is that of its steering.)"""
    return settings.get("base") is True


def find_plain(name):
    """Is this the name of a task's own score, not of a part of it or under other settings?"""
    return name in TASKS or name in TOY


def compare(runs, suites=None):
    """Mean over seeds with standard error, and the difference to plain fine-tuning paired by seed with its 95% interval.

    -> [{"model", "arm", "suite", "seeds", "mean", "standard_error", "difference", "interval"}]; None where there is nothing to say.
    suites: {name: its tasks}, or None: those of the tasks. The accuracy of a suite is the mean over its tasks, and a run that has not
    been scored on all of them is left out of that suite. A difference whose interval covers zero is none.
    """
    rows = []
    order = {"base": 0, "none": 1}
    for model in dict.fromkeys(run["model"] for run in runs):
        ours = [run for run in runs if run["model"] == model]
        for arm in sorted({run["arm"] for run in ours}, key=lambda arm: (order.get(arm, 2), arm)):
            for suite, tasks in (suites or suites_of(task for run in ours for task in run["scores"])).items():
                at = {name: {run["seed"]: sum(run["scores"][task] for task in tasks) / len(tasks) for run in ours
                             if run["arm"] == name and set(tasks) <= run["scores"].keys()} for name in (arm, "none")}
                if not at[arm]:
                    continue
                mean, error = mean_and_error(list(at[arm].values()))
                row = {"model": model, "arm": arm, "suite": suite, "seeds": len(at[arm]), "mean": mean, "standard_error": error,
                       "difference": None, "interval": None}
                pairs = [accuracy - at["none"][seed] for seed, accuracy in at[arm].items() if seed in at["none"]]
                if arm not in order and pairs:
                    row["difference"], *ends = interval(pairs)
                    row["interval"] = None if None in ends else ends
                rows.append(row)
    return rows


def suites_of(tasks):
    """Task names -> {suite: its tasks}, the toy world's suites first."""
    found = {}
    for task in sorted(set(tasks), key=[*TOY, *TASKS].index):
        found.setdefault(suite_of(task), []).append(task)
    return found


def mean_and_error(values):
    """Mean, and its standard error over runs (None for a single one)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def interval(values):
    """Mean and 95% interval (Student's t) of a few numbers: (mean, low, high), the ends None for a single one."""
    mean, error = mean_and_error(values)
    if error is None:
        return mean, None, None
    width = T975[min(len(values) - 1, len(T975)) - 1] * error
    return mean, mean - width, mean + width


def comparison_table(rows):
    """The rows of `compare` -> the lines of a table for people, in percentage points."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        suites = list(dict.fromkeys(row["suite"] for row in rows if row["model"] == model))
        table = []
        for arm in dict.fromkeys(row["arm"] for row in rows if row["model"] == model):
            found = {row["suite"]: row for row in rows if (row["model"], row["arm"]) == (model, arm)}
            cells = [found.get(suite) for suite in suites]
            table.append([arm, max(cell["seeds"] for cell in cells if cell), *map(percent, cells)])
            if any(cell and cell["difference"] is not None for cell in cells):
                table.append(["", None, *map(difference, cells)])
        lines += [f"{model}: accuracy in %, mean ± standard error over seeds; below, the difference to none, paired by seed, with its 95% interval", "",
                  page.columns(["arm", "seeds", *suites], table), ""]
    return "\n".join(lines + ["none: the interval covers zero, so nothing was shown."])


def with_error(mean, error):
    """A share as percent: 0.123, 0.004 -> "12.3 ± 0.4"."""
    return f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def percent(cell):
    return "" if cell is None else with_error(cell["mean"], cell["standard_error"])


def difference(cell):
    if cell is None or cell["difference"] is None:
        return ""
    if cell["interval"] is None:
        return f"{100 * cell['difference']:+.1f} (one seed)"
    low, high = (100 * end for end in cell["interval"])
    return f"{'none ' if low <= 0 <= high else ''}{100 * cell['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def side_by_side(columns):
    """{title: summaries} of runs on the same tasks -> a table: suites, and within them tasks, with standard errors."""
    first = next(iter(columns.values()))
    widths = [max(18, len(title) + 2) for title in columns]
    lines = [f"{'':<22}{'n':>5}  {'chance':>7}" + "".join(f"{title:>{width}}" for title, width in zip(columns, widths))]
    for suite in dict.fromkeys(suite_of(summary["task"]) for summary in first):
        inside = [i for i, summary in enumerate(first) if suite_of(summary["task"]) == suite]
        cells = []
        for summaries, width in zip(columns.values(), widths):
            mean = sum(summaries[i]["accuracy"] for i in inside) / len(inside)
            error = math.sqrt(sum(summaries[i]["standard_error"] ** 2 for i in inside)) / len(inside)
            cells.append(f"{mean:>{width - 7}.1%} ± {error:>4.1%}")
        lines.append(f"{suite:<36}" + "".join(cells))
        for i in inside:
            lines.append(f"  {first[i]['task']:<20}{first[i]['n']:>5}  {first[i]['chance']:>7.1%}" + "".join(
                f"{summaries[i]['accuracy']:>{width - 7}.1%} ± {summaries[i]['standard_error']:>4.1%}" for summaries, width in zip(columns.values(), widths)))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ looking at memories


@torch.inference_mode()
def watch(model, texts, see, steering=None, desc=None):
    """Run the model on lists of ids, one at a time, and call see(layer, h, k, row) in every layer: what the memory was asked, h [T, d], and its
    key coefficients k [T, d_m], the input of the down projection. A bar named `desc` shows progress."""
    handles = []
    for layer, block in enumerate(model.blocks):
        def caught(memory, inputs, output=None, layer=layer):
            now.setdefault(layer, []).append(inputs[0][0])
        handles += [block.memory.register_forward_pre_hook(caught), block.memory.values.register_forward_pre_hook(caught)]
    try:
        for row, ids in enumerate(tqdm(texts, desc=desc, unit="text", disable=None if desc else True)):
            now = {}                                                           # layer -> [h, k]
            model.hidden(torch.tensor([ids], device=model.embed.weight.device), steering)
            for layer, (h, k) in now.items():
                see(layer, h, k, row)
    finally:
        for handle in handles:
            handle.remove()


# What the fine-grained methods know of the memories is found out before training and kept beside the run.
PROFILE = "memory_profile.safetensors"
DEVELOPMENT = 256                      # rows of the training data that show how memories are used
PATTERN_TOKENS = 512                   # their tokens whose key coefficients tell memories apart
CENTRE_TOKENS = 16_384                 # tokens among which the centres of like tokens are found


@torch.inference_mode()
def memory_profile(model, rows, steering, seed=0):
    """What a fine-grained method must know of the memories beforehand (Appendix B), see METHODS[...].needs: {name: [n_layers, d_m, ...]}.

        semantic, activation     the group of each memory
        usage                    mean |k_i| over the tokens of the development set: DEVELOPMENT rows of the training data, drawn by seed
        entropy, divergence      H(P_i) and KL(P_target || P_i) in nats; P_target is the frequency of tokens in the training responses
        says                     P_i summed over groups of like tokens

    rows: the training data, [(ids, number of prompt ids)].
    """
    needs, L, d_m, device = METHODS[steering.method].needs, model.config.n_layers, model.config.d_m, model.embed.weight.device
    decode = model.decode                                                      # [V, d]
    profile = {}
    if "usage" in needs:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:DEVELOPMENT].tolist()
        texts = [rows[row][0][:-1] for row in chosen]
        ends = torch.tensor([len(ids) for ids in texts]).cumsum(0)
        sampled = torch.linspace(0, ends[-1] - 1, min(PATTERN_TOKENS, int(ends[-1]))).long().to(device)
        usage = torch.zeros(L, d_m, device=device)
        patterns = torch.zeros(L, d_m, len(sampled), dtype=torch.bfloat16, device=device) if "activation" in needs else None

        def see(layer, h, k, row):                                             # k: [T, d_m]
            usage[layer] += k.float().abs().sum(0) / ends[-1]
            if patterns is not None:
                at = sampled - (int(ends[row]) - len(k))
                inside = (at >= 0) & (at < len(k))
                patterns[layer][:, inside] = k[at[inside]].abs().T.to(torch.bfloat16)

        watch(model, texts, see, desc="watching memories")
        profile["usage"] = usage
        bar = tqdm(range(L), desc="grouping memories", unit="layer", disable=None)
        profile["semantic"] = torch.stack([spherical_kmeans(model.blocks[layer].memory.values.weight.T, steering.groups, seed)[0] for layer in bar])
        if patterns is not None:
            bar = tqdm(range(L), desc="splitting groups", unit="layer", disable=None)
            profile["activation"] = torch.stack([split_groups(profile["semantic"][layer], patterns[layer], steering.subgroups, seed) for layer in bar])
        return profile
    target = torch.bincount(torch.tensor([i for ids, n_prompt in rows for i in ids[n_prompt:]]), minlength=len(decode)).to(device).float()      # [V]
    target /= target.sum()
    if "says" in needs:
        bucket = token_groups(decode, steering.buckets, seed)                  # [V]
        profile["says"] = torch.zeros(L, d_m, int(bucket.max()) + 1, device=device)
    else:
        profile = {"entropy": torch.zeros(L, d_m, device=device), "divergence": torch.zeros(L, d_m, device=device)}
    with tqdm(total=L * d_m, desc="decoding memories", unit="memory", disable=None) as bar:
        for layer, block in enumerate(model.blocks):
            for here, log_p in surrogates(block.memory.values.weight.T, decode):
                if "says" in needs:
                    profile["says"][layer, here].index_add_(1, bucket, log_p.exp())
                else:
                    profile["entropy"][layer, here], profile["divergence"][layer, here] = entropy(log_p), divergence(target, log_p)
                bar.update(len(log_p))
    return profile


def token_groups(decode, n, seed):
    """Tokens grouped by the cosine of their rows in the LM head: decode [V, d] -> [V] long. The centres are found among some of them."""
    if n >= len(decode):
        return torch.arange(len(decode), device=decode.device)
    some = torch.randperm(len(decode), generator=torch.Generator().manual_seed(seed))[:CENTRE_TOKENS]
    _, centres = spherical_kmeans(decode[some.to(decode.device)], n, seed)
    return torch.cat([(piece.float() @ centres.T).argmax(-1) for piece in decode.split(CENTRE_TOKENS)])


def fingerprint(model):
    """The length of each layer's memory, [n_layers] fp32: tells models apart."""
    return torch.stack([block.memory.values.weight.detach().float().norm() for block in model.blocks]).cpu()


def save_profile(path, profile, model, steering):
    """Write a memory profile beside the run that it was made for."""
    save_tensors({**profile, "fingerprint": fingerprint(model)}, path,
                 {name: json.dumps(steering.settings.get(name)) for name in ("method", "groups", "subgroups", "buckets")})


def load_profile(path, model, steering, own=False, device=None):
    """Read what `save_profile` wrote, for the method of `steering`. Raises BadInput for a file that is none, or of another model or method.

    own: the model is a run with its own profile, which tells of its base model and so of other weights. device: if not the model's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            made, found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable memory profile ({error})") from None
    needs, shape = METHODS[steering.method].needs, [model.config.n_layers, model.config.d_m]
    missing = [name for name in (*needs, "fingerprint") if name not in found]
    if missing:
        raise BadInput(f"{path}: has no {', '.join(missing)}, which --steer {steering.method} needs; it was made for --steer {made.get('method', '?')}")
    wrong = [f"{name} {list(found[name].shape)} (expected {shape})" for name in needs
             if list(found[name].shape[:2]) != shape or found[name].dim() != (3 if name == "says" else 2)]
    mark = found["fingerprint"]
    if wrong or not own and (mark.dtype != torch.float32 or mark.shape != (shape[0],) or not torch.allclose(mark, fingerprint(model), rtol=1e-3)):
        raise BadInput(f"{path}: was made for another model{': ' + '; '.join(wrong) if wrong else ''}")
    for name in ("groups", "subgroups", "buckets"):
        if name in steering.settings and made.get(name) != json.dumps(getattr(steering, name)):
            raise BadInput(f"{path}: was made with {name} {made.get(name)}, not {getattr(steering, name)}; give --{name} {made.get(name)}")
    for name in needs:
        tensor = found[name]
        grouped = name in ("semantic", "activation")
        if tensor.dtype != (torch.long if grouped else torch.float32) or not tensor.numel() or not (
                all(layer.min() >= 0 and len(layer.unique()) == layer.max() + 1 for layer in tensor) if grouped else tensor.abs().max() < 1e9):
            raise BadInput(f"{path}: {name} holds what cannot be; make the profile again")
    return {name: found[name].to(device or model.embed.weight.device) for name in needs}


@torch.inference_mode()
def intervention_change(model, prompts, steering):
    """How far an intervention moves what each layer's memory answers: mean over tokens of |FFN_steered(h) - FFN(h)| / |FFN(h)|, per layer,
    on the h of the unsteered model. prompts: lists of ids."""
    inputs, changes = [], torch.zeros(len(model.blocks))
    watch(model, prompts, lambda layer, h, k, row: inputs.append((layer, h)))
    for layer, h in inputs:                                                    # h: [T, d]
        memory = model.blocks[layer].memory
        plain, steered = memory(h)[0].float(), memory(h, steering.at(layer))[0].float()
        changes[layer] += ((steered - plain).norm(dim=-1) / plain.norm(dim=-1)).sum().item()
    return (changes / sum(map(len, prompts))).tolist()


def change_line(model, prompts, steering):
    """The sentence that says what `intervention_change` found."""
    change = intervention_change(model, prompts, steering)
    return (f"{arm_name(steering)} changes what the memories of this model answer by {sum(change) / len(change):.1%} (mean relative change of the FFN output; "
            f"per layer {' '.join(f'{c:.1%}' for c in change)})")


# ------------------------------------------------------------------------------------------------------------ analyses
# Each takes the command's arguments and returns (what --json prints, what people read).


def task_texts(tokenizer, names, data, n):
    """The first n // len(names) test items of each task, as ids of prompt and gold response."""
    each = max(1, n // len(names))
    return [tokenizer.encode(e.prompt, special=False) + tokenizer.encode(e.response, bos=False, special=False)
            for name in names for e in load_examples(data, name, "test")[:each]]


def key_regions(model, texts, cuts):
    """The share of |k| and of k in the low, middle and high region of each layer: [n_layers, 2, 3].

    cuts: the ends of the regions, [n_layers, 2, 2], or None: the 25th and 75th percentile of this model's own. -> (shares, cuts)
    """
    counts = torch.zeros(model.config.n_layers, 2, 3, dtype=torch.float64)
    if cuts is None:                                                           # a few million coefficients a layer are enough for a percentile
        kept = [[] for _ in model.blocks]
        every = -(-sum(map(len, texts)) * model.config.d_m // 2**22)
        watch(model, texts, lambda layer, h, k, row: kept[layer].append(k.float().flatten()[::every].cpu()))
        kept = [torch.cat(ks) for ks in kept]
        cuts = torch.stack([torch.stack([torch.quantile(of, torch.tensor([0.25, 0.75])) for of in (k.abs(), k)]) for k in kept])

    def see(layer, h, k, row):
        for reading, of in enumerate((k.float().abs(), k.float())):
            counts[layer, reading] += torch.bucketize(of, cuts[layer, reading].to(k.device)).flatten().bincount(minlength=3).cpu()

    watch(model, texts, see)
    return counts / counts.sum(-1, keepdim=True), cuts


def analyse_regions(args):
    """Key regions (section 6, Fig. 4): where the coefficients of fine-tuned models fall among the percentiles of the base model's."""
    result = regions_of(args.model[0], args.runs, split_names(args.task or TOY_TRAINING), args.data or TOY_FOLDER, args.items, pick_device(args.device))
    return result, regions_text(result, args.per_layer)


def regions_of(base, runs, names, data, n, device):
    """The regions of a base model and of its runs in a folder, on prompts and gold responses of n test items of the named tasks."""
    found = runs_from(runs, base)
    if not found:
        raise BadInput(f"--runs {runs}: no finished run of train.py that began with {base}; python train.py --steer none int reg makes some")
    model, tokenizer = load(base, device=device)
    texts = task_texts(tokenizer, names, data, n)
    shares, cuts = key_regions(model, texts, None)
    by_arm = {"base": {None: shares}}
    for arm, seed, folder in tqdm(found, desc="key regions", unit="model", disable=None):
        by_arm.setdefault(arm, {})[seed] = key_regions(load(folder, device=device)[0], texts, cuts)[0]
    result = {"model": str(base), "tasks": names, "texts": len(texts), "tokens": sum(map(len, texts)), "cuts": cuts.tolist(), "arms": {}}
    for arm, of_seed in by_arm.items():
        stacked = torch.stack(list(of_seed.values()))                          # [seeds, n_layers, 2, 3]
        error = (lambda x: (x.std(0) / len(x) ** 0.5).tolist() if len(x) > 1 else None)
        result["arms"][arm] = {"seeds": len(stacked), "mean": stacked.mean((0, 1)).tolist(), "standard_error": error(stacked.mean(1)),
                               "layers": stacked.mean(0).tolist(), "layers_standard_error": error(stacked),
                               "by_seed": {seed: shares.mean(0).tolist() for seed, shares in of_seed.items()}}
    return result


REGIONS = ("low", "middle", "high")


def regions_text(result, per_layer=False):
    lines = [f"{result['model']}: share of the key coefficients in the base model's regions, cut at its 25th and 75th percentile in each layer, in %",
             f"(mean over layers ± standard error over seeds; prompts and gold responses of {result['texts']} items of {', '.join(result['tasks'])})"]
    for reading, name in enumerate(("by magnitude |k|: low is idle", "by value k, the literal reading: low is strongly negative")):
        rows = []
        for arm, found in result["arms"].items():
            rows.append([arm, found["seeds"], *(with_error(found["mean"][reading][region], found["standard_error"] and found["standard_error"][reading][region])
                                                for region in range(3))])
            if per_layer:
                rows += [[f"  layer {layer + 1}", None, *(with_error(shares[reading][region], found["layers_standard_error"] and
                         found["layers_standard_error"][layer][reading][region]) for region in range(3))] for layer, shares in enumerate(found["layers"])]
        lines += ["", page.columns([name, "seeds", *REGIONS], rows)]
    return "\n".join(lines)


# ---- memories: what single ones say, and what calls them

CONCEPTS = 10                          # a memory's concept: its most probable tokens
LISTED = 5                             # memories shown at either end of a layer, and tokens of each where many memories are shown
FOUND = 20                             # memories shown for a token
LARGEST, SMALLEST = 5, 3               # contexts kept for each memory: with the largest coefficients, and with the most negative ones
CONTEXT = 12                           # tokens of a context that are shown, the triggering one included
LONGEST = 256                          # tokens of a text, as in training
WATCHED = 32                           # texts watched between two writes to disk
INDEX, TRIGGERS = "memories.safetensors", "memory_triggers.safetensors"


def analyse_memories(args):
    """What each memory says, and what calls it: the most specific and most general memories of each layer and how often the two agree; or
    the memories that promote one token (--token); or one memory and the texts that call it (--index)."""
    if len(args.model) > 1:
        raise BadInput("--analyse memories looks at one model; give --model one folder")
    folder, device = args.model[0], pick_device(args.device)
    if args.index and not re.fullmatch(r"[0-9]+:[0-9]+", args.index):
        raise BadInput(f"--index {args.index!r}: write LAYER:MEMORY, the layer from 1 and the memory from 0, for example 1:0")
    examples = None if args.token is not None else development_examples(args)
    model, tokenizer = load(folder, stored_dtype(folder) if args.dtype == "auto" else getattr(torch, args.dtype), device)
    out, L, d_m = Path(args.out or Path(folder, "eval")), model.config.n_layers, model.config.d_m
    result = {"model": str(folder), "layers": L, "memories": d_m, "vocabulary": model.config.vocab_size}
    if args.token is not None:
        token = single_token(args.token, tokenizer)
        return token_search(result, model, tokenizer, token, memory_index(model, out / INDEX, args.overwrite))
    texts = development_texts(examples, tokenizer)
    result |= {"tasks": list(dict.fromkeys(example.task for example in examples)), "texts": len(texts), "contexts": sum(map(len, new_contexts(texts)))}
    if args.index:
        layer, memory = map(int, args.index.split(":"))
        if not (1 <= layer <= L and memory < d_m):
            raise BadInput(f"--index {args.index}: this model has layers 1 to {L} and in each the memories 0 to {d_m - 1}")
        triggers = memory_triggers(model, texts, out / TRIGGERS, args.overwrite)
        return one_memory(result, model, tokenizer, layer - 1, memory, triggers, texts, examples)
    index = memory_index(model, out / INDEX, args.overwrite)
    triggers = memory_triggers(model, texts, out / TRIGGERS, args.overwrite)
    return all_memories(result, tokenizer, index, triggers, texts)


def stored_dtype(folder):
    """bfloat16 where the weights are stored so, else float32: nothing is rounded, and a large model is not blown up."""
    raw = read_json(Path(folder, "config.json")) if Path(folder, "config.json").is_file() else {}
    return torch.bfloat16 if raw.get("dtype", raw.get("torch_dtype")) == "bfloat16" else torch.float32


# What people see of tokens: text that cannot move the cursor, and bytes where a token is not text.


def token_text(tokenizer, id):
    """The text of a token, for JSON; parts of characters become U+FFFD, an id that no token has "<id 1234>"."""
    token = tokenizer.token(id)
    return f"<id {id}>" if token is None else token.decode("utf-8", "replace")


def visible(tokenizer, id):
    """A token for the terminal: ' Paris', '\\x1b', b'\\xe2\\x80' for a part of a character, <id 1234> where no token has this id."""
    token = tokenizer.token(id)
    try:
        return f"<id {id}>" if token is None else repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def single_token(text, tokenizer):
    """The id of the token that is this text. Raises BadInput, listing its pieces, for a text that is none or several."""
    ids = tokenizer.encode(text, bos=False, special=False)
    if len(ids) == 1:
        return ids[0]
    fitting = next((repr(other) for other in (" " + text.strip(), text.strip()) if len(tokenizer.encode(other, bos=False, special=False)) == 1), None)
    if not ids:
        raise BadInput(f"--token {text!r}: the text is empty; give one token, for example ' the'")
    pieces = " + ".join([visible(tokenizer, id) for id in ids[:12]] + ["..."] * (len(ids) > 12))
    raise BadInput(f"--token {text!r}: not one token of this model but {len(ids)}: {pieces}; "
                   f"try {fitting or visible(tokenizer, max(ids, key=lambda id: len(tokenizer.token(id))))}")


# The development set: the texts whose contexts call the memories.


def development_examples(args):
    """--items examples of the tasks, drawn by a fixed seed: of the training split, or of the test split where there is no other."""
    names = split_names(args.task or TOY_TRAINING)
    examples = [example for name in names for example in load_examples(args.data or TOY_FOLDER, name, "train" if "train" in find(name).splits else "test")]
    return [examples[i] for i in torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:args.items].tolist()]


def development_texts(examples, tokenizer):
    """Examples -> lists of ids as training sees them: prompt, response, end of sequence. A context is what comes up to a token that is not the last."""
    return [(tokenizer.encode(e.prompt, special=False) + tokenizer.encode(e.response, bos=False, special=False) + [tokenizer.eos_id])[:LONGEST + 1]
            for e in examples]


def new_contexts(texts):
    """For each text, the positions of the contexts to look at: not the first, which is the same in all texts and a model's place to rest its
    attention on, and none that an earlier text has had (many prompts begin alike, and would fill all of a memory's places)."""
    seen, positions = set(), []
    for ids in texts:
        prefix, here = 0, []
        for position, id in enumerate(ids[:-1]):
            prefix = hash((prefix, id))
            if position and prefix not in seen:
                here.append(position)
            seen.add(prefix)
        positions.append(here)
    return positions


# Two files keep what takes long: the index, made layer by layer, and the triggers, made text by text. Both are written whole after each
# step, so that an interrupted pass goes on, and name the weights they were made from.


def weights_sha256(model):
    """Tells models apart exactly. `fingerprint` would not do: a few steps of fine-tuning change what a memory says but hardly its length."""
    sha = hashlib.sha256()
    for name, weight in model.named_parameters():
        sha.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def kept(path, made, shapes, overwrite):
    """Read what `save_tensors` wrote: its tensors, or None where there is no file, where it was made from something else, or with overwrite.

    shapes: {name: (dtype, shape)}, None for a size that may be anything. Raises BadInput for a file that is damaged or is not of this kind.
    """
    if overwrite or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not readable as safetensors ({error}); --overwrite makes it again") from None
    if found.get("kind") != made["kind"]:
        raise BadInput(f"{path}: not a file of --analyse memories, {made['kind']} expected; --out puts ours elsewhere, --overwrite replaces it")
    if found != made:
        print(f"{path}: made from other {' and '.join(name for name in made if found.get(name) != made[name])}; made again", file=sys.stderr)
        return None
    for name, (dtype, shape) in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape)):
            raise BadInput(f"{path}: {name} is {'missing' if tensor is None else f'{tensor.dtype} {list(tensor.shape)}'}, "
                           f"expected {dtype} {list(shape)}; --overwrite makes the file again")
    return tensors


@torch.inference_mode()
def memory_index(model, path, overwrite=False):
    """What every memory says, kept in `path`: {"entropy": H(P_i) in nats, "log_z": log Z_i, both [n_layers, d_m]; "ids" and "log_p": its concept,
    [n_layers, d_m, K]}. P_i takes d_m x V numbers a layer; with log Z_i any of them is one product away."""
    L, d_m, V = model.config.n_layers, model.config.d_m, model.config.vocab_size
    K, made = min(CONCEPTS, V), {"kind": "memory index", "weights": weights_sha256(model)}
    shapes = {"entropy": (torch.float32, (None, d_m)), "log_z": (torch.float32, (None, d_m)),
              "ids": (torch.int32, (None, d_m, K)), "log_p": (torch.float32, (None, d_m, K))}
    index = kept(path, made, shapes, overwrite)
    if index is None:
        index = {name: torch.empty(0, *shape[1:], dtype=dtype) for name, (dtype, shape) in shapes.items()}
    done = len(index["entropy"])                                               # layers
    if done > L or any(len(tensor) != done for tensor in index.values()) or not all(tensor.isfinite().all() for tensor in index.values()) or (
            done and not (0 <= index["ids"].min() and index["ids"].max() < V and index["log_p"].max() <= 0)):
        raise BadInput(f"{path}: holds what cannot be; --overwrite makes it again")
    if done == L:
        return index
    # In fp32, whatever the weights are in: bf16 would round the logits to three digits, and tokens would tie. One copy of the head is all it takes.
    decode = model.decode.float()                        # [V, d]
    with tqdm(total=L * d_m, initial=done * d_m, desc="decoding memories", unit="memory", disable=None) as bar:
        for layer in range(done, L):
            v, said = model.blocks[layer].memory.values.weight.T.float(), []                           # [d_m, d]
            for here, log_p in surrogates(v, decode):
                top, ids = log_p.topk(K)                                                               # [piece, K]
                log_z = (v[here] * decode[ids[:, 0]]).sum(-1) - top[:, 0]      # log P_i(t) = v_i . w_t - log Z_i, for the likeliest t
                said.append((entropy(log_p), log_z, ids.to(torch.int32), top))
                bar.update(len(log_p))
            index = {name: torch.cat([index[name], torch.cat(pieces).cpu()[None]]) for name, pieces in zip(shapes, zip(*said))}
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(index, path, made)
    return index


@torch.inference_mode()
def memory_triggers(model, texts, path, overwrite=False):
    """The contexts that call every memory most, kept in `path`: {"largest": k, [n_layers, d_m, LARGEST]; "smallest": the most negative k, [..., SMALLEST];
    "largest_at" and "smallest_at": places among the tokens of all texts in a row}. Where there are fewer contexts, k is infinite and its place -1."""
    L, d_m, device = model.config.n_layers, model.config.d_m, model.embed.weight.device
    made = {"kind": "memory triggers", "weights": weights_sha256(model), "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
    state = kept(path, made, {"texts": (torch.int32, (1,)), **{f"{name}{at}": (torch.int32 if at else torch.float32, (L, d_m, n)) for at in ("", "_at")
                                                              for name, n in (("largest", LARGEST), ("smallest", SMALLEST))}}, overwrite)
    total = sum(map(len, texts))
    if state is None:
        state = {"texts": torch.zeros(1, dtype=torch.int32)}
        for name, n, worst in (("largest", LARGEST, -math.inf), ("smallest", SMALLEST, math.inf)):
            state |= {name: torch.full((L, d_m, n), worst), f"{name}_at": torch.full((L, d_m, n), -1, dtype=torch.int32)}
    elif not 0 <= state["texts"] <= len(texts) or any(not -1 <= state[name].min() <= state[name].max() < total for name in ("largest_at", "smallest_at")) or any(
            state[name].isnan().any() for name in ("largest", "smallest")):
        raise BadInput(f"{path}: holds what cannot be; --overwrite makes it again")
    done = int(state["texts"])                                                 # texts
    state = {name: tensor.to(device) for name, tensor in state.items()}
    positions = [torch.tensor(here, dtype=torch.long, device=device) for here in new_contexts(texts)]
    starts = [0, *torch.tensor([len(ids) for ids in texts]).cumsum(0).tolist()]
    with tqdm(total=len(texts), initial=done, desc="watching memories", unit="text", disable=None) as bar:
        for start in range(done, len(texts), WATCHED):
            def see(layer, h, k, row):                                         # k: [T, d_m]
                new = positions[start + row]
                for name, sign in (("largest", 1), ("smallest", -1)):
                    best, at = keep_largest(sign * state[name][layer], state[f"{name}_at"][layer], sign * k[new], starts[start + row] + new)
                    state[name][layer], state[f"{name}_at"][layer] = sign * best, at
                bar.update(layer == L - 1)
            watch(model, [ids[:-1] for ids in texts[start:start + WATCHED]], see)
            state["texts"][0] = min(start + WATCHED, len(texts))
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(state, path, made)
    return {name: tensor.cpu() for name, tensor in state.items()}


# Three ways to read the two files, each giving (what --json prints, what people read).


def memory_row(tokenizer, layer, memory, spec, ids, log_p):
    """One memory as JSON, and its concept as people read it, a list. layer from 0, ids and log_p [K]."""
    concepts = [{"id": id, "token": token_text(tokenizer, id), "probability": p} for id, p in zip(ids.tolist(), log_p.exp().tolist())]
    return ({"layer": layer + 1, "memory": memory, "specificity": float(spec), "concepts": concepts},
            [f"{visible(tokenizer, concept['id'])} {percentage(concept['probability'])}" for concept in concepts])


def percentage(p):
    """0.5 -> "50.0%", 0.001 -> "0.10%": two digits of small ones, since a memory alone is hardly surer than chance."""
    return f"{100 * p:.1f}%" if p >= 0.1 else f"{100 * p:#.2g}%"


def all_memories(result, tokenizer, index, triggers, texts):
    """Per layer: mean specificity, agreement of concepts and triggers, the most specific and the most general memories."""
    spec = specificity(index["entropy"], result["vocabulary"])                 # [n_layers, d_m]
    following = torch.tensor([id for ids in texts for id in [*ids[1:], -1]])   # [tokens of all texts]  the token after each
    layers, shown = [], []
    for layer in range(result["layers"]):
        called = triggers["largest"][layer, :, 0] > 0                          # [d_m]  what nothing calls has no trigger
        row = {"layer": layer + 1, "mean_specificity": spec[layer].mean().item(), "agreement": None}
        if called.any():
            share, error, chance = agreement(index["ids"][layer, called, 0].long(), following[triggers["largest_at"][layer, called, 0].long()])
            row["agreement"] = {"n": int(called.sum()), "share": share, "standard_error": error, "chance": chance}
        order = spec[layer].argsort(descending=True).tolist()
        for name, chosen in (("most_specific", order[:LISTED]), ("most_general", order[:-LISTED - 1:-1])):
            rows = [memory_row(tokenizer, layer, i, spec[layer, i], index["ids"][layer, i], index["log_p"][layer, i]) for i in chosen]
            row[name] = [memory for memory, _ in rows]
            shown += ["", f"layer {layer + 1}, the {name.replace('_', ' ')} memories: Spec, and what each says first"] + [
                f"  {layer + 1}:{memory['memory']:<7}{memory['specificity']:8.6f}  {'  '.join(concepts[:LISTED])}" for memory, concepts in rows]
        layers.append(row)
    found = [row["agreement"] for row in layers if row["agreement"]]
    n = sum(a["n"] for a in found)
    whole = None
    if found:
        share, chance = (sum(a[key] * a["n"] for a in found) / n for key in ("share", "chance"))
        whole = {"n": n, "share": share, "standard_error": math.sqrt(share * (1 - share) / n), "chance": chance}
    result |= {"mean_specificity": spec.mean().item(), "agreement": whole, "by_layer": layers}
    lines = [f"{result['model']}: {result['layers']} layers of {result['memories']:,} memories; triggers among {result['contexts']:,} contexts "
             f"in {result['texts']:,} texts of {', '.join(result['tasks'])}", "",
             f"{'layer':<6}{'mean Spec':>11}{'agreement':>18}{'chance':>9}{'n':>10}"]
    for name, row in [*((row["layer"], row) for row in layers), ("all", result)]:
        a = row["agreement"]
        lines.append(f"{name:<6}{row['mean_specificity']:>11.6f}" + (
            f"{a['share']:>10.2%} ± {a['standard_error']:>5.2%}{a['chance']:>9.2%}{a['n']:>10,}" if a else f"{'no context':>18}"))
    lines += ["",
              "Spec: 1 - H(P) / log V of what a memory says when it is decoded alone, 0: anything, 1: one token; beside it, its most probable tokens.",
              "It is small where one memory vector alone is short, which leaves P nearly even; the order of its tokens is telling even then.",
              "agreement: of n memories, how many say first the token that follows the context with their largest coefficient; chance: if concepts and",
              "following tokens were paired at random. ± is the binomial standard error, as if memories were independent."]
    return result, "\n".join(lines + shown + ["", "--index 1:0 shows what calls a memory, --token \" the\" which memories promote a token."])


@torch.inference_mode()
def token_search(result, model, tokenizer, token, index):
    """The memories of all layers that give a token the largest probability, and its rank among what each of them says."""
    decode = model.decode                                # [V, d]
    w, L, d_m = decode[token].float(), result["layers"], result["memories"]
    log_p = torch.stack([token_log_probability(block.memory.values.weight.T.float(), w, log_z.to(w.device))
                         for block, log_z in zip(model.blocks, index["log_z"])]).cpu()                 # [n_layers, d_m]
    best, places = log_p.flatten().topk(min(FOUND, L * d_m))
    spec, rows, shown = specificity(index["entropy"], result["vocabulary"]), [], []
    v = torch.stack([model.blocks[place // d_m].memory.values.weight[:, place % d_m].float() for place in places.tolist()])    # [shown, d]
    logits = torch.cat([v @ piece.float().T for piece in decode.split(2**14)], 1)                      # [shown, V]
    ranks = 1 + (logits > logits[:, [token]]).sum(1)
    for place, p, rank in zip(places.tolist(), best.exp().tolist(), ranks.tolist()):
        layer, i = divmod(place, d_m)
        row, concepts = memory_row(tokenizer, layer, i, spec[layer, i], index["ids"][layer, i], index["log_p"][layer, i])
        rows.append({**row, "probability": p, "rank": rank})
        shown.append(f"{f'{layer + 1}:{i}':<10}{percentage(p):>9}{rank:>9,}{row['specificity']:>10.6f}  {'  '.join(concepts[:LISTED])}")
    result |= {"token": {"id": token, "token": token_text(tokenizer, token)}, "found": rows}
    lines = [f"{result['model']}: the memories that promote {visible(tokenizer, token)} (id {token}) most; "
             f"a memory that says anything gives it {percentage(1 / result['vocabulary'])}", "",
             f"{'memory':<10}{'P(token)':>9}{'rank':>9}{'Spec':>10}  what it says", *shown]
    return result, "\n".join(lines)


@torch.inference_mode()
def one_memory(result, model, tokenizer, layer, memory, triggers, texts, examples):
    """One memory, layer from 0: what it says, and the contexts with its largest and its most negative coefficients."""
    decode = model.decode
    v = model.blocks[layer].memory.values.weight[:, memory].float()                                    # [d]
    log_p = torch.cat([piece.float() @ v for piece in decode.split(2**14)]).log_softmax(0)             # [V]
    h = entropy(log_p)
    top, ids = log_p.topk(min(CONCEPTS, len(log_p)))
    row, concepts = memory_row(tokenizer, layer, memory, specificity(h, len(log_p)), ids, top)
    ends = torch.tensor([len(ids) for ids in texts]).cumsum(0)
    lines = [f"{result['model']}: memory {layer + 1}:{memory}", "",
             f"Spec   {row['specificity']:.6f} (entropy {h:.4f} of at most {math.log(len(log_p)):.4f} nats)", f"says   {'  '.join(concepts)}"]
    calls = {}
    for name, title in (("largest", "largest"), ("smallest", "most negative")):
        lines += [
            "", f"{title} coefficients k among {result['contexts']:,} contexts in {result['texts']:,} texts of {', '.join(result['tasks'])}: "
            "«the token where», -> what follows"]
        calls[name] = []
        for k, place in zip(triggers[name][layer, memory].tolist(), triggers[f"{name}_at"][layer, memory].tolist()):
            if place < 0 or (name == "smallest" and k >= 0):
                continue
            text = int(torch.searchsorted(ends, place, right=True))
            position = place - int(ends[text]) + len(texts[text])
            before = tokenizer.decode([id for id in texts[text][max(0, position - CONTEXT + 1):position] if id != tokenizer.bos_id])
            here, after = texts[text][position], texts[text][position + 1]
            calls[name].append({"k": k, "task": examples[text].task, "row": examples[text].index, "position": position, "context": before,
                                "token": token_text(tokenizer, here), "next": token_text(tokenizer, after)})
            cut = "…" if position >= CONTEXT else ""
            lines.append(f"  {k:>+9.3f}  {cut}{repr(before)[1:-1]}«{visible(tokenizer, here).strip(chr(39))}» -> {visible(tokenizer, after)}   "
                         f"({examples[text].task} row {examples[text].index})")
        if not calls[name]:
            lines.append("  none")
    lines += ["", "Where k is negative the memory adds -v, so it takes from these tokens what it says."]
    return result | row | {"entropy": h.item(), **calls}, "\n".join(lines)


# ---- sweeps: tables of the paper that need runs of their own

# What the paper reports, in %: mean over its tasks and models (Tables 2 and 8), GSM8K and the mean of five others (Table 4).
PAPER_TABLES = {
    "magnitude": {"base": 71.4, "none": 72.6, "int": 73.8, "int-alpha2": 75.5, "int-p0.02-alpha5": 72.8, "reg-lam-0.01": 72.3, "reg": 73.4, "reg-lam0.05": 74.7},
    "layers": {"none": 72.6, "int early": 73.8, "int middle": 75.2, "int late": 72.9, "int early+middle": 76.3, "int middle+late": 74.5,
               "reg-lam0.05 middle": 74.9, "reg-lam0.05": 74.7},
    "ood": {"base": (63.7, 85.3), "none": (65.7, 83.7), "int": (66.8, 86.6), "reg": (66.1, 86.0)},
}
ABOUT = {"layers": "Table 8, mean over its tasks", "magnitude": "Table 2, mean over its tasks", "ood": "Table 4, GSM8K / mean of five other sets"}
OOD_TASKS = ("AddSub", "SingleEq", "MultiArith", "mawps", "SVAMP")           # Table 4 averages these


def sweep_arms(name, n_layers):
    """The arms of a table, {label: Steering}; `int` in both readings of eq. 4 wherever it stands."""
    arms = {"none": Steering()}

    def add(label, steering):
        arms[label] = steering
        if steering.method == "int":
            arms[f"{label} (by value)"] = replace(steering, rank_by="value")

    if name == "layers":
        first, second = round(n_layers / 3), round(2 * n_layers / 3)           # 24 layers: 1-8, 9-16, 17-24
        if not 0 < first < second < n_layers:
            raise BadInput(f"--analyse layers: {n_layers} layers cannot be divided into early, middle and late ones")
        early, middle, late = range(1, first + 1), range(first + 1, second + 1), range(second + 1, n_layers + 1)
        for label, layers in {"early": early, "middle": middle, "late": late, "early+middle": [*early, *middle], "middle+late": [*middle, *late]}.items():
            add(f"int {label}", Steering("int", layers={layer: {} for layer in layers}))
        add("reg-lam0.05 middle", Steering("reg", lam=0.05, layers={layer: {} for layer in middle}))
        add("reg-lam0.05", Steering("reg", lam=0.05))
    else:
        for steering in ([Steering("int"), Steering("int", alpha=2.0), Steering("int", p=0.02, alpha=5.0), Steering("reg", lam=-0.01), Steering("reg"),
                          Steering("reg", lam=0.05)] if name == "magnitude" else [Steering("int"), Steering("reg")]):
            add(arm_name(steering), steering)
    return arms


def flags(steering):
    """The flags of train.py that ask for this steering."""
    usual, given = vars(Steering()), ["--steer", steering.method]
    for name, value in steering.settings.items():
        if name != "method" and value != usual[name]:
            given.append(f"--{name.replace('_', '-')}={format_layers(value) if name == 'layers' else value}")
    return given


def train_missing(args, arms, model, task, data):
    """Train, one after the other, the runs of these arms and seeds that are not in --runs yet; an interrupted one goes on."""
    wanted = [(steering, seed, run_folder(args.runs, model, steering, seed)) for seed in args.seed for steering in arms.values()]
    missing = [run for run in wanted if not read_run(run[2])]
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--model", model, "--task", task, "--data", data, "--device", args.device,
               "--train-only", *shlex.split(args.train_flags)]

    def train(out, *more, quiet=False):
        done = subprocess.run([*command, "--out", str(out), *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if quiet or not sys.stderr.isatty() else None)
        if done.returncode:
            why = (done.stderr or b"").decode(errors="replace").strip().splitlines()
            raise BadInput(f"training {out} failed: {why[-1] if why else 'see above'}")

    if missing:
        with tempfile.TemporaryDirectory() as probe:                           # a few steps tell how long it will take
            train(Path(probe, "run"), "--steps", "3", "--warmup", "1", quiet=True)
            settings = read_run(Path(probe, "run"))
            with open(Path(probe, "run", "log.jsonl"), encoding="utf-8") as log:
                seconds = min(line["tokens"] / line["tokens_per_second"] for line in map(json.loads, log))
        print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them finished; training the others takes about "
              f"{len(missing) * seconds * settings['epochs'] * -(-settings['examples'] // settings['batch']) / 60:.0f} minutes, then they are scored", file=sys.stderr)
    with tqdm(missing, desc="runs", unit="run", disable=None) as bar:
        for steering, seed, out in bar:
            train(out, "--seed", str(seed), *flags(steering), *(["--resume"] if Path(f"{out}.partial").exists() else []))
    return wanted


def analyse_sweep(name, args):
    """Tables 2, 4 and 8: train what is missing, score it, and compare."""
    model, device = args.model[0], args.device
    task = args.task or ("gsm8k" if name == "ood" and args.data else TOY_TRAINING)
    if args.task and not args.data:
        raise BadInput(f"--task {args.task} needs --data, the folder with TASK/train.json")
    names, data = split_names(task), args.data or os.path.relpath(TOY_FOLDER)
    toy = all(find(task).suite for task in names)
    tested = list(TOY) if toy else [*names, *(OOD_TASKS + ("AQuA",) if name == "ood" else ())]
    for test in tested:
        load_examples(data, test, "test")                                      # a missing file shows before hours of training, not after
    arms = sweep_arms(name, Config.from_pretrained(model).n_layers)
    wanted = train_missing(args, arms, model, task, data)
    settings = {folder: read_run(folder) for _, _, folder in wanted}
    for key in ("task", "data_sha256", "epochs", "steps", "batch", "max_length", "lr", "warmup", "weight_decay", "clip", "precision", "limit"):
        values = {str(of.get(key)): folder for folder, of in settings.items()}
        if len(values) > 1:
            raise BadInput(f"{' and '.join(map(str, values.values()))} differ in {key} ({', '.join(values)}); runs that are compared need one recipe: "
                           "--runs elsewhere, or train them again")

    def scored(folder, out=None):
        return {summary["task"]: summary["accuracy"] for summary in score(folder, tested, data, out, device=device, limit=args.limit)}

    base = base_folder(args.runs, model)
    runs = [{"model": model, "arm": "base", "seed": None, "scores": scored(model, base / "eval")}]
    labels = {arm_name(steering): label for label, steering in arms.items()}
    for steering, seed, folder in tqdm(wanted, desc="scoring runs", unit="run", disable=None):
        runs.append({"model": model, "arm": arm_name(steering), "seed": seed, "scores": scored(folder)})
    suites = suites_of(tested)
    if name == "ood":
        suites = (suites if toy else {"in distribution": names, "out of distribution": list(OOD_TASKS), "AQuA": ["AQuA"]}) | {t: [t] for t in tested}
    rows = compare(runs, suites)
    for row in rows:
        row["label"] = labels.get(row["arm"], row["arm"])
    rows.sort(key=lambda row: [*["base"], *labels.values()].index(row["label"]))
    result = {"table": name, "model": model, "seeds": args.seed, "recipe": {key: next(iter(settings.values()))[key] for key in ("task", "epochs", "batch", "lr", "warmup")},
              "rows": rows, "paper": PAPER_TABLES[name]}
    return result, sweep_text(result)


def sweep_text(result):
    """The table of a sweep: arms down, suites across with what the paper has; the single sets of `ood` the other way round, they are many."""
    suites, single = list(dict.fromkeys(row["suite"] for row in result["rows"])), []
    if result["table"] == "ood":
        suites, single = suites[:3], suites[3:]
    cells = {(row["label"], row["suite"]): row for row in result["rows"]}
    labels = list(dict.fromkeys(label for label, _ in cells))
    lines = []
    for label in labels:
        figure = result["paper"].get(label)
        lines += [[label, max(cells[label, suite]["seeds"] for suite in suites if (label, suite) in cells), *(percent(cells.get((label, suite))) for suite in suites),
                   " / ".join(map(str, figure)) if isinstance(figure, tuple) else figure]]
        if label not in ("base", "none"):
            lines.append(["", None, *(difference(cells.get((label, suite))) for suite in suites), None])
    text = [f"{result['model']}: accuracy in %, mean ± standard error over seeds; below, the difference to none, paired by seed, with its 95% interval",
            f"(last column: the paper's {ABOUT[result['table']]}, on models a thousand times as large and other tasks: only signs compare)", "",
            page.columns(["arm", "seeds", *suites, "the paper"], lines)]
    if single:
        lines = []
        for suite in single:
            lines += [[suite, *(percent(cells.get((label, suite))) for label in labels)], ["", *(difference(cells.get((label, suite))) for label in labels)]]
        text += ["", page.columns(["set", *labels], lines)]
    return "\n".join([*text, "", "none: the interval covers zero, so nothing was shown."])


# ---- flux: how many memories each token calls

SHOWN, KEPT = 3, 10                    # items whose heat maps the terminal shows, and those that --json and --html hold
FLUX_NOTE = ("The flux of a token is the entropy in nats of its key distribution when the token itself is fed (where the next one is "
             "predicted), averaged over layers: 0 is one memory, log d_m all alike. All tokens are fed in one pass behind their prompt. Levels are thirds "
             "of a model's own flux over all tokens measured, so compare levels within a model and means between models.")
CLASS_NOTE = ("Mean flux in nats ± standard error (n tokens). A token has the class of the word it is part of, the first of these that fits: punctuation "
              "(symbols and white space too), function words, copied from the prompt (a content word or number that stands there), digits, content words. "
              "Standard errors are clustered by item, since the tokens of one answer are not independent; one item has none.")
LEVEL_NOTE = ("Where flux is called low, middle and high, in nats; most possible is log d_m. Items that are answered with the same text, word for word, are "
              "hardly independent: where different texts are few, so is what the standard errors rest on.")
SURPRISAL_NOTE = ("Correlation of flux with surprisal, -log p of a token given what precedes it, ± jackknife over items: with the surprisal of the token "
                  "itself, and of the token after it; over all tokens, and within classes, both centred on their class means. A greedy answer is what its "
                  "model finds most likely, so its surprisals are all small: --text reads a text that the model did not choose.")


def readable(tokenizer, ids):
    """Ids -> [(text, number of ids)]. Tokens that are bytes of one character are shown as one piece; bytes that are none as U+FFFD."""
    pieces, start = [], 0
    while start < len(ids):
        for end in range(start + 1, min(start + 8, len(ids)) + 1):             # 4 bytes at most, and tokens may overlap two characters
            text = tokenizer.decode(ids[start:end])
            if "\ufffd" not in text:
                break
        else:
            end = start + 1
            text = tokenizer.decode(ids[start:end])
        pieces.append((text, end - start))
        start = end
    return pieces


@torch.inference_mode()
def token_flux(model, prompt, ids):
    """Feed the ids of a prompt (which may have none) and `ids` behind it in one pass -> (flux [T], surprisal [T]) of `ids` in nats.
    Where nothing precedes a token its surprisal is NaN."""
    tokens = torch.tensor([[*prompt, *ids]], device=model.embed.weight.device)             # [1, P + T]
    hidden, flux, _ = model.hidden(tokens, Steering("none"))
    first = max(len(prompt), 1)                                                            # the first token that something precedes
    surprisal = [torch.full((first - len(prompt),), torch.nan)]
    for hidden, target in zip(hidden[0, first - 1:-1].split(512), tokens[0, first:].split(512)):      # some logits at a time: V is large
        surprisal.append(F.cross_entropy(model.logits(hidden), target, reduction="none").cpu())
    return flux[:, 0, len(prompt):].mean(0).cpu(), torch.cat(surprisal)


def measure_flux(model, tokenizer, items, max_new_tokens=32, cache_bytes=2 << 30):
    """Information flux of texts, or of the model's own answers, token by token.

    items: [(prompt, text)]; a text is read behind its prompt, which may be empty; in place of None the model answers greedily. For each item a dict:

        prompt, pieces                     the prompt; the text as `readable` cuts it
        flux, surprisal, next              [T] each, nats; next is the surprisal of the token after it, where the end of an answer counts as one.
                                           NaN where there is none: a first token that nothing precedes, a last one that nothing follows
        classes                            [T], of CLASSES

    Raises BadInput for a text of fewer than two tokens, and where a flux is not a number.
    """
    prompts = [tokenizer.encode(prompt, special=False) for prompt, _ in items]
    own = [i for i, (_, text) in enumerate(items) if text is None]
    texts = [[] if text is None else tokenizer.encode(text, bos=False, special=False) for _, text in items]
    for ids, (_, text) in zip(texts, items):
        if text is not None and len(ids) < 2:
            raise BadInput(f"the text {text!r} is one token to this model; give two or more, since flux is compared between tokens")
    if own:
        with tqdm(total=len(own), desc="answering", unit="item", disable=None) as bar:
            for i, ids in zip(own, model.generate([prompts[i] for i in own], max_new_tokens, None, cache_bytes, done=bar.update)):
                texts[i] = ids
    measured, stop = [], set(model.config.eos_ids)
    for (prompt, text), before, ids in zip(tqdm(items, desc="reading flux", unit="item", disable=None), prompts, texts):
        T = len(ids) - (text is None and ids[-1] in stop)                      # an answer's end is no part of what is shown
        flux, surprisal = token_flux(model, before, ids)
        if not flux.isfinite().all():
            raise BadInput(f"the flux of {prompt or tokenizer.decode(ids)!r:.60} is not a number; the model's weights are not, or overflow: --dtype float32")
        pieces = readable(tokenizer, ids[:T])
        classes = token_classes([piece for piece, _ in pieces], prompt)
        measured.append({"prompt": prompt, "pieces": pieces, "flux": flux[:T], "surprisal": surprisal[:T],
                         "next": torch.cat([surprisal, torch.tensor([torch.nan])])[1:T + 1],
                         "classes": [name for name, (_, n) in zip(classes, pieces) for _ in range(n)]})
    return measured


def flux_numbers(measured):
    """What `measure_flux` found -> a dict of numbers: n tokens, mean and standard_error, the cuts between low, middle and high flux; for each class
    the same three; correlations with surprisal, {"own" or "next": {"raw" or "within": {"r", "standard_error", "n"}}}. None for what is undefined."""
    flux, own, following = (torch.cat([item[key] for item in measured]).double() for key in ("flux", "surprisal", "next"))        # [N] each
    text = torch.tensor([i for i, item in enumerate(measured) for _ in item["flux"]], dtype=torch.long)
    group = torch.tensor([CLASSES.index(name) for item in measured for name in item["classes"]], dtype=torch.long)

    def average(inside):
        mean, error = clustered_mean(flux[inside], text[inside])
        return {"mean": mean, "standard_error": error, "n": int(inside.sum())}

    def correlate(x, y, group, text):
        r, error = grouped_correlation(x, y, group, text)
        return {"r": r, "standard_error": error, "n": len(x)}

    correlations = {}
    for name, surprisal in (("own", own), ("next", following)):
        there = ~surprisal.isnan()
        correlations[name] = {kind: correlate(flux[there], surprisal[there], groups[there], text[there])
                              for kind, groups in (("raw", torch.zeros_like(group)), ("within", group))}
    return {**average(torch.ones_like(group, dtype=torch.bool)), "cuts": terciles(flux)[1].tolist() if len(flux) else None,
            "classes": {name: average(group == i) for i, name in enumerate(CLASSES)}, "correlations": correlations}


def flux_pieces(item, cuts):
    """One item of `measure_flux` -> [{"text", "flux", "level", "class"}] for a heat map; a piece of several tokens has their mean flux."""
    pieces, start = [], 0
    for text, n in item["pieces"]:
        flux = item["flux"][start:start + n].double().mean().item()
        pieces.append({"text": text, "flux": flux, "level": sum(flux > cut for cut in cuts), "class": item["classes"][start]})
        start += n
    return pieces


def arm_of(folder):
    """(arm, seed) of a run of train.py; ("base", None) for any other model."""
    settings = read_run(folder)
    if "steering" not in settings or settings.get("pretrain"):
        return "base", None
    return arm_name(as_steering(settings["steering"])), settings.get("seed")


def first_runs(folder, base):
    """Of the finished runs in a folder that began with the model `base`, the first seed of each arm: [run's folder], plain fine-tuning first."""
    found = {}
    for arm, _, run in runs_from(folder, base):
        found.setdefault(arm, str(run))
    return list(found.values())


def plus_minus(value, error, n, form):
    """A number for people: "5.12 ± 0.01", below it "(234)"; its error left out where there is none, "n/a" where there is no number."""
    return "n/a" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}") + f"\n({n})"


def flux_tables(result):
    """The result's numbers, models in rows: [(heading, note, header, rows)]."""
    means, links, levels = [], [], []
    for model in result["models"]:
        means.append([model["title"], *(plus_minus(cell["mean"], cell["standard_error"], cell["n"], ".3f") for cell in (model, *model["classes"].values()))])
        links.append([model["title"], *(plus_minus(cell["r"], cell["standard_error"], cell["n"], "+.3f")
                                        for kinds in model["correlations"].values() for cell in kinds.values())])
        levels.append([model["title"], model["model"], *(f"{cut:.3f}" for cut in model["cuts"] or (math.nan, math.nan)), f"{model['largest']:.3f}",
                       f"{model['distinct']} of {result['settings']['items']}"])
    return [("Mean flux of kinds of words", CLASS_NOTE, ["model", "all tokens", *TITLES.values()], means),
            ("Flux and surprisal", SURPRISAL_NOTE, ["model", "own surprisal", "own, within classes", "next token's", "next, within classes"], links),
            ("Levels", LEVEL_NOTE, ["model", "folder", "low to", "middle to", "most possible", "different texts"], levels)]


def flux_subject(result):
    """What was read, in a sentence."""
    settings = result["settings"]
    if settings["text"] is not None:
        return "A text that was given."
    return f"Each model's own greedy answers to {settings['items']} items of {', '.join(settings['task'])}."


def flux_text(result, colour=False):
    """The result of `analyse_flux` for a terminal: heat maps of the first items, one line per model, and the tables."""
    settings, models = result["settings"], result["models"]
    lines = [textwrap.fill(FLUX_NOTE, 140), ""]
    width = max(len(title) for title in ("prompt", *(model["title"] for model in models))) + 2
    marks = "three backgrounds, light is low" if colour else "low is plain, [middle], [[high]]"
    shown = min(SHOWN, settings["items"])
    lines.append(f"{flux_subject(result)} Below, the first {shown}; flux: {marks}" if settings["text"] is None else f"{flux_subject(result)} Flux: {marks}")
    for i in range(shown):
        prompt = page.visible(models[0]["shown"][i]["prompt"].rstrip().replace("\n", "↵"))
        lines += ["", *([f"{'prompt':<{width}}{prompt}"] if prompt else [])]
        for model in models:
            tokens = model["shown"][i]["tokens"]
            line = page.heat_terminal([token["text"].replace("\n", "↵") for token in tokens], [token["level"] for token in tokens], colour)
            lines.append(f"{page.visible(model['title']):<{width}}{line.lstrip(' ') or '(nothing)'}")
    for _, note, header, rows in flux_tables(result):
        lines += ["", textwrap.fill(note, 140), page.columns(header, rows)]
    return "\n".join(lines)


def flux_sections(result):
    """The result of `analyse_flux` (or what JSON made of it) as sections of a page: [(heading, html)]; the heat maps, models side
    by side, then the numbers."""
    sections = [(heading, page.table(header, rows, note)) for heading, note, header, rows in flux_tables(result)]
    body, text = page.paragraph(FLUX_NOTE), result["settings"]["text"]
    for i, item in enumerate(result["models"][0]["shown"]):
        body += f"<h3>Item {i + 1}</h3>" + page.paragraph(item["prompt"]) if text is None else ""
        maps = [page.heat([token["text"] for token in tokens], [token["level"] for token in tokens], model["title"])
                for model in result["models"] for tokens in [model["shown"][i]["tokens"]]]
        maps = "".join(f'<div style="flex: 1 1 16rem">{one}</div>' for one in maps)
        body += f'<div style="display: flex; flex-wrap: wrap; gap: 0 1rem">{maps}</div>'
    return [("Flux, token by token", body), *sections]


def flux_of(folders, items, max_new_tokens=32, device="cpu", dtype="auto", cache_bytes=2 << 30):
    """The flux of several models side by side, for `items` as in `measure_flux`: what --json prints, but for where the items are from. Each of "models"
    has what `flux_numbers` says and, of the first KEPT items, the "shown" tokens."""
    device = torch.device(device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    runs, models = [arm_of(folder) for folder in folders], []
    for folder, (arm, seed) in zip(folders, runs):
        model, tokenizer = load(folder, getattr(torch, dtype), device)
        measured = measure_flux(model, tokenizer, items, max_new_tokens, cache_bytes)
        numbers = flux_numbers(measured)
        title = arm if [other for other, _ in runs].count(arm) == 1 else f"{arm} ({folder})"
        models.append({"model": str(folder), "arm": arm, "seed": seed, "title": title, "largest": math.log(model.config.d_m), **numbers,
                       "distinct": len({"".join(text for text, _ in item["pieces"]) for item in measured}),
                       "shown": [{"prompt": item["prompt"], "tokens": flux_pieces(item, numbers["cuts"])} for item in measured[:KEPT]]})
    settings = {"text": None, "task": None, "data": None, "items": len(items), "max_new_tokens": max_new_tokens, "dtype": dtype}
    return {"analysis": "flux", "settings": settings, "models": models}


def analyse_flux(args):
    """--analyse flux: the information flux (section 6) of --text, or of greedy answers to --task, in several models side by side."""
    if args.text is not None and args.task:
        raise BadInput("--text and --task: give one of them, a text to read or a task to answer")
    if args.text is not None and not args.text.strip():
        raise BadInput("--text is empty; give a text of two tokens or more")
    if unmeant := [f"--{name}" for name in ("score", "limit", "out", "steered", "overwrite") if getattr(args, name)]:
        raise BadInput(f"{unmeant[0]} means nothing with --analyse flux" + (", whose number of items is --items" if unmeant[0] == "--limit" else ""))
    if args.html and (Path(args.html).is_dir() or not Path(args.html).parent.is_dir()):
        raise BadInput(f"--html {args.html}: " + ("is a folder; name a file" if Path(args.html).is_dir() else f"there is no folder {Path(args.html).parent}"))
    if not args.model_given and args.runs != "out" and not Path(args.runs).is_dir():
        raise BadInput(f"--runs {args.runs}: no such folder; python train.py --steer none int reg makes runs")
    folders = [*args.model, *([] if args.model_given else first_runs(args.runs, args.model[0]))]
    if args.text is not None:
        names, data, items, longest = None, None, [("", args.text)], None
    else:
        names, data = split_names(args.task or "toy-sums"), args.data or os.path.relpath(TOY_FOLDER)
        items = [(example.prompt, None) for name in names for example in load_examples(data, name, "test")[:args.items]]
        longest = args.max_new_tokens or max(32, *(find(name).max_new_tokens for name in names))
    result = flux_of(folders, items, longest, pick_device(args.device), args.dtype, int(args.cache_gb * 2**30))
    result["settings"] |= {"text": args.text, "task": names, "data": data}
    text = flux_text(result, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if len(folders) == 1 and not args.model_given:
        text += (f"\nThis is the base model alone: no run made from it is in {args.runs}. python train.py --steer none int reg makes some "
                 "to stand beside it.")
    if args.html:
        write_whole(args.html, page.document("Information flux", flux_subject(result), flux_sections(result)))
        text += f"\n\nHeat maps of {min(len(items), KEPT)} items and the tables: {args.html}"
    return result, text


ANALYSES = {
    "memories": (analyse_memories, "what memories say and what calls them, all in short, or by --token or --index"),
    "regions": (analyse_regions, "where the key coefficients of the fine-tuned models in --runs fall among the percentiles of the base model's (Fig. 4)"),
    "layers": (partial(analyse_sweep, "layers"), "steering early, middle or late layers (Table 8); trains what is missing in --runs"),
    "magnitude": (partial(analyse_sweep, "magnitude"), "weak and strong steering (Table 2); trains what is missing"),
    "ood": (partial(analyse_sweep, "ood"), "in and out of distribution, set by set (Table 4, Fig. 3); trains what is missing"),
    "flux": (analyse_flux, "a heat map of how many memories each token calls, of --text or of answers to --task, several models side by side"),
}

# -------------------------------------------------------------------------------------------------------------- report


def verdict(values, sign=1):
    """Does a difference have the sign that the paper reports? Its values over seeds -> (words, numbers in percentage points)."""
    mean, low, high = (None if x is None else 100 * x for x in interval(values))
    if low is None:
        return "not shown: one seed", f"{mean:+.1f}"
    return judged(low, high, sign), f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def judged(low, high, sign=1):
    """What an interval says of a claim that a difference has a sign."""
    return "not shown" if low <= 0 <= high else "as in the paper" if (low > 0) == (sign > 0) else "the opposite"


def claims(rows, regions, flux):
    """What the paper claims, what these runs show: [[claim, where, difference in points, verdict]]."""
    found = []
    compared = [row for row in rows if row["interval"]]
    for method, name in (("int", "raising the smallest coefficients (int)"), ("reg", "rewarding the key entropy (reg)")):
        for row in compared:
            if row["arm"].partition("-")[0] == method:
                found.append([f"{name} beats plain fine-tuning (Tables 1, 2 and 4)", f"{row['arm']}, {row['suite']}", difference(row).removeprefix("none "),
                              judged(*row["interval"])])
    arms = regions["arms"] if regions else {}

    def shift(arm, region, against):
        ours, other = arms[arm]["by_seed"], arms[against]["by_seed"]
        return [shares[0][region] - other[None if against == "base" else seed][0][region] for seed, shares in ours.items() if against == "base" or seed in other]

    for arm in arms:
        for claim, region, sign, against in {
                "none": (("plain fine-tuning moves coefficients into the low region (Fig. 4)", 0, 1, "base"),),
                "int": (("int moves coefficients out of the low region (Fig. 4)", 0, -1, "none"), ("int moves coefficients into the high region (Fig. 4)", 2, 1, "none")),
                "reg": (("reg takes coefficients from the low region (Fig. 4)", 0, -1, "none"), ("reg takes coefficients from the high region (Fig. 4)", 2, -1, "none"),
                        ("reg moves coefficients into the middle region (Fig. 4)", 1, 1, "none"))}.get(arm.partition("-")[0], ()):
            if against in arms and (values := shift(arm, region, against)):
                words, numbers = verdict(values, sign)
                found.append([claim, f"{arm} against {against}, |k|", numbers, words])
    for model in flux["models"] if flux else ():
        content, others = model["classes"]["content"], ("punctuation", "function", "copied")
        for other in others:
            low = model["classes"][other]
            if content["standard_error"] and low["standard_error"]:
                gap, error = content["mean"] - low["mean"], math.hypot(content["standard_error"], low["standard_error"])
                words = "not shown" if abs(gap) < 2 * error else "as in the paper" if gap > 0 else "the opposite"
                found.append([f"content words have more flux than {TITLES[other]} (section 6)", f"{model['title']}, answers", f"{gap:+.3f} ± {error:.3f} nats", words])
    return found


def report(folder, device):
    """One self-contained HTML page about the runs in a folder: what was run, what came out, and what the memories do. -> the page."""
    runs, sections = find_runs(folder), []
    for model in dict.fromkeys(run["model"] for run in runs):
        ours = [run for run in runs if run["model"] == model]
        sections += [(f"{model}: {heading}" if len({run["model"] for run in runs}) > 1 else heading, body) for heading, body in report_sections(folder, model, ours, device)]
    intro = ("InfoSteer steers how much of its feed-forward memory a language model uses while it is fine-tuned. This page shows every run in "
             f"{folder}: what was done, what came out, and how sure that is. Accuracies are means over seeds ± standard error; differences to plain fine-tuning "
             "(none) are paired by seed, with a 95% interval, and the word none stands where that covers zero, so that nothing was shown.")
    return page.document("InfoSteer: what came out", intro, sections)


def report_sections(folder, model, runs, device):
    """The sections about the runs that began with one model: [(heading, HTML)]."""
    trained = runs_from(folder, model)
    settings = [read_run(run) for _, _, run in trained]
    rows = compare(runs)
    commands = list(dict.fromkeys(of["command"] for of in settings if "command" in of))
    lines = {}                                                                 # one for the runs that differ in nothing but the seed
    for (arm, seed, _), of in zip(trained, settings):
        lines.setdefault((arm, str(as_steering(of["steering"])), of["steps_total"], of["batch"], of["lr"], of["warmup"], of["examples"],
                          f"{of['precision']}, {of['device']}", f"{of['versions']['torch']}, {of['versions']['python']}"), []).append(seed)
    sections = [("What was run", page.table(["arm", "seeds", "steering", "steps", "batch", "lr", "warm-up", "examples", "precision, device", "torch, Python"],
                                            [[line[0], " ".join(map(str, seeds)), *line[1:]] for line, seeds in lines.items()]) + (page.preformatted("\n".join(commands)) if commands else ""))]

    suites, arms = list(dict.fromkeys(row["suite"] for row in rows)), list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["arm"], row["suite"]): row for row in rows}
    lines = []
    for arm in arms:
        lines.append([arm, max(cells[arm, suite]["seeds"] for suite in suites if (arm, suite) in cells), *("\n".join(
            text for text in (percent(cells.get((arm, suite))), difference(cells.get((arm, suite)))) if text) for suite in suites)])
    sections.append(("Accuracy", page.table(["arm", "seeds", *suites], lines, note="in %; mean ± standard error over seeds, and the difference to none")))

    def chart(rows, groups, note):
        cells = {(row["arm"], row["suite"]): (round(100 * row["mean"], 1), row["standard_error"] and 100 * row["standard_error"]) for row in rows}
        return page.bars(groups, {arm: [cells.get((arm, group)) for group in groups] for arm in arms}, note=note)

    sections.append(("In and out of distribution", chart(rows, suites, "mean over the sets of each suite; bars: standard error over seeds")))
    tasks = sorted({task for run in runs for task in run["scores"]}, key=[*TOY, *TASKS].index)
    sections.append(("Set by set (the paper's Fig. 3)", chart(compare(runs, {task: [task] for task in tasks}), tasks, "bars: standard error over seeds")))

    curves = {"loss of the language model, nats a token": "lm_loss", "key entropy (information flux), nats": "key_entropy"}
    drawn = trained if len(trained) <= MOST_CURVES else [next(run for run in trained if run[0] == arm) for arm in dict.fromkeys(arm for arm, _, _ in trained)]
    logs = {f"{arm} seed {seed}": [json.loads(line) for line in open(run / "log.jsonl", encoding="utf-8")] for arm, seed, run in drawn[:MOST_CURVES]}
    note = "" if len(drawn) == len(trained) else f"the first seed of each arm; {len(trained)} runs in all"
    sections.append(("Training", "".join(page.curves({name: [(line["step"], line[key]) for line in log] for name, log in logs.items()}, "step", label, note=note)
                                         for label, key in curves.items())))
    if not Path(model).is_dir():
        why = page.paragraph(f"{model}, the model that these runs began with, is not there, so what its memories do cannot be shown.")
        return sections + [("What the paper claims", claims_section(claims(rows, None, None))), ("Memories", why)]

    names, data = split_names(settings[0]["task"]), settings[0]["data"]
    names = [name for name in names if "test" in find(name).splits]
    regions = regions_of(model, folder, names, data, REPORT_ITEMS, device)
    body = ""
    for reading, name in enumerate(("by magnitude |k|: low is idle", "by value k: low is strongly negative")):
        body += page.bars(list(REGIONS), {arm: [(round(100 * found["mean"][reading][region], 1), found["standard_error"] and 100 * found["standard_error"][reading][region])
                          for region in range(3)] for arm, found in regions["arms"].items()}, note=f"share of the key coefficients in the base model's regions, {name}")
    sections.append(("Key regions (the paper's Fig. 4)", body))

    first = sorted(first_runs(folder, model), key=lambda run: arm_of(run)[0] not in ("none", "int", "int-value", "reg"))[:MOST_MODELS]     # the best-known arms
    items = [(e.prompt, None) for name in names for e in load_examples(data, name, "test")[:max(1, REPORT_ITEMS // len(names))]]
    flux = flux_of([model, *first], items, max(find(name).max_new_tokens for name in names), device)
    flux["settings"] |= {"task": names, "data": data}
    for seen in flux["models"]:
        seen["shown"] = seen["shown"][:SHOWN]
    sections += flux_sections(flux)

    base, tokenizer = load(model, device=device)
    index, lines = memory_index(base, Path(folder, f"{Path(model).name}-base", INDEX)), []
    spec = specificity(index["entropy"], base.config.vocab_size)               # [n_layers, d_m]
    for layer in range(base.config.n_layers):
        for i in spec[layer].topk(min(LISTED, base.config.d_m)).indices.tolist():
            lines.append([f"{layer + 1}:{i}", f"{spec[layer, i]:.6f}", *(visible(tokenizer, id) for id in index["ids"][layer, i, :LISTED].tolist())])
    sections.append(("The most specific memories", page.table(["memory", "Spec", "says first", "then", *[""] * (LISTED - 2)], lines, note=(
        "of the base model; layer:memory. Spec is 1 - H(P) / log V, 0: anything, 1: one token; beside it the tokens that it makes most probable when it is "
        "decoded alone. eval.py --analyse memories shows more"))))
    return [*sections[:1], ("What the paper claims, and what is seen here", claims_section(claims(rows, regions, flux))), *sections[1:]]


REPORT_ITEMS = 60                      # items whose tokens are looked at
MOST_CURVES, MOST_MODELS = 20, 6       # curves in a chart; fine-tuned models whose flux is shown


def claims_section(found):
    """What `claims` found: one plain sentence for each claim, and every comparison behind a click."""
    body = ""
    for claim in dict.fromkeys(row[0] for row in found):
        rows = [row for row in found if row[0] == claim]
        shown, opposite = (sum(row[3] == words for row in rows) for words in ("as in the paper", "the opposite"))
        first = rows[0]
        body += page.paragraph(f"The paper: {claim}. Here it is so in {shown} of {len(rows)} comparison{'s' * (len(rows) > 1)}, the opposite in {opposite}, and not shown in "
                               f"{len(rows) - shown - opposite} ({first[1]}: {first[2]}).")
    table = page.table(["the paper", "here", "difference, points", "shown?"], found, note="95% intervals over seeds; not shown: the interval covers zero (of flux: within "
                       "two standard errors). Every comparison made is in this table; one in twenty of them would exclude zero by chance alone.")
    return f"{body}<details><summary>Every comparison</summary>{table}</details>"


# -------------------------------------------------------------------------------------------------------------- command


def main():
    parser = Parser(prog="eval.py", description=__doc__, epilog="""
The columns: accuracy with its standard error; chance, what guessing among the allowed answers scores; strict, the accuracy under a
stricter rule for finding the answer in a response (accuracy uses the rule of LLM-Adapters, to be comparable); unparsed, how many
responses held no answer.""")
    parser.add_argument("--model", metavar="DIR", nargs="+", help="a run of train.py or a published checkpoint; --analyse flux takes several (default, where "
                        "something is analysed: data/toy/llama)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", metavar="DIR", help="instead of scoring: compare the scored runs in this folder over their seeds")
    what.add_argument("--report", metavar="DIR", help="instead of scoring: write report.html, one page about the scored runs in this folder, into it")
    what.add_argument("--analyse", choices=ANALYSES, help="instead of scoring: " + "; ".join(f"{name}: {doc}" for name, (_, doc) in ANALYSES.items()))
    parser.add_argument("--task", metavar="A,B", help=f"a comma list of: {', '.join(TASKS)}; or of the toy world's: {', '.join(TOY)} (default: the toy world's)")
    parser.add_argument("--data", metavar="DIR", help="the folder with TASK/test.json, as python data/prepare.py makes one (default: data/toy)")
    parser.add_argument("--score", choices=("generate", "choice"),
                        help="decode greedily, or rank the allowed answers by likelihood, which is fair to a model that has never seen the "
                             "format (default: generate; choice for the toy world's facts)")
    parser.add_argument("--out", metavar="DIR", help="where responses and scores go (default: MODEL/eval)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N items of each task")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="(default: the paper's, 32 for choice tasks, 256 for arithmetic)")
    parser.add_argument("--steered", action="store_true", help="keep the intervention that the model was trained with (the paper removes it)")
    what.add_argument("--change", action="store_true", help="instead of scoring: say how far the default intervention, in both readings of eq. 4, "
                        "moves what each layer's memory answers on the tasks' prompts")
    parser.add_argument("--cache-gb", type=finite, default=2.0, metavar="X", help="memory for keys and values in decoding (default: 2)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the weights (default: bfloat16 on cuda, else float32; --analyse memories: as they are stored)")
    parser.add_argument("--overwrite", action="store_true", help="score again what has been scored")
    parser.add_argument("--json", action="store_true", help="print JSON")

    group = parser.add_argument_group("analyses")
    group.add_argument("--runs", metavar="DIR", default="out", help="regions, layers, magnitude, ood, flux: the folder of train.py's runs (default: out)")
    group.add_argument("--text", help="flux: read this text, in place of the models' own answers to --task (default: toy-sums)")
    group.add_argument("--html", metavar="FILE", help="flux: write a page with what was found, heat maps in colour")
    group.add_argument("--items", type=positive, metavar="N", default=100, help="items or texts that are looked at (default: 100)")
    group.add_argument("--per-layer", action="store_true", help="regions: each layer too")
    group.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="layers, magnitude, ood: the seeds of the runs (default: 0 1 2)")
    group.add_argument("--train-flags", metavar="'FLAGS'", default="", help="layers, magnitude, ood: more flags for train.py, as --train-flags='--lr 1e-4 --batch 16'")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--token", metavar="TEXT", help="memories: those that promote this token, given with its leading space (\" Paris\")")
    one.add_argument("--index", metavar="LAYER:MEMORY", help="memories: one of them, the layer from 1 and the memory from 0, and the texts that call it")
    args = parser.parse_args()

    if not (args.model or args.compare or args.analyse or args.report):
        parser.error("give --model DIR to score it, or --compare, --report or --analyse")
    if (args.token is not None or args.index is not None) and args.analyse != "memories":
        parser.error("--token and --index need --analyse memories")
    if args.analyse != "flux" and (args.text is not None or args.html):
        parser.error("--text and --html go with --analyse flux")
    for name in ("compare", "report"):
        if (folder := getattr(args, name)) and not Path(folder).is_dir():
            raise BadInput(f"--{name} {folder}: no such folder")
    if WORLD > 1 and (args.analyse or args.report or args.compare or args.change):
        raise BadInput("torchrun: several processes share the items of a task that is scored; comparisons and analyses take one, python eval.py")
    if args.report:
        write_whole(Path(args.report, "report.html"), report(args.report, pick_device(args.device)))
        return print(f"{Path(args.report, 'report.html')}: open it in a browser")
    if args.analyse:
        args.model_given = bool(args.model)
        args.model = args.model or [os.path.relpath(TOY_FOLDER / "llama")]
        result, text = ANALYSES[args.analyse][0](args)
        return print(json.dumps(result, indent=2) if args.json else text)
    if args.compare:
        rows = compare(find_runs(args.compare))
        return print(json.dumps(rows, indent=2) if args.json else comparison_table(rows))
    if len(args.model) > 1:
        parser.error("--model takes several folders only with --analyse flux")
    args.model, = args.model
    args.task, args.data = args.task or ",".join(TOY), args.data or str(TOY_FOLDER)
    names = split_names(args.task)
    if args.change:
        model, tokenizer = load(args.model, device=pick_device(args.device))
        prompts = [tokenizer.encode(e.prompt, special=False) for name in names for e in load_examples(args.data, name, "test")[:64 // len(names) + 1]]
        for rank_by in RANKINGS:
            print(change_line(model, prompts, Steering("int", rank_by=rank_by)))
        return
    join(pick_device(args.device))
    steering = None
    if args.steered:
        steering = as_steering(read_run(args.model).get("steering", {"method": "none"}), Path(args.model, "args.json"))
        if not METHODS[steering.method].change:
            raise BadInput(f"--steered: {args.model} was not trained with an intervention (--steer int), so there is none to keep")
    out = args.out or str(Path(args.model, "eval"))
    summaries = score(args.model, names, args.data, out, args.score, args.device, args.dtype, args.limit, args.max_new_tokens, steering,
                      args.cache_gb, args.overwrite)
    print(json.dumps(summaries, indent=2) if args.json else f"{table(summaries)}\nEvery response and verdict: {out}/*.jsonl (--overwrite scores again)")


if __name__ == "__main__":
    command(main)
