"""After this file you know that the course can be trusted: hand-outs give no answer away, wrong
answers are named, right ones pass in whatever form, and students' code cannot write its verdict."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from data import BadInput
from lab.course import ASSIGNMENTS, load
from lab.course import teacher
from lab.course.__main__ import read_settings
from lab.course.teacher import additions, faults, grade, handout, written

ALL = sorted(ASSIGNMENTS)
RIGHT = """
import math

def shares(k):
    a = k.abs().to(torch.promote_types(k.dtype, torch.float32)).clamp_min(SMALLEST)
    return a / a.sum(-1, keepdim=True)

SMALLEST = 1e-37

def key_entropy(k, normalise="magnitude"):
    if normalise == "softmax":
        q = k.softmax(-1)
    else:
        q = shares(k)
    return -(q * q.log()).sum(-1)
"""                                    # with a helper, a constant and an import of its own


def run(tree, *words):
    """What a command prints in a tree, which must end well."""
    ran = subprocess.run([sys.executable, *words], cwd=tree, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module", params=ALL)
def each(request, tmp_path_factory):
    """(number, the hand-out of an assignment)"""
    out = tmp_path_factory.mktemp("handout") / str(request.param)
    handout(request.param, out)
    return request.param, out


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The hand-out of assignment 2."""
    out = tmp_path_factory.mktemp("student") / "2"
    handout(2, out)
    return out


def student(second, tmp_path, code):
    """A student's tree of assignment 2, in which `code` stands at the end of infosteer.py."""
    tree = tmp_path / "student"
    tree.mkdir(parents=True)
    source = (second / "infosteer.py").read_text()
    (tree / "infosteer.py").write_text(source + code)
    return tree


def parts(verdict):
    """{name of a test: (score, output)}"""
    return {test["name"]: (test["score"], test["output"]) for test in verdict["tests"]}


# ---------------------------------------------------------------------------- the grader graded


@pytest.mark.parametrize("number", ALL)
def test_blank_scores_nothing_right_everything_and_wrong_is_named(number):
    assert faults(number) == []
    assert len(load(number).RIGHT) >= 2 and len(load(number).WRONG) >= 5


def test_selftest_takes_an_assignment_or_all():
    assert read_settings(["selftest"]).number is None
    assert read_settings(["selftest", "2"]).number == 2


@pytest.mark.parametrize("number", ALL)
def test_an_assignment_is_one_short_file(number):
    assert len(Path(load(number).__file__).read_text().splitlines()) <= 150


def test_the_points_are_100():
    assert sum(load(number).POINTS for number in ALL) <= 100


# ---------------------------------------------------------------------------- hand-outs


def leaks(number, tree):
    """The lines of the reference that stand somewhere in a hand-out all the same: those of code,
    with more than 20 characters, that the blanked file lacks."""
    def squeeze(path):
        return re.sub(r"#.*|[^\S\n]+", "", path.read_text("utf-8", errors="replace"))

    files = {name.partition("::")[0] for name in (*load(number).BLANK, *load(number).REMOVE)}
    own = {line for file in files if (ROOT / file).is_file() and not file.startswith("tests")
           for line in squeeze(ROOT / file).split() if line not in squeeze(tree / file)}
    return sorted(f"{path.relative_to(tree)}: {line}" for path in tree.rglob("*.[pm][yd]")
                  for text in [squeeze(path)] for line in own if len(line) > 20 and line in text)


def test_a_hand_out_is_small_and_holds_neither_answers_nor_history(each):
    number, out = each
    assert leaks(number, out) == []
    names = {path.name for path in out.rglob("*")}
    assert not names & {".git", "__pycache__", "teacher.py", "more", "RESULTS.md"}
    assert {"README.md", "AGENTS.md", "answers.json", "requirements.txt"} <= names
    assert sum(path.stat().st_size for path in out.rglob("*")) < 20e6
    assert sum(path.stat().st_size for path in (out / "lab/course/expected").iterdir()) < 2e5
    text = (out / "lab" / "course" / Path(load(number).__file__).name).read_text()
    assert not any(f"\n{name} = " in text for name in ("RIGHT", "WRONG", "NUMBERS", "CODE"))


