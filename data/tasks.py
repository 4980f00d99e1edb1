r"""The tasks: names, exact prompts, loading and checking of files, and scoring of a response.

A task's file is DIR/<task>/<split>.json in the layout of LLM-Adapters (Hu et al. 2023,
github.com/AGI-Edgerunners/LLM-Adapters): a list of {"instruction", "input", "output", "answer"}.

    choice        "... Answer format: true/false\n"   -> "the correct answer is true"
    arithmetic    "...\nAnswer the above question. First think ...\n"
                  -> "... 48+24 = 72\nThe final answer is: 72"

A task of one's own needs a DIR/<task>/task.json besides; `python data/prepare.py --help` shows it.
Every response is scored twice: by the rule of the literature, so that numbers can be compared, and
by a strict one, which accepts only what the response states. Where they differ, read the responses.
"""
import difflib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data import BadInput, parse_json, read_json

TRIGGER = "the correct answer is "         # begins the response of choice tasks (Wu et al. 2024)
FINAL = "The final answer is: "            # ends the response of every gsm8k training row
THINK = "Answer the above question. First think step by step and then answer the final number.\n"

# -------------------------------------------------- answer rules: response text -> answer or None


def _choice_rules(labels):
    """(comparable, strict) rules. "untrue" is not "true", "answer12" is not "answer1"; "trueThe",
    from a model that did not stop, is still "true". LLM-Adapters has neither these boundaries nor
    the trigger: it takes the first match anywhere."""
    label = "|".join(re.escape(name) + (r"(?!\d)" if name[-1].isdigit() else "(?![a-z])")
                     for name in sorted(labels, key=len, reverse=True))    # "not" before "no"
    anywhere, here = re.compile(rf"(?<![^\W_])(?:{label})"), re.compile(label)

    def extract(text):
        _, trigger, after = text.partition(TRIGGER)
        found = anywhere.search(after if trigger else text)
        return found and found[0]

    def strict(text):
        found = here.match(text.partition(TRIGGER)[2])
        return found and found[0]
    return extract, strict


def last_number(text):
    """Comparable rule: the last number anywhere, without commas. It reads "10-3" as -3, "3/4" as 4,
    "1e5" and ".5" as 5."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return found[-1].rstrip(".") if found else None


_NUMBER = re.compile(r"[\s$€£*]*([-+−]?)[$€£]?"
                     r"((?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)")
# What makes it another number than a plain one: 1,2345  10-3  3 1/2
_GOES_ON = re.compile(r"[.,]?\d| *[-+−–*×x/÷^=:]+ *[-$(]?\.?\d| +\d+/")


def stated_number(text):
    """Strict rule: the one plain number right after the last "The final answer is:" or "####".
    "#### −$1,234.5." -> "-1234.5" """
    places = list(re.finditer(r"The final answer is:|####", text))
    found = _NUMBER.match(text, places[-1].end()) if places else None
    if not found or _GOES_ON.match(text, found.end()):
        return None
    return found[1].replace("−", "-") + found[2].replace(",", "")


def first_number(text):
    """The number that a response begins with.  " 13. What is" -> "13" """
    found = re.match(r"\s*(\d+)", text)
    return found and found[1]


def first_letter(text):
    """Comparable rule for AQuA: the first capital A-E. That may be the B of "Because ... the answer
    is (D)", or the E of "Each"."""
    found = re.search("[A-E]", text)
    return found and found[0]


def stated_letter(text):
    """Strict rule for AQuA: the letter after the last "answer is" or "answer:"; failing that, the
    only letter in brackets. Several in brackets are a list of options."""
    said = re.findall(r"(?i:answer(?: is:|:| is))\s*(?i:option |choice )?[\s*$(]*([A-E])\b", text)
    bracketed = set(re.findall(r"\(([A-E])\)", text))
    return said[-1] if said else bracketed.pop() if len(bracketed) == 1 else None


# ------------------------------------------------------------------------------ the table of tasks


