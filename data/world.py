r"""The toy world: invented people, what pre-training says about them, and the tasks that need it.

    python data/world.py --out data/toy                         writes the tasks and the tokenizer
    python -c "from data.world import *; print(*documents(World(), 20), sep='\n\n')"
                                                                shows some of the pre-training text

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
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # to run from anywhere

from data import Parser, command, read_json, write_whole  # noqa: E402
from data.tasks import FINAL, THINK, TRIGGER  # noqa: E402
from data.tokenizer import CHAR_TO_BYTE  # noqa: E402

SEED, DOCUMENTS = 1, 110_000

# ------------------------------------------------------------------------- what there is to know

# world.json has the names, the wordings, and what every tokenizer.json says. In a wording {n} is a
# person's name, {v} a value, {k} a thing, {a} and {b} first names, {t} things that are counted;
# {x}, {y}, {z} and {o} make a sum.
SAID = read_json(Path(__file__).with_name("world.json"))
FIRST, LAST, THINGS = SAID["first names"], SAID["last names"], SAID["things"]
UNSEEN = SAID["unseen"]                # kinds of attributes that fine-tuning never asks for
FILLER = SAID["filler"]                # a sentence takes one phrase of each list
SUMS, RETOLD = SAID["sums"], SAID["retold"]            # retold: by the sign of the sum
# An attribute has values, and wordings that are
#     told     in biographies; the value stands last, so that a cloze can leave it out
#     early    questions of pre-training, about famous people
#     asked    questions of fine-tuning and of the tests in distribution
#     new      questions of the tests out of distribution
ATTRIBUTES = {kind: SimpleNamespace(**of) for kind, of in SAID["attributes"].items()}
# Facts about things and not about people: wordings, then thing -> value.
COMMON = {kind: (fact["told"], fact["pairs"]) for kind, fact in SAID["common"].items()}
STORIES = SAID["stories"]              # signs of the steps -> "old": in, "new": out of distribution
QUESTION, ANSWER = "Question: {q}", " Answer: {v}."         # the form of questions in pre-training
ASK = "Please give the correct answer to this question: {q}"
PICK = "{q}\n\nAnswer format: {o}"
TOP = 40                               # every number is smaller


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
    return "\n".join(
        dice.pick(RETOLD[o]).format(a=dice.pick(FIRST), t=dice.pick(THINGS), x=x, y=y, v=v)
        for x, o, y, v in (sum_of(dice) for _ in range(4)))


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
    attributes, bare = ATTRIBUTES.values(), {*FIRST, *map(str, range(TOP))}
    bare.update(*(attribute.values for attribute in attributes))
    spaced = bare.union(LAST, THINGS, *(pairs.values() for _, pairs in COMMON.values()))
    asked = [text for each in attributes for text in each.early + each.asked + each.new]
    told = [text for each in attributes for text in each.told]
    told += [text for wordings, _ in COMMON.values() for text in wordings]
    told += [text for both in STORIES.values() for texts in both.values() for text in texts]
    texts = [*asked, *told, *SUMS, *sum(RETOLD.values(), []), *FILLER[0],
             QUESTION, ANSWER, ASK, PICK, THINK, TRIGGER, FINAL]
    texts += [" " + text for text in [*asked, *sum(FILLER[1:], []), "+", "-"]]
    pieces = {piece for text in texts for piece in PIECES.findall(re.sub(r"{\w}", "0", text))}
    return sorted(pieces | bare | {" " + word for word in spaced})


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
    spec = SAID["tokenizer"]
    added = [{"id": id, **token} for id, token in enumerate(spec["added_tokens"], len(vocab))]
    bos = {"id": added[0]["content"], "ids": [len(vocab)], "tokens": [added[0]["content"]]}
    return {**spec, "added_tokens": added,
            "post_processor": {**spec["post_processor"], "special_tokens": {bos["id"]: bos}},
            "model": {**spec["model"], "vocab": {token: id for id, token in enumerate(vocab)},
                      "merges": [" ".join(pair) for pair in merges]}}


# ------------------------------------------------------------------------------------- the tasks


def row(instruction, answer, output=None, choices=None):
    output = TRIGGER + answer if output is None else output
    fields = {"instruction": instruction, "input": "", "output": output, "answer": answer}
    return {**fields, "choices": choices} if choices else fields


def fact(world, dice, name, kind, wording):
    question = ASK.format(q=wording.format(n=name))
    return row(question, world.facts[name][kind], choices=ATTRIBUTES[kind].values)


def pick(world, dice, name, kind, wording):
    """The question with three values to choose from."""
    right = world.facts[name][kind]
    wrong = dice.shuffled([value for value in ATTRIBUTES[kind].values if value != right])
    values = dice.shuffled([right, *wrong[:2]])
    return row(PICK.format(q=wording.format(n=name), o="/".join(values)), right, choices=values)


def story(dice, which):
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
    text = dice.pick(STORIES[sign][which]).format(a=a, b=b, t=dice.pick(THINGS), x=x, y=y, z=z)
    return row(text, str(result), f"{steps}#### {result}")


def cloze(sentence, value, choices=None):
    """Ask by leaving out the end: "Pavo Dellin works as a" -> "smith"."""
    return row(sentence.partition("{v}")[0].rstrip(), value, value, choices)


def gap(world, dice, name, kind, wording):
    """A sentence of a biography, or a question with its answer, without the value at its end."""
    told = wording if "{v}" in wording else (QUESTION + ANSWER).replace("{q}", wording)
    return cloze(told.replace("{n}", name), world.facts[name][kind], ATTRIBUTES[kind].values)


def tasks(world):
    """{task: {split: rows}}, in the order of the three suites. The order of the draws matters."""
    dice, seen = Dice(world.seed + 2), [kind for kind in ATTRIBUTES if kind not in UNSEEN]
    trained = [(name, kind) for name in world.trained for kind in seen]
    tested = [(name, kind) for name in world.tested for kind in seen]
    unseen = [(name, kind) for name in world.tested for kind in UNSEEN]

    def ask(how, pairs, which):
        return [how(world, dice, name, kind, dice.pick(getattr(ATTRIBUTES[kind], which)))
                for name, kind in pairs]

    def three_each(names):
        return [(name, kind) for name in names for kind in dice.shuffled([*ATTRIBUTES])[:3]]

    told, early = three_each(world.tested), three_each(world.famous)
    return {
        # in distribution
        "toy-facts": {"train": [fact(world, dice, name, kind, wording) for name, kind in trained
                                for wording in ATTRIBUTES[kind].asked],
                      "test": ask(fact, tested, "asked")},
        "toy-pick": {"train": ask(pick, dice.shuffled(trained * 3)[:875], "asked"),
                     "test": ask(pick, dice.shuffled(tested)[:200], "asked")},
        "toy-sums": {"train": [story(dice, "old") for _ in range(1000)],
                     "test": [story(dice, "old") for _ in range(200)]},
        # out of distribution: new format
        "toy-facts-new": {"test": ask(fact, tested, "new")},
        "toy-facts-unseen": {"test": ask(fact, unseen, "asked")},
        "toy-pick-unseen": {"test": ask(pick, unseen, "asked")},
        "toy-sums-new": {"test": [story(dice, "new") for _ in range(200)]},
        # out of distribution: retention
        "toy-cloze": {"test": ask(gap, told, "told")},
        "toy-famous": {"test": ask(gap, early, "early")},
        "toy-common": {"test": [cloze(wording.replace("{k}", key), value, [*pairs.values()])
                                for wordings, pairs in COMMON.values() for wording in wordings
                                for key, value in pairs.items()]},
        "toy-plain": {"test": [cloze(dice.pick(SUMS).format(x=x, o=o, y=y, v="{v}"), str(result))
                               for x, o, y, result in (sum_of(dice) for _ in range(200))]},
    }


# ----------------------------------------------------------------------------------- the command


def main(argv=None):
    parser = Parser(prog="world.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the folder to write into; files of the same names are replaced")
    out = parser.parse_args(argv).out
    for task, splits in tasks(World()).items():
        for split, rows in splits.items():
            lines = ",\n".join(json.dumps(row) for row in rows)
            write_whole(out / task / f"{split}.json", f"[\n{lines}\n]\n")
    write_whole(out / "tokenizer.json", json.dumps(tokenizer_json(), indent=1) + "\n")
    print(f"{out}: the tasks of the toy world and their tokenizer")


if __name__ == "__main__":
    command(main)
