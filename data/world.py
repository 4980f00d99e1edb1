"""The toy world: invented people, what pre-training says about them, and the tasks that need it.

    python data/world.py --out data/toy            the tasks and the tokenizer
    python data/world.py --out /tmp/toy --corpus   also the pre-training text, for people to read

There are 300 people with five attributes each. Pre-training tells every attribute in many wordings,
but asks about the 75 *famous* people only. Fine-tuning asks about 125 others. The tests ask about
the remaining 100: a right answer needs both what pre-training stored and the way of asking that
fine-tuning taught. The same seed always gives the same bytes.
"""
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # to run from anywhere

from data import Parser, command, progress, read_json, write_whole  # noqa: E402
from data.tasks import FINAL, THINK, TRIGGER  # noqa: E402
from data.tokenizer import CHAR_TO_BYTE  # noqa: E402

SEED, DOCUMENTS = 1, 110_000

# ------------------------------------------------------------------------- what there is to know

# world.json has the names and the wordings. In a wording {n} is a person's name, {v} a value, {k} a
# thing, {a} and {b} first names, {t} things that are counted; {x}, {y}, {z} and {o} make a sum.
SAID = read_json(Path(__file__).with_name("world.json"))
FIRST, LAST, THINGS = SAID["first names"], SAID["last names"], SAID["things"]
UNSEEN = SAID["unseen"]                # kinds of attributes that fine-tuning never asks for
FILLER = SAID["filler"]                # a sentence takes one phrase of each list
SUMS, RETOLD = SAID["sums"], SAID["retold"]            # retold: two with plus, two with minus


@dataclass(frozen=True)
class Attribute:
    values: list[str]
    told: list[str]        # in biographies; the value stands last, so that a cloze can leave it out
    early: list[str]       # questions of pre-training, about famous people
    asked: list[str]       # questions of fine-tuning and of the tests in distribution
    new: list[str]         # questions of the tests out of distribution


ATTRIBUTES = {kind: Attribute(**wordings) for kind, wordings in SAID["attributes"].items()}
# Facts about things and not about people: wordings, then thing -> value.
COMMON = {kind: (fact["told"], fact["pairs"]) for kind, fact in SAID["common"].items()}
# The signs of the steps, then stories: of fine-tuning and in distribution, and out of distribution.
STORIES = {signs: (told["old"], told["new"]) for signs, told in SAID["stories"].items()}
QUESTION, ANSWER = "Question: {q}", " Answer: {v}."         # the form of questions in pre-training
ASK = "Please give the correct answer to this question: {q}"
PICK = "{q}\n\nAnswer format: {o}"
TOP = 40                               # every number is smaller
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"


class Dice(random.Random):
    """Draws that depend on random() only. Python promises never to change that one sequence for a
    given whole-number seed."""

    def below(self, n):
        return int(self.random() * n)

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items):
        return sorted(items, key=lambda item: self.random())


class World:
    """The people of one seed.

    facts                      name -> kind of attribute -> value
    famous, trained, tested    the names, in three groups that share nobody
    """

    def __init__(self, seed=SEED):
        self.seed, dice = seed, Dice(seed)
        names = dice.shuffled([f"{first} {last}" for first in FIRST for last in LAST])[:300]
        self.facts = {name: {kind: dice.pick(attribute.values)
                             for kind, attribute in ATTRIBUTES.items()} for name in names}
        self.famous, self.trained, self.tested = names[:75], names[75:200], names[200:]


# ---------------------------------------------------------------------------------- pre-training


def biography(world, dice):
    name = dice.pick([*world.facts])
    return "\n".join(dice.pick(ATTRIBUTES[kind].told).format(n=name, v=value)
                     for kind, value in dice.shuffled([*world.facts[name].items()]))


def questions(world, dice):
    """Three questions about famous people. Pre-training asks about people nowhere else."""
    asked = []
    for _ in range(3):
        name, kind = dice.pick(world.famous), dice.pick([*ATTRIBUTES])
        question = dice.pick(ATTRIBUTES[kind].early).format(n=name)
        asked.append(QUESTION.format(q=question) + ANSWER.format(v=world.facts[name][kind]))
    return "\n".join(asked)


def sum_of(dice):
    """x, sign, y and the result. All three numbers are from 0 to TOP - 1."""
    x, y = dice.below(TOP), dice.below(TOP)
    if dice.random() < 0.5:
        return max(x, y), "-", min(x, y), abs(x - y)
    x, y = (x, y) if x + y < TOP else (TOP - 1 - x, TOP - 1 - y)
    return x, "+", y, x + y


def sums(world, dice):
    return "\n".join(dice.pick(SUMS).format(**dict(zip("xoyv", sum_of(dice)))) for _ in range(6))


def retold(world, dice):
    """Small stories with their sums. Here a model learns to copy numbers: without that it could
    answer no story at all."""
    lines = []
    for _ in range(4):
        x, o, y, v = sum_of(dice)
        wording = dice.pick(RETOLD[:2] if o == "+" else RETOLD[2:])
        lines.append(wording.format(a=dice.pick(FIRST), t=dice.pick(THINGS), x=x, y=y, v=v))
    return "\n".join(lines)


