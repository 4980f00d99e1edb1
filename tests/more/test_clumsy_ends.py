"""After this file you know that scoring survives a clumsy user: damaged weights and files, two
evaluations at once, odd flags, closed and narrow terminals. And that its advice works when pasted.
"""
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import eval as evaluation
import train
from conftest import ROOT
from data.tasks import load
from helpers import checkpoint_folder, even_or_odd, write_task
from test_clumsy import a_thesis, flags, outcome, posix, started, stop_at

DEVICE = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model (base) and a task (data)."""
    folder = tmp_path_factory.mktemp("ends")
    checkpoint_folder(folder / "base")
    for split in ("train", "test"):
        write_task(folder / "data", "boolq", split, even_or_odd(16))
    return folder


def scoring(place, out, *more):
    """Flags of eval.py; a later flag replaces an earlier one."""
    return ["--model", str(place / "base"), "--task", "boolq", "--data", str(place / "data"),
            "--out", str(out), "--max-new-tokens", "4", *DEVICE, *more]


def one_line(capsys, main, argv, *words):
    """A command ends with one line on standard error that holds the words, and status 2."""
    status, out, error = outcome(capsys, main, argv)
    assert status == 2 and error.count("\n") == 1 and ": error: " in error, (out, error)
    assert all(word in error for word in words), error
    return error


# ------------------------------------------------------------------------------- not finite

TENSOR = r"blocks\.1\.memory\.values\.weight|model\.layers\.1\.mlp\.down_proj\.weight"


def fill(value):
    return lambda model: model.blocks[1].memory.values.weight.data.view(-1)[:1].fill_(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", [["--score", "choice"], ["--score", "generate"], ["--change"]])
def test_weights_that_are_not_finite_are_never_scored(place, tmp_path, capsys, value, how):
    broken = checkpoint_folder(tmp_path / "broken", spoil=fill(value))
    error = one_line(capsys, evaluation.main, scoring(
        place, tmp_path / "out", "--model", str(broken), *how), "finite")
    assert re.search(TENSOR, error) and not list(tmp_path.glob("out/*.json*"))
    error = outcome(capsys, train.main, flags(place, tmp_path / "run", "--model", str(broken)))[2]
    assert re.search(TENSOR, error) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["choice", "generate"])
def test_answers_that_are_not_finite_are_never_counted(place, tmp_path, capsys, how):
    huge = checkpoint_folder(tmp_path / "huge", spoil=lambda model: [
        weight.data.mul_(1e25) for weight in model.parameters()])
    one_line(capsys, evaluation.main,
             scoring(place, tmp_path / "out", "--model", str(huge), "--score", how), "finite")
    assert not list(tmp_path.glob("out/*.json*"))


# ----------------------------------------------------------------------- two scorings at once


@posix
def test_two_evaluations_at_once_say_the_same(place, tmp_path):
    argv = scoring(place, tmp_path, "--json")
    with started("eval.py", argv) as first, started("eval.py", argv) as second:
        while not list(tmp_path.glob("*.partial")) and first.poll() is None:
            time.sleep(0.001)
        ended = [process.communicate(timeout=60) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), ended
    assert ended[0][0] == ended[1][0] and json.loads(ended[0][0])[0]["n"] == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boolq.json", "boolq.jsonl"]


@posix
@pytest.mark.parametrize("goes_on", [True, False], ids=["halted", "killed"])
def test_a_second_evaluation_waits_for_the_first_unless_that_is_dead(place, tmp_path, goes_on):
    with started("eval.py", scoring(place, tmp_path)) as first, ThreadPoolExecutor() as pool:
        stop_at(first, tmp_path / "boolq.jsonl.partial", 0)
        if not goes_on:
            first.kill()
            first.wait()
        second = pool.submit(evaluation.score, place / "base", ["boolq"], place / "data", tmp_path,
                             device="cpu", max_new_tokens=4)
        if goes_on:
            time.sleep(0.7)
            assert not second.done()
            first.send_signal(signal.SIGCONT)
            assert first.communicate(timeout=60)[1] == "" and first.returncode == 0
        assert second.result(60)[0]["n"] == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boolq.json", "boolq.jsonl"]


def test_two_terminals_share_the_folder_of_their_bases_scores(place, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        for round in range(40):
            folders = [pool.submit(evaluation.base_folder, tmp_path / str(round), place / "base")
                       for _ in range(4)]
            assert len({folder.result() for folder in folders}) == 1


def test_a_damaged_line_of_an_interrupted_evaluation_is_answered_again(place, tmp_path):
    examples, settings = load(place / "data", "boolq", "test"), {
        "task": "boolq", "score": "generate", "max_new_tokens": 4}

    def evaluate(name):
        return evaluation.evaluate(model, tokenizer, examples, tmp_path / name, settings)

    model, tokenizer = evaluation.load(place / "base")
    summary = evaluate("whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    damaged = ["{}", "[]", "null", "7", '{"index": 4}', '{"index": [5]}', "\0" * 40, '"}', "",
               lines[9][:-9] + "}", lines[10].replace(":", ";"), lines[11][20:]]
    (tmp_path / "cut.jsonl.partial").write_text("\n".join(
        [json.dumps(settings, sort_keys=True), *damaged, *lines[12:], lines[0][:50]]))
    again = evaluate("cut.jsonl")
    for name in ("nll", "nll_standard_error"):                 # added up in another order
        assert again.pop(name) == pytest.approx(summary.pop(name), rel=1e-5)
    assert again == summary
    items = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
             for name in ("cut", "whole")]
    for one, other in zip(*items, strict=True):
        assert one.pop("nll") == pytest.approx(other.pop("nll"), rel=1e-6)
        assert one == other


# ---------------------------------------------------------------------- the same scores again


def test_a_touched_model_keeps_its_scores(place, tmp_path, capsys):
    first = outcome(capsys, evaluation.main, scoring(place, tmp_path, "--json"))
    for path in (place / "base").iterdir():
        os.utime(path, (1, 1))
    name = os.path.relpath(place / "base") + "/"
    again = outcome(capsys, evaluation.main, scoring(place, tmp_path, "--json", "--model", name))
    assert first == again and first[0] == 0


def test_a_limit_above_the_number_of_rows_is_no_limit(place, tmp_path, capsys):
    capped = outcome(capsys, evaluation.main, scoring(place, tmp_path, "--limit", "500", "--json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boolq.json", "boolq.jsonl"]
    for more in ([], ["--limit", "16"]):
        assert outcome(capsys, evaluation.main, scoring(place, tmp_path, *more, "--json")) == capped


def test_a_byte_order_mark_does_no_harm(place, tmp_path, capsys):
    model = shutil.copytree(place / "base", tmp_path / "marked")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes(b"\xef\xbb\xbf" + (place / "base" / name).read_bytes())
    argv = scoring(place, tmp_path / "out", "--model", str(model))
    assert outcome(capsys, evaluation.main, argv)[0] == 0


# ------------------------------------------------------------------------------- odd flags

DIGITS = "12345678901234567890"
WHOLE = ["--seed", "--batch", "--epochs", "--steps", "--max-length", "--limit", "--warmup",
         "--save-every", "--threads", "--micro-tokens"]
ODD_FLAGS = [
    *((train, [flag, DIGITS]) for flag in WHOLE), (train, ["--seed", str(2**64)]),
    (evaluation, ["--threads", str(2**31)]),
    (train, ["--seed", str(-2**70)]), (train, ["--seed", "9" * 5000]), (train, ["--lr", "1e300"]),
    (train, ["--clip", "1e300"]), (train, ["--weight-decay", "1e300"]),
    (train, ["--steer", "reg", "--lam", "1e300"]), (train, ["--steer", "int", "--alpha", "1e300"]),
    (train, ["--steer", "int", "--layers", "1-" + DIGITS]),
    (train, ["--steer", "int", "--layers", "1:alpha=1e300"]),
    (train, ["--steer", "semantic", "--groups", DIGITS]),
    *((evaluation, [flag, DIGITS]) for flag in ("--max-new-tokens", "--limit", "--threads")),
    (evaluation, ["--max-new-tokens", "9" * 18]), (evaluation, ["--max-new-tokens", "9" * 5000]),
    (evaluation, ["--cache-gb", "1e300"]), (evaluation, ["--cache-gb", "1e29"]),
]


@pytest.mark.parametrize("module, more", ODD_FLAGS, ids=lambda part: " ".join(part)[:40]
                         if isinstance(part, list) else part.__name__)
def test_a_number_beyond_reason_is_one_line_or_no_matter(place, tmp_path, capsys, module, more):
    argv = (scoring if module is evaluation else flags)(place, tmp_path / "out", *more)
    status, _, error = outcome(capsys, module.main, argv)
    assert (status, error.count("\n")) in ((0, 0), (2, 1)), error


def test_out_of_memory_names_the_number_of_new_tokens(place, tmp_path, capsys):
    argv = scoring(place, tmp_path, "--max-new-tokens", "9" * 12)
    one_line(capsys, evaluation.main, argv, "out of memory", "--max-new-tokens")


# ------------------------------------------------------------------------------- terminals


def test_a_terminal_that_knows_no_plus_minus_gets_the_table(place, tmp_path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with started("eval.py", scoring(place, tmp_path), env=ascii_only) as process:
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "") and "50.0" in out


@posix
def test_closed_streams_are_nobodys_problem(place, tmp_path):
    commands = [("train.py", flags(place, tmp_path / "nan", "--lr", "nan"), "2>&-", 2),
                ("eval.py", scoring(place, tmp_path / "out"), "<&- >&- 2>&-", 0)]
    lines = [f"{shlex.join([sys.executable, str(ROOT / script), *argv])} {closed}"
             for script, argv, closed, _ in commands]
    processes = [subprocess.Popen(["sh", "-c", line], stdout=subprocess.DEVNULL) for line in lines]
    assert [process.wait(60) for process in processes] == [status for *_, status in commands]
    assert (tmp_path / "out" / "boolq.json").is_file()


@posix
def test_a_disk_that_is_full_at_the_start_is_no_trap(place, tmp_path, capsys):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    with started("train.py", flags(place, tmp_path / "run"), preexec_fn=full) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1 and "args.json" in error, error
    status, _, error = outcome(capsys, train.main, flags(place, tmp_path / "run", "--resume"))
    assert status == 0, error


ESCAPES = "\x1b[31mred\x1b]0;title\x07\u202e"
SETTINGS = [{"steering": {"method": ESCAPES}}, {"steering": {"method": "int", "rank_by": ESCAPES}},
            {"steering": {"method": "int", "layers": {ESCAPES: {}}}}, {"steering": ESCAPES},
            {"steering": {"method": "int", ESCAPES: 1}}, {"model": ESCAPES, "precision": ESCAPES},
            {"steering": {"method": "int", "layers": {"1": {ESCAPES: 1}}}},
            {"model": ESCAPES, "steering": {"method": "int"}, ESCAPES: ESCAPES, "seed": ESCAPES}]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_escape_sequences_in_settings_do_not_reach_the_terminal(place, tmp_path, capsys, settings):
    run = shutil.copytree(place / "base", tmp_path / "run")
    (run / "args.json").write_text(json.dumps({"model": "base", **settings}))
    said = []
    for more in (["--steered"], []):
        said += outcome(capsys, evaluation.main, scoring(place, tmp_path / "out", "--model",
                                                         str(run), *more))
    for more in ([], ["--overwrite"]):
        said += outcome(capsys, train.main, flags(place, run, *more))
    assert not set("\x1b\x07\u202e") & set("".join(map(str, said))), said


# ------------------------------------------------------------------------------------ advice


def pasted(text):
    """The words of the command that a text advises."""
    command = re.search(r"(?:next       |with: )(python .*?)(?: \(--help.*)?$", text, re.M)[1]
    return shlex.split(command)


ODD_NAMES = ["a b", "-base", "it's", "$HOME", "a;b", "ä"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_next_command_reads_back_what_was_meant(place, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "base", tmp_path / name / "model")
    shutil.copytree(place / "data", tmp_path / name / "data")
    where = ["--task", "boolq", "--steps", "1", *DEVICE]
    status, out, error = outcome(capsys, train.main, [
        f"--model={name}/model", f"--data={name}/data", f"--out={name}/run", *where])
    program, script, *argv = pasted(out)
    assert (status, program, script) == (0, "python", "eval.py"), error
    args = evaluation.read_settings(argv)
    assert (args.model, args.data, args.task) == (f"{name}/run", f"{name}/data", "boolq")
    assert outcome(capsys, evaluation.main, [*argv, "--limit", "1", *DEVICE])[0] == 0
    again = shlex.split(json.loads(Path(name, "run", "args.json").read_text())["command"])[2:]
    assert "is a finished run" in outcome(capsys, train.main, again)[1]
    _, _, error = outcome(capsys, evaluation.main, [
        "--model", f"{name}/run" if name[0] != "-" else f"./{name}/run", "--task", "piqa",
        f"--data={name}/none"])
    if name[0] != "-":
        assert pasted(error)[-2:] == ["--out", f"{name}/none"]


@pytest.mark.parametrize("model", [".", "../base", "../base/", "./"])
def test_a_run_without_a_name_is_named_after_its_models_folder(place, monkeypatch, model):
    monkeypatch.chdir(place / "base")
    args = train.read_settings(["--model", model, "--task", "boolq", "--data", "../data"])
    assert args.out == os.path.join("out", "base-none-seed0")


@pytest.mark.parametrize("argv, words", [
    (["--model", "BASE"], ["--task"]),
    (["--model", "BASE", "--data", "DATA"], ["--task"]),
    (["--model", "nowhere"], ["nowhere"])])
def test_a_real_model_without_a_task_is_not_given_the_toy_worlds(place, capsys, argv, words):
    argv = [{"BASE": str(place / "base"), "DATA": str(place / "data")}.get(word, word)
            for word in argv]
    for main in (evaluation.main, train.main):
        one_line(capsys, main, argv, *words)
    assert not (place / "base" / "eval").exists()


def test_nobody_is_sent_to_write_into_the_toy_world(place, tmp_path, capsys, monkeypatch):
    toy = re.compile(r"data.toy(?! \(default)")
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        for main in (evaluation.main, train.main):
            argv = ["--model", str(place / "base"), "--task", "piqa", "--device", "cpu"]
            assert not toy.search(one_line(capsys, main, argv, "--"))
        assert not toy.search(one_line(capsys, train.main, ["--task", "piqa"], "--"))


def test_a_model_folder_that_cannot_be_written_asks_for_another_place(place, tmp_path, capsys):
    model = shutil.copytree(place / "base", tmp_path / "model")
    a_thesis(model / "eval")
    argv = ["--model", str(model), "--task", "boolq", "--data", str(place / "data"), *DEVICE]
    one_line(capsys, evaluation.main, argv, "--out")
    assert (model / "eval").read_text() == "years of work"
    assert outcome(capsys, evaluation.main, [*argv, "--out", str(tmp_path / "out")])[0] == 0
