"""Tasks: what the model reads, what it should answer, and how an answer is scored.

After reading this you know the exact prompt and response of both kinds of task, why every response is scored by two rules and
where they part ("Because ... the answer is (D)" is B to one of them), what counts as wrong and what as unparsed, and which
faults of a data file stop a run before it starts.
"""
import json

import pytest

from data import BadInput, tasks
from data.tasks import KNOWN, TASKS, Example, chance, find, judge, load, make_prompt, make_response, parse

BOOLQ = dict(instruction="Is water wet?\n\nAnswer format: true/false", input="", output="the correct answer is true", answer="true")
SUM = dict(instruction="How much is 48 + 24?", input="", output="48+24 = <<48+24=72>>72\n#### 72", answer="72")
ITEM = {                                   # one good row per task
    "boolq": ("Answer format: true/false", "true"), "piqa": ("Answer format: solution1/solution2", "solution2"),
    "social_i_qa": ("Answer format: answer1/answer2/answer3", "answer3"), "winogrande": ("Option2: B Answer format: option1/option2", "option1"),
    "hellaswag": ("Answer format: ending1/ending2/ending3/ending4", "ending4"), "AQuA": ("Answer Choices: (A) 1 (B) 2", "B"),
    **{name: ("Answer format: answer1/answer2/answer3/answer4", "answer4") for name in ("ARC-Easy", "ARC-Challenge", "openbookqa")}}


def rows_for(name, n=2):
    extra, answer = ITEM.get(name, ("", "3.0"))
    return [dict(instruction=f"Question {i}? {extra}", input="", output="2 + 1 = 3\n#### 3", answer=answer) for i in range(n)]


def one(name, row, split="test"):
    return parse(json.dumps([row]).encode(), "FILE", find(name), split)[0]


def item(name, answer, choices=None):
    return Example("", "", answer, find(name).answers if choices is None else choices, 0, name)


# --------------------------------------------------------------------------------------------------------------------- the table


def test_there_are_fifteen_tasks_nine_to_train_on_and_six_to_generalise_to():
    assert len(TASKS) == 15 and "commonsense" not in TASKS and "commonsense" in KNOWN
    assert [name for name, task in TASKS.items() if "train" not in task.splits] == \
        ["AddSub", "SingleEq", "MultiArith", "AQuA", "mawps", "SVAMP"]
    assert all("test" in task.splits for task in TASKS.values())
    assert [name for name, task in TASKS.items() if task.kind == "choice"] == \
        ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
    assert {task.max_new_tokens for task in TASKS.values() if task.kind == "choice"} == {32}
    assert {task.max_new_tokens for task in TASKS.values() if task.kind == "arithmetic"} == {256}


def test_the_mixture_of_170k_rows_is_the_eight_training_splits_together():
    assert KNOWN["commonsense"].splits["train"] == sum(task.splits["train"] for task in TASKS.values() if task.kind == "choice")
    assert set(KNOWN["commonsense"].answers) == {label for task in TASKS.values() if task.kind == "choice" for label in task.answers}


def test_chance_is_what_guessing_among_the_labels_gives():
    expected = dict(boolq=1 / 2, piqa=1 / 2, social_i_qa=1 / 3, hellaswag=1 / 4, winogrande=1 / 2, openbookqa=1 / 4, AQuA=1 / 5, gsm8k=0)
    assert {name: TASKS[name].chance for name in expected} == expected


def test_chance_of_a_file_counts_each_items_own_choices():
    two, five, open_number = item("boolq", "true"), item("AQuA", "A"), item("gsm8k", "7")
    assert chance([two, five]) == pytest.approx((1 / 2 + 1 / 5) / 2)
    assert chance([two, open_number]) == pytest.approx(1 / 4)


# ---------------------------------------------------------------------------------------------------------- prompts and responses


def test_choice_prompt_is_the_instruction_and_a_newline():
    example = one("boolq", BOOLQ)
    assert example.prompt == "Is water wet?\n\nAnswer format: true/false\n"
    assert example.response == "the correct answer is true"
    assert (example.answer, example.choices, example.index, example.task) == ("true", ("true", "false"), 0, "boolq")


def test_arithmetic_prompt_asks_for_steps_and_the_response_ends_in_the_final_answer():
    example = one("gsm8k", SUM, "train")
    assert example.prompt == ("How much is 48 + 24?\nAnswer the above question. First think step by step and then answer the final "
                              "number.\n")
    assert example.response == "48+24 = <<48+24=72>>72\nThe final answer is: 72"
    assert example.choices == ()


