"""The 15 tasks: names, exact prompts, loading and checking of files, and the scoring of one response.

A task's file is DIR/<task>/<split>.json, a list of {"instruction", "input", "output", "answer"}: the layout of LLM-Adapters
(Hu et al. 2023, github.com/AGI-Edgerunners/LLM-Adapters). Two kinds of task:

    choice        "... Answer format: true/false\\n"                       ->  "the correct answer is true"
    arithmetic    "...\\nAnswer the above question. First think ...\\n"    ->  "... 48+24 = 72\\nThe final answer is: 72"

Every response is scored twice: by the rule of the literature, so that numbers compare, and by a strict one, which accepts an
answer only where the response states it. Where the two accuracies part, the first is luck.
"""
import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import BadInput

TRIGGER = "the correct answer is "         # begins the response of every choice task (ReFT, Wu et al. 2024)
FINAL = "The final answer is: "            # ends the response of every gsm8k training row
THINK = "Answer the above question. First think step by step and then answer the final number.\n"

# ------------------------------------------------------------------------------- answer rules: response text -> answer or None


def _choice_rules(labels):
    """(comparable, strict) rules. "untrue" is not "true", "answer12" is not "answer1"; "trueThe", from a model that did not stop,
    is still "true". LLM-Adapters has neither the boundaries nor the trigger: it takes the first match anywhere."""
    label = "|".join(name + (r"(?!\d)" if name[-1].isdigit() else "(?![a-z])") for name in labels)
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
    """Comparable rule: the last number anywhere, without commas. It reads "10-3" as -3, "3/4" as 4, "1e5" and ".5" as 5."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return found[-1].rstrip(".") if found else None


_NUMBER = re.compile(r"[\s$€£*]*([-+−]?)[$€£]?((?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)")
_GOES_ON = re.compile(r"[.,]?\d| *[-+−–*×x/÷^=:]+ *[-$(]?\.?\d| +\d+/")      # 1,2345  10-3  3 1/2: not one plain number


def stated_number(text):
    """Strict rule: the one plain number right after the last "The final answer is:" or "####".  "#### −$1,234.5." -> "-1234.5" """
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
    """Comparable rule for AQuA: the first capital A-E, even B in "Because ... the answer is (D)", or E in "Each"."""
    found = re.search("[A-E]", text)
    return found and found[0]


def stated_letter(text):
    """Strict rule for AQuA: the letter after the last "answer is" or "answer:"; failing that, the only one in brackets."""
    said = re.findall(r"(?i:answer(?: is:|:| is))\s*(?i:option |choice )?[\s*$(]*([A-E])\b", text)
    bracketed = set(re.findall(r"\(([A-E])\)", text))      # more than one is a list of options, not an answer
    return said[-1] if said else bracketed.pop() if len(bracketed) == 1 else None


# ----------------------------------------------------------------------------------------------------------- the table of tasks


@dataclass(frozen=True)
class Task:
    name: str
    kind: str                              # "choice": one label; "arithmetic": a rationale, then a number (AQuA: a letter)
    answers: tuple[str, ...]               # the labels an answer may be; () where any number may
    chance: float                          # of guessing right, nominally; `chance()` knows the items with more or fewer choices
    splits: dict[str, int]                 # split -> rows as published; without "train": an out-of-distribution test for gsm8k
    source: str                            # path on raw.githubusercontent.com
    extract: Callable                      # the comparable rule
    strict: Callable
    max_new_tokens: int                    # room for the response when decoding
    suite: str = ""                        # of the toy world's tasks: which of three means it counts in
    score: str = "generate"                # how eval.py scores it unless told otherwise


ADAPTERS = "AGI-Edgerunners/LLM-Adapters/main"


def _choice(name, labels, n, train, test, answers=None):
    return Task(name, "choice", answers or labels, 1 / n, dict(train=train, test=test), f"{ADAPTERS}/dataset/{name}/{{split}}.json",
                *_choice_rules(labels), max_new_tokens=32)


def _arithmetic(name, answers=(), rules=(last_number, stated_number), source=f"{ADAPTERS}/dataset/{{task}}/{{split}}.json", **splits):
    return Task(name, "arithmetic", answers, 1 / len(answers) if answers else 0.0, splits, source.replace("{task}", name),
                *rules, max_new_tokens=256)


_FIVE = ("answer1", "answer2", "answer3", "answer4", "answer5")           # LLM-Adapters looks for all five in four tasks, so
TASKS = {task.name: task for task in (                                    # "answer5" where an item has four is read, and wrong
    _choice("boolq", ("true", "false"), 2, 9427, 3270),    # without its passage, as in LLM-Adapters: a test of knowledge, not reading
    _choice("piqa", ("solution1", "solution2"), 2, 16113, 1838),
    _choice("social_i_qa", _FIVE, 3, 33410, 1954, answers=_FIVE[:3]),
    _choice("hellaswag", ("ending1", "ending2", "ending3", "ending4"), 4, 39905, 10042),
    _choice("winogrande", ("option1", "option2"), 2, 63238, 1267),
    _choice("ARC-Easy", _FIVE, 4, 2251, 2376),             # a few ARC items have 3 or 5 choices; their own format line says so
    _choice("ARC-Challenge", _FIVE, 4, 1119, 1172),
    _choice("openbookqa", _FIVE, 4, 4957, 500),
    _arithmetic("gsm8k", train=7473, test=1319,            # OpenAI's files: in LLM-Adapters' copy a machine wrote the rationales
                source="openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"),
    _arithmetic("AddSub", test=395),
    _arithmetic("SingleEq", test=508),
    _arithmetic("MultiArith", test=600),
    _arithmetic("AQuA", tuple("ABCDE"), (first_letter, stated_letter), test=254),    # not in the paper's Table 4
    _arithmetic("mawps", test=238),
    _arithmetic("SVAMP", test=1000),
)}
_ALL = tuple(dict.fromkeys(label for task in TASKS.values() if task.kind == "choice" for label in task.answers))

COMMONSENSE = Task("commonsense", "choice", _ALL, 0.0, dict(train=170420), f"{ADAPTERS}/ft-training_set/commonsense_170k.json",
                   *_choice_rules(_ALL), max_new_tokens=32)               # the 8 choice tasks' training rows mixed; not one of the 15
KNOWN = {**TASKS, "commonsense": COMMONSENSE}


def _value(text):
    return text.partition(TRIGGER)[2].strip() or None


def _toy(name, kind, suite, test, train=None):
    """A task of the toy world (world.py). "value": asked for a value, scored by ranking the item's own choices; "cloze": a sentence of
    the pre-training text without its end, which goes on without any trigger; "number": the same, where the end is a number."""
    rules = {"value": _value, "cloze": lambda text: text.strip() or None, "number": first_number, "arithmetic": last_number}[kind]
    return Task(name, "cloze" if kind == "number" else kind, (), 0.0, dict(train=train, test=test) if train else dict(test=test), "",
                rules, stated_number if kind == "arithmetic" else rules, max_new_tokens=32 if kind == "arithmetic" else 4,
                suite=suite, score="generate" if kind in ("arithmetic", "number") else "choice")


SUITES = ("in distribution", "new format", "retention")    # always reported apart: their mean hides what fine-tuning does
TOY = {task.name: task for task in (
    _toy("toy-facts", "value", SUITES[0], 300, train=1125),               # people whose questions nobody has asked
    _toy("toy-pick", "value", SUITES[0], 200, train=875),                 # the same with three values to choose from
    _toy("toy-sums", "arithmetic", SUITES[0], 200, train=1000),           # small stories
    _toy("toy-facts-new", "value", SUITES[1], 300),                       # other wordings
    _toy("toy-facts-unseen", "value", SUITES[1], 200),                    # kinds of facts that fine-tuning never asks for
    _toy("toy-pick-unseen", "value", SUITES[1], 200),
    _toy("toy-sums-new", "arithmetic", SUITES[1], 200),                   # other stories
    _toy("toy-cloze", "cloze", SUITES[2], 300),                           # what the base model could do
    _toy("toy-famous", "cloze", SUITES[2], 225),
    _toy("toy-common", "cloze", SUITES[2], 168),
    _toy("toy-plain", "number", SUITES[2], 200),
)}


def find(name: str) -> Task:
    """The task of that name. Raises BadInput for another, naming the nearest."""
    if name in TOY:
        return TOY[name]
    if name not in KNOWN:
        near = {known.lower(): known for known in KNOWN}   # and the names that papers use
        near |= {"siqa": "social_i_qa", "obqa": "openbookqa", "arc-e": "ARC-Easy", "arc-c": "ARC-Challenge"}
        near = "".join(f"; did you mean {near[close]}?" for close in difflib.get_close_matches(name.lower(), near, 1, 0.5))
        raise BadInput(f"there is no task {name!r}{near} (known: {', '.join(KNOWN)})")
    return KNOWN[name]


# -------------------------------------------------------------------------------------------------------- from a file to examples


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str                          # what training teaches; nobody reads it in a test split
    answer: str                            # gold
    choices: tuple[str, ...]               # the labels of this item; () where any number may be the answer
    index: int                             # row of the file, counted from 0
    task: str


def make_prompt(task: Task, instruction: str, input: str = "") -> str:
    """The only place where a prompt is made, for training and evaluation alike, so that the two cannot differ."""
    if task.kind == "cloze":
        return instruction                                 # a sentence goes on where it stops
    return instruction + "\n" + (input + "\n" if input else "") + (THINK if task.kind == "arithmetic" else "")


def make_response(task: Task, answer: str, output: str) -> str:
    """What to learn. "...\\n#### 72" -> "...\\nThe final answer is: 72"; GSM8K's <<48/2=24>> marks stay, as in ReFT."""
    if task.kind == "cloze":
        return " " + answer
    if task.kind in ("choice", "value"):
        return TRIGGER + answer
    text = output.rstrip()                                 # by hand: as a regular expression it takes forever on "#### " and many spaces
    mark = text.find("####", text.rfind("\n") + 1)         # the first one on the last line
    said = text[mark + 4:].lstrip(" ") if mark >= 0 else ""
    return text[:mark] + FINAL + said if said else output


