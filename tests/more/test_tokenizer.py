"""Text to ids and back.

After reading this file you know how a text becomes the ids a checkpoint was trained on: added
tokens are cut out, the text is normalized and split, and each word's pieces are merged in the order
of a list. You know why the order of a list of *pairs* is not quite an order of *tokens*, what
Llama 3, Qwen and Gemma do differently, and why training data must be encoded with special=False.

The right answers in golden/tokenizers/ come from Hugging Face's `tokenizers`
(golden/make_tokenizers.py made them), for three small tokenizers that lie there too and for the
real ones in ../shared, if that folder exists.
"""
import base64
import copy
import json
import random
import shutil
import unicodedata
from functools import cache
from pathlib import Path

import pytest

from data import BadInput
from data.tokenizer import (CHAR_TO_BYTE, LLAMA_SPECIAL, LONGEST_RUN, Tokenizer, merge_by_hand,
                            merge_ranks)

HERE = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
GOLDEN = json.loads((HERE / "golden.json").read_text("utf-8"))
MINIS = json.loads((HERE / "minis.json").read_text("utf-8"))["minis"]
TEXTS = GOLDEN["texts"]
SMALL, REAL = ["llama", "qwen", "gemma"], ["llama3", "qwen2", "gemma-format"]
# How many ids the template puts in front.
FRONT = {"llama": 1, "qwen": 0, "gemma": 1, "llama3": 1, "qwen2": 0, "gemma-format": 1}

load = cache(Tokenizer.from_pretrained)


@pytest.fixture(params=SMALL + REAL)
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name, request):
    """The small ones are part of the project; a real one asks for `shared`, which skips the test
    where there is no such folder."""
    if name in SMALL:
        return load(HERE / name)
    return load(request.getfixturevalue("shared") / "tokenizers" / name)


def spec_of(name):
    return json.loads((HERE / name / "tokenizer.json").read_text("utf-8"))


def from_spec(spec):
    return Tokenizer(spec, [{}, {}, {}], [])


def first_difference(texts, got, expected):
    """None, or the first text with a wrong answer: easier to read than two long lists."""
    return next(((t, g, e) for t, g, e in zip(texts, got, expected, strict=True) if g != e), None)


def tokens_of(tokenizer, text):
    return [tokenizer.token(id).decode() for id in tokenizer.encode(text)]


def letters(merges, words=()):
    """A tokenizer of the letters a to e with these merges ("a b"), as in Gemma's files."""
    tokens = dict.fromkeys([*"abcde▁", "<unk>", *(m.replace(" ", "") for m in merges), *words])
    vocab = {token: n for n, token in enumerate(tokens)}
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"},
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}


# -------------------------------------------------------------------------------- merging, by hand

def test_merges_go_by_their_place_in_the_list_not_from_left_to_right():
    pairs = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}
    assert merge_by_hand("abc", pairs) == (["abc"], 2)                     # b+c first, then a+bc
    assert merge_by_hand("abab", pairs) == (["ab", "ab"], 1)
    tokenizer = from_spec(letters(["b c", "a b", "a bc"]))
    assert tokens_of(tokenizer, "abab abc") == ["ab", "ab", " ", "abc"]


def test_a_token_has_the_rank_of_the_one_pair_that_makes_it():
    # "abc" is listed twice. Alone it goes a+b, then ab+c: the pair a+bc, though first, never meets.
    pairs = {("a", "bc"): 0, ("a", "b"): 1, ("b", "c"): 2, ("ab", "c"): 3}
    assert merge_ranks(pairs) == {"ab": 1, "bc": 2, "abc": 3}
    # Without ab+c nothing makes "abc": it has no rank, or tiktoken would join "ab" and "c" to it.
    assert merge_ranks({("a", "b"): 0, ("b", "c"): 1, ("a", "bc"): 2}) == {"ab": 0, "bc": 1}


