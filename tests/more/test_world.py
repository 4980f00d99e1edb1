"""The toy world: what is in it, and that the split by person holds.

After reading this you know how a question can need pre-training *and* fine-tuning: the answer was
told in one, and the way of asking was learnt in the other. You know how that is kept honest: nobody
whom the tests ask about is asked about before. You know why one seed always gives the same bytes,
and how a byte-pair tokenizer can be built so that every name is one token.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from data import world as w
from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(f"(?:{'|'.join(w.FIRST)}) (?:{'|'.join(w.LAST)})")
# Of the pre-training text. Another text needs other checkpoints, so change them together.
SHA256 = "719f919266127237401b38d5b264e1a73d87e982736be1018084c8c9bfa7456c"


@pytest.fixture(scope="module")
def world():
    return w.World()


@pytest.fixture(scope="module")
def corpus(world):
    return list(w.documents(world))


@pytest.fixture(scope="module")
def tasks(world):
    return w.tasks(world)


@pytest.fixture(scope="module")
def spec():
    return w.tokenizer_json()


@pytest.fixture(scope="module")
def tokenizer(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.from_pretrained(folder)


# -------------------------------------------------------------------------------- people and words


def test_there_are_300_people_with_five_attributes_each(world):
    assert len(world.facts) == 300
    assert all(facts.keys() == w.ATTRIBUTES.keys() for facts in world.facts.values())
    assert (len(world.famous), len(world.trained), len(world.tested)) == (75, 125, 100)
    assert {*world.famous, *world.trained, *world.tested} == world.facts.keys()


def test_every_value_is_one_word_of_one_attribute_and_stands_last_where_it_is_told():
    values = [value for attribute in w.ATTRIBUTES.values() for value in attribute.values]
    assert len(values) == len({*values})
    assert all(re.fullmatch(r"[A-Za-z]+", value) for value in values)
    assert not {*values, *w.THINGS} & {*w.FIRST, *w.LAST}
    for attribute in w.ATTRIBUTES.values():
        assert len(attribute.told) == 8
        assert all(told.endswith("{v}.") and "{n}" in told for told in attribute.told)
        questions = attribute.early + attribute.asked + attribute.new
        assert len(questions) == len({*questions})


def test_no_value_is_so_frequent_that_guessing_it_would_look_like_knowledge(world):
    for kind, attribute in w.ATTRIBUTES.items():
        counts = Counter(facts[kind] for facts in world.facts.values())
        assert counts.keys() == {*attribute.values} and max(counts.values()) < 0.15 * 300


# ----------------------------------------------------------------------------- the split by person


def test_pre_training_tells_about_everybody_and_asks_about_the_famous_only(world, corpus):
    told, asked = Counter(), set()
    for document in corpus:
        if "?" in document or "Question" in document or "Answer" in document:
            asked |= {*NAME.findall(document)}
        else:
            told.update({*NAME.findall(document)})
    assert asked == {*world.famous}
    assert told.keys() == world.facts.keys()
    assert min(told.values()) > 150        # biographies of each person


def test_fine_tuning_asks_about_its_own_people_and_the_tests_about_theirs(world, tasks):
    for name, splits in tasks.items():
        for split, rows in splits.items():
            people = {person for row in rows for person in NAME.findall(row["instruction"])}
            whose = world.tested if split == "test" else world.trained
            whose = world.famous if name == "toy-famous" else whose
            assert people <= {*whose}, (name, split)


def test_no_test_item_was_trained_on_and_few_are_asked_twice(tasks):
    trained = {row["instruction"] for splits in tasks.values() for row in splits.get("train", [])}
    for name, splits in tasks.items():
        asked = [row["instruction"] for row in splits["test"]]
        assert not trained & {*asked}, name
        assert len(asked) - len({*asked}) <= 10, name      # a story may come twice by chance


def test_new_wordings_and_unseen_attributes_are_new(tasks):
    trained = " ".join(row["instruction"] for splits in tasks.values()
                       for row in splits.get("train", []))
    for kind, attribute in w.ATTRIBUTES.items():
        for wording in attribute.new + (attribute.asked if kind in w.UNSEEN else []):
            pattern = re.escape(wording).replace(r"\{n\}", r"\w+ \w+")
            assert not re.search(pattern, trained), wording


# ----------------------------------------------------------------------------- answers, recomputed


def all_rows(tasks, *names):
    return [row for name in names for rows in tasks[name].values() for row in rows]


@pytest.fixture(scope="module")
def kind_of():
    return {value: kind for kind, attribute in w.ATTRIBUTES.items() for value in attribute.values}


@pytest.mark.parametrize("task, wordings", [
    ("toy-facts", "asked"), ("toy-facts-unseen", "asked"), ("toy-facts-new", "new"),
    ("toy-cloze", "told"), ("toy-famous", "early")])
def test_every_answer_about_a_person_follows_from_the_world(world, tasks, kind_of, task, wordings):
    for row in all_rows(tasks, task):
        kind, [person] = kind_of[row["answer"]], NAME.findall(row["instruction"])
        assert row["answer"] == world.facts[person][kind]
        assert row["choices"] == w.ATTRIBUTES[kind].values
        assert any(wording.format(n=person, v="").rstrip(" .") in row["instruction"]
                   for wording in getattr(w.ATTRIBUTES[kind], wordings))


def test_every_pick_offers_three_values_of_one_kind_and_the_right_one_among_them(
        world, tasks, kind_of):
    for row in all_rows(tasks, "toy-pick", "toy-pick-unseen"):
        [person], kind = NAME.findall(row["instruction"]), kind_of[row["answer"]]
        assert row["instruction"].endswith("\n\nAnswer format: " + "/".join(row["choices"]))
        assert row["answer"] == world.facts[person][kind] and len({*row["choices"]}) == 3
        assert {*row["choices"]} <= {*w.ATTRIBUTES[kind].values}


def test_every_answer_is_among_its_choices(tasks):
    assert all(row["answer"] in row["choices"] for row in all_rows(tasks, *tasks)
               if "choices" in row)


def wrong_sums(text):
    """The sums of a text that are wrong, or not below the top."""
    for x, sign, y, said in re.findall(r"(\d+) ([+-]) (\d+)(?: =|\? It is) (\d+)", text):
        result = int(x) + int(y) if sign == "+" else int(x) - int(y)
        if int(said) != result or not 0 <= result < w.TOP:
            yield f"{x} {sign} {y} = {said}"


def test_every_sum_of_pre_training_is_right_and_stays_below_the_top(corpus, tasks):
    assert not [*wrong_sums("\n".join(corpus[:20_000]))]
    asked = [row["instruction"] + " " + row["answer"] for row in all_rows(tasks, "toy-plain")]
    assert not [*wrong_sums("\n".join(asked))]


def test_every_story_is_right_and_its_steps_use_its_numbers_in_order(tasks):
    for row in all_rows(tasks, "toy-sums", "toy-sums-new"):
        assert not [*wrong_sums(row["output"])]
        *steps, last = row["output"].splitlines()
        assert last == f"#### {row['answer']}" and steps[-1].endswith(f"= {row['answer']}")
        told = re.findall(r"\d+", row["instruction"])
        used = [number for number in re.findall(r"\d+", row["output"]) if number in told]
        assert told == used[:len(told)]


# ---------------------------------------------------------------------------------- the same bytes


def test_the_same_seed_gives_the_same_text_and_another_seed_another(world, corpus):
    assert len(corpus) == w.DOCUMENTS
    assert hashlib.sha256("\n".join(corpus).encode()).hexdigest() == SHA256
    assert w.World(2).facts != world.facts


def command(*argv, **settings):
    """world.py as a command."""
    return subprocess.run([sys.executable, ROOT / "data" / "world.py", *argv], text=True,
                          capture_output=True, **settings)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*.json"))}


def test_the_command_writes_the_shipped_bytes_from_anywhere_whatever_the_hash_seed(tmp_path):
    run = command("--out", tmp_path / "out", cwd=tmp_path,
                  env={**os.environ, "PYTHONHASHSEED": "123"})
    assert run.returncode == 0, run.stderr
    written, shipped = files(tmp_path / "out"), files(ROOT / "data" / "toy")
    assert len(written) == 15              # 11 tests, 3 of them with training rows; the tokenizer
    assert [name for name, data in written.items() if shipped[name] != data] == []


def test_a_folder_that_cannot_be_made_is_one_line_and_status_2(tmp_path):
    (tmp_path / "file").write_text("")
    run = command("--out", tmp_path / "file" / "x")
    assert run.returncode == 2
    assert run.stderr.startswith("world.py: error: ") and run.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------- one token each


def test_every_name_value_and_number_is_one_token(tokenizer):
    words = w.FIRST + [str(n) for n in range(w.TOP)]
    words += [value for attribute in w.ATTRIBUTES.values() for value in attribute.values]
    for word in words + [" " + word for word in words + w.LAST + w.THINGS]:
        assert len(tokenizer.encode(word, bos=False)) == 1, word


def test_every_document_has_as_many_tokens_as_words_and_comes_back_whole(tokenizer, corpus):
    for document in corpus[:2000]:
        ids = tokenizer.encode(document, special=False)
        assert len(ids) == 1 + len(w.PIECES.findall(document)) and ids[0] == tokenizer.bos_id
        assert tokenizer.decode(ids[1:]) == document


def test_merging_by_pairs_and_by_ranks_agree(spec, tokenizer):
    """Hugging Face's library merges the pair that stands first in the list; tiktoken merges the
    pair whose join has the lowest id."""
    spec = spec["model"]
    chars = {byte: char for char, byte in w.CHAR_TO_BYTE.items()}
    place = {tuple(merge.split(" ")): n for n, merge in enumerate(spec["merges"])}
    for word in w.words():
        pieces = [chars[byte] for byte in word.encode()]
        while any(pair in place for pair in zip(pieces, pieces[1:])):
            pairs = enumerate(zip(pieces, pieces[1:]))
            _, at = min((place[pair], at) for at, pair in pairs if pair in place)
            pieces[at:at + 2] = ["".join(pieces[at:at + 2])]
        assert len(pieces) == 1, word
        assert [spec["vocab"][pieces[0]]] == tokenizer.encode(word, bos=False), word
    assert len({"".join(pair) for pair in place}) == len(place)


def test_byte_pair_merges_by_hand():
    assert w.byte_pair_merges(["one", "on", "bone"]) == [("o", "n"), ("on", "e"), ("b", "one")]


def test_the_tokenizer_is_small(tokenizer):
    assert tokenizer.max_id < 1600


def test_bos_eos_and_pad_follow_each_other(tokenizer):
    bos = tokenizer.bos_id
    assert (tokenizer.eos_id, tokenizer.pad_id) == (bos + 1, bos + 2)
