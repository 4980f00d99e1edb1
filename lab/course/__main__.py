"""A course on this code: hand out, check, hint, grade. README.md beside this file is for teachers.

    python -m lab.course                          what there is
    python -m lab.course handout 2 --out DIR      a tree for students
    python -m lab.course check 2                  in that tree: points, and what is wrong
    python -m lab.course hint 2                   the next of three: concept, formula, the line
    python -m lab.course broken 1 --out DIR       of assignment 6: a tree with a fault, its symptom
    python -m lab.course grade DIR 2 --results results.json --seed 7       for teachers
    python -m lab.course selftest                 is the grader right?
"""
import sys

from data import BadInput, Parser, command, whole
from lab.course import HERE, load, numbers, title
from lab.course.check import check, hint


def read_settings(argv=None):
    parser = Parser(prog="python -m lab.course", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = {name: commands.add_parser(name, description=__doc__).add_argument
           for name in ("handout", "check", "hint", "broken", "grade", "selftest")}
    add["grade"]("tree", metavar="DIR", help="the folder that the student hands in")
    for name in add:
        add[name]("number", type=int, help="of the assignment; broken: of the fault",
                  **{"nargs": "*"} if name == "selftest" else
                  {"choices": range(1, 5) if name == "broken" else numbers()})
    for name in ("handout", "broken"):
        add[name]("--out", metavar="DIR", required=True, help="a new folder")
    add["grade"]("--results", metavar="FILE", default="results.json",
                 help="the verdict, in Gradescope's format (default: %(default)s)")
    add["grade"]("--seed", type=whole, help="of the hidden checks, above 0 (default: drawn)")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_settings(argv)
    if args.command is None:
        print(f"{'':<4}{'assignment':<44}{'minutes':>8}{'points':>8}   what is blanked")
        for n, one in ((n, load(n)) for n in numbers()):
            print(f"{n:<4}{title(one):<44}{one.MINUTES:>8}{one.POINTS:>8}   "
                  + ", ".join(name.split("::")[-1] for name in one.BLANK))
    elif args.command in ("check", "hint"):
        {"check": check, "hint": hint}[args.command](args.number)
    elif args.command == "broken" and 6 in numbers():
        load(6).broken(args.number, args.out)
    elif not (HERE / "teacher.py").is_file():
        raise BadInput(f"{args.command}: this hand-out does not have that command")
    else:
        from lab.course import teacher
        if args.command == "handout":
            teacher.handout(args.number, args.out)
        elif args.command == "grade":
            teacher.grade(args.tree, args.number, args.results, args.seed)
        else:
            sys.exit(teacher.selftest(args.number or numbers()) > 0)


if __name__ == "__main__":
    sys.argv[0] = "lab.course"         # an error's first word
    command(main)
