"""Text to token ids and back for Llama, SmolLM, Qwen and Gemma, with one engine: tiktoken.

A tokenizer's file describes five steps, and `Tokenizer.encode` takes them in this order:
    added tokens   strings that are cut out first; each has an id of its own: <|im_start|>, <bos>
    normalizer     Qwen composes accents (NFC); Gemma and Llama 2 write "▁" for " "
    split          Llama 3, SmolLM and Qwen cut the text into words with regular expressions
    merges         inside a word, join the two neighbours that come first in this list; repeat
    template       what stands in front of every text: <|begin_of_text|>, <bos>, nothing for Qwen
The ids are those of Hugging Face's fast tokenizers for the same files, whatever the text.
"""
import base64
import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace

import regex                       # tiktoken brings it along
import tiktoken

from data import BadInput, read_json

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
         "vocab.json", "merges.txt"]

# How Llama 3 and Qwen cut words, which Llama's tokenizer.model and Qwen's vocab.json do not say.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}#| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_WORDS, QWEN_WORDS = WORDS.replace("#", "{1,3}"), WORDS.replace("#", "")
GPT2_WORDS = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
EVERYTHING = r"[\s\S]+"
DIGIT = r"[\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6]"    # of Unicode 17, \p{N} of 16
OUR_PATTERNS = (LLAMA_WORDS, QWEN_WORDS, GPT2_WORDS, EVERYTHING, DIGIT, DIGIT + "+")
LONGEST_TOKEN = 1000             # characters, eight times the longest of any published vocabulary
LONGEST_RUN = 500_000            # of white space; a million overflows the stack inside tiktoken

QWEN_SPECIAL = ["endoftext", "im_start", "im_end"]
LLAMA_SPECIAL = [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
    "eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{n}" for n in range(3, 248))]
WELL_KNOWN = {"bos": ["<|begin_of_text|>", "<bos>"],
              "eos": ["<|end_of_text|>", "<|endoftext|>", "<eos>"],
              "pad": ["<pad>", "<|finetune_right_pad_id|>"]}

# Byte-level files write each byte as a printable character: itself where it is one, else the next
# from U+0100 on. Space is "Ġ".
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}
BYTE_TO_CHAR = {b: c for c, b in CHAR_TO_BYTE.items()}
ALPHABET = frozenset(CHAR_TO_BYTE)
BYTE_TOKENS = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}     # Gemma's, for unknown characters

# The reference's NFC is that of Unicode 9. It leaves marks and scripts that came later as they are,
# so ours must not reach across them.
AFTER_UNICODE_9 = re.compile(
    "([\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715"
    "\u1abf-\u1aff\u1df6-\u1dfa\ua82c\U000105c0-\U000105ff\U00010d00-\U00010d8f"
    "\U00010e80-\U00010fdf\U00011070\U0001133b\U00011380-\U000113ff\U0001145e"
    "\U00011800-\U0001184f\U00011900-\U00011aaf\U00011d00-\U00011daf\U00011f00-\U00011f5f"
    "\U00016100-\U0001613f\U00016d40-\U00016d7f\U00016ff0\U00016ff1\U0001d127\U0001d128"
    "\U0001d250-\U0001d281\U0001e030-\U0001e14f\U0001e290-\U0001e2ff\U0001e4d0-\U0001e6ff])")


