"""After this file you know that a folder with a task.json is a task: it is trained, scored,
compared, reported and looked at as the built-in ones are, and a wrong task.json is one line."""
import json
import re
import shutil

import pytest
import torch

import eval
import train
from data import BadInput, prepare
from data.tasks import TASKS, chance, find, judge, load
from helpers import checkpoint_folder, write_task
from lab import experiment, flux, memories, regions, report
from lab.stats import in_order

PARITY = {"kind": "choice", "answers": ["odd", "even", "even more"], "max_new_tokens": 3}
QUESTIONS = [(f"{n} is", "even" if n % 2 == 0 else "odd") for n in range(12)]


def make_task(data, name, said, train=QUESTIONS, test=QUESTIONS[:5]):
    """A task of one's own in a folder; said: what its task.json says, a value or a text."""
    for split, rows in (("train", train), ("test", test)):
        if rows:
            write_task(data, name, split, rows)
    (data / name).mkdir(parents=True, exist_ok=True)
    text = said if isinstance(said, str) else json.dumps(said)
    (data / name / "task.json").write_text(text, encoding="utf-8")
    return data


# ------------------------------------------------------------------------------ trained and scored


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs of a tiny model on a task of one's own, and what was said about them."""
    folder = tmp_path_factory.mktemp("own")
    model = checkpoint_folder(folder / "tiny")
    make_task(folder / "data", "parity", PARITY)
    experiment.main(["--steer", "none", "int", "--seed", "0", "--model", str(model), "--task",
                     "parity", "--data", str(folder / "data"), "--out", str(folder / "out"),
                     "--steps", "2", "--batch", "4", "--device", "cpu"])
    return folder


def test_a_run_on_it_trains_and_its_base_and_arms_are_scored(made):
    settings = json.loads((made / "out" / "tiny-int-seed0" / "args.json").read_text())
    assert (settings["task"], settings["examples"]) == ("parity", 12)
    for run in ("tiny-base", "tiny-none-seed0", "tiny-int-seed0"):
        summary = json.loads((made / "out" / run / "eval" / "parity.json").read_text())
        assert summary["n"] == 5 and summary["chance"] == pytest.approx(1 / 3)
        assert summary["score"] == "generate" and summary["max_new_tokens"] == 3


