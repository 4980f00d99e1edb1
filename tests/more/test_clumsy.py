"""After this file you know that training survives a clumsy user: two runs at once, folders with
other things in them, a base model that moves, a program stopped in its first second. Nothing that
somebody else wrote is lost, and what can be refused is refused before the training, in one line.

test_clumsy_ends.py does the same for scores, terminals and advice.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

import eval as evaluation
import train
from conftest import ROOT
from data import command
from helpers import Interrupted, checkpoint_folder, even_or_odd, run_of, write_task

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and locks")
ALL_FLAGS = ["--task", "boolq", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model (base), a task (data) and a finished run."""
    folder = tmp_path_factory.mktemp("clumsy")
    checkpoint_folder(folder / "base")
    for split in ("train", "test"):
        write_task(folder / "data", "boolq", split, even_or_odd(16))
    train.main(flags(folder, "run"))
    return folder


def flags(place, out, *more):
    """Flags of train.py for four steps; a later flag replaces an earlier one."""
    return ["--model", str(place / "base"), "--data", str(place / "data"), "--out",
            str(place / out), "--batch", "4", "--warmup", "2", *ALL_FLAGS, *more]


def outcome(capsys, main, argv):
    """Run a main() as from the shell -> exit status, standard output, standard error."""
    status = 0
    capsys.readouterr()
    try:
        command(lambda: main(argv))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        print(stop.code if status == 1 else "", end="", file=sys.stderr)
    return status, *capsys.readouterr()


def refused(capsys, argv, *words):
    """train.py refuses these flags in one line that holds the words, before it trains."""
    status, out, error = outcome(capsys, train.main, argv)
    assert (status, out) == (2, "") and error.count("\n") == 1, (out, error)
    assert all(word in error for word in words), error
    return error


def contents(folder):
    """Every file under a folder, and what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def started(script, argv, **how):
    """train.py or eval.py in a process of its own, which ends with the block at the latest."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    with subprocess.Popen([sys.executable, str(ROOT / script), *argv], **how) as process:
        try:
            yield process
        finally:
            process.kill()


def stop_at(process, path, least=1):
    """Let a process go on until a file has so many bytes, and halt it there."""
    while process.poll() is None and not (path.exists() and path.stat().st_size >= least):
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None, "it ended before it could be halted"


