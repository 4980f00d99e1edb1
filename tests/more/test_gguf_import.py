"""After this file you know that a GGUF file becomes the checkpoint that it was made from: tensors,
token ids and configuration; and that a damaged or hostile one becomes a line, and nothing else."""
import json
import math
import os
import re
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from data import BadInput
from data.tokenizer import Tokenizer
from eval import load
from helpers import TOKENIZERS
from lab.gguf_import import main, read_config, read_file, read_tokenizer
from model import GLOBAL, LOCAL, inverse_frequencies, read_tensors

D, LAYERS, HEADS, GROUPS, HEAD, MEMORIES = 32, 6, 4, 2, 16, 64
FAMILIES = {"llama": "llama", "qwen2": "qwen", "qwen3": "qwen", "gemma2": "gemma",
            "gemma3": "gemma"}         # and the tokenizer of each
TEXTS = ("Hello world, it's 12345 o'clock.", "  two  spaces\n\n\n\ttab", "naïve Å 東京 🙂 ½",
         "<|im_start|>user<|im_end|><bos><eos><|eot_id|><tool_call>", "▁▁x <0x41>")

# ------------------------------------------------ a model as published, and as llama.cpp stores it


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf", reason="needs the package that writes GGUF files: "
                               "pip install gguf")


def published(family, V):
    """Tensors under their published names, of numbers that neither bf16 nor 1 + w rounds."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if family in ("qwen3", "llama"):
        shapes["lm_head.weight"] = V, D
    for n in range(LAYERS):
        rows = {"q": HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
        parts = {f"self_attn.{name}_proj.weight": (size, D) for name, size in rows.items()}
        parts |= {"self_attn.o_proj.weight": (D, HEADS * HEAD), "input_layernorm.weight": (D,),
                  "mlp.gate_proj.weight": (MEMORIES, D), "mlp.up_proj.weight": (MEMORIES, D),
                  "mlp.down_proj.weight": (D, MEMORIES), "post_attention_layernorm.weight": (D,)}
        if family == "qwen2":
            parts |= {f"self_attn.{name}_proj.bias": (size,) for name, size in rows.items()}
        if family in ("qwen3", "gemma3"):
            parts |= {"self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,)}
        if "gemma" in family:
            parts |= {"pre_feedforward_layernorm.weight": (D,),
                      "post_feedforward_layernorm.weight": (D,)}
        shapes |= {f"model.layers.{n}.{part}": shape for part, shape in parts.items()}
    draw = torch.Generator().manual_seed(len(family))
    return {name: torch.randint(-256, 257, shape, generator=draw) / 256
            for name, shape in shapes.items()}


def stored(family, tensors):
    """The same as llama.cpp's converter writes it: {name: fp32 array}."""
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
             "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}
    if "gemma" in family:
        short |= {"post_attention_layernorm": "post_attention_norm",
                  "pre_feedforward_layernorm": "ffn_norm",
                  "post_feedforward_layernorm": "post_ffw_norm"}
    out = {}
    for name, tensor in tensors.items():
        *front, part, kind = name.split(".")
        array = tensor.numpy()
        if family == "llama" and part in ("q_proj", "k_proj"):
            n = HEADS if part == "q_proj" else GROUPS
            array = array.reshape(n, 2, HEAD // 2, D).swapaxes(1, 2).reshape(array.shape)
        if "gemma" in family and name.endswith("norm.weight"):
            array = array + 1
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
               "lm_head": "output"}.get(".".join([*front, part]))
        out[f"{top or f'blk.{front[2]}.{short[part]}'}.{kind}"] = np.ascontiguousarray(array)
    return out


