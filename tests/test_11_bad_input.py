"""After this file you know what happens when something is wrong: one line that says what, where and what to do; status 2; nothing left behind."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from helpers import checkpoint_folder, write_task

ROOT = Path(__file__).parent.parent
ROW = {"instruction": "is 2 even?", "input": "", "output": "the correct answer is true", "answer": "true"}


@pytest.fixture
def place(tmp_path):
    """A fresh folder in which everything is right: base/ (a checkpoint), data/boolq."""
    checkpoint_folder(tmp_path / "base")
    for split in ("train", "test"):
        write_task(tmp_path / "data", "boolq", split, [("is 2 even?", "true"), ("is 3 even?", "false")] * 4)
    return tmp_path


def call(module, place, monkeypatch, capsys, *flags):
    """Run a command's main() as from the shell: (exit status, standard error)."""
    flags = [str(flag).replace("HERE", str(place)) for flag in flags]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    try:
        evaluation.command(lambda: train.main() if module is train else evaluation.main())
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


TRAIN = ["--model", "HERE/base", "--task", "boolq", "--data", "HERE/data", "--out", "HERE/out", "--device", "cpu"]
EVAL = ["--model", "HERE/base", "--task", "boolq", "--data", "HERE/data", "--device", "cpu"]


def with_flag(flags, name, value):
    """The same command line with another value of one flag."""
    at = flags.index(name)
    return [*flags[:at + 1], value, *flags[at + 2:]]