def merge_by_result(word, rank):
    """The tempting wrong rule: join the neighbours whose *result* stands first in the list."""
    parts = [*word]
    while found := [(rank[left + right], i) for i, (left, right) in enumerate(zip(parts, parts[1:]))
                    if left + right in rank]:
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_any_list_of_merges_gives_what_merging_by_hand_gives():
    # The lists are random and in random order. So they have dead ends, and results before their
    # parts: they are much wilder than any published file.
    chance, fooled = random.Random(0), 0
    for trial in range(150):
        alphabet = "abc"[:chance.randint(1, 3)]
        tokens = {"".join(chance.choices(alphabet, k=chance.randint(2, 6))) for _ in range(10)}
        known = tokens | {*alphabet}
        merges = [f"{t[:i]} {t[i:]}" for t in sorted(tokens) for i in range(1, len(t))
                  if t[:i] in known and t[i:] in known]
        chance.shuffle(merges)
        pairs = {tuple(m.split(" ")): place for place, m in enumerate(merges)}
        tokenizer = from_spec(letters(merges, sorted(tokens)))
        lengths = (2, 3, 4, 5, 6, 8, 10, 15, 20, 600 if trial % 10 == 0 else 30)
        texts = ["".join(chance.choices(alphabet, k=length)) for length in lengths]
        got = [tokens_of(tokenizer, text) for text in texts]
        expected = [merge_by_hand(text, pairs)[0] for text in texts]
        assert first_difference(texts, got, expected) is None, merges
        by_result = {left + right: place for (left, right), place in reversed(pairs.items())}
        fooled += any(merge_by_result(text, by_result) != e for text, e in zip(texts, expected))
    assert fooled >= 20          # of 150: these lists do tell the two rules apart


def test_every_byte_has_a_printable_character():
    assert len(CHAR_TO_BYTE) == 256 and {*CHAR_TO_BYTE.values()} == {*range(256)}
    assert all(c.isprintable() for c in CHAR_TO_BYTE)
    assert [CHAR_TO_BYTE[c] for c in "ĠĊĉA"] == [*b" \n\tA"]


# ------------------------------------------------------------------------- the reference's answers

def test_ids_are_the_reference_s(name, tokenizer):
    assert first_difference(TEXTS, map(tokenizer.encode, TEXTS), GOLDEN[name]["ids"]) is None


def test_bos_false_leaves_out_the_template_only(name, tokenizer):
    expected = [ids[FRONT[name]:] for ids in GOLDEN[name]["ids"]]
    assert [tokenizer.encode(text, bos=False) for text in TEXTS] == expected


def test_with_special_false_control_tokens_are_plain_text(name, tokenizer):
    # The reference's answers come from a copy of the file without its control tokens.
    golden, front = GOLDEN[name], FRONT[name]
    expected = [golden["plain"].get(str(n), ids[front:]) for n, ids in enumerate(golden["ids"])]
    got = [tokenizer.encode(text, bos=False, special=False) for text in TEXTS]
    assert first_difference(TEXTS, got, expected) is None
    assert len(golden["plain"]) >= 9                       # the texts do hold control tokens
    assert max(map(max, filter(None, got))) <= tokenizer.max_id


@pytest.mark.parametrize("name", SMALL)
def test_with_special_false_no_id_of_a_control_token_comes_out(name):
    tokenizer, spec = load(HERE / name), spec_of(name)
    control = {t["id"] for t in spec["added_tokens"]
               if not t["content"].replace("▁", " ").isspace()}
    names = [t["content"] for t in spec["added_tokens"] if t["id"] in control]
    assert [tokenizer.encode(text, bos=False) for text in names] == [[id] for id in sorted(control)]
    for text in [*names, "".join(names), *TEXTS]:
        assert not control & {*tokenizer.encode(text, bos=False, special=False)}, text


def test_decode_gives_the_text_back(name, tokenizer):
    # Up to what the tokenizer itself changes: NFC for Qwen, "▁" for " " in Gemma. There the golden
    # file holds the reference's answer.
    expected = [GOLDEN[name]["decoded"].get(str(n), text) for n, text in enumerate(TEXTS)]
    got = [tokenizer.decode(tokenizer.encode(text, bos=False)) for text in TEXTS]
    assert first_difference(TEXTS, got, expected) is None


