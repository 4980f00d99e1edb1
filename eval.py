"""Score a model on the paper's tasks.

    python eval.py --model out/boolq-reg --task boolq,ARC-Easy --data data/public
    python eval.py --model out/llama-reg-seed0                    the toy world's tasks
    python eval.py --model data/toy/llama --change                how far eq. 4 moves its answers

Every response is kept beside its verdict in MODEL/eval/. An interrupted evaluation goes on where
it stopped. The model runs unsteered, unless --steered keeps the steering it was trained with.
Comparisons over seeds are the work of `python -m lab.experiment`.
"""
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data import BadInput, Parser, command, not_negative, positive, progress, read_json, write_whole
from data.runs import read_run
from data.tasks import TASKS, TOY, chance, find, judge, load as load_examples, make_response
from data.tokenizer import FILES, Tokenizer
from infosteer import METHODS, RANKINGS, Steering, recall
from model import Transformer, read_tensors, weight_files

TOY_FOLDER = Path(__file__).resolve().parent / "data" / "toy"  # tasks and models that ship
TOY_TRAINING = ",".join(name for name, task in TOY.items() if "train" in task.splits)
PER_MEMORY = "per_memory.safetensors"  # what a fine-grained method found out, beside its run
CHUNK = 256                            # items that are answered between two writes to disk

# --------------------------------------------------------------- models, runs and machines


def load(folder, dtype=torch.float32, device="cpu"):
    """A checkpoint folder -> (model, tokenizer), checked to fit together. Raises BadInput."""
    check_folder(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Transformer.from_pretrained(folder, dtype, device)
    if tokenizer.max_id >= model.config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has ids up to {tokenizer.max_id}, but the "
                       f"embedding ends at {model.config.vocab_size - 1}; these are not the "
                       "tokenizer files of this model")
    if tokenizer.eos_id is None:
        raise BadInput(f"{folder}: the tokenizer names no end-of-sequence token; set eos_token in "
                       "tokenizer_config.json")
    model.config = model.config.with_eos(tokenizer.eos_id)     # what training appends ends decoding
    return model, tokenizer


def check_folder(folder):
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder; --model takes a checkpoint folder as published "
                       "(config.json, safetensors, tokenizer files)")


def which_model(folder) -> str:
    """The SHA-256 of a model's content: weights, configuration and tokenizer. It is the same for a
    copy, a moved or a touched folder, and another for any other model. Raises BadInput."""
    check_folder(folder)
    sha = hashlib.sha256()
    names = ["config.json", "generation_config.json", *FILES]
    paths = [path for name in names if (path := Path(folder, name)).is_file()]
    for path in progress([*paths, *weight_files(Path(folder))], desc="reading model", unit="file"):
        sha.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while block := file.read(2**24):
                sha.update(block)
    return sha.hexdigest()


def pick_device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: not usable here "
                       f"({str(error).splitlines()[0]})") from None
    return torch.device(name)


def set_threads(threads, names):
    """So many threads compute from now on. Tasks of the toy world take one unless told otherwise: a
    second one would only wait, and other numbers of threads add floats in another order."""
    if threads or all(find(name).suite for name in names):
        torch.set_num_threads(threads or 1)


def split_names(text):
    """"a,b" -> ["a", "b"]. Raises BadInput for repetitions and unknown names."""
    names = [find(name.strip()).name for name in text.split(",") if name.strip()]
    if len(set(names)) < len(names) or len(names) <= text.count(","):
        raise BadInput(f"--task {text!r}: a comma list of different task names is needed; "
                       f"known are {', '.join(TASKS)}")
    return names


def steering_from(settings, where) -> Steering:
    """The steering that args.json describes at `where`. Raises BadInput if it describes none."""
    try:
        layers = settings.get("layers")
        if layers is not None:
            layers = {int(layer): strengths for layer, strengths in layers.items()}
        steering = Steering(**{"method": None, **settings, "layers": layers})
        if not settings.keys() <= steering.settings.keys():
            raise ValueError("a part of it means nothing to the method")
        return steering
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: steering is {settings!r}, which train.py does not write "
                       f"({error})") from None


def steering_of(folder, device="cpu") -> Steering:
    """The steering of a run, with what it found out about the memories. Raises BadInput."""
    where = Path(folder, "args.json")
    steering = steering_from(read_run(folder).get("steering", {"method": "none"}), where)
    if METHODS[steering.method].per_memory:
        steering = with_per_memory(steering, Path(folder, PER_MEMORY), device)
    return steering


def with_per_memory(steering, path, device="cpu"):
    """A fine-grained steering with what a run of its own has written to `path`."""
    per_memory = read_tensors(path)[0].get("per_memory")
    if per_memory is None:
        raise BadInput(f"{path}: holds no per_memory; train the run again")
    return replace(steering, per_memory=per_memory.to(device))


