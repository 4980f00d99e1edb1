"""Key regions: where fine-tuning moves the key coefficients (paper, section 6, Fig. 4).

    python -m lab.regions --runs out        the base model and its fine-tuned runs in the folder out

In each layer, the 25th and the 75th percentile of the base model's coefficients are the ends of a
low, a middle and a high region. The shares of the regions are 25%, 50% and 25% in the base model.
A run is asked what share of its own coefficients falls into each. There are two readings:

    |k|   low is idle, high is very active
    k     the literal reading: low is strongly negative, which is very active too
"""
import json
import os
from itertools import product

import torch

from data import BadInput, Parser, command, positive, progress
from data.tasks import load as load_examples
from eval import (TOY_FOLDER, TOY_TRAINING, keys_of, load, pick_device, set_threads, split_names)
from infosteer import Steering
from lab import machine_flags, steerings_of
from lab.page import columns, visible
from lab.stats import interval, left_out, points, runs_from, with_error

REGIONS = ("low", "middle", "high")
SAMPLE = 2**22                         # coefficients of a layer are enough for a percentile


@torch.inference_mode()
def key_regions(model, texts, cuts=None, steering=Steering()):
    """The share of |k| and of k, steered, in each region -> (shares [n_layers, 2, 3], cuts).

    cuts: the ends of the regions, [n_layers, 2, 2]. None: the percentiles of this model.
    """
    if cuts is None:
        cuts = percentiles(model, texts)
    counts = torch.zeros(model.config.n_layers, 2, 3, dtype=torch.float64)
    for keys in keys_of(model, texts, steering):
        for layer, k in enumerate(keys):                                       # [T, d_m]
            for reading, of in enumerate((k.float().abs(), k.float())):
                regions = torch.bucketize(of, cuts[layer, reading].to(k.device))
                counts[layer, reading] += regions.flatten().bincount(minlength=3).cpu()
    return counts / counts.sum(-1, keepdim=True), cuts