@dataclass(frozen=True, eq=False)          # eq=False: a task equals itself only, and can be a key
class Task:
    name: str
    kind: str                  # "choice": a label; "arithmetic": a rationale, then a number
    answers: tuple[str, ...]   # the labels an answer may be; () where any number may
    chance: float              # of guessing right, nominally; `chance()` looks at the items
    splits: dict[str, int]     # split -> rows as published; without "train": a test for gsm8k
    source: str                # path on raw.githubusercontent.com
    extract: Callable          # the comparable rule
    strict: Callable           # the strict rule
    max_new_tokens: int        # room for the response when decoding
    suite: str = ""            # of the toy world's tasks: which of three means it counts in
    score: str = "generate"    # how eval.py scores it unless told otherwise
    own: dict | None = None    # what the task.json of a task of one's own says


ADAPTERS = "AGI-Edgerunners/LLM-Adapters/main"
GSM8K = "openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"


def _choice(name, labels, n, answers=None, **splits):
    return Task(name, "choice", answers or labels, 1 / n, splits,
                f"{ADAPTERS}/dataset/{name}/{{split}}.json",
                *_choice_rules(labels), max_new_tokens=32)


def _arithmetic(name, answers=(), rules=(last_number, stated_number), source=None, **splits):
    return Task(name, "arithmetic", answers, 1 / len(answers) if answers else 0.0, splits,
                source or f"{ADAPTERS}/dataset/{name}/{{split}}.json",
                *rules, max_new_tokens=256)


# LLM-Adapters looks for all five labels in four tasks, so "answer5" is read, and wrong, where an
# item has four. It shows boolq without its passage: a test of knowledge and not of reading. A few
# ARC items have 3 or 5 choices, and their own format line says so. Of gsm8k we take OpenAI's files,
# because a machine wrote the rationales of LLM-Adapters' copy. AQuA is not in the paper's Table 4.
_FIVE = ("answer1", "answer2", "answer3", "answer4", "answer5")
TASKS = {task.name: task for task in (
    _choice("boolq", ("true", "false"), 2, train=9427, test=3270),
    _choice("piqa", ("solution1", "solution2"), 2, train=16113, test=1838),
    _choice("social_i_qa", _FIVE, 3, _FIVE[:3], train=33410, test=1954),
    _choice("hellaswag", ("ending1", "ending2", "ending3", "ending4"), 4, train=39905, test=10042),
    _choice("winogrande", ("option1", "option2"), 2, train=63238, test=1267),
    _choice("ARC-Easy", _FIVE, 4, train=2251, test=2376),
    _choice("ARC-Challenge", _FIVE, 4, train=1119, test=1172),
    _choice("openbookqa", _FIVE, 4, train=4957, test=500),
    _arithmetic("gsm8k", train=7473, test=1319, source=GSM8K),
    _arithmetic("AddSub", test=395),
    _arithmetic("SingleEq", test=508),
    _arithmetic("MultiArith", test=600),
    _arithmetic("AQuA", tuple("ABCDE"), (first_letter, stated_letter), test=254),
    _arithmetic("mawps", test=238),
    _arithmetic("SVAMP", test=1000),
)}
# The training rows of the 8 choice tasks, mixed. It is not one of the 15.
_ALL = tuple(dict.fromkeys(label for task in TASKS.values() if task.kind == "choice"
                           for label in task.answers))
COMMONSENSE = Task("commonsense", "choice", _ALL, 0.0, dict(train=170420),
                   f"{ADAPTERS}/ft-training_set/commonsense_170k.json",
                   *_choice_rules(_ALL), max_new_tokens=32)
KNOWN = {**TASKS, "commonsense": COMMONSENSE}

# The toy world's tasks (world.py), besides "arithmetic" ones:
#     value     asks for a value; scored by ranking the item's own choices
#     cloze     a sentence of the pre-training text without its end, which goes on without a trigger
#     number    the same, where the end is a number
_TOY_RULES = {"value": lambda text: text.partition(TRIGGER)[2].strip() or None,
              "cloze": lambda text: text.strip() or None,
              "number": first_number, "arithmetic": last_number}


