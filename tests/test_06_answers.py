"""Prompts and answers: what the model reads, what it should say, and how an answer is read.

After reading this you know the exact prompt and response of both kinds of task. You know the two
rules by which every response is scored, and where they differ: "Because ... the answer is (D)" is B
to the comparable rule, because it takes the first capital letter from A to E.
"""
import json

import pytest

from data import tasks
from data.tasks import (TASKS, Example, find, judge, make_prompt, make_response, option_texts,
                        parse)

pytestmark = pytest.mark.course

BOOLQ = {"instruction": "Is water wet?\n\nAnswer format: true/false", "input": "",
         "output": "the correct answer is true", "answer": "true"}
SUM = {"instruction": "How much is 48 + 24?", "input": "",
       "output": "48+24 = <<48+24=72>>72\n#### 72", "answer": "72"}


def example_of(name, row, split="test"):
    """The example that a file with this one row gives."""
    return parse(json.dumps([row]).encode(), "FILE", find(name), split)[0]


def gold(name, answer, choices=None):
    """An example of which only the right answer matters."""
    task = find(name)
    return Example("", "", answer, task.answers if choices is None else choices, 0, task)


# -------------------------------------------------------------------------- prompts and responses


def test_a_choice_prompt_is_the_instruction_and_a_newline():
    example = example_of("boolq", BOOLQ)
    assert example.prompt == "Is water wet?\n\nAnswer format: true/false\n"
    assert example.response == "the correct answer is true"
    assert (example.answer, example.choices) == ("true", ("true", "false"))
    assert (example.index, example.task) == (0, TASKS["boolq"])


def test_an_arithmetic_prompt_asks_for_steps_and_the_response_ends_in_the_final_answer():
    example = example_of("gsm8k", SUM, "train")
    assert example.prompt == (
        "How much is 48 + 24?\n"
        "Answer the above question. First think step by step and then answer the final number.\n")
    assert example.response == "48+24 = <<48+24=72>>72\nThe final answer is: 72"
    assert example.choices == ()


def test_a_cloze_prompt_stops_in_the_middle_of_a_sentence():
    row = {"instruction": "Pavo works as a", "output": "smith", "answer": "smith",
           "choices": ["baker", "smith"]}
    example = example_of("toy-cloze", row)
    assert (example.prompt, example.response) == ("Pavo works as a", " smith")


def test_an_input_goes_on_its_own_line():
    with_input = {**BOOLQ, "input": "Think of rain."}
    assert example_of("boolq", with_input).prompt == BOOLQ["instruction"] + "\nThink of rain.\n"
    assert make_prompt(TASKS["AddSub"], "1+1?", "Hint: 2") == "1+1?\nHint: 2\n" + tasks.THINK


def test_spaces_of_the_published_text_are_left_alone():
    assert make_prompt(TASKS["MultiArith"], " How many? ").startswith(" How many? \nAnswer")


@pytest.mark.parametrize("output, response", [
    ("a\n#### 72", "a\nThe final answer is: 72"),
    ("a\n#### 1,000\n ", "a\nThe final answer is: 1,000"),
    # only the mark on the last line
    ("#### 5 is not the end\n#### -5", "#### 5 is not the end\nThe final answer is: -5"),
    ("no mark at all, so 72.", "no mark at all, so 72."),
])
def test_the_mark_of_gsm8k_is_written_out(output, response):
    assert make_response(TASKS["gsm8k"], "72", output) == response


# ------------------------------------------------------------- the texts of options, to be ranked


