"""Breaks files on purpose, thousands of times, and checks what the readers make of them.

    python tests/fuzz.py --mutants 10000
    python tests/fuzz.py --kind weights --seed 0 --only 1234         one mutant again, with its message

A mutant is a good set of files with one to three faults in one of them: a key deleted, a number made huge, an offset moved, a byte
flipped. Reading it must end in one of two ways:

    refused      BadInput: one line of at most 600 printable characters that begins with the folder in which the fault is
    accepted     with the meaning that the bytes have for a second, independent reader, written here from the formats' definitions:
                 config      every field of Config follows from the keys it depends on; where no such key changed, so do the logits;
                             what save_pretrained writes is read back as the same model
                 weights     every tensor equals numpy's reading of the safetensors file, and no byte of it is left over or used twice
                 tokenizer   ids are those of the merge rule applied by hand, and decode to the text; bos, eos and pad are what the files say
                 tasks       every example is its row of json.loads
                 profile     every tensor equals numpy's reading, and the method can be set up with it
                 run         settings and scores are those of json.loads, and runs can be compared

Everything else is a failure: another exception, a print (a library's panic), a crash, more than 5 seconds, more memory than 4 times
the files and 32 MiB (what allocators keep back; a normal load here takes less than half of that), any file written outside the output
folder. Each mutant runs in a forked process that is replaced when it dies or hangs, so one mutant is blamed and the others go on.
"""
import argparse
import base64
import faulthandler
import gc
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import regex
import torch
from safetensors.torch import save
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation
from data import BadInput, Parser, tasks
from data.tokenizer import ALPHABET, BYTE_TOKENS, CHAR_TO_BYTE, GPT2_WORDS, LLAMA_WORDS, QWEN_WORDS, Tokenizer
from infosteer import METHODS, Steering
from model import ACTIVATIONS, FAMILIES, GLOBAL, LOCAL, Config, Transformer

GOLDEN = Path(__file__).resolve().parent / "golden"
LONGEST_MESSAGE = 600                  # seven lines of a terminal: a path, a value, what to do. More is a dump, not a message
SECONDS = 5
MEMORY_FACTOR, MEMORY_CONSTANT = 4, 32 << 20
TEXTS = ["", "Hello world", " The  final answer is: 72.5\n\n", "naïve café, Straße", "e\u0301 ﬁ 記憶は鍵です ☕", "<|endoftext|><bos><0x41> [x]",
         "don't 12345 DON'T\t\tend   ",
         "a" * 40, "the the the" + " " * 30 + "x", "👩‍👩‍👧\n\n\n\n"]


class Wrong(Exception):
    """A reader accepted what it should not, or made something else of it."""


@dataclass
class Good:
    """A set of files in which everything is right."""

    name: str
    files: dict[str, bytes]
    targets: list[str]                 # the files that are broken
    about: dict = field(default_factory=dict)          # what the check must know


# ------------------------------------------------------------------------------------------------------------- good files


def read(folder, *names):
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def models():
    return [folder for folder in sorted((GOLDEN / "models").iterdir()) if folder.is_dir()]


def good_configs():
    """The tiny checkpoints with both styles of config.json; published ones without weights, which is a model of the real size."""
    for folder in models():
        for style in ("config.json", "config_classic.json"):
            files = read(folder, "generation_config.json", "model.safetensors") | {"config.json": (folder / style).read_bytes()}
            with tempfile.TemporaryDirectory() as place:
                write(Path(place), files)
                model = Transformer.from_pretrained(place)
            yield Good(f"{folder.name}/{style}", files, [name for name in files if name.endswith(".json")],
                       {"config": model.config, "logits": logits(model)})
    for path in sorted((GOLDEN / "configs").glob("*.json")):
        if "model_type" in json.loads(path.read_bytes()):
            config = Config.from_dict(json.loads(path.read_bytes()))
            yield Good(path.name, {"config.json": path.read_bytes()}, ["config.json"], {"config": config})


def good_weights():
    """The tiny checkpoints in one file and in two shards with an index; some in half precision."""
    for folder in models():
        files = read(folder, "config.json", "generation_config.json", "model.safetensors")
        tensors = read_tensors(files["model.safetensors"])
        yield Good(folder.name, files, ["model.safetensors"])
        pieces = {"model-00001-of-00002.safetensors": sorted(tensors)[::2], "model-00002-of-00002.safetensors": sorted(tensors)[1::2]}
        shards = {file: write_tensors({name: tensors[name] for name in names}) for file, names in pieces.items()}
        index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, names in pieces.items() for name in names}}
        rest = {name: data for name, data in files.items() if name != "model.safetensors"}
        yield Good(f"{folder.name} in shards", {**rest, **shards, "model.safetensors.index.json": json.dumps(index, indent=2).encode()},
                   ["model.safetensors.index.json", *shards])
    half = {name: torch.from_numpy(array.copy()).to(torch.float16 if "norm" in name else torch.bfloat16) for name, array in tensors.items()}
    yield Good("half precision", {**files, "model.safetensors": save(half)}, ["model.safetensors"])


def good_tokenizers():
    """All three formats: tokenizer.json, Llama 3's tokenizer.model, Qwen's vocab.json and merges.txt."""
    specs = {}
    for name in ("llama", "qwen", "gemma"):
        files = read(GOLDEN / "tokenizers" / name, "tokenizer.json", "tokenizer_config.json")
        files |= {"special_tokens_map.json": b"{}", "config.json": b'{"bos_token_id": 2, "eos_token_id": [1], "pad_token_id": null}'}
        specs[name] = json.loads(files["tokenizer.json"])
        yield Good(name, files, ["tokenizer.json"] * 6 + ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
    vocab = specs["llama"]["model"]["vocab"]
    lines = [base64.b64encode(bytes(map(CHAR_TO_BYTE.get, token))) + b" %d\n" % rank for token, rank in sorted(vocab.items(),
            key=lambda item: item[1])]
    yield Good("tokenizer.model", {"tokenizer.model": b"".join(lines)}, ["tokenizer.model"])
    spec = specs["qwen"]
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]}
    files = {"vocab.json": json.dumps(spec["model"]["vocab"]).encode(),
             "merges.txt": "\n".join(["#version: 0.2", *spec["model"]["merges"], ""]).encode(),
             "tokenizer_config.json": json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}).encode()}
    yield Good("vocab.json and merges.txt", files, list(files))
    yield Good("toy", read(ROOT / "data" / "toy", "tokenizer.json"), ["tokenizer.json"])
    for mini in json.loads((GOLDEN / "tokenizers" / "minis.json").read_bytes())["minis"]:
        yield Good(mini["name"], {"tokenizer.json": json.dumps(mini["spec"]).encode()}, ["tokenizer.json"])


