"""How evenly does a model use its memories? The premise of the method, layer by layer.

    python -m lab.usage                                            data/toy/llama
    python -m lab.usage --model DIR --task boolq,gsm8k --data data/public --items 300

At each token of a prompt, q = |k| / sum|k| is the share of each memory. Two entropies in nats tell
how many memories are used, and neither can be above log d_m, where all are used alike:

    of tokens    the mean of H(q): how many memories one token uses. `reg` rewards it (eq. 5)
    of the mean  H(mean of q): how many all tokens together use, the knowledge entropy (Kim et al.
                 2025, who average |k| in place of q)

Where the second is near log d_m, no memory is idle: only single tokens leave memories aside.
"""
import json
import math
import os

import torch

from data import Parser, command, positive, progress
from data.tasks import load as load_examples
from eval import TOY_FOLDER, TOY_TRAINING, keys_of, load, pick_device, set_threads, split_names
from infosteer import key_entropy, shares
from lab import machine_flags
from lab.page import columns


def usage(model, texts):
    """Lists of ids -> for each layer, over all tokens: (mean of H(q), H of the mean of q), in
    nats."""
    totals, sums, n = [0.0] * model.config.n_layers, [0.0] * model.config.n_layers, 0
    for keys in keys_of(model, texts):
        for layer, k in enumerate(keys):                                           # [T, d_m]
            totals[layer] += key_entropy(k.float()).sum().item()
            sums[layer] = sums[layer] + shares(k.float()).sum(0, dtype=torch.double)       # [d_m]
        n += len(keys[0])
    return [(total / n, key_entropy(mean / n).item()) for total, mean in zip(totals, sums)]


def main(argv=None):
    parser = Parser(prog="python -m lab.usage", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", default=os.path.relpath(TOY_FOLDER / "llama"),
        help="a run of train.py or a published checkpoint (default: data/toy/llama)")
    add("--task", metavar="A,B", default=TOY_TRAINING,
        help="the tasks whose test prompts are read (default: %(default)s)")
    add("--data", metavar="DIR", default=os.path.relpath(TOY_FOLDER),
        help="the folder with TASK/test.json (default: data/toy)")
    add("--items", type=positive, metavar="N", default=100,
        help="prompts of each task, the first (default: 100)")
    machine_flags(add)
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    names = split_names(args.task, args.data)
    set_threads(args.threads, names)
    examples = [example for name in names
                for example in load_examples(args.data, name, "test")[:args.items]]
    model, tokenizer = load(args.model, device=pick_device(args.device))
    texts = [tokenizer.encode(example.prompt, special=False) for example in examples]
    found = usage(model, progress(texts, desc="reading", unit="text"))
    most, tokens = math.log(model.config.d_m), sum(map(len, texts))
    if args.json:
        return print(json.dumps({
            "model": args.model, "tasks": names, "texts": len(texts), "tokens": tokens,
            "log_d_m": most, "layers": [dict(zip(("of_tokens", "of_the_mean"), of))
                                        for of in found]}))
    mean = tuple(sum(column) / len(found) for column in zip(*found))
    rows = [[name, f"{one:.3f}", f"{all_:.3f}", f"{math.exp(one - most):.0%}",
             f"{math.exp(all_ - most):.0%}"]
            for name, (one, all_) in [*enumerate(found, 1), ("mean", mean)]]
    header = ["layer", "of tokens", "of the mean", "a token uses", "all use"]
    print(f"{args.model}: {tokens:,} tokens in {len(texts):,} prompts of {', '.join(names)}; log "
          f"d_m is {most:.3f} nats ({model.config.d_m:,} memories)\n\n{columns(header, rows)}\n\n"
          "uses: exp of the entropy, as a share of all memories")


if __name__ == "__main__":
    command(main)