def _toy(name, kind, suite, **splits):
    strict = stated_number if kind == "arithmetic" else _TOY_RULES[kind]
    return Task(name, "cloze" if kind == "number" else kind, (), 0.0, splits, "",
                _TOY_RULES[kind], strict, max_new_tokens=32 if kind == "arithmetic" else 4,
                suite=suite, score="choice" if kind in ("value", "cloze") else "generate")


SUITES = ("in distribution", "new format", "retention")    # their mean hides what fine-tuning does
TOY = {task.name: task for task in (
    # Training asks about other people, or has other stories, than the tests do.
    _toy("toy-facts", "value", "in distribution", train=1125, test=300),
    _toy("toy-pick", "value", "in distribution", train=875, test=200),   # of three values
    _toy("toy-sums", "arithmetic", "in distribution", train=1000, test=200),
    # Other wordings and stories; "unseen": kinds of facts that fine-tuning never asks for.
    _toy("toy-facts-new", "value", "new format", test=300),
    _toy("toy-facts-unseen", "value", "new format", test=200),
    _toy("toy-pick-unseen", "value", "new format", test=200),
    _toy("toy-sums-new", "arithmetic", "new format", test=200),
    # What the base model could do.
    _toy("toy-cloze", "cloze", "retention", test=300),
    _toy("toy-famous", "cloze", "retention", test=225),
    _toy("toy-common", "cloze", "retention", test=168),
    _toy("toy-plain", "number", "retention", test=200),
)}
BUILT_IN = {**KNOWN, **TOY}
OWN_NAME = re.compile(r"\w[\w.-]{,63}")
OWN = {"kind": '"choice", "arithmetic" or "text"',     # what a task.json says
       "answers": 'two or more different texts, as in ["yes", "no"]',
       "max_new_tokens": "a whole number above 0"}


def own_task(path: Path) -> Task:
    """The task that a DIR/<name>/task.json describes. Raises BadInput, naming file and key."""
    said, name, splits = read_json(path), path.parent.name, ("train", "test")
    kind, answers, room = (said.get(key) for key in OWN)
    good = {"kind": kind in ("choice", "arithmetic", "text"),
            "answers": isinstance(answers, list) and len(answers) > 1 and all(
                isinstance(text, str) and text.isprintable() and text.strip() == text != ""
                and answers.count(text) == 1 for text in answers),
            "max_new_tokens": type(room) is int and 0 < room < 10**6}
    keys = [key for key in OWN if key != "answers" or kind == "choice"]
    for key in (*keys[:-1], *said):        # all but the last are needed
        if key not in keys or not good[key]:
            wanted = f"must be {OWN[key]}" if key in keys else f"is none of {', '.join(keys)}"
            raise BadInput(f'{path}: "{key}" {wanted}; it is {said.get(key)!r:.60}')
    splits = {split: 0 for split in splits if path.with_name(f"{split}.json").is_file()}
    task = (_choice(name, tuple(answers), len(answers), **splits) if kind == "choice"
            else _arithmetic(name, **splits))
    if kind == "text":                 # it has no answers, only a likelihood
        task = replace(task, kind=kind, extract=lambda text: None, score="nll")
    return replace(task, source="", own=said, max_new_tokens=room or task.max_new_tokens)


def find(name: str, data_dir=None) -> Task:
    """The built-in task of that name, or the one that DIR/<name>/task.json describes. Raises
    BadInput for another, naming the nearest, and for a task.json that means nothing."""
    own = Path(data_dir or "", name, "task.json")
    if data_dir and OWN_NAME.fullmatch(name) and own.is_file():
        if name in BUILT_IN:
            raise BadInput(f"{own}: {name} is a built-in task; give your own another name")
        return own_task(own)
    if name not in BUILT_IN:
        near = {name.lower(): name for name in KNOWN}      # and the names that papers use
        near |= {"siqa": "social_i_qa", "obqa": "openbookqa", "arc-c": "ARC-Challenge"}
        found = difflib.get_close_matches(name.lower(), near, 1, 0.5)
        guess = f"; did you mean {near[found[0]]}?" if found else ""
        raise BadInput(f"there is no task {name!r}{guess} (known: {', '.join(KNOWN)}; "
                       f"one of your own needs {own}: python data/prepare.py --help)")
    return BUILT_IN[name]


