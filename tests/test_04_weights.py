"""After this file you know how a published checkpoint becomes a model and back, and what is refused on the way."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import BadInput
from model import Config, Transformer

GOLDEN = Path(__file__).parent / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden Qwen 3 checkpoint (untied), to be spoilt."""
    return Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3"))


def rewrite(folder, change):
    """Change the tensors of a checkpoint: change(dict) -> dict."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def shard(folder, n=3):
    """Cut model.safetensors into n shards with an index, as large checkpoints are published."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_has_the_published_names_and_loads_to_the_same_weights(name, tmp_path):
    model = Transformer.from_pretrained(GOLDEN / name)
    model.save_pretrained(tmp_path / "copy")
    published, saved = load_file(GOLDEN / name / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert saved.keys() == published.keys() and all(torch.equal(saved[key], published[key]) for key in saved)
    before, after = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / name, tmp_path / "copy"))
    assert {key for key in after if after[key] != before[key]} <= {"eos_token_id"}     # which gains those of generation_config.json
    again = Transformer.from_pretrained(tmp_path / "copy")
    assert equal(model, again) and again.config.eos_ids == model.config.eos_ids
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]


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
    stored_embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embed.weight, stored_embedding.to(wanted))
    model.save_pretrained(folder / "copy")
    config = json.loads((folder / "copy" / "config.json").read_text())
    assert config["dtype"] == str(wanted).removeprefix("torch.")


def test_a_loaded_model_does_not_depend_on_its_file(folder):
    model = Transformer.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(bytes(range(256)) * 100)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_tied_checkpoint_may_store_its_head_too_if_it_is_the_embedding(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen25", tmp_path / "tied"))
    whole = Transformer.from_pretrained(folder)
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert equal(Transformer.from_pretrained(folder), whole)
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(BadInput, match="lm_head.weight differs"):
        Transformer.from_pretrained(folder)


def test_the_class_of_every_difference_is_listed(folder):
    def spoil(tensors):
        del tensors["model.layers.0.mlp.gate_proj.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["model.norm.weight"] = torch.zeros(7)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(BadInput) as error:
        Transformer.from_pretrained(folder)
    message = str(error.value)
    for part in ("1 missing: model.layers.0.mlp.gate_proj.weight", "1 unexpected: model.layers.0.self_attn.rotary_emb.inv_freq",
                 "model.norm.weight [7] (expected [", "lm_head.weight (I8)"):
        assert part in message
    assert "\n" not in message


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def set_shard(folder, name):
    shard(folder)
    index = index_of(folder)
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(path, size):
    os.truncate(path, size)


SPOILT = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON object is needed"),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not readable as JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "only a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only safetensors are read"),
    "a cut header": (lambda f: cut(f / "model.safetensors", 100), "not a readable safetensors file"),
    "cut data": (lambda f: cut(f / "model.safetensors", 9000), "not a readable safetensors file"),
    "an empty file": (lambda f: cut(f / "model.safetensors", 0), "not a readable safetensors file"),
    "a shard above the folder": (lambda f: set_shard(f, "../model.safetensors"), "not a plain file name"),
    "a shard elsewhere": (lambda f: set_shard(f, "/etc/passwd"), "not a plain file name"),
    "a shard by backslash": (lambda f: set_shard(f, "..\\model.safetensors"), "not a plain file name"),
    "a shard called ..": (lambda f: set_shard(f, ".."), "not a plain file name"),
    "a shard that is no name": (lambda f: set_shard(f, 7), "no such file"),
    "a missing shard": (lambda f: set_shard(f, "model-9.safetensors"), "no such file"),
    "an index without a map": (lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}")), "weight_map"),
    "a head that config.json ties": (lambda f: (f / "config.json").write_text(json.dumps(
        {**json.loads((f / "config.json").read_text()), "tie_word_embeddings": True})), "lm_head.weight differs"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_checkpoint_is_refused_in_one_line(folder, case):
    spoil, word = SPOILT[case]
    spoil(folder)
    with pytest.raises(BadInput, match=word) as error:
        Transformer.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_the_same_tensor_in_two_shards_is_refused(folder):
    shard(folder)
    files = sorted(folder.glob("model-*.safetensors"))
    tensors = load_file(files[0])
    save_file({**tensors, **load_file(files[1])}, files[1])
    with pytest.raises(BadInput, match="more than one file"):
        Transformer.from_pretrained(folder)


PEAK = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
from model import Transformer
from safetensors import safe_open

def private():          # bytes of this process's own memory: pages mapped from files are not counted, the kernel takes them back at will
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

class Watch(threading.Thread):
    peak, on = 0, True
    def run(self):
        while self.on:
            self.peak = max(self.peak, private())

def load(folder):
    watch, before = Watch(), private()
    watch.start()
    model = Transformer.from_pretrained(folder, dtype=getattr(torch, sys.argv[4]))
    watch.on = False
    watch.join()
    return max(watch.peak, private()) - before, sum(w.numel() * w.element_size() for w in model.parameters())

load(sys.argv[2])       # a first, small model pays for imports
peak, weights = load(sys.argv[3])
print(peak / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see memory")
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_loading_peaks_at_the_weights_themselves(tmp_path, wanted):
    raw = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    raw |= dict(vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, layer_types=["full_attention"] * 8, head_dim=64)
    Transformer(Config.from_dict(raw)).initialise().to(torch.bfloat16).save_pretrained(tmp_path / "large")
    done = subprocess.run([sys.executable, "-c", PEAK, Path(__file__).parent.parent, GOLDEN / "qwen3", tmp_path / "large", wanted],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.2


def test_a_new_model_is_the_same_for_the_same_seed():
    config = Config.from_dict(json.loads((GOLDEN / "gemma2" / "config.json").read_text()))
    one, two, three = (Transformer(config).initialise(seed) for seed in (1, 1, 2))
    assert equal(one, two) and not equal(one, three)
    assert one.norm.weight.eq(0).all()                            # neutral, since Gemma multiplies by 1 + w
    assert all(weight.isfinite().all() for weight in one.parameters())