def test_a_second_input_goes_on_its_own_line():
    assert one("boolq", {**BOOLQ, "input": "Think of rain."}).prompt == BOOLQ["instruction"] + "\nThink of rain.\n"
    assert make_prompt(TASKS["AddSub"], "1+1?", "Hint: 2") == "1+1?\nHint: 2\n" + tasks.THINK


def test_spaces_of_the_published_text_are_left_alone():
    assert make_prompt(TASKS["MultiArith"], " How many? ").startswith(" How many? \nAnswer")


@pytest.mark.parametrize("output, response", [
    ("a\n#### 72", "a\nThe final answer is: 72"),
    ("a\n#### 1,000\n ", "a\nThe final answer is: 1,000"),
    ("#### 5 is not the end\n#### -5", "#### 5 is not the end\nThe final answer is: -5"),       # only the trailing one
    ("no mark at all, so 72.", "no mark at all, so 72."),
])
def test_gsm8k_mark_is_written_out(output, response):
    assert make_response(TASKS["gsm8k"], "72", output) == response


# ------------------------------------------------------------------------------------------------------------------ answer rules

TRAPS_CHOICE = [                           # task, response, comparable rule, strict rule
    ("boolq", "the correct answer is true", "true", "true"),
    ("boolq", "the correct answer is trueThe correct answer is false", "true", "true"),         # did not stop
    ("boolq", "the correct answer is untrue", None, None),
    ("boolq", "the correct answer is trueness", None, None),
    ("boolq", "the correct answer is True", None, None),                                        # case-sensitive
    ("boolq", "false? no, the correct answer is true", "true", "true"),                         # after the trigger, not before it
    ("boolq", "the correct answer is true. But the correct answer is false", "true", "true"),   # the first trigger
    ("boolq", "true, since the correct answer is obvious", None, None),                         # trigger there, nothing allowed after it
    ("boolq", "the correct answer is not true", "true", None),                                  # the comparable rule cannot read
    ("boolq", "Yes, that is true.", "true", None),                                              # no trigger: anywhere, but not strictly
    ("boolq", "true? the correct answer is ", None, None),                                      # cut off
    ("boolq", "the correct answer is", None, None),
    ("boolq", "", None, None),
    ("boolq", "the correct answer is **false**", "false", None),
    ("ARC-Easy", "the correct answer is answer1", "answer1", "answer1"),
    ("ARC-Easy", "the correct answer is answer12", None, None),
    ("ARC-Easy", "the correct answer is answer1the correct answer is answer2", "answer1", "answer1"),
    ("social_i_qa", "the correct answer is answer4 or answer1", "answer4", "answer4"),          # out of range, but an answer
    ("winogrande", "the correct answer is Option1, so option2", "option2", None),
    ("hellaswag", "the correct answer is ending4.", "ending4", "ending4"),
    ("piqa", "solution3 or solution2", "solution2", None),
]


@pytest.mark.parametrize("name, text, loose, strict", TRAPS_CHOICE)
def test_choice_rules(name, text, loose, strict):
    assert (TASKS[name].extract(text), TASKS[name].strict(text)) == (loose, strict)


TRAPS_NUMBER = [                           # what stands after "The final answer is: ", comparable rule, strict rule
    ("72", "72", "72"),
    ("72.", "72", "72"),
    ("72 apples, of 100", "100", "72"),
    ("$1,234.50", "1234.50", "1234.50"),
    ("$1,234.50.", "1234.50", "1234.50"),
    ("1,000,000", "1000000", "1000000"),
    ("1,2345", "12345", None),             # that comma separates nothing we know
    ("1,23", "123", None),
    ("5, so 3 more", "3", "5"),
    ("-3", "-3", "-3"),
    ("−3", "3", "-3"),                     # unicode minus
    ("-$3", "3", "-3"),
    ("$-3", "-3", "-3"),
    ("+3", "3", "+3"),
    ("10-3", "-3", None),
    ("10 - 3 = 7", "7", None),
    ("3/4", "4", None),
    ("3 1/2", "2", None),
    ("10:30", "30", None),
    ("1e5", "5", "1e5"),
    ("2e5/2", "2", None),
    (".5", "5", ".5"),
    ("50%", "50", "50"),
    ("**72**\n\nNext question: 8", "8", "72"),
    ("$72$", "72", "72"),
    ("1.2.3", "3", None),
    ("e5", "5", None),
    ("unknown", None, None),
    (".", None, None),
    ("", None, None),
]


@pytest.mark.parametrize("tail, loose, strict", TRAPS_NUMBER)
def test_number_rules(tail, loose, strict):
    text = "First nothing. The final answer is: " + tail
    assert (tasks.last_number(text), tasks.stated_number(text)) == (loose, strict)