# ------------------------------------------------------------------------ from a file to examples


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str              # what training teaches; nobody reads it in a test split
    answer: str                # gold
    choices: tuple[str, ...]   # the labels of this item; () where any number may be the answer
    index: int                 # row of the file, counted from 0
    task: Task


def make_prompt(task: Task, instruction: str, input: str = "") -> str:
    """The only place where a prompt is made, so that training and evaluation cannot differ."""
    if task.kind in ("cloze", "text"):
        return instruction                                 # a sentence goes on where it stops
    prompt = instruction + "\n" + (input + "\n" if input else "")
    return prompt + (THINK if task.kind == "arithmetic" else "")


def make_response(task: Task, answer: str, output: str) -> str:
    r"""What to learn. "...\n#### 72" -> "...\nThe final answer is: 72". GSM8K's <<48/2=24>> marks
    stay, as in ReFT."""
    if task.kind == "text":
        return output
    if task.kind == "cloze":
        return " " + answer
    if task.kind in ("choice", "value"):
        return TRIGGER + answer
    text = output.rstrip()     # a regular expression would be slow at "#### " and many spaces
    mark = text.find("####", text.rfind("\n") + 1)         # the first one on the last line
    said = text[mark + 4:].lstrip(" ") if mark >= 0 else ""
    return text[:mark] + FINAL + said if said else output


def option_texts(example: Example) -> list[tuple[str, str]]:
    """How a text goes on with each of an item's options: [(prompt, continuation)], as the Language
    Model Evaluation Harness (EleutherAI) asks. [] where the instruction does not spell them out."""
    rest, _, labels = example.prompt.partition("Answer format:")
    texts = []
    for label in reversed(example.choices if len(labels.split()) == 1 else ()):
        rest, found, text = rest.rpartition(f"{label.capitalize()}:")
        if not found:
            return []
        texts.insert(0, text.strip())
    question = re.sub(r"\APlease choose[^:]*:", "", rest).strip()
    if example.task.name == "winogrande":                  # scored is what stands after the blank
        before, _, after = question.partition("_")
        return [(before + text, after) for text in texts] if after else []
    asks = question if example.task.name == "hellaswag" else f"Question: {question}\nAnswer:"
    return [(asks, " " + text) for text in texts] if question else []


def load(data_dir, name: str, split: str) -> list[Example]:
    """Read DIR/<name>/<split>.json. Raises BadInput, naming file and row, for whatever is wrong."""
    task, folder = find(name, data_dir), Path(data_dir)
    path = folder / name / f"{split}.json"
    if split not in task.splits:
        why = {"train": "training split: it is an out-of-distribution test; train on gsm8k",
               "test": "test split: it is for training; test on the 8 choice tasks it mixes"}
        other = f"split {split!r}: it has {' and '.join(task.splits) or 'none'}, and no {path}"
        raise BadInput(f"{name} has no {(why if name in KNOWN else {}).get(split, other)}")
    try:
        return parse(path.read_bytes(), path, task, split)
    except (FileNotFoundError, NotADirectoryError):
        have = [known for known in BUILT_IN if (folder / known / path.name).is_file()]
        there = f"{folder} has {split} files for: {', '.join(have) or 'no task'}"
        there = there if folder.is_dir() else f"there is no folder {folder}"
        command = "world.py" if task.suite else f"prepare.py {name}"
        raise BadInput(f"{path} is missing ({there}); make it with: python data/{command} --out "
                       f"{shlex.quote(str(folder))}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot read it ({error.strerror})") from None