def test_runs_are_compared_when_the_data_are_gone(made, tmp_path, capsys):
    shutil.copytree(made / "out", tmp_path / "out")
    for path in tmp_path.glob("out/*/args.json"):
        gone = path.read_text().replace(str(made / "data"), str(tmp_path / "gone"))
        path.write_text(gone)
    experiment.main(["--compare", str(tmp_path / "out"), "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["arm"], row["suite"]) for row in rows] == [
        ("base", "parity"), ("none", "parity"), ("int", "parity")]
    report.main([str(tmp_path / "out"), "--device", "cpu"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "parity" in page and "cannot be shown: there is no task" in page


def test_scores_of_a_part_are_not_taken_for_a_task(made, tmp_path, capsys):
    shutil.copytree(made / "out", tmp_path / "out")
    run = tmp_path / "out" / "tiny-int-seed0"
    eval.main(["--model", str(run), "--task", "parity", "--data", str(made / "data"),
               "--limit", "2", "--device", "cpu"])
    capsys.readouterr()
    assert (run / "eval" / "parity-first2.json").is_file()
    experiment.main(["--compare", str(tmp_path / "out"), "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["suite"] for row in rows} == {"parity"}


def test_the_report_shows_it_with_its_regions(made, tmp_path):
    report.main([str(made / "out"), "--out", str(tmp_path / "page.html"), "--device", "cpu"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "parity" in page and "Key regions" in page and "cannot be shown" not in page


def test_the_analyses_read_it(made, capsys):
    where = ["--task", "parity", "--data", str(made / "data"), "--items", "3", "--json",
             "--device", "cpu"]
    model, out = str(made / "tiny"), str(made / "out")
    flux.main(["--model", model, *where])
    assert json.loads(capsys.readouterr().out)["settings"]["task"] == ["parity"]
    regions.main(["--model", model, "--runs", out, *where])
    assert json.loads(capsys.readouterr().out)["tasks"] == ["parity"]
    memories.main(["--model", model, "--out", str(made / "seen"), *where])
    assert json.loads(capsys.readouterr().out)["tasks"] == ["parity"]


@pytest.mark.parametrize("model", [["--model", "tiny"], []], ids=["a model", "the toy world's"])
def test_the_next_command_that_train_names_scores_it(
        made, tmp_path, capsys, monkeypatch, model):
    monkeypatch.chdir(made)
    train.main([*model, "--task", "parity", "--data", "data", "--out", str(tmp_path / "run"),
                "--steps", "1", "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]       # no base model was scored
    command = capsys.readouterr().out.splitlines()[-1]
    eval.main([*command.split("eval.py ")[1].split(), "--score", "choice", "--json"])
    summary, = json.loads(capsys.readouterr().out)
    assert (summary["task"], summary["score"], summary["unparsed"]) == ("parity", "choice", 0)
    assert summary["task_json"] == PARITY


def test_scores_under_another_task_json_are_not_taken(made, tmp_path):
    model = shutil.copytree(made / "tiny", tmp_path / "tiny")
    for answers in (["odd", "even"], ["odd", "even", "neither"]):
        data = make_task(tmp_path / "data", "parity", {**PARITY, "answers": answers})
        if answers[2:]:
            with pytest.raises(BadInput, match="holds scores of another task_json; --overwrite"):
                eval.score(model, ["parity"], data, device="cpu")
        else:
            eval.score(model, ["parity"], data, device="cpu")


def test_scores_under_two_task_jsons_are_not_compared(made, tmp_path, capsys):
    shutil.copytree(made / "out", tmp_path / "out")
    path = tmp_path / "out" / "tiny-int-seed0" / "eval" / "parity.json"
    path.write_text(path.read_text().replace('"even more"', '"neither"'))
    experiment.main(["--compare", str(tmp_path / "out"), "--json"])
    out, error = capsys.readouterr()
    assert [row["arm"] for row in json.loads(out)["rows"]] == ["base", "none"]
    assert "tiny-int-seed0/eval: parity: task_json {" in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------- the rows


def test_a_choice_task_takes_the_rules_of_the_others(tmp_path):
    labels = ["no", "no way", "A+", "(b)", "1", "12"]
    data = make_task(tmp_path, "mine", {"kind": "choice", "answers": labels},
                     test=[("Which?", label) for label in labels])
    examples = load(data, "mine", "test")
    assert [example.response for example in examples] == [
        f"the correct answer is {label}" for label in labels]
    assert examples[0].prompt == "Which?\n" and chance(examples) == pytest.approx(1 / 6)
    assert (examples[0].task.max_new_tokens, examples[0].task.kind) == (32, "choice")
    for example in examples:               # each is read back as itself, whichever it begins with
        verdict = judge(example, example.response + ", I think")
        assert verdict["correct"] and verdict["strict_correct"], example.answer
        assert judge(example, f"It is {example.answer}.")["correct"]
        assert not judge(example, "know, AA, b")["correct"]


def test_the_example_in_the_help_is_a_task(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    text = capsys.readouterr().out
    said, row = (re.search(rf"^  {name}.json +(.+?)(?:, \.\.\.\])?$", text, re.M)[1]
                 for name in ("task", "train"))
    make_task(tmp_path, "mine", said, test=())
    (tmp_path / "mine" / "train.json").write_text(row + "]")
    example, = load(tmp_path, "mine", "train")
    assert example.choices == ("yes", "no") and f'learned is "{example.response}"' in text


def test_an_arithmetic_task_has_a_rationale_and_any_number(tmp_path):
    make_task(tmp_path, "sums", {"kind": "arithmetic"}, train=(), test=())
    row = {"instruction": "40 + 2?", "input": "", "output": "40+2 = 42\n#### 42", "answer": 42}
    (tmp_path / "sums" / "train.json").write_text(json.dumps([row]))
    example, = load(tmp_path, "sums", "train")
    assert example.prompt.startswith("40 + 2?\nAnswer the above question.")
    assert example.response == "40+2 = 42\nThe final answer is: 42" and example.choices == ()
    assert example.task.max_new_tokens == 256 and example.task.splits == {"train": 0}
    assert judge(example, example.response)["strict_correct"]


def test_tasks_stand_in_the_order_of_the_tables_and_one_s_own_behind_them():
    assert in_order(["mine", "boolq", "toy-sums", "also", "mine"]) == [
        "toy-sums", "boolq", "also", "mine"]


# ----------------------------------------------------------------------------- refused in one line


@pytest.mark.parametrize("said, message", [
    ("{", "not JSON, or cut short"), ([], "a JSON object is needed"),
    ({}, '"kind" must be "choice", "arithmetic" or "text"; it is None'),
    ({**PARITY, "kind": "a"}, '"kind" must be "choice", "arithmetic" or "text"; it is \'a\''),
    ({**PARITY, "kind": ["choice"]}, "it is ['choice']"),
    ({"kind": "choice"}, '"answers" must be two or more different texts, as in ["yes", "no"]'),
    *(({**PARITY, "answers": bad}, '"answers" must be') for bad in (
        "odd", [], ["odd"], ["odd", "odd"], ["odd", 7], ["odd", ""], ["odd", " even"],
        ["odd", "a\nb"], ["odd", "\ud83d"], ["odd", ["even"]], {"odd": 1, "even": 2}, None)),
    ({"kind": "arithmetic", "answers": ["1", "2"]}, '"answers" is none of kind, max_new_tokens'),
    *(({**PARITY, "max_new_tokens": bad}, '"max_new_tokens" must be a whole number above 0')
      for bad in (0, -3, True, 3.5, "32", None, 10**9)),
    ({**PARITY, "labels": []}, '"labels" is none of kind, answers, max_new_tokens'),
])
def test_a_task_json_that_means_nothing_is_named_with_its_key(tmp_path, said, message):
    make_task(tmp_path, "parity", said)
    with pytest.raises(BadInput) as error:
        load(tmp_path, "parity", "test")
    assert str(error.value).startswith(str(tmp_path / "parity" / "task.json"))
    assert message in str(error.value)


def test_a_built_in_name_is_not_taken(tmp_path):
    make_task(tmp_path, "boolq", PARITY)
    with pytest.raises(BadInput, match="boolq is a built-in task; give your own another name"):
        find("boolq", tmp_path)
    assert find("boolq") is TASKS["boolq"]


@pytest.mark.parametrize("name", ["../parity", "x/../parity", ".hidden", "-x", "a b", "", "x" * 65])
def test_a_name_that_is_no_plain_folder_name_is_no_task(tmp_path, name):
    (tmp_path / "x").mkdir()
    make_task(tmp_path, "parity", PARITY)
    if name and ".." not in name:
        make_task(tmp_path, name, PARITY)
    with pytest.raises(BadInput, match="there is no task"):
        find(name, tmp_path)


def test_a_folder_without_task_json_is_told_of_it(tmp_path):
    write_task(tmp_path, "parity", "test", QUESTIONS)
    with pytest.raises(BadInput) as error:
        load(tmp_path, "parity", "test")
    assert f"{tmp_path / 'parity' / 'task.json'}: python data/prepare.py --help" in str(error.value)


def test_a_missing_split_is_named(tmp_path):
    make_task(tmp_path, "parity", PARITY, train=())
    with pytest.raises(BadInput) as error:
        load(tmp_path, "parity", "train")
    assert str(error.value) == ("parity has no split 'train': it has test, and no "
                                f"{tmp_path / 'parity' / 'train.json'}")


def test_another_answer_than_the_task_s_is_named_with_its_row(tmp_path):
    make_task(tmp_path, "parity", PARITY, test=[("0 is", "even"), ("1 is", "strange")])
    with pytest.raises(BadInput, match="row 1 .*'strange', not one of odd/even/even more"):
        load(tmp_path, "parity", "test")


@pytest.mark.parametrize("command, flags", [
    (train, []), (eval, []), (experiment, ["--steer", "none"])])
def test_a_command_refuses_it_before_it_writes(made, tmp_path, command, flags):
    make_task(tmp_path, "parity", {"kind": "choice"})
    with pytest.raises(BadInput, match="task.json"):
        command.main([*flags, "--model", str(made / "tiny"), "--task", "parity",
                      "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["parity"]


# ------------------------------------------------------------------- plain text, and nll alone


GOES_ON = [{"instruction": "Seven is", "input": "", "output": f" odd, and {n} is a number."}
           for n in range(4)]


def text_task(data, rows=GOES_ON):
    """A task of plain text, of the same rows for training and test."""
    (data / "plain").mkdir(parents=True)
    (data / "plain" / "task.json").write_text('{"kind": "text"}')
    for split in ("train", "test"):
        (data / "plain" / f"{split}.json").write_text(json.dumps(rows))
    return data


def test_plain_text_has_the_mean_loss_of_its_tokens(tmp_path):
    data, folder = text_task(tmp_path / "data"), checkpoint_folder(tmp_path / "tiny")
    summary, = eval.score(folder, ["plain"], data, tmp_path / "scores", device="cpu")
    model, tokenizer = eval.load(folder)
    losses = []
    for row in GOES_ON:
        prompt, rest = (tokenizer.encode(row[key], special=False, bos=bos)
                        for key, bos in (("instruction", True), ("output", False)))
        log_p = model(torch.tensor([prompt + rest]))[0].log_softmax(-1)        # [T, V]
        told = log_p[len(prompt) - 1:-1].gather(1, torch.tensor(rest)[:, None])
        losses.append(-told.mean().item())
    assert summary["nll"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert (summary["accuracy"], summary["unparsed"], summary["score"]) == (None, 0, "nll")
    items = [json.loads(line) for line in (tmp_path / "scores" / "plain.jsonl").open()]
    assert [item["nll"] for item in items] == pytest.approx(losses, abs=1e-5)
    assert not any("correct" in item or "response" in item for item in items)


def test_nll_alone_is_that_of_the_other_ways(made, tmp_path):
    found = [eval.score(made / "tiny", ["parity"], made / "data", tmp_path, how, device="cpu")[0]
             for how in ("generate", "nll")]
    assert found[0]["nll"] == pytest.approx(found[1]["nll"], abs=1e-5)
    assert found[1]["accuracy"] is None and found[0]["accuracy"] is not None
    assert (tmp_path / "parity-nll.jsonl").is_file()


def test_arms_are_compared_by_nll_alone_on_other_tasks(made, tmp_path, capsys):
    text_task(tmp_path / "data")
    shutil.copytree(made / "data" / "parity", tmp_path / "data" / "parity")
    experiment.main(["--arm", "--steer none", "--arm", "--anchor 3", "--seed", "0", "1", "--model",
                     str(made / "tiny"), "--task", "parity", "--test", "plain,parity", "--score",
                     "nll", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
                     "--steps", "2", "--batch", "4", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {(row["arm"], row["suite"]): row for row in found["rows"]}
    assert rows.keys() == {(arm, task) for arm in ("base", "none", "none-anchor=3")
                           for task in ("plain", "parity")}
    assert rows["none-anchor=3", "plain"]["nll_level"] == "seeds and items"
    assert all(row["mean"] is None and row["nll"] > 0 for row in rows.values())
    assert all(len(run["items"]["plain"]) == 4 and run["items"]["plain"][0]["correct"] is None
               for run in found["runs"])


@pytest.mark.parametrize("how", ["generate", "choice", "text"])
def test_plain_text_has_no_answers_to_score(tmp_path, how):
    data, folder = text_task(tmp_path / "data"), checkpoint_folder(tmp_path / "tiny")
    with pytest.raises(BadInput, match=f"--score {how}: plain is plain text"):
        eval.score(folder, ["plain"], data, tmp_path / "scores", how, device="cpu")
    assert not (tmp_path / "scores").exists()


def test_plain_text_needs_a_text_that_goes_on(tmp_path):
    data = text_task(tmp_path, [*GOES_ON, {"instruction": "Seven is", "output": " "}])
    with pytest.raises(BadInput, match='row 4 .*"output" is empty: there is no text that goes on'):
        load(data, "plain", "test")


def test_a_run_learns_plain_text_and_stands_in_the_comparison(tmp_path, capsys):
    data, model = text_task(tmp_path / "data"), checkpoint_folder(tmp_path / "tiny")
    experiment.main(["--steer", "none", "--seed", "0", "--model", str(model), "--task", "plain",
                     "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "8", "--batch",
                     "4", "--warmup", "0", "--lr", "1e-2", "--device", "cpu"])
    capsys.readouterr()
    experiment.main(["--compare", str(tmp_path / "out"), "--json"])
    rows = {row["arm"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["none"]["nll"] < rows["base"]["nll"] - 0.1 and rows["none"]["mean"] is None
    report.main([str(tmp_path / "out")])
