"""How a published checkpoint becomes a model and back, what is refused on the way, and how tensors
are kept in a file."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from data import BadInput
from model import Config, Transformer, read_tensors, save_tensors, weight_files

GOLDEN = ROOT / "tests" / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden Qwen 3 checkpoint, whose LM head is not tied, to be spoilt."""
    return Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3"))


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def rewrite(folder, change):
    """Change the tensors of a checkpoint: change(dict) -> dict."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def shard(folder, n=3):
    """Cut model.safetensors into n shards with an index, as large checkpoints are published."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    weight_map = {name: names[i % n] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors").unlink()
    write_index(folder, {"metadata": {}, "weight_map": weight_map})


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_has_the_published_names_and_loads_to_the_same_weights(name, tmp_path):
    model = Transformer.from_pretrained(GOLDEN / name)
    model.save_pretrained(tmp_path)
    published = load_file(GOLDEN / name / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[key], published[key]) for key in saved)
    again = Transformer.from_pretrained(tmp_path)
    assert equal(model, again) and again.config.eos_ids == model.config.eos_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_config_gains_only_the_ids_of_generation_config(name, tmp_path):
    Transformer.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    before, after = read(GOLDEN / name), read(tmp_path)
    assert {key for key in after if after[key] != before[key]} <= {"eos_token_id"}


