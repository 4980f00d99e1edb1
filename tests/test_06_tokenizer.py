"""Text to ids and back.

After reading this file you know how a text becomes the ids a checkpoint was trained on: added tokens are cut out, the text is
normalized and split, and each word's pieces are merged in the order of a list; why the order of a list of *pairs* is not quite
an order of *tokens*; what Llama 3, Qwen and Gemma do differently; and why training data must be encoded with special=False.

The right answers in golden/tokenizers/ come from Hugging Face's `tokenizers` (golden/make_tokenizers.py made them), for three small
tokenizers that lie there too and for the real ones in ../shared, if that folder exists.
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
from data.tokenizer import CHAR_TO_BYTE, LLAMA_SPECIAL, LONGEST_RUN, Tokenizer, merge_by_hand, merge_ranks

HERE = Path(__file__).resolve().parent / "golden" / "tokenizers"
GOLDEN = json.loads((HERE / "golden.json").read_text("utf-8"))
MINIS = json.loads((HERE / "minis.json").read_text("utf-8"))["minis"]
TEXTS = GOLDEN["texts"]
SMALL, REAL = ["llama", "qwen", "gemma"], ["llama3", "qwen2", "gemma-format"]
FRONT = {"llama": 1, "qwen": 0, "gemma": 1, "llama3": 1, "qwen2": 0, "gemma-format": 1}       # ids the template puts in front

load = cache(Tokenizer.from_pretrained)


@pytest.fixture(params=SMALL + REAL)
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name, request):
    """The small ones lie beside this file; a real one asks for `shared`, which skips the test where there is no such folder."""
    return load(HERE / name if name in SMALL else request.getfixturevalue("shared") / "tokenizers" / name)


def spec_of(name):
    return json.loads((HERE / name / "tokenizer.json").read_text("utf-8"))


def from_spec(spec):
    return Tokenizer(spec, [{}, {}, {}], [])


def first_difference(texts, got, expected):
    """None, or the first text with a wrong answer: easier to read than two long lists."""
    return next(((t, g, e) for t, g, e in zip(texts, got, expected, strict=True) if g != e), None)


def letters(merges, words=()):
    """A tokenizer of the letters a to e with these merges ("a b"), as in Gemma's files."""
    tokens = dict.fromkeys([*"abcde▁", "<unk>", *(m.replace(" ", "") for m in merges), *words])
    return {"model": {"type": "BPE", "vocab": {t: n for n, t in enumerate(tokens)}, "merges": merges, "unk_token": "<unk>"},
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}


# ------------------------------------------------------------------------------------------------------ merging, by hand

def test_merges_go_by_their_place_in_the_list_not_from_left_to_right():
    pairs = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}
    assert merge_by_hand("abc", pairs) == (["abc"], 2)                     # b+c first, then a+bc
    assert merge_by_hand("abab", pairs) == (["ab", "ab"], 1)
    tokenizer = from_spec(letters(["b c", "a b", "a bc"]))
    names = tokenizer._names
    assert [names[id] for id in tokenizer.encode("abab abc")] == ["ab", "ab", "▁", "abc"]


def test_a_token_has_the_rank_of_the_one_pair_that_makes_it():
    # "abc" is listed twice. "abc" alone goes a+b, then ab+c: the pair a+bc, though it stands first, never meets.
    pairs = {("a", "bc"): 0, ("a", "b"): 1, ("b", "c"): 2, ("ab", "c"): 3}
    assert merge_ranks(pairs, "abc") == {"ab": 1, "bc": 2, "abc": 3}
    # Without ab+c nothing makes "abc": it has no rank, or tiktoken would join "ab" and "c" to it.
    assert merge_ranks({("a", "b"): 0, ("b", "c"): 1, ("a", "bc"): 2}, "abc") == {"ab": 0, "bc": 1}


