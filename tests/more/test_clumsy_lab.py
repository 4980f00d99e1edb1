"""After this file you know what the commands of lab/ do with what people really leave in a folder:
runs of other recipes, other scores, cut files, moved models, two commands at once."""
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from data import command
from eval import load
from helpers import checkpoint_folder, write_task
from lab import experiment, flux, memories, regions, report
from lab.stats import compare, comparison_table, find_runs, runs_from
from model import read_tensors

COMMANDS = {"compare": experiment, "regions": regions, "flux": flux, "report": report}
RECIPE = {"lr": 1e-3, "steps": 12, "steps_total": 12, "batch": 8, "precision": "fp32",
          "task": "boolq", "data_sha256": "d" * 64}
SCORED = {"items_sha256": "i" * 64, "n": 40, "score": "generate", "dtype": "float32",
          "max_new_tokens": 32, "steered": None}


def call(module, *argv):
    """A command of lab/ in this process: (exit status, standard output, standard error)."""
    out, error = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            module.main([str(one) for one in argv])
        except SystemExit as stop:
            code = stop.code
        except (ValueError, OSError) as problem:               # as data.command does
            code = 2
            print(f"error: {problem}", file=sys.stderr)
    return code, out.getvalue(), error.getvalue()


def start(*argv, **more):
    """python -m lab.NAME in a process of its own, with its outputs as text."""
    return subprocess.Popen([sys.executable, "-m", *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


def edit(path, **changes):
    """Change a JSON file: a value of None removes its key."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: of for key, of in value.items() if of is not None}))


def make_run(folder, method="none", seed=0, accuracy=0.5, tasks=("boolq",), scored={}, sha="1",
             **settings):
    """A finished run's folder, or a base model's for no method, without weights."""
    (folder / "eval").mkdir(parents=True)
    about = {"model": "x/m", "model_sha256": sha * 64}
    about |= {"base": True} if method is None else {
        "seed": seed, "steering": {"method": method}, **RECIPE}
    (folder / "args.json").write_text(json.dumps({**about, **settings}))
    (folder / "log.jsonl").write_text('{"step": 1, "lm_loss": 2.0, "flux": 3.0}\n')
    for task in tasks:
        (folder / "eval" / f"{task}.json").write_text(json.dumps(
            {"task": task, "accuracy": accuracy, **SCORED, **scored}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """A base model, and plain and steered runs of one recipe."""
    make_run(tmp_path / "o" / "m-base", None, accuracy=0.1)
    for seed in (0, 1):
        make_run(tmp_path / "o" / f"m-none-seed{seed}", seed=seed)
        make_run(tmp_path / "o" / f"m-reg-seed{seed}", "reg", seed, 0.6)
    return tmp_path / "o"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of trained and scored runs of a tiny model, which lies beside it."""
    folder = tmp_path_factory.mktemp("clumsy")
    model, data = checkpoint_folder(folder / "tiny"), folder / "data"
    questions = [(f"is {n} even?", "true" if n % 2 == 0 else "false") for n in range(12)]
    write_task(data, "boolq", "train", questions)
    write_task(data, "boolq", "test", questions[:6])
    code, _, error = call(experiment, "--steer", "none", "reg", "--seed", 0, 1, "--out",
                          folder / "out", *flags(model, data))
    assert code == 0, error
    return folder


def flags(model, data):
    return ["--model", model, "--task", "boolq", "--data", data, "--steps", 2, "--batch", 4,
            "--device", "cpu"]


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path / "out"


def about(trained, out):
    """The flags with which each command of COMMANDS looks at a folder of runs."""
    look = ["--task", "boolq", "--data", trained / "data", "--items", 3, "--device", "cpu"]
    return {"compare": ["--compare", out], "report": [out, "--device", "cpu"],
            "regions": ["--model", trained / "tiny", "--runs", out, *look],
            "flux": ["--model", trained / "tiny", *out.glob("tiny-*seed*"), *look]}


def rows_of(folder):
    return {row["arm"]: row for row in compare(find_runs(folder))}


# ------------------------------------------------------------------------ what may be compared


def test_runs_of_another_recipe_are_left_out_with_one_line(runs, capsys):
    for seed in (0, 1):
        make_run(runs / f"fast-seed{seed}", "reg", seed, 0.9, lr=0.01, steps=3)
    rows, error = rows_of(runs), capsys.readouterr().err
    assert rows["reg"]["difference"] == pytest.approx(0.1) and list(rows) == ["base", "none", "reg"]
    assert error.count("\n") == 1 and "lr 0.01 instead of 0.001, steps 3 instead of 12" in error
    assert str(runs / "fast-seed0" / "args.json") in error and "fast-seed1" in error
    assert "the 4 like" in error


def test_the_recipe_of_most_runs_is_kept_and_that_of_plain_fine_tuning_in_a_draw(tmp_path, capsys):
    make_run(tmp_path / "a", "reg", lr=0.01)
    make_run(tmp_path / "m-none-seed0")
    assert list(rows_of(tmp_path)) == ["none"]
    make_run(tmp_path / "b", "int", lr=0.01)
    assert list(rows_of(tmp_path)) == ["int", "reg"]
    assert "lr 0.001 instead of 0.01" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [
    ("steps", 3), ("examples", 100), ("epochs", 2), ("batch", 4), ("lr", 0.01), ("warmup", 5),
    ("weight_decay", 0.1), ("clip", 2.0), ("max_length", 99), ("precision", "bf16"),
    ("task", "piqa"), ("data_sha256", "another"), ("limit", 7), ("unheard_of", 1)])
def test_everything_that_is_neither_arm_nor_seed_nor_machine_is_the_recipe(
        runs, capsys, name, value):
    edit(runs / "m-reg-seed1" / "args.json", **{name: value})
    assert rows_of(runs)["reg"]["seeds"] == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(rf"recipe, (another )?{name}\b", error)


def test_the_machine_is_no_part_of_the_recipe(runs, capsys):
    edit(runs / "m-reg-seed1" / "args.json", device="cuda", threads=4, micro_tokens=9, data="d/",
         model="../m/", versions={"torch": "9"}, command="python train.py", compile=True)
    assert rows_of(runs)["reg"]["seeds"] == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name, value, words", [
    ("items_sha256", "other", "another items_sha256"), ("n", 10, "n 10 instead of 40"),
    ("dtype", "bfloat16", "dtype bfloat16 instead of float32"),
    ("max_new_tokens", 4, "max_new_tokens 4 instead of 32"),
    ("score", "choice", "score choice instead of generate"),
    ("steered", "int", "steered int instead of None")])