def told(family):
    """What llama.cpp's converter says of the model and of its tokenizer."""
    spec = json.loads((TOKENIZERS / FAMILIES[family] / "tokenizer.json").read_text("utf-8"))
    added = {token["content"]: token for token in spec["added_tokens"]}
    ids = spec["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens = sorted(ids, key=ids.get)
    kinds = [6 if re.fullmatch("<0x..>", text) else 4 if text in added else 1 for text in tokens]
    for id, text in enumerate(tokens):             # a control token may also look like one
        if text in added and (added[text]["special"] or
                              re.fullmatch(r"<\|.*\|>|<unused\d+>|<mask>", text)):
            kinds[id] = 3
    said = {f"{family}.{key}": value for key, value in {
        "block_count": LAYERS, "context_length": 512, "embedding_length": D,
        "feed_forward_length": MEMORIES, "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6, **({"attention.sliding_window": 24} if "gemma" in family else {}),
        **({"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}
           if family == "gemma2" else {})}.items()}
    said |= {f"tokenizer.ggml.{key}": value for key, value in {
        "tokens": [*tokens, "[PAD_A]", "[PAD_B]"], "token_type": [*kinds, 5, 5]}.items()}
    if "gemma" in family:
        runs = [" " * len(text) if set(text) == {"▁"} and len(text) > 1 else text
                for text in said["tokenizer.ggml.tokens"]]     # as the converter spells them
        said |= {"tokenizer.ggml.tokens": runs, "tokenizer.ggml.model": "llama",
                 "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": [0.0] * len(runs),
                 "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
                 "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.add_bos_token": True}
        return said
    merges = [merge if isinstance(merge, str) else " ".join(merge)
              for merge in spec["model"]["merges"]]
    pre, bos, eos = {"llama": ("llama-bpe", "<|begin_of_text|>", "<|end_of_text|>"),
                     "qwen": ("qwen2", "<|endoftext|>", "<|im_end|>")}[FAMILIES[family]]
    said |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
             "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": ids[bos],
             "tokenizer.ggml.eos_token_id": ids[eos]}
    return said


def write(gguf, path, family, said, tensors, kinds={}):
    """A GGUF file. kinds: {name of a tensor: its quantisation}; all others are fp32."""
    writer = gguf.GGUFWriter(path, family)
    for key, value in said.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32,
               float: writer.add_float32, list: writer.add_array}[type(value)]
        add(key, value)
    for name, array in tensors.items():
        kind = kinds.get(name)
        writer.add_tensor(name, array if kind is None else gguf.quantize(array, kind),
                          raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def a_file(gguf, tmp_path_factory):
    """A function family -> (the file, the tensors it was made from)."""
    def make(family, change=lambda said, tensors: None, kinds={}):
        said = told(family)
        tensors = published(family, len(said["tokenizer.ggml.tokens"]))
        arrays = stored(family, tensors)
        change(said, arrays)
        path = tmp_path_factory.mktemp("gguf") / f"{family}.gguf"
        return write(gguf, path, family, said, arrays, kinds), tensors
    return make


# ------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_becomes_the_checkpoint_it_was_made_from(family, a_file, tmp_path, capsys):
    path, tensors = a_file(family)
    out = tmp_path / "models" / "small one"
    main([str(path), "--out", str(out)])
    assert f"--model '{out}'" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert [*out.parent.iterdir()] == [out]
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode

    found = read_tensors(out / "model.safetensors")[0]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.bfloat16()), name

    model, ours = load(out)
    theirs = Tokenizer.from_pretrained(TOKENIZERS / FAMILIES[family])
    assert (ours.eos_id, ours.max_id) == (theirs.eos_id, theirs.max_id)
    said = told(family)
    pairs = zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"])
    spec, golden = (json.loads((folder / "tokenizer.json").read_text("utf-8"))
                    for folder in (out, TOKENIZERS / FAMILIES[family]))
    assert [(token["content"], token["special"]) for token in spec["added_tokens"]] == [
        (text, kind == 3) for text, kind in pairs if kind in (3, 4) and text.strip(" ")]
    assert spec["normalizer"] == golden["normalizer"]
    assert spec["model"].get("ignore_merges") == golden["model"]["ignore_merges"]
    if "gemma" not in family:          # whose merges are listed nowhere in the file
        assert spec["pre_tokenizer"] == golden["pre_tokenizer"]
        for text in TEXTS:
            for special in (True, False):
                assert ours.encode(text, special=special) == theirs.encode(text, special=special)
    front = {"llama": "<|begin_of_text|>", "qwen": "", "gemma": "<bos>"}[FAMILIES[family]]
    for text in TEXTS:
        text = text.replace("▁", " ") if "gemma" in family else text
        assert ours.decode(ours.encode(text, special=False)) == front + text
    config = model.config
    assert (config.norm_eps, config.head_dim, config.tied) == (
        pytest.approx(1e-6), HEAD, "lm_head.weight" not in tensors)
    thetas = {1e4, 1e6} if family == "gemma3" else {1e6}       # its local layers have their own
    assert {rope["rope_theta"] for rope in config.rope.values()} == thetas
    if family == "gemma2":
        assert (config.window, config.attn_softcap, config.final_softcap) == (24, 40, 20)
        assert (config.layer_types[:2], config.attn_scale) == ((LOCAL, GLOBAL), HEAD ** -0.5)


