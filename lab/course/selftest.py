"""Grade the grader: `python -m lab.course selftest`.

The blanked tree scores nothing. The reference and every right answer score everything. Every wrong
answer loses points, and is named. No two answers give the same. The hand-out holds no line of the
reference.
"""
import itertools
import tempfile
from pathlib import Path

from data import BadInput, progress
from lab.course import PUBLIC_SEED, load, title
from lab.course.check import agree, diagnose
from lab.course.grade import known_answers, outcomes, sentences_of
from lab.course.handout import leaks, make_tree

HIDDEN = 1                             # a seed as grading might draw one


def faults(number):
    """What is wrong with an assignment, as lines of text."""
    assignment, sentences = load(number), sentences_of(number)
    with tempfile.TemporaryDirectory() as work:
        clean = Path(work, "clean")
        try:
            make_tree(number, clean)
            answers = {"blank": None, **known_answers(number)}
            found = outcomes(number, clean, answers, (PUBLIC_SEED, HIDDEN), work)
        except BadInput as error:
            return [str(error)]
        problems = [f"the hand-out gives away: {line}" for line in leaks(number, clean)]
    for seed, of in found.items():
        known = {name: of[name] for name in ("reference", *assignment.WRONG)}
        for part, (cases, error) in of["reference"].items():
            if error or not cases:
                problems.append(f"the reference, {part}: {error or 'no case'}")
        for name in of:
            verdicts = diagnose(of[name], known, sentences)
            right = [part for part, why in verdicts.items() if why is None]
            if name == "blank" and right:
                problems.append(f"seed {seed}: the blanked tree passes {', '.join(right)}")
            if name in assignment.RIGHT:
                problems += [f"seed {seed}: the right answer {name!r} fails {part}: {why}"
                             for part, why in verdicts.items() if why]
            if name in assignment.WRONG:
                named = {why for why in verdicts.values() if why}
                if not named:
                    problems.append(f"seed {seed}: the wrong answer {name!r} passes")
                elif named != {sentences[name]}:
                    problems.append(f"seed {seed}: the wrong answer {name!r} is called {named}")
        for one, other in itertools.combinations(known, 2):
            if all(agree(of[one][part], of[other][part]) for part in assignment.PARTS):
                problems.append(f"seed {seed}: {one!r} and {other!r} give the same")
    return problems


def main(chosen):
    """Print what is found -> the exit code."""
    bad = 0
    for number in progress(chosen, desc="grading the grader", unit="assignment"):
        assignment, problems = load(number), faults(number)
        bad += len(problems)
        print(f"{number} {title(assignment)}: {len(assignment.RIGHT)} right and "
              f"{len(assignment.WRONG)} wrong answers, {len(problems)} faults",
              *(f"  {problem}" for problem in problems), sep="\n", flush=True)
    return int(bad > 0)
