"""Make the tree that students get: the project, with what they shall write blanked.

A name is written as in pytest: `infosteer.py::key_entropy`, `model.py::KeyValueMemory.forward`, or
a whole file. Definitions are found by their names, so that lines may move.
"""
import ast
import json
import re
import shutil
import textwrap
from pathlib import Path

from data import BadInput, write_whole
from lab.course import EXPECTED, HERE, NOT_HANDED_OUT, PUBLIC_SEED, ROOT, SHARES, load, title
from lab.course.check import SECONDS

SHIPPED = ("*.py", "requirements.txt", ".gitignore", "data/**/*", "lab/*.py", "tests/conftest.py",
           "tests/helpers.py", "tests/test_0*.py", "tests/golden/**/*.[js]*",
           *(f"lab/course/{name}.py" for name in ("__init__", "__main__", "probe", "check")))
LEFT = re.compile(r"__pycache__|data/public|/eval/|log\.jsonl|\.(lock|partial|old)\b")


def bound(node):
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.alias):
        return {(node.asname or node.name).split(".")[0]}
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(bound, ast.iter_child_nodes(node)))


def units(source):
    """A file cut into its statements, classes into their members too: [(names, text)]. The texts,
    joined, are the file. Raises SyntaxError."""
    nodes = []                         # (node, the names it defines)
    for node in ast.parse(source).body:
        nodes.append((node, bound(node)))
        if isinstance(node, ast.ClassDef):
            nodes += [(inner, {f"{node.name}.{name}" for name in bound(inner)})
                      for inner in node.body if bound(inner)]
    lines, cuts = source.splitlines(keepends=True), [(0, set())]
    for node, names in nodes:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ()))) - 1
        while first and re.match(r"\s*#(?! -----)", lines[first - 1]):         # its own comments
            first -= 1
        cuts.append((max(first, cuts[-1][0]), names))
    ends = [first for first, _ in cuts[1:]] + [len(lines)]
    return [(names, "".join(lines[first:end])) for (first, names), end in zip(cuts, ends)]


def stub(text, message):
    """A function's head and docstring, with an exception for a body; nothing for another thing."""
    node = ast.parse(textwrap.dedent(text)).body[0]
    if not isinstance(node, ast.FunctionDef):
        return ""
    head = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    indent = re.match(r"\s*", text.splitlines()[node.lineno - 1])[0] + "    "
    return ("".join(text.splitlines(keepends=True)[:head])
            + f'{indent}raise NotImplementedError("{message}")\n' + re.search(r"\n*$", text)[0])


def rewrite(path, name, new):
    """Put new(text) in the place of the first definition of `name` in a file, and remove its
    others. Raises BadInput where there is none."""
    parts, texts = units(path.read_text("utf-8")), []
    for names, text in parts:
        if name in names:
            text, new = new(text), lambda text: ""
        elif any(one.startswith(name + ".") for one in names):                 # of that class
            text = ""
        texts.append(text)
    if not any(name in names for names, _ in parts):
        raise BadInput(f"{path.name}: there is no {name}; has it moved?")
    write_whole(path, "".join(texts))


def make_tree(number, out):
    """Write the blanked tree of an assignment, which gives no answer away. Raises BadInput."""
    assignment = load(number)
    for path in sorted({path for pattern in SHIPPED for path in ROOT.glob(pattern)}):
        if path.is_file() and not LEFT.search(path.relative_to(ROOT).as_posix()):
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    own = Path(assignment.__file__)
    public, _, secret = own.read_text("utf-8").partition(NOT_HANDED_OUT)
    if not secret:
        raise BadInput(f"{own}: has no line {NOT_HANDED_OUT.strip()!r}")
    write_whole(out / "lab" / "course" / own.name, public.rstrip() + "\n")
    for name in assignment.REMOVE:
        file, _, own = name.partition("::")
        if not own:
            (out / file).unlink()
            continue
        gone = "left out here, as it would give the answer away"
        rewrite(out / file, own, lambda text: "" if file.startswith("tests") else stub(text, gone))
    for name, text in assignment.BLANK.items():
        file, _, own = name.partition("::")
        if not own:
            write_whole(out / file, text)
            continue
        todo = f"assignment {number}: write {own}"
        rewrite(out / file, own, lambda old: stub(old, todo) if text is None else text)
    getattr(assignment, "prepare", lambda tree, seed: None)(out, PUBLIC_SEED)


def leaks(number, tree):
    """The lines of the reference that stand somewhere in a hand-out all the same: those of code,
    with 12 characters or more, that the blanked file lacks."""
    def squeeze(path):
        lines = path.read_text("utf-8", errors="replace").splitlines()
        return [re.sub(r"\s+", "", line.partition("#")[0]) for line in lines]

    texts = {path: squeeze(path) for path in tree.rglob("*.*")
             if path.suffix in (".py", ".md", ".txt", ".json") and "toy" not in path.parts}
    files = {name.partition("::")[0] for name in (*load(number).BLANK, *load(number).REMOVE)}
    own = {line for file in files if (ROOT / file).is_file() and not file.startswith("tests")
           for line in {*squeeze(ROOT / file)} - {*texts[tree / file]} if len(line) > 11}
    return sorted(f"{path.relative_to(tree)}: {line}" for path, lines in texts.items()
                  for line in own if line in (lines if len(line) < 20 else "\n".join(lines)))


def handout(number, out):
    """The whole hand-out: the tree, numbers to check against, texts. Raises BadInput."""
    from lab.course.grade import write_expected                # which needs this file
    out, assignment = Path(out), load(number)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: is there already; a hand-out needs a new or an empty folder")
    make_tree(number, out)
    (out / "lab" / "course" / EXPECTED.name).mkdir()
    write_expected(number, out / "lab" / "course" / EXPECTED.name, out)
    task = assignment.__doc__.partition("\n")[2].strip()
    points = {f"{name}_points": f"{share * assignment.POINTS:g}" for name, share in SHARES.items()}
    written = "\n".join(textwrap.fill(f"- `{key}`: {question}", 98, subsequent_indent="  ")
                        + f"\n\n      {command}\n"
                        for key, (question, command) in assignment.WRITTEN.items())
    for template, name in (("student.md", "README.md"), ("tutor.md", "AGENTS.md")):
        text = (HERE / template).read_text("utf-8").format(
            number=number, title=title(assignment), minutes=assignment.MINUTES, seconds=SECONDS,
            task=task, blanked="\n".join(f"- `{name}`" for name in assignment.BLANK),
            written=written, total=assignment.POINTS, **points)
        write_whole(out / name, text)
    empty = {**dict.fromkeys(assignment.WRITTEN), "why": ""}
    write_whole(out / "answers.json", json.dumps(empty, indent=2) + "\n")
