"""Score a model on the tasks of the paper (Tables 1 and 4, Fig. 3).

    python eval.py --model out/boolq-reg --task boolq,ARC-Easy --data data/public
    python eval.py --model out/llama-reg-seed0                    the toy world's tasks
    python eval.py --model data/toy/llama --change                how far eq. 4 moves its answers

Every response is kept beside its verdict in MODEL/eval/, and an interrupted evaluation goes on.
The model runs unsteered: our reading, since the paper does not say. Comparisons over seeds are the
work of `python -m lab.experiment`.
"""
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch

from data import BadInput, Parser, command, not_negative, positive, progress, read_json, write_whole
from data.runs import locked, read_run
from data.tasks import (TASKS, TOY, chance, find, judge, load as load_examples, make_response,
                        option_texts)
from data.tokenizer import FILES, Tokenizer
from infosteer import METHODS, RANKINGS, Steering, recall
from model import Config, Transformer, read_tensors, weight_files

TOY_FOLDER = Path(__file__).resolve().parent / "data" / "toy"  # tasks and models that ship
TOY_TRAINING = ",".join(name for name, task in TOY.items() if "train" in task.splits)
PER_MEMORY = "per_memory.safetensors"  # what a fine-grained method found out, beside its run
CHUNK = 256                            # items decoded between two writes to disk; 32 are ranked

# --------------------------------------------------------------- models, runs and machines


def load(folder, dtype=torch.float32, device="cpu"):
    """A checkpoint folder -> (model, tokenizer), checked to fit together. Raises BadInput."""
    model = Transformer.from_pretrained(folder, dtype, device)
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.max_id >= model.config.vocab_size:
        raise BadInput(f"{folder}: not the tokenizer of this model: its ids go to "
                       f"{tokenizer.max_id}, the embedding's to {model.config.vocab_size - 1}")
    if tokenizer.eos_id is None:
        raise BadInput(f"{folder}: no end of sequence; set eos_token in tokenizer_config.json")
    check_finite(model, folder)
    model.config = model.config.with_eos(tokenizer.eos_id)     # what training appends ends decoding
    return model, tokenizer


def check_finite(model, where):
    """Raises BadInput if a weight is not a number, or if it or its square is infinite."""
    for name, weight in model.named_parameters():
        if not torch.stack(weight.detach().aminmax()).float().square().isfinite().all():
            raise BadInput(f"{where}: {name} is not finite; if training made it, lower --lr")


def which_model(folder) -> str:
    """The SHA-256 of a model's content: weights, configuration and tokenizer. It is the same for a
    copy, a moved or a touched folder, and another for any other model. Raises BadInput."""
    Config.from_pretrained(folder)
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
        raise BadInput(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def pick_dtype(name, device, config):
    """What to compute in, as the name of a dtype. "auto" is bfloat16 where the processor multiplies
    it by itself; on a CPU, only if the model is 256 wide or more, as measured. Raises BadInput."""
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cpu" and config.d >= 256:
            has = getattr(torch.cpu, "get_capabilities", dict)()
            native = has.get("avx512_bf16") or has.get("amx_bf16")
        return "bfloat16" if native else "float32"
    try:
        torch.zeros(8, 8, dtype=getattr(torch, name), device=device).square()
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"{name}: not usable on {device} ({str(error).splitlines()[0]}); "
                       "take float32 or fp32") from None
    return name


def usual_data(names):
    """Where the data of tasks are, unless told otherwise: the toy world's ship."""
    return os.path.relpath(TOY_FOLDER if names[0] in TOY else TOY_FOLDER.parent / "public")


def set_threads(threads, names):
    """Compute with so many threads. The toy world's tasks take one unless told otherwise: a second
    would only wait, and other numbers of threads add floats in another order."""
    if threads or all(name in TOY for name in names):
        torch.set_num_threads(min(threads or 1, 1024))    # far more would crash


