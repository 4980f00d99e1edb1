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
    parts = [(part, seed, f"-{seed}-{i}.safetensors")
             for seed in seeds for i, part in enumerate(load(number).PARTS)]
    jobs = [(str(tree), number, [(part, seed, str(Path(folder, f"{n}{file}")))
                                 for part, seed, file in some])
            for n, tree in enumerate(trees.values())
            for some in ([parts] if len(trees) > 1 else [[one] for one in parts])]
    probe = Path(jobs[0][0], "lab", "course", "probe.py")
    with subprocess.Popen([sys.executable, "-B", probe], stdin=subprocess.PIPE, text=True,
                          start_new_session=True, **process) as running:
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
                return {"error": file.metadata()["error"],
                        **{case: file.get_tensor(case) for case in file.keys()}}
    return {"error": "Ended: its process ended by itself and left no result"}


def same(one, other):
    """Are two tensors the same but for rounding? A NaN equals a NaN. Are two errors of a kind?"""
    if isinstance(one, str) and isinstance(other, str):
        return one.split(":")[0] == other.split(":")[0]
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = CLOSE.get(one.dtype, 0)
    return torch.allclose(one.double(), other.double(), rtol=close, atol=close, equal_nan=True)


def alike(one, other):
    """In what share of the cases are two outcomes the same? 1 if they are."""
    return sum(same(one.get(case), other.get(case)) for case in one | other) / len(one | other)


def diagnose(found, answers):
    """{part: None where it is right, else why not}: the sentence of the known wrong answer that
    gives the same, and of several the one that is most like it in all parts; or what differs."""
    likely = sorted(answers, reverse=True, key=lambda name: sum(
        alike(outcome, answers[name][part]) for part, outcome in found.items()))
    verdicts = {}
    for part, outcome in found.items():
        equal = [name for name in likely if alike(outcome, answers[name][part]) == 1]
        right = "reference" in equal and not outcome["error"]
        verdicts[part] = None if right else next(
            (name for name in equal if name != "reference"),
            difference(outcome, answers["reference"][part]))
    return verdicts


def difference(found, reference):
    """The smallest case that differs, in words; or the error, if all before it are right."""
    cases = found.keys() & reference.keys() - {"error"}
    for case in sorted(cases, key=lambda case: (reference[case].numel(), case)):
        ours, right, where = found[case], reference[case], case[3:]
        if same(ours, right):
            continue
        if ours.shape != right.shape or ours.dtype != right.dtype:
            right, ours = (f"{list(t.shape)} {str(t.dtype)[6:]}" for t in (right, ours))
        elif right.numel() > 8:        # one number of many
            pairs = enumerate(zip(ours.flatten(), right.flatten()), 1)
            at, (ours, right) = next(pair for pair in pairs if not same(*pair[1]))
            where += f", number {at} of {reference[case].numel()}"
        return f"{where}: expected {short(right)}, found {short(ours)}"
    return found["error"] or "it gives other cases than it should"


def short(thing):
    """A tensor's numbers with five digits each; a text as it is."""
    text = str(thing.tolist() if torch.is_tensor(thing) else thing)
    return re.sub(r"-?\d+\.\d+(e[-+]\d+)?", lambda number: f"{float(number[0]):.5g}", text)


def check(number):
    """Print what the public checks say of this tree. Raises BadInput where it is no hand-out."""
    path, points = EXPECTED / f"{number}.json", SHARES["public"] * load(number).POINTS
    if not path.is_file():
        raise BadInput(f"{ROOT}: is no hand-out of assignment {number}, so there is nothing to "
                       f"check; python -m lab.course handout {number} --out DIR makes one")
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(number, {"": ROOT}, [PUBLIC_SEED], folder)[PUBLIC_SEED][""]
    names = read_json(path, list)
    verdicts = diagnose(found, read_answers(number, names, PUBLIC_SEED, EXPECTED))
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
