"""The tokenizers of published models, against Hugging Face's `tokenizers`, which runs in a Python
of its own.

After reading this file you know that whatever the text, the ids are those of the library: for
20,000 strings of everything a text can hold, and for every code point alone.
"""
import json
import random
import re
from functools import cache

import pytest

from data.tokenizer import CHAR_TO_BYTE, Tokenizer
from helpers import reference

pytestmark = pytest.mark.real
load = cache(Tokenizer.from_pretrained)
NAMES = ["smollm2-135m-instruct", "gemma-3-270m"]
THEIRS = r"""
import json, sys
from tokenizers import Tokenizer
folder, path, count = sys.argv[1:]
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
spec = json.loads(tokenizer.to_str())
names = {token["content"] for token in spec["added_tokens"]
         if token["special"] or token["content"].strip("\n\t \u2581")}
spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in names]
plain = Tokenizer.from_str(json.dumps(spec))            # control tokens are ordinary text to it
texts = json.load(open(path, encoding="utf-8"))
special = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
print(json.dumps({
    "special": special,
    "plain": [plain.encode(text, add_special_tokens=False).ids for text in texts[:int(count)]],
    "text": [tokenizer.decode(ids, skip_special_tokens=False) for ids in special[:int(count)]]}))
"""
EVERY_CHARACTER = [*map(chr, [*range(0xD800), *range(0xE000, 0x110000)])]
ODD = ["\u0301", "\u0323", "\u200d", "\ufe0f", "\u00ad", "\ufeff", "\u2581", "Ġ", "ſ", "İ", "ﬁ"]


def mixtures(words, names, count):
    """So many strings, each of up to 12 pieces of all kinds, sometimes of one kind."""
    chance = random.Random(0)

    def digits():
        return "".join(chance.choices("0123456789²½Ⅷ٣߁𝟏𑁦𑷠", k=chance.randint(1, 9)))

    def repeated():
        return chance.choice(" \t\n\r\x0b\x85\xa0\u3000!-=a1.▁") * chance.randint(1, 20)

    kinds = [
        lambda: chance.choice(words), lambda: " " + chance.choice(words), digits, repeated,
        lambda: chr(chance.choice([*range(32), *range(127, 160)])),
        lambda: chr(chance.randrange(0xD800)), lambda: chr(chance.randrange(0xE000, 0x110000)),
        lambda: chr(chance.randrange(0x1F300, 0x1FB00)), lambda: chr(chance.randrange(0xC0, 0x250)),
        lambda: chance.choice(ODD), lambda: chance.choice(names),
        lambda: chance.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"),
        lambda: chance.choice(["'s", "'LL", "'ſ", "<0x41>", "<|im_", "http://", "e\u0301"])]
    for _ in range(count):
        some = chance.sample(kinds, chance.randint(1, len(kinds)))
        yield "".join(chance.choice(some)() for _ in range(chance.randint(1, 12)))


def words_of(shared):
    """The words of a few hundred real questions and answers."""
    files = [shared / "datasets" / task / "test.json" for task in ("gsm8k", "boolq", "ARC-Easy")]
    texts = [row["instruction"] + " " + row["output"]
             for file in files for row in json.loads(file.read_text("utf-8"))[:200]]
    return sorted({word for text in texts for word in re.findall(r"\S+", text)})


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_library_whatever_the_text(name, real_models, shared, tmp_path):
    folder, path = real_models / name, tmp_path / "texts.json"
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    names = [token["content"] for token in spec["added_tokens"]][:120]
    mixed = [*mixtures(words_of(shared), names, 20_000)]
    texts = mixed + EVERY_CHARACTER
    path.write_text(json.dumps(texts), "utf-8")
    theirs = reference(real_models, ["tokenizers"], THEIRS, folder, path, len(mixed))
    tokenizer = load(folder)
    for text, expected in zip(texts, theirs["special"], strict=True):
        assert tokenizer.encode(text, bos=False) == expected, ascii(text)
    for n, (plain, back) in enumerate(zip(theirs["plain"], theirs["text"], strict=True)):
        assert tokenizer.encode(mixed[n], bos=False, special=False) == plain, ascii(mixed[n])
        assert tokenizer.decode(theirs["special"][n]) == back, ascii(mixed[n])


def test_smollm_lacks_bytes_and_drops_them(real_models):
    folder = real_models / NAMES[0]
    vocab = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    missing = [byte for character, byte in CHAR_TO_BYTE.items() if character not in vocab]
    tokenizer = load(folder)
    control = [chr(byte) for byte in missing if byte < 32]
    assert len(missing) == 21 and len(control) == 6
    for character in control:
        assert tokenizer.encode(character) == []
        assert tokenizer.encode(f"!{character}!") == tokenizer.encode("!!")      # they meet
        parts = tokenizer.encode("a") + tokenizer.encode("b")
        assert tokenizer.encode(f"a{character}b") == parts                       # two words


@pytest.mark.parametrize("name, expected", [
    (NAMES[0], ("<|im_start|>", "<|im_end|>", "<|im_end|>", [])),
    (NAMES[1], ("<bos>", "<eos>", "<pad>", ["<bos>"]))])
def test_the_ends_are_what_the_files_say(name, expected, real_models):
    tokenizer = load(real_models / name)
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    front = [tokenizer.decode([id]) for id in tokenizer.encode("")]
    assert (*(tokenizer.decode([id]) for id in ids), front) == expected
