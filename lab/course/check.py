"""Compare what students' code gives with what the reference and the known wrong answers give.

An outcome is what one part of an assignment gave: (cases {name: tensor} in order, an error or "").
Answers are {name: {part: outcome}}, and one of them is "reference".
"""
import json
import os
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

# -------------------------------------------------------------------------- outcomes, as files


def outcomes(number, trees, seeds, folder, seconds=SECONDS, apart=True, request={}, **process):
    """Run an assignment's parts on trees {name: tree} -> ({seed: answers}, what probe.py printed).
    Outcomes are written to `folder`. apart: each part in a process of its own. request: more for
    probe.py; process: more for Popen."""
    parts = list(load(number).PARTS)
    jobs = [[str(tree), number, [[part, seed, str(place(folder, n, seed, i))]
                                 for seed in seeds for i, part in enumerate(parts)]]
            for n, tree in enumerate(trees.values())]
    if apart:
        jobs = [[tree, number, [one]] for tree, _, several in jobs for one in several]
    program, text = Path(jobs[0][0], "lab", "course", "probe.py"), json.dumps(
        {"jobs": jobs, "seconds": seconds, **request})
    with subprocess.Popen([sys.executable, "-B", program], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE if request else None, start_new_session=True,
                          **process) as running:
        try:
            said, _ = running.communicate(text, len(jobs) * seconds + 60)
        except (subprocess.TimeoutExpired, BrokenPipeError):   # it was stopped, or killed
            said = ""
        running.kill()
        with suppress(OSError, AttributeError):                # what it left behind; not on Windows
            os.killpg(running.pid, signal.SIGKILL)
    return {seed: read_answers(number, trees, seed, folder) for seed in seeds}, said


def place(folder, n, seed, i):
    """Where the outcome of an answer's part is kept, both by their numbers."""
    return Path(folder, f"{n}-{seed}-{i}.safetensors")


def read_answers(number, names, seed, folder):
    return {name: {part: read_outcome(place(folder, n, seed, i))
                   for i, part in enumerate(load(number).PARTS)} for n, name in enumerate(names)}


def read_outcome(path):
    """What probe.py wrote of a part. Nothing of the project reads it: students change that."""
    try:
        if not path.is_file():         # a pipe would let us wait for ever
            return {}, "Ended: the process that ran it ended by itself"
        with safe_open(path, framework="pt") as file:
            return {case: file.get_tensor(case) for case in sorted(file.keys())}, \
                file.metadata()["error"]
    except (SafetensorError, OSError, TypeError, KeyError):
        return {}, "Ended: what it wrote is no result"


# ------------------------------------------------------------------------------- what is wrong


def same(one, other):
    """Are two tensors the same but for rounding? A NaN equals a NaN."""
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = CLOSE.get(one.dtype, 0)
    return torch.allclose(one.double(), other.double(), rtol=close, atol=close, equal_nan=True)


def alike(one, other):
    """The cases in which two outcomes are the same. An error is one more, compared by its kind."""
    (cases, error), (others, another) = one, other
    found = {case for case in cases | others if same(cases.get(case), others.get(case))}
    return found | ({"error"} if error.split(":")[0] == another.split(":")[0] else set())


def agree(one, other):
    return len(alike(one, other)) == len(one[0] | other[0]) + 1


def diagnose(found, answers, sentences):
    """{part: None where it is right, else why not}: the sentence of the known wrong answer that
    gives the same, or the smallest case that differs."""
    common = {name: sum(len(alike(found[part], answer[part])) for part in found)
              for name, answer in answers.items()}
    verdicts = {}
    for part, outcome in found.items():
        known = [name for name in sentences if agree(outcome, answers[name][part])]
        if agree(outcome, answers["reference"][part]):
            verdicts[part] = None
        elif known:                    # of several, the one that is the same in most else
            verdicts[part] = sentences[max(known, key=common.get)]
        else:
            wrong = [(answers[name][part][0], sentences[name])
                     for name in sorted(sentences, key=common.get, reverse=True)]
            verdicts[part] = difference(outcome, answers["reference"][part], wrong)
    return verdicts


def difference(outcome, reference, wrong):
    """The smallest case that differs, in words; and the sentence of a wrong answer that is the same
    there. wrong: [(cases, sentence)], the most likely one first."""
    found, error = outcome
    for case, right in sorted(reference[0].items(), key=lambda item: (item[1].numel(), item[0])):
        ours, where = found.get(case), case[3:]
        if ours is None or same(ours, right):
            continue
        perhaps = next((f"; {why}" for cases, why in wrong if same(ours, cases.get(case))), "")
        if ours.shape != right.shape or ours.dtype != right.dtype:
            right, ours = (f"{list(t.shape)} {str(t.dtype)[6:]}" for t in (right, ours))
        elif right.numel() > 8:        # one number of many
            pairs = zip(ours.flatten(), right.flatten())
            at = next(i for i, pair in enumerate(pairs) if not same(*pair))
            where += f", number {at + 1} of {right.numel()}"
            right, ours = right.flatten()[at].tolist(), ours.flatten()[at].tolist()
        else:
            right, ours = right.tolist(), ours.tolist()
        return f"{where}: expected {short(right)}, found {short(ours)}{perhaps}"
    return error or "it gives other cases than it should"


def short(value):
    if isinstance(value, list):
        return f"[{', '.join(map(short, value))}]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


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
    given = read_json(ROOT / "answers.json") if (ROOT / "answers.json").is_file() else {}
    for key in assignment.WRITTEN:
        if given.get(key) is None:
            print(f"  open   {key}: there is no number for it in answers.json, see README.md")
    print("public checks only; hidden ones use other shapes. "
          f"Hint: python -m lab.course hint {number}")


def hint(number):
    """Print the next of an assignment's hints; after the last one, the last one again."""
    path, hints = ROOT / ".hints.json", load(number).HINTS
    seen = read_json(path) if path.is_file() else {}
    level = min(seen.get(str(number), 0), len(hints) - 1)
    write_whole(path, json.dumps({**seen, str(number): level + 1}) + "\n")
    print(f"hint {level + 1} of {len(hints)}: {hints[level]}")
