"""After this file you know how a score is made: prompts in, responses judged, counts and standard errors out, and nothing lost on the way."""
import json
import math
import sys

import pytest
import torch

import eval as evaluation
import train
from helpers import checkpoint_folder, write_task

QUESTIONS = [(f"is {i} an even number?\n\nAnswer format: true/false", str(i % 2 == 0).lower()) for i in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a model that has learnt to answer "true" to every question in the right format."""
    folder = tmp_path_factory.mktemp("eval")
    checkpoint_folder(folder / "base")
    write_task(folder / "data", "boolq", "train", [(question, "true") for question, _ in QUESTIONS])
    write_task(folder / "data", "boolq", "test", QUESTIONS)
    write_task(folder / "data", "winogrande", "test", [("_ is 1. Option1: a Option2: b Answer format: option1/option2", "option1")] * 5)
    train.main([
        "--model", str(folder / "base"), "--task", "boolq", "--data", str(folder / "data"), "--out", str(folder / "run"), "--batch", "8",
        "--epochs", "12", "--lr", "1e-2", "--warmup", "2", "--device", "cpu", "--steer", "int", "--p", "0.05"])
    return folder


def scores(place, capsys, monkeypatch, *flags, model="run", task="boolq"):
    """eval.py in this process, its JSON"""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(place / model), "--task", task, "--data", str(place / "data"),
                                      "--device", "cpu", "--json", *flags])
    capsys.readouterr()
    evaluation.main()
    return json.loads(capsys.readouterr().out)


def test_a_trained_model_is_scored_item_by_item(place, capsys, monkeypatch):
    summary, = scores(place, capsys, monkeypatch)
    assert (summary["n"], summary["accuracy"], summary["unparsed"], summary["chance"]) == (40, 0.5, 0, 0.5)
    assert summary["standard_error"] == pytest.approx(math.sqrt(0.25 / 40)) and summary["strict_accuracy"] == 0.5
    items = [json.loads(line) for line in open(place / "run" / "eval" / "boolq.jsonl")]
    assert [item["index"] for item in items] == list(range(40))
    assert all(item["response"] == "the correct answer is true" and item["prompt"] == QUESTIONS[item["index"]][0] + "\n" for item in items)
    assert sorted(path.name for path in (place / "run" / "eval").glob("boolq.*")) == ["boolq.json", "boolq.jsonl"]


def test_a_finished_score_is_kept_until_told_otherwise(place, capsys, monkeypatch):
    scores(place, capsys, monkeypatch, "--limit", "3")
    path = place / "run" / "eval" / "boolq-first3.jsonl"
    path.write_text("kept")
    scores(place, capsys, monkeypatch, "--limit", "3")
    assert path.read_text() == "kept"
    scores(place, capsys, monkeypatch, "--limit", "3", "--overwrite")
    assert len(path.read_text().splitlines()) == 3


def test_an_interrupted_evaluation_goes_on(place, capsys, monkeypatch):
    whole, = scores(place, capsys, monkeypatch, "--out", str(place / "whole"))
    answered, answer = [], evaluation.answer

    def cut(model, tokenizer, examples, *rest):
        if answered:
            raise KeyboardInterrupt
        answered.extend(examples[:7])
        return answer(model, tokenizer, examples[:7], *rest)               # zip stops after seven

    monkeypatch.setattr(evaluation, "answer", cut)
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    with pytest.raises(KeyboardInterrupt):
        scores(place, capsys, monkeypatch, "--out", str(place / "cut"))
    part = place / "cut" / "boolq.jsonl.partial"
    part.write_text(part.read_text() + '{"index": 3, "prom')                # and the kill came in the middle of a line
    seen = []
    monkeypatch.setattr(evaluation, "answer", lambda model, tokenizer, examples, *rest: seen.extend(examples) or answer(
        model, tokenizer, examples, *rest))
    resumed, = scores(place, capsys, monkeypatch, "--out", str(place / "cut"))
    assert resumed == whole and len(seen) == 33 and not part.exists()
    assert (place / "cut" / "boolq.jsonl").read_text() == (place / "whole" / "boolq.jsonl").read_text()


def test_ranking_by_likelihood_equals_scoring_each_response(place, capsys, monkeypatch):
    both = scores(place, capsys, monkeypatch, "--score", "choice", task="boolq,winogrande", model="base")
    assert [summary["task"] for summary in both] == ["boolq", "winogrande"] and [summary["unparsed"] for summary in both] == [0, 0]
    model, tokenizer = evaluation.load(place / "base")
    for line in open(place / "base" / "eval" / "boolq-choice.jsonl"):
        item, totals = json.loads(line), {}
        prompt = tokenizer.encode(item["prompt"], special=False)
        for choice in ("true", "false"):
            response = tokenizer.encode(f"the correct answer is {choice}", bos=False, special=False)
            log_p = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
            totals[choice] = sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
        assert item["prediction"] == max(totals, key=totals.get)


def test_the_intervention_can_be_kept_on(place, capsys, monkeypatch):
    seen = []
    answer = evaluation.answer
    monkeypatch.setattr(evaluation, "answer", lambda *args: seen.append(args[5]) or answer(*args))
    scores(place, capsys, monkeypatch, "--steered", "--limit", "4")
    scores(place, capsys, monkeypatch, "--limit", "4")
    assert seen[0].method == "int" and seen[0].p == 0.05 and seen[1] is None


def test_the_table_for_people(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(place / "run"), "--task", "boolq", "--data", str(place / "data"), "--device", "cpu"])
    evaluation.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "n", "accuracy", "chance", "strict", "unparsed"]
    assert lines[1].split() == ["boolq", "40", "50.0%", "±", "7.9%", "50.0%", "50.0%", "0"]


def test_summary_by_hand():
    items = [{"correct": c, "strict_correct": s, "prediction": p} for c, s, p in ((True, True, "1"), (True, False, "2"), (False, False, None), (True, True, "3"))]
    assert evaluation.summarise(items) == {"n": 4, "accuracy": 0.75, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
                                           "strict_accuracy": 0.5, "unparsed": 1}
