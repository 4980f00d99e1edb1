"""A course on this code: hand out, check, hint, grade. README.md beside this file is for teachers.

    python -m lab.course                          what there is
    python -m lab.course handout 2 --out DIR      a tree for students
    python -m lab.course check 2                  in that tree: points, and what is wrong
    python -m lab.course hint 2                   the next of three hints
    python -m lab.course grade DIR 2 --results results.json --seed 7       for teachers
    python -m lab.course selftest                 is the grader right?
"""
import importlib
import sys

from data import BadInput, Parser, command, positive, whole
from lab.course import HERE, load, numbers, title
from lab.course.check import SECONDS, check, hint


def teacher(name):
    """A module of the kit that no hand-out has. Raises BadInput in one."""
    if not (HERE / f"{name}.py").is_file():
        raise BadInput("this is a hand-out; the whole project has that command")
    return importlib.import_module(f"lab.course.{name}")


def show():
    print(f"{'':<4}{'assignment':<44}{'minutes':>8}{'points':>8}   what is blanked")
    for number in numbers():
        one = load(number)
        print(f"{number:<4}{title(one):<44}{one.MINUTES:>8}{one.POINTS:>8}   "
              + ", ".join(name.split("::")[-1] for name in one.BLANK))
    print("\npython -m lab.course --help shows the commands")


def read_settings(argv=None):
    parser = Parser(prog="python -m lab.course", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    adds = {name: commands.add_parser(name, help=meaning, description=meaning).add_argument
            for name, meaning in {
                "handout": "make the tree that students get",
                "check": "points of this tree by the public checks, and what is wrong with it",
                "hint": "show the next of three hints: concept, formula, the line in words",
                "grade": "grade the tree of a student; the verdict has Gradescope's format",
                "selftest": "grade the grader by its known right and wrong answers"}.items()}
    adds["grade"]("tree", metavar="DIR", help="the folder that the student hands in")
    for name, add in adds.items():
        add("number", type=int, help="of the assignment",
            **{"nargs": "*"} if name == "selftest" else {"choices": numbers()})
    adds["handout"]("--out", metavar="DIR", required=True, help="a new or an empty folder")
    adds["grade"]("--results", metavar="FILE", default="results.json",
                  help="the verdict (default: %(default)s)")
    adds["grade"]("--seed", type=whole, help="of the hidden checks, above 0 (default: drawn)")
    adds["grade"]("--seconds", type=positive, default=SECONDS,
                  help="for each part of the assignment (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_settings(argv)
    if args.command is None:
        show()
    elif args.command == "check":
        check(args.number)
    elif args.command == "hint":
        hint(args.number)
    elif args.command == "handout":
        teacher("handout").handout(args.number, args.out)
    elif args.command == "grade":
        teacher("grade").grade(args.tree, args.number, args.results, args.seed, args.seconds)
    else:
        sys.exit(teacher("grade").selftest(args.number or numbers()) > 0)


if __name__ == "__main__":
    sys.argv[0] = "lab.course"         # an error's first word
    command(main)