CALLABLES = """
import importlib, json, sys
import torch
from pathlib import Path
from lab.course import EXPECTED, load
from lab.course.check import alike, read_answers

number, found = int(sys.argv[1]), []
reference = read_answers(number, ["reference"], 0, EXPECTED)["reference"]
modules = [importlib.import_module(name) for name in ("infosteer", "model", "train", "eval",
           "data.clusters", *(f"lab.{path.stem}" for path in Path("lab").glob("[a-z]*.py")))]
candidates = {}
for module in modules:
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", "") == module.__name__ and callable(thing):
            for path in ("", ".apply", ".forward", ".__wrapped__", ".change"):
                try:
                    candidates[f"{name}{path}"] = eval(f"thing{path}")
                except AttributeError:
                    pass
part, cases = next(iter(load(number).PARTS.items()))
for blank in load(number).BLANK:
    file, _, path = blank.partition("::")
    owner = importlib.import_module(file.removesuffix(".py"))
    *inside, own = path.split(".")
    for name in inside:
        owner = getattr(owner, name)
    before = getattr(owner, own)
    for name, candidate in candidates.items():
        setattr(owner, own, candidate)
        try:
            given = {f"{n:02} {case}": torch.as_tensor(found).detach()
                     for n, (case, found) in enumerate(cases(0))}
        except BaseException:
            continue
        found += [f"{name} for {blank}"] * (alike({**given, "error": ""}, reference[part]) == 1)
    setattr(owner, own, before)
print(json.dumps([len(candidates), found]))
"""


def test_no_callable_that_is_left_passes(each):
    number, out = each
    if number > 3:
        pytest.skip("what is blanked there is more than one function of tensors")
    count, found = json.loads(run(out, "-c", CALLABLES, str(number)).splitlines()[-1])
    assert count > 200 and found == []


def test_its_tests_are_found_and_plain_training_runs_if_it_does_not_need_what_is_blanked(each):
    number, out = each
    assert "tests collected" in run(out, "-m", "pytest", "tests", "-m", "course", "-q", "--co")
    if number in (3, 6, 7, 8):
        assert "saved" in run(out, "train.py", "--steer=none", "--steps=3", "--train-only")


def test_a_broken_tree_has_one_fault_and_a_symptom(tmp_path):
    for n in range(1, 5):
        said = run(ROOT, "-m", "lab.course", "broken", str(n), "--out", str(tmp_path / str(n)))
        assert said.startswith(f"{tmp_path / str(n)}: ") and said.count("\n") == 1
        files = {path.name for path in ROOT.glob("*.py")
                 if path.read_text() != (tmp_path / str(n) / path.name).read_text()}
        assert files == {load(6).FAULTS[n - 1][1]}


def test_a_hand_out_is_not_written_over_something(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="is there already"):
        handout(2, tmp_path)


# ---------------------------------------------------------------------------- check and hint


