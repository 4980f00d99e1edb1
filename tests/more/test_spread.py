"""After this file you know what changes with several processes: where tensors lie and who does
what, and not one digit of the result beyond rounding."""
import json
import os
import subprocess
import sys

import pytest
import torch

import train
from conftest import ROOT
from data import BadInput
from helpers import checkpoint_folder, write_task
from lab import spread
from model import read_tensors

needs_spreading = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="PyTorch spreads a model over processes without a GPU from 2.9")
ALONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
REG = ["--steer", "reg", "--lam", "0.05"]
INTERRUPTED = """
import sys, torch, train
from lab.spread import Spread

class Interrupted(Spread):
    steps = 0

    def share(self, batches):
        self.steps += 1
        if self.steps == 9:
            sys.exit(1)
        return super().share(batches)

train.train(train.read_settings(sys.argv[1:]), Interrupted(torch.device("cpu")))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models and a task, and a run of one process to compare with."""
    folder = tmp_path_factory.mktemp("processes")

    def louder(model):
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.mul_(8)

    for family in ("llama", "gemma2"):
        checkpoint_folder(folder / family, family, spoil=louder)
    rows = [(f"Is {i} even?" + " Really?" * (i % 5), "true" if i % 2 == 0 else "false")
            for i in range(60)]
    write_task(folder / "data", "boolq", "train", rows)
    train.main(flags(folder, "alone", *REG))
    return folder


def flags(place, name, *more, family="llama"):
    """train.py's flags for 20 steps of 7 rows each."""
    return ["--model", str(place / family), "--task", "boolq", "--data", str(place / "data"),
            "--out", str(place / name), "--batch", "7", "--epochs", "3", "--steps", "20",
            "--warmup", "2", "--lr", "3e-4", "--micro-tokens", "100", "--device", "cpu", *more]


def call(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def weights(place, name):
    return read_tensors(place / name / "model.safetensors")[0]


def apart(ours, theirs):
    """The largest relative distance of two models' tensors."""
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item()
               for name in theirs)


def log_of(place, name):
    return [json.loads(line) for line in (place / name / "log.jsonl").read_text().splitlines()]


@needs_spreading
def test_two_processes_end_with_the_weights_of_one(place):
    more = ["--steer", "semantic", "--p", "0.3", "--checkpoint"]
    done = call(*TWO, "-m", "--", "lab.spread", *flags(place, "two", *more, family="gemma2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1, "only one process talks"
    assert "2 x cpu" in done.stdout and "python eval.py --model" in done.stdout
    train.main(flags(place, "one", *more, family="gemma2"))
    assert apart(weights(place, "two"), weights(place, "one")) < 1e-5
    assert apart(weights(place, "one"), weights(place, "gemma2")) > 1e-3, "training did nothing"
    for ours, theirs in zip(log_of(place, "two"), log_of(place, "one"), strict=True):
        for name in ("step", "tokens", "supervised_tokens", "examples", "lr"):
            assert ours[name] == theirs[name]
        for name in ("loss", "lm_loss", "reward", "flux", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)


RIVALS = [["--steer", "int", "--rank-by", "random", "--p", "0.3", "--anchor", "50", "--held-out",
           "9", "--eval-every", "3", "--checkpoint"],
          ["--steer", "knowledge-entropy", "--lam", "2"],
          ["--steer", "resuscitation", "--p", "0.5", "--alpha", "2", "--loss-on", "all"]]
BOTH = """
import json, sys, torch, train
from lab.spread import Spread
world = Spread(torch.device("cpu"))
for flags in json.loads(sys.argv[1]):
    train.train(train.read_settings(flags), world)
torch.distributed.destroy_process_group()
"""


@needs_spreading
def test_two_processes_draw_the_same_and_look_at_the_same_step_as_one(place):
    script = place / "both.py"
    script.write_text(BOTH)
    done = call(*TWO, str(script), json.dumps([
        flags(place, f"rival{n}-two", *more, "--steps", "8") for n, more in enumerate(RIVALS)]))
    assert done.returncode == 0, done.stderr
    for n, more in enumerate(RIVALS):
        train.main(flags(place, f"rival{n}-one", *more, "--steps", "8"))
        one, two = weights(place, f"rival{n}-one"), weights(place, f"rival{n}-two")
        assert apart(two, one) < 1e-5 < 1e-3 < apart(one, weights(place, "llama"))
        for ours, theirs in zip(log_of(place, f"rival{n}-two"), log_of(place, f"rival{n}-one"),
                                strict=True):
            for name in theirs.keys() & {"loss", "reward", "held_out_nll"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)


@needs_spreading
def test_keeping_the_model_in_cpu_memory_changes_nothing(place):
    done = call(*ALONE, "-m", "lab.spread", "--offload", *flags(place, "offloaded", *REG))
    assert done.returncode == 0, done.stderr
    assert apart(weights(place, "offloaded"), weights(place, "alone")) < 1e-5


@needs_spreading
def test_train_py_goes_on_with_a_run_of_two_processes(place):
    script = place / "interrupted.py"
    script.write_text(INTERRUPTED)
    more = [*REG, "--save-every", "3"]
    call(*TWO, str(script), *flags(place, "two-one", *more))
    assert (place / "two-one.partial" / "state.pt").is_file()
    train.main(flags(place, "two-one", *more, "--resume"))
    assert apart(weights(place, "two-one"), weights(place, "alone")) < 1e-5
    assert [line["step"] for line in log_of(place, "two-one")] == list(range(1, 21))


class Interrupted(train.ALONE):
    """One process that is stopped in step 9."""

    def __init__(self):
        self.steps = 0

    def share(self, batches):
        self.steps += 1
        if self.steps == 9:
            raise KeyboardInterrupt
        return batches


@needs_spreading
def test_two_processes_go_on_with_a_run_of_train_py(place):
    more = [*REG, "--save-every", "3"]
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(flags(place, "one-two", *more)), Interrupted())
    done = call(*TWO, "-m", "--", "lab.spread", *flags(place, "one-two", *more, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "resuming   after step 6" in done.stdout
    assert apart(weights(place, "one-two"), weights(place, "alone")) < 1e-5
    assert [line["step"] for line in log_of(place, "one-two")] == list(range(1, 21))


@needs_spreading
def test_bad_input_is_one_line_of_process_0(place):
    done = call(*TWO, "-m", "--", "lab.spread", *flags(place, "bad", "--data", str(place / "none")))
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode != 0 and len(lines) == 1
    assert lines[0].startswith("spread.py: error: ") and "train.json is missing" in lines[0]
    assert not (place / "bad").exists() and not (place / "bad.partial").exists()


def test_a_bad_flag_ends_with_status_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        spread.run(["--offload", "--p", "0.1", "--steer", "reg"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--p means nothing with --steer reg" in error


def test_an_old_version_of_pytorch_is_refused():
    spread.check_version("2.9.0")
    spread.check_version("2.13.0+cpu")
    with pytest.raises(BadInput, match="needs torch 2.9 or later, and this is 2.8.1"):
        spread.check_version("2.8.1")