def split_names(text, data=None):
    """"a,b" -> ["a", "b"]. Raises BadInput for repetitions, and for names of tasks that are neither
    built in nor in the folder `data`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(set(names)) < len(names) or len(names) <= text.count(","):
        raise BadInput(f"--task {text!r}: a comma list of different task names is needed; "
                       f"known are {', '.join(TASKS)}")
    return [find(name, data or usual_data(names)).name for name in names]


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
    settings = read_run(folder).get("steering", {"method": "none"})
    steering = steering_from(settings, Path(folder, "args.json"))
    needs = METHODS[steering.method].per_memory
    return with_per_memory(steering, Path(folder, PER_MEMORY), device) if needs else steering


def with_per_memory(steering, path, device="cpu"):
    """A fine-grained steering with what a run of its own has written to `path`."""
    tensors, _ = read_tensors(path)
    if "per_memory" not in tensors:
        raise BadInput(f"{path}: holds no per_memory; train the run again")
    return replace(steering, per_memory=tensors["per_memory"].to(device))


# ------------------------------------------------------------------------------- answering


def pairs_of(tokenizer, example, how):
    """What the model is asked about an item, as (prompt, continuation) in ids: a pair for each
    choice that is ranked; in a list that of the right response, if the file has one; the prompt."""
    encode, task = partial(tokenizer.encode, special=False), example.task
    if how == "text":
        pairs = [(encode(asks), encode(text, bos=False)) for asks, text in option_texts(example)]
        return pairs, [pairs[example.choices.index(example.answer)]], None
    prompt, right = encode(example.prompt), encode(example.response, bos=False)
    pairs = [(prompt, encode(make_response(task, choice, ""), bos=False))
             for choice in example.choices if how == "choice"]
    right += [tokenizer.eos_id] * (task.kind not in ("cloze", "text"))
    verdict = task.kind == "text" or judge(example, example.response)[
        "strict_correct" if example.choices else "correct"]
    return pairs, [(prompt, right)] * verdict, prompt


def answer(model, tokenizer, examples, how, max_new_tokens, steering, cache_bytes, bar):
    """What the model says to examples, in their order: [{"response", "nll"}]. how: "generate"
    decodes greedily; "choice" takes the allowed answer whose response is most likely; "text" the
    one whose text is, per character, and says whether the most likely is right ("raw_correct");
    "nll" asks for no answer, so there is no "response".

    nll: the loss of the right response in nats per token, as training counts it: -log P(response,
    end of sequence | prompt) / their number. For "text", the response is the text of the right
    option; that has no end, nor has a cloze. None without a response that ends in the answer.
    """
    asked = [pairs_of(tokenizer, example, how) for example in examples]
    flat = [pair for pairs, right, _ in asked for pair in pairs + right]
    room = min(8192, 2**28 // model.config.vocab_size + 1)     # tokens at a time: 1 GiB of logits
    scores = iter(model.log_likelihood(*zip(*flat), steering=steering, batch_tokens=room)
                  if flat else ())
    said = []
    for example, (pairs, right, _) in zip(examples, asked):
        likely = [next(scores) for _ in pairs]                 # of nothing, where it decodes
        said.append({"nll": -next(scores) / len(right[0][1]) if right else None})
        if how == "nll":
            continue
        best = likely and example.choices[likely.index(max(likely))]
        if how == "text":
            said[-1]["raw_correct"] = best == example.answer
            sizes = [len(text.strip()) or 1 for _, text in option_texts(example)]      # characters
            best = max(zip(likely, sizes, example.choices), key=lambda one: one[0] / one[1])[2]
        said[-1]["response"] = best and make_response(example.task, best, "")
    if how != "generate":
        bar.update(len(examples))
        return said
    outputs = model.generate([prompt for *_, prompt in asked], max_new_tokens, steering,
                             cache_bytes, done=bar.update)
    stop, last = {*model.config.eos_ids}, tokenizer.max_id     # above it: padding of the embedding
    for one, ids in zip(said, outputs):
        one["response"] = tokenizer.decode([i for i in ids if i not in stop and i <= last])
    return said


def evaluate(model, tokenizer, examples, path, settings, steering=None, cache_bytes=2 << 30):
    """Score `examples`; write a JSON line per item to `path`, their summary beside it -> summary.
    Items are answered longest first, and kept in `path`.partial until all are there, so that an
    interrupted evaluation with the same settings goes on."""
    part, head = Path(f"{path}.partial"), json.dumps(settings, sort_keys=True) + "\n"
    items = answered_before(part, head)
    pending = [example for example in examples if example.index not in items]
    pending.sort(key=lambda example: -len(example.prompt))
    with open(part, "w", encoding="utf-8") as file, progress(
            total=len(examples), initial=len(items), desc=settings["task"], unit="item") as bar:
        file.write("".join([head, *(json.dumps(item) + "\n" for item in items.values())]))
        size = CHUNK if settings["score"] == "generate" else CHUNK // 8
        for start in range(0, len(pending), size):
            chunk = pending[start:start + size]
            responses = answer(model, tokenizer, chunk, settings["score"],
                               settings["max_new_tokens"], steering, cache_bytes, bar)
            for example, said in zip(chunk, responses):
                item = {"index": example.index, "prompt": example.prompt, "answer": example.answer,
                        **said, **(judge(example, said["response"]) if "response" in said else {})}
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
    """The items that an interrupted evaluation of the same settings has left: {index: item}."""
    if not part.is_file():
        return {}
    text, items = part.read_text(encoding="utf-8", errors="replace"), {}
    first, *lines = text.splitlines(keepends=True) or [""]
    for line in lines if first == head else ():
        try:
            item = json.loads(line)
            items[item["index"]] = summarise([item]) and item
        except (ValueError, TypeError, KeyError):
            continue                   # a damaged line: its item is answered again
    return items


def summarise(items):
    """n, accuracy and its standard error sqrt(p (1 - p) / n), the accuracy under the strict rule,
    how many responses held no answer; the mean nll of the nll_n items that have one, its standard
    error sd / sqrt(nll_n), and how many have none. Of option texts, the raw accuracy too. None
    stands for what items without answers lack."""
    def share(name):
        return fmean(item[name] for item in items) if name in items[0] else None

    n, accuracy, losses = len(items), share("correct"), [
        item["nll"] for item in items if item["nll"] is not None]
    return {"n": n, "accuracy": accuracy, "standard_error": accuracy if accuracy is None
            else math.sqrt(accuracy * (1 - accuracy) / n),
            "strict_accuracy": share("strict_correct"),
            "unparsed": sum(item.get("prediction", "") is None for item in items),
            "nll": fmean(losses) if losses else None,
            "nll_standard_error": stdev(losses) / len(losses) ** 0.5 if losses[1:] else None,
            "nll_n": len(losses), "nll_left_out": n - len(losses),
            **({"raw_accuracy": share("raw_correct")} if "raw_correct" in items[0] else {})}


def score(folder, names, data, out=None, how=None, device="auto", dtype="auto", limit=None,
          max_new_tokens=None, steered=False, cache_gb=2.0, overwrite=False):
    """Summaries of the named tasks' test splits, in order. What was scored before with the same
    settings is read. how: as in `answer`; None is each task's own way. Results go to `out`, or
    else to FOLDER/eval. Raises BadInput."""
    tasks = {name: load_examples(data, name, "test") for name in names}
    for name, examples in tasks.items():
        if how not in (None, "nll") and examples[0].task.kind == "text":
            raise BadInput(f"--score {how}: {name} is plain text, which has an nll and no answers")
        if how == "choice" and (examples[0].task.kind == "arithmetic" or not examples[0].choices):
            raise BadInput(f"--score choice: {name} has no short list of answers to rank; "
                           "use --score generate")
        if without := [one.index for one in examples if how == "text" and not option_texts(one)]:
            raise BadInput(f"--score text: {Path(data, name, 'test.json')}, row {without[0]} (the "
                           "first is 0): no texts of options to rank; --score generate takes it")
    device = pick_device(device)
    dtype = pick_dtype(dtype, device, Config.from_pretrained(folder))
    steering = steering_of(folder, device) if steered else None
    identity, out = which_model(folder), Path(out or Path(folder, "eval"))
    summaries, model = [], None
    for name, examples in tasks.items():
        path = items_file(out, name, examples, how, limit, steered)
        task, examples = examples[0].task, examples[:limit]
        items = json.dumps([[example.prompt, example.answer] for example in examples])
        settings = {"task": name, "task_json": task.own, "score": how or task.score, "dtype": dtype,
                    "steered": str(steering) if steered else None, "model_sha256": identity,
                    "max_new_tokens": max_new_tokens or task.max_new_tokens, "model": str(folder),
                    "items_sha256": hashlib.sha256(items.encode()).hexdigest()}
        with locked(f"{path}.lock", wait=True):                # another process may score it now
            summary = None if overwrite else read_scores(path.with_suffix(".json"), settings)
            if summary is None:
                if model is None:
                    model, tokenizer = load(folder, getattr(torch, dtype), device)
                summary = evaluate(model, tokenizer, examples, path, settings, steering,
                                   int(cache_gb * 2**30))
        summaries.append(summary)
    return summaries


def items_file(out, name, examples, how=None, limit=None, steered=False):
    """Where the items of a task's test split are kept in the folder `out`."""
    part = f"-first{limit}" if limit and limit < len(examples) else ""
    variant = f"-{how}" * (how not in (None, examples[0].task.score)) + "-steered" * steered
    return Path(out, f"{name}{variant}{part}.jsonl")


