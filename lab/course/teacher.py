"""What only teachers have: blank the project, hand it out, grade what comes back, and grade the
grader.

A name is written as in pytest: `infosteer.py::key_entropy`, `model.py::KeyValueMemory.forward`, or
a whole file. Definitions are found by their names, so that lines may move.
"""
import ast
import functools
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from data import BadInput, write_whole
from lab.course import ASSIGNMENTS, EXPECTED, HERE, PUBLIC_SEED, ROOT, SHARES, load, title
from lab.course.check import SECONDS, diagnose, outcomes

SHIPPED = ("*.py", "requirements.txt", ".gitignore", "data/*.*", "data/toy/*.json",
           "data/toy/*/*.json", "data/toy/*/model.safetensors", "lab/*.py", "tests/conftest.py",
           "tests/helpers.py", "tests/test_0*.py", "tests/golden/**/*.[js]*",
           "lab/course/__*.py", "lab/course/check.py", "lab/course/probe.py")
NOT_HANDED_OUT = "# " + "-" * 79 + " not handed out\n"         # below it, the teacher's part
MODELS = Path(os.environ.get("INFOSTEER_MODELS") or ROOT.parent / "models")
WARNING = ("the student's code could read the grader's files, which cannot be prevented here: read "
           "that code, or grade as root, with the project in a folder of mode 700")