def test_shards_load_like_a_single_file(folder):
    whole = Transformer.from_pretrained(folder)
    shard(folder)
    assert equal(Transformer.from_pretrained(folder), whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_any_float_format_load_into_any(folder, stored, wanted):
    rewrite(folder, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    model = Transformer.from_pretrained(folder, dtype=wanted)
    assert {weight.dtype for weight in model.parameters()} == {wanted}
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embed.weight, embedding.to(wanted))
    model.save_pretrained(folder / "copy")
    assert read(folder / "copy")["dtype"] == str(wanted).removeprefix("torch.")


def test_a_loaded_model_does_not_depend_on_its_file(folder):
    model = Transformer.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(bytes(range(256)) * 100)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_tied_checkpoint_may_store_its_head_too(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen25", tmp_path / "tied"))
    whole = Transformer.from_pretrained(folder)
    rewrite(folder, lambda tensors: {
        **tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert equal(Transformer.from_pretrained(folder), whole)


def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen25", tmp_path / "tied"))
    rewrite(folder, lambda tensors: {
        **tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(BadInput, match="lm_head.weight differs"):
        Transformer.from_pretrained(folder)


def test_a_new_model_is_the_same_for_the_same_seed():
    config = Config.from_pretrained(GOLDEN / "gemma2")
    one, two, three = (Transformer(config).initialise(seed) for seed in (1, 1, 2))
    assert equal(one, two) and not equal(one, three)
    assert one.norm.weight.eq(0).all()             # neutral, since Gemma multiplies by 1 + w
    assert all(weight.isfinite().all() for weight in one.parameters())


# ---------------------------------------------------------------------------------- what is refused


def test_every_difference_is_listed_by_its_kind(folder):
    def spoil(tensors):
        del tensors["model.layers.0.mlp.gate_proj.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["model.norm.weight"] = torch.zeros(7)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(BadInput) as error:
        Transformer.from_pretrained(folder)
    for part in ("1 missing: model.layers.0.mlp.gate_proj.weight",
                 "1 unexpected: model.layers.0.self_attn.rotary_emb.inv_freq",
                 "1 of another shape: model.norm.weight [7] (expected [32])",
                 "1 not F32, F16 or BF16: lm_head.weight (I8)"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_list_of_differences_is_cut(folder):
    rewrite(folder, lambda tensors: {"lm_head.weight": tensors["lm_head.weight"]})
    with pytest.raises(BadInput, match="24 missing: .*, ..."):
        Transformer.from_pretrained(folder)


def set_shard(folder, name):
    shard(folder)
    index = read(folder, "model.safetensors.index.json")
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    write_index(folder, index)


def set_index(folder, index):
    shard(folder)
    write_index(folder, index)


def cut(folder, size):
    os.truncate(folder / "model.safetensors", size)


def tie(folder):
    (folder / "config.json").write_text(json.dumps({**read(folder), "tie_word_embeddings": True}))


SPOILT = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON, or cut short"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON object is needed"),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
                            "not UTF-8 text"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "only a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
                      "only safetensors are read"),
    "a cut header": (lambda f: cut(f, 100), "not a readable safetensors file"),
    "cut data": (lambda f: cut(f, 9000), "not a readable safetensors file"),
    "an empty file": (lambda f: cut(f, 0), "not a readable safetensors file"),
    "a shard above the folder": (lambda f: set_shard(f, "../model.safetensors"),
                                 "not a plain file name"),
    "a shard elsewhere": (lambda f: set_shard(f, "/etc/passwd"), "not a plain file name"),
    "a shard by backslash": (lambda f: set_shard(f, "..\\model.safetensors"),
                             "not a plain file name"),
    "a shard called ..": (lambda f: set_shard(f, ".."), "not a plain file name"),
    "a shard that is no name": (lambda f: set_shard(f, 7), "no such file"),
    "a shard with a null byte": (lambda f: set_shard(f, "a\0b"), "no such file"),
    "a missing shard": (lambda f: set_shard(f, "model-9.safetensors"), "no such file"),
    "an index without a map": (lambda f: set_index(f, {}), "weight_map"),
    "an index with an empty map": (lambda f: set_index(f, {"weight_map": {}}), "weight_map"),
    "a head that config.json ties": (tie, "lm_head.weight differs"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_checkpoint_is_refused_in_one_line(folder, case):
    spoil, words = SPOILT[case]
    spoil(folder)
    with pytest.raises(BadInput, match=words) as error:
        Transformer.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_the_same_tensor_in_two_shards_is_refused(folder):
    shard(folder)
    first, second, _ = weight_files(folder)
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(BadInput, match="more than one file"):
        Transformer.from_pretrained(folder)


# ------------------------------------------------------------------------------- files of tensors


def test_the_weight_files_are_those_that_loading_opens(folder):
    save_file({"other": torch.zeros(1)}, folder / "adapter.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]
    shard(folder)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weight_files(folder) == [folder / name for name in names]


def test_saved_tensors_are_read_back_with_what_is_said_about_them(tmp_path):
    tensors = {"a": torch.arange(6.).view(2, 3), "b": torch.tensor([1, 2]).to(torch.int32)}
    save_tensors(tensors, tmp_path / "new" / "file.safetensors", {"kind": "test"})
    again, about = read_tensors(tmp_path / "new" / "file.safetensors")
    assert about == {"kind": "test"} and again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert again["b"].dtype == torch.int32


def test_tensors_may_be_saved_with_nothing_said_about_them(tmp_path):
    save_tensors({"a": torch.zeros(3).expand(2, 3)}, tmp_path / "file")       # not contiguous
    tensors, about = read_tensors(tmp_path / "file")
    assert about == {} and tensors["a"].shape == (2, 3)


def test_a_saved_file_may_be_read_by_whom_the_umask_allows(tmp_path):
    save_tensors({"a": torch.zeros(3)}, tmp_path / "tensors")
    (tmp_path / "text").write_text("as usual")
    tensors, text = ((tmp_path / name).stat().st_mode for name in ("tensors", "text"))
    assert tensors == text


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    save_tensors({"a": torch.zeros(3)}, path)
    with pytest.raises((TypeError, ValueError)):           # an `about` that is no text
        save_tensors({"a": torch.ones(3)}, path, {"n": 1})
    assert read_tensors(path)[0]["a"].eq(0).all()


def test_a_file_that_cannot_be_written_is_an_os_error_that_names_it(tmp_path):
    (tmp_path / "file.part").mkdir()
    with pytest.raises(OSError, match="file.part: cannot write it"):
        save_tensors({"a": torch.zeros(3)}, tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("content", [
    None, b"", b"{}", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{\"a\": 1}"])
def test_a_file_that_is_no_safetensors_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(BadInput, match="file: not a readable safetensors file") as error:
        read_tensors(tmp_path / "file")
    assert "\n" not in str(error.value)


def test_a_folder_is_no_safetensors_file(tmp_path):
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        read_tensors(tmp_path)


# ------------------------------------------------------------------------------------------ memory

PEAK = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import torch
from model import Transformer

def private():          # bytes of this process's own memory, without pages mapped from files
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

class Gauge(threading.Thread):
    peak, on = 0, True
    def run(self):
        while self.on:
            self.peak = max(self.peak, private())

def load(folder):
    gauge, before = Gauge(), private()
    gauge.start()
    model = Transformer.from_pretrained(folder, dtype=getattr(torch, sys.argv[4]))
    gauge.on = False
    gauge.join()
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return (max(gauge.peak, private()) - before) / weights

load(sys.argv[2])       # a first, small model pays for imports
print(load(sys.argv[3]))
"""


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_loading_peaks_at_the_weights_themselves(tmp_path, wanted):
    raw = read(GOLDEN / "qwen3") | dict(
        vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, head_dim=64,
        layer_types=["full_attention"] * 8)
    Transformer(Config.from_dict(raw)).initialise().to(torch.bfloat16).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", PEAK, ROOT, GOLDEN / "qwen3", tmp_path, wanted],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.2