def read_scores(path, settings):
    """The summary that was written before; None if there is none. Raises BadInput for another's."""
    if not path.is_file():
        return None
    summary = read_json(path)
    differing = [key for key in settings.keys() - {"model"} if summary.get(key) != settings[key]]
    if differing:
        raise BadInput(f"{path}: holds scores of another {', '.join(sorted(differing))}; "
                       "--overwrite replaces them, --out puts these elsewhere")
    return summary


def base_folder(out, model):
    """The folder beside the runs that holds their base model's scores, made and marked as such."""
    base = Path(out, f"{Path(model).resolve().name}-base")
    mark = {"model": str(model), "model_sha256": which_model(model), "base": True}
    with locked(f"{base}.lock", wait=True):
        before = read_run(base)
        if [*base.glob("[!a]*"), *before] and mark != {**before, "model": str(model)}:
            raise BadInput(f"{base}: is not for this base model's scores; choose another --out")
        write_whole(base / "args.json", json.dumps(mark) + "\n")
    return base


# -------------------------------------------------------------------------- tables for people


def with_error(mean, error, scale=100, digits=1) -> str:
    """A share as percent with its standard error, if it has one: 0.123, 0.004 -> "12.3 ± 0.4". A
    loss has scale 1 and 3 digits. "-" for None."""
    error = "" if error is None else f" ± {scale * error:.{digits}f}"
    return "-" if mean is None else f"{scale * mean:.{digits}f}{error}"