def merge_by_result(word, rank):
    """The tempting wrong rule: join the neighbours whose *result* stands first, whatever pair the list names."""
    parts = [*word]
    while found := [(rank[l + r], i) for i, (l, r) in enumerate(zip(parts, parts[1:])) if l + r in rank]:
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_any_list_of_merges_gives_what_merging_by_hand_gives():
    # Random lists in random order, so with dead ends and with results before their parts: much wilder than any published file.
    chance, fooled = random.Random(0), 0
    for trial in range(150):
        alphabet = "abc"[:chance.randint(1, 3)]
        tokens = {"".join(chance.choices(alphabet, k=chance.randint(2, 6))) for _ in range(10)}
        known = tokens | {*alphabet}
        merges = [f"{t[:i]} {t[i:]}" for t in sorted(tokens) for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
        chance.shuffle(merges)
        pairs = {tuple(m.split(" ")): place for place, m in enumerate(merges)}
        tokenizer = from_spec(letters(merges, sorted(tokens)))
        texts = ["".join(chance.choices(alphabet, k=k)) for k in (2, 3, 4, 5, 6, 8, 10, 15, 20, 600 if trial % 10 == 0 else 30)]
        got = [[tokenizer._names[id] for id in tokenizer.encode(text)] for text in texts]
        expected = [merge_by_hand(text, pairs)[0] for text in texts]
        assert first_difference(texts, got, expected) is None, merges
        by_result = {left + right: place for (left, right), place in reversed(pairs.items())}
        fooled += any(merge_by_result(text, by_result) != e for text, e in zip(texts, expected))
    assert fooled >= 20                                                   # of 150: these lists do tell the two rules apart


def test_every_byte_has_a_printable_character():
    assert len(CHAR_TO_BYTE) == 256 and {*CHAR_TO_BYTE.values()} == {*range(256)} and all(c.isprintable() for c in CHAR_TO_BYTE)
    assert [CHAR_TO_BYTE[c] for c in "ĠĊĉA"] == [*b" \n\tA"]


# ------------------------------------------------------------------------------------------------ the reference's answers

def test_ids_are_the_reference_s(name, tokenizer):
    assert first_difference(TEXTS, [tokenizer.encode(text) for text in TEXTS], GOLDEN[name]["ids"]) is None


def test_bos_false_leaves_out_the_template_only(name, tokenizer):
    assert [tokenizer.encode(text, bos=False) for text in TEXTS] == [ids[FRONT[name]:] for ids in GOLDEN[name]["ids"]]


def test_with_special_false_control_tokens_are_plain_text(name, tokenizer):
    # The reference's answers come from a copy of the file without its control tokens.
    expected = [GOLDEN[name]["plain"].get(str(n), ids[FRONT[name]:]) for n, ids in enumerate(GOLDEN[name]["ids"])]
    got = [tokenizer.encode(text, bos=False, special=False) for text in TEXTS]
    assert first_difference(TEXTS, got, expected) is None
    assert len(GOLDEN[name]["plain"]) >= 9                                # the texts do hold control tokens
    assert max(map(max, filter(None, got))) <= tokenizer.max_id


@pytest.mark.parametrize("name", SMALL)
def test_with_special_false_no_id_of_a_control_token_comes_out(name):
    tokenizer, spec = load(HERE / name), spec_of(name)
    control = {t["id"] for t in spec["added_tokens"] if not t["content"].replace("▁", " ").isspace()}
    names = [t["content"] for t in spec["added_tokens"] if t["id"] in control]
    assert all(tokenizer.encode(text, bos=False) == [id] for text, id in zip(names, sorted(control)))
    for text in [*names, "".join(names), *TEXTS]:
        assert not control & {*tokenizer.encode(text, bos=False, special=False)}, text


def test_decode_gives_the_text_back(name, tokenizer):
    # Up to what the tokenizer itself changes: NFC for Qwen, "▁" for " " in Gemma. The reference's answer is kept where it is not the text.
    expected = [GOLDEN[name]["decoded"].get(str(n), text) for n, text in enumerate(TEXTS)]
    assert first_difference(TEXTS, [tokenizer.decode(tokenizer.encode(text, bos=False)) for text in TEXTS], expected) is None


@pytest.mark.parametrize("mini", MINIS, ids=[m["name"] for m in MINIS])
def test_odd_rules(mini):
    tokenizer = from_spec(mini["spec"])
    assert first_difference(mini["texts"], [tokenizer.encode(text) for text in mini["texts"]], mini["ids"]) is None
    expected = [mini["plain"].get(str(n), ids) for n, ids in enumerate(mini["ids"])]
    got = [tokenizer.encode(text, bos=False, special=False) for text in mini["texts"]]
    assert first_difference(mini["texts"], got, expected) is None


@pytest.mark.parametrize("name, edit", [
    ("llama", lambda s: s["model"].update(ignore_merges=False)),
    ("llama", lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\p{N}{1,3}|\s+")),
    ("llama", lambda s: s["post_processor"].update(processors=[])),
    ("qwen", lambda s: s.update(normalizer=None)),
    ("qwen", lambda s: s["model"]["merges"].reverse()),
    ("qwen", lambda s: s["added_tokens"][3].update(content="<other_call>")),
    ("gemma", lambda s: s["model"].update(byte_fallback=False)),
    ("gemma", lambda s: s["model"]["merges"].reverse()),
    ("gemma", lambda s: s["model"].update(merges=[m for m in s["model"]["merges"] if "".join(m) != "<0x41>"])),
])
def test_the_hard_texts_notice_when_a_rule_is_broken(name, edit):
    spec = spec_of(name)
    edit(spec)
    assert first_difference(TEXTS, map(from_spec(spec).encode, TEXTS), GOLDEN[name]["ids"]) is not None


# --------------------------------------------------------------------------------------------------- other files, same ids

def write_tiktoken(path, vocab):
    tokens = sorted(vocab, key=vocab.get)
    path.write_bytes(b"".join(base64.b64encode(bytes(CHAR_TO_BYTE[c] for c in t)) + b" %d\n" % vocab[t] for t in tokens))


def test_llama_s_tokenizer_model_gives_the_same_ids(tmp_path):
    write_tiktoken(tmp_path / "tokenizer.model", spec_of("llama")["model"]["vocab"])
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert first_difference(TEXTS, map(tokenizer.encode, TEXTS), GOLDEN["llama"]["ids"]) is None
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.files) == (704, 705, ["tokenizer.model"])


def test_llama_s_real_tokenizer_model_gives_the_same_ids(shared, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(shared / "tokenizers" / "llama3" / "tokenizer.model")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert first_difference(TEXTS, map(tokenizer.encode, TEXTS), GOLDEN["llama3"]["ids"]) is None
    listed = json.loads((shared / "tokenizers" / "llama3" / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert [f"<|{name}|>" for name in LLAMA_SPECIAL] == [token["content"] for token in listed]
    assert [token["id"] for token in listed] == [*range(128000, 128256)]


def write_vocab_and_merges(folder, model):
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]), "utf-8")


def test_qwen_s_vocab_and_merges_give_the_same_ids(tmp_path):
    spec = spec_of("qwen")
    write_vocab_and_merges(tmp_path, spec["model"])
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in reversed(spec["added_tokens"])}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}))
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
    assert first_difference(TEXTS, map(from_spec(spec).encode, TEXTS), GOLDEN["qwen"]["ids"]) is None


