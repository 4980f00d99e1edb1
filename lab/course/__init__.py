"""A course on this code: eight assignments, and the tool that hands them out and grades them.

The code of this project is the only copy of the solutions. An assignment is one file, `aN_*.py`: it
names what is blanked, probes what students write, and knows the usual wrong answers. README.md says
how to make one.
"""
import importlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]                 # the tree that is checked: the project, or a hand-out
EXPECTED = HERE / "expected"           # in a hand-out: what the right and the wrong answers give
PUBLIC_SEED = 0                        # of the public checks; a hidden one has another
SHARES = {"public": 0.60, "hidden": 0.25, "written": 0.15}     # of an assignment's points
ASSIGNMENTS = {int(path.stem[1:].split("_")[0]): path.stem for path in HERE.glob("a[0-9]*_*.py")}


def load(number):
    """The module of an assignment."""
    return importlib.import_module(f"lab.course.{ASSIGNMENTS[number]}")


def title(number):
    return f"{number} {load(number).__doc__.splitlines()[0]}"
