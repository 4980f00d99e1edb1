"""Grade a student's tree, and grade the grader.

The student's definitions are grafted onto a clean hand-out. `probe.py` runs them there, in
processes of their own that can neither read the reference nor write the verdict. When these are
gone, the reference runs at the same seeds, and this process compares. Until then results.json says
zero.
"""
import ast
import functools
import itertools
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import BadInput, progress, write_whole
from lab.course import PUBLIC_SEED, ROOT, SHARES, load, title
from lab.course.check import SECONDS, agree, diagnose, outcomes
from lab.course.handout import leaks, make_tree, units

ALLOWED = {"torch", "tiktoken", "safetensors", "numpy", "tqdm", "pytest", "infosteer", "model",
           "train", "eval", "data", "lab", *sys.stdlib_module_names}
MODELS = Path(os.environ.get("INFOSTEER_MODELS", ROOT.parent / "models"))
WARNING = ("nothing keeps the student's code from reading the grader's files here, neither Landlock"
           " nor another user: read the code, or grade as root, with it in a folder of mode 700")

# ------------------------------------------------------------------------------------ grafting


def merged(clean, theirs, wanted, removed):
    """A clean file's text with the definitions `wanted` that the text `theirs` has, and with all
    that it adds. Raises BadInput for the import of another package, and SyntaxError."""
    for node in ast.walk(ast.parse(theirs)):
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module or ""] if isinstance(node, ast.ImportFrom) else []):
            if name.split(".")[0] not in ALLOWED:
                raise BadInput(f"it imports {name}, which is no package of requirements.txt")
    clean = units(clean)
    places = {name: n for n, (names, _) in [*enumerate(clean)][::-1] for name in names}
    known, added, mine = places.keys() - wanted - removed, [""] * len(clean), set()
    last = min(places[name.split(".")[0]] for name in wanted) - 1
    for names, text in units(theirs):  # what is new stands behind what it stood behind
        last = max([last, *(places[name] for name in names & places.keys())])
        if names - known:
            added[last] += text.rstrip() + "\n\n"
            mine |= names - known
    return "".join(text * (not names & mine) + more for (names, text), more in zip(clean, added))


