"""Text to token ids and back for Llama 3, Qwen and Gemma, with one engine: tiktoken.

A tokenizer's file describes five steps, and `Tokenizer.encode` takes them in this order:
    added tokens   strings that are cut out first, each with an id of its own: <|im_start|>, <bos>
    normalizer     Qwen composes accents (NFC); Gemma writes "▁" for " "
    split          Llama and Qwen cut the text into words with a regular expression; Gemma does not
    merges         inside a word, the two neighbours that come first in this list are joined, again and again
    template       what stands in front of every text: Llama's <|begin_of_text|>, Gemma's <bos>, nothing for Qwen
The ids are those of Hugging Face's fast tokenizers for the same files, whatever the text.
"""
import base64
import re
import unicodedata
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import tiktoken

from data import BadInput, read_json

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt"]

# How Llama 3 and Qwen cut words; they differ in how many digits make one. Llama's tokenizer.model and Qwen's vocab.json do not say.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}#| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_WORDS, QWEN_WORDS = WORDS.replace("#", "{1,3}"), WORDS.replace("#", "")
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"     # what a lone ByteLevel stands for
LONGEST_TOKEN = 1000             # characters, eight times the longest of any published vocabulary; merging by hand is quadratic in them
LONGEST_RUN = 500_000            # of white space; at a million, the regular expressions inside tiktoken overflow their stack

EVERYTHING = r"[\s\S]+"

QWEN_SPECIAL = ["endoftext", "im_start", "im_end"]
LLAMA_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
                 "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
                 *(f"reserved_special_token_{n}" for n in range(3, 248))]
WELL_KNOWN = {"bos": ["<|begin_of_text|>", "<bos>"], "eos": ["<|end_of_text|>", "<|endoftext|>", "<eos>"],
              "pad": ["<pad>", "<|finetune_right_pad_id|>"]}

# Byte-level files write each byte as a printable character: itself where it is one, else the next from U+0100 on (space is "Ġ").
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
ALPHABET = frozenset(CHAR_TO_BYTE)
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}            # Gemma's, for what is not in its vocabulary

# The reference's NFC is that of Unicode 9: marks and scripts that came later stay as they are, so ours must not reach across them.
AFTER_UNICODE_9 = re.compile(
    "([\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1aff\u1df6-\u1dfa\ua82c"
    "\U000105c0-\U000105ff\U00010d00-\U00010d8f\U00010e80-\U00010fdf\U00011070\U0001133b\U00011380-\U000113ff\U0001145e"
    "\U00011800-\U0001184f\U00011900-\U00011aaf\U00011d00-\U00011daf\U00011f00-\U00011f5f\U00016100-\U0001613f"
    "\U00016d40-\U00016d7f\U00016ff0\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d281\U0001e030-\U0001e14f"
    "\U0001e290-\U0001e2ff\U0001e4d0-\U0001e6ff])")


