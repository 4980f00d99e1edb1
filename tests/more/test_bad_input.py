"""After this file you know what happens when something is wrong: one line that says what, where and
what to do; status 2; nothing left behind."""
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import save_file

import eval as evaluation
import train
from conftest import ROOT
from data import command
from helpers import Interrupted, checkpoint_folder, write_task
from model import read_tensors

ROW = {"instruction": "is 2 even?", "input": "", "output": "the correct answer is true",
       "answer": "true"}
EVAL = ["--model", "HERE/base", "--task", "boolq", "--data", "HERE/data", "--device", "cpu"]
TRAIN = [*EVAL, "--out", "HERE/out"]
FIRST = "model.embed_tokens.weight"


@pytest.fixture
def place(tmp_path):
    """A fresh folder in which everything is right: base (a checkpoint), data/boolq."""
    checkpoint_folder(tmp_path / "base")
    for split in ("train", "test"):
        rows = [("is 2 even?", "true"), ("is 3 even?", "false")] * 4
        write_task(tmp_path / "data", "boolq", split, rows)
    return tmp_path


def here(flags, place):
    return [flag.replace("HERE", str(place)) for flag in flags]


def refused(capsys, place, main, flags, word):
    """Run a command as from the shell and check how it refuses."""
    before, status = files_in(place), 0
    capsys.readouterr()
    try:
        command(lambda: main(here(flags, place)))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and word in error, error
    assert error.count("\n") == 1 and ": error: " in error, error
    assert files_in(place) == before, "something was left behind"


def files_in(place):
    return sorted(path for path in place.rglob("*") if path.suffix != ".lock")


# ------------------------------------------------------------------------------------- flags