def load(data_dir, name: str, split: str) -> list[Example]:
    """Read DIR/<name>/<split>.json. Raises BadInput, naming file and row, for whatever is missing or wrong."""
    task, folder = find(name), Path(data_dir)
    if split not in task.splits:
        why = {"train": "training split: it is an out-of-distribution test; train on gsm8k",
               "test": "test split: it is for training; test on the 8 choice tasks it mixes"}
        raise BadInput(f"{name} has no {why.get(split) or f'split {split!r}: it has ' + ' and '.join(task.splits)}")
    path = folder / name / f"{split}.json"
    try:
        return parse(path.read_bytes(), path, task, split)
    except (FileNotFoundError, NotADirectoryError):
        command = "python data/world.py" if task.suite else f"python data/prepare.py {name}"
        have = ", ".join(known for known in {**KNOWN, **TOY} if (folder / known / f"{split}.json").is_file())
        there = f"{folder} has {split} files for: {have or 'no task'}" if folder.is_dir() else f"there is no folder {folder}"
        raise BadInput(f"{path} is missing ({there}); make it with: {command} --out {folder}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot read it ({error.strerror})") from None


def parse(raw: bytes, where, task: Task, split: str) -> list[Example]:
    """The examples in a file's bytes; `where` names the file in messages. Raises BadInput, as `load` does."""
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8, or fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON, or cut short ({error}; it begins {raw[:20]!r}); fetch it again") from None
    if not isinstance(rows, list) or not rows:
        what = "an empty list" if rows == [] else f"not a list but a {type(rows).__name__}"
        raise BadInput(f'{where}: {what}; it must be a list of {{"instruction", "input", "output", "answer"}}')
    examples = []
    for index, row in enumerate(rows):
        try:
            examples.append(_example(row, index, task, split))
        except BadInput as error:
            raise BadInput(f"{where}, row {index} (the first is 0): {error}") from None
    return examples


