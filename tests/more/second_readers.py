"""What the bytes of a file mean, by a second reader that shares no code with the first: written
here from the formats' definitions, slowly. `fuzz.py` holds the project's own readers against them.

Each check takes what the project read, the files as {name: bytes}, the good files from which they
were made, and a folder to write to. It raises Wrong where the project accepted what it should not,
or made something else of it.
"""
import base64
import json
import math
import re
import unicodedata
from collections import Counter

import numpy as np
import regex
import torch

from data import tasks
from data.tokenizer import (
    BYTE_TOKENS, CHAR_TO_BYTE, EVERYTHING, GPT2_WORDS, LLAMA_WORDS, QWEN_WORDS)
from eval import steering_from
from model import GLOBAL, LOCAL, Transformer


class Wrong(Exception):
    """A reader accepted what it should not, or made something else of it."""


def expect(condition, message):
    if not condition:
        raise Wrong(message)


def object_of(file):
    value = json.loads(file.decode("utf-8-sig"))
    expect(isinstance(value, dict), "accepted JSON that is no object")
    return value


@torch.inference_mode()
def logits(model):
    return model(torch.arange(24)[None] % model.config.vocab_size)


# ------------------------------------------------------------------------- safetensors files

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
         "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn}
SAFETENSORS = "model.safetensors"


