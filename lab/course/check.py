"""Compare what students' code gives with what the reference and the known wrong answers give.

An outcome is what one part of an assignment gave: (cases, error), with cases {name: tensor} in
order, and error a line of text or "". Answers are {name: {part: outcome}}; "reference" is one.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import BadInput, read_json, write_whole
from lab.course import EXPECTED, PUBLIC_SEED, ROOT, SHARES, load, title

SECONDS = 20                           # for each part of an assignment; the reference takes one
CLOSE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# ----------------------------------------------------------------------------------- outcomes


def request(jobs, tree=ROOT, **more):
    """Run jobs of `probe.py` -> what it printed. jobs: [(tree, number, [(part, seed, file)])]."""
    text = json.dumps({"jobs": [[str(where), number, [[part, seed, str(file)] for part, seed, file
                                                      in parts]] for where, number, parts in jobs],
                       **more})
    program = [sys.executable, "-B", str(Path(tree, "lab", "course", "probe.py"))]
    return subprocess.run(program, input=text, text=True, check=False, capture_output="write" in more)


def read_tensors(path):
    """-> ({name: tensor}, about). It is not `model.read_tensors`: students change model.py."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata()


def read_outcome(path):
    """What `probe.py` wrote for one part."""
    try:
        if not Path(path).is_file():   # a pipe would let us wait for ever
            return {}, "Ended: the process that ran it ended by itself"
        cases, about = read_tensors(path)
        return cases, about["error"]
    except (SafetensorError, OSError, TypeError, KeyError):
        return {}, "Ended: it wrote something that is no result"


def same(one, other):
    """Are two tensors the same but for rounding? A NaN equals a NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = CLOSE.get(one.dtype, 0)
    return torch.allclose(one.double(), other.double(), rtol=close, atol=close, equal_nan=True)


def agree(one, other):
    """Are two outcomes the same? Of errors only their kind is compared."""
    return (one[0].keys() == other[0].keys() and one[1].split(":")[0] == other[1].split(":")[0]
            and all(same(one[0][case], other[0][case]) for case in one[0]))


def diagnose(found, answers, sentences):
    """{part: None where it is right, else a sentence}: of the known wrong answer that gives the
    same; if there are several, of the one that is the same in most parts."""
    alike = {name: {part for part in found if agree(found[part], answer[part])}
             for name, answer in answers.items()}
    verdicts = {}
    for part, outcome in found.items():
        known = [name for name in answers if name != "reference" and part in alike[name]]
        best = max(known, key=lambda name: len(alike[name]), default=None)
        verdicts[part] = (None if part in alike["reference"] else sentences[best] if best
                          else difference(outcome, answers["reference"][part]))
    return verdicts


def difference(found, expected):
    """The smallest case that differs, in words."""
    for case in sorted(expected[0], key=lambda case: (expected[0][case].numel(), case)):
        name, right, ours = case[3:], expected[0][case], found[0].get(case)
        if ours is None:
            continue
        if ours.shape != right.shape or ours.dtype != right.dtype:
            return (f"{name}: expected {str(right.dtype)[6:]} {list(right.shape)}, "
                    f"found {str(ours.dtype)[6:]} {list(ours.shape)}")
        if not same(ours, right):
            off = ~torch.tensor([same(*pair) for pair in zip(ours.flatten(), right.flatten())])
            if right.numel() > 8:      # one number of many
                at = off.nonzero()[0, 0]
                place = [int(i[0]) for i in torch.unravel_index(at[None], right.shape)]
                name, ours, right = f"{name}, at {place}", ours.flatten()[at], right.flatten()[at]
            return f"{name}: expected {short(right)}, found {short(ours)}"
    return found[1] or "it gives more cases than there are"


def short(tensor):
    numbers = [f"{x:.5g}" for x in tensor.flatten().tolist()]
    return numbers[0] if tensor.dim() == 0 else f"[{', '.join(numbers)}]"


def save_answers(answers, sentences, path):
    """Keep the outcomes of answers: numbers and sentences, no code."""
    tensors = {f"{name}\t{part}\t{case}": tensor for name, answer in answers.items()
               for part, (cases, _) in answer.items() for case, tensor in cases.items()}
    errors = {name: {part: error for part, (_, error) in answer.items()}
              for name, answer in answers.items()}
    Path(path).parent.mkdir(exist_ok=True)
    save_file(tensors, path, {"errors": json.dumps(errors), "sentences": json.dumps(sentences)})


def read_answers(path):
    """-> answers, sentences, as `save_answers` was given them. Raises BadInput."""
    tensors, about = read_tensors(path)
    answers = {name: {part: ({}, error) for part, error in errors.items()}
               for name, errors in json.loads(about["errors"]).items()}
    for key, tensor in tensors.items():
        name, part, case = key.split("\t")
        answers[name][part][0][case] = tensor
    return answers, json.loads(about["sentences"])


# ----------------------------------------------------------------------------------- commands


def table(found, verdicts, points):
    """The lines of the parts: (points that are got, text)."""
    each, lines = points / len(found), []
    for part, why in verdicts.items():
        lines.append(f"  {'WRONG' if why else 'ok':<6} {part:<28} "
                     f"{0 if why else each:g}/{each:g}" + f"   {why}" * bool(why))
    return each * sum(why is None for why in verdicts.values()), lines


def check(number):
    """Print what the public checks say of this tree. Raises BadInput where it is no hand-out."""
    assignment, path = load(number), EXPECTED / f"{number}.safetensors"
    if not path.is_file():
        raise BadInput(f"{ROOT}: is not the hand-out of assignment {number}, so there is nothing to"
                       f" check against; python -m lab.course handout {number} --out DIR makes one")
    answers, sentences = read_answers(path)
    with tempfile.TemporaryDirectory() as folder:
        files = {part: Path(folder, str(i)) for i, part in enumerate(assignment.PARTS)}
        request([(ROOT, number, [(part, PUBLIC_SEED, file)]) for part, file in files.items()],
                seconds=SECONDS)
        found = {part: read_outcome(file) for part, file in files.items()}
    points = SHARES["public"] * assignment.POINTS
    got, lines = table(found, diagnose(found, answers, sentences), points)
    print(f"{number} {title(assignment)}   {got:g} of {points:g} public points", *lines, sep="\n")
    given = read_json(ROOT / "answers.json") if (ROOT / "answers.json").is_file() else {}
    for key in assignment.WRITTEN:
        if given.get(key) is None:
            print(f"  open   {key}: answers.json has no number yet; see README.md")
    print("public checks only; hidden ones use other shapes. "
          f"Hint: python -m lab.course hint {number}")


def hint(number):
    """Print the next of three hints, and the last one again."""
    seen = read_json(ROOT / ".hints.json") if (ROOT / ".hints.json").is_file() else {}
    hints, level = load(number).HINTS, seen.get(str(number), 0)
    write_whole(ROOT / ".hints.json", json.dumps({**seen, str(number): level + 1}) + "\n")
    level = min(level, len(hints) - 1)
    print(f"hint {level + 1} of {len(hints)}: {hints[level]}")