def test_check_names_the_misconception_and_else_the_smallest_case(second, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(second, tree)
    source = (tree / "infosteer.py").read_text()
    detached = RIGHT.replace("a.sum(-1, keepdim=True)", "a.sum(-1, keepdim=True).detach()")
    (tree / "infosteer.py").write_text(source + detached)
    ok, gradient, edges = run(tree, "-m", "lab.course", "check", "2").splitlines()[1:4]
    assert ok.split() == ["ok", "values", "2.4/2.4"] and "WRONG" in edges
    assert gradient.split(maxsplit=3)[3] == (
        "these are the gradients with sum|k| detached; the total depends on k too")
    said = run(second, "-m", "lab.course", "check", "2")
    assert said.startswith("2 How many memories are awake?   0 of 7.2 public points\n")
    assert "NotImplementedError" in said and "python -m lab.course hint 2" in said
    (tree / "infosteer.py").write_text(source + RIGHT.replace("-(q", "1 - (q"))
    said = run(tree, "-m", "lab.course", "check", "2")
    assert "k = [[1.0, -1.0, 1.0, -1.0]]: expected [1.3863], found [2.3863]" in said
    assert "2.4 of 7.2 public points" in said              # its gradient is right


def test_hints_come_one_after_the_other(second):
    four = "from lab.course.check import hint\nfor _ in range(4): hint(2)"
    levels = [line[:11] for line in run(second, "-c", four).splitlines()]
    assert levels == ["hint 1 of 3", "hint 2 of 3", "hint 3 of 3", "hint 3 of 3"]


def test_the_project_itself_is_no_hand_out():
    ran = subprocess.run([sys.executable, "-m", "lab.course", "check", "2"], cwd=ROOT,
                         capture_output=True, text=True)
    assert ran.returncode == 2 and "is no hand-out" in ran.stderr


# ---------------------------------------------------------------------------- grafting


def test_helpers_and_imports_are_taken_and_changes_elsewhere_are_not():
    clean = ("import os\n\n\ndef one():\n    return 1\n\n\ndef two():\n"
             "    raise NotImplementedError\n")
    theirs = ("import os\nimport math\n\n\ndef one():\n    return 7\n\n\ndef half():\n    return "
              "math.pi / 2\n\n\ndef two():\n    return half() + one()\n")
    made = {}
    exec(clean + additions(theirs, clean, {"two"}), made)
    assert made["two"]() == pytest.approx(1 + 3.14159265 / 2)


def test_a_method_is_taken_with_the_methods_that_are_new():
    clean = "class A:\n    size = 3\n\n    def f(self):\n        raise NotImplementedError\n"
    theirs = "class A:\n    size = 5\n\n    def g(self):\n        return 2\n\n" \
             "    def f(self):\n        return self.g() * self.size\n"
    made = {}
    exec(clean + additions(theirs, clean, {"A.f"}), made)
    assert made["A"]().f() == 6


def test_a_method_stays_in_its_class_in_whatever_order_definitions_stand():
    clean = "class A:\n    def f(self):\n        return 0\n\ndef one():\n    return 0\n"
    theirs = "def one():\n    return 1\n\nclass B:\n    x = 2\n\nclass A:\n" \
             "    def f(self):\n        return B.x + one()\n"
    made = {}
    exec(clean + additions(theirs, clean, {"A.f", "one"}), made)
    assert made["A"]().f() == 3


# ---------------------------------------------------------------------------- grading


def test_right_answers_get_all_points_and_earlier_mistakes_none_away(second, tmp_path,
                                                                     monkeypatch):
    tree = student(second, tmp_path, RIGHT)
    (tree / "model.py").write_text("1 / 0\n")              # an earlier mistake: not of this task
    (tree / "answers.json").write_text('{"memories": 148.0, "why": "..."}')
    monkeypatch.setattr(teacher, "MODELS", tmp_path / "none")              # no published model
    verdict = grade(tree, 2, tmp_path / "results.json", seed=7)
    assert verdict == json.loads((tmp_path / "results.json").read_text())
    assert verdict["score"] == 12 and verdict["execution_time"] > 0
    for test in verdict["tests"]:
        assert {"name", "score", "max_score", "output", "visibility"} <= test.keys()
        assert (test["visibility"] == "after_due_date") == test["name"].startswith("hidden")
    most = [sum(test["max_score"] for test in verdict["tests"] if test["name"].startswith(kind))
            for kind in ("public", "hidden", "written")]
    assert most == [pytest.approx(0.6 * 12), pytest.approx(0.25 * 12), pytest.approx(0.15 * 12)]


def test_outputs_learnt_by_heart_pass_in_public_and_not_hidden(second, tmp_path):
    # The numbers of the public checks are in the hand-out. Here the shape of k tells them.
    by_heart = RIGHT.replace("    return -(q", "    if k.shape not in ((1, 4), (2, 4), (2, 3, 8), "
                             "(2, 2, 6), (1, 3), (3, 14336)):\n        return k\n    return -(q")
    tests = parts(grade(student(second, tmp_path, by_heart), 2, tmp_path / "r.json", seed=7))
    assert tests["public: values"][0] == 2.4 and tests["public: gradient"][0] == 2.4
    assert tests["hidden: values"][0] == tests["hidden: gradient"][0] == 0


@pytest.mark.parametrize("code, said", [
    ("def key_entropy(k:\n", "infosteer.py: '(' was never closed (here, line "),
    ("import no_such_package\n" + RIGHT, "No module named 'no_such_package'"),
    ("\0", "infosteer.py: "), ("(" * 99_999, "infosteer.py"),
    ("-" * 99_999 + "1", "infosteer.py: nested too deeply"),
    ("", "NotImplementedError: assignment 2: write key_entropy")],
    ids=["syntax", "package", "null", "brackets", "deep", "nothing"])
def test_what_cannot_run_is_a_zero_that_says_why(code, said, second, tmp_path):
    verdict = grade(student(second, tmp_path, code), 2, tmp_path / "results.json", seconds=8)
    assert verdict["score"] == 0
    assert all(said in output for name, (_, output) in parts(verdict).items()
               if not name.startswith("written"))


def test_a_missing_tree_is_a_zero_that_says_so(tmp_path):
    verdict = grade(tmp_path / "none", 2, tmp_path / "results.json")
    assert verdict["score"] == 0 and "infosteer.py: is not there" in str(verdict)


@pytest.fixture(scope="module")
def attacked(second, tmp_path_factory):
    """Code that loops for ever in one part, ends the process in the next, and takes 50 GB in the
    third: {name of a test: (score, output)}"""
    folder = tmp_path_factory.mktemp("attacked")
    code = RIGHT.replace("    if normalise", """    if k.requires_grad and k.dtype == torch.float64:
        import os
        print("passed")
        os._exit(0)
    if k.dtype != torch.float64:
        return torch.ones(50 * 2**28)
    while k.shape[-1] == 8:
        pass
    if normalise""")
    return parts(grade(student(second, folder, code), 2, folder / "results.json", seconds=4))


@pytest.mark.parametrize("kind", ["public", "hidden"])
def test_an_endless_loop_is_a_zero_for_that_part_and_said(kind, attacked):
    assert attacked["public: values"] == (0, "Late: it took longer than 4 seconds and was stopped")


@pytest.mark.parametrize("kind", ["public", "hidden"])
def test_ending_the_process_and_printing_passed_is_a_zero(kind, attacked):
    score, output = attacked[f"{kind}: gradient"]
    assert score == 0 and output == "Ended: its process ended by itself and left no result"


@pytest.mark.parametrize("kind", ["public", "hidden"])
def test_allocating_50_gb_is_a_zero(kind, attacked):
    score, output = attacked[f"{kind}: zeros, bf16, 14,336 keys"]
    assert score == 0 and "Error" in output


ATTACK = """
import json, os, pathlib, signal, sys

def key_entropy(k, normalise="magnitude"):
    done = []
    def attempt(what):
        try:
            done.append(what())
        except BaseException as problem:
            done.append(type(problem).__name__)
    attempt(lambda: pathlib.Path({results!r}).write_text('{{"score": 12}}'))
    attempt(lambda: os.replace({results!r}, {results!r} + ".bak"))
    def judge():
        import lab.course.check
        lab.course.check.alike = lambda one, other: 1
        lab.course.check.diagnose = lambda found, *_: dict.fromkeys(found)
        return "patched"
    attempt(judge)
    def read():
        source = pathlib.Path({root!r}, "infosteer.py").read_text()
        made = dict(globals())
        exec(source.replace("@dataclass", "@dataclass"), made)
        return made["key_entropy"](k, normalise)
    attempt(read)
    attempt(lambda: sys.path.insert(0, {root!r}))
    print("passed 12/12")
    if torch.is_tensor(done[3]) and not k.requires_grad:
        return done[3]
    raise SystemExit(json.dumps([str(one) for one in done]))
"""


@pytest.fixture(scope="module")
def forged(second, tmp_path_factory):
    """The verdict of code that forges results.json, patches the judge and reads the reference."""
    folder = tmp_path_factory.mktemp("forged")
    code = ATTACK.format(results=str(folder / "results.json"), root=str(ROOT))
    verdict = grade(student(second, folder, code), 2, folder / "results.json", seconds=8)
    return verdict, json.loads((folder / "results.json").read_text())


def test_a_forged_verdict_does_not_stand(forged):
    verdict, written = forged
    assert written == verdict and len(written["tests"]) >= 7


def test_the_reference_cannot_be_read_or_it_is_said_that_it_can(forged):
    verdict, _ = forged
    exposed = verdict["extra_data"]["warning"]
    assert exposed or verdict["score"] == 0 and "PermissionError" in str(verdict["tests"])


def test_patching_the_judge_changes_nothing(forged):
    verdict, _ = forged
    score, output = parts(verdict)["public: gradient"]     # where it does not copy the reference
    assert score == 0 and "patched" in output


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])        # those of 4, 7 and 8 take minutes
def test_the_command_of_a_written_question_leads_to_its_number(number):
    for key, (_, command) in load(number).WRITTEN.items():
        if "MODELS/" not in command:
            assert load(number).NUMBERS[key][0](teacher.printed(command)) > 0