def test_tokenizer_json_comes_first(tmp_path):
    shutil.copy(HERE / "qwen" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert Tokenizer.from_pretrained(tmp_path).encode("<tool_call>") == [655]


# ------------------------------------------------------------------------------------------------ bos, eos, pad, max_id, files

@pytest.mark.parametrize("name, configs, expected", [
    ("llama", {}, (704, 705, 708)),                                       # template; well-known names
    ("qwen", {}, (None, 652, None)),                                      # <|endoftext|>
    ("gemma", {}, (2, 1, 0)),
    ("gemma", {"tokenizer_config.json": {"eos_token": "<end_of_turn>", "pad_token": None}}, (2, 20, None)),     # null is an answer
    ("qwen", {"tokenizer_config.json": {"bos_token": None}, "config.json": {"bos_token_id": 652}}, (None, 652, None)),
    ("qwen", {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}, "config.json": {"eos_token_id": 652}}, (None, 654, None)),
    ("qwen", {"config.json": {"bos_token_id": 652, "eos_token_id": [654, 652], "pad_token_id": None}}, (652, 654, None)),
])
def test_where_bos_eos_and_pad_come_from(name, configs, expected, tmp_path):
    shutil.copy(HERE / name / "tokenizer.json", tmp_path)
    for file, contents in configs.items():
        (tmp_path / file).write_text(json.dumps(contents))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected
    assert tokenizer.files == ["tokenizer.json", *(file for file in configs if file != "config.json")]


def test_bos_may_come_from_the_template_alone():
    spec = spec_of("gemma")
    spec["post_processor"]["special_tokens"]["<bos>"]["ids"] = [19]
    tokenizer = from_spec(spec)
    assert tokenizer.bos_id == 19 and tokenizer.encode("") == [19]


def test_shipped_configs_name_the_three():
    assert [(t.bos_id, t.eos_id, t.pad_id) for t in map(load, (HERE / name for name in SMALL))] == [(704, 705, 708), (None, 654, 652), (2, 1, 0)]


