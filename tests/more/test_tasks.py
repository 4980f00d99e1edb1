"""Tasks: the table, chance, numbers that are nearly equal, and the faults of a data file that stop
a run before it starts. test_06_answers.py has the prompts and the answer rules."""
import json

import pytest

from data import BadInput
from data.tasks import KNOWN, TASKS, TOY, Example, chance, find, judge, load, parse

BOOLQ = dict(instruction="Is water wet?\n\nAnswer format: true/false", input="",
             output="the correct answer is true", answer="true")
SUM = dict(instruction="How much is 48 + 24?", input="",
           output="48+24 = <<48+24=72>>72\n#### 72", answer="72")
ANSWERS = "Answer format: answer1/answer2/answer3"
ITEM = {                                   # the end of an instruction of each task, and an answer
    "boolq": ("Answer format: true/false", "true"),
    "piqa": ("Answer format: solution1/solution2", "solution2"),
    "social_i_qa": (ANSWERS, "answer3"),
    "winogrande": ("Option2: B Answer format: option1/option2", "option1"),
    "hellaswag": ("Answer format: ending1/ending2/ending3/ending4", "ending4"),
    "commonsense": ("Option2: B Answer format: option1/option2", "option1"),
    "AQuA": ("Answer Choices: (A) 1 (B) 2", "B"),
    "ARC-Easy": (ANSWERS + "/answer4", "answer4"),
    "ARC-Challenge": (ANSWERS + "/answer4", "answer4"),
    "openbookqa": (ANSWERS + "/answer4", "answer4")}


def rows_for(name, n=2):
    extra, answer = ITEM.get(name, ("", "3.0"))
    return [dict(instruction=f"Question {i}? {extra}", input="", output="2 + 1 = 3\n#### 3",
                 answer=answer) for i in range(n)]


def example_of(name, row, split="test"):
    """The example that a file with this one row gives."""
    return parse(json.dumps([row]).encode(), "FILE", find(name), split)[0]


def gold(name, answer, choices=None):
    """An example of which only the right answer matters."""
    task = find(name)
    return Example("", "", answer, task.answers if choices is None else choices, 0, task)


# --------------------------------------------------------------------------------------- the table


def test_there_are_fifteen_tasks_nine_to_train_on_and_six_to_generalise_to():
    assert len(TASKS) == 15 and "commonsense" not in TASKS and "commonsense" in KNOWN
    assert [name for name, task in TASKS.items() if "train" not in task.splits] == [
        "AddSub", "SingleEq", "MultiArith", "AQuA", "mawps", "SVAMP"]
    assert all("test" in task.splits for task in TASKS.values())
    assert [name for name, task in TASKS.items() if task.kind == "choice"] == [
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge",
        "openbookqa"]


def test_labels_get_32_new_tokens_and_rationales_256():
    room = {"choice": 32, "arithmetic": 256}
    assert all(task.max_new_tokens == room[task.kind] for task in TASKS.values())


def test_the_mixture_of_170k_rows_is_the_eight_training_splits_together():
    choice, mixed = [task for task in TASKS.values() if task.kind == "choice"], KNOWN["commonsense"]
    assert mixed.splits["train"] == sum(task.splits["train"] for task in choice)
    assert set(mixed.answers) == {label for task in choice for label in task.answers}


def test_chance_is_what_guessing_among_the_labels_gives():
    expected = dict(boolq=1 / 2, piqa=1 / 2, social_i_qa=1 / 3, hellaswag=1 / 4, winogrande=1 / 2,
                    openbookqa=1 / 4, AQuA=1 / 5, gsm8k=0)
    assert {name: TASKS[name].chance for name in expected} == expected


def test_a_task_can_be_a_key():
    assert {TASKS["boolq"]: 1}[find("boolq")] == 1 and TASKS["piqa"] != TASKS["boolq"]


def test_chance_of_a_file_counts_each_items_own_choices():
    two, five, open_number = gold("boolq", "true"), gold("AQuA", "A"), gold("gsm8k", "7")
    assert chance([two, five]) == pytest.approx((1 / 2 + 1 / 5) / 2)
    assert chance([two, open_number]) == pytest.approx(1 / 4)