@pytest.mark.parametrize("name, instruction, texts", [
    ("ARC-Easy", "Please choose the correct answer to the question: What: a fox?\n\nAnswer1: An "
     "animal. Answer2: a plant\nAnswer3: \n\nAnswer format: answer1/answer2/answer3",
     [("Question: What: a fox?\nAnswer:", text) for text in (" An animal.", " a plant", " ")]),
    ("piqa", "Please choose the correct solution to the question: dresser\n\nSolution1: a pin \n\n"
     "Solution2: woodgrain with  a pin\n\nAnswer format: solution1/solution2",
     [("Question: dresser\nAnswer:", text) for text in (" a pin", " woodgrain with  a pin")]),
    ("hellaswag", "Please choose the correct ending to complete the given sentence: Running: He\n\n"
     "Ending1: runs. Ending2: sits. Ending3: Ends 4. Ending4: x\n\n"
     "Answer format: ending1/ending2/ending3/ending4",
     [("Running: He", text) for text in (" runs.", " sits.", " Ends 4.", " x")]),
    ("winogrande", "Please choose the correct answer to fill in the blank to complete the given "
     "sentence: Ann paid Bob, so _ had less.\n\nOption1: Ann Option2: Bob Answer format: "
     "option1/option2", [(f"Ann paid Bob, so {name}", " had less.") for name in ("Ann", "Bob")]),
    ("winogrande", "No blank.\n\nOption1: A Option2: B Answer format: option1/option2", []),
    ("ARC-Easy", "Why?\n\nAnswer1: x Answer format: answer1/answer2", []),
    ("ARC-Easy", "\nAnswer1: x Answer2: y Answer format: answer1/answer2", []),
    ("boolq", BOOLQ["instruction"], []),
])
def test_an_option_is_a_text_that_goes_on(name, instruction, texts):
    answer = instruction.split()[-1].split("/")[0]
    row = {"instruction": instruction, "output": "", "answer": answer}
    assert option_texts(example_of(name, row)) == texts