def filler(world, dice):
    return "\n".join(" ".join(filter(None, (dice.pick(part) for part in FILLER))) + "."
                     for _ in range(3))


def common(world, dice):
    pairs = [(wording, pair) for wordings, pairs in COMMON.values()
             for wording in wordings for pair in pairs.items()]
    return "\n".join(wording.format(k=key, v=value)
                     for wording, (key, value) in (dice.pick(pairs) for _ in range(5)))


MIX = {biography: 54, questions: 12, sums: 12, retold: 10, filler: 5, common: 7}      # per cent


def documents(world, n=DOCUMENTS):
    """The pre-training text, one document after the other. It is made anew each time."""
    dice = Dice(world.seed + 1)
    kinds = [kind for kind, share in MIX.items() for _ in range(share)]
    for _ in range(n):
        yield dice.pick(kinds)(world, dice)


# --------------------------------------------------------------------------------- the tokenizer

# How a ByteLevel pre-tokenizer cuts the text of this world, which is ASCII.
PIECES = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]+|\s")


def words():
    """Every piece of text that shall be one token, sorted. Names, values and numbers are one token
    without a space in front too."""
    asked, told, bare = [], [], [*FIRST, *map(str, range(TOP))]
    for attribute in ATTRIBUTES.values():
        asked += attribute.early + attribute.asked + attribute.new
        told += attribute.told
        bare += attribute.values
    spaced = bare + LAST + THINGS
    for wordings, pairs in COMMON.values():
        told += wordings
        spaced += pairs.values()
    stories = [text for both in STORIES.values() for texts in both for text in texts]
    texts = [*asked, *told, *stories, *SUMS, *RETOLD, *FILLER[0],
             QUESTION, ANSWER, ASK, PICK, THINK, TRIGGER, FINAL]
    texts += [" " + text for text in [*asked, *sum(FILLER[1:], []), "+", "-"]]
    pieces = {piece for text in texts for piece in PIECES.findall(re.sub(r"{\w}", "0", text))}
    return sorted(pieces | {*bare} | {" " + word for word in spaced})


def byte_pair_merges(words):
    """Byte-pair encoding (Sennrich et al. 2016): join the most frequent pair of neighbours, again
    and again, until each word is one token.

    A pair whose result exists already is not joined. So merging by pairs, as Hugging Face's library
    does, and merging by the rank of the result, as tiktoken does, give the same tokens.
    >>> byte_pair_merges(["one", "on", "bone"])
    [('o', 'n'), ('on', 'e'), ('b', 'one')]
    """
    pending, merges, made = [list(word) for word in words if len(word) > 1], [], set()
    while pending:
        counts = Counter(pair for pieces in pending for pair in zip(pieces, pieces[1:]))
        pair = max((pair for pair in counts if "".join(pair) not in made),
                   key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        made.add("".join(pair))
        for pieces in pending:
            for at in range(len(pieces) - 1):
                if tuple(pieces[at:at + 2]) == pair:       # shorter, and so unequal, past the end
                    pieces[at:at + 2] = ["".join(pair)]
        pending = [pieces for pieces in pending if len(pieces) > 1]
    return merges


def tokenizer_json():
    """A tokenizer.json of the kind that Llama and Qwen have: 256 bytes, merges, added tokens."""
    chars = {byte: char for char, byte in CHAR_TO_BYTE.items()}
    merges = byte_pair_merges(["".join(chars[byte] for byte in word.encode()) for word in words()])
    vocab = [*sorted(CHAR_TO_BYTE), *("".join(pair) for pair in merges)]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)

    def text(which, type_id):                              # a text with <|begin_of_text|> in front
        return [{"SpecialToken": {"id": BOS, "type_id": type_id}},
                {"Sequence": {"id": which, "type_id": type_id}}]

    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(vocab) + n, "content": content, **plain}
                         for n, content in enumerate((BOS, EOS, PAD))],
        "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": text("A", 0), "pair": text("A", 0) + text("B", 1),
            "special_tokens": {BOS: {"id": BOS, "ids": [len(vocab)], "tokens": [BOS]}}},
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": {token: id for id, token in enumerate(vocab)},
            "merges": [" ".join(pair) for pair in merges]}}


# ------------------------------------------------------------------------------------- the tasks


def row(instruction, answer, output=None, choices=None):
    output = TRIGGER + answer if output is None else output
    fields = {"instruction": instruction, "input": "", "output": output, "answer": answer}
    return {**fields, "choices": choices} if choices else fields


def fact(world, name, kind, wording):
    question = ASK.format(q=wording.format(n=name))
    return row(question, world.facts[name][kind], choices=ATTRIBUTES[kind].values)


def pick(world, dice, name, kind, wording):
    """The question with three values to choose from."""
    right = world.facts[name][kind]
    wrong = dice.shuffled([value for value in ATTRIBUTES[kind].values if value != right])
    values = dice.shuffled([right, *wrong[:2]])
    return row(PICK.format(q=wording.format(n=name), o="/".join(values)), right, choices=values)


