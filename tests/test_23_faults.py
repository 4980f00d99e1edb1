"""After this file you know that a run survives what machines do: it is killed, the disk is full, a worker dies, a file changes. What is there
is whole, the error is one line, and the run goes on to the very same weights. KILLS=20 python -m pytest tests/test_23_faults.py tries more."""
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from conftest import ROOT
from data import read_json
from helpers import checkpoint_folder, write_task
from test_22_processes import ALONE, TWO, apart, call, command, kill_tree, needs_sharding, weights

KILLS = int(os.environ.get("KILLS", 2))
FLAGS = ["--steer", "reg", "--lam", "0.05", "--save-every", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    checkpoint_folder(folder / "llama", spoil=lambda model: [weight.data.mul_(8) for weight in model.parameters() if weight.dim() > 1])
    write_task(folder / "data", "boolq", "train", [(f"Is {i} even?" + " Really?" * (i % 5), "true" if i % 2 == 0 else "false") for i in range(60)])
    train.main(command([], folder, "undisturbed", *FLAGS)[1:])
    return folder


def whole(folder):
    """Is everything in a run's folder readable from end to end, but for files that are being written (.part) and the log's last line?"""
    for path in folder.glob("*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            read_json(path, (dict, list))
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
    return True


@pytest.mark.parametrize("start", [ALONE, pytest.param(TWO, marks=needs_sharding)], ids=["one process", "two processes"])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(place, start):
    name, environment = f"killed-{len(start)}", {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.time()
    assert call(command(start, place, f"{name}-first", *FLAGS)).returncode == 0
    duration, dice = time.time() - begun, random.Random(0)
    for kill in range(KILLS):
        for folder in (place / name, place / f"{name}.partial"):
            shutil.rmtree(folder, ignore_errors=True)
        moment = dice.uniform(0.5, 1.05) * duration                            # the first half is Python starting up
        with subprocess.Popen(command(start, place, name, *FLAGS), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                              env=environment) as process:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
        work = place / f"{name}.partial"
        if not (place / name).exists():                                        # which is there whole or not at all
            assert whole(work)
            done = call(command(start, place, name, *FLAGS, *(["--resume"] if work.exists() else [])))
            assert done.returncode == 0, f"killed after {moment:.2f} s: {done.stderr}"
        assert whole(place / name) and not work.exists()
        ours, theirs = weights(place, name), weights(place, "undisturbed")
        if start is ALONE:
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize("kilobytes, what", [(300, "state.part"), (200, "model.safetensors")])
def test_a_full_disk_is_one_line_and_the_last_good_state_goes_on(place, kilobytes, what):
    # A limit on the size of a file stands for the full disk; the weights are 277 KB, the state three times that.
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))

    flags = FLAGS if what == "state.part" else FLAGS[:-2]
    name = f"full-{kilobytes}"
    done = call(command(ALONE, place, name, *flags), preexec_fn=full)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")], done.stderr
    assert not (place / name).exists() and whole(place / f"{name}.partial")
    done = call(command(ALONE, place, name, *flags, "--resume"))
    assert done.returncode == 0, done.stderr
    assert apart(weights(place, name), weights(place, "undisturbed")) < 1e-5 and not list((place / name).glob("*.part"))


@needs_sharding
def test_a_worker_that_dies_ends_the_run_and_the_last_state_goes_on(place):
    with subprocess.Popen(command(TWO, place, "orphan", *FLAGS), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while not (place / "orphan.partial" / "state.pt").exists() and process.poll() is None:
            time.sleep(0.005)
        workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        process.wait(120)                                                      # it does not hang
    if (place / "orphan").exists():
        pytest.skip("the machine finished the run before the worker could be killed")
    assert process.returncode != 0 and whole(place / "orphan.partial")
    assert call(command(TWO, place, "orphan", *FLAGS, "--resume")).returncode == 0
    assert apart(weights(place, "orphan"), weights(place, "undisturbed")) < 1e-5


def test_data_that_changed_or_vanished_meanwhile_are_refused_and_nothing_is_lost(place):
    work = place / "moved.partial"
    with pytest.MonkeyPatch.context() as patch:
        save_state = train.save_state
        patch.setattr(train, "save_state", lambda *state: (save_state(*state), (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            train.main(command([], place, "moved", *FLAGS)[1:])
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    data = place / "data" / "boolq" / "train.json"
    kept = data.read_text()
    for text, message in ((kept.replace("Is 7", "Was 7"), "another data_sha256"), (kept[:900], "not JSON, or cut short"), (None, "is missing")):
        data.unlink()
        if text is not None:
            data.write_text(text)
        with pytest.raises(train.BadInput, match=message):
            train.main(command([], place, "moved", *FLAGS, "--resume")[1:])
        assert {path.name: path.read_bytes() for path in work.iterdir()} == before
        data.write_text(kept)
    train.main(command([], place, "moved", *FLAGS, "--resume")[1:])
    assert all(torch.equal(a, b) for a, b in zip(weights(place, "moved").values(), weights(place, "undisturbed").values()))


def test_two_at_once_do_not_train_one_run(place):
    (place / "busy.partial").mkdir()
    with open(place / "busy.partial" / "log.jsonl", "a") as log:
        train.fcntl.flock(log, train.fcntl.LOCK_EX)
        shutil.copy(place / "undisturbed" / "args.json", place / "busy.partial")
        settings = (place / "busy.partial" / "args.json").read_bytes()
        with pytest.raises(train.BadInput, match="another process is training this run"):
            train.main(command([], place, "busy", *FLAGS, "--resume")[1:])
        assert (place / "busy.partial" / "args.json").read_bytes() == settings


IN_ORDER = "error: out of memory", "--micro-tokens", "--checkpoint", "--offload"


def test_a_gpu_out_of_memory_says_which_flags_to_turn_first(capsys):
    def starve():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(SystemExit) as stopped:
        evaluation.command(starve)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    assert sorted(IN_ORDER, key=line.index) == list(IN_ORDER)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_cpu_out_of_memory_says_it_too(place):
    # in truth: a process that may take 64 MiB more than it has when everything is imported
    limited = ("import re, resource, sys, train; from eval import command; size = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10; "
               "resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2); sys.argv[0] = 'train.py'; command(train.main)")
    flags = ["--batch", "3000", "--micro-tokens", "1000000", "--train-only", "--device", "cpu", "--out", str(place / "hungry")]
    done = subprocess.run([sys.executable, "-c", limited, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not (place / "hungry").exists() and "Traceback" not in done.stderr, done.stderr
    assert sorted(IN_ORDER, key=done.stderr.index) == list(IN_ORDER)


def test_a_bug_keeps_its_traceback():
    def stumble():
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        evaluation.command(stumble)
