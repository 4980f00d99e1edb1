"""What only teachers have: blank the project, hand it out, grade what comes back, and grade the
grader.

A name is written as in pytest: `infosteer.py::key_entropy`, `model.py::KeyValueMemory.forward`, or
a whole file. Definitions are found by their names, so that lines may move.
"""
import ast
import functools
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

from data import BadInput, progress, write_whole
from lab.course import EXPECTED, HERE, PUBLIC_SEED, ROOT, SHARES, load, title
from lab.course.check import SECONDS, diagnose, outcomes

SHIPPED = ("*.py", "requirements.txt", ".gitignore", "data/*.*", "data/toy/*.json",
           "data/toy/*/*.json", "data/toy/*/model.safetensors", "lab/*.py", "tests/conftest.py",
           "tests/helpers.py", "tests/test_0*.py", "tests/golden/**/*.[js]*",
           *(f"lab/course/{name}.py" for name in ("__init__", "__main__", "probe", "check")))
NOT_HANDED_OUT = "# " + "-" * 79 + " not handed out\n"         # below it, the teacher's part
MODELS = Path(os.environ.get("INFOSTEER_MODELS") or ROOT.parent / "models")
WARNING = ("the student's code could read the grader's files, which cannot be prevented here: read "
           "that code, or grade as root, with the project in a folder of mode 700")


