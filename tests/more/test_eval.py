"""After this file you know how a score is made: prompts in, responses judged, counts and standard
errors out, and nothing lost on the way."""
import json
import math
import shutil

import pytest
import torch

import eval as evaluation
import train
from data import BadInput
from data.tasks import load
from helpers import checkpoint_folder, write_task
from infosteer import Steering

QUESTIONS = [(f"is {i} an even number?\n\nAnswer format: true/false", str(i % 2 == 0).lower())
             for i in range(40)]
OPTIONS = [("_ is 1. Option1: a Option2: b Answer format: option1/option2", "option1")] * 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a new model (base), and one that has learnt to answer every question with
    "true" in the right format (run)."""
    folder = tmp_path_factory.mktemp("eval")
    checkpoint_folder(folder / "base")
    write_task(folder / "data", "boolq", "train", [(question, "true") for question, _ in QUESTIONS])
    write_task(folder / "data", "boolq", "test", QUESTIONS)
    write_task(folder / "data", "winogrande", "test", OPTIONS)
    train.main(["--model", str(folder / "base"), "--task", "boolq", "--data", str(folder / "data"),
                "--out", str(folder / "run"), "--batch", "8", "--epochs", "12", "--lr", "1e-2",
                "--warmup", "2", "--device", "cpu"])
    return folder


def flags(place, *more, model="run", task="boolq"):
    return ["--model", str(place / model), "--task", task, "--data", str(place / "data"),
            "--device", "cpu", *more]


def scores(capsys, *argv):
    """The summaries that eval.py prints as JSON."""
    capsys.readouterr()
    evaluation.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------- scores


def test_a_trained_model_is_scored_item_by_item(place, capsys):
    summary, = scores(capsys, *flags(place))
    assert (summary["n"], summary["accuracy"], summary["strict_accuracy"]) == (40, 0.5, 0.5)
    assert (summary["unparsed"], summary["chance"]) == (0, 0.5)
    assert summary["standard_error"] == pytest.approx(math.sqrt(0.25 / 40))
    assert (summary["score"], summary["dtype"], summary["steered"]) == ("generate", "float32", None)
    items = lines_of(place / "run" / "eval" / "boolq.jsonl")
    assert [item["index"] for item in items] == list(range(40))
    for item, (question, answer) in zip(items, QUESTIONS):
        assert item["response"] == "the correct answer is true"
        assert (item["prompt"], item["answer"]) == (question + "\n", answer)
        assert item["correct"] == item["strict_correct"] == (answer == "true")
    names = [path.name for path in (place / "run" / "eval").glob("boolq.*")]
    assert sorted(names) == ["boolq.json", "boolq.jsonl"]


def test_summary_by_hand():
    verdicts = (True, True, "1"), (True, False, "2"), (False, False, None), (True, True, "3")
    items = [{"correct": correct, "strict_correct": strict, "prediction": prediction}
             for correct, strict, prediction in verdicts]
    assert evaluation.summarise(items) == {
        "n": 4, "accuracy": 0.75, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
        "strict_accuracy": 0.5, "unparsed": 1}


def test_a_choice_is_the_most_likely_of_the_responses_each_scored_alone(place, capsys):
    def decided(model):                # so that the prompt makes a difference
        for weight in model.parameters():
            weight.data.mul_(20 if weight.dim() > 1 else 1)

    checkpoint_folder(place / "loud", spoil=decided)
    both = scores(capsys, *flags(place, "--score", "choice", task="boolq,winogrande", model="loud"))
    assert [summary["task"] for summary in both] == ["boolq", "winogrande"]
    assert [summary["unparsed"] for summary in both] == [0, 0]
    model, tokenizer = evaluation.load(place / "loud")
    items = lines_of(place / "loud" / "eval" / "boolq-choice.jsonl")
    assert {item["prediction"] for item in items} == {"true", "false"}
    for item in items:
        totals = {}
        prompt = tokenizer.encode(item["prompt"], special=False)
        for choice in ("true", "false"):
            response = tokenizer.encode(f"the correct answer is {choice}", bos=False)
            log_p = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
            totals[choice] = sum(log_p[at, token].item()
                                 for at, token in enumerate(response, len(prompt) - 1))
        assert item["prediction"] == max(totals, key=totals.get)


def test_a_model_runs_unsteered_unless_its_intervention_is_kept_on(place, capsys):
    shutil.copytree(place / "base", place / "int", ignore=shutil.ignore_patterns("eval"))
    steering = Steering("int", p=0.3, alpha=20.0)
    (place / "int" / "args.json").write_text(json.dumps({"steering": steering.settings}))
    plain, = scores(capsys, *flags(place, "--limit", "4", model="int"))
    steered, = scores(capsys, *flags(place, "--limit", "4", "--steered", model="int"))
    assert (plain["steered"], steered["steered"]) == (None, str(steering))
    model, tokenizer = evaluation.load(place / "int")
    prompts = [tokenizer.encode(question + "\n", special=False) for question, _ in QUESTIONS[:4]]
    responses = {}
    for kept, name in ((None, "boolq"), (steering, "boolq-steered")):
        items = lines_of(place / "int" / "eval" / f"{name}-first4.jsonl")
        responses[name] = [item["response"] for item in items]
        expected = model.generate(prompts, 32, kept)
        assert responses[name] == [tokenizer.decode(ids).split("<|end_of_text|>")[0]
                                   for ids in expected]
    assert responses["boolq"] != responses["boolq-steered"]


# ------------------------------------------------------------------------------ nothing is lost


def test_a_finished_score_is_kept_until_told_otherwise(place, capsys):
    first = scores(capsys, *flags(place, "--limit", "3"))
    path = place / "run" / "eval" / "boolq-first3.jsonl"
    path.write_text("kept")
    assert scores(capsys, *flags(place, "--limit", "3")) == first and path.read_text() == "kept"
    assert scores(capsys, *flags(place, "--limit", "3", "--overwrite")) == first
    assert len(lines_of(path)) == 3


def test_scores_of_another_model_or_of_other_items_are_refused(place, capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    scores(capsys, *flags(place, *out, "--limit", "3"))
    with pytest.raises(BadInput, match="holds scores of another model_sha256; --overwrite"):
        evaluation.main(flags(place, *out, "--limit", "3", model="base"))
    write_task(tmp_path / "data", "boolq", "test", QUESTIONS[::-1])
    with pytest.raises(BadInput, match="holds scores of another items_sha256"):
        evaluation.main([*flags(place, *out, "--limit", "3"), "--data", str(tmp_path / "data")])


def test_the_name_of_a_model_is_its_content_not_its_place(place, tmp_path):
    name, copy = evaluation.which_model(place / "base"), tmp_path / "copy"
    shutil.copytree(place / "base", copy)
    (copy / "notes.txt").write_text("not part of the model")
    assert evaluation.which_model(copy) == name != evaluation.which_model(place / "run")
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        kept = (copy / file).read_bytes()
        (copy / file).write_bytes(kept[:-1] + (b"\n\n" if "json" in file else b"\x01"))
        assert evaluation.which_model(copy) != name
        (copy / file).write_bytes(kept)
    assert evaluation.which_model(copy) == name


class Stops:
    """A model that is asked a few prompts and then interrupted."""

    def __init__(self, model, limit):
        self.model, self.config, self.limit, self.asked = model, model.config, limit, []

    def generate(self, prompts, *rest, **more):
        if len(self.asked) >= self.limit:
            raise KeyboardInterrupt
        self.asked += prompts
        return self.model.generate(prompts, *rest, **more)


def test_an_interrupted_evaluation_answers_only_what_is_left(place, tmp_path):
    n = evaluation.CHUNK + 44
    write_task(tmp_path / "data", "boolq", "test",
               [(f"is {i} even?" + " really?" * (i % 7), "true") for i in range(n)])
    examples = load(tmp_path / "data", "boolq", "test")
    model, tokenizer = evaluation.load(place / "base")
    settings = {"task": "boolq", "score": "generate", "max_new_tokens": 2}

    def evaluate(name, model):
        return evaluation.evaluate(model, tokenizer, examples, tmp_path / name, settings)

    whole = evaluate("whole.jsonl", model)
    with pytest.raises(KeyboardInterrupt):
        evaluate("cut.jsonl", Stops(model, 1))
    part = tmp_path / "cut.jsonl.partial"
    with open(part, "a") as file:
        file.write('{"index": 3, "prom')           # the kill came in the middle of a line
    rest = Stops(model, n)
    assert evaluate("cut.jsonl", rest) == whole and len(rest.asked) == 44
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not part.exists()


def test_an_interrupted_evaluation_with_other_settings_begins_again(place, tmp_path):
    examples = load(place / "data", "boolq", "test")[:5]
    model, tokenizer = evaluation.load(place / "base")
    (tmp_path / "new.jsonl.partial").write_text('{"task": "piqa"}\n{"index": 0}\n')
    again = Stops(model, 5)
    evaluation.evaluate(again, tokenizer, examples, tmp_path / "new.jsonl",
                        {"task": "boolq", "score": "generate", "max_new_tokens": 2})
    assert len(again.asked) == 5


# -------------------------------------------------------------------------- tables for people


def test_the_table_for_people(place, capsys):
    evaluation.main(flags(place))
    header, row, where = capsys.readouterr().out.splitlines()
    assert header.split()[2:] == ["n", "chance", "accuracy", "strict", "unparsed"]
    assert row.split() == ["boolq", "40", "50.0", "50.0", "±", "7.9", "50.0", "0"]
    assert str(place / "run" / "eval") in where


def test_models_side_by_side_have_the_mean_and_error_of_each_suite():
    def summary(task, accuracy, error):
        return {"task": task, "n": 200, "accuracy": accuracy, "standard_error": error,
                "chance": 0.25}

    text = evaluation.side_by_side({
        "base": [summary("toy-pick", 0.2, 0.03), summary("toy-facts", 0.4, 0.04)],
        "reg": [summary("toy-pick", 0.5, 0.0), summary("toy-facts", 0.6, 0.01)]})
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["accuracy,", "%", "n", "chance", "base", "reg"]
    # The error of a mean of two: sqrt(3^2 + 4^2) / 2 = 2.5
    assert rows[1] == "in distribution 30.0 ± 2.5 55.0 ± 0.5".split()
    assert rows[2] == "toy-pick 200 25.0 20.0 ± 3.0 50.0 ± 0.0".split()