_HALF = re.compile("[\ud800-\udfff]")                    # JSON's \u escapes allow it, and no tokenizer can encode it


def _example(row, index, task, split):
    if not isinstance(row, dict):
        raise BadInput(f"not an object but {row!r:.40}")
    row = {**row, "input": "" if row.get("input") is None else row["input"]}   # absent and null mean empty
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key), str):
            raise BadInput(f'"{key}" is {row[key]!r:.40}, not text' if key in row else f'"{key}" is missing')
        if _HALF.search(row[key]):
            raise BadInput(f'"{key}" holds half of a surrogate pair, which is not text')
    if not row["instruction"].strip():
        raise BadInput('"instruction" is empty')
    answer, choices = row.get("answer"), task.answers
    if answer is None or answer == "":
        raise BadInput('"answer" is missing')
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise BadInput(f'"answer" is {json.dumps(answer):.40}, neither text nor a number; put it in quotes')
    answer = str(answer)
    listed = re.search(r"Answer format:\s*(\w+(?:/\w+)+)\s*\Z", row["instruction"]) if task.kind == "choice" else None
    if listed:                                             # the item's own labels, perhaps fewer than the task's
        choices = tuple(listed[1].split("/"))
        if not set(choices) <= set(task.answers) or len(set(choices)) < len(choices):
            raise BadInput(f"its answer format is {listed[1]}, but the answers of {task.name} are {'/'.join(task.answers)}")
    if task.kind in ("value", "cloze") and "choices" in row:                  # the values of its kind
        if not isinstance(row["choices"], list) or len(row["choices"]) < 2 or not all(isinstance(choice, str) for choice in row["choices"]):
            raise BadInput('"choices" must be a list of two or more answers')
        choices = tuple(row["choices"])
        if _HALF.search("".join(choices)) or len(set(choices)) < len(choices):
            raise BadInput('"choices" holds a choice twice, or half of a surrogate pair, which is not text')
    if choices and answer not in choices:
        raise BadInput(f'"answer" is {answer!r:.40}, not one of {"/".join(choices)}')
    if not choices and not re.fullmatch(r"-?\d{1,200}(\.\d+)?(e[-+]?\d\d)?", answer):      # neither nan nor inf nor 1e999 passes
        raise BadInput(f'"answer" is {answer!r:.40}, not a finite number; write digits only, without commas or units')
    if task.kind == "arithmetic" and split == "train" and not row["output"].strip():
        raise BadInput('"output" is empty: there is no rationale to learn')
    return Example(make_prompt(task, row["instruction"], row["input"]), make_response(task, answer, row["output"]),
                   answer, choices, index, task.name)


# --------------------------------------------------------------------------------------------------------------------- scoring


def judge(example: Example, text: str) -> dict:
    """Score a response by both rules -> prediction, correct, strict_prediction, strict_correct. A prediction of None means
    unparsed. Numbers are equal within 0.001, as in LLM-Adapters; more digits than a float holds make inf, never correct."""
    task, verdict = find(example.task), {}
    for prefix, rule in (("", task.extract), ("strict_", task.strict)):
        said = rule(text)
        same = said == example.answer if example.choices else said is not None and abs(float(said) - float(example.answer)) <= 1e-3
        verdict |= {prefix + "prediction": said, prefix + "correct": same}
    return verdict


def chance(examples: list[Example]) -> float:
    """Expected accuracy of guessing among each item's own choices; 0 for open numbers."""
    return sum(1 / len(example.choices) for example in examples if example.choices) / len(examples)