FLAGS = {                                              # extra flags of train.py -> a word of the message
    "--steer more": "invalid choice: 'more'", "--p 0.1": "--p means nothing with --steer none", "--layers 1": "means nothing with --steer none",
    "--steer int --lam 0.1": "--lam means nothing with --steer int", "--steer reg --p 0.1": "--p means nothing with --steer reg",
    "--steer int --p 1.5": "p is 1.5", "--steer int --p -0.5": "p is -0.5", "--steer int --p nan": "--p: invalid number value: 'nan'",
    "--steer int --p x": "invalid number value: 'x'", "--steer reg --lam inf": "--lam", "--steer int --alpha nan": "--alpha",
    "--steer int --rank-by size": "--rank-by", "--steer reg --normalise l2": "--normalise", "--steer reg --layers 4": "outside the model's layers 1-3",
    "--steer reg --layers 0": "outside the model's layers 1-3", "--steer reg --layers x": "'x' is not a layer", "--steer reg --layers 3-1": "backwards",
    "--lr -1": "--lr: '-1' is not a number at or above 0", "--lr nan": "--lr", "--epochs 0": "--epochs: '0' is not a whole number above 0",
    "--batch 1.5": "--batch", "--max-length 0": "--max-length", "--max-length 3": "--max-length 3: no example has a token of its response left",
    "--micro-tokens -3": "--micro-tokens", "--warmup -1": "--warmup is below 0", "--warmup x": "--warmup", "--seed x": "--seed", "--clip nan": "--clip",
    "--resume --overwrite": "give one of them", "--resume": "no interrupted run to resume", "--device gpu": "--device gpu: not usable here",
    "--precision fp8": "--precision", "--ste reg": "unrecognized arguments: --ste reg", "--save-every 0": "--save-every",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(place, monkeypatch, capsys, flags):
    refused(train, TRAIN + flags.split(), FLAGS[flags], place, monkeypatch, capsys)


def refused(module, flags, word, place, monkeypatch, capsys):
    before = sorted(place.rglob("*"))
    status, error = call(module, place, monkeypatch, capsys, *flags)
    assert status == 2 and word in error, error
    assert error.count("\n") == 1 and error.startswith(f"{module.__name__}.py: error: "), error
    assert sorted(place.rglob("*")) == before, "something was left behind"


VALUES = [                                             # command, flag, its value, a word of the message
    (train, "--model", "HERE/nowhere", "no such folder"), (train, "--model", "HERE/data/boolq/train.json", "no such folder"),
    (train, "--task", "bool", "did you mean boolq"), (train, "--task", "boolq,boolq", "different task names"), (train, "--task", "", "needs --task and --data"), (train, "--task", "boolq,", "different task names"),
    (train, "--task", "AddSub", "AddSub has no training split"), (train, "--task", "piqa", "prepare.py"), (train, "--data", "HERE/nowhere", "prepare.py"),
    (eval, "--task", "boolq,hellaswag", "hellaswag"), (eval, "--model", "HERE/nowhere", "no such folder"), (eval, "--task", "commonsense", "commonsense"),
]


@pytest.mark.parametrize("module, flag, value, word", VALUES)
def test_values(place, monkeypatch, capsys, module, flag, value, word):
    module = module if module is train else evaluation
    refused(module, with_flag(TRAIN if module is train else EVAL, flag, value), word, place, monkeypatch, capsys)


@pytest.mark.parametrize("flags, word", [
    (["--steered"], "was not trained with an intervention"), (["--limit", "0"], "--limit"), (["--cache-gb", "-1"], "--cache-gb"),
    (["--max-new-tokens", "0"], "--max-new-tokens"), (["--score", "guess"], "--score"), (["--dtype", "int8"], "--dtype")])
def test_flags_of_the_evaluator(place, monkeypatch, capsys, flags, word):
    refused(evaluation, EVAL + flags, word, place, monkeypatch, capsys)


def edit(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


SPOILT = {                                             # what is wrong -> (how it is made wrong, a word of the message)
    "rows are no list": (lambda p: (p / "data/boolq/train.json").write_text("{}"), "train.json"),
    "rows are not JSON": (lambda p: (p / "data/boolq/train.json").write_text('[{"instruction": "is'), "not JSON"),
    "no rows": (lambda p: (p / "data/boolq/train.json").write_text("[]"), "an empty list"),
    "a row without an answer": (lambda p: (p / "data/boolq/train.json").write_text(json.dumps(
        [ROW, {key: ROW[key] for key in ROW if key != "answer"}])), "row 1"),
    "an answer that is not allowed": (lambda p: (p / "data/boolq/train.json").write_text(json.dumps([ROW, {**ROW, "answer": "maybe"}])), "'maybe'"),
    "a task that is a file": (lambda p: ((p / "data/boolq/train.json").unlink(), (p / "data/boolq/train.json").mkdir()), "train.json"),
    "no config": (lambda p: (p / "base/config.json").unlink(), "config.json"),
    "another family": (lambda p: edit(p / "base/config.json", model_type="gpt2"), "known families are"),
    "a config of another size": (lambda p: edit(p / "base/config.json", intermediate_size=95), "of another shape"),
    "a missing tensor": (lambda p: drop(p / "base", "model.norm.weight"), "1 missing: model.norm.weight"),
    "no weights": (lambda p: (p / "base/model.safetensors").unlink(), "neither model.safetensors nor"),
    "weights cut short": (lambda p: os.truncate(p / "base/model.safetensors", 5000), "not a readable safetensors file"),
    "no tokenizer": (lambda p: (p / "base/tokenizer.json").unlink(), "no tokenizer"),
    "a tokenizer that is not JSON": (lambda p: (p / "base/tokenizer.json").write_text("]"), "tokenizer.json"),
    "a tokenizer of another kind": (lambda p: (p / "base/tokenizer.json").write_text(json.dumps(
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": []})), "Unigram"),
    "a tokenizer larger than the embedding": (lambda p: checkpoint_folder_with_rows(p / "base", 100), "the embedding ends at 99"),
    "an output folder that is no run": (lambda p: (p / "out").mkdir(), "is not a run of train.py"),
    "an output that is a file": (lambda p: (p / "out").write_text("thesis"), "is not a run of train.py"),
    "an interrupted run": (lambda p: (p / "out.partial").mkdir(), "--resume goes on with it"),
}


def checkpoint_folder_with_rows(folder, rows):
    """Cut the embedding, so that the tokenizer no longer fits."""
    edit(folder / "config.json", vocab_size=rows)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:rows].clone()}, folder / "model.safetensors")


@pytest.mark.parametrize("case", SPOILT)
def test_files(place, monkeypatch, capsys, case):
    spoil, word = SPOILT[case]
    spoil(place)
    refused(train, TRAIN, word, place, monkeypatch, capsys)


def test_what_is_not_a_run_is_never_overwritten(place, monkeypatch, capsys):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years of work")
    refused(train, TRAIN + ["--overwrite"], "is not a run of train.py", place, monkeypatch, capsys)


def test_resuming_with_other_flags_names_them(place, monkeypatch, capsys):
    monkeypatch.setattr(train, "save_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert call(train, place, monkeypatch, capsys, *TRAIN, "--batch", "2", "--save-every", "1")[0] == 130
    refused(train, TRAIN + ["--batch", "2", "--resume", "--lr", "1", "--steer", "reg"], "started with another steer, lr, steering", place, monkeypatch, capsys)
    edit(place / "out.partial" / "args.json")          # the same settings are accepted
    (place / "out.partial" / "state.pt").write_bytes(b"not a state")
    refused(train, TRAIN + ["--batch", "2", "--resume"], "not a state of this run", place, monkeypatch, capsys)


def test_a_full_disk_is_one_line_and_leaves_no_finished_run(place, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "out.partial/model.safetensors")

    monkeypatch.setattr(train.Transformer if hasattr(train, "Transformer") else evaluation.Transformer, "save_pretrained", full)
    status, error = call(train, place, monkeypatch, capsys, *TRAIN)
    assert status == 2 and "No space left on device" in error and not (place / "out").exists()


def test_from_the_shell_too(place):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *(flag.replace("HERE", str(place)) for flag in TRAIN), "--steer", "int", "--p", "2"],
                          capture_output=True, text=True, cwd=place)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and "p is 2.0" in done.stderr
    for script in ("train.py", "eval.py"):
        done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=place)
        assert done.returncode == 0 and "python " + script in done.stdout and done.stderr == ""