@pytest.mark.parametrize("mini", MINIS, ids=[m["name"] for m in MINIS])
def test_each_odd_rule_of_a_file_is_the_reference_s(mini):
    tokenizer, texts = from_spec(mini["spec"]), mini["texts"]
    assert first_difference(texts, map(tokenizer.encode, texts), mini["ids"]) is None
    front = len(tokenizer.encode(""))
    expected = [mini["plain"].get(str(n), ids[front:]) for n, ids in enumerate(mini["ids"])]
    got = [tokenizer.encode(text, bos=False, special=False) for text in texts]
    assert first_difference(texts, got, expected) is None
    late = any(token["normalized"] for token in mini["spec"]["added_tokens"])
    if mini["spec"]["decoder"] and not late:
        expected = [mini["decoded"].get(str(n), text) for n, text in enumerate(texts)]
        got = [tokenizer.decode(tokenizer.encode(text, bos=False)) for text in texts]
        assert first_difference(texts, got, expected) is None


def pattern_of(spec):
    return spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]


def without_merge(spec, result):
    merges = spec["model"]["merges"]
    spec["model"]["merges"] = [merge for merge in merges if "".join(merge) != result]


@pytest.mark.parametrize("name, edit", [
    ("llama", lambda s: s["model"].update(ignore_merges=False)),
    ("llama", lambda s: pattern_of(s).update(Regex=r"\p{L}+|\p{N}{1,3}|\s+")),
    ("llama", lambda s: s["post_processor"].update(processors=[])),
    ("qwen", lambda s: s.update(normalizer=None)),
    ("qwen", lambda s: s["model"]["merges"].reverse()),
    ("qwen", lambda s: s["added_tokens"][3].update(content="<other_call>")),
    ("gemma", lambda s: s["model"].update(byte_fallback=False)),
    ("gemma", lambda s: s["model"]["merges"].reverse()),
    ("gemma", lambda s: without_merge(s, "<0x41>")),
])
def test_the_hard_texts_notice_when_a_rule_is_broken(name, edit):
    spec = spec_of(name)
    edit(spec)
    got = map(from_spec(spec).encode, TEXTS)
    assert first_difference(TEXTS, got, GOLDEN[name]["ids"]) is not None


# --------------------------------------------------------------------------- other files, same ids

def write_tiktoken(path, vocab):
    with open(path, "wb") as file:
        for token in sorted(vocab, key=vocab.get):
            raw = bytes(CHAR_TO_BYTE[c] for c in token)
            file.write(base64.b64encode(raw) + b" %d\n" % vocab[token])


def test_llama_s_tokenizer_model_gives_the_same_ids(tmp_path):
    write_tiktoken(tmp_path / "tokenizer.model", spec_of("llama")["model"]["vocab"])
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert first_difference(TEXTS, map(tokenizer.encode, TEXTS), GOLDEN["llama"]["ids"]) is None
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.files) == (704, 705, ["tokenizer.model"])


def test_llama_s_real_tokenizer_model_gives_the_same_ids(shared, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(shared / "tokenizers" / "llama3" / "tokenizer.model")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert first_difference(TEXTS, map(tokenizer.encode, TEXTS), GOLDEN["llama3"]["ids"]) is None
    path = shared / "tokenizers" / "llama3" / "tokenizer.json"
    listed = json.loads(path.read_text("utf-8"))["added_tokens"]
    assert [f"<|{name}|>" for name in LLAMA_SPECIAL] == [token["content"] for token in listed]
    assert [token["id"] for token in listed] == [*range(128000, 128256)]


def write_vocab_and_merges(folder, model):
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]), "utf-8")


def test_qwen_s_vocab_and_merges_give_the_same_ids(tmp_path):
    spec = spec_of("qwen")
    write_vocab_and_merges(tmp_path, spec["model"])
    decoder = {str(token.pop("id")): token for token in reversed(spec["added_tokens"])}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert first_difference(TEXTS, map(tokenizer.encode, TEXTS), GOLDEN["qwen"]["ids"]) is None
    assert tokenizer.files == ["tokenizer_config.json", "vocab.json", "merges.txt"]


def test_qwen_s_three_control_tokens_are_known_without_a_config(tmp_path):
    write_vocab_and_merges(tmp_path, spec_of("qwen")["model"])
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [652, 653, 654]
    assert len(tokenizer.encode("<tool_call>")) > 1