def suite_of(name):                    # where a task is reported: itself, but in the toy world
    return TOY[name].suite if name in TOY else name


def mean_of(summaries, measure, error, *form):
    """A measure's mean over tasks, with its standard error over items, as text."""
    means, errors = ([of.get(key) for of in summaries] for key in (measure, error))
    return with_error(None if None in means else fmean(means),         # none by an older version
                      None if None in errors else math.hypot(*errors) / len(errors), *form)


def side_by_side(columns, detailed=False):
    """{title: summaries} of models on the same tasks -> a table: the accuracy in percent and the
    nll of each suite and of its tasks, with their standard errors. detailed: what else is known."""
    def cells(inside):
        some = [[of[i] for i in inside] for of in columns.values()]
        return "".join(f"{mean_of(of, 'accuracy', 'standard_error'):>{width}}"
                       f"{mean_of(of, 'nll', 'nll_standard_error', 1, 3):>16}" for of in some)

    first = next(iter(columns.values()))
    width = max(15, *(len(title) + 2 for title in columns))
    strict = "raw" if "raw_accuracy" in first[0] else "strict"
    lines = [f"{'accuracy, %':<20}{'n':>6}{'chance':>8}"
             + "".join(f"{title:>{width}}{'nll':>16}" for title in columns)
             + f"{strict:>9}{'unparsed':>10}{'left out':>10}" * detailed]
    for suite in dict.fromkeys(suite_of(summary["task"]) for summary in first):
        inside = {i: s for i, s in enumerate(first) if suite_of(s["task"]) == suite}
        if suite != first[min(inside)]["task"]:
            lines.append(f"{suite:<34}{cells(inside)}")
        for i, s in inside.items():
            lines.append(f"  {s['task']:<18}{s['n']:>6}{100 * s['chance']:>8.1f}{cells([i])}")
            if detailed:
                lines[-1] += (f"{with_error(s[strict + '_accuracy'], None):>9}{s['unparsed']:>10}"
                              f"{s.get('nll_left_out', '-'):>10}")
    return "\n".join([*lines, "nll: loss of the right response, nats per token; less is better"])


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
    """Lists of ids, read one at a time -> for each a list: k [T, d_m] of every layer, steered."""
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
        for row, keys in enumerate(keys_of(model, prompts)):
            drawn = replace(steering, dice=torch.tensor([[0, 0, row]], device=keys[0].device))
            for layer, (k, block) in enumerate(zip(keys, model.blocks)):           # k: [T, d_m]
                v = block.memory.values.weight.T                                   # [d_m, d]
                plain = recall(k, v).float()                                       # [T, d]
                moved = recall(drawn.at(layer).change(k[None])[0], v).float() - plain
                totals[layer] += (moved.norm(dim=-1) / plain.norm(dim=-1)).sum().item()
    changes = (totals / sum(map(len, prompts))).tolist()
    return (f"{steering.name} changes what the memories of this model answer by "
            f"{sum(changes) / len(changes):.1%} (mean relative change of the FFN output; per layer "
            f"{' '.join(f'{change:.1%}' for change in changes)})")