def percentiles(model, texts):
    """The 25th and the 75th percentile of |k| and of k: [n_layers, 2, 2]."""
    every = -(-sum(map(len, texts)) * model.config.d_m // SAMPLE)
    found = [[k.float().flatten()[::every].cpu().clone() for k in keys]
             for keys in keys_of(model, texts)]                                # text, layer
    layers, ends = map(torch.cat, zip(*found)), torch.tensor([0.25, 0.75])
    return torch.stack([torch.stack([k.abs().quantile(ends), k.quantile(ends)]) for k in layers])


def regions_of(model, runs, task_names, data, n, device, say=left_out, steered=False):
    """The regions of a base model, given by its folder, and of its runs, as runs_from gives them,
    on the prompts and correct responses of n test items of the tasks. A run that cannot be loaded
    is taken out of `runs`, with a line. steered: runs keep the steering of their forward pass.

    -> {"model", "tasks", "texts", "tokens", "cuts", "arms"}. Each arm has shares [2, 3] over all
    layers ("mean", "standard_error", "by_seed") and shares [n_layers, 2, 3] ("layers",
    "layers_standard_error"), as lists. An error is None for one seed.
    """
    base, tokenizer = load(model, device=device)
    each = max(1, n // len(task_names))
    examples = [example for name in task_names
                for example in load_examples(data, name, "test")[:each]]
    texts = [tokenizer.encode(example.prompt, special=False)
             + tokenizer.encode(example.response, bos=False, special=False) for example in examples]
    shares, cuts = key_regions(base, texts)
    arms, folders = {"base": {None: shares}}, [run["folder"] for run in runs]
    steerings = steerings_of(folders, device) if steered else [Steering()] * len(runs)
    for run, steering in zip(progress(runs[:], desc="key regions", unit="model"), steerings):
        try:
            tuned, _ = load(run["folder"], device=device)
        except BadInput as error:
            say(error)
            runs.remove(run)
        else:
            shares, _ = key_regions(tuned, texts, cuts, steering)
            arms.setdefault(run["arm"], {})[run["seed"]] = shares
    return {"model": str(model), "tasks": task_names, "steered": steered, "texts": len(texts),
            "tokens": sum(map(len, texts)), "cuts": cuts.tolist(),
            "arms": {arm: over_seeds(by_seed) for arm, by_seed in arms.items()}}


def over_seeds(by_seed):
    """{seed: shares [n_layers, 2, 3]} -> the entry of an arm in `regions_of`."""
    shares = torch.stack(list(by_seed.values()))                               # [seeds, L, 2, 3]

    def error(x):
        return (x.std(0) / len(x) ** 0.5).tolist() if len(x) > 1 else None

    return {"seeds": len(shares),
            "mean": shares.mean((0, 1)).tolist(), "standard_error": error(shares.mean(1)),
            "layers": shares.mean(0).tolist(), "layers_standard_error": error(shares),
            "by_seed": {seed: one.mean(0).tolist() for seed, one in by_seed.items()}}


def shifts(arms):
    """How fine-tuning changes the shares of |k|: [[arm, "base" or "none", the `estimate` of the
    change from it in each region]], paired by seed. arms: {arm: {"by_seed": {seed: [2, 3]}}}."""
    found = []
    for arm, against in product([arm for arm in arms if arm != "base"], ("base", "none")):
        other = arms[against]["by_seed"] if against in arms and against != arm else {}
        pairs = [(of[0], other.get(None if against == "base" else seed))
                 for seed, of in arms[arm]["by_seed"].items()]
        gaps = [[x - y for x, y in zip(one, of[0])] for one, of in pairs if of]
        found += [[arm, against, *map(interval, zip(*gaps))]] * bool(gaps)
    return found


def shift_lines(result):
    """The `shifts` as header and lines of a table."""
    return ["shift of |k|, in points", "from", *REGIONS], [
        [arm, against, *map(points, changes)] for arm, against, *changes in
        shifts(result["arms"])]


def regions_text(result, per_layer=False):
    parts = [f"{visible(result['model'])}: share of the key coefficients in the base model's "
             "regions, in %\n"
             f"mean over layers ± standard error over seeds; {result['texts']} test items of "
             f"{', '.join(result['tasks'])}; runs {'' if result['steered'] else 'un'}steered"]
    for reading, title in enumerate(("|k|: low is idle", "k: low is strongly negative")):
        rows = []
        for arm, found in result["arms"].items():
            shown = [(arm, found["seeds"], found["mean"], found["standard_error"])]
            errors = found["layers_standard_error"] or [None] * len(found["layers"])
            if per_layer:
                shown += [(f"  layer {layer}", None, *both)
                          for layer, both in enumerate(zip(found["layers"], errors), 1)]
            rows += [[name, seeds, *map(with_error, shares[reading],
                                        error[reading] if error else [None] * 3)]
                     for name, seeds, shares, error in shown]
        parts.append(columns([title, "seeds", *REGIONS], rows))
    parts.append(columns(*shift_lines(result)))
    return "\n\n".join(parts)


def main(argv=None):
    parser = Parser(prog="python -m lab.regions", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", default=os.path.relpath(TOY_FOLDER / "llama"),
        help="the base model that the runs began with (default: data/toy/llama)")
    add("--runs", metavar="DIR", default="out", help="the folder of the runs (default: out)")
    add("--task", metavar="A,B", default=TOY_TRAINING,
        help="the tasks whose test items are read (default: %(default)s)")
    add("--data", metavar="DIR", default=TOY_FOLDER,
        help="the folder with TASK/test.json (default: data/toy)")
    add("--items", type=positive, metavar="N", default=100, help="items to read (default: 100)")
    add("--per-layer", action="store_true", help="show each layer too")
    add("--steered", action="store_true", help="runs keep the steering of the forward pass that "
        "they were trained with (default: unsteered)")
    machine_flags(add)
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    names = split_names(args.task, args.data)
    set_threads(args.threads, names)
    runs = runs_from(args.runs, args.model)
    if not runs:
        raise BadInput(f"--runs {args.runs}: no finished run of train.py that began with "
                       f"{args.model}; python -m lab.experiment --steer none int reg makes some")
    result = regions_of(args.model, runs, names, args.data, args.items, pick_device(args.device),
                        steered=args.steered)
    print(json.dumps(result, indent=2) if args.json else regions_text(result, args.per_layer))


if __name__ == "__main__":
    command(main)