def good_tasks():
    """A few rows in the layout of each task; of the toy world's, the shipped ones."""
    for task in tasks.KNOWN.values():
        labels = f" Answer format: {'/'.join(task.answers)}" if task.kind == "choice" else ""
        rows = [{"instruction": f"Is {n} even, and why not?{labels}", "input": "" if n % 2 else "Think: naïve ☕", "output": f"It is.\n#### {n}",
                 "answer": task.answers[n % len(task.answers)] if task.answers else [n, f"-{n}.5", 1.5e20][n % 3]} for n in range(3)]
        for split in task.splits:
            yield Good(f"{task.name} {split}", {f"{task.name}/{split}.json": json.dumps(rows, ensure_ascii=False).encode()},
                       [f"{task.name}/{split}.json"], {"task": task, "split": split})
    for task in tasks.TOY.values():
        for split in task.splits:
            rows = json.loads((ROOT / "data" / "toy" / task.name / f"{split}.json").read_bytes())[:6]
            yield Good(f"{task.name} {split}", {f"{task.name}/{split}.json": json.dumps(rows, indent=1).encode()}, [f"{task.name}/{split}.json"],
                       {"task": task, "split": split})


def good_profiles():
    """What each fine-grained method knows of one tiny model."""
    model = Transformer.from_pretrained(GOLDEN / "models" / "llama3")
    dice = torch.Generator().manual_seed(0)
    rows = [(torch.randint(96, (12,), generator=dice).tolist(), 6) for _ in range(20)]
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as sink:
        shown, sys.stderr = sys.stderr, sink                                   # the profile's own progress bars
        try:
            for method in METHODS:
                if METHODS[method].needs:
                    steering, path = Steering(method, groups=3, subgroups=2, buckets=8), Path(place, evaluation.PROFILE)
                    evaluation.save_profile(path, evaluation.memory_profile(model, rows, steering), model, steering)
                    yield Good(method, {path.name: path.read_bytes()}, [path.name], {"model": model, "steering": steering})
        finally:
            sys.stderr = shown


def good_runs():
    """A folder of runs as train.py and eval.py leave it: args.json, and a score for each task."""
    arms = {"base": None, "none-seed0": Steering(), "none-seed1": Steering(), "int-seed0": Steering("int"), "int-seed1": Steering("int", p=0.01,
            layers={1: {}, 2: {"alpha": 2.0}})}
    files = {}
    for at, (arm, steering) in enumerate(arms.items()):
        settings = {"model": "toy/llama", "base": True} if steering is None else {
            "model": "toy/llama", "task": "toy-facts,toy-sums", "seed": int(arm[-1]), "lr": 2e-4, "steering": steering.settings,
            "versions": {"torch": "2"}}
        files[f"{arm}/args.json"] = json.dumps(settings, indent=2).encode()
        for task in ("toy-facts", "toy-sums", "boolq"):
            files[f"{arm}/eval/{task}.json"] = json.dumps({"task": task, "n": 4, "accuracy": at / 8, "standard_error": 0.1,
                                                           "strict_accuracy": at / 8, "unparsed": 0}).encode()
    yield Good("five runs", files, list(files))


# ---------------------------------------------------------------------------------------------------------------- mutation

LONG = [300, 2000, 20_000, 1_000_000]
DEEP = [60, 300, *range(900, 1000, 7), 100_000]
VALUES = [None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, -10**30, 10**400, 10**4200,
          math.nan, math.inf, -math.inf,
          "", " ", "0", "1", "true", "false", "null", "\0", "\n", "a\nb\x1b[31mred", "\ud800", "x\udc00", "\U0001f600", "e\u0301", "\u202egnp",
          "../x", "/etc/passwd", "..\\x", ".", "..",
          [], {}, [[]], [None], {"": None}, [1, 2], {"type": "x"}]
NAMES = ["../model-00001-of-00002.safetensors", "../../x", "/etc/passwd", "a/b", "..\\model-00001-of-00002.safetensors", "model.safetensors\0",
         "\n", "", ".", "..", "\ud800", "x" * 5000,
         "./model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors/", "model.safetensors.index.json", "config.json"]
BOMBS = [r"(a|aa)+(?=c)", r"(?:(?=a)a|a)+b", r"(\w+\s?)*(?!\S)x", r"(?:(?:(?:a{50}){50}){50}){50}", "(" * 3000 + "a" + ")" * 3000, r"(?=a)", "",
         "a*", r"(?<=a)", r"(a)\1*", "(", "[", r"\p{Foo}",
         r"(?i)", "(?x) a # b", "a)|(b", r"\w{1000}{1000}", r"(?:a?){40}a{40}(?!b)c", "|", "(?:)", r"\G", "$", "^", r"\b", "a|", r"(?!)", r"(?>a*)ab"]


class Raw:
    """JSON text that no Python value writes: it stands in the document under a name of its own until the end."""

    def __init__(self):
        self.texts = {}

    def __call__(self, text):
        key = f"@@{len(self.texts)}@@"
        self.texts[f'"{key}"'] = text
        return key

    def dump(self, dice, value):
        text = json.dumps(value, ensure_ascii=dice.random() < 0.7, indent=dice.choice([None, 1]))
        for key, raw in self.texts.items():
            text = text.replace(key, raw)
        return text.replace('@@again"', '"').encode("utf-8", "surrogatepass")


def junk(dice, raw):
    pick = dice.random()
    if pick < 0.06:
        return raw("[" * (n := dice.choice(DEEP)) + "]" * n)
    if pick < 0.10:
        return raw('{"a":' * (n := dice.choice(DEEP)) + "1" + "}" * n)
    if pick < 0.13:
        return raw(dice.choice(["9" * 5000, "1e400", "-1e400", "01", "+1", "'a'", "1.", "\\u", "tru", '"\x01"', "0x1", "9" * 4299]))
    if pick < 0.20:
        return dice.choice(["a", " ", "é", "\n", "[", "\\", "a b"]) * dice.choice(LONG)
    return dice.choice(VALUES)


def near(dice, value, raw, others):
    """A value like this one."""
    if isinstance(value, bool):
        return dice.choice([not value, str(value).lower(), int(value), None])
    if isinstance(value, (int, float)) and not abs(value) > 1e15:
        return dice.choice([value + 1, value - 1, -value, value * 2, value * 1000, value / 2, float(value), str(value), [value], 0])
    if isinstance(value, str) and value:
        at = dice.randrange(len(value))
        return dice.choice([value + "x", value[:at] + value[at + 1:], value[:at] + dice.choice("\0\n é\ud800/.|") + value[at:], value * 2,
                            value[::-1], value.swapcase(), [value],
                            {"content": value}, value + " " * dice.choice(LONG) + dice.choice(["", "\nx", "x"]),
                            dice.choice(others) if others else ""])
    if isinstance(value, list):
        same = value.copy()
        dice.shuffle(same)
        return dice.choice([same, value[:-1], value + value[-1:], value * 2, value[::-1], [], [value], {str(n): item
                for n, item in enumerate(value)}, None])
    if isinstance(value, dict):
        keys = list(value)
        dice.shuffle(keys)
        return dice.choice([{key: value[key] for key in keys}, {}, [value], list(value), list(value.values()), None])
    return junk(dice, raw)


def spot(dice, value):
    """A random place in a document: (container, key). Shallow places are likelier than their number says."""
    while True:
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        if not isinstance(value[key], (dict, list)) or not value[key] or dice.random() < 0.2:
            return value, key
        value = value[key]