# ----------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize("right, said, correct", [
    ("72.0", "72", True), ("72", "72.0009", True), ("72", "72.002", False), ("72", "-72", False),
    ("1000", "1,000", True), ("1.8333333333333335", "1.833", True), ("0.75", ".75", False),
    ("7", "9" * 400, False), ("1" * 200, "9" * 400, False), ("0", "-0", True), ("5", "٥", True)])
def test_numbers_are_equal_within_a_thousandth(right, said, correct):
    assert judge(gold("gsm8k", right), said)["correct"] is correct


@pytest.mark.parametrize("text", [
    "9" * 100_000, "#### " + "9" * 100_000, "#### 1" + ",000" * 20_000, "#### 1e" + "9" * 5000,
    "(" * 50_000 + "the answer is" * 9], ids=range(5))
@pytest.mark.parametrize("name, right", [("gsm8k", "7"), ("AQuA", "A"), ("boolq", "true")])
def test_very_long_responses_are_judged_without_error(name, right, text):
    verdict = judge(gold(name, right), text)
    assert not verdict["correct"] and not verdict["strict_correct"]


# -------------------------------------------------------------------------------------------- load


@pytest.fixture
def folder(tmp_path):
    for name, task in KNOWN.items():
        for split in task.splits:
            path = tmp_path / name / f"{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(rows_for(name)))
    return tmp_path


@pytest.mark.parametrize("name", KNOWN)
def test_every_split_of_every_task_loads(folder, name):
    for split in KNOWN[name].splits:
        examples = load(folder, name, split)
        assert [e.index for e in examples] == [0, 1]
        assert all(e.task is KNOWN[name] for e in examples)
        assert examples[1].prompt.startswith("Question 1? ")
        if KNOWN[name].kind == "choice":
            assert examples[0].response == "the correct answer is " + examples[0].answer


def test_the_items_own_answer_format_overrides_the_tasks():
    def choices(instruction):
        row = {**BOOLQ, "instruction": instruction, "answer": "answer3"}
        return example_of("ARC-Easy", row).choices

    assert choices("Which?") == TASKS["ARC-Easy"].answers
    assert choices(f"Which?\n\n{ANSWERS}") == ("answer1", "answer2", "answer3")
    # only one at the very end counts
    quoted = f"What does 'Answer format: x/y' mean? Option1: a {ANSWERS}"
    assert choices(quoted) == ("answer1", "answer2", "answer3")


def test_answers_may_be_numbers_in_json():
    given, read = (72, 72.5, -3, 1e-7), ["72", "72.5", "-3", "1e-07"]
    assert [example_of("gsm8k", {**SUM, "answer": answer}).answer for answer in given] == read


def test_a_missing_input_and_a_byte_order_mark_are_forgiven():
    row = {key: value for key, value in BOOLQ.items() if key != "input"}
    prompt = example_of("boolq", BOOLQ).prompt
    assert example_of("boolq", row).prompt == prompt
    assert example_of("boolq", {**BOOLQ, "input": None}).prompt == prompt
    assert parse(b"\xef\xbb\xbf" + json.dumps([BOOLQ]).encode(), "FILE", TASKS["boolq"], "test")


def refused(folder, name, split="test"):
    """The one line with which loading is refused."""
    with pytest.raises(BadInput) as error:
        load(folder, name, split)
    assert "\n" not in str(error.value)
    return str(error.value)


BAD_FILES = [
    (b"", "not JSON"), (b"[", "cut short"), (json.dumps([BOOLQ]).encode()[:-9], "cut short"),
    (b"<!DOCTYPE html>", "DOCTYPE"), (b'[{"instruction": "caf\xe9"}]', "not UTF-8 text (byte 21)"),
    (b"{}", "list is needed, not a dict"), (b"null", "list is needed, not a NoneType"),
    (b"[]", "an empty list"), (b"[" * 200_000, "not JSON"), (b"[" + b"9" * 5000 + b"]", "not JSON")]