def story(dice, new):
    """row("Pavo has 12 keys ...", "17", "12 + 5 = 17\n#### 17"): a story, its result, its steps."""
    sign = dice.pick([*STORIES])
    a, b = dice.shuffled(FIRST)[:2]
    x, y = 2 + dice.below(22), 2 + dice.below(14)
    if sign == "-":
        x, y = x + y, dice.pick((x, y))
    result = x - y if sign == "-" else x + y
    steps = f"{x} {sign[0]} {y} = {result}\n"
    z = 2 + dice.below(result - 2)
    if sign == "+-":
        steps += f"{result} - {z} = {result - z}\n"
        result -= z
    text = dice.pick(STORIES[sign][new]).format(a=a, b=b, t=dice.pick(THINGS), x=x, y=y, z=z)
    return row(text, str(result), f"{steps}#### {result}")


def cloze(sentence, value, choices=None):
    """Ask by leaving out the end: "Pavo Dellin works as a" -> "smith"."""
    return row(sentence.partition("{v}")[0].rstrip(), value, value, choices)


def plain_sum(dice):
    x, o, y, result = sum_of(dice)
    return cloze(dice.pick(SUMS).format(x=x, o=o, y=y, v="{v}"), str(result))


def tasks(world):
    """{task: {split: rows}}, in the order of the three suites. The order of the draws matters."""
    dice, seen = Dice(world.seed + 2), [kind for kind in ATTRIBUTES if kind not in UNSEEN]
    trained = [(name, kind) for name in world.trained for kind in seen]
    tested = [(name, kind) for name in world.tested for kind in seen]
    unseen = [(name, kind) for name in world.tested for kind in UNSEEN]

    def one_of(kind, which):
        return dice.pick(getattr(ATTRIBUTES[kind], which))

    def facts(pairs, which):
        return [fact(world, name, kind, one_of(kind, which)) for name, kind in pairs]

    def picks(pairs):
        return [pick(world, dice, name, kind, one_of(kind, "asked")) for name, kind in pairs]

    def clozes(pairs, which, form):
        return [cloze(form.replace("{q}", one_of(kind, which)).replace("{n}", name),
                      world.facts[name][kind], ATTRIBUTES[kind].values) for name, kind in pairs]

    def three_each(names):
        return [(name, kind) for name in names for kind in dice.shuffled([*ATTRIBUTES])[:3]]

    told, early = three_each(world.tested), three_each(world.famous)
    return {
        # in distribution
        "toy-facts": {"train": [fact(world, name, kind, wording) for name, kind in trained
                                for wording in ATTRIBUTES[kind].asked],
                      "test": facts(tested, "asked")},
        "toy-pick": {"train": picks(dice.shuffled(trained * 3)[:875]),
                     "test": picks(dice.shuffled(tested)[:200])},
        "toy-sums": {"train": [story(dice, new=False) for _ in range(1000)],
                     "test": [story(dice, new=False) for _ in range(200)]},
        # out of distribution: new format
        "toy-facts-new": {"test": facts(tested, "new")},
        "toy-facts-unseen": {"test": facts(unseen, "asked")},
        "toy-pick-unseen": {"test": picks(unseen)},
        "toy-sums-new": {"test": [story(dice, new=True) for _ in range(200)]},
        # out of distribution: retention
        "toy-cloze": {"test": clozes(told, "told", "{q}")},
        "toy-famous": {"test": clozes(early, "early", QUESTION + ANSWER)},
        "toy-common": {"test": [cloze(wording.replace("{k}", key), value, [*pairs.values()])
                                for wordings, pairs in COMMON.values() for wording in wordings
                                for key, value in pairs.items()]},
        "toy-plain": {"test": [plain_sum(dice) for _ in range(200)]},
    }


# ----------------------------------------------------------------------------------- the command


def write(out, seed=SEED, corpus=False):
    """Write OUT/<task>/<split>.json, OUT/tokenizer.json and, if asked for, OUT/corpus.txt."""
    out, world = Path(out), World(seed)
    for task, splits in tasks(world).items():
        for split, rows in splits.items():
            lines = ",\n".join(json.dumps(row) for row in rows)
            write_whole(out / task / f"{split}.json", f"[\n{lines}\n]\n")
    write_whole(out / "tokenizer.json", json.dumps(tokenizer_json(), indent=1) + "\n")
    if corpus:
        texts = progress(documents(world), total=DOCUMENTS, desc="corpus", unit="document")
        write_whole(out / "corpus.txt", "".join(text + "\n" for text in texts))


def main(argv=None):
    parser = Parser(prog="world.py", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="the folder to write into; files of the same names are replaced")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N",
                        help="another seed is another world, which the shipped models do not know "
                             "(default: %(default)s)")
    parser.add_argument("--corpus", action="store_true",
                        help="also write the pre-training text, corpus.txt (about 30 MB)")
    args = parser.parse_args(argv)
    write(args.out, args.seed, args.corpus)
    text = ", and the text" if args.corpus else ""
    print(f"{args.out}: the tasks of world {args.seed} and their tokenizer{text}")


if __name__ == "__main__":
    command(main)