def graft(number, clean, answers, out):
    """Make the tree `out`: `clean` with the definitions of some answers {file: text}, one after the
    other. Raises BadInput."""
    assignment = load(number)
    shutil.copytree(clean, out, ignore=shutil.ignore_patterns("toy", "golden", "expected"))
    for folder in ("data/toy", "tests/golden"):
        os.symlink(Path(clean, folder), Path(out, folder))
    removed = {name.partition("::")[2] for name in assignment.REMOVE}
    for file, text in (item for answer in answers for item in answer.items()):
        wanted = {own for where, _, own in (name.partition("::") for name in assignment.BLANK)
                  if where == file}
        try:
            if wanted != {""}:
                text = merged(Path(out, file).read_text("utf-8"), text, wanted, removed)
            write_whole(Path(out, file), text)
        except (BadInput, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            raise BadInput(f"{file}{line}: {(error.args or ['nested too deeply'])[0]}") from None
    return out


def handed_in(tree, file):
    """The text of a file that a student hands in. Raises BadInput."""
    path = Path(tree, file)            # a link could lead to the reference
    if (not path.is_file() or path.stat().st_size > 2**20
            or path.resolve() != Path(tree).resolve() / file):
        raise BadInput(f"{file}: is not there, or no ordinary file below a megabyte")
    return path.read_text("utf-8", errors="replace")


def files_of(number, tree):
    """What is graded of a tree: {file: text}. Raises BadInput."""
    files = dict.fromkeys(name.partition("::")[0] for name in load(number).BLANK)
    return {file: handed_in(tree, file) for file in files}


def sentences(number):
    return {name: sentence for name, (sentence, _) in load(number).WRONG.items()}


def known_trees(number, clean, work, right=False):
    """The trees of the reference, of the wrong answers, and of the right ones if asked for: {name:
    tree}. What an answer does not define is the reference's."""
    assignment = load(number)
    whole = getattr(assignment, "REFERENCE", None) or files_of(number, ROOT)
    texts = {"reference": {}, **{name: text for name, (_, text) in assignment.WRONG.items()},
             **(assignment.RIGHT if right else {})}
    return {name: graft(number, clean, [whole, text if isinstance(text, dict) else
                                        {next(iter(whole)): text}], Path(work, f"tree{n}"))
            for n, (name, text) in enumerate(texts.items())}


def write_expected(number, folder, clean):
    """What a hand-out knows of the right and the wrong answers: numbers for the public seed."""
    with tempfile.TemporaryDirectory() as work:
        outcomes(number, known_trees(number, clean, work), [PUBLIC_SEED], folder, apart=False)
    write_whole(Path(folder, f"{number}.json"), json.dumps(sentences(number), indent=2) + "\n")


# ------------------------------------------------------------------------------------- grading


def grade(tree, number, results, seed=None, seconds=SECONDS):
    """Grade a student's tree and write the verdict, whatever the student's code does. seed: of the
    hidden checks; None or 0: drawn. seconds: for each part. -> the verdict."""
    began, assignment, tests = time.monotonic(), load(number), {}
    seeds = {"public": PUBLIC_SEED, "hidden": seed or 1 + secrets.randbelow(2**31)}

    def judge(kind, verdicts):
        """Add the tests of a kind: {part: None where it is right, else why not}."""
        most = round(SHARES[kind] * assignment.POINTS / max(1, len(verdicts)), 4)
        for part, why in verdicts.items():
            tests[kind, part] = {
                "name": f"{kind}: {part}", "score": 0.0 if why else most, "max_score": most,
                "output": why or "ok",
                "visibility": "after_due_date" if kind == "hidden" else "visible"}

    def write(**more):
        verdict = {"score": round(sum(test["score"] for test in tests.values()), 4),
                   "execution_time": round(time.monotonic() - began, 1), "visibility": "visible",
                   "output": f"{number} {title(assignment)}", "tests": [*tests.values()], **more}
        write_whole(results, json.dumps(verdict, indent=2) + "\n")
        return verdict

    for kind in SHARES:
        parts = assignment.WRITTEN if kind == "written" else assignment.PARTS
        judge(kind, dict.fromkeys(parts, "the grading was interrupted"))
    write()
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as ours:
        clean, theirs, out, said = *(Path(work, name) for name in ("clean", "student", "out")), ""
        make_tree(number, clean)
        getattr(assignment, "prepare", lambda tree, seed: None)(clean, seeds["hidden"])
        try:
            graft(number, clean, [files_of(number, tree)], theirs)
        except BadInput as error:
            for kind in seeds:
                judge(kind, dict.fromkeys(assignment.PARTS, str(error)))
        else:
            found, said = outcomes(number, {"": theirs}, seeds.values(), out, seconds,
                                   **strangers(work, clean, theirs, out))
            known, _ = outcomes(number, known_trees(number, clean, ours), seeds.values(), ours,
                                apart=False)
            for kind, one in seeds.items():
                judge(kind, diagnose(found[one][""], known[one], sentences(number)))
    for part in assignment.WRITTEN:
        del tests["written", part]     # one whose model is not here leaves its points to the others
    judge("written", written(number, tree))
    warning = WARNING * (said == "readable\n")
    verdict = write(extra_data={"hidden_seed": seeds["hidden"], "warning": warning})
    print(f"{tree}: {verdict['score']:g} of {assignment.POINTS} points; {results} {warning}")
    return verdict


def strangers(work, clean, theirs, out):
    """How `outcomes` starts a process that runs a student's code: it may read the two trees and
    write to `out` alone, and is the user nobody if we are root and nobody can run Python here."""
    out.mkdir()
    how = {"cwd": clean, "env": {**os.environ, "TMPDIR": str(out)},
           "request": {"secret": str(ROOT / "infosteer.py"), "write": [str(out)],
                       "read": [str(clean), str(theirs)]}}
    try:
        import pwd                     # which Windows lacks
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        find = "import importlib.util as u; open(u.find_spec('torch').origin)"
        subprocess.run([sys.executable, "-c", find], check=True, capture_output=True, **user)
    except (ImportError, KeyError, OSError, subprocess.SubprocessError):
        return how
    subprocess.run(["chmod", "-R", "go+rX", work], check=True)
    os.chown(out, nobody.pw_uid, nobody.pw_gid)
    return {**how, **user}


def written(number, tree):
    """{key: None where the number in answers.json is right, else why not}. What is right is
    computed now, by the question's command. A question whose model is not here is left out."""
    assignment, verdicts = load(number), {}
    for key, (_, command) in assignment.WRITTEN.items():
        if "MODELS/" in command and not MODELS.is_dir():
            continue
        number_of, tolerance = assignment.NUMBERS[key]
        try:
            ours = float(json.loads(handed_in(tree, "answers.json"))[key])
        except (BadInput, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            verdicts[key] = "answers.json has no number for it"
            continue
        try:
            right = number_of(printed(command.replace("MODELS/", f"{MODELS}/")))
        except Exception as error:     # ours, and no reason to lose the other points
            verdicts[key] = f"not judged: the command does not work here ({error}); ask the teacher"
            continue
        close = abs(ours - right) <= tolerance * abs(right)
        verdicts[key] = None if close else f"{ours:g} is not what the command leads to"
    return verdicts


@functools.cache
def printed(command):
    """What a command of the project prints."""
    words = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


# --------------------------------------------------------------------------- the grader graded


def faults(number, seeds=(PUBLIC_SEED, 1)):
    """What is wrong with an assignment, in lines: the blanked tree must score nothing, and the
    reference and every right answer everything; a wrong answer must lose points and get its own
    sentence; no two may give the same; no line of the reference may stand in the hand-out."""
    assignment, says = load(number), sentences(number)
    with tempfile.TemporaryDirectory() as work:
        clean = Path(work, "clean")
        try:
            make_tree(number, clean)
            trees = {"blank": clean, **known_trees(number, clean, work, right=True)}
        except (BadInput, OSError) as error:
            return [str(error)]
        found, _ = outcomes(number, trees, seeds, work, 120, apart=False)
        problems = [f"the hand-out gives away {line}" for line in leaks(number, clean)]
    for seed, answers in found.items():
        known = {name: answers[name] for name in ("reference", *says)}
        broken = [f"seed {seed}, reference, {part}: {error or 'no case'}" for part, (cases, error)
                  in known["reference"].items() if error or not cases]
        if broken:
            return problems + broken
        for name, answer in answers.items():
            verdicts = diagnose(answer, known, says)
            reasons = {why for why in verdicts.values() if why}
            ok = (reasons == {says[name]} if name in says
                  else None not in verdicts.values() if name == "blank" else not reasons)
            if not ok:
                problems.append(f"seed {seed}, {name}: {verdicts}")
        problems += [f"seed {seed}: {one} and {other} give the same"
                     for one, other in itertools.combinations(known, 2)
                     if all(agree(known[one][part], known[other][part]) for part in known[one])]
    return problems


def selftest(chosen):
    """Print the faults of assignments -> how many there are."""
    count = 0
    for number in progress(chosen, desc="grading the grader", unit="assignment"):
        assignment, problems = load(number), faults(number)
        count += len(problems)
        print(f"{number} {title(assignment)}: {len(assignment.RIGHT)} right and "
              f"{len(assignment.WRONG)} wrong answers, {len(problems)} faults",
              *(f"  {problem}" for problem in problems), sep="\n", flush=True)
    return count