def a_thesis(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("years of work")


# ------------------------------------------------------------------- what somebody else wrote

THEIRS = [                             # where somebody's file is, flags of train.py
    ("run.partial/thesis", []), ("run.partial/thesis", ["--overwrite"]),
    ("run.partial/thesis", ["--resume"]), ("run.partial/eval/thesis", ["--overwrite"]),
    ("run.partial", ["--overwrite"]), ("run.partial", ["--resume"]),
    ("run.partial/args.json", ["--overwrite"]), ("run/args.json", ["--overwrite"]),
    ("run/thesis", ["--overwrite"]), ("run/eval/thesis", ["--overwrite"]), ("run", ["--overwrite"]),
    ("run.lock", []), ("run.lock", ["--overwrite"]), ("run.lock/thesis", []),
]
OF_A_RUN = ["run/thesis", "run/eval/thesis", "run.partial/eval/thesis"]        # and beside our own


@pytest.mark.parametrize("theirs, more", THEIRS)
def test_nothing_is_replaced_but_what_this_program_wrote(place, tmp_path, capsys, theirs, more):
    if theirs in OF_A_RUN:
        shutil.copytree(place / "run", tmp_path / theirs.split("/")[0])
    a_thesis(tmp_path / theirs)
    refused(capsys, flags(place, tmp_path / "run", *more))
    assert (tmp_path / theirs).read_text() == "years of work"


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_run_goes_on_beside_what_is_somebody_elses(place, tmp_path, more):
    for name in ("run.old/thesis", ".run-old/thesis", "run.part", "run.partial.lock", "run.bak"):
        a_thesis(tmp_path / name)
    before = contents(tmp_path)
    train.main(flags(place, tmp_path / "run", *more))
    assert contents(tmp_path).items() >= before.items() and run_of(tmp_path / "run")


def test_the_link_of_somebody_is_not_written_through(place, tmp_path, capsys):
    a_thesis(tmp_path / "thesis")
    (tmp_path / "run.lock").symlink_to(tmp_path / "thesis")
    outcome(capsys, train.main, flags(place, tmp_path / "run"))
    assert (tmp_path / "thesis").read_text() == "years of work"


@pytest.mark.parametrize("theirs", ["out", "out/thesis"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_what_appears_at_out_while_a_run_trains_is_not_deleted(place, tmp_path, theirs, more):
    class Meanwhile(train.ALONE):
        @staticmethod
        def share(batches):
            if not (tmp_path / theirs).exists():
                a_thesis(tmp_path / theirs)
            return batches

    args = train.read_settings(flags(place, tmp_path / "out", *more))
    with pytest.raises((SystemExit, ValueError, OSError)):
        train.train(args, Meanwhile)
    assert (tmp_path / theirs).read_text() == "years of work"
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()


def test_the_folder_of_the_bases_scores_takes_no_other_place(place, tmp_path, capsys):
    train.main(flags(place, tmp_path / "base-base"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="base-base"):
        evaluation.base_folder(tmp_path, place / "base")
    assert contents(tmp_path) == before


# ----------------------------------------------------------------------------- two runs at once


@posix
def test_a_run_that_is_being_trained_is_nobody_elses(place, capsys):
    out, work, log = place / "busy", place / "busy.partial", place / "busy.txt"
    with open(log, "w") as file, started("train.py", flags(place, out, "--epochs", "20"),
                                         stdout=file, stderr=file) as first:
        stop_at(first, work / "log.jsonl")
        before = contents(work)
        said = [line.split()[0] for line in log.read_text().splitlines()]
        assert said == ["model", "data", "steering", "recipe"]     # a sign of life, not at the end
        for more in ([], ["--overwrite", "--lr", "1", "--seed", "4"], ["--resume"]):
            error = refused(capsys, flags(place, out, "--epochs", "20", *more), "another process")
            assert "--resume" not in error and "--overwrite" not in error
        assert contents(work) == before
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0, log.read_text()
    settings, steps = json.loads((out / "args.json").read_text()), run_of(out)[1]
    assert [line["step"] for line in steps] == list(range(1, 81)) and settings["seed"] == 0
    assert not work.exists() and not Path(f"{out}.lock").exists()


@posix
def test_the_lock_of_a_dead_process_stops_nobody(place, capsys):
    argv = flags(place, "dead", "--epochs", "20", "--save-every", "1")
    with started("train.py", argv) as process:
        stop_at(process, place / "dead.partial" / "state.pt")
        process.kill()
    assert (place / "dead.lock").exists()
    refused(capsys, argv, "--resume", "--overwrite")
    assert outcome(capsys, train.main, [*argv, "--resume"])[0] == 0
    assert len(run_of(place / "dead")[1]) == 80


@posix
def test_a_run_is_not_replaced_while_it_is_being_scored(place, tmp_path):
    argv = ["--model", str(tmp_path / "run"), "--data", str(place / "data"), *ALL_FLAGS]
    train.main(flags(place, tmp_path / "run"))
    with started("eval.py", argv) as scoring, ThreadPoolExecutor() as pool:
        stop_at(scoring, tmp_path / "run" / "eval" / "boolq.jsonl.partial", 0)
        again = pool.submit(train.main, flags(place, tmp_path / "run", "--overwrite", "--lr", "1"))
        wait([again], 3)               # it is refused, or it waits
        scoring.send_signal(signal.SIGCONT)
        error = scoring.communicate(timeout=60)[1]
    assert scoring.returncode == 0, error
    for path in (tmp_path / "run" / "eval").glob("*.json"):
        scored = json.loads(path.read_text())["model_sha256"]
        assert scored == evaluation.which_model(tmp_path / "run")


# --------------------------------------------------------------------------- seen at the start

ODD_PLACES = [".", "/", "..", "HERE", "HERE/x/..", "HERE/dangling", "HERE/a-file",
              "HERE/a-file/run", "HERE/dangling/run", "HERE/" + "n" * 300]


@pytest.mark.parametrize("out", ODD_PLACES)
@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_an_impossible_out_is_refused_before_training(place, tmp_path, capsys, monkeypatch, out,
                                                      more):
    monkeypatch.chdir(tmp_path)
    a_thesis(tmp_path / "a-file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    argv = flags(place, "", *more)
    argv[argv.index("--out") + 1] = out.replace("HERE", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, argv)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "dangling").is_symlink()


def test_a_place_for_the_bases_scores_is_checked_before_training(tmp_path, capsys):
    a_thesis(tmp_path / "llama-base")
    refused(capsys, ["--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")],
            "llama-base")


def test_a_base_model_that_moves_while_it_is_trained_is_not_missed(place, tmp_path):
    base = checkpoint_folder(tmp_path / "base")

    class Moves(train.ALONE):
        @staticmethod
        def share(batches):
            if base.exists():
                base.rename(tmp_path / "elsewhere")
            return batches

    args = train.read_settings(flags(place, tmp_path / "run", "--model", str(base)))
    train.train(args, Moves)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {"tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"}
    evaluation.load(tmp_path / "run")


@pytest.mark.parametrize("more", [["--resume"], ["--overwrite"]])
@pytest.mark.parametrize("left", [{}, {"args.json.part": '{"mod'}, {"args.json.part": ""}],
                         ids=["nothing", "a part", "an empty part"])
def test_a_run_that_died_before_it_wrote_its_settings_can_go_on(place, tmp_path, capsys, left,
                                                                more):
    work = tmp_path / "run.partial"
    work.mkdir()
    for name, text in left.items():
        (work / name).write_text(text)
    refused(capsys, flags(place, tmp_path / "run"), more[0])
    status, _, error = outcome(capsys, train.main, flags(place, tmp_path / "run", *more))
    assert status == 0, error
    assert len(run_of(tmp_path / "run")[1]) == 4


# --------------------------------------------------------------------------------- which model


@pytest.fixture
def cut(tmp_path):
    """An interrupted run of a base model of its own -> the folder of both, flags to go on."""
    base = checkpoint_folder(tmp_path / "base")
    write_task(tmp_path / "data", "boolq", "train", even_or_odd(16))
    argv = flags(tmp_path, "cut", "--save-every", "1")
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(argv), Interrupted(3))
    return base, [*argv, "--resume"]


def other_weights(base):
    path = base / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])