def test_every_published_item_with_options_spells_them_out(shared):
    for name in ("piqa", "social_i_qa", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"):
        for path in (shared / "datasets" / name).glob("t*.json"):
            for example in parse(path.read_bytes(), path, find(name), "test"):
                texts = option_texts(example)
                assert len(texts) == len(example.choices), (path, example.index)
                assert all("Answer format" not in asks + says for asks, says in texts)


# --------------------------------------------- answer rules: response, comparable rule, strict rule


@pytest.mark.parametrize("name, text, comparable, strict", [
    ("boolq", "the correct answer is true", "true", "true"),
    # the model did not stop
    ("boolq", "the correct answer is trueThe correct answer is false", "true", "true"),
    ("boolq", "the correct answer is untrue", None, None),
    ("boolq", "the correct answer is trueness", None, None),
    ("boolq", "the correct answer is True", None, None),
    # after the trigger, not before it
    ("boolq", "false? no, the correct answer is true", "true", "true"),
    # the first trigger
    ("boolq", "the correct answer is true. But the correct answer is false", "true", "true"),
    # the trigger is there, and nothing allowed comes after it
    ("boolq", "true, since the correct answer is obvious", None, None),
    # the comparable rule cannot read
    ("boolq", "the correct answer is not true", "true", None),
    # without a trigger the comparable rule looks anywhere
    ("boolq", "Yes, that is true.", "true", None),
    ("boolq", "true? the correct answer is ", None, None),
    ("boolq", "the correct answer is", None, None),
    ("boolq", "", None, None),
    ("boolq", "the correct answer is **false**", "false", None),
    ("ARC-Easy", "the correct answer is answer1", "answer1", "answer1"),
    ("ARC-Easy", "the correct answer is answer12", None, None),
    ("ARC-Easy", "the correct answer is answer1the correct answer is", "answer1", "answer1"),
    # this task has three answers, but the fourth one is an answer all the same
    ("social_i_qa", "the correct answer is answer4 or answer1", "answer4", "answer4"),
    ("winogrande", "the correct answer is Option1, so option2", "option2", None),
    ("hellaswag", "the correct answer is ending4.", "ending4", "ending4"),
    ("piqa", "solution3 or solution2", "solution2", None),
])
def test_the_rules_for_labels(name, text, comparable, strict):
    assert (TASKS[name].extract(text), TASKS[name].strict(text)) == (comparable, strict)


@pytest.mark.parametrize("tail, comparable, strict", [
    ("72", "72", "72"), ("72.", "72", "72"), ("-3", "-3", "-3"), ("50%", "50", "50"),
    ("$1,234.50", "1234.50", "1234.50"), ("$1,234.50.", "1234.50", "1234.50"),
    ("1,000,000", "1000000", "1000000"), ("$72$", "72", "72"), ("$-3", "-3", "-3"),
    ("unknown", None, None), (".", None, None), ("", None, None),
    # The comparable rule takes the last number that it can see.
    ("72 apples, of 100", "100", "72"), ("5, so 3 more", "3", "5"),
    ("**72**\n\nNext question: 8", "8", "72"),
    ("−3", "3", "-3"),                     # a minus sign of Unicode
    ("-$3", "3", "-3"), ("+3", "3", "+3"), ("1e5", "5", "1e5"), (".5", "5", ".5"),
    # The strict rule wants one plain number, and no comma that it does not know.
    ("1,2345", "12345", None), ("1,23", "123", None), ("10-3", "-3", None),
    ("10 - 3 = 7", "7", None), ("3/4", "4", None), ("3 1/2", "2", None), ("10:30", "30", None),
    ("2e5/2", "2", None), ("1.2.3", "3", None), ("e5", "5", None),
])
def test_the_rules_for_numbers(tail, comparable, strict):
    text = "First nothing. The final answer is: " + tail
    assert (tasks.last_number(text), tasks.stated_number(text)) == (comparable, strict)


def test_the_strict_number_needs_the_phrase_and_is_the_one_after_the_last_phrase():
    assert tasks.stated_number("so it is 7") is None
    assert tasks.stated_number("The final answer is: 1\nThe final answer is: 2\nQ: 3") == "2"
    assert tasks.stated_number("a 5\n#### 6\n7") == "6"


@pytest.mark.parametrize("text, comparable, strict", [
    ("Because 3 > 2 the answer is (D).", "B", "D"),
    ("Each costs 4, so the answer is C", "E", "C"),
    ("A train ... The final answer is: D", "A", "D"),
    ("The answer is (A). Wait, the answer is (B).", "A", "B"),
    ("The answer is: **E**", "E", "E"),
    ("Answer: option B", "A", "B"),        # the A of "Answer"
    ("so it must be (C).", "C", "C"),
    ("(A) 5 (B) 6 (C) 7", "A", None),      # a list of options
    ("the answer is Eve's", "E", None),
    ("the answer is d", None, None), ("The final answer is: 23", None, None), ("", None, None),
])
def test_the_rules_for_letters(text, comparable, strict):
    assert (tasks.first_letter(text), tasks.stated_letter(text)) == (comparable, strict)


# ------------------------------------------------------------------------------------ both verdicts


def test_a_response_is_judged_by_both_rules():
    assert judge(gold("AQuA", "D"), "Because 3 > 2 the answer is (D).") == {
        "prediction": "B", "correct": False, "strict_prediction": "D", "strict_correct": True}
    assert judge(gold("gsm8k", "72"), "The final answer is: 72 of 100") == {
        "prediction": "100", "correct": False, "strict_prediction": "72", "strict_correct": True}


def test_a_label_that_the_item_lacks_is_wrong_and_not_unparsed():
    item = gold("ARC-Easy", "answer1", ("answer1", "answer2", "answer3"))
    assert judge(item, "the correct answer is answer5") == {
        "prediction": "answer5", "correct": False,
        "strict_prediction": "answer5", "strict_correct": False}


@pytest.mark.parametrize("name, answer", [("boolq", "true"), ("gsm8k", "0"), ("AQuA", "A")])
def test_unparsed_is_none_and_never_correct(name, answer):
    assert judge(gold(name, answer), "?!") == {
        "prediction": None, "correct": False, "strict_prediction": None, "strict_correct": False}