def strings(value, found):
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, (dict, list)) and len(found) < 200:
            strings(item, found)
    return found


def break_json(dice, document, name):
    """One to three faults in a JSON document."""
    raw, others = Raw(), strings(document, [])
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        document = json.loads(json.dumps(document))                            # no part of it stands in two places
        if not document or not isinstance(document, (dict, list)):
            break
        box, key = spot(dice, document)
        what = dice.random()
        if name == "tokenizer.json" and what < 0.06:
            try:
                document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = dice.choice(BOMBS)
                continue
            except (KeyError, TypeError, IndexError):
                pass
        if name.endswith("index.json") and what < 0.4 and isinstance(document.get("weight_map"), dict) and document["weight_map"]:
            document["weight_map"][dice.choice(list(document["weight_map"]))] = dice.choice(NAMES)
        elif what < 0.30:
            box[key] = junk(dice, raw)
        elif what < 0.62:
            box[key] = near(dice, box[key], raw, others)
        elif what < 0.74:
            del box[key]
        elif what < 0.82 and isinstance(box, dict):                            # another name, in the same place
            new = dice.choice([key + "x", key[:-1], key.upper(), "", dice.choice(others) if others else "x", "\ud800"])
            items = [(new if old == key else old, item) for old, item in box.items()]
            box.clear()
            box.update(items)
        elif what < 0.88 and isinstance(box, dict):                            # the same name twice
            box[key + "@@again"] = dice.choice([box[key], junk(dice, raw), near(dice, box[key], raw, others)])
        elif what < 0.94:                                                      # two values change places
            other, there = spot(dice, document)
            if other is not box or there != key:
                box[key], other[there] = other[there], box[key]
                if has_loop(document):
                    box[key], other[there] = other[there], box[key]
        elif isinstance(box, dict):
            box[dice.choice(["", "extra", "type", "head_dim", "\0", "a" * 5000])] = junk(dice, raw)
        else:
            box.insert(key, dice.choice([box[key], junk(dice, raw)]))
    return raw.dump(dice, document)


def has_loop(value):
    try:
        json.dumps(value)
    except ValueError:
        return True
    return False


TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4",
         "U64": "<u8", "BOOL": "?", "BF16": "<u2"}
NUMBERS = [0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 2**64 - 8, 10**30, 1.0, 0.5, None, "1", True, [], math.nan]