def test_strict_number_needs_the_phrase_and_takes_the_last_one():
    assert tasks.stated_number("10-3") is None and tasks.last_number("10-3") == "-3"
    assert tasks.stated_number("so it is 7") is None
    assert tasks.stated_number("The final answer is: 1\nThe final answer is: 2\nQ: 3") == "2"
    assert tasks.stated_number("a 5\n#### 6\n7") == "6"


TRAPS_LETTER = [
    ("Because 3 > 2 the answer is (D).", "B", "D"),
    ("Each costs 4, so the answer is C", "E", "C"),
    ("A train ... The final answer is: D", "A", "D"),
    ("The answer is (A). Wait, the answer is (B).", "A", "B"),
    ("The answer is: **E**", "E", "E"),
    ("Answer: option B", "A", "B"),        # the A of "Answer"
    ("so it must be (C).", "C", "C"),
    ("(A) 5 (B) 6 (C) 7", "A", None),      # a list of options
    ("The final answer is: 23", None, None),
    ("the answer is Eve's", "E", None),
    ("the answer is d", None, None),
    ("", None, None),
]


@pytest.mark.parametrize("text, loose, strict", TRAPS_LETTER)
def test_letter_rules(text, loose, strict):
    assert (tasks.first_letter(text), tasks.stated_letter(text)) == (loose, strict)


# ------------------------------------------------------------------------------------------------------------------------- judge


def test_judge_gives_both_verdicts():
    assert judge(item("AQuA", "D"), "Because 3 > 2 the answer is (D).") == dict(
        prediction="B", correct=False, strict_prediction="D", strict_correct=True)
    assert judge(item("gsm8k", "72"), "The final answer is: 72 of 100") == dict(
        prediction="100", correct=False, strict_prediction="72", strict_correct=True)


def test_a_label_that_the_item_lacks_is_wrong_and_not_unparsed():
    verdict = judge(item("ARC-Easy", "answer1", ("answer1", "answer2", "answer3")), "the correct answer is answer5")
    assert verdict == dict(prediction="answer5", correct=False, strict_prediction="answer5", strict_correct=False)


def test_unparsed_is_none_and_never_correct():
    for name, gold in (("boolq", "true"), ("gsm8k", "0"), ("AQuA", "A")):
        assert judge(item(name, gold), "?!") == dict(prediction=None, correct=False, strict_prediction=None, strict_correct=False)


@pytest.mark.parametrize("gold, said, correct", [
    ("72.0", "72", True), ("72", "72.0009", True), ("72", "72.002", False), ("72", "-72", False), ("1000", "1,000", True),
    ("1.8333333333333335", "1.833", True), ("0.75", ".75", False), ("7", "9" * 400, False), ("1" * 200, "9" * 400, False),
    ("0", "-0", True), ("5", "٥", True)])
def test_numbers_are_equal_within_a_thousandth(gold, said, correct):
    assert judge(item("gsm8k", gold), said)["correct"] is correct


def test_very_long_responses_are_judged_without_error():
    for text in ("9" * 100_000, "#### " + "9" * 100_000, "#### 1" + ",000" * 20_000, "#### 1e" + "9" * 5000, "(" * 50_000 + "the answer is" * 9):
        for name in ("gsm8k", "AQuA", "boolq"):
            verdict = judge(item(name, "7" if name == "gsm8k" else TASKS[name].answers[0]), text)
            assert not verdict["correct"] and not verdict["strict_correct"]


# -------------------------------------------------------------------------------------------------------------------------- load


@pytest.fixture
def folder(tmp_path):
    for name, task in KNOWN.items():
        for split in task.splits:
            path = tmp_path / name / f"{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(rows_for("winogrande" if name == "commonsense" else name)))
    return tmp_path


@pytest.mark.parametrize("name", KNOWN)
def test_every_split_of_every_task_loads(folder, name):
    for split in KNOWN[name].splits:
        examples = load(folder, name, split)
        assert [e.index for e in examples] == [0, 1] and {e.task for e in examples} == {name}
        assert examples[1].prompt.startswith("Question 1? ")
        if KNOWN[name].kind == "choice":
            assert examples[0].response == "the correct answer is " + examples[0].answer


def test_the_items_own_answer_format_overrides_the_tasks():
    three = {**BOOLQ, "instruction": "Which?\n\nAnswer format: answer1/answer2/answer3", "answer": "answer3"}
    assert one("ARC-Easy", three).choices == ("answer1", "answer2", "answer3")
    assert one("ARC-Easy", {**three, "instruction": "Which?"}).choices == TASKS["ARC-Easy"].answers
    quoted = {**three, "instruction": "What does 'Answer format: x/y' mean? Option1: a Answer format: answer1/answer2/answer3"}
    assert one("ARC-Easy", quoted).choices == ("answer1", "answer2", "answer3")        # the last one, at the end


