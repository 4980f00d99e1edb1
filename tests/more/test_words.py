"""After this file you know to which kind of words each token of a text belongs."""
import re

import pytest

from conftest import ROOT
from data.tokenizer import Tokenizer
from lab.flux import readable
from lab.words import CLASSES, FUNCTION_WORDS, TITLES, token_classes, words

P, F, C, D, W = CLASSES                # punctuation, function, copied, digits, content
TABLE = [                              # pieces, prompt, classes
    (["The", " apple", ",", " the", " apples", "."], "", [F, W, P, F, W, P]),
    ([" don", "'t"], "", [F, F]),
    ([" don", "'", "t"], "", [F, F, F]),
    (["don’t"], "", [F]),
    ([" DON'T"], "", [F]),
    (["U", "lmo", "'s"], "", [W, W, F]),
    (["'s"], "", [F]),
    (["he", "'", "s"], "", [F, F, F]),
    (["o", "'", "clock"], "", [W, W, W]),
    ([" 10", ",", "0", "00"], "", [D, D, D, D]),
    ([" 10", ",", " 20"], "", [D, P, D]),
    ([" 3", ".", "5", "."], "", [D, D, D, P]),
    ([" 10", ",", "000"], "It has 10000.", [C, C, C]),
    ([" 10"], "It has 10,000.", [D]),
    (["2nd"], "", [D]),
    ([" answer", "1"], "", [W, W]),
    ([" KES", "TOW"], "Does he live in Kestow?", [C, C]),
    ([" Kes"], "Kestow", [W]),
    (["the"], "the", [F]),
    ([","], ",", [P]),
    ([" in", "side", "r"], "", [W, W, W]),             # begins with function words, and is none
    (["\n"], "", [P]),
    ([" ", "17"], "", [P, D]),
    (["  "], "", [P]),
    ([""], "", [P]),
    ([" +"], "", [P]),
    (["🙂"], "🙂", [P]),
    (["_"], "", [P]),
    (["你好"], "", [W]),
    (["五"], "", [W]),                                 # five, and a letter for all that
    (["cafe\u0301"], "CAFÉ", [C]),
    (["½"], "", [D]),
    (["हिन्दी"], "", [W]),
    ([' "', "Yes", '"'], "", [P, W, P]),
    (["Two", " ap", "ples", ",", " not", " 1", "7"], "How many Apples?", [W, C, C, P, F, D, D]),
    (["answer", ":", "<<", "48", "/", "2", "=", "24", ">>", "24"], "48 clips",
     [W, P, P, C, P, D, P, D, P, D]),
]


@pytest.mark.parametrize("pieces, prompt, classes", TABLE)
def test_a_token_has_the_class_of_its_word(pieces, prompt, classes):
    assert token_classes(pieces, prompt) == classes


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_how_a_text_is_cut_into_tokens_changes_no_class(name):
    tokenizer = Tokenizer.from_pretrained(ROOT / "data" / "toy" / name)
    text = "Ulmo's 1,200 geese don't\nlive here; they're in \"Kestow\". 🙂"
    letters = token_classes(list(text))
    assert [letters[text.index(c)] for c in "U'1,gd;v\"K🙂"] == [W, F, D, D, W, F, P, W, P, W, P]
    pieces = [piece for piece, _ in readable(tokenizer, tokenizer.encode(text, bos=False))]
    starts = [sum(map(len, pieces[:i])) + len(piece) - len(piece.lstrip())
              for i, piece in enumerate(pieces)]
    expected = [letters[at] if piece.strip() else P for at, piece in zip(starts, pieces)]
    assert token_classes(pieces) == expected


def test_words_end_where_spaces_and_punctuation_begin():
    text = "Ulmo's 1,200.5 geese, don't!"
    found = [text[start:end] for start, end in words(text)]
    assert found == ["Ulmo", "'s", "1,200.5", "geese", "don't"]


def test_the_list_of_function_words_is_one():
    assert 150 <= len(FUNCTION_WORDS) <= 250
    assert all(re.fullmatch("[a-z]+", word) for word in FUNCTION_WORDS)


def test_every_class_has_a_title():
    assert tuple(TITLES) == CLASSES and len(set(TITLES.values())) == 5