class Tokenizer:
    """One model's tokenizer; build it with `Tokenizer.from_pretrained(dir)`.

    bos_id, eos_id, pad_id   ids, or None where the files name no such token
    max_id                   the largest id that `encode(text, special=False)`, bos or eos can be:
                             what an embedding must hold
    folder, files            `dir`, and the names of the files there that it was made from
    """

    @classmethod
    def from_pretrained(cls, dir):
        """Read the tokenizer in a checkpoint's folder: tokenizer.json; or else Llama 3's
        tokenizer.model; or else Qwen's vocab.json and merges.txt. Raises BadInput, naming the file,
        for what is missing, malformed or of an unsupported kind."""
        dir = Path(dir)
        files = [name for name in FILES if (dir / name).is_file()]
        configs = [read_json(dir / name) if (dir / name).is_file() else {}
                   for name in (*FILES[1:3], "config.json")]
        if "tokenizer.json" in files:
            path = dir / "tokenizer.json"
            spec = read_json(path)
        elif "tokenizer.model" in files:
            path = dir / "tokenizer.model"
            spec = read_tiktoken(path)
        elif "vocab.json" in files and "merges.txt" in files:
            path = dir / "vocab.json"
            spec = read_vocab_and_merges(dir, configs[0])
        else:
            raise BadInput(f"{dir}: no tokenizer; expected tokenizer.json, Llama 3's "
                           "tokenizer.model, or vocab.json and merges.txt")
        try:
            tokenizer = cls(spec, configs, files)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        tokenizer.folder = dir
        return tokenizer

    def __init__(self, spec, configs, files):
        """spec: the contents of a tokenizer.json. configs: those of tokenizer_config.json,
        special_tokens_map.json and config.json."""
        model = read_model(spec)
        vocab, pairs, whole = model.vocab, model.pairs, model.ignore_merges
        words, self._prefix, self._normalize = splitting(spec)
        fast = words and len(words) == 1 and ALPHABET <= vocab.keys()
        check(fast or all(BYTE_TOKENS.keys().isdisjoint(pair) for pair in pairs),
              "merges of byte tokens are not supported")
        self._names, control, tables = added_tokens(spec, vocab, self._normalize)
        self._cutters = {key: (cutter(table), table) for key, table in tables.items()}

        # Plain text must not turn into a control token, nor "<0x41>" into a byte, even where the
        # merges could spell them.
        control_or_byte = vocab.keys() & (control if words else control | BYTE_TOKENS.keys())
        check(not words or not control_or_byte & ALPHABET,
              "an added token that is one of the 256 bytes is not supported")
        spelled = control_or_byte if whole else {left + right for left, right in pairs}
        banned = frozenset(t for t in control_or_byte if t in spelled or len(t) == 1)

        @cache
        def bpe(banned):
            """A function text -> ids for text without added tokens. None of `banned` comes out."""
            listed = {p: n for p, n in pairs.items() if banned.isdisjoint((*p, "".join(p)))}
            rank = merge_ranks(listed)
            if model.ranked_by_id:
                rank = {token: id for token, id in vocab.items() if len(token) > 1}
            if not fast:
                check(words or not whole, "ignore_merges without words is not supported")
                spell = character_level(vocab, rank, banned, model)
                known = {token: [vocab[token]] for token in vocab.keys() - banned if whole}
                return word_by_word(words, known, spell) if words else spell
            # Llama 3 takes a word of the vocabulary whole, merges or not. Where merging it leaves
            # three parts or more, tiktoken takes it whole too, and never merges to it.
            for token in vocab.keys() - rank.keys() - banned - ALPHABET if whole else ():
                check(len(merge_by_hand(token, listed)[0]) != 2,
                      f"ignore_merges without a merge for {token!r} is not supported")
                rank[token] = len(pairs) + vocab[token]
            return byte_level(vocab, rank, *words)

        self._bpe = lambda special: bpe(frozenset() if special else banned)
        self._bpe(special=False)           # mostly nothing is banned, and the two are one
        self._to_bytes = byte_level_bytes if words else character_level_bytes

        self.files, self._front = files, template_front(spec)
        self._gap = " " * any(cut["type"] == "Strip" for cut in steps(spec, "decoder", "decoders"))
        check(all(type(id) is int and id in self._names for id in self._front),
              f"the template puts {self._front} in front, and not all are ids of tokens")
        ids = {token: id for id, token in self._names.items()}
        self.bos_id, self.eos_id, self.pad_id = (
            named_id(which, configs, self._front, ids) for which in ("bos", "eos", "pad"))
        plain = [id for token, id in vocab.items() if token not in control]
        self.max_id = max(plain + self._front + [self.bos_id or 0, self.eos_id or 0])

    def encode(self, text, bos=True, special=True):
        """Text to a list of ids.

        bos       put in front what the tokenizer's template says (nothing for Qwen)
        special   let added tokens in the text be themselves. Use False for data: then what looks
                  like a control token is plain text
        Raises BadInput for half a surrogate pair and for more than LONGEST_RUN characters of white
        space in a row.
        """
        if half := HALF.search(text):
            raise BadInput(f"text: character {half.start()}, {half[0]!r}, is half a surrogate pair")
        runs = re.findall(r"\s+", text) if len(text) > LONGEST_RUN else []
        if any(len(run) > LONGEST_RUN for run in runs):
            raise BadInput(f"text: more than {LONGEST_RUN:,} characters of white space in a row")
        cut, table = self._cutters[special, False]
        cut_late, table_late = self._cutters[special, True]
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
                    try:                   # encode_ordinary would panic where tiktoken raises
                        ids += bpe(" " + part if self._prefix and part[0] != " " else part)
                    except (ValueError, TimeoutError) as error:
                        raise BadInput(f"text: the tokenizer's pattern cannot cut {part[:40]!r} "
                                       f"into words ({error}); is its file the published one?")
        return ids

    def token(self, id):
        """The bytes of one token, perhaps a part of a character only; None for an unknown id."""
        return self._to_bytes(self._names[id]) if id in self._names else None

    def decode(self, ids):
        """Ids to text, for Llama 2 without the space that `encode` puts in front; bytes that are
        not UTF-8 become U+FFFD. Raises BadInput for unknown ids."""
        try:
            tokens = [self._names[id] for id in ids]
        except KeyError as error:
            raise BadInput(f"id {error} is no token of this tokenizer, whose largest id is "
                           f"{max(self._names)}") from None
        text = b"".join(map(self._to_bytes, tokens)).decode("utf-8", "replace")
        return text.removeprefix(self._gap)