def spans(source):
    """The statements of a file, and those in its classes: [(names that it defines, the place of its
    first line, the place behind its last)]. Raises SyntaxError."""
    found = []
    for node in ast.parse(source).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for one, prefix in [(node, ""), *((member, f"{node.name}.") for member in inside)]:
            names = {one.name} if hasattr(one, "name") else {       # of a definition; of others
                (part.asname or part.name).split(".")[0] if isinstance(part, ast.alias) else part.id
                for part in ast.walk(one) if isinstance(part, ast.alias)
                or isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
            first = min(part.lineno for part in (one, *getattr(one, "decorator_list", ())))
            found.append(({prefix + name for name in names}, first - 1, one.end_lineno))
    return found


def additions(theirs, clean, wanted, removed):
    """What a student's file adds to the clean one, as text for the end: the definitions `wanted`,
    and what is new. A method becomes that of a class which takes its class's name."""
    known = set().union(*(names for names, *_ in spans(clean))) - wanted - removed
    lines, texts = theirs.splitlines(keepends=True), []
    for names, first, last in spans(theirs):
        owner, _, member = min(names, default="").partition(".")
        if names - known and (owner in known or not member) and "__future__" not in lines[first]:
            texts += [f"class {owner}({owner}):\n" * bool(member), *lines[first:last], "\n"]
    return "".join(texts)


def rewrite(path, name, new):
    """Put new(text) in the place of a file's first definition of `name`, and remove its others.
    Raises BadInput where there is none."""
    text = path.read_text("utf-8")
    lines = text.splitlines(keepends=True)
    found = [place for names, *place in spans(text) if name in names]
    if not found:
        raise BadInput(f"{path.name}: there is no {name}; has it moved?")
    for first, last in found[:0:-1]:
        del lines[first:last]
    first, last = found[0]
    write_whole(path, "".join([*lines[:first], new("".join(lines[first:last])), *lines[last:]]))


def stub(text, message):
    """A function's head and docstring, with an exception for a body; nothing for another thing."""
    node = ast.parse(textwrap.dedent(text)).body[0]
    if not isinstance(node, ast.FunctionDef):
        return ""
    head = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    indent = re.match(" *", text)[0]
    return "".join(text.splitlines(keepends=True)[:head]) + (
        f'{indent}    raise NotImplementedError("{message}")\n')


def make_tree(number, out, seed=PUBLIC_SEED):
    """Write the blanked tree of an assignment, which gives no answer away. Raises BadInput."""
    assignment = load(number)
    for path in {path for pattern in SHIPPED for path in ROOT.glob(pattern)}:
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    own = Path(assignment.__file__)
    public, _, secret = own.read_text("utf-8").partition(NOT_HANDED_OUT)
    if not secret:
        raise BadInput(f"{own}: has no line {NOT_HANDED_OUT.strip()!r}")
    write_whole(out / own.relative_to(ROOT), public.rstrip() + "\n")
    for name, new in {**dict.fromkeys(assignment.REMOVE), **assignment.BLANK}.items():
        file, _, own = name.partition("::")
        why = f"assignment {number}: write {own}"
        if name not in assignment.BLANK:
            why = "left out here, as it would give the answer away"
            new = (lambda old: "") if file.startswith("tests") else None
        if own:
            rewrite(out / file, own, new if callable(new) else
                    lambda old: stub(old, why) if new is None else new)
        elif name in assignment.BLANK:
            write_whole(out / file, new)
        else:
            (out / file).unlink()
    getattr(assignment, "prepare", lambda tree, seed: None)(out, seed)


def graft(number, clean, answers, out):
    """Make the tree `out`: `clean` with the definitions of some answers {file: text}, one after the
    other. Raises BadInput."""
    assignment = load(number)
    shutil.copytree(clean.resolve(), out, copy_function=os.symlink)
    removed = {name.partition("::")[2] for name in assignment.REMOVE}
    for file, text in (item for answer in answers for item in answer.items()):
        wanted = {own for where, _, own in (name.partition("::") for name in assignment.BLANK)
                  if where == file}
        try:
            if wanted != {""}:
                before = (clean / file).read_text("utf-8")
                text = (out / file).read_text("utf-8") + additions(text, before, wanted, removed)
            write_whole(out / file, text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            raise BadInput(f"{file}{line}: {(error.args or ['nested too deeply'])[0]}") from None
    return out


def handed_in(tree, file):
    """The text of a file that a student hands in. Raises BadInput."""
    path = Path(tree, file)            # a link could lead to the reference
    here = path.resolve() == Path(tree).resolve() / file
    if not (here and path.is_file() and path.stat().st_size <= 2**20):
        raise BadInput(f"{file}: is not there, or no ordinary file below a megabyte")
    return path.read_text("utf-8", errors="replace")


def files_of(number, tree):
    """What is graded of a tree: {file: text}. Raises BadInput."""
    return {file: handed_in(tree, file)
            for file in dict.fromkeys(name.partition("::")[0] for name in load(number).BLANK)}


def known_trees(number, clean, work, right={}):
    """The trees of the reference, of the wrong answers, and of those `right`: {name: tree}. What an
    answer does not define is the reference's."""
    assignment = load(number)
    whole = getattr(assignment, "REFERENCE", None) or files_of(number, ROOT)
    texts = {"reference": {}, **right,
             **{name: text for name, (_, text) in assignment.WRONG.items()}}
    return {name: graft(number, clean, [whole, text if isinstance(text, dict) else
                                        {next(iter(whole)): text}], Path(work, f"tree{n}"))
            for n, (name, text) in enumerate(texts.items())}


def sentences(number):
    return {name: sentence for name, (sentence, _) in load(number).WRONG.items()}


def handout(number, out):
    """The whole hand-out: the tree, numbers to check against, texts. Raises BadInput."""
    out, assignment = Path(out), load(number)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: is there already; a hand-out needs a new or an empty folder")
    make_tree(number, out)
    expected = out / EXPECTED.relative_to(ROOT)
    expected.mkdir()
    with tempfile.TemporaryDirectory() as work:
        outcomes(number, known_trees(number, out, work), [PUBLIC_SEED], expected)
    write_whole(expected / f"{number}.json", json.dumps(sentences(number), indent=2) + "\n")
    words = dict(number=number, title=title(assignment), minutes=assignment.MINUTES,
                 task=assignment.__doc__.partition("\n")[2].strip(), seconds=SECONDS,
                 blanked="\n".join(f"- `{name}`" for name in assignment.BLANK),
                 points={kind: f"{share * assignment.POINTS:g}" for kind, share in SHARES.items()},
                 total=assignment.POINTS, written="\n".join(
                     textwrap.fill(f"- `{key}`: {question}", 98, subsequent_indent="  ")
                     + f"\n\n      {command}\n"
                     for key, (question, command) in assignment.WRITTEN.items()))
    for template, name in (("student.md", "README.md"), ("tutor.md", "AGENTS.md")):
        write_whole(out / name, (HERE / template).read_text("utf-8").format(**words))
    empty = {**dict.fromkeys(assignment.WRITTEN), "why": ""}
    write_whole(out / "answers.json", json.dumps(empty, indent=2) + "\n")


def grade(tree, number, results, seed=None, seconds=SECONDS):
    """Grade a student's tree -> the verdict, which is written whatever the student's code does.

    The student's definitions are put into a clean hand-out. `probe.py` runs them there, in
    processes that can neither read the reference nor write the verdict. When these are gone, the
    reference runs at the same seeds, and this process compares. Until then the verdict is zero.

    seed: of the hidden checks; None or 0: drawn. seconds: for each part."""
    began, assignment, status = time.monotonic(), load(number), 0
    seeds = {"public": PUBLIC_SEED, "hidden": seed or 1 + secrets.randbelow(2**31)}
    verdicts = {kind: dict.fromkeys(            # {part: None where it is right, else why not}
        assignment.WRITTEN if kind == "written" else assignment.PARTS,
        "the grading was interrupted") for kind in SHARES}

    def write(**more):
        tests = []
        for kind, of_parts in verdicts.items():
            most = round(SHARES[kind] * assignment.POINTS / max(1, len(of_parts)), 4)
            tests += [{"name": f"{kind}: {part}", "score": 0.0 if why else most, "max_score": most,
                       "output": why or "ok",
                       "visibility": "after_due_date" if kind == "hidden" else "visible"}
                      for part, why in of_parts.items()]
        verdict = {"score": round(sum(test["score"] for test in tests), 4),
                   "execution_time": round(time.monotonic() - began, 1), "visibility": "visible",
                   "output": f"{number} {title(assignment)}", "tests": tests, **more}
        write_whole(results, json.dumps(verdict, indent=2) + "\n")
        return verdict

    write()
    with tempfile.TemporaryDirectory() as work:
        clean, theirs, out = (Path(work, name) for name in ("clean", "student", "out"))
        make_tree(number, clean, seeds["hidden"])
        try:
            graft(number, clean, [files_of(number, tree)], theirs)
        except BadInput as error:
            verdicts |= {kind: dict.fromkeys(assignment.PARTS, str(error)) for kind in seeds}
        else:
            found, status = outcomes(number, {"": theirs}, seeds.values(), out, seconds,
                                     {"secret": str(ROOT / "infosteer.py")}, **stranger(work, out),
                                     env={**os.environ, "TMPDIR": str(out)})
            known, _ = outcomes(number, known_trees(number, clean, work), seeds.values(), work)
            verdicts |= {kind: diagnose(found[one][""], known[one], sentences(number))
                         for kind, one in seeds.items()}
    verdicts["written"], warning = written(number, tree), WARNING * (status != 0)
    verdict = write(extra_data={"hidden_seed": seeds["hidden"], "warning": warning})
    print(f"{tree}: {verdict['score']:g} of {assignment.POINTS} points; {results} {warning}")
    return verdict


def stranger(work, out):
    """How Popen runs a student's code: as the user nobody, if we are root and nobody can run Python
    here. It may read `work` and write to `out`."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    nobody = {"user": "nobody", "group": 65534, "extra_groups": [], **quiet}
    out.mkdir()
    with suppress(OSError, ValueError, LookupError, subprocess.SubprocessError):
        subprocess.run([sys.executable, "-c", "import torch"], check=True, **nobody)
        subprocess.run(["chmod", "-R", "go+rX", work], check=True)
        shutil.chown(out, "nobody")
        return nobody
    return quiet


def written(number, tree):
    """{key: None where the number in answers.json is right, else why not}. What is right is
    computed now, by the question's command. A question whose model is not here is left out."""
    assignment, verdicts = load(number), {}
    for key, (_, command) in assignment.WRITTEN.items():
        if "MODELS/" in command and not MODELS.is_dir():
            continue
        verdicts[key] = "answers.json has no number for it"
        with suppress(BadInput, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            ours = float(json.loads(handed_in(tree, "answers.json"))[key])
            verdicts[key] = "not judged: the command does not work here; ask the teacher"
            with suppress(Exception):  # ours, and no reason to lose the other points
                number_of, tolerance = assignment.NUMBERS[key]
                right = number_of(printed(command.replace("MODELS/", f"{MODELS}/")))
                close = abs(ours - right) <= tolerance * abs(right)
                verdicts[key] = None if close else f"{ours:g} is not what the command leads to"
    return verdicts


@functools.cache
def printed(command):
    """What a command of the project prints."""
    words = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def faults(number, seeds=(PUBLIC_SEED, 1)):
    """What is wrong with an assignment, in lines: the blanked tree must score nothing, and the
    reference and every right answer everything; a wrong answer must lose points and get its own
    sentence; no two may give the same."""
    assignment, says = load(number), sentences(number)
    with tempfile.TemporaryDirectory() as work:
        clean = Path(work, "clean")
        try:
            make_tree(number, clean, seeds[-1])
            trees = {"blank": clean, **known_trees(number, clean, work, assignment.RIGHT)}
        except (BadInput, OSError) as error:
            return [str(error)]
        found, _ = outcomes(number, trees, seeds, work)
    problems = []
    for seed, answers in found.items():
        known = {name: answers[name] for name in ("reference", *says)}
        problems += [f"seed {seed}, reference, {part}: {outcome['error'] or 'no case'}"
                     for part, outcome in known["reference"].items()
                     if outcome["error"] or len(outcome) == 1]
        for name, answer in answers.items():
            verdicts = diagnose(answer, known, says)
            reasons = {why for why in verdicts.values() if why}
            ok = (None not in verdicts.values() if name == "blank" else
                  reasons == ({says[name]} if name in says else set()))
            problems += [] if ok else [f"seed {seed}, {name}: {verdicts}"]
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