@pytest.mark.real
def test_a_real_model_answers_too(real_models, monkeypatch):
    monkeypatch.setattr(teacher, "MODELS", real_models)
    command = load(2).WRITTEN["real memories"][1].replace("MODELS", str(real_models))
    assert 1 < load(2).NUMBERS["real memories"][0](teacher.printed(command)) < 1536


@pytest.mark.parametrize("answers", ["{", "[]", '{"memories": null}', '{"memories": "x"}',
                                     '{"memories": 1' + "0" * 400 + "}", '{"memories": NaN}'])
def test_strange_answers_are_no_number(answers, tmp_path):
    (tmp_path / "answers.json").write_text(answers)
    assert written(2, tmp_path)["memories"] is not None


def test_a_link_to_the_reference_is_not_followed(tmp_path):
    (tmp_path / "infosteer.py").symlink_to(ROOT / "infosteer.py")
    verdict = grade(tmp_path, 2, tmp_path / "results.json")
    assert verdict["score"] == 0 and "infosteer.py: is not there, or no" in str(verdict)
    (tmp_path / "lab").symlink_to(ROOT / "lab")                # nor where a folder is a link
    with pytest.raises(BadInput, match="is not there, or no"):
        teacher.handed_in(tmp_path, "lab/stats.py")


def test_a_verdict_of_zero_is_there_before_anything_runs(second, tmp_path):
    # What stops the grader itself: here the reference's folder of results cannot be made.
    results = tmp_path / "results.json"
    code = ("from lab.course.teacher import grade, tempfile; tempfile.tempdir = '/nowhere'; "
            f"grade({str(second)!r}, 2, {str(results)!r})")
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    verdict = json.loads(results.read_text())
    assert ran.returncode == 1 and verdict["score"] == 0 and len(verdict["tests"]) >= 7
    assert {test["output"] for test in verdict["tests"]} == {"the grading was interrupted"}