def test_max_id_leaves_out_added_tokens_that_data_cannot_reach():
    # Published Gemma 3 1B lists <image_soft_token> one beyond its embedding. That must not look like a mismatch.
    spec = spec_of("gemma")
    largest = len(spec["model"]["vocab"]) - 1
    spec["added_tokens"].append({"id": largest + 1, "content": "<image_soft_token>", "special": True})
    assert from_spec(spec).max_id == largest
    assert from_spec(spec).encode("<image_soft_token>", bos=False) == [largest + 1]
    spec = letters([], ["<z>"])                                           # the same for one that the vocabulary holds too, at its end
    spec["added_tokens"] = [{"id": 7, "content": "<z>", "special": True}]
    assert from_spec(spec).max_id == 6
    assert load(HERE / "llama").max_id == 705                             # bos and eos count, the 254 others do not
    assert load(HERE / "qwen").max_id == 654                              # eos here is <|im_end|>


# --------------------------------------------------------------------------------------------------------- hard on the engine

@pytest.mark.parametrize("text", [" ", "a", "\n", "\t", "1", "!", "é", "▁", "記", "\u3000", " \n", "'s", "<", "\u0301", "😀"])
@pytest.mark.parametrize("name", SMALL)
def test_100_000_times_the_same(name, text):
    text, tokenizer = text * 100_000, load(HERE / name)
    expected = unicodedata.normalize("NFC", text) if name == "qwen" else text.replace("▁", " ") if name == "gemma" else text
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == expected


def test_too_much_white_space_is_refused_not_a_crash():
    with pytest.raises(BadInput, match="white space"):
        load(HERE / "llama").encode("a" + " " * (LONGEST_RUN + 1))
    assert load(HERE / "llama").encode("a" + " " * LONGEST_RUN)


def test_half_a_surrogate_pair_is_refused():
    for name in SMALL:
        with pytest.raises(BadInput, match="character 2, .*surrogate"):
            load(HERE / name).encode("ab\ud83d")


def test_broken_utf8_decodes_to_the_replacement_character():
    assert load(HERE / "gemma").decode([load(HERE / "gemma").encode("🫠", bos=False)[0]]) == "\ufffd"


@pytest.mark.parametrize("id", [-1, 10**9, None, "7"])
def test_an_id_that_no_token_has_is_named(id):
    with pytest.raises(BadInput, match=f"id {id!r} "):
        load(HERE / "llama").decode([1, 2, id])


# -------------------------------------------------------------------------------------------------------------- bad files

def word_without_its_last_merge(spec):
    vocab = spec["model"]["vocab"]
    vocab.update(zz=vocab.pop("ĠSolidGoldMagikarp"), zzz=vocab.pop("Donaudampfschifffahrt"))
    spec["model"]["merges"].append(["z", "z"])


def no_spare_byte(spec):
    spec["model"]["vocab"].pop("<0xE2>")
    spec["model"]["unk_token"] = None