# ---------------------------------------------------------------------------------- command

COLUMNS = """
accuracy   in percent, with its standard error, by the rules of LLM-Adapters, to be comparable
chance     what guessing among the allowed answers scores
nll        loss of the right response, in nats per token, with its standard error; less is better
strict     accuracy under a stricter rule, and yet it can be the higher one: where the two differ,
           read the responses
raw        with --score text: accuracy by the texts' likelihood, not by that per character
unparsed   how many responses held no answer
left out   items without an nll: the file has no response, or one that ends in another answer"""


def read_settings(argv=None):
    parser = Parser(prog="eval.py", description=__doc__, epilog=COLUMNS)
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="a run of train.py, or as published")
    add("--task", metavar="A,B",
        help=f"a comma list of: {', '.join(TASKS)}; or of the toy world's: {', '.join(TOY)} "
        "(default, for a model of the toy world: all of its)")
    add("--data", metavar="DIR", help="the folder with TASK/test.json, as python data/prepare.py "
        "makes one (default: data/toy for the toy world's tasks, else data/public); its --help "
        "shows how to add a task of your own")
    add("--score", choices=("generate", "choice", "text", "nll"), help="decode greedily; or "
        "rank by likelihood the allowed answers (\"the correct answer is answer2\") or texts of "
        "options after \"Question: ... Answer:\", which is fair to a model that has never seen "
        "the format; or look at the loss of the right responses alone, which takes a fraction of "
        "the time (default: generate; choice for the toy world's facts)")
    add("--out", metavar="DIR", help="where responses and scores go (default: MODEL/eval)")
    add("--limit", type=positive, metavar="N", help="only the first N items of each task")
    add("--max-new-tokens", type=positive, metavar="N",
        help="(default: 32 for choice tasks, as in LLM-Adapters; 256 for arithmetic, as in the "
        "paper for all, Appendix A)")
    add("--steered", action="store_true", help="keep the steering of the forward pass that the "
        "model was trained with (default: unsteered)")
    add("--change", action="store_true", help="instead of scoring: say how far the default "
        "intervention, in both readings of eq. 4, moves what each layer's memory answers on the "
        "tasks' prompts")
    add("--cache-gb", type=not_negative, default=2.0, metavar="X",
        help="memory for keys and values in decoding (default: 2)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights (default: bfloat16 where the processor multiplies it by itself and "
        "the model is not tiny, else float32)")
    add("--threads", type=positive, metavar="N",
        help="threads on a CPU (default: 1 for the toy world's tasks, else PyTorch's)")
    add("--overwrite", action="store_true", help="score again what has been scored")
    add("--json", action="store_true", help="print the summaries as JSON")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_settings(argv)
    vocabulary = Path(args.model, "tokenizer.json")
    if not args.task and not (vocabulary.is_file() and vocabulary.read_bytes()
                              == Path(TOY_FOLDER, "tokenizer.json").read_bytes()):
        raise BadInput(f"{args.model}: --task says what to score this model on; without it, models "
                       "of the toy world are scored on its tasks")
    names = split_names(args.task or ",".join(TOY), args.data)
    data = args.data or usual_data(names)
    set_threads(args.threads, names)
    if args.change:
        model, tokenizer = load(args.model, device=pick_device(args.device))
        prompts = [tokenizer.encode(example.prompt, special=False) for name in names
                   for example in load_examples(data, name, "test")[:64 // len(names) + 1]]
        for rank_by in RANKINGS:
            print(change_line(model, prompts, Steering("int", rank_by=rank_by)))
        return
    if args.steered and (not METHODS[(kept := steering_of(args.model)).method].change
                         or kept.drawn):
        raise BadInput(f"--steered: {args.model} was not trained with a steering of the forward "
                       "pass (--steer int), or with a random one, so there is none to keep")
    summaries = score(args.model, names, data, args.out, args.score, args.device, args.dtype,
                      args.limit, args.max_new_tokens, args.steered, args.cache_gb, args.overwrite)
    if args.json:
        return print(json.dumps(summaries, indent=2))
    print(side_by_side({"accuracy": summaries}, detailed=True)
          + f"\nEvery response and verdict: {args.out or Path(args.model, 'eval')}/*.jsonl")


if __name__ == "__main__":
    command(main)