def cutter(table):
    """A function text -> pieces. Those at odd places are strings of `table`, found leftmost first,
    and of those the longest."""
    longest_first = sorted(table, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    return pattern.split if table else lambda text: [text]


# --------------------------------------------------------------------------------------- merging


def merge_ranks(pairs):
    """{(left, right): place in the list} -> {left + right: rank} of what merging can reach.

    tiktoken ranks results; these files rank pairs, and may list several pairs for one result, far
    apart. But merging is deterministic: a token goes through the same steps inside any word as it
    does alone, so only one pair ever makes it. Give the token that pair's place, leave out tokens
    that no pair reaches, and tiktoken's next join is always the file's.
    """
    alone = {token: merge_by_hand(token, pairs) for token in {*map("".join, pairs)}}
    return {token: place for token, (parts, place) in alone.items() if len(parts) == 1}


def merge_by_hand(word, pairs):
    """The rule itself, slowly: join the best pair, of equals the leftmost, while there is one.
    Returns the parts, and the place of the last join in the list."""
    parts, place, never = [*word], None, float("inf")
    while True:
        places = [*map(pairs.get, zip(parts, parts[1:]), [never] * len(parts)), never]
        best = min(places)
        if best == never:
            return parts, place
        place, i = best, places.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def byte_level(vocab, rank, words):
    """Llama 3 and Qwen: merges the bytes of each word. Returns a function text -> ids."""
    tokens = [*CHAR_TO_BYTE, *sorted(filter(ALPHABET.issuperset, rank), key=rank.get)]
    ids = [vocab[token] for token in tokens]
    if words not in OUR_PATTERNS:
        words = rf"(?:{words})(?!\G)"              # no empty words: tiktoken would panic
    words = f"{words}|(?:(?!{words})[\\s\\S])+"     # tiktoken would drop what a pattern skips
    ranks = {byte_level_bytes(token): n for n, token in enumerate(tokens)}
    try:
        bpe = tiktoken.Encoding("bytes", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise BadInput(f"the pattern that splits words cannot be read ({error})") from None
    return lambda text: [ids[n] for n in bpe.encode(text, disallowed_special=())]


def word_by_word(patterns, known, spell):
    """SmolLM: cuts by one pattern after the other, and merges each word as the characters of its
    bytes, of which the vocabulary may lack some. Returns a function text -> ids."""
    def exact(pattern):
        return re.sub(r"\\[pP]\{\w+\}", lambda name: ranges(name[0]), pattern)

    try:
        cuts = [[*(regex.compile(f"(?V1m)({text})") for text in (exact(pattern), pattern)),
                 pattern not in OUR_PATTERNS] for pattern in patterns]
    except (regex.error, ValueError) as error:
        raise BadInput(f"the pattern that splits words cannot be read ({error})") from None
    check(all(cut.groups == 1 for cut, *_ in cuts), "a pattern with groups is not supported")

    @lru_cache(1 << 16)
    def ids_of(word):
        word = "".join(map(BYTE_TO_CHAR.get, word.encode()))
        return known.get(word) or spell(word)

    def encode(text):
        words = [text]
        for *cut, foreign in cuts:         # one that explodes must not take for ever; seconds
            words = [part for word in words for part in cut[word.isascii()].split(
                word, timeout=1 + len(word) / 1e4 if foreign else None) if part]
        return [id for word in words for id in ids_of(word)]
    return encode


@cache
def ranges(name):
    """\\p{L} -> its characters as ranges: `regex` may know a later Unicode than the reference."""
    texts = ("".join(map(chr, range(n, n + 2048))) for n in range(0, 0x110000, 2048) if n != 0xD800)
    one = tiktoken.Encoding("class", pat_str=name, special_tokens={},
                            mergeable_ranks={bytes([b]): b for b in range(256)})
    codes = {ord(c) for text in texts for c in bytes(one.encode_ordinary(text)).decode()}
    ends = sorted(code for code in codes if not {code - 1, code + 1} <= codes)
    return "[" + "".join(rf"\U{code:08x}" + "-" * (code + 1 in codes) for code in ends) + "]"


def character_level(vocab, rank, banned, model):
    """Gemma: merges characters. tiktoken first assembles them from bytes, as their UTF-8 prefixes
    rank before all merges. A character that is not in the vocabulary becomes its byte tokens, or
    else unk, or else nothing. Returns a function text -> ids."""
    characters = {token for token in vocab.keys() - banned if len(token) == 1}
    tokens = {bytes([b]): chr(b) for b in range(256)}      # parts of characters from 128 on
    tokens |= {c.encode()[:n]: c for c in characters for n in range(2, len(c.encode()) + 1)}
    tokens |= {token.encode(): token for token in sorted(rank, key=rank.get)}
    ids, ranks = [*map(vocab.get, tokens.values())], {token: n for n, token in enumerate(tokens)}
    # Cutting the text in front of "▁" is faster, and right where no token has "▁" further inside.
    words = "(?s:.+)" if any("▁" in t.lstrip("▁") for t in rank) else "▁*[^▁]+|▁+"
    bpe = tiktoken.Encoding("characters", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    unknown = re.compile(f"([^{re.escape(''.join(characters))}]+)")
    spelling = [vocab.get(name) if model.byte_fallback else None for name in BYTE_TOKENS]
    unk = vocab.get(model.unk_token) if model.unk_token else None
    drop = not model.unk_token and not model.byte_fallback
    check(drop or unk is not None or None not in spelling,
          "a byte token is missing, and unk_token names no token of the vocabulary in its place")

    def encode(text):
        text, out = unknown.sub("", text) if drop else text, []
        for n, part in enumerate(unknown.split(text)):
            if n % 2 == 0:
                out += [ids[n] for n in bpe.encode_ordinary(part)]
                continue
            waiting = []         # as in the reference, unk waits until a known character comes
            for spelled in ([spelling[b] for b in character.encode()] for character in part):
                if None not in spelled:
                    out += spelled
                else:
                    out += [] if model.fuse_unk else waiting
                    waiting = [unk]
            out += waiting
        return out
    return encode


def byte_level_bytes(token):               # "Ġthe" -> b" the"
    return bytes(map(CHAR_TO_BYTE.get, token)) if ALPHABET.issuperset(token) else token.encode()


def character_level_bytes(token):          # "▁the" -> b" the", "<0x41>" -> b"A"
    return BYTE_TOKENS.get(token) or token.replace("▁", " ").encode()


# ------------------------------------------------------------------ the parts of a tokenizer.json

HALF = re.compile("[\ud800-\udfff]")       # half a surrogate pair, which is not text
JSON_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number",
              bool: "true or false"}


def check(condition, message):
    if not condition:
        raise BadInput(message)


def take(section, where, **kinds):
    """The named values of a JSON object, checked. A name has a type, and then it must be there, or
    a default, whose type it must have: take(token, "token", id=int, special=False).special"""
    if not isinstance(section, dict):
        raise BadInput(f"{where} is {section!r:.40}; expected an object")
    values = SimpleNamespace()
    for name, kind in kinds.items():
        default, kind = (None, kind) if isinstance(kind, type) else (kind, type(kind))
        value = default if section.get(name) is None else section[name]
        if type(value) is not kind:
            raise BadInput(f"{where}: {name} is {value!r:.40}; expected {JSON_WORDS[kind]}")
        setattr(values, name, value)
    return values


def read_model(spec):
    """The model of a tokenizer.json; pairs: its merges as {(left, right): place in the list}."""
    section = take(spec, "file", model=dict).model
    kind = take(section, "model", type="BPE").type
    check(kind == "BPE", f"model type {kind!r} is not supported; expected BPE")
    for key in ("truncation", "padding", "dropout", "continuing_subword_prefix",
                "end_of_word_suffix"):
        check(not spec.get(key) and not section.get(key), f"{key} is not supported; expected null")
    model = take(section, "model", vocab=dict, merges=list, ignore_merges=False, unk_token="",
                 byte_fallback=False, fuse_unk=False, ranked_by_id=False)
    vocab, model.pairs = model.vocab, {}
    check(all(type(id) is int and id >= 0 for id in vocab.values()),
          "an id of the vocabulary is not a whole number")
    check(len({*vocab.values()}) == len(vocab), "two tokens of the vocabulary have the same id")
    check(max(map(len, vocab), default=0) <= LONGEST_TOKEN,        # merging by hand is quadratic
          f"a token of the vocabulary has more than {LONGEST_TOKEN:,} characters")
    for place, merge in enumerate(model.merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise BadInput(f"merge {merge!r:.40} is not a pair of tokens")
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise BadInput(f"merge {left!r} + {right!r}: a part of it, or its result, "
                           "is not in the vocabulary")
        model.pairs[left, right] = place           # listed twice? The reference goes by the last
    return model


def added_tokens(spec, vocab, normalize):
    """{id: token} for all tokens; the set of control tokens; and for each (special, after the
    normalizer) a table {token: id} of what to cut out. An added token that is no control token is
    ordinary text that happens to be listed: Gemma has runs of new lines and of "▁"."""
    names, control, largest = {id: token for token, id in vocab.items()}, set(), -1
    tables = {(special, late): {} for special in (True, False) for late in (True, False)}
    for section in take(spec, "file", added_tokens=[]).added_tokens:
        token = take(section, "added token", content=str, id=int, special=False, normalized=False,
                     lstrip=False, rstrip=False, single_word=False)
        text, id = token.content, token.id
        check(text and all(text not in table for table in tables.values()),
              f"added token {text!r} is empty, or listed twice")
        expected = vocab.get(text, max(len(vocab), largest + 1))
        check(id == expected,
              f"added token {text!r} has id {id}; expected {expected}, the next one free")
        check(names.get(id, text) == text, f"added token {text!r} has the id of {names.get(id)!r}")
        check(not (token.lstrip or token.rstrip or token.single_word),
              f"added token {text!r}: lstrip, rstrip and single_word are not supported")
        largest, names[id] = max(largest, id), text
        key = normalize(text) if token.normalized else text
        tables[True, token.normalized][key] = id
        if not token.special and text in vocab and text.replace("▁", " ").isspace():
            tables[False, token.normalized][key] = id
        else:
            control.add(text)
    check(not HALF.search("".join(names.values())), "a token holds half a surrogate pair")
    return names, control, tables


def steps(spec, section, key):
    """One section as a list of steps: none, one, or a Sequence of them. Each step has a type."""
    listed = [] if spec.get(section) is None else [spec[section]]
    if listed and take(listed[0], section, type=str).type == "Sequence":
        listed = getattr(take(listed[0], section, **{key: list}), key)
    for step in listed:
        take(step, section, type=str)
    return listed


def splitting(spec):
    """Normalizer and pre-tokenizer -> the patterns that cut words, one after the other (None for
    Gemma's kind), whether to put a space in front, and a function that normalizes."""
    normalizers = steps(spec, "normalizer", "normalizers")
    cuts = steps(spec, "pre_tokenizer", "pretokenizers")
    gemma = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    llama = [{"type": "Prepend", "prepend": "▁"}, gemma]
    check(normalizers in ([], [{"type": "NFC"}], [gemma], llama),
          f"normalizer {normalizers} is not supported; known are NFC, {gemma}, {llama}")
    # Gemma cuts at spaces, but after its normalizer there is none left.
    if gemma in normalizers and all(cut.get("pattern") == {"String": " "} for cut in cuts):
        front = "▁" if normalizers == llama else ""
        return None, False, lambda text: text and front + text.replace(" ", "▁")
    patterns, kinds = [], [cut["type"] for cut in cuts]
    for kind, cut in zip(kinds, cuts):
        made = take(cut, "pre_tokenizer", add_prefix_space=True, use_regex=True, behavior="",
                    pattern={}, invert=False, individual_digits=False)
        pattern = take(made.pattern, "pattern", Regex="", String="")
        pattern = pattern.Regex or re.escape(pattern.String)
        known = {"ByteLevel": GPT2_WORDS if made.use_regex else EVERYTHING,
                 "Digits": DIGIT if made.individual_digits else DIGIT + "+",
                 "Split": pattern if made.behavior == "Isolated" and not made.invert else None}
        check(known.get(kind), f"pre-tokenizer {cut} is not supported; known are ByteLevel, Digits "
                               "and Split (Isolated, not inverted)")
        patterns += [known[kind]] if known[kind] != EVERYTHING else []
    check(kinds[-1:] == ["ByteLevel"] and "ByteLevel" not in kinds[:-1] and gemma not in normalizers
          and not (made.add_prefix_space and len(cuts) > 1), f"pre-tokenizers {kinds} behind "
          f"normalizers {normalizers} are not supported; expected ByteLevel once, at the end")
    return patterns or [EVERYTHING], made.add_prefix_space, nfc if normalizers else str


def nfc(text):
    if text.isascii():
        return text
    return "".join(part if n % 2 else unicodedata.normalize("NFC", part)
                   for n, part in enumerate(AFTER_UNICODE_9.split(text)))


def template_front(spec):
    """The ids that the template puts in front of a text. One that puts some behind is refused,
    because we go on writing from there."""
    front = []
    for step in steps(spec, "post_processor", "processors"):
        if step["type"] == "ByteLevel":                            # that one is about offsets
            continue
        check(step["type"] == "TemplateProcessing",
              f"post-processor {step['type']} is not supported")
        template = take(step, "post_processor", single=list, special_tokens=dict)
        parts = [take(part, "template", SpecialToken={}, Sequence={}) for part in template.single]
        check(parts and parts[-1].Sequence,
              "a template that adds tokens after the text is not supported")
        names = [take(part.SpecialToken, "template", id=str).id for part in parts[:-1]]
        tokens = [take(template.special_tokens.get(name), f"template: {name}", ids=list)
                  for name in names]
        front = [id for token in tokens for id in token.ids] + front
    return front


def named_id(which, configs, front, ids):
    """The id of bos, eos or pad: what the configs say (null is an answer), or the template, or a
    well-known name, or None."""
    *named, config = configs
    for file, contents in zip(FILES[1:3], named):
        if which + "_token" in contents:
            token = contents[which + "_token"]
            token = take(token, file, content=str).content if isinstance(token, dict) else token
            check(token is None or isinstance(token, str) and token in ids,
                  f"{file} has {token!r} as {which}_token, but the vocabulary does not")
            return ids.get(token)
    id = config.get(which + "_token_id")
    id = id[0] if isinstance(id, list) and id else id
    check(id is None or type(id) is int and id >= 0,
          f"config.json has {id!r} as {which}_token_id; expected a whole number")
    candidates = [id, *(front if which == "bos" else []), *map(ids.get, WELL_KNOWN[which])]
    return next((id for id in candidates if id is not None), None)


# ----------------------------------------------------------------------------- the other two files


def read_tiktoken(path):
    """Llama 3's tokenizer.model, lines of "base64 rank", as a tokenizer.json. The rank is both the
    id and the order of merging."""
    lines = path.read_bytes().splitlines()
    check(lines and re.fullmatch(rb"[\w+/]+=* \d+", lines[0]),
          f"{path}: SentencePiece's format is not read; put tokenizer.json beside it")
    try:
        tokens = [(base64.b64decode(token, validate=True), int(rank))
                  for token, rank in map(bytes.split, lines)]
    except ValueError as error:
        raise BadInput(f"{path}: cannot be read ({error}); fetch it again") from None
    vocab = {"".join(map(BYTE_TO_CHAR.get, token)): rank for token, rank in tokens}
    check(len(vocab) == len(lines), f"{path}: the same token stands on two lines")
    bos = {"type": "TemplateProcessing",
           "single": [{"SpecialToken": {"id": "bos"}}, {"Sequence": {"id": "A"}}],
           "special_tokens": {"bos": {"ids": [len(vocab)]}}}
    spec = byte_level_spec(path, vocab, [], LLAMA_SPECIAL, LLAMA_WORDS, ignore_merges=True,
                           ranked_by_id=True)
    return spec | {"post_processor": bos}


def read_vocab_and_merges(dir, config):
    """Qwen's vocab.json and merges.txt, with the added tokens of tokenizer_config.json, as a
    tokenizer.json."""
    vocab, path, where = (dir / name for name in ("vocab.json", "merges.txt", FILES[1]))
    try:
        lines = path.read_text("utf-8").split("\n")
    except ValueError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error}); fetch it again") from None
    merges = [line for line in lines if line and not line.startswith("#version")]
    check(all(line.count(" ") == 1 for line in merges),
          f"{path}: a line is not two tokens with a space between")
    config = take(config, where, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder={})
    check("Qwen" in config.tokenizer_class,
          f"{where}: {config.tokenizer_class}, but vocab.json and merges.txt are read for Qwen "
          "only; put the tokenizer.json beside them")
    listed = []
    for id, token in config.added_tokens_decoder.items():
        check(re.fullmatch(r"\d{1,9}", id) and isinstance(token, dict),
              f"{where}: {id!r} in added_tokens_decoder is not the id of a token")
        listed.append(token | {"id": int(id)})
    spec = byte_level_spec(vocab, read_json(vocab), merges, QWEN_SPECIAL, QWEN_WORDS)
    spec["added_tokens"] = sorted(listed, key=lambda token: token["id"]) or spec["added_tokens"]
    return spec | {"normalizer": {"type": "NFC"}}


def byte_level_spec(path, vocab, merges, special, words, **model):
    check(ALPHABET <= vocab.keys(), f"{path}: the vocabulary does not hold all 256 bytes")
    return {
        "added_tokens": [{"content": f"<|{name}|>", "id": len(vocab) + n, "special": True}
                         for n, name in enumerate(special)],
        "model": {"vocab": vocab, "merges": merges, **model},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}
