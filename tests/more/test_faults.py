"""After this file you know that a run survives what machines do: it is killed, the disk is full, a
file changes. What is there is whole, the error is one line, and the run goes on to the very same
weights. And that nothing hides a mistake of this program: it keeps its traceback.

KILLS=20 python -m pytest tests/more/test_faults.py kills twenty times, at other moments.
"""
import ast
import os
import random
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT
from data import BadInput, command, read_json
from helpers import Interrupted, checkpoint_folder, even_or_odd, run_of, write_task

KILLS = int(os.environ.get("KILLS", 2))
SAVING = ["--save-every", "2"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a task, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    checkpoint_folder(folder / "llama")
    write_task(folder / "data", "boolq", "train", even_or_odd(60))
    train.main(flags(folder, "undisturbed"))
    return folder


def flags(place, name, *more):
    """train.py's flags for 30 steps of reg."""
    return ["--model", str(place / "llama"), "--task", "boolq", "--data", str(place / "data"),
            "--out", str(place / name), "--batch", "4", "--epochs", "2", "--warmup", "2",
            "--steer", "reg", "--device", "cpu", *more]


def start(arguments, **how):
    """train.py in a process of its own, on one thread as these tests are."""
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments, "--threads", "1"],
                            text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how)


def same_as_undisturbed(place, name):
    ours, theirs = run_of(place / name)[0], run_of(place / "undisturbed")[0]
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def whole(folder):
    """Is everything in a run's folder readable from end to end, but for files that are being
    written (.part) and the log's last line?"""
    readers = {".safetensors": load_file, ".json": lambda path: read_json(path, (dict, list)),
               ".pt": lambda path: torch.load(path, weights_only=True)}
    for path in folder.glob("*"):
        readers.get(path.suffix, lambda path: None)(path)
    return True


# ----------------------------------------------------------------------- killed, disk full


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(place, kill):
    name = f"killed-{kill}"
    work = place / f"{name}.partial"
    with start(flags(place, name, *SAVING)) as process:
        while not (work / "state.pt").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(random.Random(kill).uniform(0, 0.5) if kill else 0)
        process.kill()                 # SIGKILL, which nobody can catch
    if not (place / name).exists():    # the finished run is there whole or not at all
        assert whole(work)
        train.main(flags(place, name, *SAVING, "--resume"))
    assert whole(place / name) and not work.exists() and same_as_undisturbed(place, name)
    assert [line["step"] for line in run_of(place / name)[1]] == list(range(1, 31))


@pytest.mark.parametrize("kilobytes, what, more", [
    (300, "state.pt.part", SAVING), (200, "model.safetensors.part", [])])
def test_a_full_disk_is_one_line_and_the_run_goes_on(place, kilobytes, what, more):
    # A limit on the size of a file stands for the full disk: the weights are 277 KB, the state
    # three times that.
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))

    name = f"full-{kilobytes}"
    process = start(flags(place, name, *more), preexec_fn=full)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and error.startswith("train.py: error: "), error
    assert what in error and error.count("\n") == 1, error
    assert not (place / name).exists() and whole(place / f"{name}.partial")
    train.main(flags(place, name, *more, "--resume"))
    assert same_as_undisturbed(place, name) and not list((place / name).glob("*.part"))


def test_an_overwritten_run_stays_until_the_new_one_is_whole(place):
    shutil.copytree(place / "undisturbed", place / "kept")
    args = train.read_settings(flags(place, "kept", "--seed", "1", "--overwrite"))
    with pytest.raises(KeyboardInterrupt):
        train.train(args, Interrupted(5))
    assert whole(place / "kept") and same_as_undisturbed(place, "kept")


# ---------------------------------------------------------- what changes behind a run's back


def test_data_that_changed_or_vanished_are_refused_and_nothing_is_lost(place):
    work, data = place / "moved.partial", place / "data" / "boolq" / "train.json"
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(flags(place, "moved", *SAVING)), Interrupted(9))
    before, kept = {path.name: path.read_bytes() for path in work.iterdir()}, data.read_text()
    for text, message in ((kept.replace("Is 7", "Was 7"), "another data_sha256"),
                          (kept[:900], "not JSON, or cut short"), (None, "is missing")):
        data.unlink()
        if text is not None:
            data.write_text(text)
        with pytest.raises(BadInput, match=message):
            train.main(flags(place, "moved", *SAVING, "--resume"))
        assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    data.write_text(kept)
    train.main(flags(place, "moved", *SAVING, "--resume"))
    assert same_as_undisturbed(place, "moved")


def test_two_at_once_do_not_train_one_run(place):
    class Second(train.ALONE):
        """While the first run is in its third step, somebody starts it again."""
        refused, steps = [], 0

        @classmethod
        def share(cls, batches):
            cls.steps += 1
            if cls.steps == 3:
                for more in (["--resume"], ["--overwrite"], []):
                    with pytest.raises(BadInput, match="another process is .* this run") as error:
                        train.main(flags(place, "busy", *more))
                    cls.refused.append(error)
            return batches

    train.train(train.read_settings(flags(place, "busy")), Second)
    assert len(Second.refused) == 3 and same_as_undisturbed(place, "busy")


def test_a_run_that_failed_may_be_started_again_in_the_same_process(place):
    with pytest.raises(KeyboardInterrupt) as kept:         # its traceback is kept, and all in it
        train.train(train.read_settings(flags(place, "again")), Interrupted(5))
    train.main(flags(place, "again", "--resume"))
    assert same_as_undisturbed(place, "again"), kept


# --------------------------------------------------------------------------- out of memory

IN_ORDER = ["error: out of memory", "--micro-tokens", "--cache-gb", "--checkpoint"]


def test_a_gpu_out_of_memory_says_which_flags_to_turn_first(capsys):
    def starve():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit) as stopped:
        command(starve)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    assert sorted(IN_ORDER, key=line.index) == IN_ORDER


STARVED = """
import re, resource, sys, torch._dynamo, train      # what an optimizer imports when it is made
from data import command

size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)       # 64 MiB more than now
command(train.main)
"""


@linux
def test_a_cpu_out_of_memory_says_it_too(place):
    more = ["--batch", "3000", "--micro-tokens", "1000000", "--train-only", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", STARVED, *more, "--out", str(place / "hungry")],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert sorted(IN_ORDER, key=done.stderr.index) == IN_ORDER and not (place / "hungry").exists()


# ----------------------------------------------------------------------- a bug stays a bug


@pytest.mark.parametrize("error", [
    RuntimeError("shapes do not match"), ValueError("too many values to unpack"), KeyError("norm"),
    TypeError("not callable"), AssertionError(), IndexError("list index out of range")],
    ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_keeps_its_traceback(place, error):
    def stumble(args):
        raise error

    args = train.read_settings(flags(place, f"bug-{type(error).__name__}"))
    with pytest.raises(type(error)) as raised:
        command(lambda: train.train(args, data=stumble))
    assert raised.value is error


def test_no_blanket_except_makes_a_mistake_look_like_bad_input():
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = [name.id for name in ast.walk(node.type or ast.Name("BaseException"))
                          if isinstance(name, ast.Name)]
                assert not {"Exception", "BaseException"} & {*caught}, f"{path}:{node.lineno}"
