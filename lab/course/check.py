"""Compare what students' code gives with what the reference and the known wrong answers give.

An outcome is what one part of an assignment gave: {case: tensor, "error": text}. Answers are
{name: {part: outcome}}: that of "reference", and of each known wrong answer, named by the sentence
that says what is wrong with it.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import BadInput, read_json, write_whole
from lab.course import EXPECTED, PUBLIC_SEED, ROOT, SHARES, load, title

SECONDS = 20                           # for each part; the reference takes one or two
CLOSE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def outcomes(number, trees, seeds, folder, seconds=SECONDS, **process):
    """Run an assignment's parts on trees {name: tree} -> {seed: answers}. The parts of a single
    tree, a student's, run in a process each. `folder` keeps the outcomes. process: for Popen."""
    jobs = [(str(tree), number, [(part, seed, f"{folder}/{n}-{seed}-{i}.safetensors")
                                 for seed in seeds for i, part in enumerate(load(number).PARTS)])
            for n, tree in enumerate(trees.values())]
    (tree, _, parts), *others = jobs
    if not others:
        jobs = [(tree, number, [part]) for part in parts]
    probe = [sys.executable, "-B", f"{tree}/lab/course/probe.py"]
    with subprocess.Popen(probe, stdin=subprocess.PIPE, text=True, start_new_session=True,
                          **process) as running:
        with suppress(subprocess.TimeoutExpired, OSError):     # students may stop it
            running.communicate(json.dumps({"jobs": jobs, "seconds": seconds}),
                                len(trees) * len(parts) * seconds + 60)
        with suppress(OSError, AttributeError):
            running.kill()
            os.killpg(running.pid, signal.SIGKILL)     # what it left behind; not on Windows
    return {seed: read_answers(number, trees, seed, folder) for seed in seeds}


def read_answers(number, names, seed, folder):
    """The answers of these names, in this order, that probe.py left in a folder."""
    return {name: {part: read_outcome(Path(folder, f"{n}-{seed}-{i}.safetensors"))
                   for i, part in enumerate(load(number).PARTS)} for n, name in enumerate(names)}


def read_outcome(path):                # without the project's own reader, which students change
    with suppress(SafetensorError, OSError, TypeError, KeyError):
        if path.is_file():             # a pipe would let us wait for ever
            with safe_open(path, framework="pt") as file:
                return {**{case: file.get_tensor(case) for case in file.keys()},
                        "error": file.metadata()["error"]}
    return {"error": "Ended: its process ended by itself and left no result"}


def same(one, other):
    """Are two tensors the same but for rounding? A NaN equals a NaN."""
    close = CLOSE.get(one.dtype, 0)
    return one.shape == other.shape and one.dtype == other.dtype and torch.allclose(
        one.double(), other.double(), rtol=close, atol=close, equal_nan=True)


def alike(one, other):
    """Are two outcomes the same in each case, and their errors of a kind?"""
    return one.keys() == other.keys() and all(
        one[case].split(":")[0] == other[case].split(":")[0] if case == "error" else
        same(one[case], other[case]) for case in one)


def diagnose(found, answers):
    """{part: None where it is right, else why not}: the sentence of the known wrong answer that
    gives the same, and of several the one that does so in most parts; or what differs."""
    equal = {name: [part for part in found if alike(found[part], answers[name][part])]
             for name in answers}
    verdicts = {}
    for part, outcome in found.items():
        known = [name for name in equal if part in equal[name]]
        verdicts[part] = (
            None if "reference" in known and not outcome["error"] else
            max(known, key=lambda name: len(equal[name])) if known else
            difference(outcome, answers["reference"][part]))
    return verdicts


def difference(found, reference):
    """The smallest case that differs, in words, with five digits of each number; or the error, if
    all before it are right."""
    cases = found.keys() & reference.keys() - {"error"}
    for case in sorted(cases, key=lambda case: (reference[case].numel(), case)):
        ours, right, where = found[case], reference[case], case[3:]
        if same(ours, right):
            continue
        if ours.shape != right.shape or ours.dtype != right.dtype:
            right, ours = (f"{list(one.shape)} {str(one.dtype)[6:]}" for one in (right, ours))
        elif right.numel() > 8:        # one number of many
            pairs = [*zip(right.flatten(), ours.flatten())]
            at = next(at for at, pair in enumerate(pairs) if not same(*pair))
            where += f", number {at + 1} of {len(pairs)}"
            right, ours = (one.item() for one in pairs[at])
        else:
            right, ours = right.tolist(), ours.tolist()
        return f"{where}: " + re.sub(r"-?\d+\.\d+(e[-+]\d+)?", lambda digits: (
            f"{float(digits[0]):.5g}"), f"expected {right}, found {ours}")
    return found["error"] or "it gives other cases than it should"


def check(number):
    """Print what the public checks say of this tree. Raises BadInput where it is no hand-out."""
    path, points = EXPECTED / f"{number}.json", SHARES["public"] * load(number).POINTS
    if not path.is_file():
        raise BadInput(f"{ROOT}: is no hand-out of assignment {number}; handout makes one")
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(number, {"": ROOT}, [PUBLIC_SEED], folder)[PUBLIC_SEED][""]
    verdicts = diagnose(found, read_answers(number, read_json(path, list), PUBLIC_SEED, EXPECTED))
    each, width = points / len(verdicts), max(map(len, verdicts))
    got = each * [*verdicts.values()].count(None)
    print(f"{title(number)}   {got:.3g} of {points:.3g} public points")
    for part, why in verdicts.items():
        print(f"  {'WRONG' if why else 'ok':<6} {part:<{width}} {0 if why else each:.3g}/{each:.3g}"
              + f"   {why}" * bool(why))
    print("public checks only; hidden ones use other shapes. "
          f"Hint: python -m lab.course hint {number}")


def hint(number):
    """Print the next of an assignment's hints; after the last one, the last one again."""
    path, hints = ROOT / f".hint{number}", load(number).HINTS
    level = min(int(path.read_text()) + 1 if path.is_file() else 1, len(hints))
    write_whole(path, str(level))
    print(f"hint {level} of {len(hints)}: {hints[level - 1]}")
