"""After this file you know that a run is what its settings say: reproducible, resumable, whole."""
import itertools
import json
import math
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import ROOT
from data import BadInput, progress
from data.tasks import load
from data.tokenizer import Tokenizer
from eval import pick_dtype, which_model
from helpers import Interrupted, checkpoint_folder, even_or_odd, run_of, write_task
from model import Config

STEPS = 8                              # 60 rows in batches of 8
OF_THE_MACHINE = {"tokens_per_second", "examples_per_second", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a tiny boolq, whose questions are about even numbers."""
    folder = tmp_path_factory.mktemp("train")
    checkpoint_folder(folder / "base")
    write_task(folder / "data", "boolq", "train", even_or_odd(60))
    return folder


def flags(place, out, *more):
    return ["--model", str(place / "base"), "--task", "boolq", "--data", str(place / "data"),
            "--out", str(place / out), "--batch", "8", "--lr", "1e-3", "--warmup", "2",
            "--device", "cpu", *more]


def run(place, out, *more):
    """train.py in this process -> the weights and the log."""
    train.main(flags(place, out, *more))
    return run_of(place / out)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(log):
    """A log without what depends on the machine."""
    return [{key: line[key] for key in line.keys() - OF_THE_MACHINE} for line in log]


# -------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_a_whole_folder_and_a_line_per_step(place):
    weights, log = run(place, "plain")
    assert sorted(path.name for path in (place / "plain").iterdir()) == [
        "args.json", "config.json", "log.jsonl", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    assert not (place / "plain.partial").exists()
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert [line["examples"] for line in log] == [8] * 7 + [4]
    rates = [5e-4, 1e-3] + [1e-3 * (8 - step) / 6 for step in range(2, 8)]
    assert [line["lr"] for line in log] == pytest.approx(rates)
    for line in log:
        assert line.keys() == OF_THE_MACHINE | {
            "step", "loss", "lm_loss", "reward", "flux", "lr", "grad_norm", "tokens",
            "supervised_tokens", "examples"}
        assert line["loss"] == line["lm_loss"] and line["reward"] == 0
        assert 0 < line["flux"] < math.log(96) and line["grad_norm"] > 0
        assert 0 < line["supervised_tokens"] < line["tokens"]
        assert line["tokens_per_second"] > line["examples_per_second"] > 0
        assert line["peak_memory_bytes"] > 2**20
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    assert sum(line["tokens"] for line in log) == sum(
        len(ids) - 1 for ids, _ in rows_of(place))


def rows_of(place):
    examples = load(place / "data", "boolq", "train")
    return train.encode(examples, Tokenizer.from_pretrained(place / "base"), 256)


def test_the_settings_of_a_run_say_what_is_needed_to_do_it_again(place):
    run(place, "settings", "--steer", "reg", "--lam", "0.05")
    settings = json.loads((place / "settings" / "args.json").read_text())
    assert settings.keys() >= {
        "model", "model_sha256", "task", "data", "data_sha256", "steering", "seed", "steps_total",
        "examples", "epochs", "batch", "max_length", "lr", "warmup", "weight_decay", "clip",
        "precision", "device", "limit", "command", "versions"}
    assert settings["steering"] == {
        "method": "reg", "lam": 0.05, "normalise": "magnitude", "layers": None}
    assert (settings["steps_total"], settings["examples"], settings["lr"]) == (STEPS, 60, 1e-3)
    assert settings["model_sha256"] == which_model(place / "base")
    assert settings["versions"].keys() == {"python", "torch"}
    program, script, *again = shlex.split(settings["command"])
    assert (program, script) == ("python", "train.py")
    assert again == flags(place, "settings", "--steer", "reg", "--lam", "0.05")


def test_the_log_can_be_followed_a_line_is_there_when_its_step_is_done(place):
    class Follows(train.ALONE):
        lines = []

        @classmethod
        def share(cls, batches):
            cls.lines.append((place / "followed.partial" / "log.jsonl").read_text().count("\n"))
            return batches

    train.train(train.read_settings(flags(place, "followed")), Follows)
    assert Follows.lines == list(range(STEPS))


def test_without_a_terminal_short_work_prints_nothing(capsys):
    assert list(progress(range(3), desc="reading")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_long_work_gives_a_sign_of_life_every_half_minute(capsys):
    with progress(total=200, desc="training", unit="step") as bar:
        bar.update(50)
        assert bar.mininterval == bar.maxinterval == bar.delay == 30
        bar.refresh()                  # what happens after half a minute
    lines = capsys.readouterr().err.split("\n")
    assert lines[0].startswith("\rtraining: 50 of 200 steps after 00:")
    assert not any(line.strip() for line in lines[1:])


# ---------------------------------------------------------------------------- reproducible


def test_the_same_seed_gives_the_same_weights_bit_for_bit(place):
    one, log = run(place, "one", "--steer", "reg")
    two, log_of_two = run(place, "two", "--steer", "reg")
    other, _ = run(place, "other", "--steer", "reg", "--seed", "1")
    assert same(one, two) and timeless(log) == timeless(log_of_two)
    assert not same(one, other)


def test_checkpointing_and_micro_batches_change_speed_only(place):
    one, log = run(place, "all-at-once", "--steer", "reg")
    two, pieces = run(place, "in-pieces", "--steer", "reg", "--checkpoint", "--micro-tokens", "60")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    for line, other in zip(log, pieces, strict=True):
        for key in ("loss", "reward", "flux", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-3)


def test_reg_raises_the_flux_and_a_negative_lambda_lowers_it(place):
    flux = {lam: run(place, f"lam{lam}", "--steer", "reg", "--lam", lam, "--epochs", "3")[1][-1]
            ["flux"] for lam in ("-1", "0", "1")}
    assert flux["-1"] < flux["0"] - 0.01 and flux["0"] + 0.01 < flux["1"]


def test_the_loss_is_that_of_language_less_the_reward_which_is_lambda_times_the_flux(place):
    _, log = run(place, "reward", "--steer", "reg", "--lam", "0.05", "--layers", "1-3")
    for line in log:
        assert line["loss"] == pytest.approx(line["lm_loss"] - line["reward"])
        assert line["reward"] == pytest.approx(0.05 * 3 * line["flux"], rel=1e-5)  # three layers


def test_int_trains_other_weights_and_the_saved_model_is_plain(place):
    plain, _ = run(place, "int-plain")
    steered, _ = run(place, "int-steered", "--steer", "int", "--p", "0.1", "--alpha", "2",
                     "--layers", "2")
    assert plain.keys() == steered.keys() and not same(plain, steered)
    settings = json.loads((place / "int-steered" / "args.json").read_text())["steering"]
    assert settings == {"method": "int", "p": 0.1, "alpha": 2.0, "rank_by": "magnitude",
                        "layers": {"2": {}}}


def test_a_billion_epochs_cost_nothing_when_two_steps_are_asked_for(place):
    _, log = run(place, "endless", "--epochs", "1000000000", "--steps", "2")
    assert len(log) == 2
    assert json.loads((place / "endless" / "args.json").read_text())["steps_total"] == 2


def test_a_warm_up_of_no_steps_starts_at_the_peak(place):
    _, log = run(place, "cold", "--warmup", "0", "--steps", "2")
    assert [line["lr"] for line in log] == [1e-3, 5e-4]


# --------------------------------------------------------------------- interrupted, resumed


@pytest.mark.parametrize("method", ["none", "int", "reg", "semantic", "surrogate-entropy"])
@pytest.mark.parametrize("step", [5, 14])      # one state was saved before it; four were
def test_an_interrupted_run_resumes_to_the_same_weights(place, capsys, method, step):
    more = ["--steer", method, "--epochs", "2", "--save-every", "3"]
    cut, whole = f"cut-{method}-{step}", f"whole-{method}"
    if not (place / whole).exists():
        run(place, whole, *more)
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(flags(place, cut, *more)), Interrupted(step))
    assert not (place / cut).exists()
    with open(place / f"{cut}.partial" / "log.jsonl", "a") as log:
        log.write('{"step": 99, "half a li')       # what a kill may leave behind
    weights, log = run(place, cut, *more, "--resume")
    assert f"resuming   after step {(step - 1) // 3 * 3}\n" in capsys.readouterr().out
    expected, expected_log = run_of(place / whole)
    assert same(weights, expected) and timeless(log) == timeless(expected_log)
    assert not (place / cut / "state.pt").exists()


def test_a_bf16_run_resumes_to_the_same_weights_and_keeps_its_precision(place):
    more = ["--steer", "reg", "--save-every", "3"]
    whole, log = run(place, "bf16", *more, "--precision", "bf16")
    exact, exact_log = run(place, "fp32", *more, "--precision", "fp32")
    assert not same(whole, exact)
    for line, other in zip(log, exact_log, strict=True):   # each sees the weights before it
        assert line["loss"] == pytest.approx(other["loss"], rel=0.01)
    assert abs(log[-1]["loss"] / log[0]["loss"] - 1) > 0.02
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(flags(place, "cut", *more, "--precision", "bf16")),
                    Interrupted(5))
    weights, again = run(place, "cut", *more, "--resume")
    assert same(weights, whole) and timeless(again) == timeless(log)


def test_a_tiny_model_is_trained_in_fp32_on_any_cpu(place):
    run(place, "auto", "--steps", "1")
    settings = json.loads((place / "auto" / "args.json").read_text())
    assert (settings["precision"], settings["micro_tokens"]) == ("fp32", 1024)


def test_large_models_take_bf16_where_the_processor_multiplies_it():
    large = Config.from_dict(dict(
        model_type="llama", vocab_size=96, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=1, num_attention_heads=9))
    with_units = any(torch.cpu.get_capabilities().get(f"{unit}_bf16") for unit in ("avx512", "amx"))
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu, large) == ("bfloat16" if with_units else "float32")
    assert [pick_dtype(name, cpu, large) for name in ("float32", "bfloat16")] == [
        "float32", "bfloat16"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_freed_memory_is_kept_for_the_next_step():
    code = ("import resource, sys, torch, train\n"
            "if sys.argv[1] == 'keep': train.keep_memory()\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "seen = [(torch.ones(2**25).sum(), faults())[1] for _ in range(6)]\n"
            "print(min(later - before for before, later in zip(seen, seen[1:])))")
    freed, kept = (int(subprocess.run([sys.executable, "-c", code, word], cwd=ROOT, text=True,
                                      capture_output=True, check=True).stdout)
                   for word in ("free", "keep"))
    assert kept * 10 < freed or kept == freed < 1000           # huge pages, or no glibc


def test_a_long_run_gives_freed_memory_back_once_a_minute(place, monkeypatch):
    class Libc:
        given = []
        malloc_trim = given.append
    monkeypatch.setattr(train, "LIBC", Libc)
    run(place, "short")
    assert Libc.given == []                                    # six steps of no minute
    clock = itertools.count(step=25)                           # a step looks at the clock twice
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run(place, "long")
    assert Libc.given == [0] * (STEPS // 2)


def test_a_run_cut_before_its_first_state_starts_again(place):
    whole, _ = run(place, "early-whole")
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(flags(place, "early")), Interrupted(3))
    weights, log = run(place, "early", "--resume")
    assert same(whole, weights) and len(log) == STEPS


def test_a_run_may_be_resumed_with_other_settings_of_the_machine(place):
    whole, _ = run(place, "machine-whole")
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(flags(place, "machine")), Interrupted(3))
    weights, _ = run(place, "machine", "--resume", "--checkpoint", "--micro-tokens", "100")
    for name in whole:
        torch.testing.assert_close(weights[name], whole[name], rtol=1e-3, atol=1e-5)


def test_a_finished_run_is_skipped_and_overwrite_trains_it_again(place, capsys):
    first, _ = run(place, "done")
    for more in ([], ["--resume"]):
        capsys.readouterr()
        again, _ = run(place, "done", *more)
        assert "is a finished run" in capsys.readouterr().out and same(first, again)
    again, _ = run(place, "done", "--overwrite", "--seed", "5")
    assert not same(first, again)
    assert not any((place / f"done.{rest}").exists() for rest in ("partial", "old"))


def test_a_finished_run_of_other_settings_is_refused_and_stays(place):
    first, _ = run(place, "taken")
    with pytest.raises(BadInput, match="taken: was started with another lr; give the same flags"):
        train.main([*flags(place, "taken"), "--lr", "1e-4"])
    assert same(first, run_of(place / "taken")[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_batch(place):
    with pytest.raises(SystemExit) as stop:
        train.main([*flags(place, "nan"), "--lr", "1e30", "--warmup", "0"])
    message = stop.value.code
    assert message.startswith("train.py: step 2: the loss is not finite (lm_loss ")
    assert "in the batch of boolq row " in message and message.count("\n") == 0
    assert not (place / "nan").exists()