def split_safetensors(raw):
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def join_safetensors(header, data, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def break_safetensors(dice, file):
    """Faults in the header and in how it fits the data; some of them harmless."""
    header, data = split_safetensors(file)
    names = [name for name in header if name != "__metadata__"]
    name, other = dice.choice(names), dice.choice(names)
    entry = header[name]
    what = dice.randrange(20)
    if what == 0:
        entry["shape"] = dice.choice([entry["shape"] * 2, entry["shape"][::-1], [], [math.prod(entry["shape"])], [-1], [2**32, 2**32], [2**63, 2],
                                      [0], [1, *entry["shape"]], None, [dice.choice(NUMBERS)]])
    elif what == 1:
        entry["dtype"] = dice.choice([*TYPES, "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "F128", "f32", "", None, 1])
    elif what == 2:
        entry["data_offsets"][dice.randrange(2)] = dice.choice([*NUMBERS, len(data), len(data) + 4, entry["data_offsets"][0] + 4])
    elif what == 3:
        entry["data_offsets"] = dice.choice([entry["data_offsets"][::-1], header[other]["data_offsets"], [], [0], [0, 0], [0, len(data)], [0, 4, 8],
                                             None])
    elif what == 4:
        header[dice.choice(["x" * 5000, "\n", "\0", "\x1b[31m", "../x", "", name + "x", "\ud800", "lm_head.weight",
                            "model.layers.99.mlp.up_proj.weight", "__metadata__"])] = header.pop(name)
    elif what == 5:
        del header[name]
    elif what == 6:
        del entry[dice.choice(list(entry))]
    elif what == 7:
        header["__metadata__"] = dice.choice([{}, None, [], {"a": 1}, {"a": None}, {"format": "tf"}, {"a": "b" * 100_000}, {"\n": "\0"},
                                              {"a": {"b": "c"}}, "pt"])
    elif what == 8:
        return join_safetensors(header, data, dice.choice([0, 1, 8, 2**31, 2**32, 2**63, 2**64 - 1, 10**8 + 1, len(file),
                                                           len(json.dumps(header)) - 1, len(json.dumps(header)) + 1]))
    elif what == 9:
        data += dice.choice([b"\0", b"\0" * 8, b"x" * 4096])
    elif what == 10:
        data = data[:-dice.choice([1, 4, 64, len(data)])]
    elif what == 11:                                                           # one name twice
        text = json.dumps(header)
        twice = json.dumps({name: dice.choice([entry, header[other], {**entry, "dtype": "I32"}])})[1:-1]
        return join_safetensors((text[:-1] + ", " + twice + "}" if dice.random() < 0.5 else "{" + twice + ", " + text[1:]).encode(), data)
    elif what == 12:                                                           # harmless: spaces behind, as the format allows
        return join_safetensors(json.dumps(header).encode() + b" " * dice.choice([1, 8, 1000]), data)
    elif what == 13:                                                           # harmless: another order of the same tensors
        tensors = [(key, header[key], data[slice(*header[key]["data_offsets"])]) for key in names]
        dice.shuffle(tensors)
        header, at, data = {}, 0, b"".join(part for _, _, part in tensors)
        for key, old, part in tensors:
            header[key] = {**old, "data_offsets": [at, at + len(part)]}
            at += len(part)
    elif what == 14:                                                           # harmless: other numbers, infinite ones too
        start, end = entry["data_offsets"]
        data = data[:start] + bytes(dice.choices([0, 0x7F, 0xFF, 0x80, 1], k=end - start)) + data[end:]
    elif what == 15:                                                           # one more tensor
        size = dice.choice([0, 4, 64])
        header[dice.choice(["lm_head.weight", "extra", "model.norm.bias"])] = {"dtype": dice.choice(["F32", "I32", "F8_E4M3", "F4"]),
                                                                               "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
        data += b"\0" * size
    elif what == 16:                                                           # a tensor that needs no bytes
        header[dice.choice(names + ["empty"])] = {"dtype": "F32", "shape": dice.choice([[0], [0, 2**40], [2**40, 0]]),
                                                  "data_offsets": [len(data)] * 2}
    elif what == 17:                                                           # the same number of bytes, read otherwise
        if entry["dtype"] == "F32":
            entry["dtype"] = dice.choice(["I32", "U32", "F32"])
            entry["shape"] = entry["shape"][::-1] if dice.random() < 0.3 else entry["shape"]
        else:
            entry["dtype"], entry["shape"] = "F64", entry["shape"]
    elif what == 18:                                                           # a small change of type that still fits
        start, end = entry["data_offsets"]
        new = dice.choice(["F64", "F16", "I64", "F8_E4M3"])
        size = {"F64": 8, "F16": 2, "I64": 8, "F8_E4M3": 1}[new] * math.prod(entry["shape"])
        data = data[:start] + bytes(size) + data[end:]
        for key in names:
            header[key]["data_offsets"] = [at + (size - (end - start)) * (at >= end) for at in header[key]["data_offsets"]] if key != name else [start, start + size]
        entry["dtype"] = new
    else:
        return join_safetensors(break_json(dice, header, "header"), data)
    return join_safetensors(header, data)


def break_lines(dice, file):
    """Faults in a file of lines: merges.txt, tokenizer.model."""
    lines = file.split(b"\n")
    for _ in range(dice.choice([1, 1, 2, 5])):
        at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
        what = dice.randrange(9)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, lines[other])
        elif what == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif what == 3:
            lines[at] += dice.choice([b" ", b"\r", b"\t", b" x", b" 1", b"\0", b"=", b"\xff"])
        elif what == 4:
            lines[at] = dice.choice([b"", b" ", b"#version: 0.2", b"a b", b"IQ== -1", b"IQ== 99999999999999999999", b"IQ== 1e3", b"!!!! 5",
                                     b"a" * 5000 + b" b", b"\xff\xfe", b"IQ==  0", b" IQ== 0"])
        elif what == 5:
            lines[at] = lines[at].replace(b" ", dice.choice([b"", b"  ", b"\t", b"\xc2\xa0"]))
        elif what == 6:
            lines[at] = lines[at].split(b" ")[0] + b" " + lines[other].split(b" ")[-1]
        elif what == 7:
            lines[at] = lines[at][::-1]
        else:
            lines[at:other] = []
            lines = lines or [b""]
    return b"\n".join(lines)


def break_bytes(dice, file, good):
    """Faults that know nothing of the format. Half of them in the first kilobyte, where the headers are."""
    def at():
        return dice.randrange(max(1, min(len(file), 1024 if dice.random() < 0.5 else len(file))))

    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        what, i = dice.randrange(12), at()
        if what < 3:
            file = file[:i] + bytes([(file[i:i + 1] or b"\0")[0] ^ 1 << dice.randrange(8)]) + file[i + 1:]
        elif what == 3:
            file = file[:i] + bytes([dice.choice([0, 10, 13, 32, 34, 44, 48, 58, 91, 93, 123, 125, 128, 255])]) + file[i + 1:]
        elif what == 4:
            file = file[:i]
        elif what == 5:
            file = file[:i] + file[i + dice.choice([1, 2, 8, 100]):]
        elif what == 6:
            file = file[:i] + dice.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\n", b'"', b"\\", b"e9", b"-",
                                           dice.randbytes(16)]) + file[i:]
        elif what == 7:
            file = file[:i] + file[at():][:200] + file[i:]
        elif what == 8:
            file = dice.choice([b"\xef\xbb\xbf" + file, b"\xff\xfe" + file, b"\xef\xbb\xbf" * 2 + file, file.replace(b"\n", b"\r\n"), file + b"\0",
                                file + b"\n}", file.decode("latin-1").encode("utf-16")])
        elif what == 9:
            other = dice.choice(list(good.files.values()))
            file = file[:i] + other[dice.randrange(len(other)):]               # two files spliced
        elif what == 10:
            file = dice.choice([b"", b"\0", b"{}", b"[]", b"null", b"0", b'""', b"NaN", b"{" * 5, b"\0" * 100_000, b"[" * 100_000, file * 2])
        else:
            file = file[:i] + b"\0" * dice.choice([1, 8, 1000]) + file[i:]
    return file


def mutant(kind, seed, number, goods):
    """Mutant `number` of a kind: (the good files it comes from, the broken file's name, all its files). The same for the same arguments."""
    dice = random.Random(f"{kind} {seed} {number}")
    good = dice.choice(goods)
    name = dice.choice(good.targets)
    file, structural = good.files[name], dice.random() < 0.7
    if not structural:
        file = break_bytes(dice, file, good)
    elif name.endswith(".safetensors"):
        file = break_safetensors(dice, file)
    elif name.endswith(".json"):
        file = break_json(dice, json.loads(file), name)
    else:
        file = break_lines(dice, file)
    return good, name, {**good.files, name: file}


# ---------------------------------------------------------------------------------------------- the second reader, and the checks


def expect(condition, message):
    if not condition:
        raise Wrong(message)


def number_of(dtype, data):
    """Bytes of a safetensors dtype as a numpy array; bfloat16 is the upper half of a float32."""
    array = np.frombuffer(data, TYPES[dtype])
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array


def read_tensors(file):
    """{name: array} of a safetensors file, from the format's definition: header length, header, data without gaps or overlaps."""
    header, data = split_safetensors(file)
    header.pop("__metadata__", None)
    header = {name: dict(zip(("dtype", "shape", "data_offsets"), entry)) if isinstance(entry, list) else entry
              for name, entry in header.items()}    # the library reads both
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in header.values()):
        expect(start == end <= stop, "gaps or overlaps in the data")
        end = stop
    expect(end == len(data), "data that no tensor has")
    return {name: number_of(entry["dtype"], data[slice(*entry["data_offsets"])]).reshape(entry["shape"]) if entry["dtype"] in TYPES else entry["dtype"]
            for name, entry in header.items()}


def write_tensors(arrays):
    return save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, {"format": "pt"})


def same(array, tensor):
    ours = tensor.numpy()
    return not isinstance(array, str) and array.shape == ours.shape and np.array_equal(array.astype(ours.dtype), ours,
                                                                                       equal_nan=ours.dtype.kind == "f")


@torch.inference_mode()
def logits(model):
    return model(torch.arange(24)[None] % model.config.vocab_size)


def object_of(file):
    value = json.loads(file.decode("utf-8"))
    expect(isinstance(value, dict), "accepted JSON that is no object")
    return value


def took():
    """To be called when the project's own code has read the files: what the second reader takes does not count."""
    PEAK.append(memory("VmHWM"))


PEAK = []


def check_weights(good, files, folder):
    model = Transformer.from_pretrained(folder)
    took()
    if "model.safetensors" in files:
        names = ["model.safetensors"]
    else:
        names = sorted({*object_of(files["model.safetensors.index.json"])["weight_map"].values()})
        expect(all(name in files for name in names), f"shards {names}")
    tensors = {}
    for name in names:
        found = read_tensors(files[name])
        expect(not found.keys() & tensors.keys(), "a tensor in two shards")
        tensors |= found
    ours = {theirs: weight for _, theirs, weight in model._named()}
    if "lm_head.weight" not in ours and (head := tensors.pop("lm_head.weight", None)) is not None:
        expect(same(head, ours["model.embed_tokens.weight"].detach()), "a tied head that differs")
    expect(ours.keys() == tensors.keys(), f"other tensors: {sorted(ours.keys() ^ tensors.keys())[:4]}")
    for name, weight in ours.items():
        expect(same(tensors[name], weight.detach()), f"{name} has other numbers than the file")
    logits(model)


