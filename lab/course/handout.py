"""Make the tree that students get: the project, with what they shall write blanked.

A name is written as in pytest: `infosteer.py::key_entropy`, `model.py::KeyValueMemory.forward`, or
a whole file. Definitions are found by name, so that lines may move.
"""
import ast
import inspect
import json
import re
import shutil
from pathlib import Path

from data import BadInput, write_whole
from lab.course.check import SECONDS
from lab.course import EXPECTED, HERE, NOT_HANDED_OUT, PUBLIC_SEED, ROOT, SHARES, load, title

SHIPPED = ("infosteer.py", "model.py", "train.py", "eval.py", "requirements.txt", ".gitignore",
           "data/**/*", "lab/*.py", "tests/conftest.py", "tests/helpers.py", "tests/test_0*.py",
           "tests/golden/**/*.json", "tests/golden/**/*.safetensors",
           *(f"lab/course/{name}.py" for name in ("__init__", "__main__", "probe", "check")))
LEFT = re.compile(r"__pycache__|data/public|/eval/|log\.jsonl|\.(lock|partial|old|part)\b")


# ------------------------------------------------------------------ definitions, by their names


def bound(node):
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(name.asname or name.name).split(".")[0] for name in node.names}
    return {name for inner in ast.iter_child_nodes(node) for name in bound(inner)} | {
        inner.id for inner in [node] if isinstance(inner, ast.Name)
        and isinstance(inner.ctx, ast.Store)}


def body_of(source, owner):
    """The statements of a file, or of the class `owner` in it. Raises BadInput."""
    body = ast.parse(source).body
    if not owner:
        return body
    found = [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
    if not found:
        raise BadInput(f"there is no class {owner}")
    return found[-1].body


def span(node, lines):
    """Where a statement stands, with decorators and the comments directly above: (first, end)."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].strip().startswith("#") and "-----" not in lines[first - 1]:
        first -= 1
    return first, node.end_lineno


def rewrite(source, name, text):
    """`source` with the first definition of `name` replaced by what text(node) says, and without
    its other ones. Raises BadInput where there is none."""
    owner, _, own = name.rpartition(".")
    lines = source.splitlines(keepends=True)
    nodes = [node for node in body_of(source, owner) if own in bound(node)]
    if not nodes:
        raise BadInput(f"there is no {name}")
    for node in reversed(nodes):       # from the end, so that the lines before stay where they are
        first, end = span(node, lines)
        new = text(node) if node is nodes[0] else ""
        if not new:                    # the empty lines before go too
            while first and not lines[first - 1].strip():
                first -= 1
        lines[first:end] = [new]
    return "".join(lines)


def stub(source, message):
    """What `rewrite` puts in the place of a function: its head, its docstring, an exception."""
    lines = source.splitlines(keepends=True)

    def text(node):
        if not isinstance(node, ast.FunctionDef):
            return ""
        kept = node.body[0] if ast.get_docstring(node) else None
        end = kept.end_lineno if kept else node.body[0].lineno - 1
        head = "".join(lines[span(node, lines)[0]:end])
        return f"{head}{' ' * node.body[0].col_offset}raise NotImplementedError(\"{message}\")\n"
    return text


def split(name):
    """A name as in pytest -> (file, definition or "")."""
    file, _, definition = name.partition("::")
    return file, definition


# ---------------------------------------------------------------------------------- the tree


def shipped():
    """The files of the project that a hand-out may have."""
    return sorted({path for pattern in SHIPPED for path in ROOT.glob(pattern)
                   if path.is_file() and not LEFT.search(path.relative_to(ROOT).as_posix())})


def make_tree(number, out):
    """Write the blanked tree of an assignment, which gives no answer away. Raises BadInput."""
    assignment, out = load(number), Path(out)
    for path in shipped():
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    source = inspect.getsource(assignment)
    if NOT_HANDED_OUT not in source:
        raise BadInput(f"{assignment.__file__}: no line {NOT_HANDED_OUT.strip()!r}")
    write_whole(out / "lab" / "course" / Path(assignment.__file__).name,
                source.partition(NOT_HANDED_OUT)[0].rstrip() + "\n")
    steps = [(name, None, "left out here: it would give the answer away")
             for name in assignment.REMOVE]
    steps += [(name, text, f"assignment {number}: write {split(name)[1]}")
              for name, text in assignment.BLANK.items()]
    for name, text, message in steps:
        file, definition = split(name)
        path = out / file
        if not definition:             # a whole file: a new one to fill, or one that goes
            write_whole(path, text) if text else path.unlink()
            continue
        try:
            code = path.read_text(encoding="utf-8")
            gone = file.startswith("tests/")
            new = (lambda node: text) if text else "".format if gone else stub(code, message)
            write_whole(path, rewrite(code, definition, new))
        except (BadInput, OSError) as error:
            raise BadInput(f"assignment {number}: {name}: {error}; has it moved?") from None
    if hasattr(assignment, "prepare"):
        assignment.prepare(out, PUBLIC_SEED)


def leaks(number, tree):
    """The lines of the reference that stand somewhere in a hand-out all the same. Its lines are
    those of code, 12 characters or more, that the blanked file lacks."""
    assignment, found = load(number), set()
    texts = {path: squeezed(path) for path in Path(tree).rglob("*")
             if path.suffix in (".py", ".md", ".txt", ".json") and "toy" not in path.parts}
    for file in {split(name)[0] for name in (*assignment.BLANK, *assignment.REMOVE)}:
        if (ROOT / file).is_file() and not file.startswith("tests/"):
            lines = (ROOT / file).read_text("utf-8").splitlines()
            own = {line for line in map(squeeze, lines) if len(line) > 11}
            own -= set(map(squeeze, (tree / file).read_text("utf-8").splitlines()))
            found |= {f"{path.relative_to(tree)}: {line}" for line in own
                      for path, text in texts.items()
                      if line in (text if len(line) > 19 else text.split("\n"))}
    return sorted(found)


def squeeze(line):
    return re.sub(r"\s+", "", line.partition("#")[0])


def squeezed(path):
    return "\n".join(map(squeeze, path.read_text("utf-8", errors="replace").splitlines()))


def handout(number, out):
    """The whole hand-out: tree, numbers to check against, texts. Raises BadInput."""
    from lab.course.grade import write_expected            # which needs this file
    out, assignment = Path(out), load(number)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: is there already; choose an empty folder for the hand-out")
    make_tree(number, out)
    write_expected(number, out / "lab" / "course" / EXPECTED.name, out)
    points = {f"{name}_points": f"{share * assignment.POINTS:g}" for name, share in SHARES.items()}
    written = [f"- `{key}`: {question}\n\n      {command}\n"
               for key, (question, command) in assignment.WRITTEN.items()]
    for template, name in (("student.md", "README.md"), ("tutor.md", "AGENTS.md")):
        text = (HERE / template).read_text(encoding="utf-8").format(
            number=number, title=title(assignment), minutes=assignment.MINUTES, seconds=SECONDS, **points,
            text=inspect.cleandoc(assignment.__doc__).partition("\n")[2].strip(),
            blanked="\n".join(f"- `{name}`" for name in assignment.BLANK),
            written="\n".join(written), total=assignment.POINTS)
        write_whole(out / name, text)
    write_whole(out / "answers.json", json.dumps(
        {key: None for key in assignment.WRITTEN}, indent=2) + "\n")
