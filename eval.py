"""Score a model on the paper's tasks.

    python eval.py --model out/boolq-reg --task boolq,ARC-Easy --data data/public

Every response is kept beside its verdict in MODEL/eval/, and an interrupted evaluation goes on where it stopped. The model runs
unsteered, as in the paper, unless --steered keeps the intervention it was trained with.
"""
import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import BadInput, read_json
from data.tasks import TASKS, TRIGGER, chance, judge, load as load_examples
from data.tokenizer import Tokenizer
from infosteer import Steering
from model import Transformer

CHUNK = 256                            # items answered between two writes to disk

# --------------------------------------------------------------------------------------------- shared with train.py


class Parser(argparse.ArgumentParser):
    """Command lines whose errors are one line, and whose flags are never guessed from a prefix."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def command(main):
    """Run a command's main(): what the user got wrong becomes one line on standard error and exit status 2."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print(f"{name}: error: out of GPU memory; first lower --micro-tokens (training) or --cache-gb (evaluation), "
              "then add --checkpoint (training)", file=sys.stderr)
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
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder, dtype=torch.float32, device="cpu"):
    """A checkpoint folder -> (model, tokenizer), checked to fit together. Raises BadInput."""
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder; --model takes a checkpoint folder as published (config.json, safetensors, tokenizer files)")
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Transformer.from_pretrained(folder, dtype, device)
    if tokenizer.max_id >= model.config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has ids up to {tokenizer.max_id}, but the embedding ends at "
                       f"{model.config.vocab_size - 1}; these are not the tokenizer files of this model")
    if tokenizer.eos_id is None:
        raise BadInput(f"{folder}: the tokenizer names no end-of-sequence token; set eos_token in tokenizer_config.json")
    model.config = model.config.with_eos(tokenizer.eos_id)      # what training appends to a response must stop the decoding
    return model, tokenizer


def split_names(text):
    """"a,b" -> ["a", "b"], refusing repetitions."""
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names) or "" in names:
        raise BadInput(f"--task {text}: a comma list of different task names is needed; known are {', '.join(TASKS)}")
    return names


def read_run(folder):
    """A run's settings, or {} where `folder` is no run of train.py."""
    path = Path(folder, "args.json")
    return read_json(path) if path.is_file() else {}