# Field of Config -> the keys of config.json that it may depend on, besides model_type.
LAYERS = {"layer_types", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "num_hidden_layers"}
DEPENDS = {
    "vocab_size": {"vocab_size"}, "d": {"hidden_size"}, "d_m": {"intermediate_size"}, "n_layers": {"num_hidden_layers"},
    "n_heads": {"num_attention_heads"},
    "n_kv_heads": {"num_key_value_heads", "num_attention_heads"}, "head_dim": {"head_dim", "hidden_size", "num_attention_heads"},
    "norm_eps": {"rms_norm_eps"},
    "act": {"hidden_act", "hidden_activation"}, "tied": {"tie_word_embeddings"}, "layer_types": LAYERS, "window": LAYERS | {"sliding_window"},
    "rope": LAYERS | {"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "max_position_embeddings"},
    "attn_scale": {"query_pre_attn_scalar", "head_dim", "hidden_size", "num_attention_heads"}, "attn_softcap": {"attn_logit_softcapping"},
    "final_softcap": {"final_logit_softcapping"}, "eos_ids": {"eos_token_id"}, "qkv_bias": set(), "qk_norm": set(), "norm_offset": set(),
    "four_norms": set(), "scale_embeddings": set(),
}
COPIES = {"vocab_size": "vocab_size", "d": "hidden_size", "d_m": "intermediate_size", "n_layers": "num_hidden_layers",
          "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
          "head_dim": "head_dim", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings", "attn_softcap": "attn_logit_softcapping",
          "final_softcap": "final_logit_softcapping"}


def check_config(good, files, folder):
    if "model.safetensors" in files:
        model = Transformer.from_pretrained(folder)
        config = model.config
    else:
        config = Config.from_pretrained(folder)
        with torch.device("meta"):
            Transformer(config)
    took()
    read, before, was = object_of(files["config.json"]), json.loads(good.files["config.json"]), good.about["config"]
    changed = {key for key in read.keys() | before.keys() if json.dumps(read.get(key)) != json.dumps(before.get(key))}
    moved = [name for name, keys in DEPENDS.items() if getattr(config, name) != getattr(was,
                                                                                        name) and not keys & changed and "model_type" not in changed]
    further = object_of(files["generation_config.json"]).get("eos_token_id") if "generation_config.json" in files else None
    ends = [id for value in (read.get("eos_token_id"), further) for id in (value if isinstance(value, list) else [value]) if id is not None]
    if "eos_ids" in moved:
        moved.remove("eos_ids")                                                # also said by generation_config.json; checked whole, below
    expect(not moved, f"{moved} changed with {sorted(changed)}")
    expect(list(dict.fromkeys(config.eos_ids)) == list(dict.fromkeys(ends)), f"eos ids {config.eos_ids}, in the files {ends}")
    expect(all(type(id) is int and id >= 0 for id in ends), f"eos ids {ends!r:.60}")
    for name, key in COPIES.items():
        value = read.get(key)
        if value is not None:
            ours = getattr(config, name)
            expect(ours == value and isinstance(ours, bool) == isinstance(value, bool) and isinstance(value, (bool, int, float)),
                   f"{key} {value!r:.40} was read as {ours!r:.40}")
    family = FAMILIES[read["model_type"]]
    expect(all(getattr(config, trait) == family.get(trait, type(getattr(config, trait))()) for trait in ("qkv_bias", "qk_norm", "norm_offset",
            "four_norms", "scale_embeddings")), "traits of another family")
    act = read.get("hidden_activation") or read.get("hidden_act")
    expect(act is None or config.act == act and act in ACTIVATIONS, f"activation {act!r:.40} was read as {config.act}")
    if read.get("layer_types") is not None:
        expect(list(config.layer_types) == read["layer_types"], "other layer types")
    elif read.get("use_sliding_window") is True:
        first = read.get("max_window_layers")
        expect(first is None or config.layer_types.count(GLOBAL) == min(first, config.n_layers), "another first local layer")
    for key in (*(["use_sliding_window"] if read.get("layer_types") is None else []), "tie_word_embeddings", "attention_bias", "mlp_bias",
                "use_bidirectional_attention"):
        expect(read.get(key) in (None, False, True), f"{key} {read.get(key)!r:.40} is no flag")
    if LOCAL in config.layer_types and read.get("sliding_window") is not None:
        expect(config.window == read["sliding_window"], "another window")
    for kind, rope in config.rope.items():
        source = read.get("rope_parameters")
        local = kind == LOCAL and "rope_parameters" not in read and (read.get("rope_local_base_freq") is not None or read["model_type"] == "gemma3_text")
        said = source.get(kind, source) if isinstance(source, dict) else {} if local else read.get("rope_scaling") or {}
        base = read.get("rope_local_base_freq") if local else read.get("rope_theta")
        theta = said.get("rope_theta", base)
        expect(theta is None or rope["rope_theta"] == theta, f"rope_theta {theta!r:.40} was read as {rope['rope_theta']!r:.40}")
        expect(all(rope.get(key) == value or json.dumps(rope.get(key)) == json.dumps(value) for key, value in said.items() if key != "rope_type"),
               "other rotary settings")
        expect(rope["rope_type"] == said.get("rope_type", said.get("type", "default")), "another rope_type")
    scalar = read.get("query_pre_attn_scalar")
    expect(math.isclose(config.attn_scale, (scalar if scalar is not None else config.head_dim if "query_pre" not in str(was.raw) else config.attn_scale ** -2) ** -0.5), "another attention scale")
    if "model.safetensors" not in files:
        return
    now = logits(model)
    if all(getattr(config, name) == getattr(was, name) for name in DEPENDS if name != "eos_ids"):
        expect(torch.equal(now, good.about["logits"]), "the same configuration, other logits")
    out = folder.parent / "out"
    model.save_pretrained(out)
    again = Transformer.from_pretrained(out)
    expect(all(getattr(again.config, name) == getattr(config, name) for name in DEPENDS), "saved, it is another model")
    expect(all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True)), "saved, it has other weights")


def flag(section, key, default=False):
    value = section.get(key, default)
    expect(isinstance(value, bool), f"{key} {value!r:.40} is no flag")
    return value