@pytest.mark.parametrize("raw, says", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_broken_file_is_named(tmp_path, raw, says):
    path = tmp_path / "boolq" / "test.json"
    path.parent.mkdir()
    path.write_bytes(raw)
    message = refused(tmp_path, "boolq")
    assert message.startswith(str(path)) and says in message and len(message) < 400


CLOZE = dict(instruction="Pavo works as a", input="", output="", answer="smith",
             choices=["baker", "smith"])
BAD_ROWS = [                               # task, split, the row, what the message says
    ("boolq", "test", 7, "not an object but 7"),
    ("boolq", "test", None, "not an object but None"),
    ("boolq", "test", {"input": "", "output": "", "answer": "true"}, '"instruction" is missing'),
    ("boolq", "test", {**BOOLQ, "instruction": ["a"]}, "\"instruction\" is ['a'], not text"),
    ("boolq", "test", {**BOOLQ, "instruction": " \n"}, '"instruction" is empty'),
    ("boolq", "test", {**BOOLQ, "instruction": "half \ud83d"}, "surrogate"),
    ("boolq", "test", {"instruction": "?", "answer": "true"}, '"output" is missing'),
    ("boolq", "train", {**BOOLQ, "output": None}, '"output" is None, not text'),
    ("boolq", "test", {**BOOLQ, "output": float("nan")}, '"output" is nan'),
    ("boolq", "test", {**BOOLQ, "input": {"a": 1}}, '"input" is {\'a\': 1}, not text'),
    ("boolq", "test", {"instruction": "?", "output": ""}, '"answer" is missing'),
    ("boolq", "test", {**BOOLQ, "answer": ""}, '"answer" is missing'),
    ("boolq", "test", {**BOOLQ, "answer": True}, "put it in quotes"),
    ("boolq", "test", {**BOOLQ, "answer": ["true"]}, "neither text nor a number"),
    ("boolq", "test", {**BOOLQ, "answer": "True"}, "'True', not one of true/false"),
    ("boolq", "test", {**BOOLQ, "answer": 1}, "'1', not one of true/false"),
    ("boolq", "test", {**BOOLQ, "instruction": "? Answer format: yes/no", "answer": "yes"},
     "its answer format is yes/no"),
    ("boolq", "test", {**BOOLQ, "instruction": "? Answer format: true/true"},
     "its answer format is true/true"),
    ("ARC-Easy", "test",
     {**BOOLQ, "instruction": "? Answer format: answer1/answer2", "answer": "answer3"},
     "not one of answer1/answer2"),
    ("AQuA", "test", {**SUM, "answer": "F"}, "not one of A/B/C/D/E"),
    ("gsm8k", "test", {**SUM, "answer": "about 72"}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": "1,000"}, "without commas"),
    ("gsm8k", "test", {**SUM, "answer": float("nan")}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": float("inf")}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": "1e999"}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": "9" * 400}, "not a finite number"),
    ("gsm8k", "train", {**SUM, "output": " \n"}, "no rationale to learn"),
    ("toy-cloze", "test", {**CLOZE, "choices": "smith"}, "two or more different"),
    ("toy-cloze", "test", {**CLOZE, "choices": ["smith"]}, "two or more different"),
    ("toy-cloze", "test", {**CLOZE, "choices": ["smith", 7]}, "two or more different"),
    ("toy-cloze", "test", {**CLOZE, "choices": ["smith", "a", "a"]}, "two or more different"),
    ("toy-cloze", "test", {**CLOZE, "answer": "tanner"}, "not one of baker/smith"),
]


@pytest.mark.parametrize("name, split, row, says", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_named_with_its_number(tmp_path, name, split, row, says):
    path = tmp_path / name / f"{split}.json"
    path.parent.mkdir()
    good = CLOZE if name in TOY else rows_for(name, 1)[0]
    path.write_text(json.dumps([good, row]))
    message = refused(tmp_path, name, split)
    assert message.startswith(f"{path}, row 1 (the first is 0): ") and says in message
    assert len(message) < 400


def test_test_rows_may_lack_a_rationale_but_training_rows_may_not():
    row = {**SUM, "output": ""}            # as in mawps, and in 6 rows of LLM-Adapters' gsm8k
    assert example_of("mawps", row).answer == example_of("gsm8k", row).answer == "72"
    with pytest.raises(BadInput, match="rationale"):
        example_of("gsm8k", row, "train")


@pytest.mark.parametrize("name, split, says", [
    ("bolq", "test", "there is no task 'bolq'; did you mean boolq?"),
    ("BoolQ", "test", "did you mean boolq?"),
    ("SIQA", "test", "did you mean social_i_qa?"),
    ("arc-c", "test", "did you mean ARC-Challenge?"),
    ("arc_easy", "test", "did you mean ARC-Easy?"),
    ("../boolq", "test", "there is no task '../boolq'"),
    ("qqqqqqq", "test", "there is no task 'qqqqqqq' (known: boolq, piqa"),
    ("AddSub", "train",
     "AddSub has no training split: it is an out-of-distribution test; train on gsm8k"),
    ("commonsense", "test", "commonsense has no test split"),
    ("boolq", "dev", "boolq has no split 'dev': it has train and test"),
])
def test_an_unknown_task_or_split_names_the_nearest(folder, name, split, says):
    assert says in refused(folder, name, split)


def test_a_missing_file_says_what_is_there_and_what_fetches_it(folder):
    (folder / "piqa" / "test.json").unlink()
    message = refused(folder, "piqa")
    assert f"python data/prepare.py piqa --out {folder}" in message
    assert "test files for: boolq, social_i_qa" in message
    assert "commonsense" not in message    # which has no test split


def test_a_missing_folder_is_named(folder):
    assert "there is no folder" in refused(folder / "nowhere", "boolq")
    assert "there is no folder" in refused(folder / "boolq" / "test.json", "boolq")
    (folder / "empty").mkdir()
    assert "test files for: no task" in refused(folder / "empty", "boolq")


def test_a_missing_file_of_the_toy_world_is_made_by_another_command(tmp_path):
    assert f"make it with: python data/world.py --out {tmp_path}" in refused(tmp_path, "toy-facts")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "boolq" / "test.json").mkdir(parents=True)
    assert "test.json: cannot read it" in refused(tmp_path, "boolq")


# ----------------------------------------------------------------------------- the published files


def test_every_published_file_loads_with_its_published_number_of_rows(shared):
    seen = 0
    for path in sorted((shared / "datasets").glob("*/*.json")):
        split, _, part = path.stem.partition(".")
        task = TASKS[path.parent.name]
        examples = parse(path.read_bytes(), path, task, split)
        assert len(examples) == (20 if part else task.splits[split]), path
        assert abs(chance(examples) - task.chance) < 0.001, path
        seen += 1
        if task.kind == "choice":          # we teach what the file teaches; both rules read it back
            outputs = [row["output"] for row in json.loads(path.read_bytes())]
            assert [example.response for example in examples] == outputs
            for example in examples:
                verdict = judge(example, example.response)
                assert verdict["correct"] and verdict["strict_correct"]
    assert seen >= 18


def test_real_items_with_three_and_five_choices(shared):
    sizes = {len(example.choices) for example in load(shared / "datasets", "ARC-Easy", "test")}
    assert sizes == {3, 4, 5}


def test_on_real_rationales_the_comparable_aqua_rule_misreads_one_in_five(shared):
    """The file's own rationales end in "The answer is (D)." and are often wrong. Here they serve as
    254 realistic responses."""
    rows = json.loads((shared / "datasets" / "AQuA" / "test.json").read_bytes())
    ended = []
    for row in rows:
        _, said, rest = row["output"].rpartition("The answer is (")
        if said:
            ended.append((judge(gold("AQuA", row["answer"]), row["output"]), rest[0]))
    assert len(ended) > 200 and all(v["strict_prediction"] == letter for v, letter in ended)
    assert sum(v["prediction"] != letter for v, letter in ended) > 40
