"""A course on this code: hand out, check, hint, grade.

    python -m lab.course                          what there is
    python -m lab.course handout 2 --out DIR      a tree for students
    python -m lab.course check 2                  in that tree: points, and what is wrong
    python -m lab.course hint 2                   the next of three hints
    python -m lab.course grade DIR 2 --results results.json --seed 7       for teachers
    python -m lab.course selftest                 is the grader right?

Every command works offline. README.md beside this file is for teachers.
"""
import importlib
import sys

from data import BadInput, Parser, command, positive, whole
from lab.course import HERE, PUBLIC_SEED, load, numbers, title
from lab.course.check import SECONDS, check, hint


def teacher(name):
    """A module that no hand-out has. Raises BadInput in one."""
    if not (HERE / f"{name}.py").is_file():
        raise BadInput(f"{name}: this is a hand-out; the whole project has that command")
    return importlib.import_module(f"lab.course.{name}")


def show():
    print(f"{'':<4}{'assignment':<44}{'minutes':>8}{'points':>8}   what is blanked")
    for number in numbers():
        one = load(number)
        blanked = ", ".join(name.split("::")[-1] for name in one.BLANK)
        print(f"{number:<4}{title(one):<44}{one.MINUTES:>8}{one.POINTS:>8}   {blanked}")
    print("\npython -m lab.course --help shows the commands")


def read_settings(argv=None):
    parser = Parser(prog="lab.course", description=__doc__)
    commands = parser.add_subparsers(dest="command", title="commands")

    def add(name, help, numbered=True):
        one = commands.add_parser(name, help=help, description=help, prog=f"lab.course {name}")
        if name == "grade":
            one.add_argument("tree", metavar="DIR", help="the student's tree")
        if numbered:
            one.add_argument("number", type=int, choices=numbers(), help="of the assignment")
        return one.add_argument

    add("handout", "make the tree that students get")(
        "--out", metavar="DIR", required=True, help="a new or empty folder")
    add("check", "points of this tree by the public checks, and what is wrong")
    add("hint", "the next of three hints: concept, formula, the line in words")
    grading = add("grade", "grade a student's tree; the verdict is in Gradescope's format")
    grading("--results", metavar="FILE", default="results.json", help="(default: results.json)")
    grading("--seed", type=whole, help=f"of the hidden checks, not {PUBLIC_SEED} (default: drawn)")
    grading("--seconds", type=positive, default=SECONDS,
            help=f"for each part of the assignment (default: {SECONDS})")
    add("selftest", "grade the grader: known right and wrong answers", numbered=False)(
        "number", nargs="*", type=int, help="assignments (default: all)")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_settings(argv)
    if args.command is None:
        return show()
    if args.command == "check":
        return check(args.number)
    if args.command == "hint":
        return hint(args.number)
    if args.command == "handout":
        return teacher("handout").handout(args.number, args.out)
    if args.command == "grade":
        return teacher("grade").grade(args.tree, args.number, args.results, args.seed, args.seconds)
    sys.exit(teacher("selftest").main(args.number or numbers()))


if __name__ == "__main__":
    command(main)
