"""After this file you know how the models in data/toy were made, and that anyone can make them
again, byte for byte."""
import hashlib
import json
import shutil

import pytest

from data import BadInput
from data.tokenizer import Tokenizer
from data.world import World, documents
from eval import TOY_FOLDER
from lab import pretrain
from model import read_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model after two steps, on the first 64 rows of the text."""
    out = tmp_path_factory.mktemp("made") / "qwen"
    pretrain.main(["qwen", "--steps", "2", "--limit", "64", "--out", str(out)])
    return out


def test_the_same_command_makes_the_same_bytes(made, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    pretrain.main(["qwen", "--steps", "2", "--limit", "64", "--out", str(again)])
    pretrain.main(["qwen", "--steps", "2", "--limit", "64", "--seed", "1", "--out", str(other)])
    ours, theirs, others = ((folder / "model.safetensors").read_bytes()
                            for folder in (made, again, other))
    assert ours == theirs != others


def test_a_new_model_is_like_the_shipped_one_but_for_its_weights(made):
    for name in ("config.json", "tokenizer.json"):
        assert (made / name).read_bytes() == (TOY_FOLDER / "qwen" / name).read_bytes()
    ours, theirs = (read_tensors(folder / "model.safetensors")[0]
                    for folder in (made, TOY_FOLDER / "qwen"))
    assert {name: weight.shape for name, weight in ours.items()} == {
        name: weight.shape for name, weight in theirs.items()}
    assert not made.with_name("qwen.untrained").exists() and not (made / "eval").exists()


def test_pretraining_json_says_how_a_model_was_made(made):
    ours, shipped = (json.loads((folder / "pretraining.json").read_text())
                     for folder in (made, TOY_FOLDER / "qwen"))
    assert list(ours) == list(shipped)
    assert ours["command"].startswith("python -m lab.pretrain qwen --steps 2 --limit 64 --out ")
    assert ours["steps"] == 2 and ours["tokens"] == 64 * 128 and ours["threads"] == 1
    assert ours["cloze_items"] == 300 and ours["cloze_accuracy"] < 0.5 < shipped["cloze_accuracy"]


def test_rows_are_full_and_overlap_in_one_token():
    tokenizer = Tokenizer.from_pretrained(TOY_FOLDER)
    texts = ["Doha is in Qatar.", "Oslo is in Norway.", "Lima is in Peru."]
    stream = [i for text in texts
              for i in tokenizer.encode(text, special=False) + [tokenizer.eos_id]]
    rows = list(pretrain.packed(texts, tokenizer, 5))
    assert all(len(ids) == 5 and n_prompt == 1 for ids, n_prompt in rows)
    assert [i for ids, _ in rows for i in ids[:-1]] == stream[:4 * len(rows)]
    assert [ids[-1] for ids, _ in rows] == stream[4::4], "the first ids of the next rows"


def test_the_rows_are_those_of_the_shipped_models():
    tokenizer = Tokenizer.from_pretrained(TOY_FOLDER)
    rows = list(pretrain.packed(documents(World()), tokenizer, pretrain.PRETRAIN["max-length"]))
    sha = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    for family in pretrain.FAMILIES:
        about = json.loads((TOY_FOLDER / family / "pretraining.json").read_text())
        assert about["rows_sha256"] == sha
        assert about["steps"] == -(-len(rows) // pretrain.PRETRAIN["batch"])


def test_an_interrupted_run_is_resumed_with_the_same_seed_only(made, tmp_path):
    out = tmp_path / "qwen"
    shutil.copytree(made, tmp_path / "qwen.partial")           # interrupted before it saved a state
    (tmp_path / "qwen.partial" / "pretraining.json").unlink()
    flags = ["qwen", "--steps", "2", "--limit", "64", "--out", str(out), "--resume"]
    with pytest.raises(BadInput, match="was started with another model_sha256, seed"):
        pretrain.main([*flags, "--seed", "1"])
    pretrain.main(flags)
    assert (out / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


@pytest.mark.parametrize("flags, message", [
    (["mamba"], "invalid choice: 'mamba'"),
    (["qwen", "--steps", "0"], "'0' is not a whole number above 0"),
    (["qwen", "--resume", "--overwrite"], "give one of them"),
    (["qwen", "--steer", "reg"], "unrecognized arguments: --steer reg"),
], ids=["family", "steps", "resume and overwrite", "steering"])
def test_bad_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_is_no_run_is_never_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("two years of work")
    with pytest.raises(BadInput, match="thesis.txt"):
        pretrain.main(["qwen", "--out", str(tmp_path / "notes"), "--overwrite"])
    assert (tmp_path / "notes" / "thesis.txt").exists()