def test_scores_that_were_made_otherwise_are_left_out_with_one_line(
        runs, capsys, name, value, words):
    edit(runs / "m-reg-seed1" / "eval" / "boolq.json", **{name: value}, accuracy=1.0)
    row, error = rows_of(runs)["reg"], capsys.readouterr().err
    assert (row["seeds"], row["mean"]) == (1, 0.6) and error.count("\n") == 1
    assert f"{runs / 'm-reg-seed1' / 'eval'}: boolq: {words}\n" in error


def test_what_differs_alike_in_many_tasks_is_said_once(tmp_path, capsys):
    for arm in ("none", "int", "reg"):
        make_run(tmp_path / arm, arm, tasks=["piqa", "boolq"],
                 scored={"dtype": "float16"} if arm == "int" else {})
    assert list(rows_of(tmp_path)) == ["none", "reg"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "boolq, piqa: dtype float16" in error


def test_scores_of_older_versions_are_left_out_where_others_say_more(runs, capsys):
    edit(runs / "m-none-seed1" / "eval" / "boolq.json", **dict.fromkeys(SCORED))
    assert rows_of(runs)["none"]["seeds"] == 1 and "dtype None" in capsys.readouterr().err


def test_a_run_without_a_score_that_others_have_is_named(runs, capsys):
    (runs / "m-reg-seed1" / "eval" / "boolq.json").rename(runs / "m-reg-seed1/eval/piqa.json")
    rows_of(runs)
    error = capsys.readouterr().err
    assert f"{runs / 'm-reg-seed1' / 'eval'}: boolq: no score\n" in error
    assert "m-none-seed0" in error and ": piqa: no score\n" in error


def test_tasks_that_no_run_has_all_of_are_no_crash(tmp_path, capsys):
    make_run(tmp_path / "a", tasks=["toy-cloze"])
    make_run(tmp_path / "b", "reg", tasks=["toy-plain"])
    assert call(experiment, "--compare", tmp_path)[0] == 0
    assert call(report, tmp_path)[0] == 0


def test_a_base_model_s_scores_are_those_of_the_model_that_is_named(runs, capsys):
    edit(runs / "m-base" / "eval" / "boolq.json", model_sha256="2" * 64)
    assert list(rows_of(runs)) == ["none", "reg"]
    assert "m-base/eval/boolq.json: holds scores of another model" in capsys.readouterr().err


def test_one_model_by_several_paths_is_one_and_its_arms_are_paired(runs):
    for path, name in (("/abs/x/m", "m-none-seed0"), ("x/m/", "m-reg-seed0"), ("./x/m", "m-base")):
        edit(runs / name / "args.json", model=path)
    rows = compare(find_runs(runs))
    assert len({row["model"] for row in rows}) == 1
    assert [row["seeds"] for row in rows] == [1, 2, 2] and rows[2]["interval"]


def test_a_page_and_a_json_say_what_was_left_out(runs):
    make_run(runs / "fast", "reg", 5, lr=0.01)
    code, out, error = call(experiment, "--compare", runs, "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 3 and "lr 0.01" in error
    code, _, error = call(report, runs)
    text = (runs / "report.html").read_text(encoding="utf-8")
    assert code == 0 and error.count("\n") == 1 and text.count("lr 0.01 instead of 0.001") == 1
    assert "Left out of this page" in text


def test_regions_and_flux_compare_runs_of_one_recipe(trained, copied):
    edit(copied / "tiny-reg-seed1" / "args.json", lr=0.5)
    look = about(trained, copied)
    code, out, error = call(regions, *look["regions"], "--json")
    assert code == 0 and json.loads(out)["arms"]["reg"]["seeds"] == 1
    assert error.count("\n") == 1 and "lr 0.5 instead of 5e-05" in error
    code, out, error = call(flux, *look["flux"], "--json")
    assert code == 0 and len(json.loads(out)["models"]) == 5, "what was asked for is shown"
    assert error.count("\n") == 1 and "note: " in error and "lr 0.5 instead of 5e-05" in error


def test_two_runs_of_one_arm_and_seed_are_never_one(trained, copied):
    shutil.copytree(copied / "tiny-reg-seed0", copied / "again")
    code, out, _ = call(regions, *about(trained, copied)["regions"], "--json")
    assert [(arm, of["seeds"]) for arm, of in json.loads(out)["arms"].items()] == [
        ("base", 1), ("none", 2), ("reg", 2), ("reg (again)", 1)]
    assert [run["arm"] for run in runs_from(copied, trained / "tiny")] == [
        "none", "none", "reg", "reg", "reg (again)"]
    assert "reg (again)" in rows_of(copied)


# --------------------------------------------------------------------- damaged and foreign files


def test_a_page_about_a_scored_base_alone(copied):
    for path in copied.glob("*seed*"):
        shutil.rmtree(path)
    assert call(report, copied, "--device", "cpu")[0] == 0
    assert "there is no fine-tuned run" in (copied / "report.html").read_text(encoding="utf-8")


LOGS = {"cut in mid-line": lambda text: text[:-40], "empty line": lambda text: text + "\n",
        "a list": lambda text: "[1]\n", "without a loss": lambda text: '{"step": 1}\n',
        "nothing": lambda text: "",
        "words": lambda text: '{"step": 1, "lm_loss": "low", "flux": 1}\n',
        "too large": lambda text: f'{{"step": 1{"0" * 400}, "lm_loss": 1, "flux": 1}}\n'}


@pytest.mark.parametrize("damage", LOGS)
def test_a_damaged_log_costs_one_line_and_not_the_page(copied, damage):
    for path in copied.glob("*/args.json"):
        edit(path, model="gone/away")                          # so that the page is quick
    path = copied / "tiny-reg-seed0" / "log.jsonl"
    path.write_text(LOGS[damage](path.read_text()))
    code, _, error = call(report, copied)
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert code == 0 and error.count("\n") == 1 and f"left out: {path}: " in error
    assert text.count("reg-seed0/log.jsonl") == 1 and "reg seed 1" in text
    assert "reg seed 0" not in text


@pytest.mark.parametrize("gone", ["log.jsonl", "model.safetensors", "tokenizer.json"])
def test_a_run_that_lacks_a_file_costs_one_line_and_not_the_page(copied, gone):
    (copied / "tiny-reg-seed0" / gone).unlink()
    code, _, error = call(report, copied, "--device", "cpu")
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert code == 0 and error.count("\n") == 1 and "tiny-reg-seed0" in error
    assert "Key regions" in text and "Flux, token by token" in text


def test_cut_weights_of_one_run_cost_one_line_in_every_command(trained, copied):
    path = copied / "tiny-none-seed0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    code, out, error = call(regions, *about(trained, copied)["regions"], "--json")
    assert code == 0 and json.loads(out)["arms"]["none"]["seeds"] == 1
    assert error.count("\n") == 1 and "tiny-none-seed0" in error
    said = []
    result = flux.flux_of([trained / "tiny", *sorted(copied.glob("tiny-*seed*"))],
                          [("", "Is it even?")], say=said.append)
    assert len(result["models"]) == 4 and len(said) == 1


def test_an_args_file_of_an_older_version_costs_one_line_and_not_the_page(copied):
    path = copied / "tiny-reg-seed0" / "args.json"
    edit(path, data_sha256=None, task=None, data=None, precision=None, versions=None)
    code, _, error = call(report, copied, "--device", "cpu")
    assert code == 0 and error.count("\n") == 1 and f"{path}: another recipe" in error
    edit(path, model_sha256=None)
    code, _, error = call(report, copied, "--device", "cpu")
    assert code == 0 and error.count("\n") == 1 and "model_sha256 is None" in error


def test_a_folder_of_an_older_version_alone_makes_a_page(copied):
    for path in copied.glob("*/args.json"):
        edit(path, data_sha256=None, task=None, data=None, precision=None, versions=None)
    assert call(report, copied, "--device", "cpu")[0] == 0
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert "What memories do cannot be shown" in text and "Accuracy" in text


def test_a_page_leaves_the_base_model_s_folder_as_its_scores_need_it(trained, copied):
    shutil.rmtree(copied / "tiny-base")
    assert call(report, copied, "--device", "cpu")[0] == 0
    code, _, error = call(experiment, "--steer", "none", "--seed", 0, "--out", copied,
                          *flags(trained / "tiny", trained / "data"))
    assert code == 0 and list(rows_of(copied)) == ["base", "none", "reg"], error


def test_a_page_without_the_data_says_so(copied):
    for path in copied.glob("*/args.json"):
        edit(path, data="gone/away")
    assert call(report, copied, "--device", "cpu")[0] == 0
    assert "gone/away/boolq" in (copied / "report.html").read_text(encoding="utf-8")


def test_one_model_by_several_paths_of_which_some_are_gone_is_found(trained, copied):
    edit(copied / "tiny-base" / "args.json", model="gone/away")
    edit(copied / "tiny-none-seed0" / "args.json", model="gone/away/")
    assert call(report, copied, "--device", "cpu")[0] == 0
    assert "Key regions" in (copied / "report.html").read_text(encoding="utf-8")


FOREIGN = {"a list": b"[1, 2]", "a number": b"3", "nothing": b"", "bytes": b"\x00\xff\x1b[31m",
           "a deep one": b"[" * 100_000, "another program's": b'{"port": 80}'}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_args_file_costs_one_line_and_not_the_folder(trained, copied, what):
    (copied / "other").mkdir()
    (copied / "other" / "args.json").write_bytes(FOREIGN[what])
    look = about(trained, copied)
    for name in ("compare", "regions", "report"):
        code, _, error = call(COMMANDS[name], *look[name])
        assert code == 0 and error.count("\n") == (what != "another program's"), name
        assert "\x1b" not in error
    assert "tiny-none-seed0" in {run["folder"].name for run in find_runs(copied)}


def test_a_report_leaves_nothing_behind_but_the_page(copied):
    before = {path for path in copied.rglob("*") if path.is_file()}
    assert call(report, copied, "--device", "cpu")[0] == 0
    assert {path for path in copied.rglob("*") if path.is_file()} - before == {
        copied / "report.html"}
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert "Clear memories" in text and "Key regions" in text


EVIL = "\x1b[31mred\x1b]0;title\x07\u202e<script>"


def test_no_file_of_a_run_moves_the_cursor(trained, copied):
    odd = copied / EVIL.replace("/", "")
    shutil.copytree(copied / "tiny-reg-seed0", odd)
    edit(odd / "args.json", lr=EVIL)                           # of another recipe
    for path in copied.glob("tiny-*/args.json"):
        edit(path, model=EVIL, command=EVIL, device=EVIL, versions={"torch": EVIL})
    edit(copied / "tiny-none-seed1" / "eval" / "boolq.json", dtype=EVIL)
    again = shutil.copytree(copied / "tiny-reg-seed1", copied / f"{EVIL}2")
    look, steering = about(trained, copied), {"method": EVIL}
    bad = shutil.copytree(again, copied / "bad")
    edit(bad / "args.json", steering=steering)
    for name in ("compare", "regions", "report"):
        code, out, error = call(COMMANDS[name], *look[name])
        assert code == 0 and "left out" in error, (name, error)
        assert not {"\x1b", "\x07", "\u202e"} & {*out, *error}, name
    page = (copied / "report.html").read_text(encoding="utf-8")
    assert not {"\x1b", "\x07", "\u202e"} & {*page} and "<script" not in page
    code, out, _ = call(flux, "--model", trained / "tiny", odd, again, "--text", "a b c")
    assert code == 0 and not {"\x1b", "\x07", "\u202e"} & {*out}
    assert "reg (" in comparison_table(compare(find_runs(copied)))


def test_a_page_about_one_run_says_which_folder_is_meant(copied):
    run = copied / "tiny-none-seed0"
    for name, argv in (("report", [run]), ("compare", ["--compare", run])):
        code, _, error = call(COMMANDS[name], *argv)
        assert code == 2 and "a run itself, so give the folder it lies in" in error


def test_a_page_goes_where_it_can_be_written(copied, tmp_path):
    for path in copied.glob("*/args.json"):
        edit(path, model="gone/away")
    code, out, _ = call(report, copied, "--out", tmp_path / "page.html")
    assert code == 0 and (tmp_path / "page.html").is_file()
    assert call(report, copied, "--out", tmp_path / "page.html")[0] == 0, "again"
    for place in (tmp_path, tmp_path / "nowhere" / "page.html"):
        code, _, error = call(report, copied, "--out", place)
        assert code == 2 and f"{place}: " in error and "--out names another" in error


def test_somebody_s_file_is_never_replaced_by_a_page(copied):
    mine = copied / "report.html"
    mine.write_text("<!doctype html>\n<html lang=\"en\">\nmine")
    device = "/dev/null" if os.path.exists("/dev/null") else mine
    for module, argv in ((report, [copied]), (report, [copied, "--out", device]),
                         (flux, ["--text", "a b c", "--html", mine]),
                         (flux, ["--text", "a b c", "--html", device])):
        code, out, error = call(module, *argv)
        assert (code, out) == (2, "") and "so it is not replaced" in error
    assert mine.read_text().endswith("mine") and not os.path.isfile("/dev/null")


# ----------------------------------------------------------------------------- the experiment


def test_one_model_by_another_path_trains_nothing_again(trained, copied, monkeypatch):
    monkeypatch.chdir(trained)
    for path in ("tiny", "./tiny/", trained / "tiny"):
        code, out, error = call(experiment, "--steer", "none", "reg", "--seed", 0, 1, "--out",
                                copied, *flags(path, trained / "data"))
        assert code == 0 and "4 of them finished; 0 to train" in error, error
        assert "+" in out


def test_finished_runs_of_two_precisions_are_refused_before_anything_is_done(trained, copied):
    edit(copied / "tiny-reg-seed1" / "args.json", precision="bf16")
    shutil.rmtree(copied / "tiny-none-seed0")
    code, out, error = call(experiment, "--steer", "none", "reg", "--seed", 0, 1, "--out",
                            copied, *flags(trained / "tiny", trained / "data"))
    assert code == 2 and "precision" in error and not (copied / "tiny-none-seed0").exists()
    assert "--overwrite" in error and "--out" in error


def test_an_interrupted_run_of_another_recipe_is_refused_before_anything_is_done(trained, copied):
    (copied / "tiny-reg-seed1").rename(copied / "tiny-reg-seed1.partial")
    shutil.rmtree(copied / "tiny-none-seed0")
    code, _, error = call(experiment, "--steer", "none", "reg", "--seed", 0, 1, "--out", copied,
                          *flags(trained / "tiny", trained / "data"), "--lr", 1)
    assert code == 2 and "lr" in error and not (copied / "tiny-none-seed0").exists()


@pytest.mark.parametrize("name", ["tiny-base", "tiny-none-seed1"])
def test_what_is_wrong_with_scores_that_are_there_shows_before_training(trained, copied, name):
    edit(copied / name / "eval" / "boolq.json", items_sha256="other")
    shutil.rmtree(copied / "tiny-none-seed0")
    code, _, error = call(experiment, "--steer", "none", "--seed", 0, 1, "--out", copied,
                          *flags(trained / "tiny", trained / "data"))
    assert code == 2 and "another items_sha256" in error
    assert not (copied / "tiny-none-seed0").exists()


def test_two_experiments_in_one_folder_end_well(trained, tmp_path):
    both = [start("lab.experiment", "--steer", arm, "--seed", 0, "--out", tmp_path / "out",
                  *flags(trained / "tiny", trained / "data")) for arm in ("none", "reg")]
    for one in both:
        out, error = one.communicate(timeout=120)
        assert one.returncode == 0, error
        assert "Traceback" not in error and "next" in out
    assert set(rows_of(tmp_path / "out")) == {"base", "none", "reg"}
    assert not [*tmp_path.glob("out/*.lock"), *tmp_path.glob("out/*/eval/*.lock"),
                *tmp_path.glob("out/*.partial"), *tmp_path.glob("out/**/*.part")]


def test_more_items_than_there_are_are_all_items(trained, copied):
    code, out, error = call(experiment, "--steer", "none", "reg", "--seed", 0, 1, "--out", copied,
                            *flags(trained / "tiny", trained / "data"), "--items", 1000, "--json")
    assert code == 0
    assert {row["arm"]: row["mean"] for row in json.loads(out)["rows"]} == {
        arm: row["mean"] for arm, row in rows_of(copied).items()}
    assert not [*copied.glob("*/eval/*first*")]


def test_an_out_that_is_a_file_is_one_line(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, error = call(experiment, "--steer", "none", "--seed", 0, "--out", tmp_path / "file",
                          *flags(trained / "tiny", trained / "data"))
    assert code == 2 and str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["my runs; rm -rf x", "-x"])
def test_the_next_command_works_for_a_folder_with_such_a_name(runs, tmp_path, monkeypatch, name):
    runs.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    _, out, _ = call(experiment, f"--compare={name}")
    words = out.strip().splitlines()[-1].split(None, 1)[1]
    shown = subprocess.run(["bash", "-c", f"python() {{ printf '%s\\n' \"$@\"; }}; {words}"],
                           capture_output=True, text=True).stdout.splitlines()
    assert shown == ["-m", "lab.report", name if name[0] != "-" else f"./{name}"]


# ------------------------------------------------------------------------------- memories


def test_memories_are_read_as_they_are_stored(tmp_path, capsys):
    folder = checkpoint_folder(tmp_path / "m")
    model, _ = load(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    about = []
    for more in ([], ["--dtype", "float32"]):
        assert call(memories, "--model", folder, "--data", ROOT / "data" / "toy", "--items", 2,
                    "--device", "cpu", "--token", "a", "--overwrite", "--decode", "raw",
                    *more)[0] == 0
        index = folder / "eval" / memories.INDEX.format("raw")
        about.append(read_tensors(index)[1]["made from"])
    assert "bfloat16" in about[0] and "float32" in about[1]


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_memories_that_cannot_be_kept_are_one_line_that_names_out(tmp_path, place):
    folder = checkpoint_folder(tmp_path / "m")
    (folder / "eval").write_text("mine")
    argv = ["--model", folder, "--items", 2, "--device", "cpu", "--token", "a"]
    argv += ["--out", folder / "eval" / "x"] if place == "below a file" else []
    code, _, error = call(memories, *argv)
    assert code == 2 and "--out" in error and error.count("\n") == 1
    assert (folder / "eval").read_text() == "mine"


def test_a_read_only_model_folder_is_one_line_that_names_out(tmp_path):
    folder = checkpoint_folder(tmp_path / "m")
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("nothing is read-only to root")
    code, _, error = call(memories, "--model", folder, "--items", 2, "--token", "a")
    folder.chmod(0o755)
    assert code == 2 and "--out" in error and error.count("\n") == 1


def test_two_looks_at_one_model_s_memories_take_turns(tmp_path):
    folder = checkpoint_folder(tmp_path / "m")
    both = [start("lab.memories", "--model", folder, "--items", 20, "--device", "cpu", "--json",
                  "--decode", "raw") for _ in range(2)]
    said = []
    for one in both:
        out, error = one.communicate(timeout=120)
        assert one.returncode == 0, error
        said.append(json.loads(out))
    assert said[0] == said[1]
    assert {path.name for path in (folder / "eval").iterdir()} == {
        memories.INDEX.format("raw"), memories.TRIGGERS}


def test_the_commands_print_what_they_refuse_in_one_line(tmp_path, capsys):
    for module, argv in ((report, [tmp_path / "nowhere"]), (regions, ["--runs", tmp_path / "no"]),
                         (flux, ["--runs", tmp_path / "no"]), (report, [__file__]),
                         (flux, ["--model", __file__]), (memories, ["--model", tmp_path]),
                         (regions, ["--model", tmp_path, "--runs", tmp_path])):
        with pytest.raises(SystemExit) as stop:
            command(lambda: module.main([str(one) for one in argv]))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "error: " in error
    assert not list(tmp_path.iterdir())