@functools.cache                       # the reference is taken apart for each wrong answer
def spans(source):
    """The statements of a file, and those in its classes: [(names that it defines, the place of its
    first line, the place behind its last, its tree)]. Raises SyntaxError."""
    found = []
    for node in ast.parse(source, "here").body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for one, prefix in [(node, ""), *((member, f"{node.name}.") for member in inside)]:
            names = {one.name} if hasattr(one, "name") else {       # of a definition; of others
                (part.asname or part.name).split(".")[0] if isinstance(part, ast.alias) else part.id
                for part in ast.walk(one) if isinstance(part, ast.alias)
                or isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
            first = min(part.lineno for part in (one, *getattr(one, "decorator_list", ())))
            found.append(({prefix + name for name in names}, first - 1, one.end_lineno, one))
    return found


def additions(theirs, clean, wanted):
    """What a student's file adds to the clean one, as text for the end: the definitions `wanted`,
    and what is new. A method becomes that of a class which takes its class's name."""
    known = set().union(*(names for names, *_ in spans(clean))) - wanted
    lines, texts = theirs.splitlines(keepends=True), []
    for names, first, last, _ in spans(theirs):
        owner, _, member = min(names, default="").partition(".")
        if names - known and (owner in known or not member) and "__future__" not in lines[first]:
            texts += [f"class {owner}({owner}):\n" * bool(member), *lines[first:last], "\n"]
    return "".join(texts)


def blank(path, name, new, why):
    """Put `new`, a text or a function of the old one, in the place of a file's first definition of
    `name`, and remove its others. Where it is None, a function keeps its head and docstring and
    raises an exception; other things, and what is in tests, go. Raises BadInput."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    found = [place for names, *place in spans("".join(lines)) if name in names]
    if not found:
        raise BadInput(f"{path.name}: there is no {name}; has it moved?")
    for first, last, _ in found[:0:-1]:
        del lines[first:last]
    first, last, node = found[0]
    if new is None and isinstance(node, ast.FunctionDef) and path.parent.name != "tests":
        body = node.body[0]
        first = body.end_lineno if ast.get_docstring(node) else body.lineno - 1
        new = f'{" " * body.col_offset}raise NotImplementedError("{why}")\n'
    lines[first:last] = new("".join(lines[first:last])) if callable(new) else new or ""
    write_whole(path, "".join(lines))


def make_tree(number, out, seed=PUBLIC_SEED):
    """Write the blanked tree of an assignment, which gives no answer away. Raises BadInput."""
    assignment = load(number)
    for path in {path for pattern in SHIPPED for path in ROOT.glob(pattern)}:
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    own = Path(assignment.__file__)
    public, _ = own.read_text("utf-8").split(NOT_HANDED_OUT)
    write_whole(out / own.relative_to(ROOT), public.rstrip() + "\n")
    for name, new in {**dict.fromkeys(assignment.REMOVE), **assignment.BLANK}.items():
        file, _, own = name.partition("::")
        if own:
            blank(out / file, own, new, f"assignment {number}: write {own}"
                  if name in assignment.BLANK else "it would give the answer away")
        elif new is None:
            (out / file).unlink()
        else:
            write_whole(out / file, new)
    getattr(assignment, "prepare", lambda tree, seed: None)(out, seed)


def graft(number, clean, answers, out):
    """Make the tree `out`: `clean` with the definitions of some answers {file: text}, one after the
    other. Raises BadInput."""
    names = [*load(number).BLANK, *load(number).REMOVE]
    shutil.copytree(clean.resolve(), out, copy_function=os.symlink)
    for file, text in (item for answer in answers for item in answer.items()):
        wanted = {name.removeprefix(f"{file}::") for name in names}
        try:
            if file not in wanted:     # not a whole file
                before = (clean / file).read_text("utf-8")
                text = (out / file).read_text("utf-8") + additions(text, before, wanted)
            write_whole(out / file, text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise BadInput(f"{file}: {str(error) or 'nested too deeply'}") from None
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
    whole = getattr(load(number), "REFERENCE", None) or files_of(number, ROOT)
    texts = {"reference": {}, **load(number).WRONG, **right}
    return {name: graft(number, clean, [whole, text if isinstance(text, dict) else
                                        {next(iter(whole)): text}], Path(work, f"tree{n}"))
            for n, (name, text) in enumerate(texts.items())}


def handout(number, out):
    """Write the whole hand-out: the tree, numbers to check against, texts. Raises BadInput."""
    out, assignment = Path(out), load(number)
    if out.exists():
        raise BadInput(f"{out}: is there already; a hand-out needs a new folder")
    make_tree(number, out)
    expected = out / EXPECTED.relative_to(ROOT)
    names = ["reference", *assignment.WRONG]
    write_whole(expected / f"{number}.json", json.dumps(names, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as work:
        outcomes(number, known_trees(number, out, work), [PUBLIC_SEED], expected)
    words = dict(one=assignment, number=number, title=title(number), seconds=SECONDS,
                 task=assignment.__doc__.partition("\n")[2].strip(),
                 blanked="\n".join(f"- `{name}`" for name in assignment.BLANK),
                 points={kind: f"{share * assignment.POINTS:g}" for kind, share in SHARES.items()},
                 written="\n".join(f"- `{key}`: {question}\n\n      {command}\n" for
                                   key, (question, command) in assignment.WRITTEN.items()))
    for template, name in (("student.md", "README.md"), ("tutor.md", "AGENTS.md")):
        write_whole(out / name, (HERE / template).read_text("utf-8").format(**words))
    empty = dict.fromkeys([*assignment.WRITTEN, "why"], "")
    write_whole(out / "answers.json", json.dumps(empty, indent=2) + "\n")


def grade(tree, number, results, seed=None, seconds=SECONDS):
    """Grade a student's tree -> the verdict, which is written whatever the student's code does.

    The student's definitions are put into a clean hand-out. `probe.py` runs them there, in
    processes that can neither read the reference nor write the verdict. When these are gone, the
    reference runs at the same seeds, and this process compares. Until then the verdict is zero.

    seed: of the hidden checks; None or 0: drawn. seconds: for each part."""
    began, assignment, exposed = time.monotonic(), load(number), False
    seeds = {"public": PUBLIC_SEED, "hidden": seed or 1 + secrets.randbelow(2**31)}
    verdicts = {kind: dict.fromkeys(            # {part: None where it is right, else why not}
        assignment.WRITTEN if kind == "written" else assignment.PARTS,
        "the grading was interrupted") for kind in SHARES}

    def write(**more):
        tests = [{"name": f"{kind}: {part}", "score": 0.0 if why else most, "max_score": most,
                  "output": why or "ok",
                  "visibility": "after_due_date" if kind == "hidden" else "visible"}
                 for kind, of_parts in verdicts.items() for part, why in of_parts.items()
                 for most in [round(SHARES[kind] * assignment.POINTS / len(of_parts), 4)]]
        verdict = {"score": round(sum(test["score"] for test in tests), 4),
                   "execution_time": round(time.monotonic() - began, 1), "tests": tests, **more}
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
            user, exposed = stranger(work, out)
            found = outcomes(number, {"": theirs}, seeds.values(), out, seconds, **user,
                             env={**os.environ, "TMPDIR": str(out)})
            known = outcomes(number, known_trees(number, clean, work), seeds.values(), work)
            verdicts |= {kind: diagnose(found[one][""], known[one]) for kind, one in seeds.items()}
    verdicts["written"], warning = written(number, tree), WARNING * exposed
    verdict = write(extra_data={"hidden_seed": seeds["hidden"], "warning": warning})
    print(f"{tree}: {verdict['score']:g} of {assignment.POINTS} points; {results} {warning}")
    return verdict


def stranger(work, out):
    """How Popen runs a student's code: as the user nobody, if we are root and nobody can run Python
    here. It may read `work` and write to `out`. And whether it can read the reference."""
    out.mkdir()
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    nobody = {"user": "nobody", "group": 65534, "extra_groups": [], **quiet}
    with suppress(OSError, ValueError, LookupError, subprocess.SubprocessError):
        subprocess.run([sys.executable, "-c", "import safetensors"], check=True, **nobody)
        subprocess.run(["chmod", "-R", "go+rX", work], check=True)
        shutil.chown(out, "nobody")
        reads = subprocess.run(["test", "-r", ROOT / "infosteer.py"], **nobody)
        return nobody, reads.returncode == 0
    return quiet, True


def written(number, tree):
    """{key: None where the number in answers.json is right, else why not}. What is right is
    computed now, by the question's command. A question whose model is not here is left out."""
    assignment, verdicts = load(number), {}
    for key, (_, command) in assignment.WRITTEN.items():
        if "MODELS/" in command and not MODELS.is_dir():
            continue
        verdicts[key] = "answers.json has no number for it"
        with suppress(Exception):      # strange answers; or ours, no reason to lose other points
            ours = float(json.loads(handed_in(tree, "answers.json"))[key])
            verdicts[key] = "not judged: the command does not work here; ask the teacher"
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
    sentence; no two may give the same. Raises BadInput."""
    assignment, problems = load(number), []
    with tempfile.TemporaryDirectory() as work:
        clean = Path(work, "clean")
        make_tree(number, clean, seeds[-1])
        trees = {**known_trees(number, clean, work, assignment.RIGHT), "blank": clean}
        found = outcomes(number, trees, seeds, work)
    for seed, answers in found.items():
        known = {name: answers[name] for name in ("reference", *assignment.WRONG)}
        for name, answer in answers.items():
            verdicts = diagnose(answer, known)
            reasons = {why for why in verdicts.values() if why}
            if (None in verdicts.values() if name == "blank" else
                    reasons != ({name} if name in assignment.WRONG else set())):
                problems.append(f"seed {seed}, {name}: {verdicts}")
    return problems


def selftest(number=None):
    """Print the faults of an assignment, or of all. Raises BadInput where there are some."""
    problems = []
    for one in [number] if number else sorted(ASSIGNMENTS):
        problems += (found := faults(one))
        print(f"{title(one)}: {len(found)} faults", *found, sep="\n  ", flush=True)
    if problems:
        raise BadInput(f"{len(problems)} faults")