def parse(raw: bytes, where, task: Task, split: str) -> list[Example]:
    """The examples in a file's bytes; `where` names the file in messages. Raises BadInput."""
    rows, examples = parse_json(raw, where, list), []
    if not rows:
        raise BadInput(f"{where}: an empty list; it must be a list of "
                       '{"instruction", "input", "output", "answer"}')
    for index, row in enumerate(rows):
        try:
            examples.append(_example(row, index, task, split))
        except BadInput as error:
            raise BadInput(f"{where}, row {index} (the first is 0): {error}") from None
    return examples


def _example(row, index, task, split):
    if not isinstance(row, dict):
        raise BadInput(f"not an object but {row!r:.40}")
    if row.get("input") is None:           # absent and null mean empty
        row = {**row, "input": ""}
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key), str):
            wrong = f"is {row[key]!r:.40}, not text" if key in row else "is missing"
            raise BadInput(f'"{key}" {wrong}')
        if re.search("[\ud800-\udfff]", row[key]):
            raise BadInput(f'"{key}" holds half of a surrogate pair, which is not text')
    if not row["instruction"].strip():
        raise BadInput('"instruction" is empty')
    if task.kind in ("arithmetic", "text") and not row["output"].strip() and (
            split == "train" or task.kind == "text"):
        raise BadInput('"output" is empty: there is ' + (
            "no text that goes on" if task.kind == "text" else "no rationale to learn"))
    if task.kind == "text":
        return Example(row["instruction"], row["output"], "", (), index, task)
    answer = row.get("answer")
    if answer is None or answer == "":
        raise BadInput('"answer" is missing')
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise BadInput(f'"answer" is {json.dumps(answer):.40}, neither text nor a number; '
                       "put it in quotes")
    answer, choices = str(answer), _choices(row, task)
    if choices and answer not in choices:
        raise BadInput(f'"answer" is {answer!r:.40}, not one of {"/".join(choices)}')
    # Neither nan nor inf nor 1e999 passes.
    if not choices and not re.fullmatch(r"-?\d{1,200}(\.\d+)?(e[-+]?\d\d)?", answer):
        raise BadInput(f'"answer" is {answer!r:.40}, not a finite number; write digits only, '
                       "without commas or units")
    return Example(make_prompt(task, row["instruction"], row["input"]),
                   make_response(task, answer, row["output"]), answer, choices, index, task)


def _choices(row, task):
    """The item's own choices: of a choice task those in its last line, perhaps fewer than the
    task's; of the toy world's tasks those that the row lists."""
    choices = task.answers
    listed = re.search(r"Answer format:\s*(\w+(?:/\w+)+)\s*\Z", row["instruction"])
    if task.kind == "choice" and listed:
        choices = listed[1].split("/")
        if not set(choices) <= set(task.answers) or len(set(choices)) < len(choices):
            raise BadInput(f"its answer format is {listed[1]}, but the answers of {task.name} are "
                           + "/".join(task.answers))
    elif task.kind in ("value", "cloze") and "choices" in row:
        choices = row["choices"]
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or (
                len(set(choices)) < max(2, len(choices))):
            raise BadInput('"choices" must be a list of two or more different answers')
    return tuple(choices)


# ----------------------------------------------------------------------------------------- scoring


def judge(example: Example, text: str) -> dict:
    """Score a response by both rules -> prediction, correct, strict_prediction, strict_correct. A
    prediction of None means unparsed. Numbers are equal within 0.001, as in LLM-Adapters; more
    digits than a float holds make inf, which is never correct."""
    verdict = {}
    for prefix, rule in (("", example.task.extract), ("strict_", example.task.strict)):
        said = rule(text)
        same = said == example.answer
        if not example.choices and said is not None:
            same = abs(float(said) - float(example.answer)) <= 1e-3
        verdict |= {prefix + "prediction": said, prefix + "correct": same}
    return verdict


def chance(examples: list[Example]) -> float:
    """Expected accuracy of guessing among each item's own choices; 0 for open numbers."""
    return sum(1 / len(e.choices) for e in examples if e.choices) / len(examples)
