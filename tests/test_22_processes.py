"""After this file you know what changes with several processes: where tensors lie and who does what, and not one digit of the result."""
import json
import os
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
from helpers import checkpoint_folder, write_task

ALONE, TWO = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]


needs_sharding = pytest.mark.skipif(not train.shards_on_a_cpu(), reason="this PyTorch spreads models over GPUs only")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for family in ("llama", "gemma2"):
        checkpoint_folder(folder / family, family, spoil=lambda model: [weight.data.mul_(8) for weight in model.parameters() if weight.dim() > 1])
    rows = [(f"Is {i} even?" + " Really?" * (i % 5), "true" if i % 2 == 0 else "false") for i in range(90)]
    write_task(folder / "data", "boolq", "train", rows[:60])
    write_task(folder / "data", "boolq", "test", rows[60:])
    return folder


def command(start, place, name, *flags, family="llama"):
    return [*start, str(ROOT / "train.py"), "--model", str(place / family), "--task", "boolq", "--data", str(place / "data"), "--out", str(place / name), "--batch", "7",
            "--epochs", "3", "--steps", "20", "--warmup", "2", "--lr", "3e-4", "--micro-tokens", "100", "--device", "cpu", *flags]


def call(arguments, **settings):
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, **settings)


def kill_tree(pid):
    """Kill a process and all that it started, which torchrun's workers outlive otherwise."""
    os.kill(pid, signal.SIGSTOP)
    for child in subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split():
        kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


def weights(place, name):
    return load_file(place / name / "model.safetensors")


def apart(ours, theirs):
    """The largest relative distance of two models' tensors."""
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


@needs_sharding
@pytest.mark.parametrize("family, flags", [("llama", ["--steer", "reg", "--lam", "0.05"]), ("gemma2", ["--steer", "semantic", "--p", "0.3", "--checkpoint"])],
                         ids=["llama reg", "gemma2 semantic, recomputed"])
def test_two_processes_end_with_the_weights_of_one(place, family, flags):
    done = call(command(TWO, place, f"two-{family}", *flags, family=family))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1 and "20 steps of 7" in done.stdout and "2 x cpu" in done.stdout      # only one of them talks
    train.main(command([], place, f"one-{family}", *flags, family=family)[1:])
    one, two = weights(place, f"one-{family}"), weights(place, f"two-{family}")
    assert apart(two, one) < 1e-5
    assert apart(one, load_file(place / family / "model.safetensors")) > 1e-3  # and training did something
    logs = [[json.loads(line) for line in open(place / f"{n}-{family}" / "log.jsonl")] for n in ("one", "two")]
    for mine, other in zip(*logs, strict=True):
        for key in ("step", "tokens", "supervised_tokens", "examples", "lr"):
            assert mine[key] == other[key]
        for key in ("loss", "lm_loss", "reg_loss", "key_entropy", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


@needs_sharding
def test_optimizer_state_in_cpu_memory_changes_nothing(place):
    train.main(command([], place, "plain")[1:])
    done = call(command(ALONE, place, "offloaded", "--offload"))
    assert done.returncode == 0, done.stderr
    assert apart(weights(place, "offloaded"), weights(place, "plain")) < 1e-5


@needs_sharding
@pytest.mark.parametrize("before, after", [(TWO, ALONE), (ALONE, TWO)], ids=["two, then one", "one, then two"])
def test_a_run_goes_on_with_another_number_of_processes(place, before, after):
    name = f"resumed-{len(before)}-{len(after)}"
    with subprocess.Popen(command(before, place, name, "--save-every", "3"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.time() + 120
        while not (place / f"{name}.partial" / "state.pt").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        kill_tree(process.pid)
    if (place / name).exists():
        pytest.skip("the machine finished the run before it could be killed")
    done = call(command(after, place, name, "--save-every", "3", "--resume"))
    assert done.returncode == 0, done.stderr
    assert "resuming   after step" in done.stdout
    if not (place / "plain").exists():
        train.main(command([], place, "plain")[1:])
    assert apart(weights(place, name), weights(place, "plain")) < 1e-5
    assert [json.loads(line)["step"] for line in open(place / name / "log.jsonl")] == list(range(1, 21))


@pytest.mark.parametrize("score", ["generate", "choice"])
def test_two_processes_give_the_answers_of_one_in_the_same_order(place, score):
    arguments = ["--model", str(place / "llama"), "--task", "boolq", "--data", str(place / "data"), "--device", "cpu", "--score", score]
    done = call([*TWO, str(ROOT / "eval.py"), *arguments, "--out", str(place / f"eval2-{score}")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") == 1
    evaluation.score(place / "llama", ["boolq"], place / "data", place / f"eval1-{score}", score, "cpu")
    ours, theirs = ([path.read_text() for path in sorted((place / f"eval{n}-{score}").iterdir()) if path.suffix == ".jsonl"] for n in (1, 2))
    assert ours == theirs and len(ours[0].splitlines()) == 30
    assert sorted(path.suffix for path in (place / f"eval2-{score}").iterdir()) == [".json", ".jsonl"]          # nothing is left behind


def test_bad_input_is_one_line_of_process_0(place):
    done = call(command(TWO, place, "bad", "--steer", "reg", "--layers", "9"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error")]
    assert done.returncode != 0 and len(lines) == 1 and "outside the model's layers 1-3" in lines[0]
    assert not list(place.glob("bad*"))


def test_analyses_take_one_process(place):
    done = call([*TWO, str(ROOT / "eval.py"), "--analyse", "memories", "--model", str(place / "llama")])
    assert "eval.py: error: torchrun: several processes share the items of a task" in done.stderr