class ByHand:
    """A tokenizer's files, applied rule by rule. `ids(text)` is None where this reader does not know the rule."""

    def __init__(self, files):
        configs = [object_of(files[name]) if name in files else {} for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")]
        self.named = configs
        self.ranked = False
        self.front = []
        if "tokenizer.json" in files:
            spec = object_of(files["tokenizer.json"])
            self.added = spec.get("added_tokens") or []
            self.from_spec(spec)
        elif "tokenizer.model" in files:
            character = {b: c for c, b in CHAR_TO_BYTE.items()}
            pairs = [line.split() for line in files["tokenizer.model"].splitlines()]
            self.vocab = {"".join(character[b] for b in base64.b64decode(token, validate=True)): int(rank) for token, rank in pairs}
            expect(len(self.vocab) == len(pairs), "a token on two lines")
            self.ranked, self.whole, self.words, self.prefix, self.nfc, self.bytes, self.added = True, True, LLAMA_WORDS, False, False, True, None
            self.front = [len(self.vocab)]
        else:
            self.vocab = object_of(files["vocab.json"])
            self.merges = [line.split(" ") for line in files["merges.txt"].decode("utf-8").replace("\r\n", "\n").replace("\r",
                    "\n").split("\n") if line and not line.startswith("#version")]
            decoder = configs[0].get("added_tokens_decoder") or {}
            self.added = [token | {"id": int(id)} for id, token in decoder.items()] or None
            self.whole, self.words, self.prefix, self.nfc, self.bytes = False, QWEN_WORDS, False, True, True
        listed = self.added or []
        for token in listed:
            for key in ("special", "normalized", "lstrip", "rstrip", "single_word"):
                flag(token, key)
            expect(isinstance(token["content"], str) and token["content"], "an added token without text")
        self.ordinary = [t["content"] for t in listed if not t.get("special") and t["content"] in self.vocab and t["content"].replace("▁",
                " ").isspace()]
        self.late = any(t.get("normalized") for t in listed)
        self.control = {t["content"] for t in listed} - {*self.ordinary}
        if not self.bytes:
            self.control |= BYTE_TOKENS.keys()
        self.names = {id: token for token, id in self.vocab.items()} | {t["id"]: t["content"] for t in listed}
        self.place = {} if self.ranked else {tuple(merge): n for n, merge in enumerate(self.merges) if "".join(merge) not in self.control}

    def from_spec(self, spec):
        model = spec["model"]
        self.vocab = model["vocab"]
        self.merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        self.whole = flag(model, "ignore_merges")
        steps = {key: [] if spec.get(key) is None else spec[key][inner] if spec[key]["type"] == "Sequence" else [spec[key]]
                 for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("post_processor", "processors"))}
        cuts = steps["pre_tokenizer"]
        self.bytes = bool(cuts) and cuts[-1]["type"] == "ByteLevel"
        self.nfc = steps["normalizer"] == [{"type": "NFC"}]
        if self.bytes:
            self.prefix = flag(cuts[-1], "add_prefix_space", True)             # and byte_fallback and fuse_unk mean nothing here
            self.words = GPT2_WORDS if flag(cuts[-1], "use_regex", True) else r"[\s\S]+"
            if len(cuts) > 1:
                flag(cuts[0], "invert")
                (kind, self.words), = cuts[0]["pattern"].items()
                expect(kind in ("Regex", "String") and isinstance(self.words, str), f"a pattern {kind!r:.40}")
                self.words = regex.escape(self.words) if kind == "String" else self.words
        else:
            self.fallback, self.fuse = flag(model, "byte_fallback"), flag(model, "fuse_unk")
        for step in steps["post_processor"]:
            if step["type"] == "TemplateProcessing":
                names = [part["SpecialToken"]["id"] for part in step["single"][:-1]]
                self.front = [id for name in names for id in step["special_tokens"][name]["ids"]] + self.front

    def joined(self, word):
        parts = [*word]
        while len(parts) > 1:
            pairs = [(self.vocab.get(a + b, math.inf) if self.ranked else self.place.get((a, b), math.inf), i) for i, (a, b) in enumerate(zip(parts,
                    parts[1:]))]
            best, i = min(pairs)
            if best == math.inf:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def ids(self, text):
        if self.late or any("\ud800" <= c <= "\udfff" for token in self.ordinary for c in token):
            return None
        if self.bytes and self.words not in (LLAMA_WORDS, QWEN_WORDS, GPT2_WORDS, r"[\s\S]+"):
            return None
        out = []
        parts = re.split("(" + "|".join(map(re.escape, sorted(self.ordinary, key=len, reverse=True))) + ")", text) if self.ordinary else [text]
        for n, piece in enumerate(parts):
            if n % 2:
                out.append(self.vocab[piece])
            elif piece:
                found = self.by_bytes(piece) if self.bytes else self.by_characters(piece.replace(" ", "▁"))
                if found is None:
                    return None
                out += found
        return out

    def by_bytes(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        text = " " + text if self.prefix and text[0] != " " else text
        printable = {b: c for c, b in CHAR_TO_BYTE.items()}
        out = []
        for word in regex.findall(f"{self.words}|[\\s\\S]", text):
            word = "".join(printable[b] for b in word.encode())
            whole = self.whole and word in self.vocab and word not in self.control
            out += [self.vocab[part] for part in ([word] if whole else self.joined(word))]
        return out

    def by_characters(self, text):
        out, pieces, run = [], [], ""
        for character in text:
            if character in self.vocab and character not in self.control:
                run += character
            else:
                pieces += [run, character]
                run = ""
        for n, piece in enumerate(pieces + [run]):
            if n % 2 == 0:
                out += [self.vocab[part] for part in self.joined(piece)]
                continue
            names = [f"<0x{b:02X}>" for b in piece.encode()]
            if not self.fallback or not all(name in self.vocab for name in names):
                return None                                                    # unk has rules of its own, which test_06 checks
            out += [self.vocab[name] for name in names]
        return out

    def means(self, text):
        """What encoding and decoding must give back."""
        if not self.bytes:
            return text if "▁" not in text else None
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return " " + text if self.prefix and text and text[0] != " " else text


def check_tokenizer(good, files, folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    everything = [[tokenizer.encode(text, bos, special) for text in TEXTS] for bos in (True, False) for special in (True, False)]
    took()
    plain = everything[3]
    for one in everything:
        for ids in one:
            expect(all(type(id) is int and id >= 0 for id in ids), f"ids {ids!r:.60}")
            expect(isinstance(tokenizer.decode(ids), str), "no text")
    expect(max(map(max, filter(None, plain))) <= tokenizer.max_id, "an id above max_id")
    hand = ByHand(files)
    for text, ids in zip(TEXTS, plain):
        by_hand, means = hand.ids(text), hand.means(text)
        expect(by_hand is None or ids == by_hand, f"{text!r:.40} became {ids[:20]}, by hand {by_hand and by_hand[:20]}")
        if means is not None and (hand.bytes or by_hand is not None):
            expect(tokenizer.decode(ids) == means, f"{text!r:.40} came back as {tokenizer.decode(ids)!r:.40}")
    expect(tokenizer.encode("") == hand.front, f"in front {tokenizer.encode('')}, in the file {hand.front}")
    for token in hand.added or []:
        if tokenizer.decode([token["id"]]).encode() and not token.get("normalized") and token["content"] in hand.control - BYTE_TOKENS.keys():
            expect(tokenizer.encode(token["content"], bos=False) == [token["id"]], f"added token {token['content']!r:.40}")
    for which in ("bos", "eos", "pad"):
        ours = getattr(tokenizer, f"{which}_id")
        expect(ours is None or type(ours) is int and ours >= 0, f"{which}_id {ours!r:.40}")
        for config in hand.named[:2]:
            if which + "_token" in config:
                said = config[which + "_token"]
                said = said["content"] if isinstance(said, dict) else said
                expect(ours is None if said is None else said == tokenizer._names[ours], f"{which}_token {said!r:.40} was read as {ours}")
                break


def check_tasks(good, files, folder):
    task, split = good.about["task"], good.about["split"]
    examples = tasks.load(folder, task.name, split)
    took()
    rows = json.loads(files[f"{task.name}/{split}.json"].decode("utf-8-sig"))
    expect(len(examples) == len(rows), f"{len(examples)} examples of {len(rows)} rows")
    for index, (example, row) in enumerate(zip(examples, rows)):
        more = row.get("input")
        expect(more is None or isinstance(more, str), f"input {more!r:.40} is no text")
        prompt = row["instruction"] if task.kind == "cloze" else row["instruction"] + "\n" + (more + "\n" if more else "") + (tasks.THINK if task.kind == "arithmetic" else "")
        answer = row["answer"] if isinstance(row["answer"], str) else str(row["answer"])
        expect((example.index, example.task, example.prompt, example.answer) == (index, task.name, prompt, answer),
               f"row {index} became {example!r:.200}")
        if example.choices:
            expect(answer in example.choices and len(set(example.choices)) == len(example.choices) > 1,
                   f"row {index}: choices {example.choices!r:.60}")
        else:
            expect(math.isfinite(float(answer)), f"row {index}: answer {answer!r:.40}")
        if task.kind in ("value", "cloze") and "choices" in row:
            expect(list(example.choices) == row["choices"], "other choices")
        if task.kind == "cloze":
            expect(example.response == " " + answer, "another response")
        elif task.kind != "arithmetic":
            expect(example.response == tasks.TRIGGER + answer, "another response")
        else:
            expect(example.response.count(tasks.FINAL) or example.response == row["output"], "another rationale")
        for text in (example.prompt, example.response, example.answer, *example.choices):
            expect(not re.search("[\ud800-\udfff]", text), f"row {index}: half a surrogate pair")
        tasks.judge(example, example.response)


def check_profile(good, files, folder):
    model, steering = good.about["model"], good.about["steering"]
    profile = evaluation.load_profile(folder / evaluation.PROFILE, model, steering)
    took()
    tensors = read_tensors(files[evaluation.PROFILE])
    expect(profile.keys() == {*METHODS[steering.method].needs}, f"tensors {sorted(profile)}")
    for name, tensor in profile.items():
        expect(same(tensors[name], tensor) and tensor.dtype == (torch.long if name in ("semantic", "activation") else torch.float32),
               f"{name} has other numbers than the file")
    known = steering.knowing(profile)
    expect(known.known.isfinite().all() and list(known.known.shape[:2]) == [model.config.n_layers, model.config.d_m],
           "the method cannot be set up with it")
    tokens = torch.arange(12)[None]
    _, flux, reward = model.hidden(tokens, known)
    expect(flux.shape == reward.shape == (model.config.n_layers, 1, 12), "the steered model has another shape")


def check_run(good, files, folder):
    runs, trained = evaluation.find_runs(folder), evaluation.runs_from(folder, "toy/llama")
    evaluation.comparison_table(evaluation.compare(runs))
    took()
    count, found = Counter((run["arm"], run["seed"]) for run in runs), {(run["arm"], run["seed"]): run for run in runs}
    for name in sorted(files):
        run, args = name.removesuffix("/args.json"), object_of(files[name])
        if not name.endswith("/args.json"):
            continue
        expect(evaluation.read_run(folder / run) == args or "NaN" in json.dumps(args), "other settings")
        if "model" not in args:
            continue
        scores = {task: object_of(files[f"{run}/eval/{task}.json"]) for task in ("toy-facts", "toy-sums", "boolq")}
        if args.get("base"):
            arm = "base"
        else:
            steering = evaluation.as_steering(args["steering"])
            arm = evaluation.arm_name(steering)
            for key, value in args["steering"].items():
                ours = getattr(steering, key)
                expect(isinstance(ours, bool) == isinstance(value, bool) and (key == "layers" or ours == value),
                       f"{key} {value!r:.40} was read as {ours!r:.40}")
        ours = found.get((arm, args.get("seed")))
        expect(ours is not None, f"run {run} was not found")
        expect(count[arm, args.get("seed")] > 1 or ours["scores"] == {score["task"]: score["accuracy"] for score in scores.values()}, "other scores")
        expect(all(0 <= score["accuracy"] <= 1 and not isinstance(score["accuracy"], bool) and score["task"] == task
                   for task, score in scores.items()), "a score that cannot be")
        expect(arm == "base" or (arm, args["seed"], folder / run) in trained or Path(args["model"]).resolve() != Path("toy/llama").resolve(),
               "not among the trained runs")


KINDS = {"config": (good_configs, check_config), "weights": (good_weights, check_weights), "tokenizer": (good_tokenizers, check_tokenizer),
         "tasks": (good_tasks, check_tasks),
         "profile": (good_profiles, check_profile), "run": (good_runs, check_run)}


# ------------------------------------------------------------------------------------------------------------ running mutants


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def memory(which):
    """VmRSS or VmHWM (its peak) of this process, in bytes; 0 where the system does not say."""
    try:
        return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(which)).split()[1])
    except OSError:
        return 0