def test_answers_may_be_numbers_in_json():
    assert [one("gsm8k", {**SUM, "answer": answer}).answer for answer in (72, 72.5, -3, 1e-7)] == ["72", "72.5", "-3", "1e-07"]


def test_a_missing_input_and_a_byte_order_mark_are_forgiven():
    row = {key: value for key, value in BOOLQ.items() if key != "input"}
    assert one("boolq", row).prompt == one("boolq", BOOLQ).prompt == one("boolq", {**BOOLQ, "input": None}).prompt
    assert parse(b"\xef\xbb\xbf" + json.dumps([BOOLQ]).encode(), "FILE", TASKS["boolq"], "test")


BAD_FILES = [
    (b"", "not JSON"), (b"[", "cut short"), (json.dumps([BOOLQ]).encode()[:-9], "cut short"), (b"<!DOCTYPE html>", "DOCTYPE"),
    (b'[{"instruction": "caf\xe9"}]', "not UTF-8 text (byte 21)"), (b"{}", "not a list but a dict"), (b"null", "not a list but a NoneType"),
    (b"[]", "an empty list"), (b"[" * 200_000, "not JSON"), (b"[" + b"9" * 5000 + b"]", "not JSON")]


@pytest.mark.parametrize("raw, says", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_broken_file_is_named(tmp_path, raw, says):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_bytes(raw)
    with pytest.raises(BadInput) as error:
        load(tmp_path, "boolq", "test")
    message = str(error.value)
    assert message.startswith(str(tmp_path / "boolq" / "test.json")) and says in message and "\n" not in message and len(message) < 400


BAD_ROWS = [                               # task, split, the row, what the message says
    ("boolq", "test", 7, "not an object but 7"),
    ("boolq", "test", None, "not an object but None"),
    ("boolq", "test", {k: v for k, v in BOOLQ.items() if k != "instruction"}, '"instruction" is missing'),
    ("boolq", "test", {**BOOLQ, "instruction": ["a"]}, "\"instruction\" is ['a'], not text"),
    ("boolq", "test", {**BOOLQ, "instruction": " \n"}, '"instruction" is empty'),
    ("boolq", "test", {**BOOLQ, "instruction": "half \ud83d\n\nAnswer format: true/false"}, "surrogate"),
    ("boolq", "test", {k: v for k, v in BOOLQ.items() if k != "output"}, '"output" is missing'),
    ("boolq", "train", {**BOOLQ, "output": None}, '"output" is None, not text'),
    ("boolq", "test", {**BOOLQ, "output": float("nan")}, '"output" is nan'),
    ("boolq", "test", {**BOOLQ, "input": {"a": 1}}, '"input" is {\'a\': 1}, not text'),
    ("boolq", "test", {k: v for k, v in BOOLQ.items() if k != "answer"}, '"answer" is missing'),
    ("boolq", "test", {**BOOLQ, "answer": ""}, '"answer" is missing'),
    ("boolq", "test", {**BOOLQ, "answer": True}, "put it in quotes"),
    ("boolq", "test", {**BOOLQ, "answer": ["true"]}, "neither text nor a number"),
    ("boolq", "test", {**BOOLQ, "answer": "True"}, "'True', not one of true/false"),
    ("boolq", "test", {**BOOLQ, "answer": 1}, "'1', not one of true/false"),
    ("boolq", "test", {**BOOLQ, "instruction": "? Answer format: yes/no", "answer": "yes"}, "its answer format is yes/no"),
    ("boolq", "test", {**BOOLQ, "instruction": "? Answer format: true/true"}, "its answer format is true/true"),
    ("ARC-Easy", "test", {**BOOLQ, "instruction": "? Answer format: answer1/answer2", "answer": "answer3"}, "not one of answer1/answer2"),
    ("AQuA", "test", {**SUM, "answer": "F"}, "not one of A/B/C/D/E"),
    ("gsm8k", "test", {**SUM, "answer": "about 72"}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": "1,000"}, "without commas"),
    ("gsm8k", "test", {**SUM, "answer": float("nan")}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": float("inf")}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": "1e999"}, "not a finite number"),
    ("gsm8k", "test", {**SUM, "answer": "9" * 400}, "not a finite number"),
    ("gsm8k", "train", {**SUM, "output": " \n"}, "no rationale to learn"),
]


@pytest.mark.parametrize("name, split, row, says", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_named_with_its_number(tmp_path, name, split, row, says):
    path = tmp_path / name / f"{split}.json"
    path.parent.mkdir()
    good = SUM if name == "gsm8k" else {**BOOLQ, "answer": TASKS[name].answers[0], "instruction": "?"}
    path.write_text(json.dumps([good, row]))
    with pytest.raises(BadInput) as error:
        load(tmp_path, name, split)
    message = str(error.value)
    assert message.startswith(f"{path}, row 1 (the first is 0): ") and says in message and "\n" not in message and len(message) < 400


def test_test_rows_may_lack_a_rationale_but_training_rows_may_not():
    row = {**SUM, "output": ""}
    assert one("mawps", row).answer == "72" and one("gsm8k", row).answer == "72"      # as in mawps, and 6 rows of LLM-Adapters' gsm8k
    with pytest.raises(BadInput, match="rationale"):
        one("gsm8k", row, "train")


@pytest.mark.parametrize("name, split, says", [
    ("bolq", "test", "there is no task 'bolq'; did you mean boolq?"),
    ("BoolQ", "test", "did you mean boolq?"),
    ("SIQA", "test", "did you mean social_i_qa?"),
    ("arc-c", "test", "did you mean ARC-Challenge?"),
    ("arc_easy", "test", "did you mean ARC-Easy?"),
    ("../boolq", "test", "there is no task '../boolq'"),
    ("qqqqqqq", "test", "there is no task 'qqqqqqq' (known: boolq, piqa"),
    ("AddSub", "train", "AddSub has no training split: it is an out-of-distribution test; train on gsm8k"),
    ("commonsense", "test", "commonsense has no test split"),
    ("boolq", "dev", "boolq has no split 'dev': it has train and test"),
])
def test_unknown_tasks_and_splits(folder, name, split, says):
    with pytest.raises(BadInput) as error:
        load(folder, name, split)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_says_what_is_there_and_what_fetches_it(folder):
    (folder / "piqa" / "test.json").unlink()
    (folder / "boolq" / "train.json").unlink()
    with pytest.raises(BadInput) as error:
        load(folder, "piqa", "test")
    message = str(error.value)
    assert f"python data/prepare.py piqa --out {folder}" in message
    assert "test files for: boolq, social_i_qa" in message and "commonsense" not in message      # which has no test split
    with pytest.raises(BadInput, match="there is no folder"):
        load(folder / "nowhere", "boolq", "test")
    with pytest.raises(BadInput, match="there is no folder"):
        load(folder / "boolq" / "test.json", "boolq", "test")
    (folder / "empty").mkdir()
    with pytest.raises(BadInput, match="no task"):
        load(folder / "empty", "boolq", "test")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "boolq" / "test.json").mkdir(parents=True)
    with pytest.raises(BadInput, match="test.json: cannot read it"):
        load(tmp_path, "boolq", "test")


# ------------------------------------------------------------------------------------------------------------- the published files


def test_every_published_file_loads_with_its_published_number_of_rows(shared):
    seen = 0
    for path in sorted((shared / "datasets").glob("*/*.json")):
        split, _, part = path.stem.partition(".")
        task = TASKS[path.parent.name]
        examples = parse(path.read_bytes(), path, task, split)
        assert len(examples) == (20 if part else task.splits[split]), path
        assert abs(chance(examples) - task.chance) < 0.001, path
        seen += 1
        if task.kind == "choice":          # what we teach is what the file teaches, and both rules read it back
            assert [e.response for e in examples] == [row["output"] for row in json.loads(path.read_bytes())]
            for example in examples:
                verdict = judge(example, example.response)
                assert verdict["correct"] and verdict["strict_correct"]
    assert seen >= 18


def test_real_items_with_three_and_five_choices(shared):
    sizes = {len(example.choices) for example in load(shared / "datasets", "ARC-Easy", "test")}
    assert sizes == {3, 4, 5}


def test_on_real_rationales_the_comparable_aqua_rule_misreads_one_in_five(shared):
    """The file's own rationales end in "The answer is (D)." and are often wrong; here they serve as 254 realistic responses."""
    rows = json.loads((shared / "datasets" / "AQuA" / "test.json").read_bytes())
    verdicts = [judge(item("AQuA", row["answer"]), row["output"]) for row in rows]
    ended = [(v, row["output"].rpartition("The answer is (")[2][0]) for v, row in zip(verdicts, rows) if "The answer is (" in row["output"]]
    assert len(ended) > 200 and all(v["strict_prediction"] == letter for v, letter in ended)
    assert sum(v["prediction"] != letter for v, letter in ended) > 40