BAD = [  # tokenizer, what is done to it, what the message says
    ("qwen", lambda s: s["model"].update(type="Unigram"), "Unigram"),
    ("qwen", lambda s: s["model"].update(type="WordPiece"), "WordPiece"),
    ("qwen", lambda s: s["model"].pop("vocab"), "vocab"),
    ("qwen", lambda s: s["model"].pop("merges"), "merges"),
    ("qwen", lambda s: s["model"].update(merges=None), "cannot be read"),
    ("qwen", lambda s: s["model"].update(vocab=[["a", 0.5]]), "cannot be read"),
    ("qwen", lambda s: s.pop("model"), "model"),
    ("qwen", lambda s: s["model"].update(dropout=0.1), "dropout"),
    ("qwen", lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ("qwen", lambda s: s["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    ("qwen", lambda s: s.update(truncation={"max_length": 8}), "truncation"),
    ("qwen", lambda s: s["model"]["vocab"].pop("Ġ"), "256 bytes"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=1), "same id"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=1.0), "whole number"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=True), "whole number"),
    ("qwen", lambda s: s["model"]["vocab"].update(a="1"), "whole number"),
    ("qwen", lambda s: s["model"]["vocab"].update(a=-1), "whole number"),
    ("qwen", lambda s: s["model"]["merges"].append("a zzz"), "'a' + 'zzz'"),
    ("qwen", lambda s: s["model"]["merges"].append("q q"), "'q' + 'q'"),
    ("qwen", lambda s: s["model"]["merges"].append("abc"), "cannot be read"),
    ("qwen", lambda s: s["model"]["merges"].append(["a", "b", "c"]), "cannot be read"),
    ("qwen", lambda s: s["model"]["merges"].append(7), "cannot be read"),
    ("qwen", lambda s: s.update(normalizer={"type": "NFKC"}), "NFKC"),
    ("qwen", lambda s: s.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}), "Lowercase"),
    ("qwen", lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    ("qwen", lambda s: s.update(pre_tokenizer=None), "not supported"),
    ("qwen", lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}), "Digits"),
    ("qwen", lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "Removed"),
    ("qwen", lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "not supported"),
    ("qwen", lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a"), "cannot be read"),
    ("qwen", lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "not supported"),
    ("qwen", lambda s: s.update(post_processor={"type": "BertProcessing"}), "BertProcessing"),
    ("qwen", lambda s: s["added_tokens"][1].update(id=700), "'<|im_start|>' has id 700; expected 653"),
    ("qwen", lambda s: s["added_tokens"][1].update(id="653"), "'653'"),
    ("qwen", lambda s: s["model"]["vocab"].update({"Ġunreachable": 652}), "the id of 'Ġunreachable'"),
    ("qwen", lambda s: s["added_tokens"][1].update(lstrip=True), "lstrip"),
    ("qwen", lambda s: s["added_tokens"][1].update(single_word=True), "single_word"),
    ("qwen", lambda s: s["added_tokens"].insert(0, {"id": s["model"]["vocab"]["!"], "content": "!"}), "256 bytes"),
    ("qwen", lambda s: s.update(added_tokens=[7]), "cannot be read"),
    ("llama", word_without_its_last_merge, "ignore_merges without a merge for 'zzz'"),
    ("gemma", lambda s: s["model"]["vocab"].update({"<0x41>a": 9999}) or s["model"]["merges"].append(["<0x41>", "a"]), "byte tokens"),
    ("gemma", lambda s: s["normalizer"].update(content="_"), "not supported"),
    ("gemma", lambda s: s["pre_tokenizer"].update(pattern={"String": "a"}), "not supported"),
    ("gemma", lambda s: s["post_processor"]["single"].append({"SpecialToken": {"id": "<eos>", "type_id": 0}}), "after the text"),
    ("gemma", lambda s: s["post_processor"]["special_tokens"].clear(), "<bos>"),
    ("gemma", lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
    ("gemma", no_spare_byte, "byte token is missing"),
]


@pytest.mark.parametrize("name, edit, message", BAD, ids=range(len(BAD)))
def test_a_file_of_another_kind_is_refused_in_one_line(name, edit, message, tmp_path):
    spec = copy.deepcopy(spec_of(name))
    edit(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(BadInput) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(path)) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("files, blamed, message", [
    ({}, "", "no tokenizer"),
    ({"vocab.json": b"{}"}, "", "no tokenizer"),
    ({"tokenizer.json": b"{\"model\": "}, "tokenizer.json", "not readable as JSON"),
    ({"tokenizer.json": b"[1, 2]"}, "tokenizer.json", "JSON object"),
    ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json", "not readable as JSON"),
    ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json", "not readable as JSON"),
    ({"tokenizer.model": b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"}, "tokenizer.model", "put tokenizer.json beside it"),
    ({"tokenizer.model": b""}, "tokenizer.model", "SentencePiece"),
    ({"tokenizer.model": b"IQ== 0\nIQ== 1\n"}, "tokenizer.model", "two lines"),
    ({"tokenizer.model": b"IQ== 0\nIg== one\n"}, "tokenizer.model", "cannot be read"),
    ({"tokenizer.model": b"IQ== 0\n"}, "tokenizer.model", "256 bytes"),
    ({"vocab.json": b"{\"a\": 0}", "merges.txt": b"a b c\n"}, "merges.txt", "two tokens"),
    ({"vocab.json": b"{\"a\": 0}", "merges.txt": b""}, "vocab.json", "256 bytes"),
    ({"vocab.json": b"{}", "merges.txt": b"", "tokenizer_config.json": b"{\"tokenizer_class\": \"GPT2Tokenizer\"}"}, "tokenizer_config.json", "GPT2Tokenizer"),
    ({"tokenizer.json": b"{}", "tokenizer_config.json": b"{"}, "tokenizer_config.json", "not readable as JSON"),
])
def test_missing_and_malformed_files_are_named(files, blamed, message, tmp_path):
    for file, contents in files.items():
        (tmp_path / file).write_bytes(contents)
    with pytest.raises(BadInput) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path / blamed)) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file, contents", [
    ("tokenizer_config.json", {"eos_token": "</s>"}), ("special_tokens_map.json", {"pad_token": {"content": "[PAD]"}}),
    ("config.json", {"eos_token_id": "2"}), ("config.json", {"eos_token_id": []}), ("tokenizer_config.json", {"eos_token": {}}),
])
def test_a_config_that_names_no_token_is_refused(file, contents, tmp_path):
    shutil.copy(HERE / "qwen" / "tokenizer.json", tmp_path)
    (tmp_path / file).write_text(json.dumps(contents))
    with pytest.raises(BadInput) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