def write_whole(path, text):
    """Write a file so that it is either there completely or not at all."""
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
        stop = set(model.config.eos_ids)
        return [tokenizer.decode([i for i in ids if i not in stop]) for ids in outputs]
    responses = [[f"{TRIGGER}{choice}" for choice in example.choices] for example in examples]
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
    with open(part, "w", encoding="utf-8") as file, tqdm(
            total=len(examples), initial=len(lines), desc=settings["task"], unit="item", disable=None) as bar:
        file.write("".join([head + "\n"] + [json.dumps(item) + "\n" for item in lines.values()]))
        for start in range(0, len(pending), CHUNK):
            chunk = pending[start:start + CHUNK]
            for example, response in zip(chunk, answer(
                    model, tokenizer, chunk, settings["score"], settings["max_new_tokens"], steering, cache_bytes, bar)):
                item = {"index": example.index, "prompt": example.prompt, "response": response, "answer": example.answer,
                        **judge(example, response)}
                lines[example.index] = item
                file.write(json.dumps(item) + "\n")
            file.flush()
    items = [lines[example.index] for example in examples]
    summary = {**settings, **summarise(items), "chance": chance(examples)}
    write_whole(path, "".join(json.dumps(item) + "\n" for item in items))
    write_whole(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
    part.unlink()
    return summary


def summarise(items):
    """n, accuracy and its standard error sqrt(p (1 - p) / n), strict accuracy, and how many responses held no answer at all."""
    n = len(items)
    accuracy = sum(item["correct"] for item in items) / n
    return {"n": n, "accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
            "strict_accuracy": sum(item["strict_correct"] for item in items) / n,
            "unparsed": sum(item["prediction"] is None for item in items)}


def table(summaries):
    """Summaries -> the lines of a table for people."""
    lines = [f"{'task':<14}{'n':>6}  {'accuracy':>14}  {'chance':>7}  {'strict':>7}  {'unparsed':>8}"]
    for s in summaries:
        lines.append(f"{s['task']:<14}{s['n']:>6}  {s['accuracy']:>7.1%} ± {s['standard_error']:>4.1%}  {s['chance']:>7.1%}  "
                     f"{s['strict_accuracy']:>7.1%}  {s['unparsed']:>8}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- command


def main():
    parser = Parser(prog="eval.py", description=__doc__, epilog="""
The columns: accuracy with its standard error; chance, what guessing among the allowed answers scores; strict, the accuracy under a
stricter rule for finding the answer in a response (accuracy uses the rule of LLM-Adapters, to be comparable); unparsed, how many
responses held no answer.""")
    parser.add_argument("--model", required=True, metavar="DIR", help="a run of train.py or a published checkpoint")
    parser.add_argument("--task", required=True, metavar="A,B", help=f"a comma list of: {', '.join(TASKS)}")
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder with TASK/test.json (python data/prepare.py makes one)")
    parser.add_argument("--score", choices=("generate", "choice"), default="generate",
                        help="decode greedily, or rank a choice task's allowed answers by likelihood, which is fair to a model that has "
                             "never seen the format (default: generate)")
    parser.add_argument("--out", metavar="DIR", help="where responses and scores go (default: MODEL/eval)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N items of each task")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="(default: the paper's, 32 for choice tasks, 256 for arithmetic)")
    parser.add_argument("--steered", action="store_true", help="keep the intervention that the model was trained with (the paper removes it)")
    parser.add_argument("--cache-gb", type=finite, default=2.0, metavar="X", help="memory for keys and values in decoding (default: 2)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the weights (default: bfloat16 on cuda, else float32)")
    parser.add_argument("--overwrite", action="store_true", help="score again what has been scored")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    args = parser.parse_args()

    tasks = {}
    for name in split_names(args.task):
        tasks[name] = load_examples(args.data, name, "test")[:args.limit]
        if args.score == "choice" and TASKS[name].kind != "choice":
            raise BadInput(f"--score choice: {name} has no short list of answers to rank; use --score generate")
    device = pick_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    steering = None
    if args.steered:
        settings = read_run(args.model).get("steering", {})
        if settings.get("method") != "int":
            raise BadInput(f"--steered: {args.model} was not trained with an intervention (--steer int), so there is none to keep")
        steering = Steering(**{**settings, "layers": settings["layers"] and tuple(settings["layers"])})

    out = Path(args.out or Path(args.model, "eval"))
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(Path(args.model).glob("*.safetensors"))]
    summaries, model = [], None
    for name, examples in tasks.items():
        text = json.dumps([[e.prompt, e.answer] for e in examples])
        settings = {"task": name, "score": args.score, "dtype": args.dtype, "steered": args.steered,
                    "max_new_tokens": args.max_new_tokens or TASKS[name].max_new_tokens, "model": args.model,
                    "items_sha256": hashlib.sha256(text.encode()).hexdigest(), "weights": weights}
        variant = "".join(["-choice" * (args.score == "choice"), "-steered" * args.steered, f"-first{args.limit}" * bool(args.limit)])
        path = out / f"{name}{variant}.jsonl"
        done = path.with_suffix(".json")
        if done.is_file() and not args.overwrite:
            summary = read_json(done)
            if any(summary.get(key) != value for key, value in settings.items() if key != "model"):
                raise BadInput(f"{done}: holds scores of other weights, items or settings; --overwrite replaces them, --out puts these elsewhere")
            print(f"{name}: scored before, in {path}; --overwrite scores again", file=sys.stderr)
        else:
            if model is None:
                model, tokenizer = load(args.model, getattr(torch, args.dtype), device)
            summary = evaluate(model, tokenizer, examples, path, settings, steering, int(args.cache_gb * 2**30))
        summaries.append(summary)
    print(json.dumps(summaries, indent=2) if args.json else f"{table(summaries)}\nEvery response and verdict: {out}/*.jsonl")


if __name__ == "__main__":
    command(main)
