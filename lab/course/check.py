"""Compare what students' code gives with what the reference and the known wrong answers give.

An outcome is what one part of an assignment gave: {case: tensor, "error": text}. Answers are
{name: {part: outcome}}, and one of them is "reference".
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


def outcomes(number, trees, seeds, folder, seconds=SECONDS, request={}, **process):
    """Run an assignment's parts on trees {name: tree} -> ({seed: answers}, exit status). `folder`
    keeps the outcomes. The parts of a single tree, a student's, run in a process each. request:
    more for probe.py; process: more for Popen."""
    jobs = []
    for n, tree in enumerate(map(str, trees.values())):
        parts = [(part, seed, str(place(folder, n, seed, i)))
                 for seed in seeds for i, part in enumerate(load(number).PARTS)]
        jobs += [(tree, number, some)
                 for some in ([[one] for one in parts] if len(trees) == 1 else [parts])]
    words = [sys.executable, "-B", Path(jobs[0][0], "lab", "course", "probe.py"),
             json.dumps({"jobs": jobs, "seconds": seconds, **request})]
    process |= dict(stdin=subprocess.DEVNULL, start_new_session=True)
    stopped = suppress(subprocess.TimeoutExpired, OSError, AttributeError)
    with subprocess.Popen(words, **process) as running, stopped:
        try:
            running.wait(len(trees) * len(parts) * seconds + 60)       # students may stop it
        finally:
            running.kill()
            os.killpg(running.pid, signal.SIGKILL)     # what it left behind; not on Windows
    return {seed: read_answers(number, trees, seed, folder) for seed in seeds}, running.returncode


def place(folder, n, seed, i):
    """Where the outcome of an answer's part is kept, both by their numbers."""
    return Path(folder, f"{n}-{seed}-{i}.safetensors")


def read_answers(number, names, seed, folder):
    return {name: {part: read_outcome(place(folder, n, seed, i))
                   for i, part in enumerate(load(number).PARTS)} for n, name in enumerate(names)}


def read_outcome(path):
    """What probe.py wrote of a part. Nothing of the project reads it: students change that."""
    with suppress(SafetensorError, OSError, TypeError, KeyError):
        if path.is_file():             # a pipe would let us wait for ever
            with safe_open(path, framework="pt") as file:
                return {"error": file.metadata()["error"],
                        **{case: file.get_tensor(case) for case in file.keys()}}
    return {"error": "Ended: its process left no result"}


# ------------------------------------------------------------------------------- what is wrong


def same(one, other):
    """Are two tensors the same but for rounding? A NaN equals a NaN. Are two errors of a kind?"""
    if isinstance(one, str) and isinstance(other, str):
        return one.split(":")[0] == other.split(":")[0]
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = CLOSE.get(one.dtype, 0)
    return torch.allclose(one.double(), other.double(), rtol=close, atol=close, equal_nan=True)


def alike(one, other):
    """In how many cases are two outcomes the same?"""
    return sum(same(one.get(case), other.get(case)) for case in one | other)


def agree(one, other):
    return alike(one, other) == len(one | other)


def diagnose(found, answers, sentences):
    """{part: None where it is right, else why not}: the sentence of the known wrong answer that
    gives the same, and of several the one that does so in most else; or what differs."""
    likely = sorted(sentences, reverse=True, key=lambda name: sum(
        alike(found[part], outcome) for part, outcome in answers[name].items()))
    verdicts = {}
    for part, outcome in found.items():
        known = [sentences[name] for name in likely if agree(outcome, answers[name][part])]
        right = answers["reference"][part]
        verdicts[part] = None if agree(outcome, right) else [*known, difference(outcome, right)][0]
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


# ----------------------------------------------------------------------------------- commands


def check(number):
    """Print what the public checks say of this tree. Raises BadInput where it is no hand-out."""
    assignment, path = load(number), EXPECTED / f"{number}.json"
    if not path.is_file():
        raise BadInput(f"{ROOT}: is no hand-out of assignment {number}, so there is nothing to "
                       f"check; python -m lab.course handout {number} --out DIR makes one")
    with tempfile.TemporaryDirectory() as folder:
        found, _ = outcomes(number, {"": ROOT}, [PUBLIC_SEED], folder)
    sentences = read_json(path)
    answers = read_answers(number, ["reference", *sentences], PUBLIC_SEED, EXPECTED)
    verdicts = diagnose(found[PUBLIC_SEED][""], answers, sentences)
    points = SHARES["public"] * assignment.POINTS
    each, width = points / len(verdicts), max(map(len, verdicts))
    got = each * [*verdicts.values()].count(None)
    print(f"{number} {title(assignment)}   {got:g} of {points:g} public points")
    for part, why in verdicts.items():
        print(f"  {'WRONG' if why else 'ok':<6} {part:<{width}} {0 if why else each:g}/{each:g}"
              + f"   {why}" * bool(why))
    print("public checks only; hidden ones use other shapes. "
          f"Hint: python -m lab.course hint {number}")


def hint(number):
    """Print the next of an assignment's hints; after the last one, the last one again."""
    path, hints = ROOT / ".hints.json", load(number).HINTS
    seen = read_json(path) if path.is_file() else {}
    level = min(seen.get(str(number), 0), len(hints) - 1)
    write_whole(path, json.dumps({**seen, str(number): level + 1}) + "\n")
    print(f"hint {level + 1} of {len(hints)}: {hints[level]}")