def split_safetensors(file):
    """Bytes -> (header as an object, data)."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8:8 + size]), file[8 + size:]


def entries_of(file):
    """Bytes -> {name: (dtype, shape, bytes)}; between the tensors there are no gaps or overlaps."""
    header, data = split_safetensors(file)
    header.pop("__metadata__", None)
    found, end = {}, 0
    for name, entry in header.items():             # the library also reads an entry that is a list
        if isinstance(entry, dict):
            entry = [entry[key] for key in ("dtype", "shape", "data_offsets")]
        found[name] = entry
    for start, stop in sorted(offsets for _, _, offsets in found.values()):
        expect(start == end <= stop, "gaps or overlaps in the data")
        end = stop
    expect(end == len(data), "data that no tensor has")
    return {name: (dtype, shape, data[slice(*offsets)])
            for name, (dtype, shape, offsets) in found.items()}


def numbers_of(entry):
    """(dtype, shape, bytes) of a weight -> its numbers; bfloat16 is half of a float32."""
    dtype, shape, data = entry
    expect(dtype in ("F32", "F16", "BF16"), f"weights of type {dtype!r:.20}")
    array = np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
    array = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array.astype("<f4")
    return array.reshape(shape)


def check_weights(model, files, good, out):
    names = [SAFETENSORS]
    if SAFETENSORS not in files:
        names = sorted({*object_of(files["model.safetensors.index.json"])["weight_map"].values()})
        expect({*names} <= {*files}, f"shards {names}")
    entries = {}
    for name in names:
        found = entries_of(files[name])
        expect(not found.keys() & entries.keys(), "a tensor in two shards")
        entries |= found
    ours = {theirs: weight.detach().numpy() for _, theirs, weight in model._named()}
    if "lm_head.weight" in entries:                # a tied head may be stored too
        ours.setdefault("lm_head.weight", ours["model.embed_tokens.weight"])
    expect(ours.keys() == entries.keys(), f"others: {sorted(ours.keys() ^ entries.keys())[:4]}")
    for name, weight in ours.items():
        expect(np.array_equal(numbers_of(entries[name]), weight, equal_nan=True),
               f"{name} has other numbers than the file")
    logits(model)


def check_memory(steering, files, good, out):
    entry, = (entries_of(file)["per_memory"] for file in files.values())
    ours = steering.per_memory
    expect((TYPES[entry[0]], entry[1]) == (ours.dtype, list(ours.shape)), "another type or shape")
    expect(entry[2] == ours.flatten().view(torch.uint8).numpy().tobytes(), "other bytes")
    expect(steering.settings == good.about["steering"].settings, "other settings")


# ------------------------------------------------------------------------------- config.json

GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
         "tie_word_embeddings": True}
DEFAULTS = {                           # of the families, for keys that published files leave out
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 128},
    "gemma2": {**GEMMA, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0},
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 6, "rope_theta": 1e6,
                    "rope_local_base_freq": 1e4}}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
         "num_attention_heads", "num_key_value_heads", "sliding_window")
FLAGS = ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias",
         "use_bidirectional_attention")


def config_by_hand(raw, ends):
    """Every field of Config, from config.json and the end-of-sequence ids of all files."""
    family, gemma = raw["model_type"], "gemma" in raw["model_type"]
    said = {key: value for key, value in raw.items()           # a null means the default
            if value is not None or key.endswith("softcapping")}
    say = {**DEFAULTS[family], **said}.get
    heads, layers = say("num_attention_heads"), range(say("num_hidden_layers"))
    head_dim = say("head_dim", max(1, say("hidden_size") // heads))
    every, kinds = say("sliding_window_pattern"), say("layer_types")
    if kinds is None and say("use_sliding_window"):
        first = say("max_window_layers", 28)
        kinds = [LOCAL if layer >= first else GLOBAL for layer in layers]
    kinds = kinds or [LOCAL if every and (n + 1) % every else GLOBAL for n in layers]
    ropes = {}
    for kind in {*kinds}:
        theta, scaling = say("rope_theta", 1e4), say("rope_scaling", {})
        if kind == LOCAL and say("rope_local_base_freq") is not None:
            theta, scaling = say("rope_local_base_freq"), {}
        scaling = say("rope_parameters", scaling)
        ropes[kind] = {
            "rope_theta": theta, "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": say("max_position_embeddings"),
            "rope_type": scaling.get(kind, scaling).get("type", "default"),
            **scaling.get(kind, scaling)}
    act = say("hidden_act", "gelu_pytorch_tanh" if gemma else "silu")
    return dict(
        vocab_size=say("vocab_size"), d=say("hidden_size"), d_m=say("intermediate_size"),
        n_layers=len(layers), n_heads=heads, n_kv_heads=say("num_key_value_heads", heads),
        head_dim=head_dim, norm_eps=say("rms_norm_eps", 1e-6), layer_types=kinds, rope=ropes,
        act=say("hidden_activation", act), tied=say("tie_word_embeddings", False),
        window=say("sliding_window") if LOCAL in kinds else None,
        attn_scale=say("query_pre_attn_scalar", head_dim) ** -0.5,
        attn_softcap=say("attn_logit_softcapping"), final_softcap=say("final_logit_softcapping"),
        qkv_bias=family == "qwen2", qk_norm=family in ("qwen3", "gemma3_text"),
        norm_offset=1.0 if gemma else 0.0, four_norms=gemma, scale_embeddings=gemma, eos_ids=ends)


def fields_of(config):
    """{field: text} of a Config, without the raw dictionary."""
    fields = config if isinstance(config, dict) else vars(config)
    return {name: json.dumps(value, sort_keys=True) for name, value in fields.items()
            if name != "raw"}


def check_config(read, files, good, out):
    config, model = read
    raw = object_of(files["config.json"])
    ends = [id for name in ("config.json", "generation_config.json") if name in files
            for ids in [object_of(files[name]).get("eos_token_id")]
            for id in (ids if isinstance(ids, list) else [ids]) if id is not None]
    for key in SIZES:
        expect(raw.get(key) is None or type(raw[key]) is int and raw[key] > 0, f"{key} is no size")
    for key in FLAGS:
        expect(raw.get(key) in (None, False, True), f"{key} is no flag")
    expect(all(type(id) is int and id >= 0 for id in ends), f"eos ids {ends!r:.60}")
    ours, by_hand = fields_of(config), fields_of(config_by_hand(raw, list(dict.fromkeys(ends))))
    wrong = [name for name in by_hand if ours[name] != by_hand[name]]
    expect(not wrong, f"{wrong} are {[ours[name][:40] for name in wrong]}")
    if model is None:
        return
    now, before = logits(model), {**fields_of(good.about["config"]), "eos_ids": ours["eos_ids"]}
    expect(ours != before or torch.equal(now, good.about["logits"]), "other logits")
    model.save_pretrained(out)
    again = Transformer.from_pretrained(out)
    expect(fields_of(again.config) == ours, "saved, it is another model")
    expect(all(torch.equal(one, two) for one, two in zip(
        model.parameters(), again.parameters(), strict=True)), "saved, it has other weights")


# -------------------------------------------------------------------------------- tokenizers


def flag(section, key, default=False):
    value = default if section.get(key) is None else section[key]
    expect(isinstance(value, bool), f"{key} {value!r:.40} is no flag")
    return value


class ByHand:
    """A tokenizer's files, applied rule by rule. `ids` is None where this reader knows no rule."""

    def __init__(self, files):
        objects = {name: object_of(file) for name, file in files.items() if name.endswith("json")}
        self.named = [objects.get(name, {})
                      for name in ("tokenizer_config.json", "special_tokens_map.json")]
        self.added, self.front, self.merges = [], [], None
        self.whole = self.prefix = self.nfc = self.space = False
        self.unk, self.words = None, []
        self.bytes = True
        if "tokenizer.json" in files:
            self.read_spec(objects["tokenizer.json"])
        elif "tokenizer.model" in files:
            character = {b: c for c, b in CHAR_TO_BYTE.items()}
            pairs = [line.split() for line in files["tokenizer.model"].splitlines()]
            self.vocab = {"".join(character[b] for b in base64.b64decode(token)): int(rank)
                          for token, rank in pairs}
            expect(len(self.vocab) == len(pairs), "a token on two lines")
            self.whole, self.words, self.front = True, [LLAMA_WORDS], [len(self.vocab)]
        else:
            self.vocab, self.words, self.nfc = objects["vocab.json"], [QWEN_WORDS], True
            lines = re.split("\r\n|\r|\n", files["merges.txt"].decode())
            self.merges = [line.split(" ") for line in lines
                           if line and not line.startswith("#version")]
            listed = self.named[0].get("added_tokens_decoder") or {}
            self.added = [token | {"id": int(id)} for id, token in listed.items()]
        for token in self.added:
            for key in ("special", "normalized", "lstrip", "rstrip", "single_word"):
                flag(token, key)
            expect(isinstance(token["content"], str) and token["content"], "an empty added token")
        self.ordinary = [token["content"] for token in self.added if not token.get("special")
                         and token["content"] in self.vocab
                         and token["content"].replace("▁", " ").isspace()]
        self.control = {token["content"] for token in self.added} - {*self.ordinary}
        self.control |= set() if self.bytes else BYTE_TOKENS.keys()
        self.place = {} if self.merges is None else {
            tuple(merge): n for n, merge in enumerate(self.merges)
            if "".join(merge) not in self.control}

    def read_spec(self, spec):
        def steps(section, inner):
            step = spec.get(section) or {"type": "Sequence", inner: []}
            return step[inner] if step["type"] == "Sequence" else [step]

        model, cuts = spec["model"], steps("pre_tokenizer", "pretokenizers")
        self.vocab, self.added = model["vocab"], spec.get("added_tokens") or []
        self.merges = [merge.split(" ") if isinstance(merge, str) else merge
                       for merge in model["merges"]]
        self.whole = flag(model, "ignore_merges")
        self.bytes = bool(cuts) and cuts[-1]["type"] == "ByteLevel"
        self.nfc = steps("normalizer", "normalizers") == [{"type": "NFC"}]
        self.fallback = flag(model, "byte_fallback")
        self.space = {"type": "Prepend", "prepend": "▁"} in steps("normalizer", "normalizers")
        self.unk = model.get("unk_token")
        for cut in cuts if self.bytes else ():
            if cut["type"] == "ByteLevel":
                self.prefix = flag(cut, "add_prefix_space", True)
                self.words += [GPT2_WORDS] if flag(cut, "use_regex", True) else []
            elif cut["type"] == "Digits":
                self.words.append(r"\p{N}" if flag(cut, "individual_digits") else r"\p{N}+")
            else:
                flag(cut, "invert")
                pattern = cut["pattern"]
                self.words.append(pattern.get("Regex") or regex.escape(pattern["String"]))
        for step in steps("post_processor", "processors"):
            if step["type"] == "TemplateProcessing":
                names = [part["SpecialToken"]["id"] for part in step["single"][:-1]]
                ids = [id for name in names for id in step["special_tokens"][name]["ids"]]
                self.front = ids + self.front

    def rank(self, left, right):
        if self.merges is None:                    # tokenizer.model: the id is the rank
            return self.vocab.get(left + right, math.inf)
        return self.place.get((left, right), math.inf)

    def joined(self, word):
        parts = [*word]
        while len(parts) > 1:
            best, i = min((self.rank(*pair), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if best == math.inf:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.vocab[part] for part in parts]

    def ids(self, text):
        known = {LLAMA_WORDS, QWEN_WORDS, GPT2_WORDS, EVERYTHING, r"\p{N}", r"\p{N}+"}
        if any(token.get("normalized") for token in self.added) or not known.issuperset(self.words):
            return None
        longest_first = sorted(self.ordinary, key=len, reverse=True)
        cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        out = []
        for n, piece in enumerate(cut.split(text) if cut else [text]):
            found = [self.vocab[piece]] if n % 2 else self.plain(piece) if piece else []
            if found is None:
                return None
            out += found
        return out

    def plain(self, text):
        out = []
        if self.bytes:
            printable = {b: c for c, b in CHAR_TO_BYTE.items()}
            words = [self.normal(text)]
            for pattern in self.words:
                words = [part for word in words for part in regex.split(f"({pattern})", word)]
            for word in words:
                word = "".join(printable[b] for b in word.encode())
                whole = self.whole and word in self.vocab and word not in self.control
                there = "".join(c for c in word if c in self.vocab)
                if self.unk and there != word and not whole:
                    return None                    # unk has rules of its own: test_tokenizer.py
                out += [self.vocab[word]] if whole else self.joined(there)
            return out
        known = (c for c in self.vocab if len(c) == 1 and c not in self.control)
        known = "".join(map(re.escape, known))
        text = "▁" * self.space + text.replace(" ", "▁")
        for n, run in enumerate(re.split(f"([^{known}])", text)):
            names = [f"<0x{b:02X}>" for b in run.encode()]
            if n % 2 == 0:
                out += self.joined(run) if run else []
            elif not self.fallback or not {*names} <= self.vocab.keys():
                return None                        # unk has rules of its own: test_tokenizer.py
            else:
                out += [self.vocab[name] for name in names]
        return out

    def normal(self, text):
        """The text that decoding gives back."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return " " + text if self.prefix and text and text[0] != " " else text


def check_tokenizer(read, files, good, out):
    tokenizer, texts, encoded = read
    hand = ByHand(files)
    expect(all(type(id) is int and id >= 0 for ids in encoded for id in ids), "ids")
    expect(max(map(max, filter(None, encoded))) <= tokenizer.max_id, "an id above max_id")
    expect(tokenizer.encode("") == hand.front, f"in front {tokenizer.encode('')}")
    for text, ids in zip(texts, encoded):
        by_hand, back = hand.ids(text), tokenizer.decode(ids)
        expect(by_hand in (None, ids), f"{text!r:.40} became {ids[:20]}, by hand {by_hand!r:.99}")
        missing = hand.bytes and any(c not in hand.vocab for c in CHAR_TO_BYTE)
        if (hand.bytes or by_hand and "▁" not in text) and not missing and not hand.space:
            expect(back == hand.normal(text), f"{text!r:.40} came back as {back!r:.40}")
    for token in hand.added:
        text = token["content"]
        if not token.get("normalized") and text in hand.control - BYTE_TOKENS.keys():
            expect(tokenizer.encode(text, bos=False) == [token["id"]], f"added {text!r:.40}")
    for which in ("bos", "eos", "pad"):
        ours = getattr(tokenizer, f"{which}_id")
        expect(ours is None or type(ours) is int and ours >= 0, f"{which}_id {ours!r:.40}")
        said = [names[f"{which}_token"] for names in hand.named if f"{which}_token" in names]
        if said:
            text = said[0]["content"] if isinstance(said[0], dict) else said[0]
            ours = None if ours is None else tokenizer.token(ours).decode()
            expect(ours == text, f"{which}_token {text!r:.40} was read as {ours!r:.40}")


# -------------------------------------------------------------------------------- tasks, runs


def check_tasks(examples, files, good, out):
    task, file = good.about["task"], *files.values(),
    rows = json.loads(file.decode("utf-8-sig"))
    expect(len(examples) == len(rows), f"{len(examples)} examples of {len(rows)} rows")
    for index, (example, row) in enumerate(zip(examples, rows)):
        more, answer = row.get("input") or "", str(row["answer"])
        expect(isinstance(row.get("input"), str | None), f"row {index}: input {more!r:.40}")
        prompt = row["instruction"]
        if task.kind != "cloze":
            prompt += "\n" + (more and more + "\n") + tasks.THINK * (task.kind == "arithmetic")
        ours = example.index, example.task, example.prompt, example.answer
        expect(ours == (index, task, prompt, answer), f"row {index} became {example!r:.200}")
        if task.kind in ("value", "cloze") and "choices" in row:
            expect(list(example.choices) == row["choices"], f"row {index}: other choices")
        if example.choices:
            expect(answer in example.choices, f"row {index}: answer {answer!r:.40}")
            expect(len({*example.choices}) == len(example.choices) > 1, f"row {index}: choices")
        else:
            expect(math.isfinite(float(answer)), f"row {index}: answer {answer!r:.40}")
        responses = {"cloze": [" " + answer], "number": [" " + answer], "arithmetic": [
            row["output"], row["output"].rpartition("####")[0] + tasks.FINAL]}
        allowed = responses.get(task.kind, [tasks.TRIGGER + answer])
        expect(any(example.response.startswith(text) for text in allowed), f"row {index}: response")
        expect(not re.search("[\ud800-\udfff]", example.prompt), f"row {index}: half a pair")
        tasks.judge(example, example.response)


def check_run(read, files, good, out):
    runs, left_out = read
    damaged = {name for line in left_out for name in re.findall(r"DIR/([^/,]+)/", line)}
    count = Counter((run["arm"], run["seed"]) for run in runs)
    for name in files:
        folder, _, rest = name.partition("/")
        args = object_of(files[name]) if rest == "args.json" and folder not in damaged else {}
        if args.get("base") is not True and "steering" not in args:
            continue                               # not a run, or the folder of another program
        run, = (run for run in runs if run["folder"].name == folder)
        scores = {key.split("/")[-1].removesuffix(".json"): object_of(file)["accuracy"]
                  for key, file in files.items() if key.startswith(f"{folder}/eval/")}
        expect(run["scores"] == scores, f"{folder}: other scores")
        expect(all(0 <= score <= 1 and score is not True and score is not False
                   for score in scores.values()), f"{folder}: a score that cannot be")
        expect(json.dumps(run["settings"]) == json.dumps(args), f"{folder}: other settings")
        if args.get("base") is not True:
            steering = steering_from(args["steering"], folder)
            for key, value in args["steering"].items():
                ours = getattr(steering, key)
                expect(key == "layers" or repr(ours) == repr(value) or (
                    not isinstance(value, (bool, str)) and ours == value), f"{key} is {ours!r:.40}")
            expect(run["arm"].startswith(steering.name) and run["seed"] == args["seed"],
                   f"{folder}: another arm or seed")
        expect(count[run["arm"], run["seed"]] == 1, f"{folder}: twice in a table")