def test_qwen_s_real_vocab_and_merges_give_the_same_ids(shared, tmp_path):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).symlink_to(shared / "tokenizers" / "qwen2" / file)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert first_difference(TEXTS, map(tokenizer.encode, TEXTS), GOLDEN["qwen2"]["ids"]) is None


def test_merges_may_be_strings_or_pairs():
    spec = spec_of("qwen")
    spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
    got = map(from_spec(spec).encode, TEXTS)
    assert first_difference(TEXTS, got, GOLDEN["qwen"]["ids"]) is None


def test_tokenizer_json_comes_first(tmp_path):
    shutil.copy(HERE / "qwen" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert Tokenizer.from_pretrained(tmp_path).encode("<tool_call>") == [655]


# -------------------------------------------------------------------- bos, eos, pad, max_id, files

TOKENS, MAP, CONFIG = "tokenizer_config.json", "special_tokens_map.json", "config.json"


@pytest.mark.parametrize("name, configs, expected", [
    ("llama", {}, (704, 705, 708)),        # the template; well-known names
    ("qwen", {}, (None, 652, None)),       # <|endoftext|>
    ("gemma", {}, (2, 1, 0)),
    # null is an answer
    ("gemma", {TOKENS: {"eos_token": "<end_of_turn>", "pad_token": None}}, (2, 20, None)),
    ("qwen", {TOKENS: {"bos_token": None}, CONFIG: {"bos_token_id": 652}}, (None, 652, None)),
    ("qwen", {MAP: {"eos_token": {"content": "<|im_end|>"}}, CONFIG: {"eos_token_id": 652}},
     (None, 654, None)),
    ("qwen", {CONFIG: {"bos_token_id": 652, "eos_token_id": [654, 652], "pad_token_id": None}},
     (652, 654, None)),
])
def test_bos_eos_and_pad_come_from_the_configs_first(name, configs, expected, tmp_path):
    shutil.copy(HERE / name / "tokenizer.json", tmp_path)
    for file, contents in configs.items():
        (tmp_path / file).write_text(json.dumps(contents))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected
    assert tokenizer.files == ["tokenizer.json", *(file for file in configs if file != CONFIG)]


def test_bos_may_come_from_the_template_alone():
    spec = spec_of("gemma")
    spec["post_processor"]["special_tokens"]["<bos>"]["ids"] = [19]
    tokenizer = from_spec(spec)
    assert tokenizer.bos_id == 19 and tokenizer.encode("") == [19]


@pytest.mark.parametrize("name, expected", [
    ("llama", (704, 705, 708)), ("qwen", (None, 654, 652)), ("gemma", (2, 1, 0))])
def test_a_config_beside_the_tokenizer_names_the_three(name, expected):
    tokenizer = load(HERE / name)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected


def test_max_id_leaves_out_added_tokens_that_data_cannot_reach():
    # The published Gemma 3 1B lists <image_soft_token> one beyond its embedding. That must not look
    # like a mismatch.
    spec = spec_of("gemma")
    largest = len(spec["model"]["vocab"]) - 1
    image = {"id": largest + 1, "content": "<image_soft_token>", "special": True}
    spec["added_tokens"].append(image)
    assert from_spec(spec).max_id == largest
    assert from_spec(spec).encode("<image_soft_token>", bos=False) == [largest + 1]


def test_max_id_leaves_out_a_control_token_at_the_end_of_the_vocabulary():
    spec = letters([], ["<z>"])
    spec["added_tokens"] = [{"id": 7, "content": "<z>", "special": True}]
    assert from_spec(spec).max_id == 6


def test_max_id_counts_bos_and_eos():
    assert load(HERE / "llama").max_id == 705              # the 254 other added tokens do not count
    assert load(HERE / "qwen").max_id == 654               # eos here is <|im_end|>


# ------------------------------------------------------------------------------ hard on the engine

@pytest.mark.parametrize("text", [" ", "a", "\n", "\t", "1", "!", "é", "▁", "記", "\u3000", " \n",
                                  "'s", "<", "\u0301", "😀"])
@pytest.mark.parametrize("name", SMALL)
def test_100_000_times_the_same_character_comes_back_whole(name, text):
    text, tokenizer = text * 100_000, load(HERE / name)
    expected = {"llama": text, "qwen": unicodedata.normalize("NFC", text),
                "gemma": text.replace("▁", " ")}[name]
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == expected


def test_too_much_white_space_is_refused_not_a_crash():
    tokenizer = load(HERE / "llama")
    assert tokenizer.encode("a" + " " * LONGEST_RUN)
    with pytest.raises(BadInput, match="white space"):
        tokenizer.encode("a" + " " * (LONGEST_RUN + 1))


@pytest.mark.parametrize("name", SMALL)
def test_half_a_surrogate_pair_is_refused(name):
    tokenizer = load(HERE / name)
    with pytest.raises(BadInput, match="character 2, .*surrogate"):
        tokenizer.encode("ab\ud83d")


def test_broken_utf8_decodes_to_the_replacement_character():
    tokenizer = load(HERE / "gemma")
    assert tokenizer.decode(tokenizer.encode("🫠", bos=False)[:1]) == "\ufffd"


@pytest.mark.parametrize("id", [-1, 10**9, None, "7"])
def test_an_id_that_no_token_has_is_named(id):
    tokenizer = load(HERE / "llama")
    assert tokenizer.token(id) is None
    with pytest.raises(BadInput, match=f"id {id!r} "):
        tokenizer.decode([1, 2, id])


# --------------------------------------------------------------------------------------- bad files

def word_without_its_last_merge(spec):
    vocab = spec["model"]["vocab"]
    vocab.update(zz=vocab.pop("ĠSolidGoldMagikarp"), zzz=vocab.pop("Donaudampfschifffahrt"))
    spec["model"]["merges"].append(["z", "z"])


def no_spare_byte(spec):
    spec["model"]["vocab"].pop("<0xE2>")
    spec["model"]["unk_token"] = None


def merge_of_a_byte_token(spec):
    spec["model"]["vocab"]["<0x41>a"] = 9999
    spec["model"]["merges"].append(["<0x41>", "a"])


def token_behind(spec):
    spec["post_processor"]["single"].append({"SpecialToken": {"id": "<eos>", "type_id": 0}})


def control_token_that_is_a_byte(spec):
    spec["added_tokens"].insert(0, {"id": spec["model"]["vocab"]["!"], "content": "!"})


def split_at(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


def cuts(spec):
    return spec["pre_tokenizer"]["pretokenizers"]


LOWER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
BAD = [  # tokenizer, what is done to it, what the message says
    ("qwen", lambda s: s["model"].update(type="Unigram"), "Unigram"),
    ("qwen", lambda s: s["model"].update(type="WordPiece"), "WordPiece"),
    ("qwen", lambda s: s["model"].pop("vocab"), "vocab"),
    ("qwen", lambda s: s["model"].pop("merges"), "merges"),
    ("qwen", lambda s: s["model"].update(merges=None), "merges is None; expected a list"),
    ("qwen", lambda s: s["model"].update(vocab=[["a", 0.5]]), "expected an object"),
    ("qwen", lambda s: s["model"].update(ignore_merges="false"), "expected true or false"),
    ("qwen", lambda s: s.pop("model"), "model"),
    ("qwen", lambda s: s["model"].update(dropout=0.1), "dropout"),
    ("qwen", lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ("qwen", lambda s: s["model"].update(continuing_subword_prefix="##"), "subword_prefix"),
    ("qwen", lambda s: s.update(truncation={"max_length": 8}), "truncation"),
    ("qwen", lambda s: s["model"]["vocab"].pop("Ġ"), "merge 'Ġ' +"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=1), "same id"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=1.0), "whole number"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=True), "whole number"),
    ("qwen", lambda s: s["model"]["vocab"].update(a="1"), "whole number"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=-1), "whole number"),
    ("qwen", lambda s: s["added_tokens"][1].update(content="\ud83d"), "surrogate"),
    ("qwen", lambda s: s["model"]["merges"].append("a zzz"), "'a' + 'zzz'"),
    ("qwen", lambda s: s["model"]["merges"].append("q q"), "'q' + 'q'"),
    ("qwen", lambda s: s["model"]["merges"].append("abc"), "'abc' is not a pair"),
    ("qwen", lambda s: s["model"]["merges"].append(["a", "b", "c"]), "is not a pair"),
    ("qwen", lambda s: s["model"]["merges"].append(["a", 7]), "is not a pair"),
    ("qwen", lambda s: s["model"]["merges"].append(7), "7 is not a pair"),
    ("qwen", lambda s: s.update(normalizer={"type": "NFKC"}), "NFKC"),
    ("qwen", lambda s: s.update(normalizer=LOWER), "Lowercase"),
    ("qwen", lambda s: s.update(normalizer={}), "normalizer: type is None"),
    ("qwen", lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    ("qwen", lambda s: s.update(pre_tokenizer=None), "not supported"),
    ("qwen", lambda s: s.update(pre_tokenizer=[7]), "expected an object"),
    ("qwen", lambda s: cuts(s).insert(0, {"type": "Punctuation"}), "Punctuation"),
    ("qwen", lambda s: cuts(s).insert(0, {"type": "Digits", "individual_digits": 1}), "or false"),
    ("qwen", lambda s: cuts(s).reverse(), "ByteLevel once, at the end"),
    ("qwen", lambda s: cuts(s).insert(0, cuts(s)[1]), "ByteLevel once, at the end"),
    ("qwen", lambda s: cuts(s).insert(0, split_at("(?:a")), "the pattern that splits words"),
    ("qwen", lambda s: cuts(s).insert(0, split_at("(a|b)c")), "groups"),
    ("qwen", lambda s: cuts(s).insert(0, split_at("")), "not supported"),
    ("qwen", lambda s: cuts(s)[0].update(behavior="Removed"), "Removed"),
    ("qwen", lambda s: cuts(s)[0].update(invert=True), "not supported"),
    ("qwen", lambda s: cuts(s)[0]["pattern"].update(Regex="(a"), "the pattern that splits words"),
    ("qwen", lambda s: cuts(s)[1].update(add_prefix_space=True), "not supported"),
    ("qwen", lambda s: s.update(post_processor={"type": "BertProcessing"}), "BertProcessing"),
    ("qwen", lambda s: s["added_tokens"][1].update(id=700),
     "'<|im_start|>' has id 700; expected 653"),
    ("qwen", lambda s: s["added_tokens"][1].update(id="653"), "'653'"),
    ("qwen", lambda s: s["model"]["vocab"].update({"Ġunreachable": 652}), "the id of 'Ġunr"),
    ("qwen", lambda s: s["added_tokens"][1].update(lstrip=True), "lstrip"),
    ("qwen", lambda s: s["added_tokens"][1].update(single_word=True), "single_word"),
    ("qwen", control_token_that_is_a_byte, "256 bytes"),
    ("qwen", lambda s: s.update(added_tokens=[7]), "added token is 7; expected an object"),
    ("llama", word_without_its_last_merge, "ignore_merges without a merge for 'zzz'"),
    ("gemma", merge_of_a_byte_token, "byte tokens"),
    ("gemma", lambda s: s["normalizer"].update(content="_"), "not supported"),
    ("gemma", lambda s: s["pre_tokenizer"].update(pattern={"String": "a"}), "not supported"),
    ("gemma", lambda s: s.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
     "Metaspace"),
    ("gemma", token_behind, "after the text"),
    ("gemma", lambda s: s["post_processor"]["special_tokens"].clear(), "<bos>"),
    ("gemma", lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
    ("gemma", no_spare_byte, "byte token is missing"),
]


def refusal(folder):
    """The one line with which the tokenizer in a folder is refused."""
    with pytest.raises(BadInput) as error:
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name, edit, message", BAD, ids=range(len(BAD)))
def test_a_file_of_another_kind_is_refused_in_one_line(name, edit, message, tmp_path):
    spec = copy.deepcopy(spec_of(name))
    edit(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    refused = refusal(tmp_path)
    assert refused.startswith(f"{path}: ") and message in refused


def test_an_unk_token_that_is_no_token_is_refused():
    spec = spec_of("qwen")
    del spec["model"]["vocab"][next(iter(spec["model"]["vocab"]))]
    spec["model"].update(merges=[], unk_token="<unk>")
    spec["added_tokens"] = []
    with pytest.raises(BadInput, match="unk_token"):
        from_spec(spec)


def test_a_pattern_that_explodes_behind_another_is_one_line():
    spec = spec_of("qwen")
    cuts(spec).insert(0, split_at("(?:a|aa)+(?!a)[^a]"))
    with pytest.raises(BadInput, match="cannot cut 'aaaa"):
        from_spec(spec).encode("a" * 2000)


def test_a_bug_is_not_taken_for_a_bad_file():
    class Broken(Tokenizer):
        def __init__(self, spec, configs, files):
            self.no_such_attribute

    with pytest.raises(AttributeError, match="no_such_attribute"):
        Broken.from_pretrained(HERE / "qwen")


def test_a_byte_order_mark_is_accepted(tmp_path):
    text = (HERE / "qwen" / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert Tokenizer.from_pretrained(tmp_path).encode("<tool_call>") == [655]


@pytest.mark.parametrize("files, blamed, message", [
    ({}, "", "no tokenizer"),
    ({"vocab.json": b"{}"}, "", "no tokenizer"),
    ({"tokenizer.json": b"{\"model\": "}, "tokenizer.json", "not JSON, or cut short"),
    ({"tokenizer.json": b"[1, 2]"}, "tokenizer.json", "JSON object"),
    ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json", "not UTF-8 text (byte 0)"),
    ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json", "not JSON, or cut short"),
    ({"tokenizer.model": b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"}, "tokenizer.model",
     "put tokenizer.json beside it"),
    ({"tokenizer.model": b""}, "tokenizer.model", "SentencePiece"),
    ({"tokenizer.model": b"IQ== 0\nIQ== 1\n"}, "tokenizer.model", "two lines"),
    ({"tokenizer.model": b"IQ== 0\nIg== one\n"}, "tokenizer.model", "cannot be read"),
    ({"tokenizer.model": b"IQ== 0\n"}, "tokenizer.model", "256 bytes"),
    ({"vocab.json": b"{\"a\": 0}", "merges.txt": b"a b c\n"}, "merges.txt", "two tokens"),
    ({"vocab.json": b"{\"a\": 0}", "merges.txt": b""}, "vocab.json", "256 bytes"),
    ({"vocab.json": b"{\"a\": 0}", "merges.txt": b"\xff"}, "merges.txt", "not UTF-8"),
    ({"vocab.json": b"{}", "merges.txt": b"", TOKENS: b"{\"tokenizer_class\": \"GPT2Tokenizer\"}"},
     TOKENS, "GPT2Tokenizer"),
    ({"vocab.json": b"{}", "merges.txt": b"", TOKENS: b"{\"added_tokens_decoder\": {\"x\": {}}}"},
     TOKENS, "'x' in added_tokens_decoder"),
    ({"tokenizer.json": b"{}", TOKENS: b"{"}, TOKENS, "not JSON, or cut short"),
])
def test_missing_and_malformed_files_are_named(files, blamed, message, tmp_path):
    for file, contents in files.items():
        (tmp_path / file).write_bytes(contents)
    refused = refusal(tmp_path)
    assert refused.startswith(str(tmp_path / blamed)) and message in refused


@pytest.mark.parametrize("file, contents", [
    (TOKENS, {"eos_token": "</s>"}), (TOKENS, {"eos_token": {}}), (TOKENS, {"eos_token": ["a"]}),
    (MAP, {"pad_token": {"content": "[PAD]"}}),
    (CONFIG, {"eos_token_id": "2"}), (CONFIG, {"eos_token_id": []}),
    (CONFIG, {"eos_token_id": True}),
])
def test_a_config_that_names_no_token_is_refused(file, contents, tmp_path):
    shutil.copy(HERE / "qwen" / "tokenizer.json", tmp_path)
    (tmp_path / file).write_text(json.dumps(contents))
    assert file in refusal(tmp_path)