FLAGS = {                              # more flags of train.py -> a word of the message
    "--steer more": "invalid choice: 'more'",
    "--p 0.1": "--p means nothing with --steer none",
    "--layers 1": "--layers means nothing with --steer none",
    "--steer int --lam 0.1": "--lam means nothing with --steer int",
    "--steer reg --p 0.1": "--p means nothing with --steer reg",
    "--steer semantic --generic reg --p 0.1": "--steer semantic --generic reg",
    "--steer int --p 1.5": "p is 1.5",
    "--steer int --p -0.5": "p is -0.5",
    "--steer int --p nan": "--p: 'nan' is not a number from",
    "--steer int --p x": "--p: invalid number value: 'x'",
    "--steer reg --lam inf": "--lam: 'inf' is not a number from",
    "--steer int --alpha 1e31": "--alpha: '1e31' is not a number from",
    "--steer int --rank-by size": "--rank-by: invalid choice: 'size'",
    "--steer reg --normalise l2": "--normalise: invalid choice: 'l2'",
    "--steer reg --layers 4": "outside the model's layers 1-3",
    "--steer reg --layers 0": "outside the model's layers 1-3",
    "--steer reg --layers x": "'x' is not a layer",
    "--steer reg --layers 3-1": "runs backwards",
    "--steer reg --layers 1:alpha=2": "the strengths of reg are lam",
    "--steer int --layers 1:alpha=x": "'1:alpha=x' is not a layer, a range or a strength",
    "--steer int --layers 1:p=2": "p is 2.0",
    "--steer int --layers 1:p=0.1,1-2:p=0.2": "layer 1 has two different strengths",
    "--lr -1": "--lr: '-1' is not a number from 0",
    "--lr nan": "--lr: 'nan' is not a number from",
    "--epochs 0": "--epochs: '0' is not a whole number above 0",
    "--batch 1.5": "--batch: '1.5' is not a whole number above 0",
    "--max-length 3": "--max-length 3 leaves no token of a response; raise it",
    "--micro-tokens -3": "--micro-tokens",
    "--warmup -1": "--warmup",
    "--warmup x": "--warmup",
    "--seed x": "--seed: 'x' is not a whole number at or above 0",
    "--clip nan": "--clip: 'nan' is not a number from",
    "--save-every 0": "--save-every: '0' is not a whole number above 0",
    "--resume --overwrite": "give one of them",
    "--resume": "no interrupted run to resume",
    "--device gpu": "--device gpu: not usable here",
    "--precision fp8": "--precision: invalid choice: 'fp8'",
    "--ste reg": "unrecognized arguments: --ste reg",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_flag_that_means_nothing_or_is_out_of_range(place, capsys, flags):
    refused(capsys, place, train.main, TRAIN + flags.split(), FLAGS[flags])


VALUES = [                             # a command, one of its flags, its value, a word
    (train, "--model", "HERE/nowhere", "nowhere: no such folder"),
    (train, "--model", "HERE/data/boolq/train.json", "train.json: no such folder"),
    (train, "--task", "bool", "did you mean boolq"),
    (train, "--task", "boolq,boolq", "different task names"),
    (train, "--task", "boolq,", "different task names"),
    (train, "--task", "", "needs --task and --data"),
    (train, "--task", "AddSub", "AddSub has no training split"),
    (train, "--task", "piqa", "make it with: python data/prepare.py piqa"),
    (train, "--data", "HERE/nowhere", "make it with: python data/prepare.py boolq"),
    (evaluation, "--model", "HERE/nowhere", "/nowhere: "),
    (evaluation, "--task", "boolq,hellaswag", "make it with: python data/prepare.py hellaswag"),
    (evaluation, "--task", "commonsense", "commonsense has no test split"),
]


@pytest.mark.parametrize("module, flag, value, word", VALUES)
def test_a_model_a_task_or_data_that_are_not_there(place, capsys, module, flag, value, word):
    flags = TRAIN if module is train else EVAL
    at = flags.index(flag) + 1
    refused(capsys, place, module.main, [*flags[:at], value, *flags[at + 1:]], word)


@pytest.mark.parametrize("flags, word", [
    ("--steered", "was not trained with a steering of the forward pass"),
    ("--limit 0", "--limit: '0' is not a whole number above 0"),
    ("--cache-gb -1", "--cache-gb: '-1' is not a number from 0"),
    ("--max-new-tokens 0", "--max-new-tokens: '0' is not a whole number above 0"),
    ("--score guess", "--score: invalid choice: 'guess'"),
    ("--dtype int8", "--dtype: invalid choice: 'int8'"),
    ("--device gpu", "--device gpu: not usable here")])
def test_flags_of_the_evaluator(place, capsys, flags, word):
    refused(capsys, place, evaluation.main, EVAL + flags.split(), word)


# ------------------------------------------------------------------------------------- files


def rows(text):
    return lambda place: (place / "data/boolq/train.json").write_text(text)


def edit(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def config(**change):
    return lambda place: edit(place / "base/config.json", **change)


def without_a_norm(place):
    tensors, about = read_tensors(place / "base/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, place / "base/model.safetensors", about)


def fewer_rows(place):
    """Cut the embedding, so that the tokenizer no longer fits."""
    edit(place / "base/config.json", vocab_size=100)
    tensors, about = read_tensors(place / "base/model.safetensors")
    tensors[FIRST] = tensors[FIRST][:100].clone()
    save_file(tensors, place / "base/model.safetensors", about)


def a_folder_for_a_file(place):
    path = place / "data/boolq/train.json"
    path.unlink()
    path.mkdir()


UNIGRAM = {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": []}
SPOILT = {                             # what is wrong -> how it is made wrong, a word
    "rows are no list": (rows("{}"), "train.json: a JSON list is needed, not a dict"),
    "rows are not JSON": (rows('[{"instruction": "is'), "train.json: not JSON, or cut short"),
    "no rows": (rows("[]"), "train.json: an empty list"),
    "a row without an answer": (rows(json.dumps([ROW, {**ROW, "answer": None}])), "row 1"),
    "an answer that is not allowed": (
        rows(json.dumps([ROW, {**ROW, "answer": "maybe"}])), "is 'maybe', not one of true/false"),
    "a folder in place of a file": (a_folder_for_a_file, "train.json: cannot read it"),
    "no config": (lambda place: (place / "base/config.json").unlink(), "config.json"),
    "another family": (config(model_type="gpt2"), "known are llama"),
    "a config of another size": (config(intermediate_size=95), "of another shape"),
    "a missing tensor": (without_a_norm, "1 missing: model.norm.weight"),
    "no weights": (lambda place: (place / "base/model.safetensors").unlink(),
                   "neither model.safetensors nor"),
    "weights cut short": (lambda place: os.truncate(place / "base/model.safetensors", 5000),
                          "not a readable safetensors file"),
    "no tokenizer": (lambda place: (place / "base/tokenizer.json").unlink(), "no tokenizer"),
    "a tokenizer that is not JSON": (
        lambda place: (place / "base/tokenizer.json").write_text("]"), "tokenizer.json"),
    "a tokenizer of another kind": (
        lambda place: (place / "base/tokenizer.json").write_text(json.dumps(UNIGRAM)), "Unigram"),
    "a tokenizer larger than the embedding": (fewer_rows, "the embedding's to 99"),
    "an output that is no run": (lambda place: (place / "out").mkdir(), "change --out"),
    "an output that is a file": (lambda place: (place / "out").write_text("thesis"),
                                 "change --out"),
    "an interrupted run": (lambda place: (place / "out.partial").mkdir(),
                           "--resume goes on with it"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file(place, capsys, case):
    spoil, word = SPOILT[case]
    spoil(place)
    refused(capsys, place, train.main, TRAIN, word)


def test_what_is_not_a_run_is_never_overwritten(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years of work")
    refused(capsys, place, train.main, [*TRAIN, "--overwrite"], "never replaced")


def test_a_run_with_a_file_of_the_users_own_in_it_is_never_overwritten(place, capsys):
    train.main(here(TRAIN, place))
    (place / "out" / "thesis.tex").write_text("years of work")
    refused(capsys, place, train.main, [*TRAIN, "--overwrite"], "holds thesis.tex")


def test_resuming_with_other_flags_names_them(place, capsys):
    flags = [*TRAIN, "--batch", "2", "--save-every", "1"]
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(here(flags, place)), Interrupted(3))
    others = [*flags, "--resume", "--lr", "1", "--steer", "reg"]
    refused(capsys, place, train.main, others, "was started with another lr, steering; give")
    edit(place / "base" / "config.json", rope_theta=5.0)
    refused(capsys, place, train.main, [*flags, "--resume"], "another model_sha256")


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b"not a state"),
    lambda path: path.write_bytes(b""),
    lambda path: os.truncate(path, path.stat().st_size // 2)], ids=["other", "empty", "cut"])
def test_a_spoilt_state_says_how_to_start_anew(place, capsys, spoil):
    flags = [*TRAIN, "--batch", "2", "--save-every", "1"]
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(here(flags, place)), Interrupted(3))
    spoil(place / "out.partial" / "state.pt")
    refused(capsys, place, train.main, [*flags, "--resume"], "state.pt: not a")


# -------------------------------------------------------------------------- from the shell


def test_from_the_shell_too(place):
    flags = here([*TRAIN, "--task", "piqa"], place)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags],
                          capture_output=True, text=True, cwd=place)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: error: ") and "piqa" in done.stderr


@pytest.mark.parametrize("main, name", [(train.main, "train"), (evaluation.main, "eval")])
def test_help_shows_commands_to_copy(capsys, main, name):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"    python {name}.py --" in text