def forget_peak():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def fault_of(message, folder):
    """What is wrong with a refusal's message, or ""."""
    if not message.strip():
        return "an empty message"
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters"
    if not message.isprintable():
        return "a message with control characters"
    return "" if message.startswith((str(folder), "text: ")) else "a message that does not begin with the folder"


class Watch:
    """Notes what Python code writes, renames, removes or starts outside the output folder. Installed once per process, for good."""

    def __init__(self, allowed):
        self.allowed, self.seen, self.on = str(allowed), [], False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.on or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
                                        "os.system", "subprocess.Popen", "os.posix_spawn", "os.fork",
                                        "os.chmod", "socket.connect", "shutil.rmtree"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        paths = [os.path.realpath(os.fsdecode(path)) for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike)) and path not in ("w",
                "wb", "a", "x", "r+")]
        if not paths or not all(path == self.allowed or path.startswith(self.allowed + os.sep) for path in paths):
            self.seen.append(f"{event} {paths}")


def listing(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.relative_to(place).parts[0] != "out")


def run_one(check, good, files, there, place, watch, printed):
    """Run one mutant in this process -> (outcome, why, memory). there: the files that the last one left, of which few differ."""
    folder = place / "case"
    shutil.rmtree(place / "out", ignore_errors=True)
    for name in there.keys() - files.keys():
        (folder / name).unlink()
    write(folder, {name: data for name, data in files.items() if there.get(name) is not data})
    there.clear()
    there.update(files)
    before = listing(place)
    PEAK.clear()
    forget_peak()
    at_first, watch.on, why = memory("VmRSS"), True, ""
    try:
        check(good, files, folder)
        outcome = "accepted"
    except Wrong as error:
        outcome, why = "failed", f"accepted with another meaning: {error}"
    except BadInput as error:
        message = str(error)
        fault = fault_of(message, folder)
        outcome, why = ("failed", f"{fault}: {message[:300]!r}") if fault else ("refused", message.replace(str(folder), "DIR"))
    except BaseException as error:                                             # a library's panic is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-3:]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
        outcome, why = "failed", f"{type(error).__name__}: {str(error)[:200]} at {places}"
    watch.on = False
    grew, allowed = (PEAK or [memory("VmHWM")])[0] - at_first, MEMORY_FACTOR * sum(map(len, files.values())) + MEMORY_CONSTANT
    sys.stdout.flush()
    if outcome != "failed" and grew > allowed:
        outcome, why = "failed", f"took {grew >> 20} MiB, {allowed >> 20} are allowed"
    if outcome != "failed" and (watch.seen or listing(place) != before):
        outcome, why = "failed", f"wrote outside the output folder: {watch.seen[:3] or listing(place)[:8]}"
        shutil.rmtree(folder)
        there.clear()
    if outcome != "failed" and os.fstat(printed).st_size:
        outcome, why = "failed", f"printed {os.pread(printed, 200, 0)!r}"
    os.ftruncate(printed, 0)
    os.lseek(printed, 0, os.SEEK_SET)
    watch.seen.clear()
    return outcome, why, grew


