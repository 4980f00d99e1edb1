"""A course on this code: hand out, check, hint, grade. README.md beside this file is for teachers.

    python -m lab.course                          what there is
    python -m lab.course handout 2 --out DIR      a tree for students
    python -m lab.course check 2                  in that tree: points, and what is wrong
    python -m lab.course hint 2                   the next of three: concept, formula, the line
    python -m lab.course broken 1 --out DIR       of assignment 6: a tree with a fault, its symptom
    python -m lab.course grade DIR 2 --results results.json --seed 7       for teachers
    python -m lab.course selftest                 is the grader right?
"""
import importlib
import sys

from data import Parser, command, whole
from lab.course import ASSIGNMENTS, HERE, load, title

MODULES = {"check": "check", "hint": "check", "broken": "a6_bug",      # those that a hand-out has
           "handout": "teacher", "grade": "teacher", "selftest": "teacher"}


def read_settings(argv=None):
    parser = Parser(prog="python -m lab.course", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in (name for name, module in MODULES.items() if (HERE / f"{module}.py").is_file()):
        add = commands.add_parser(name, description=__doc__).add_argument
        if name == "grade":
            add("tree", metavar="DIR", help="the folder that the student hands in")
            add("--results", metavar="FILE", default="results.json",
                help="the verdict, in Gradescope's format (default: %(default)s)")
            add("--seed", type=whole, help="of the hidden checks, above 0 (default: drawn)")
        add("number", type=int, help="of the assignment; broken: of the fault",
            choices=range(1, 5) if name == "broken" else sorted(ASSIGNMENTS),
            nargs="?" if name == "selftest" else None)
        if name in ("handout", "broken"):
            add("--out", metavar="DIR", required=True, help="a new folder")
    return parser.parse_args(argv)


def main(argv=None):
    args = vars(read_settings(argv))
    name = args.pop("command")
    if name:
        return getattr(importlib.import_module(f"lab.course.{MODULES[name]}"), name)(**args)
    print(f"{'assignment':<44}{'minutes':>8}{'points':>8}   what is blanked")
    for number, one in ((number, load(number)) for number in sorted(ASSIGNMENTS)):
        print(f"{title(number):<44}{one.MINUTES:>8}{one.POINTS:>8}   "
              + ", ".join(name.split("::")[-1] for name in one.BLANK))


if __name__ == "__main__":
    sys.argv[0] = "lab.course"         # an error's first word
    command(main)