def other_config(**change):
    def edit(base):
        path = base / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return edit


@pytest.mark.parametrize("change", [
    other_weights, other_config(rope_theta=5e4), other_config(rms_norm_eps=1e-5)],
    ids=["weights", "rope_theta", "eps"])
def test_a_run_does_not_go_on_from_another_base_model(cut, capsys, change):
    base, argv = cut
    before = contents(base.parent / "cut.partial")
    change(base)
    refused(capsys, argv, "was started with another model")
    assert contents(base.parent / "cut.partial") == before


def test_a_base_model_is_its_content_not_its_time_or_its_path(cut, capsys, monkeypatch):
    base, argv = cut
    for path in base.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.chdir(base.parent)
    assert outcome(capsys, train.main, [*argv, "--model", "base"])[0] == 0
    for name in (str(base), f"{base}/", "./base/", "base", "../" + base.parent.name + "/base"):
        status, out, error = outcome(capsys, train.main, [*argv[:-1], "--model", name])
        assert status == 0 and "is a finished run" in out, error
        args = train.read_settings(["--model", name, "--task", "boolq", "--data", "data"])
        assert args.out == os.path.join("out", "base-none-seed0")


# ----------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("argv", [
    ["--steps", "1", "--lr", "1e30", "--weight-decay", "1e20"],
    ["--steps", "2", "--lr", "1e30", "--weight-decay", "1e20", "--save-every", "1"]])
def test_weights_that_are_not_finite_are_never_a_finished_run(place, tmp_path, capsys, argv):
    more = ["--warmup", "0", *argv]
    status, out, error = outcome(capsys, train.main, flags(place, tmp_path / "run", *more))
    assert status in (1, 2) and "saved  " not in out and error.count("\n") <= 1, error
    assert "finite" in error and "--lr" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv, words", [
    (["--steer", "reg", "--lam", "1e30"], "steering|--lam"), (["--lr", "1e20"], "--lr")])
def test_a_loss_that_is_not_finite_names_what_may_be_too_strong(place, tmp_path, capsys, argv,
                                                                words):
    status, _, error = outcome(capsys, train.main, flags(place, tmp_path / "run", *argv))
    assert status and "not finite" in error and any(word in error for word in words.split("|"))


def test_every_file_of_a_run_may_be_read_by_the_same_people(place):
    modes = {path.name: oct(path.stat().st_mode) for path in (place / "run").iterdir()
             if path.is_file()}
    assert len(modes) == 6 and len(set(modes.values())) == 1, modes


# --------------------------------------------------------------------------------- interrupted

MOMENTS = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
from data import command

for moment in sys.argv.pop(1).split(","):
    name = os.path.join(sys.argv[-1], moment)
    if not (child := os.fork()):
        for number in (1, 2):
            os.dup2(os.open(f"{name}.{number}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv[-1] = name
        command(train.main)
        os._exit(0)
    time.sleep(float(moment))
    os.kill(child, signal.SIGINT)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@posix
def test_control_c_at_any_moment_is_one_line(place, tmp_path):
    moments = [0.01, 0.07, 0.3, 1.0]
    argv = flags(place, "", "--epochs", "100000")
    del argv[argv.index("--out"):][:2]
    done = subprocess.run(
        [sys.executable, "-c", MOMENTS, str(ROOT), ",".join(map(str, moments)), *argv, "--out",
         str(tmp_path)], capture_output=True, text=True, timeout=60)
    errors = [(tmp_path / f"{moment}.2").read_text() for moment in moments]
    assert done.stdout.split() == ["130"] * len(moments), (done.stderr, errors)
    for error in errors:
        assert len(error.split("\n")) <= 3 and "interrupted" in error, error