def child(pipe, kind, check, seed, numbers, goods, place):
    """The forked process: runs mutants one after the other and writes a line before and after each. Never returns."""
    try:
        printed = os.open(place / "printed", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        virtual = memory("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (virtual + (3 << 30),) * 2 if virtual else (resource.RLIM_INFINITY,) * 2)
        torch.set_num_threads(1)
        gc.freeze()
        watch = Watch(place / "out")
        shutil.rmtree(place / "case", ignore_errors=True)
        (place / "case").mkdir()
        there = {}
        for number in numbers:
            good, name, files = mutant(kind, seed, number, goods)
            os.write(pipe, json.dumps({"start": number}).encode() + b"\n")
            start = time.monotonic()
            outcome, why, grew = run_one(check, good, files, there, place, watch, printed)
            os.write(pipe, json.dumps({"number": number, "from": good.name, "file": name, "outcome": outcome, "why": why,
                                       "seconds": time.monotonic() - start, "grew": grew}).encode() + b"\n")
            gc.collect(0)
    except BaseException:
        os.write(pipe, json.dumps({"broken": traceback.format_exc()}).encode() + b"\n")
    os._exit(0)


def run(kind, seed, numbers, check=None, goods=None, done=lambda result: None, seconds=SECONDS):
    """Run mutants of a kind in forked processes -> a result for each: number, from, file, outcome, why, seconds, grew.

    check, goods    other than the kind's own: for testing this file
    """
    goods, check = goods or list(KINDS[kind][0]()), check or KINDS[kind][1]
    results, left, again = [], list(numbers), set()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        for name in ("model-00001-of-00002.safetensors", "model.safetensors", "config.json", "tokenizer.json"):
            (place / name).write_bytes(goods[0].files.get(name, b"{}"))        # a way out of the folder would find something
        while left:
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                child(writing, kind, check, seed, left, goods, place)
            os.close(writing)
            text, current, since, dead = b"", None, time.monotonic(), ""
            try:
                while not dead:
                    ready, _, _ = select.select([reading], [], [], max(0.01, since + seconds - time.monotonic()) if current is not None else 60)
                    if not ready:
                        dead = f"more than {seconds} s"
                        break
                    piece = os.read(reading, 1 << 16)
                    if not piece:
                        break
                    text += piece
                    *lines, text = text.split(b"\n")
                    for line in lines:
                        line = json.loads(line)
                        if "broken" in line:
                            raise RuntimeError(f"the fuzzer itself failed on a mutant of {kind}, seed {seed}: {line['broken']}")
                        if "start" in line:
                            current, since = line["start"], time.monotonic()
                        else:
                            results.append(line)
                            left.remove(current)
                            current = None
                            done(line)
            finally:
                os.kill(pid, signal.SIGKILL)
                os.close(reading)
                status = os.waitpid(pid, 0)[1]
            if current is None and left:
                raise RuntimeError(f"the forked process ended early, status {status}")
            if current is not None:
                if dead and current not in again:                              # a busy machine? It gets a second chance, alone
                    again.add(current)
                    continue
                good, name, _ = mutant(kind, seed, current, goods)
                why = dead or f"the process died of signal {os.WTERMSIG(status)}"
                results.append({"number": current, "from": good.name, "file": name, "outcome": "failed", "why": why,
                                "seconds": time.monotonic() - since, "grew": 0})
                left.remove(current)
                done(results[-1])
    return results


def keep(folder, kind, seed, result, goods):
    """Save a failed mutant's files, and why it failed."""
    good, name, files = mutant(kind, seed, result["number"], goods)
    place = Path(folder, f"{kind}-{seed}-{result['number']}")
    shutil.rmtree(place, ignore_errors=True)
    write(place / "files", files)
    (place / "why.txt").write_text(f"{name}, from {good.name}\n{result['why']}\npython tests/fuzz.py --kind {kind} --seed {seed} --only {result['number']}\n", encoding="utf-8", errors="backslashreplace")
    return place


def main():
    parser = Parser(prog="fuzz.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="""
Exit status: 0 if every mutant was accepted with its meaning or refused in one line, 1 if one was not. Mutant n of a seed is always the same.""")
    parser.add_argument("--mutants", type=evaluation.positive, default=10_000, metavar="N", help="how many, over all kinds (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other mutants (default: 0)")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="the kinds of files to break (default: all)")
    parser.add_argument("--only", type=int, metavar="N", help="run only mutant N of the kind and show what became of it")
    parser.add_argument("--keep", default="fuzz-failures", metavar="DIR", help="where mutants that fail are saved (default: fuzz-failures)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failures, lines = 0, [f"{'kind':<11}{'mutants':>8}{'accepted':>10}{'refused':>9}{'failed':>8}{'slowest':>10}{'most memory':>13}{'time':>8}"]
    for at, kind in enumerate(args.kind):
        goods, start = list(KINDS[kind][0]()), time.monotonic()
        numbers = [args.only] if args.only is not None else range(args.mutants // len(args.kind) + (at < args.mutants % len(args.kind)))
        with tqdm(total=len(numbers), desc=kind, unit="mutant", disable=None) as bar:
            results = run(kind, args.seed, numbers, goods=goods, done=lambda result: bar.update())
        count = Counter(result["outcome"] for result in results)
        lines.append(f"{kind:<11}{len(results):>8}{count['accepted']:>10}{count['refused']:>9}{count['failed']:>8}{max(r['seconds'] for r in results):>8.2f} s"
                     f"{max(r['grew'] for r in results) >> 20:>9} MiB{time.monotonic() - start:>6.0f} s")
        for result in results:
            if result["outcome"] == "failed":
                failures += 1
                print(f"{kind} {result['number']} ({result['file']}, from {result['from']}): {result['why']}\n    kept in {keep(args.keep, kind, args.seed, result, goods)}")
            elif args.only is not None:
                print(f"{result['file']}, from {result['from']}: {result['outcome']} {result['why']}")
    print("\n".join(lines))
    if failures:
        print(f"{failures} failed; run one again with: python tests/fuzz.py --seed {args.seed} --kind KIND --only N")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
