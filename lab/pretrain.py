"""Make one of the tiny models in data/toy from nothing, byte for byte as they ship.

    python -m lab.pretrain llama --overwrite           again where it is, in data/toy/llama
    python -m lab.pretrain qwen --seed 1 --out out/qwen-seed1

A new model of the shipped one's shape (data/toy/NAME/config.json) reads the text of the toy world
once. The text is packed: documents follow each other, each ended by the end-of-sequence token, and
every row is full. The loop is train.py's. It takes about a quarter of an hour on one core. What the
model then knows stands beside it in pretraining.json.
"""
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import train
from data import Parser, command, positive, progress, write_whole
from data.world import DOCUMENTS, World, documents
from eval import TOY_FOLDER, load, score
from model import Config, Transformer

PRETRAIN = {"epochs": 1, "batch": 32, "max-length": 129, "lr": 2e-3, "warmup": 100,
            "weight-decay": 0.01, "clip": 1.0, "micro-tokens": 4096}
FAMILIES = ("llama", "qwen", "gemma")


def new_model(family, seed, folder):
    """Write a model folder of the shipped one's shape, with new weights."""
    shipped = TOY_FOLDER / family
    Transformer(Config.from_pretrained(shipped)).initialise(seed).save_pretrained(folder)
    shutil.copyfile(shipped / "tokenizer.json", folder / "tokenizer.json")


def packed(texts, tokenizer, length):
    """Texts -> rows of `length` ids as train.encode makes them, all ids but the first supervised.

    The last id of a row is a target only, and the first id of the next row.
    """
    ids, start = [], 0
    for text in texts:
        ids += tokenizer.encode(text, special=False) + [tokenizer.eos_id]
        while len(ids) > start + length - 1:
            yield ids[start:start + length], 1
            start += length - 1


def describe(args):
    """Write pretraining.json: how the model was made, and how much it knows."""
    settings = json.loads(Path(args.out, "args.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        cloze = score(args.out, ["toy-cloze"], TOY_FOLDER, folder, device=args.device)[0]
    about = {
        "command": args.command, "seed": args.seed, "versions": settings["versions"],
        "threads": torch.get_num_threads(), "steps": len(log),
        "tokens": sum(line["tokens"] for line in log), "rows_sha256": settings["data_sha256"],
        "final_loss": sum(line["lm_loss"] for line in log[-50:]) / len(log[-50:]),
        "cloze_accuracy": cloze["accuracy"], "cloze_items": cloze["n"],
        "cloze_standard_error": cloze["standard_error"]}
    text = json.dumps(about, indent=2) + "\n"
    write_whole(Path(args.out, "pretraining.json"), text)
    print(text, end="")


def main(argv=None):
    parser = Parser(prog="lab.pretrain", description=__doc__)
    add = parser.add_argument
    add("family", choices=FAMILIES, help="whose shape the model has")
    add("--out", metavar="DIR", help="where the model goes (default: data/toy/FAMILY)")
    add("--steps", type=positive, metavar="N", help="stop after N steps (default: all the text)")
    add("--limit", type=positive, metavar="N", help="only the first N rows of the text")
    add("--seed", type=int, default=0, help="the first weights, and the order of the rows "
        "(default: 0, as the shipped models)")
    add("--save-every", type=positive, metavar="N", help="save the state of the run every N steps")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--overwrite", action="store_true", help="replace a finished or interrupted run at --out")
    own = parser.parse_args(argv)

    out = own.out or os.path.relpath(TOY_FOLDER / own.family)
    untrained = Path(f"{out}.untrained")           # the model that the run starts from
    recipe = [f"--{name}={value}" for name, value in PRETRAIN.items()]
    for name in ("steps", "limit", "save_every"):
        if getattr(own, name):
            recipe.append(f"--{name.replace('_', '-')}={getattr(own, name)}")
    args = train.read_settings([
        "--model", str(untrained), "--task", "text", "--data", os.path.relpath(TOY_FOLDER),
        "--out", out, f"--seed={own.seed}", "--threads=1", "--device=cpu", *recipe,
        *["--resume"] * own.resume, *["--overwrite"] * own.overwrite])
    args.command = shlex.join(["python", "-m", "lab.pretrain", *(argv or sys.argv[1:])])

    def text_of_the_world(args):
        """What train.py needs of its data, as `train.fine_tuning_data` returns it."""
        new_model(own.family, own.seed, untrained)
        model, tokenizer = load(untrained)
        texts = progress(documents(World()), total=DOCUMENTS, desc="writing the toy world",
                         unit="document")
        rows = list(itertools.islice(packed(texts, tokenizer, args.max_length), own.limit))
        return model, tokenizer, rows, [f"row {row} of the text" for row in range(len(rows))], ""

    torch.set_num_threads(1)                       # other numbers add floats in another order
    try:
        train.train(args, data=text_of_the_world)
    finally:
        shutil.rmtree(untrained, ignore_errors=True)
    describe(args)


if __name__ == "__main__":
    command(main)
