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
from helpers import checkpoint_folder, write_rows, write_task
from infosteer import Steering

QUESTIONS = [(f"is {i} an even number?\n\nAnswer format: true/false", str(i % 2 == 0).lower())
             for i in range(40)]
OPTIONS = [("_ is 1. Option1: a Option2: b Answer format: option1/option2", "option1")] * 5
SUMS = [("1 + 1?", "\nA: That makes 1 + 1 = 2. The answer is 2.", "2.0"),
        ("4 - 1?", "\nA: Now 4 - 1 = 5. The answer is 5.", "3.0"),          # says another number
        ("6 / 2?", "\nA: There are 6 / 2 = 3 apples.", "3"), ("7 * 1?", "", "7.0")]
TEXTS = [(f"Please choose the correct answer to the question: What is {n}: one?\n\n"
          "Answer1: a small number Answer2: no\nAnswer3: a rather large one\n\n"
          "Answer format: answer1/answer2/answer3", f"answer{n % 3 + 1}") for n in range(12)]


def decided(model):
    """So that the prompt makes a difference."""
    for weight in model.parameters():
        weight.data.mul_(20 if weight.dim() > 1 else 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a new model (base), and one that has learnt to answer every question with
    "true" in the right format (run)."""
    folder = tmp_path_factory.mktemp("eval")
    checkpoint_folder(folder / "base")
    write_task(folder / "data", "boolq", "train", [(question, "true") for question, _ in QUESTIONS])
    write_task(folder / "data", "boolq", "test", QUESTIONS)
    write_task(folder / "data", "winogrande", "test", OPTIONS)
    write_task(folder / "data", "ARC-Easy", "test", TEXTS)
    write_rows(folder / "data", "MultiArith", "test", SUMS)
    checkpoint_folder(folder / "loud", spoil=decided)
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


def log_p(model, prompt, response):
    """log P(response | prompt), in ids: one token after the other, from all that stand before."""
    return sum(model(torch.tensor([prompt + response[:n]]))[0, -1].double().log_softmax(-1)[token]
               for n, token in enumerate(response)).item()


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
    losses = [item["nll"] for item in items]
    assert summary["nll"] == pytest.approx(sum(losses) / 40)
    assert summary["nll_standard_error"] == pytest.approx(torch.tensor(losses).std() / 40 ** 0.5)
    assert (summary["nll_n"], summary["nll_left_out"]) == (40, 0)
    names = [path.name for path in (place / "run" / "eval").glob("boolq.*")]
    assert sorted(names) == ["boolq.json", "boolq.jsonl"]


def test_summary_by_hand():
    verdicts = ((True, True, "1", 1.0), (True, False, "2", 2.0), (False, False, None, None),
                (True, True, "3", 3.0))
    items = [{"correct": correct, "strict_correct": strict, "prediction": prediction, "nll": nll}
             for correct, strict, prediction, nll in verdicts]
    assert evaluation.summarise(items) == {
        "n": 4, "accuracy": 0.75, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
        "strict_accuracy": 0.5, "unparsed": 1,
        # the losses 1, 2 and 3 have the standard deviation 1
        "nll": 2, "nll_standard_error": pytest.approx(1 / 3 ** 0.5), "nll_n": 3, "nll_left_out": 1}
    one, none = (evaluation.summarise([items[i]]) for i in (0, 2))
    assert (one["nll"], one["nll_standard_error"], one["nll_n"]) == (1, None, 1)
    assert (none["nll"], none["nll_standard_error"], none["nll_n"]) == (None, None, 0)


def test_a_choice_is_the_most_likely_of_the_responses_each_scored_alone(place, capsys):
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
            totals[choice] = log_p(model, prompt, response)
        assert item["prediction"] == max(totals, key=totals.get)


def test_the_text_of_an_option_is_ranked_per_character_and_as_a_whole(place, capsys):
    summary, = scores(capsys, *flags(place, "--score", "text", task="ARC-Easy", model="loud"))
    model, tokenizer = evaluation.load(place / "loud")
    items, raw = lines_of(place / "loud" / "eval" / "ARC-Easy-text.jsonl"), []
    for n, item in enumerate(items):
        prompt = tokenizer.encode(f"Question: What is {n}: one?\nAnswer:")
        texts = ["a small number", "no", "a rather large one"]
        ids = [tokenizer.encode(" " + text, bos=False) for text in texts]
        totals = [log_p(model, prompt, one) for one in ids]
        each = [total / len(text) for total, text in zip(totals, texts)]
        gold = n % 3
        assert item["prediction"] == f"answer{each.index(max(each)) + 1}"
        assert item["correct"] == item["strict_correct"] == (each[gold] == max(each))
        assert item["raw_correct"] == (totals[gold] == max(totals))
        assert item["nll"] == pytest.approx(-totals[gold] / len(ids[gold]), rel=1e-4)
        raw.append(item["raw_correct"])
    assert raw != [item["correct"] for item in items] and len({*raw}) == 2     # it does matter
    assert summary["raw_accuracy"] == sum(raw) / 12
    assert (summary["score"], summary["unparsed"], summary["nll_n"]) == ("text", 0, 12)


class Likely:
    """A model to which texts have the given log-likelihoods."""

    def __init__(self, model, scores):
        self.config, self.scores = model.config, scores

    def log_likelihood(self, prompts, continuations, **more):
        return self.scores


def test_characters_are_those_of_the_option_without_the_space_before_it(place, tmp_path):
    write_task(tmp_path, "ARC-Easy", "test", [("Please choose the correct answer to the question: Q"
               "\n\nAnswer1: ab Answer2: abcd \n\nAnswer format: answer1/answer2", "answer1")])
    model, tokenizer = evaluation.load(place / "base")
    # -10 / 2 and -18 / 4 for each character; with the space it would be -10 / 3 and -18 / 5
    evaluation.evaluate(Likely(model, [-10, -18, -10]), tokenizer,
                        load(tmp_path, "ARC-Easy", "test"), tmp_path / "out.jsonl",
                        {"task": "ARC-Easy", "score": "text", "max_new_tokens": 32})
    item, = lines_of(tmp_path / "out.jsonl")
    assert (item["prediction"], item["correct"], item["raw_correct"]) == ("answer2", False, True)


@pytest.mark.parametrize("task, data, message", [
    ("boolq", "data", "boolq/test.json, row 0 (the first is 0): no texts of options to rank"),
    ("MultiArith", "data", "MultiArith/test.json, row 0"),
    ("toy-pick", "toy", "toy-pick/test.json, row 0"),
    ("ARC-Easy", "odd", "ARC-Easy/test.json, row 2")])
def test_where_no_options_are_spelt_out_none_are_ranked(place, tmp_path, task, data, message):
    other = "Why?\n\nAnswer format: answer1/answer2", "answer1"
    write_task(place / "odd", "ARC-Easy", "test", [*TEXTS[:2], other])
    folder, out = evaluation.TOY_FOLDER if data == "toy" else place / data, tmp_path / "out"
    with pytest.raises(BadInput) as error:
        evaluation.main([*flags(place, "--score", "text", "--out", str(out), task=task),
                         "--data", str(folder)])
    assert message in str(error.value) and not out.exists()


# ------------------------------------------------------------------- the loss of the right response


@pytest.mark.parametrize("how", ["generate", "choice"])
def test_the_nll_is_what_training_would_count_per_token(place, capsys, how):
    where = ["--out", str(place / how), "--limit", "6", "--max-new-tokens", "2"]
    summary, = scores(capsys, *flags(place, "--score", how, *where, model="loud"))
    model, tokenizer = evaluation.load(place / "loud")
    name = "boolq-choice-first6" if how == "choice" else "boolq-first6"
    for item, (question, answer) in zip(lines_of(place / how / f"{name}.jsonl"), QUESTIONS):
        response = tokenizer.encode(f"the correct answer is {answer}", bos=False)
        response.append(tokenizer.eos_id)
        total = log_p(model, tokenizer.encode(question + "\n"), response)
        assert item["nll"] == pytest.approx(-total / len(response), rel=1e-4)
    assert summary["nll_n"] == 6


def test_a_rationale_that_is_missing_or_ends_in_another_number_has_no_nll(place, capsys):
    where = ["--out", str(place / "sums"), "--max-new-tokens", "2"]
    summary, = scores(capsys, *flags(place, *where, task="MultiArith", model="loud"))
    items = lines_of(place / "sums" / "MultiArith.jsonl")
    assert [item["nll"] is None for item in items] == [False, True, False, True]
    assert (summary["nll_n"], summary["nll_left_out"], summary["n"]) == (2, 2, 4)
    model, tokenizer = evaluation.load(place / "loud")
    response = tokenizer.encode(SUMS[2][1], bos=False) + [tokenizer.eos_id]
    total = log_p(model, tokenizer.encode(items[2]["prompt"]), response)
    assert items[2]["nll"] == pytest.approx(-total / len(response), rel=1e-4)
    assert summary["nll"] == pytest.approx((items[0]["nll"] + items[2]["nll"]) / 2)


def test_the_response_of_a_cloze_has_no_end(capsys, tmp_path):
    argv = ["--model", str(evaluation.TOY_FOLDER / "llama"), "--limit", "2", "--out", str(tmp_path)]
    scores(capsys, *argv, "--task", "toy-cloze,toy-plain,toy-facts,toy-sums")
    model, tokenizer = evaluation.load(evaluation.TOY_FOLDER / "llama")
    for task in ("toy-cloze", "toy-plain", "toy-facts", "toy-sums"):
        item = lines_of(tmp_path / f"{task}-first2.jsonl")[1]
        example = load(evaluation.TOY_FOLDER, task, "test")[1]
        ids = tokenizer.encode(example.response, bos=False)
        ids += [tokenizer.eos_id] * (task in ("toy-facts", "toy-sums"))
        total = log_p(model, tokenizer.encode(example.prompt), ids)
        assert item["nll"] == pytest.approx(-total / len(ids), rel=1e-4), task


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


@pytest.mark.parametrize("how", ["choice", "text"])
def test_a_likelihood_is_steered_where_decoding_is(place, capsys, how):
    steering = Steering("int", p=0.3, alpha=20.0)
    shutil.copytree(place / "loud", place / how, ignore=shutil.ignore_patterns("eval"),
                    dirs_exist_ok=True)
    (place / how / "args.json").write_text(json.dumps({"steering": steering.settings}))
    plain, = scores(capsys, *flags(place, "--score", how, task="ARC-Easy", model=how))
    kept, = scores(capsys, *flags(place, "--score", how, "--steered", task="ARC-Easy", model=how))
    model, tokenizer = evaluation.load(place / how)
    item = lines_of(place / how / "eval" / f"ARC-Easy-{how}-steered.jsonl")[0]
    example = load(place / "data", "ARC-Easy", "test")[0]
    asks, says = ("Question: What is 0: one?\nAnswer:", " a small number") if how == "text" else (
        example.prompt, example.response)
    ids = tokenizer.encode(says, bos=False) + [tokenizer.eos_id] * (how == "choice")
    total = log_p(lambda tokens: model(tokens, steering), tokenizer.encode(asks), ids)
    assert item["nll"] == pytest.approx(-total / len(ids), rel=1e-4)
    assert abs(plain["nll"] - kept["nll"]) > 0.01


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

    def log_likelihood(self, *pairs, **more):
        return self.model.log_likelihood(*pairs, **more)


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


def test_items_of_an_older_version_without_an_nll_are_answered_again(place, tmp_path):
    examples = load(place / "data", "boolq", "test")[:5]
    model, tokenizer = evaluation.load(place / "base")
    settings = {"task": "boolq", "score": "generate", "max_new_tokens": 2}
    path = tmp_path / "new.jsonl"
    evaluation.evaluate(model, tokenizer, examples, path, settings)
    new, old = lines_of(path), lines_of(path)
    del old[1]["nll"], old[3]["nll"]
    (tmp_path / "new.jsonl.partial").write_text("".join(
        json.dumps(line, sort_keys=line is settings) + "\n" for line in [settings, *old[:4]]))
    again = Stops(model, 5)
    evaluation.evaluate(again, tokenizer, examples, path, settings)
    losses = [item["nll"] for item in new]
    assert [item["nll"] for item in lines_of(path)] == pytest.approx(losses)
    assert len(again.asked) == 3


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
    header, row, _, where = capsys.readouterr().out.splitlines()
    assert header.split("%")[1].split() == ["n", "chance", "accuracy", "nll", "strict", "unparsed",
                                            "left", "out"]
    summary = json.loads((place / "run" / "eval" / "boolq.json").read_text())
    nll = f"{summary['nll']:.3f} ± {summary['nll_standard_error']:.3f}".split()
    assert row.split() == ["boolq", "40", "50.0", "50.0", "±", "7.9", *nll, "50.0", "0", "0"]
    assert str(place / "run" / "eval") in where


def test_the_table_of_option_texts_has_the_raw_accuracy(place, capsys):
    evaluation.main(flags(place, "--score", "text", task="ARC-Easy", model="loud"))
    header, row, *_ = capsys.readouterr().out.splitlines()
    summary = json.loads((place / "loud" / "eval" / "ARC-Easy-text.json").read_text())
    assert header.split()[6] == "raw" and max(len(header), len(row)) <= 100
    assert row.split()[-3:] == [f"{100 * summary['raw_accuracy']:.1f}", "0", "0"]


def summary_of(task, accuracy, error, *nll):
    return {"task": task, "n": 200, "accuracy": accuracy, "standard_error": error, "chance": 0.25,
            **dict(zip(("nll", "nll_standard_error"), nll))}


def test_models_side_by_side_have_the_mean_and_error_of_each_suite():
    text = evaluation.side_by_side({
        "base": [summary_of("toy-pick", 0.2, 0.03, 1.5, 0.3),
                 summary_of("toy-facts", 0.4, 0.04, 2.5, 0.4)],
        "reg": [summary_of("toy-pick", 0.5, 0.0, 0.75, 0.006),
                summary_of("toy-facts", 0.6, 0.01, 0.25, 0.008)]})
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["accuracy,", "%", "n", "chance", "base", "nll", "reg", "nll"]
    # The error of a mean of two: sqrt(3^2 + 4^2) / 2 = 2.5
    assert rows[1] == "in distribution 30.0 ± 2.5 2.000 ± 0.250 55.0 ± 0.5 0.500 ± 0.005".split()
    assert rows[2] == "toy-pick 200 25.0 20.0 ± 3.0 1.500 ± 0.300 50.0 ± 0.0 0.750 ± 0.006".split()
    assert max(map(len, text.splitlines())) <= 100


def test_a_summary_of_an_older_version_has_no_nll_and_is_no_error():
    old = {**summary_of("boolq", 0.5, 0.1), "strict_accuracy": 0.5, "unparsed": 0}
    row = evaluation.side_by_side({"accuracy": [old]}, detailed=True).splitlines()[1].split()
    assert row == "boolq 200 25.0 50.0 ± 10.0 - 50.0 0 -".split()
    none = summary_of("mawps", 0.5, 0.1, None, None)               # no response in the file
    assert evaluation.side_by_side({"a": [none]}).splitlines()[1].split()[-1] == "-"
