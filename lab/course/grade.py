"""Grade a student's tree: `python -m lab.course grade DIR 2 --results results.json`.

The student's definitions are grafted onto a clean hand-out. `probe.py` runs them there, in processes
of their own that can read neither the reference nor the seed's file. When these are gone, the
reference runs at the same seeds, and this process compares. Until then results.json says zero.
"""
import ast
import inspect
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from data import BadInput, read_json, write_whole
from lab.course import PUBLIC_SEED, ROOT, SHARES, load, title
from lab.course.check import SECONDS, diagnose, read_outcome, request, save_answers
from lab.course.handout import body_of, bound, make_tree, rewrite, span, split

PACKAGES = {"torch", "tiktoken", "safetensors", "numpy", "tqdm", "pytest"}
OURS = {"infosteer", "model", "train", "eval", "data", "lab"}

# ------------------------------------------------------------------------------------ grafting


def merged(clean, student, wanted, removed):
    """A clean file with the definitions `wanted` of a student's, and all that the student's adds:
    texts and names -> text. Raises BadInput, SyntaxError or ValueError."""
    lines = student.splitlines(keepends=True)
    owners = sorted({name.rpartition(".")[0] for name in wanted} | {""}, reverse=True)
    for owner in owners:               # classes first, then the file itself
        own = [name.rpartition(".")[2] for name in wanted if name.rpartition(".")[0] == owner]
        here = set().union(*map(bound, body_of(clean, owner)))
        known, prefix = here - {*own} - removed, owner and owner + "."
        try:
            body = body_of(student, owner)
        except BadInput:
            body = []
        taken = [node for node in body if bound(node) - known]
        names = set().union(*map(bound, taken))
        refuse_others(taken)
        text = "".join("".join(lines[slice(*span(node, lines))]) + "\n" * (1 + (not owner))
                       for node in taken)
        anchor, kept = own[0] if own else wanted[0].split(".")[0], ""
        for name in sorted((names & here & ({*own} | removed)) - {anchor}):
            clean = rewrite(clean, prefix + name, lambda node: "")
        if not own:                    # only methods are wanted: what is added goes before the class
            where = [node for node in body_of(clean, "") if anchor in bound(node)][0]
            kept = "".join(clean.splitlines(keepends=True)[where.lineno - 1:where.end_lineno])
        clean = rewrite(clean, prefix + anchor, lambda node: text + kept)
    return clean


def refuse_others(nodes):
    """Raises BadInput if statements import a package that is not among the six."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        names = ([name.name for name in node.names] if isinstance(node, ast.Import)
                 else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        for name in (name.split(".")[0] for name in names):
            if name not in PACKAGES | OURS | sys.stdlib_module_names:
                raise BadInput(f"imports {name}, which is no package of requirements.txt")


def defines(source, name):
    owner, _, own = name.rpartition(".")
    try:
        return own in set().union(*map(bound, body_of(source, owner)))
    except BadInput:                   # there is not even the class
        return False


def graft(number, clean, answers, out):
    """Make the tree `out`: `clean` with the definitions of some answers {file: text}, one after the
    other, as `merged` takes them. Raises BadInput."""
    assignment, out = load(number), Path(out)
    shutil.copytree(clean, out, ignore=shutil.ignore_patterns("toy", "golden", "expected"))
    for folder in ("data/toy", "tests/golden"):
        os.symlink(Path(clean, folder), out / folder)
    removed = {split(name)[1] for name in assignment.REMOVE}
    for file, name in map(split, assignment.BLANK):
        if not any(file in one for one in answers):
            raise BadInput(f"{file}: is not there")
    for file, text in (item for one in answers for item in one.items()):
        names = [split(name)[1] for name in assignment.BLANK if split(name)[0] == file]
        try:
            if names != [""]:
                names = [name for name in names if defines(text, name)]
                text = merged((out / file).read_text("utf-8"), text, names, removed)
            write_whole(out / file, text)
        except (BadInput, SyntaxError, ValueError) as error:   # ValueError: null bytes
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise BadInput(f"{file}{line}: {error.args[0]}") from None
    return out


def files_of(number, tree):
    """What an assignment takes from a student's tree: {file: text}. Raises BadInput."""
    texts = {}
    for file in dict.fromkeys(split(name)[0] for name in load(number).BLANK):
        path = Path(tree, file)
        if not path.is_file() or path.stat().st_size > 2**20:
            raise BadInput(f"{file}: is not there, or larger than a megabyte")
        texts[file] = path.read_bytes().decode("utf-8", errors="replace")
    return texts


# ------------------------------------------------------------- the reference and known answers


def known_answers(number):
    """The reference and the known answers: {name: [{file: text}, ...]} as `graft` takes them. What an
    answer does not define is the reference's."""
    assignment = load(number)
    whole = getattr(assignment, "REFERENCE", None) or files_of(number, ROOT)
    answers = {"reference": [whole]}
    texts = {**assignment.RIGHT, **{name: text for name, (_, text) in assignment.WRONG.items()}}
    for name, text in texts.items():
        answers[name] = [whole, text if isinstance(text, dict) else {next(iter(whole)): text}]
    return answers


def outcomes(number, clean, answers, seeds, folder, **limits):
    """What answers give: {seed: {name: {part: outcome}}}. All trees are made in `folder`."""
    parts, jobs = load(number).PARTS, []
    files = {(name, seed, part): Path(folder, f"{n}-{seed}-{i}")
             for n, name in enumerate(answers) for seed in seeds for i, part in enumerate(parts)}
    for n, (name, answer) in enumerate(answers.items()):
        tree = graft(number, clean, answer, Path(folder, f"tree{n}")) if answer else clean
        jobs.append((tree, number, [(part, seed, files[name, seed, part])
                                    for seed in seeds for part in parts]))
    request(jobs, clean, **limits)
    return {seed: {name: {part: read_outcome(files[name, seed, part]) for part in parts}
                   for name in answers} for seed in seeds}


def sentences_of(number):
    return {name: sentence for name, (sentence, _) in load(number).WRONG.items()}


def write_expected(number, folder, clean):
    """What a hand-out knows of the right and the wrong answers: numbers for the public seed."""
    with tempfile.TemporaryDirectory() as work:
        answers = known_answers(number)
        for name in load(number).RIGHT:
            del answers[name]
        found = outcomes(number, clean, answers, [PUBLIC_SEED], work)[PUBLIC_SEED]
    save_answers(found, sentences_of(number), Path(folder, f"{number}.safetensors"))