def test_the_merges_of_gemma_are_all_that_there_are():
    spec, _ = read_tokenizer(told("gemma3"), gemma=True)
    vocab, listed = spec["model"]["vocab"], [*map(tuple, spec["model"]["merges"])]
    assert "▁▁▁" in vocab and "  " not in vocab
    pairs = {(left, right) for token in vocab for i in range(1, len(token))
             if (left := token[:i]) in vocab and (right := token[i:]) in vocab}
    # By the id of what they make; of one token, the longest left part comes first.
    assert len(listed) > 800 and listed == sorted(
        pairs, key=lambda pair: (vocab["".join(pair)], -len(pair[0])))


def dequantised(kind, raw):
    """Blocks of 32 numbers, by the layout of ggml's block_q8_0, block_q4_0 and block_q4_1."""
    out, size = [], {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    for block in (raw[i:i + size] for i in range(0, len(raw), size)):
        scale, = struct.unpack_from("<e", block)
        if kind == "Q8_0":
            out += [scale * n for n in struct.unpack_from("<32b", block, 2)]
            continue
        halves = block[-16:]
        nibbles = [byte & 15 for byte in halves] + [byte >> 4 for byte in halves]
        least = -8 * scale if kind == "Q4_0" else struct.unpack_from("<e", block, 2)[0]
        out += [scale * n + least for n in nibbles]
    return torch.tensor(out, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantised_numbers_are_what_their_blocks_stand_for(kind, gguf, a_file, tmp_path):
    kinds = {f"blk.0.{name}.weight": gguf.GGMLQuantizationType[kind]
             for name in ("attn_q", "attn_k", "ffn_down")} | {
             "token_embd.weight": gguf.GGMLQuantizationType[kind]}
    path, tensors = a_file("llama", kinds=kinds)
    main([str(path), "--out", str(tmp_path / "out")])
    found = read_tensors(tmp_path / "out" / "model.safetensors")[0]
    arrays = stored("llama", tensors)
    for name, ours in {"token_embd": "model.embed_tokens",
                       "blk.0.ffn_down": "model.layers.0.mlp.down_proj"}.items():
        array = arrays[f"{name}.weight"]
        raw = gguf.quantize(array, gguf.GGMLQuantizationType[kind]).tobytes()
        expected = (torch.from_numpy(array).flatten() if "F" in kind else dequantised(kind, raw))
        assert torch.equal(found[f"{ours}.weight"].flatten(), expected.bfloat16()), name
    # The rows of queries and keys are put in order as whole blocks: only their numbers differ.
    for name in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        apart = (found[name].float() - tensors[name]).abs().max()
        assert apart <= {"Q8": 0.01, "Q4": 0.15}.get(kind[:2], 0)


# ------------------------------------------------------------------------------- what it says

SMALL = {"tokenizer.ggml.tokens": ["a"] * 40}


def said_of(family, **more):
    keys = {"block_count": 3, "embedding_length": 96, "feed_forward_length": 64,
            "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
            "attention.sliding_window": 7}
    return SMALL | {f"{family}.{key}": value for key, value in (keys | more).items()}


def test_only_the_largest_gemmas_scale_scores_by_another_width():
    for family, layers in ("gemma2", 46), ("gemma3", 62):
        for n, width in (layers, 96 / 4), (layers - 1, 32):
            config = read_config(said_of(family, block_count=n), {}, family)
            assert config.attn_scale == pytest.approx(width ** -0.5)


def test_gemma_3_scales_the_positions_of_its_global_layers_only():
    said = said_of("gemma3", **{"block_count": 6, "rope.freq_base": 1e6,
                                "rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    rope = read_config(said, {}, "gemma3").rope
    assert rope[GLOBAL].items() >= {"rope_type": "linear", "factor": 8, "rope_theta": 1e6}.items()
    assert rope[LOCAL].items() >= {"rope_type": "default", "rope_theta": 1e4}.items()
    with pytest.raises(BadInput, match="rope_type is 'yarn'"):
        read_config(said | {"gemma3.rope.scaling.type": "yarn"}, {}, "gemma3")


class Stored:
    def __init__(self, numbers):
        self.data = np.array(numbers, np.float32)


def llama_factors(factor, width, theta, low=1.0, high=4.0, old=8192):
    """What llama.cpp's converter writes as rope_freqs.weight."""
    for i in range(0, width, 2):
        length = 2 * math.pi * theta ** (i / width)
        smooth = (old / length - low) / (high - low)
        yield (1 if length < old / high else factor if length > old / low
               else 1 / ((1 - smooth) / factor + smooth))


def test_the_factors_of_llama_3_1_become_its_scaling():
    said = said_of("llama", **{"attention.key_length": 64, "rope.freq_base": 5e5})
    for factor in (8.0, 32.0):
        tensors = {"rope_freqs.weight": Stored([*llama_factors(factor, 64, 5e5)])}
        config = read_config(said, tensors, "llama")
        assert tensors == {}
        assert config.raw["rope_scaling"] == {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        found = inverse_frequencies(config.rope[GLOBAL], 64, "cpu")
        expected = [5e5 ** (-i / 32) / by for i, by in enumerate(llama_factors(factor, 64, 5e5))]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)
    for wrong in [*llama_factors(8.0, 64, 5e5, old=4096)], [1.0, 2.0], [], [math.nan] * 32:
        with pytest.raises(BadInput, match="Llama 3.1"):
            read_config(said, {"rope_freqs.weight": Stored(wrong)}, "llama")


def test_digits_are_cut_as_the_name_of_the_tokenizer_says():
    said = told("qwen2") | {"tokenizer.ggml.pre": "smollm"}
    cuts = read_tokenizer(said, gemma=False)[0]["pre_tokenizer"]["pretokenizers"]
    assert cuts == [{"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                     "use_regex": True}]
    for name, words in ("smollm", ["a", "Ġ", "1", "2"]), ("gpt-2", ["a", "Ġ12"]):
        spec, _ = read_tokenizer(said | {"tokenizer.ggml.pre": name}, gemma=False)
        spec["model"]["merges"] = ["1 2", "Ġ 12"]
        spec["model"]["vocab"] |= {"12": 5000, "Ġ12": 5001}
        ids = Tokenizer(spec, [{}, {}, {}], []).encode("a 12")
        assert ids == [spec["model"]["vocab"][word] for word in words]


# --------------------------------------------------------------------------- damaged and hostile


def refused(path, out):
    """The line that main answers, after which all is as before."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(BadInput) as problem:
        main([str(path), "--out", str(out)])
    assert sorted(out.parent.iterdir()) == before
    line = str(problem.value)
    assert line.isprintable() and path.name in line
    return line


def test_a_file_cut_anywhere_is_refused(a_file, tmp_path):
    whole = a_file("qwen2")[0].read_bytes()
    header = whole.index(b"blk.0.attn_q.weight")
    cuts = [*range(0, 40, 3), *range(40, header, header // 20), header + 21,
            *range(header + 1000, len(whole), len(whole) // 9), len(whole) - 32]
    path = tmp_path / "cut.gguf"
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert "not a whole GGUF file" in refused(path, tmp_path / "out"), cut


def test_what_a_header_claims_is_not_believed(a_file, tmp_path):
    whole = a_file("qwen2")[0].read_bytes()
    array = whole.index(b"tokenizer.ggml.token_type") + 25 + 4 + 4
    first = whole.index(b"token_embd.weight") + 17
    many, path = struct.pack("<Q", 10 ** 12), tmp_path / "bad.gguf"
    for at, claim in ((8, many), (16, many), (24, many), (24, b"\xff" * 8), (array, many),
                      (array, b"\xff" * 8), (array - 4, struct.pack("<I", 9)),
                      (first, b"\xff" * 4), (first + 4, many), (first + 4, b"\xff" * 16),
                      (first + 24, many), (0, b"PK"), (4, b"\x01"), (30, b"\xff\xfe")):
        path.write_bytes(whole[:at] + claim + whole[at + len(claim):])
        line = refused(path, tmp_path / "out")     # at the end of the file, not of patience
        assert "not a whole GGUF file" in line and "values" not in line, (at, claim)
    path.write_bytes(whole[:first + 20] + struct.pack("<I", 99) + whole[first + 24:])
    assert "99" in refused(path, tmp_path / "out")
    path.write_bytes(whole[:first + 20] + struct.pack("<I", 24) + whole[first + 24:])
    assert "I8" in refused(path, tmp_path / "out")             # known, but nothing dequantises it
    path.write_bytes(b"")
    assert "empty" in refused(path, tmp_path / "out")
    key = struct.pack("<Q", 1) + b"a"
    deep = key + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    for said, n in ((key + b"\0" * 5) * 2, 2), (deep, 1):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, n) + said)    # twice; a list of lists
        assert "not a whole GGUF file" in refused(path, tmp_path / "out")


def test_a_file_that_claims_too_much_is_not_read_to_its_end(gguf, a_file):
    path, _ = a_file("qwen2")
    assert len(read_file(path, gguf)[0]["tokenizer.ggml.tokens"]) > 600
    with pytest.raises(BadInput, match="more than 1,000 values"):
        read_file(path, gguf, most=1000)


def without(name):
    return lambda said, tensors: tensors.pop(name)


def with_tensor(name, array):
    return lambda said, tensors: tensors.update({name: array})


def saying(**changes):
    def change(said, tensors):
        said.update({key.replace("__", "."): value for key, value in changes.items()})
    return change


WRONG = {
    "missing": (without("blk.1.ffn_up.weight"), r"missing: \['blk.1.ffn_up.weight \[64, 32\]'\]"),
    "unexpected": (with_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 32), np.float32)),
                   r"unexpected: \['blk.0.ffn_gate_exps.weight \[2, 32\]'\]"),
    "of another shape": (with_tensor("blk.0.attn_k.weight", np.zeros((32, 33), np.float32)),
                         r"\[32, 32\].*unexpected: \['blk.0.attn_k.weight \[32, 33\]'\]"),
    "hostile name": (with_tensor("\x1b[2J\nblk\u202e", np.zeros(1, np.float32)), "unexpected"),
    "not a number": (with_tensor("output_norm.weight", np.full(32, np.nan, np.float32)),
                     "norm.weight is not finite"),
    "layers": (saying(qwen2__block_count=2000), "num_hidden_layers is 2000"),
    "sizes": (saying(qwen2__embedding_length="32"), "hidden_size is '32'"),
    "pre": (saying(tokenizer__ggml__pre="tekken"), "'tekken'; known are .*gpt-2, smollm, llama-"),
    "model": (saying(tokenizer__ggml__model="llama"), "'llama' with 'qwen2'; known are"),
    "tokens": (lambda said, tensors: said.update({"tokenizer.ggml.tokens": [
        *range(len(said["tokenizer.ggml.tokens"]))]}), "not a text and a number for each"),
    "kinds": (saying(tokenizer__ggml__token_type=[1]), "not a text and a number for each"),
    "merges": (saying(tokenizer__ggml__merges=["a b c"]), "merge 'a b c' is not a pair"),
    "end": (saying(tokenizer__ggml__eos_token_id=10 ** 6), "eos_token_id is the id of no token"),
    "nothing": (lambda said, tensors: said.pop("tokenizer.ggml.tokens"), "tokens is None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line(name, a_file, tmp_path):
    change, words = WRONG[name]
    path, _ = a_file("qwen2", change)
    assert re.search(words, refused(path, tmp_path / "out"))


def test_another_architecture_is_named_beside_the_known(gguf, tmp_path):
    path = write(gguf, tmp_path / "phi.gguf", "phi3", {}, {"x": np.zeros(1, np.float32)})
    assert "'phi3'; known are llama, qwen2, qwen3, gemma2, gemma3" in refused(path, tmp_path / "o")


def test_a_folder_that_is_there_is_left_alone(a_file, tmp_path):
    path, _ = a_file("qwen3")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="out: exists already; try .*out-gguf"):
        main([str(path), "--out", str(tmp_path / "out")])
    assert [*tmp_path.rglob("*")] == [tmp_path / "out"]


# --------------------------------------------------------------------- in a process of its own


def run(*argv, before="", **more):
    """python -m lab.gguf_import with `before` ahead: (exit status, standard error)."""
    code = f"import sys\n{before}\nfrom data import command\nfrom lab.gguf_import import main\n"
    done = subprocess.run([sys.executable, "-c", code + "command(main)", *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)
    return done.returncode, done.stderr


def test_without_the_package_one_line_says_how_to_get_it(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    code, error = run(path, "--out", tmp_path / "out", before="sys.modules['gguf'] = None")
    assert code == 2 and error.count("\n") == 1 and "pip install gguf" in error
    assert [*tmp_path.iterdir()] == [path]


def test_on_a_full_disk_nothing_is_left(a_file, tmp_path):
    def full():                        # a limit on the size of a file stands for the disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code, error = run(a_file("llama")[0], "--out", tmp_path / "out", preexec_fn=full)
    assert code == 2 and error.count("\n") == 1 and "is the disk full?" in error
    assert [*tmp_path.iterdir()] == []


# --------------------------------------------------------------------------------- real files


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_files_come_out_as_transformers_makes_them(name, real_models, gguf, tmp_path):
    main([str(real_models / "gguf" / name / f"{name}.gguf"), "--out", str(tmp_path / "out")])
    made, reference = (read_tensors(folder / "model.safetensors")[0]
                       for folder in (tmp_path / "out", real_models / name))
    assert made.keys() == reference.keys()
    for tensor in made:
        assert made[tensor].dtype == reference[tensor].dtype == torch.bfloat16
        assert torch.equal(made[tensor].view(torch.int16), reference[tensor].view(torch.int16))

    def parts(folder):
        spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair)
                  for pair in spec["model"]["merges"]]
        return spec["model"]["vocab"], merges, spec["added_tokens"], spec["normalizer"]

    assert parts(tmp_path / "out") == parts(real_models / name)
    (model, ours), (same, theirs) = load(tmp_path / "out"), load(real_models / name)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id, theirs.eos_id, theirs.pad_id)
    for text in (*TEXTS, (ROOT / "README.md").read_text("utf-8")):
        for special in (True, False):
            assert ours.encode(text, special=special) == theirs.encode(text, special=special)
    with torch.inference_mode():
        ids = torch.tensor([ours.encode(TEXTS[0])])
        assert torch.equal(model(ids), same(ids))