# ------------------------------------------------------------------------------- answering


def answer(model, tokenizer, examples, how, max_new_tokens, steering, cache_bytes, bar):
    """The model's responses to a list of examples, in their order.

    how: "generate" decodes greedily. "choice" takes the allowed answer whose response is most
    likely, which is fair to a model that has never seen the format of the answers.
    """
    prompts = [tokenizer.encode(example.prompt, special=False) for example in examples]
    if how == "generate":
        outputs = model.generate(prompts, max_new_tokens, steering, cache_bytes, done=bar.update)
        stop = set(model.config.eos_ids)       # ids above max_id are padding rows of the embedding
        return [tokenizer.decode([i for i in ids if i not in stop and i <= tokenizer.max_id])
                for ids in outputs]
    responses = [[make_response(example.task, choice, "") for choice in example.choices]
                 for example in examples]
    asked, continued = [], []
    for prompt, candidates in zip(prompts, responses):
        ids = [tokenizer.encode(text, bos=False, special=False) for text in candidates]
        same = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1)     # the trigger: it is
        asked += [prompt + one[:same] for one in ids]          # read once, and says nothing about
        continued += [one[same:] for one in ids]               # the choice
    scores = iter(model.log_likelihood(asked, continued))
    best = [max(zip([next(scores) for _ in candidates], candidates), key=lambda pair: pair[0])[1]
            for candidates in responses]
    bar.update(len(examples))
    return best