class Tokenizer:
    """One model's tokenizer; build it with `Tokenizer.from_pretrained(dir)`.

    bos_id, eos_id, pad_id   ids, or None where the files name no such token
    max_id                   the largest id that `encode(text, special=False)`, bos or eos can be: what an embedding must hold
    files                    names of the files in `dir` it was made from, so that a fine-tuned model's folder can get copies
    """

    @classmethod
    def from_pretrained(cls, dir):
        """Read the tokenizer in a checkpoint's folder: tokenizer.json; or else Llama 3's tokenizer.model; or else Qwen's
        vocab.json and merges.txt. Raises BadInput, naming the file, for what is missing, malformed or of an unsupported kind."""
        dir = Path(dir)
        files = [name for name in FILES if (dir / name).is_file()]
        configs = [read_json(dir / name) if (dir / name).is_file() else {} for name in [*FILES[1:3], "config.json"]]
        if "tokenizer.json" in files:
            path, spec = dir / "tokenizer.json", read_json(dir / "tokenizer.json")
        elif "tokenizer.model" in files:
            path, spec = dir / "tokenizer.model", read_tiktoken(dir / "tokenizer.model")
        elif "vocab.json" in files and "merges.txt" in files:
            path, spec = dir / "vocab.json", read_vocab_and_merges(dir, configs[0])
        else:
            raise BadInput(f"{dir}: no tokenizer; expected tokenizer.json, Llama 3's tokenizer.model, or vocab.json and merges.txt")
        with reading(path):
            return cls(spec, configs, files)

    def __init__(self, spec, configs, files):
        """spec: the contents of a tokenizer.json; configs: of tokenizer_config.json, special_tokens_map.json and config.json."""
        self.files, model, vocab = files, spec["model"], spec["model"]["vocab"]
        check(model.get("type", "BPE") == "BPE", f"model type {model.get('type')!r} is not supported; expected BPE")
        for key in ["truncation", "padding", "dropout", "continuing_subword_prefix", "end_of_word_suffix"]:
            check(not spec.get(key) and not model.get(key), f"{key} is not supported; expected null")
        check(all(type(id) is int and id >= 0 for id in vocab.values()), "an id of the vocabulary is not a whole number")
        check(len({*vocab.values()}) == len(vocab), "two tokens of the vocabulary have the same id")
        check(max(map(len, vocab), default=0) <= LONGEST_TOKEN, f"a token of the vocabulary has more than {LONGEST_TOKEN:,} characters")
        words, prefix, self._normalize = splitting(spec)
        check(not words or ALPHABET <= vocab.keys(), "byte-level, but the vocabulary does not hold all 256 bytes")
        pairs = {}                                                # (left, right) -> place in the list
        for place, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise BadInput(f"merge {left!r} + {right!r}: a part of it, or its result, is not in the vocabulary")
            pairs[left, right] = place                            # listed twice? The reference goes by the last
        check(words or not any(BYTE_TOKENS.keys() & {*pair} for pair in pairs), "merges of byte tokens are not supported")

        # Added tokens. Some are ordinary text that happens to be listed here: Gemma's runs of new lines and of "▁".
        self._names, control, largest = {id: token for token, id in vocab.items()}, set(), -1
        tables = {(special, late): {} for special in (True, False) for late in (True, False)}     # late: after the normalizer
        for token in spec.get("added_tokens") or []:
            text, id, late = token["content"], token["id"], flag(token, "normalized")
            check(text and all(text not in table for table in tables.values()), f"added token {text!r} is empty, or listed twice")
            expected = vocab.get(text, max(len(vocab), largest + 1))
            check(type(id) is int and id == expected, f"added token {text!r} has id {id!r}; expected {expected}, the next one free")
            check(self._names.get(id, text) == text, f"added token {text!r} has the id of {self._names.get(id)!r}")
            check(not any(flag(token, key) for key in ["lstrip", "rstrip", "single_word"]),
                  f"added token {text!r}: lstrip, rstrip and single_word are not supported; expected false")
            largest, self._names[id] = max(largest, id), text
            ordinary = not flag(token, "special") and text in vocab and text.replace("▁", " ").isspace()
            for special in [True, False] if ordinary else [True]:
                tables[special, late][self._normalize(text) if late else text] = id
            control |= set() if ordinary else {text}
        "".join(self._names.values()).encode()                    # half a surrogate pair is not text, and would not decode
        self._cutters = {key: (cutter(table), table) for key, table in tables.items()}

        @cache
        def bpe(banned):
            """A function text -> ids for text without added tokens; no token in `banned` can come out."""
            listed = {pair: place for pair, place in pairs.items() if pair[0] + pair[1] not in banned} if banned else pairs
            characters = [token for token in vocab if len(token) == 1 and token not in banned]
            by_id = {token: id for token, id in vocab.items() if len(token) > 1}
            rank = by_id if model.get("ranked_by_id") else merge_ranks(listed, characters)
            whole = vocab.keys() - rank.keys() - banned - ALPHABET if flag(model, "ignore_merges") else set()
            for token in whole:                                   # Llama 3 takes a word of the vocabulary whole, merges or not
                check(words and len(merge_by_hand(token, listed)[0]) != 2, f"ignore_merges without a merge for {token!r} is not supported")
                rank[token] = len(pairs) + vocab[token]           # alone it stays in three parts or more: tiktoken never merges to it
            return byte_level(vocab, rank, words, prefix) if words else character_level(vocab, rank, characters, model)

        # Plain text must not turn into a control token, nor "<0x41>" into a byte, even where the merges could spell them.
        control_or_byte = vocab.keys() & (control if words else control | BYTE_TOKENS.keys())
        check(not words or not control_or_byte & ALPHABET, "an added token that is one of the 256 bytes is not supported")
        spelled = {left + right for left, right in pairs} if not flag(model, "ignore_merges") else control_or_byte
        banned = frozenset(token for token in control_or_byte if token in spelled or len(token) == 1)
        self._bpe = lambda special: bpe(frozenset() if special else banned)      # mostly nothing is banned, and the two are one
        self._bpe(special=False)
        self._to_bytes = byte_level_bytes if words else character_level_bytes

        self._front = template_front(spec.get("post_processor"))
        check(all(type(id) is int and id in self._names for id in self._front), f"the template puts {self._front} in front, and not all are ids of tokens")
        ids = {token: id for id, token in self._names.items()}
        self.bos_id, self.eos_id, self.pad_id = (named_id(which, configs, self._front, ids) for which in ("bos", "eos", "pad"))
        ends = [id for id in (self.bos_id, self.eos_id) if id is not None]
        self.max_id = max([id for token, id in vocab.items() if token not in control] + self._front + ends)

    def encode(self, text, bos=True, special=True):
        """Text to a list of ids.

        bos       put in front what the tokenizer's template says (nothing for Qwen)
        special   let added tokens in the text be themselves; False, for data: what looks like a control token is plain text
        Raises BadInput for half a surrogate pair and for more than LONGEST_RUN characters of white space in a row.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"text: character {error.start}, {text[error.start]!r}, is half a surrogate pair; repair it") from None
        if len(text) > LONGEST_RUN and max(map(len, re.findall(r"\s+", text)), default=0) > LONGEST_RUN:
            raise BadInput(f"text: more than {LONGEST_RUN:,} characters of white space in a row; shorten it")
        (cut, table), (cut_late, table_late) = self._cutters[special, False], self._cutters[special, True]
        bpe = self._bpe(special)
        ids = self._front.copy() if bos else []
        for n, piece in enumerate(cut(text)):
            if n % 2:
                ids.append(table[piece])
                continue
            for m, part in enumerate(cut_late(self._normalize(piece))):
                if m % 2:
                    ids.append(table_late[part])
                elif part:
                    ids += bpe(part)
        return ids

    def token(self, id):
        """The bytes of one token, which may be a part of a character only; None for an id that no token has."""
        return self._to_bytes(self._names[id]) if id in self._names else None

    def decode(self, ids):
        """Ids to text; bytes that are not UTF-8 become U+FFFD. Raises BadInput for an id that no token has."""
        try:
            return b"".join([self._to_bytes(self._names[id]) for id in ids]).decode("utf-8", "replace")
        except KeyError as error:
            raise BadInput(f"id {error} is no token of this tokenizer, whose largest id is {max(self._names)}") from None


def cutter(table):
    """A function text -> pieces, those at odd places being strings of `table`: found leftmost first, and of those the longest."""
    longest_first = sorted(table, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})").split if table else lambda text: [text]


# ------------------------------------------------------------------------------------------------------------ merging

def merge_ranks(pairs, characters):
    """{(left, right): place in the list} -> {left + right: rank}, for the tokens that merging `characters` can reach.

    tiktoken ranks results; these files rank pairs, and may list several pairs for one result, far apart. But merging is
    deterministic: a token goes through the same steps inside any word as it does alone, so only one pair ever makes it.
    Give the token that pair's place, leave out tokens that no pair reaches, and tiktoken's next join is always the file's.
    """
    rank, halves, late = dict.fromkeys(characters, -1), {}, set()

    def side_by_side(left, right):
        """Alone, does left + right come down to these two? Undo their joins, latest first: no better one may cross the border."""
        while len(left) + len(right) > 2:
            if rank[left] > rank[right]:
                limit, left = rank[left], halves[left][1]
            else:
                limit, right = rank[right] + 1, halves[right][0]  # + 1: of equal joins the leftmost, here the crossing one, wins
            if pairs.get((left, right), limit) < limit:
                return False
        return True

    for (left, right), place in sorted(pairs.items(), key=lambda item: item[1]):
        token = left + right
        if left not in rank or right not in rank:                 # a part comes later in the list, as in Gemma's runs of "▁", or never
            late.add(token)
        elif token not in rank and side_by_side(left, right):
            rank[token], halves[token] = place, (left, right)
    for token in late - rank.keys():
        parts, place = merge_by_hand(token, pairs)
        if len(parts) == 1:
            rank[token] = place
    return {token: place for token, place in rank.items() if place >= 0}


def merge_by_hand(word, pairs):
    """The rule itself, slowly: join the best pair, of equals the leftmost, while there is one -> parts, place of the last join."""
    parts, place = [*word], None
    while found := [(pairs[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in pairs]:
        place, i = min(found)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts, place


def byte_level(vocab, rank, words, prefix):
    """Llama 3 and Qwen: merges the bytes of each word. Returns a function text -> ids."""
    tokens = [*CHAR_TO_BYTE, *sorted(filter(ALPHABET.issuperset, rank), key=rank.get)]
    ids = [vocab[token] for token in tokens]
    if words not in (LLAMA_WORDS, QWEN_WORDS, GPT2_WORDS, EVERYTHING):
        words = rf"(?:{words})(?!\G)"                             # not an empty word: tiktoken panics at one, the reference drops it
    words = f"{words}|(?:(?!{words})[\\s\\S])+"                   # tiktoken drops what a pattern skips, the reference keeps it
    ranks = {byte_level_bytes(token): n for n, token in enumerate(tokens)}
    bpe = tiktoken.Encoding("byte level", pat_str=words, mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        try:                                                      # encode, not encode_ordinary, which panics where this raises
            return [ids[n] for n in bpe.encode(" " + text if prefix and text[0] != " " else text, disallowed_special=())]
        except ValueError as error:
            raise BadInput(f"text: the tokenizer's pattern cannot cut {text[:40]!r} into words ({error}); is its file the published one?") from None
    return encode


def character_level(vocab, rank, characters, model):
    """Gemma: merges characters, which tiktoken first assembles from bytes, as their UTF-8 prefixes rank before all merges.
    A character that is not in the vocabulary becomes its byte tokens, or else unk. Returns a function text -> ids."""
    tokens = {bytes([b]): chr(b) for b in range(256)}             # from 128 on these are parts of characters; never in the result
    tokens |= {c.encode()[:n]: c for c in characters for n in range(2, len(c.encode()) + 1)}
    tokens |= {token.encode(): token for token in sorted(rank, key=rank.get)}
    ids, ranks = [vocab.get(token) for token in tokens.values()], {token: n for n, token in enumerate(tokens)}
    # Does no token hold a "▁" after another character? Then nothing joins there, and words are faster than one long text.
    words = "(?s:.+)" if any("▁" in token.lstrip("▁") for token in rank) else "▁*[^▁]+|▁+"
    bpe = tiktoken.Encoding("character level", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    unknown = re.compile(f"([^{re.escape(''.join(characters))}]+)")
    spelling = [vocab.get(name) if flag(model, "byte_fallback") else None for name in BYTE_TOKENS]
    unk, fuse = vocab.get(model.get("unk_token")), flag(model, "fuse_unk")
    check(unk is not None or all(id is not None or chr(b) in characters for b, id in enumerate(spelling)),
          "a byte token is missing, and unk_token names no token of the vocabulary to stand in for it")

    def encode(text):
        out = []
        for n, part in enumerate(unknown.split(text)):
            if n % 2 == 0:
                out += [ids[n] for n in bpe.encode_ordinary(part)]
                continue
            waiting = []                                          # as in the reference, unk waits until a known character comes
            for spelled in ([spelling[b] for b in character.encode()] for character in part):
                if None in spelled:
                    out, waiting = out if fuse else out + waiting, [unk]
                else:
                    out += spelled
            out += waiting
        return out
    return encode


def byte_level_bytes(token):                                      # "Ġthe" -> b" the"
    return bytes(map(CHAR_TO_BYTE.get, token)) if ALPHABET.issuperset(token) else token.encode()


def character_level_bytes(token):                                 # "▁the" -> b" the", "<0x41>" -> b"A"
    return bytes([BYTE_TOKENS[token]]) if token in BYTE_TOKENS else token.replace("▁", " ").encode()


# ------------------------------------------------------------------------------------------- the parts of a tokenizer.json

def splitting(spec):
    """Normalizer and pre-tokenizer -> the pattern that cuts words (None for Gemma's kind), prefix a space?, normalize()."""
    normalizers, cuts = steps(spec.get("normalizer"), "normalizers"), steps(spec.get("pre_tokenizer"), "pretokenizers")
    unsupported = f"normalizer {normalizers} with pre-tokenizer {cuts} is not supported; expected those of Llama 3, Qwen or Gemma"
    if not cuts or cuts[-1]["type"] != "ByteLevel":               # Gemma: after its normalizer there is no " " left to split on
        check(normalizers == [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], unsupported)
        check(all(cut["type"] == "Split" and cut["pattern"] == {"String": " "} for cut in cuts), unsupported)
        return None, False, lambda text: text.replace(" ", "▁")
    check(normalizers in ([], [{"type": "NFC"}]), unsupported)
    prefix, by_gpt2 = flag(cuts[-1], "add_prefix_space", True), flag(cuts[-1], "use_regex", True)
    words = GPT2_WORDS if by_gpt2 else EVERYTHING
    if len(cuts) > 1:
        check(len(cuts) == 2 and cuts[0]["type"] == "Split" and not prefix and not by_gpt2, unsupported)
        check(cuts[0]["behavior"] == "Isolated" and not flag(cuts[0], "invert"), unsupported)
        (kind, words), = cuts[0]["pattern"].items()
        check(kind in ("Regex", "String") and words, unsupported)
        words = words if kind == "Regex" else re.escape(words)
    return words, prefix, nfc if normalizers else str


def nfc(text):
    if text.isascii():
        return text
    return "".join(part if n % 2 else unicodedata.normalize("NFC", part) for n, part in enumerate(AFTER_UNICODE_9.split(text)))


def steps(section, key):
    """One section as a list of steps: none, one, or a Sequence of them."""
    return [] if section is None else section[key] if section["type"] == "Sequence" else [section]


def template_front(post_processor):
    """The ids that the template puts in front of a text. One that puts some behind is refused: we go on writing from there."""
    front = []
    for step in steps(post_processor, "processors"):
        if step["type"] != "ByteLevel":                           # that one is about offsets
            check(step["type"] == "TemplateProcessing", f"post-processor {step['type']} is not supported")
            check("Sequence" in step["single"][-1], "a template that adds tokens after the text is not supported")
            names = [part["SpecialToken"]["id"] for part in step["single"][:-1]]
            front = [id for name in names for id in step["special_tokens"][name]["ids"]] + front
    return front


def named_id(which, configs, front, ids):
    """The id of bos, eos or pad: what the configs say (null is an answer), or the template, or a well-known name, or None."""
    *named, config = configs
    for file, contents in zip(FILES[1:3], named):
        if which + "_token" in contents:
            token = contents[which + "_token"]
            token = token["content"] if isinstance(token, dict) else token
            check(token is None or token in ids, f"{file} has {token!r} as {which}_token, but the vocabulary does not")
            return ids.get(token)
    id = config.get(which + "_token_id")
    id = id[0] if isinstance(id, list) else id
    check(id is None or type(id) is int and id >= 0, f"config.json has {id!r} as {which}_token_id; expected a whole number")
    candidates = [id, *(front if which == "bos" else []), *map(ids.get, WELL_KNOWN[which])]
    return next((id for id in candidates if id is not None), None)


# ---------------------------------------------------------------------------------------------------------- the files

def check(condition, message):
    if not condition:
        raise BadInput(message)


def flag(section, key, default=False):
    """A value that must be true or false: "false" in quotes would count as true."""
    value = section.get(key, default)
    check(isinstance(value, bool), f"{key} is {value!r}; expected true or false")
    return value


@contextmanager
def reading(path):
    """What goes wrong inside is the fault of the file at `path`: say so in one line. JSON can have any shape, so "laid out in
    some other way" is caught here once, not checked for at every step."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except (OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"{path}: cannot be read as a tokenizer's file ({what}); fetch it again") from error


def read_tiktoken(path):
    """Llama 3's tokenizer.model, lines of "base64 rank", as a tokenizer.json. The rank is both the id and the order of merging."""
    with reading(path):
        lines = path.read_bytes().splitlines()
        check(lines and re.fullmatch(rb"[\w+/]+=* \d+", lines[0]), "SentencePiece's format is not read; put tokenizer.json beside it")
        chars = {b: c for c, b in CHAR_TO_BYTE.items()}
        tokens = [(base64.b64decode(token, validate=True), int(rank)) for token, rank in map(bytes.split, lines)]
        vocab = {"".join(map(chars.get, token)): rank for token, rank in tokens}
        check(len(vocab) == len(lines), "the same token stands on two lines")
    bos = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "bos"}}, {"Sequence": {"id": "A"}}],
           "special_tokens": {"bos": {"ids": [len(vocab)]}}}
    return byte_level_spec(vocab, [], LLAMA_SPECIAL, LLAMA_WORDS, ignore_merges=True, ranked_by_id=True) | {"post_processor": bos}