def evaluate(model, tokenizer, examples, path, settings, steering=None, cache_bytes=2 << 30):
    """Score `examples` and write one JSON line per item to `path`; write their summary beside it,
    as JSON, and return it.

    Items are answered longest first, a few hundred at a time. They are kept in `path`.partial until
    all are there, so that an interrupted evaluation with the same settings goes on.
    """
    part, head = Path(f"{path}.partial"), json.dumps(settings, sort_keys=True) + "\n"
    items = answered_before(part, head)
    pending = [example for example in examples if example.index not in items]
    pending.sort(key=lambda example: -len(example.prompt))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "w", encoding="utf-8") as file, progress(
            total=len(examples), initial=len(items), desc=settings["task"], unit="item") as bar:
        file.write("".join([head, *(json.dumps(item) + "\n" for item in items.values())]))
        for start in range(0, len(pending), CHUNK):
            chunk = pending[start:start + CHUNK]
            responses = answer(model, tokenizer, chunk, settings["score"],
                               settings["max_new_tokens"], steering, cache_bytes, bar)
            for example, response in zip(chunk, responses):
                item = {"index": example.index, "prompt": example.prompt, "response": response,
                        "answer": example.answer, **judge(example, response)}
                items[example.index] = item
                file.write(json.dumps(item) + "\n")
            file.flush()
    items = [items[example.index] for example in examples]
    summary = {**settings, **summarise(items), "chance": chance(examples)}
    write_whole(path, "".join(json.dumps(item) + "\n" for item in items))
    write_whole(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
    part.unlink()
    return summary


def answered_before(part, head):
    """The items that an interrupted evaluation of the same settings has left: {index: item}. A line
    that the interruption cut is answered again."""
    if not part.is_file():
        return {}
    first, *lines = part.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    items = [json.loads(line) for line in lines if line.endswith("}\n")] if first == head else []
    return {item["index"]: item for item in items}


def summarise(items):
    """n, accuracy and its standard error sqrt(p (1 - p) / n), the accuracy under the strict rule,
    and how many responses held no answer at all."""
    n, correct = len(items), sum(item["correct"] for item in items)
    return {"n": n, "accuracy": correct / n,
            "standard_error": math.sqrt(correct / n * (1 - correct / n) / n),
            "strict_accuracy": sum(item["strict_correct"] for item in items) / n,
            "unparsed": sum(item["prediction"] is None for item in items)}


def score(folder, names, data, out=None, how=None, device="auto", dtype="auto", limit=None,
          max_new_tokens=None, steered=False, cache_gb=2.0, overwrite=False):
    """Summaries of the named tasks' test splits, in order. What was scored before with the same
    settings is read, not scored again.

    how: "generate", "choice" or None, which is each task's own way. Results go to `out`, or else to
    FOLDER/eval. Raises BadInput.
    """
    tasks = {name: load_examples(data, name, "test")[:limit] for name in names}
    for name, examples in tasks.items():
        if how == "choice" and (find(name).kind == "arithmetic" or not examples[0].choices):
            raise BadInput(f"--score choice: {name} has no short list of answers to rank; "
                           "use --score generate")
    device = pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    steering = steering_of(folder, device) if steered else None
    identity, out = which_model(folder), Path(out or Path(folder, "eval"))
    summaries, model = [], None
    for name, examples in tasks.items():
        task = find(name)
        items = json.dumps([[example.prompt, example.answer] for example in examples])
        settings = {"task": name, "score": how or task.score, "dtype": dtype,
                    "steered": str(steering) if steered else None,
                    "max_new_tokens": max_new_tokens or task.max_new_tokens,
                    "model": str(folder), "model_sha256": identity,
                    "items_sha256": hashlib.sha256(items.encode()).hexdigest()}
        variant = f"-{how}" * (how not in (None, task.score)) + "-steered" * steered
        path = out / f"{name}{variant}{f'-first{limit}' if limit else ''}.jsonl"
        done = path.with_suffix(".json")
        if done.is_file() and not overwrite:
            summary = read_json(done)
            differing = [key for key, value in settings.items()
                         if key != "model" and summary.get(key) != value]
            if differing:
                raise BadInput(f"{done}: holds scores of another {', '.join(differing)}; "
                               "--overwrite replaces them, --out puts these elsewhere")
        else:
            if model is None:
                model, tokenizer = load(folder, getattr(torch, dtype), device)
            summary = evaluate(model, tokenizer, examples, path, settings, steering,
                               int(cache_gb * 2**30))
        summaries.append(summary)
    return summaries


def base_folder(out, model):
    """The folder beside the runs that holds their base model's scores, made and marked as such."""
    base = Path(out, f"{Path(model).resolve().name}-base")
    mark = {"model": str(model), "model_sha256": which_model(model), "base": True}
    write_whole(base / "args.json", json.dumps(mark) + "\n")
    return base


# -------------------------------------------------------------------------- tables for people


def with_error(mean, error) -> str:
    """A share as percent with its standard error, if it has one: 0.123, 0.004 -> "12.3 ± 0.4"."""
    return f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def table(summaries):
    """Summaries -> the lines of a table, in percent."""
    lines = [f"{'task':<16}{'n':>6}{'accuracy':>14}{'chance':>9}{'strict':>9}{'unparsed':>10}"]
    for s in summaries:
        lines.append(f"{s['task']:<16}{s['n']:>6}"
                     f"{with_error(s['accuracy'], s['standard_error']):>14}"
                     f"{100 * s['chance']:>9.1f}{100 * s['strict_accuracy']:>9.1f}"
                     f"{s['unparsed']:>10}")
    return "\n".join(lines)


def suite_of(name):
    """The suite in which a task is reported: one of three in the toy world, itself elsewhere."""
    return find(name).suite or name


def side_by_side(columns):
    """{title: summaries} of models on the same tasks -> a table of suites, and within them of
    tasks: accuracy in percent with its standard error over items."""
    first = next(iter(columns.values()))
    width = max(16, *(len(title) + 2 for title in columns))
    lines = [f"{'accuracy, %':<20}{'n':>6}{'chance':>8}"
             + "".join(title.rjust(width) for title in columns)]
    for suite in dict.fromkeys(suite_of(summary["task"]) for summary in first):
        inside = [i for i, summary in enumerate(first) if suite_of(summary["task"]) == suite]
        cells = []
        for summaries in columns.values():
            errors = [summaries[i]["standard_error"] for i in inside]
            cells.append(with_error(sum(summaries[i]["accuracy"] for i in inside) / len(inside),
                                    math.hypot(*errors) / len(inside)))
        lines.append(f"{suite:<34}" + "".join(cell.rjust(width) for cell in cells))
        for i in inside:
            cells = [with_error(summaries[i]["accuracy"], summaries[i]["standard_error"])
                     for summaries in columns.values()]
            lines.append(f"  {first[i]['task']:<18}{first[i]['n']:>6}"
                         f"{100 * first[i]['chance']:>8.1f}"
                         + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)


# ----------------------------------------------------------------------- looking at memories


@dataclass(frozen=True)
class Watch:
    """A steering that only looks: it hands the key coefficients of every layer to
    see(layer, k [..., d_m]), after `steering` has changed them."""

    see: Callable
    steering: Steering = field(default_factory=Steering)
    layer: int | None = None

    def at(self, layer):
        return replace(self, steering=self.steering.at(layer), layer=layer)

    def change(self, k):
        k = self.steering.change(k)
        self.see(self.layer, k)
        return k

    def measure(self, k):
        return self.steering.measure(k)


@torch.inference_mode()
def keys_of(model, texts, steering=Steering()):
    """Run the model on lists of ids, one at a time -> for each of them the key coefficients
    [T, d_m] of every layer, as a list. `steering` changes them first, if it changes any."""
    for ids in texts:
        keys = []
        tokens = torch.tensor([ids], device=model.embed.weight.device)             # [1, T]
        model.hidden(tokens, Watch(lambda layer, k: keys.append(k[0]), steering))
        yield keys


def change_line(model, prompts, steering):
    """How far a steering moves what each layer's memory answers, as a sentence: the mean over the
    prompts' tokens of |FFN_steered(h) - FFN(h)| / |FFN(h)|, on the h of the unsteered model."""
    totals = torch.zeros(model.config.n_layers)
    with torch.inference_mode():
        for keys in keys_of(model, prompts):
            for layer, (k, block) in enumerate(zip(keys, model.blocks)):           # k: [T, d_m]
                v = block.memory.values.weight.T                                   # [d_m, d]
                plain = recall(k, v).float()                                       # [T, d]
                moved = recall(steering.at(layer).change(k), v).float() - plain
                totals[layer] += (moved.norm(dim=-1) / plain.norm(dim=-1)).sum().item()
    changes = (totals / sum(map(len, prompts))).tolist()
    return (f"{steering.name} changes what the memories of this model answer by "
            f"{sum(changes) / len(changes):.1%} (mean relative change of the FFN output; per layer "
            f"{' '.join(f'{change:.1%}' for change in changes)})")


# ---------------------------------------------------------------------------------- command

COLUMNS = """
The columns: accuracy in percent with its standard error; chance, what guessing among the allowed
answers scores; strict, the accuracy under a stricter rule for finding the answer in a response
(accuracy uses the rule of LLM-Adapters, to be comparable); unparsed, how many responses held no
answer. Where accuracy and strict differ, read the responses.
"""


def read_settings(argv=None):
    parser = Parser(prog="eval.py", description=__doc__, epilog=COLUMNS)
    add = parser.add_argument
    add("--model", metavar="DIR", required=True,
        help="a run of train.py or a published checkpoint")
    add("--task", metavar="A,B", default=",".join(TOY),
        help=f"a comma list of: {', '.join(TASKS)}; or of the toy world's: {', '.join(TOY)} "
        "(default: the toy world's)")
    add("--data", metavar="DIR", help="the folder with TASK/test.json, as python data/prepare.py "
        "makes one (default: data/toy)")
    add("--score", choices=("generate", "choice"), help="decode greedily, or rank the allowed "
        "answers by likelihood, which is fair to a model that has never seen the format (default: "
        "generate; choice for the toy world's facts)")
    add("--out", metavar="DIR", help="where responses and scores go (default: MODEL/eval)")
    add("--limit", type=positive, metavar="N", help="only the first N items of each task")
    add("--max-new-tokens", type=positive, metavar="N",
        help="(default: 32 for choice tasks, as in LLM-Adapters; 256 for arithmetic)")
    add("--steered", action="store_true", help="keep the steering of the forward pass that the "
        "model was trained with (default: unsteered)")
    add("--change", action="store_true", help="instead of scoring: say how far the default "
        "intervention, in both readings of eq. 4, moves what each layer's memory answers on the "
        "tasks' prompts")
    add("--cache-gb", type=not_negative, default=2.0, metavar="X",
        help="memory for keys and values in decoding (default: 2)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights (default: bfloat16 on cuda, else float32)")
    add("--threads", type=positive, metavar="N",
        help="threads on a CPU (default: 1 for the toy world's tasks, else PyTorch's)")
    add("--overwrite", action="store_true", help="score again what has been scored")
    add("--json", action="store_true", help="print the summaries as JSON")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_settings(argv)
    names, data = split_names(args.task), args.data or TOY_FOLDER
    set_threads(args.threads, names)
    if args.change:
        model, tokenizer = load(args.model, device=pick_device(args.device))
        prompts = [tokenizer.encode(example.prompt, special=False) for name in names
                   for example in load_examples(data, name, "test")[:64 // len(names) + 1]]
        for rank_by in RANKINGS:
            print(change_line(model, prompts, Steering("int", rank_by=rank_by)))
        return
    if args.steered and not METHODS[steering_of(args.model).method].change:
        raise BadInput(f"--steered: {args.model} was not trained with a steering of the forward "
                       "pass (--steer int), so there is none to keep")
    summaries = score(args.model, names, data, args.out, args.score, args.device, args.dtype,
                      args.limit, args.max_new_tokens, args.steered, args.cache_gb, args.overwrite)
    if args.json:
        return print(json.dumps(summaries, indent=2))
    out = args.out or Path(args.model, "eval")
    print(f"{table(summaries)}\nEvery response and verdict: {out}/*.jsonl")


if __name__ == "__main__":
    command(main)