def read_vocab_and_merges(dir, config):
    """Qwen's vocab.json and merges.txt, with the added tokens of tokenizer_config.json, as a tokenizer.json."""
    vocab = read_json(dir / "vocab.json")
    with reading(dir / "merges.txt"):
        merges = [line for line in (dir / "merges.txt").read_text("utf-8").split("\n") if line and not line.startswith("#version")]
        check(all(line.count(" ") == 1 for line in merges), "a line is not two tokens with a space between")
    with reading(dir / "tokenizer_config.json"):
        kind = config.get("tokenizer_class", "Qwen2Tokenizer")
        check("Qwen" in kind, f"{kind}, but vocab.json and merges.txt are read for Qwen only; put the tokenizer.json beside them")
        listed = [token | {"id": int(id)} for id, token in config.get("added_tokens_decoder", {}).items()]
        listed.sort(key=lambda token: token["id"])
    spec = byte_level_spec(vocab, merges, QWEN_SPECIAL, QWEN_WORDS) | {"normalizer": {"type": "NFC"}}
    return spec | ({"added_tokens": listed} if listed else {})


def byte_level_spec(vocab, merges, special, words, **model):
    return {"added_tokens": [{"content": f"<|{name}|>", "id": len(vocab) + n, "special": True} for n, name in enumerate(special)],
            "model": {"vocab": vocab, "merges": merges, **model},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}
