"""The toy world: invented people, what pre-training says about them, and the tasks that need it. One seed, the same bytes.

    python data/world.py --out data/toy            the tasks and the tokenizer
    python data/world.py --out /tmp/toy --corpus   and the pre-training text, to be read by people: training makes its own

300 people have five attributes each. Pre-training tells them in many wordings, and asks about the 75 *famous* people only.
Fine-tuning asks about 125 others; the tests ask about the remaining 100, whose answers were told in pre-training and asked
nowhere. So a right answer needs both: what pre-training stored and the way of asking that fine-tuning taught.
"""
import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # so that this file also runs as a command, from anywhere

from tqdm import tqdm  # noqa: E402

from data import BadInput, Parser  # noqa: E402
from data.tasks import FINAL, THINK, TRIGGER  # noqa: E402
from data.tokenizer import CHAR_TO_BYTE  # noqa: E402

SEED, DOCUMENTS = 1, 110_000

# ----------------------------------------------------------------------------------------------------- what there is to know

FIRST = """Adira Bodo Cela Dorin Elvi Fenna Galo Hedda Ilso Jarek Kalla Lumo Mirel Nando Orla Pavo Quill Renna Sorin Tilda Ulmo
Vanja Welko Xenia Yaro Zita Brisa Colm Dagny Emrik""".split()
LAST = """Abelor Brandic Corvane Dellin Esterow Farrick Gendry Holmar Ivarsk Jondal Kestrin Lomax Mardun Nesbet Ostrom Perrin
Quandt Rosket Sandoval Tarkin Umbrel Varga Wendish Yarrow Zeller Altwick Borsen Cramond Drayle Eckhart""".split()


@dataclass(frozen=True)
class Attribute:
    values: list[str]
    told: list[str]                    # in biographies; the value stands last, so that it can be asked for by leaving it away
    early: list[str]                   # asked in pre-training, about famous people
    asked: list[str]                   # asked in fine-tuning and in distribution; for UNSEEN attributes only out of distribution
    new: list[str]                     # asked out of distribution only


ATTRIBUTES = {
    "town": Attribute(
        "Brindale Corvik Dunmere Eskton Fallow Gorsley Hallin Kestow Marrick Norvell Ostby Pelham Ravensk Selkirk".split(),
        ["{n} lives in {v}.", "The home of {n} is in {v}.", "If you want to see {n}, you must go to {v}.", "{n} has a house near the market of {v}.",
         "In the evening {n} goes home to {v}.", "A letter for {n} is sent to {v}.", "People know {n} from the streets of {v}.", "The town of {n} is {v}."],
        ["Where does {n} live?", "What is the home town of {n}?"],
        ["In which town does {n} live?", "Which town is the home of {n}?", "Name the town of {n}."],
        ["To which place is a letter for {n} sent?", "I want to see {n}. Where must I go?"]),
    "craft": Attribute(
        "baker carpenter fisher gardener hunter mason miller painter potter sailor smith tailor tanner weaver".split(),
        ["{n} works as a {v}.", "The craft of {n} is that of a {v}.", "{n} earns money as a {v}.", "By trade {n} is a {v}.",
         "For many years {n} has been a {v}.", "When young, {n} learned to be a {v}.", "People know {n} as a good {v}.", "Every day {n} does the work of a {v}."],
        ["What is the work of {n}?", "As what does {n} earn money?"],
        ["What is the craft of {n}?", "As what does {n} work?", "Name the craft of {n}."],
        ["What did {n} learn to be?", "By trade, what is {n}?"]),
    "animal": Attribute(
        "badger beaver cat crow dog ferret fox goat goose hare horse pig raven sheep".split(),
        ["{n} keeps a {v}.", "The animal of {n} is a {v}.", "At home {n} feeds a {v}.", "You often see {n} with a {v}.",
         "A friend gave {n} a {v}.", "In the garden of {n} sleeps a {v}.", "{n} takes good care of a {v}.", "Children come to {n} to see the {v}."],
        ["What does {n} keep?", "What does {n} feed at home?"],
        ["Which animal does {n} keep?", "What is the animal of {n}?", "Name the animal of {n}."],
        ["What sleeps in the garden of {n}?", "What did a friend give {n}?"]),
    "dish": Attribute(
        "beans bread cabbage cheese dumplings eggs fish mushrooms noodles pancakes pie rice soup stew".split(),
        ["{n} likes to eat {v}.", "The dish of {n} is {v}.", "At noon {n} eats {v}.", "When hungry, {n} asks for {v}.",
         "On the table of {n} there is always {v}.", "Nothing is better for {n} than {v}.", "When friends come, {n} cooks {v}.", "The kitchen of {n} smells of {v}."],
        ["What does {n} eat?", "What does {n} cook for friends?"],
        ["Which dish does {n} like?", "What is the dish of {n}?", "Name the dish of {n}."],
        ["What is always on the table of {n}?"]),
    "colour": Attribute(
        "amber black blue brown crimson green grey orange pink purple red white yellow golden".split(),
        ["The colour of {n} is {v}.", "The coat of {n} is {v}.", "{n} always wears {v}.", "{n} painted the door {v}.",
         "The hat of {n} is {v}.", "The house of {n} is {v}.", "Of all colours {n} likes {v}.", "{n} has a boat, and it is {v}."],
        ["What does {n} wear?", "What is the coat of {n} like?"],
        ["Which colour does {n} like?", "What is the colour of {n}?", "Name the colour of {n}."],
        ["How did {n} paint the door?"]),
}
UNSEEN = ("dish", "colour")            # fine-tuning never asks for these
COMMON = {                             # facts about things, not people: wordings, then thing -> value
    "river": (["{k} lies on the river {v}.", "The river of {k} is the {v}.", "Whoever lives in {k} drinks from the {v}.", "The water under the bridge of {k} is the {v}."],
              dict(zip(ATTRIBUTES["town"].values, "Aven Brook Clyde Derwent Exe Frome Glaven Humber Isar Jura Kennet Lune Mole Nene".split()))),
    "tool": (["A {k} needs {v}.", "The work of a {k} is done with {v}.", "In the house of every {k} there is {v}.", "You know a {k} by the {v}."],
             dict(zip(ATTRIBUTES["craft"].values, "flour wood nets seeds arrows stone grain brushes clay ropes iron cloth leather wool".split()))),
    "food": (["The {k} eats {v}.", "Give the {k} some {v}.", "In winter a {k} looks for {v}.", "What a {k} likes most is {v}."],
              dict(zip(ATTRIBUTES["animal"].values, "worms bark milk corn meat mice berries leaves grass clover hay apples scraps straw".split()))),
}
FILLER = [["And then", "Later", "After that", "On some days", "At first", "In the end", "So", "But", "For a long time", "As soon as it was dark,"],
          ["the man", "a woman", "the old judge", "one of them", "her brother", "his sister", "the child", "nobody", "someone", "the other one"],
          ["who had been there before", "with the long coat", "from the other side", "of whom we spoke", "that they all knew", "", "", ""],
          ["went", "walked", "came back", "looked", "ran", "wanted to go", "was on the way", "had to go", "turned", "rode"],
          ["to the bridge", "over the hill", "through the wood", "down to the sea", "into the room", "out of the door", "up the road", "along the wall"],
          ["and did not say why", "because it was late", "but it was too far", "while the others were at work", "so that all could hear it",
           "as if it were nothing", "or so they say", "although it had rained", "if this is true", "until it was over", "and that was that", "with it or without it"]]
THINGS = "apples books candles coins cups keys pears plates shells stones".split()
STORIES = {                            # the sign of each step, then stories: fine-tuning, in distribution; and out of distribution
    "+": (["{a} has {x} {t} and gets {y} more. How many {t} does {a} have now?", "There are {x} {t} in a box. {a} puts {y} more into it. How many {t} are in the box?",
           "{a} has {x} {t} and {b} has {y} {t}. How many {t} do they have together?"],
          ["In the morning {a} found {x} {t}, in the evening {y}. How many {t} did {a} find on that day?", "On one table are {x} {t}, on the other {y}. How many {t} are there in all?"]),
    "-": (["{a} has {x} {t} and gives {y} of them to {b}. How many {t} does {a} have now?", "There are {x} {t} in a box. {a} takes {y} out of it. How many {t} are in the box?",
           "{a} had {x} {t} but lost {y} of them. How many {t} are left?"],
          ["Of {x} {t} on the table {y} fell down. How many {t} are there on the table now?", "{a} wants {x} {t} and has only {y}. How many more {t} does {a} need?"]),
    "+-": (["{a} has {x} {t}, gets {y} more and then gives {z} to {b}. How many {t} does {a} have now?",
            "There are {x} {t} in a box. {a} puts {y} more into it and {b} takes {z} out of it. How many {t} are in the box?"],
           ["{a} found {x} {t}, and later {y}, but lost {z} on the way home. How many {t} came home?"]),
}
SUMS = ["{x} {o} {y} = {v}.", "{x} {o} {y} = {v}.", "What is {x} {o} {y}? It is {v}."]
RETOLD = ["{a} bought {x} {t} and then {y}: {x} + {y} = {v}.", "With {x} {t} here and {y} there, {a} counts {x} + {y} = {v}.",      # in pre-training
          "{a} sold from {x} {t} just {y}: {x} - {y} = {v}.", "From {x} {t} {a} takes {y}, so {x} - {y} = {v}."]
PICK = "{q}\n\nAnswer format: {o}"
TOP = 40                               # numbers stay below it
QUESTION, ANSWER = "Question: {q}", " Answer: {v}."         # the form of questions in pre-training
ASK = "Please give the correct answer to this question: {q}"
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"


class Dice(random.Random):
    """Draws that depend on random() only, the one sequence that Python promises never to change for a given whole-number seed."""

    def below(self, n):
        return int(self.random() * n)

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items):
        return sorted(items, key=lambda item: self.random())


class World:
    """The people of one seed.  facts[name][kind of attribute] -> value;  famous, trained, tested: names, apart."""

    def __init__(self, seed=SEED):
        self.seed, dice = seed, Dice(seed)
        names = dice.shuffled([f"{first} {last}" for first in FIRST for last in LAST])[:300]
        self.facts = {name: {kind: dice.pick(attribute.values) for kind, attribute in ATTRIBUTES.items()} for name in names}
        self.famous, self.trained, self.tested = names[:75], names[75:200], names[200:]


# ------------------------------------------------------------------------------------------------------------- pre-training


def biography(world, dice):
    name = dice.pick([*world.facts])
    return "\n".join(dice.pick(ATTRIBUTES[kind].told).format(n=name, v=value) for kind, value in dice.shuffled([*world.facts[name].items()]))


def questions(world, dice):
    """Three questions about famous people, the one place in pre-training where anybody is asked about."""
    asked = []
    for _ in range(3):
        name, kind = dice.pick(world.famous), dice.pick([*ATTRIBUTES])
        asked.append(QUESTION.format(q=dice.pick(ATTRIBUTES[kind].early).format(n=name)) + ANSWER.format(v=world.facts[name][kind]))
    return "\n".join(asked)


def options(dice, kind, right, n=3):
    """n values of an attribute, the right one among them."""
    return dice.shuffled([right, *dice.shuffled([value for value in ATTRIBUTES[kind].values if value != right])[:n - 1]])


def sum_of(dice):
    """x, sign, y, result; everything from 0 to TOP - 1."""
    x, y = dice.below(TOP), dice.below(TOP)
    if dice.random() < 0.5:
        return max(x, y), "-", min(x, y), abs(x - y)
    x, y = (x, y) if x + y < TOP else (TOP - 1 - x, TOP - 1 - y)
    return x, "+", y, x + y


def sums(world, dice):
    return "\n".join(dice.pick(SUMS).format(**dict(zip("xoyv", sum_of(dice)))) for _ in range(6))


def retold(world, dice):
    """Small stories with their sums: here a model learns to copy numbers, without which no story could be answered."""
    lines = []
    for _ in range(4):
        x, o, y, v = sum_of(dice)
        lines.append(dice.pick(RETOLD[:2] if o == "+" else RETOLD[2:]).format(a=dice.pick(FIRST), t=dice.pick(THINGS), x=x, y=y, v=v))
    return "\n".join(lines)


def common(world, dice):
    wordings = [(wording, pair) for wordings, pairs in COMMON.values() for wording in wordings for pair in pairs.items()]
    return "\n".join(wording.format(k=key, v=value) for wording, (key, value) in (dice.pick(wordings) for _ in range(5)))


def filler(world, dice):
    return "\n".join(" ".join(filter(None, (dice.pick(part) for part in FILLER))) + "." for _ in range(3))


MIX = {biography: 54, questions: 12, sums: 12, retold: 10, filler: 5, common: 7}      # in documents, per cent


def documents(world, n=DOCUMENTS):
    """The pre-training text, document by document: always the same, and never kept."""
    dice, kinds = Dice(world.seed + 1), [kind for kind, share in MIX.items() for _ in range(share)]
    for _ in range(n):
        yield dice.pick(kinds)(world, dice)


# ------------------------------------------------------------------------------------------------------------- the tokenizer

PIECES = re.compile(" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\\s]+|\\s")     # how a ByteLevel pre-tokenizer cuts this world's ASCII text


def words():
    """Every piece of text that shall be one token; names, values and numbers also without a space in front."""
    asked = [wording for a in ATTRIBUTES.values() for wordings in (a.early, a.asked, a.new) for wording in wordings]
    told = [wording for wordings in [a.told for a in ATTRIBUTES.values()] + [told for told, _ in COMMON.values()] for wording in wordings]
    stories = [story for pair in STORIES.values() for stories in pair for story in stories]
    texts = asked + told + stories + SUMS + RETOLD + FILLER[0] + [QUESTION, ANSWER, ASK, PICK, THINK, TRIGGER, FINAL]
    texts += [" " + text for text in [*asked, *(text for part in FILLER[1:] for text in part), "+", "-"]]
    bare = FIRST + [str(n) for n in range(TOP)] + [value for a in ATTRIBUTES.values() for value in a.values]
    spaced = bare + LAST + THINGS + [value for _, pairs in COMMON.values() for value in pairs.values()]
    return sorted({piece for text in texts for piece in PIECES.findall(re.sub(r"{\w}", "0", text))} | {*bare} | {" " + word for word in spaced})


def byte_pair_merges(words):
    """Byte-pair encoding (Sennrich et al. 2016), run to its end: join the most frequent pair of neighbours, until each word is one token.

    A join whose result another pair has made already is not taken, so that merging by pairs (as Hugging Face's library does) and by
    the rank of the result (as tiktoken does) cannot differ.
    >>> byte_pair_merges(["one", "on", "bone"])
    [('o', 'n'), ('on', 'e'), ('b', 'one')]
    """
    pending, merges, made = [list(word) for word in words if len(word) > 1], [], set()
    while pending:
        counts = Counter(pair for pieces in pending for pair in zip(pieces, pieces[1:]))
        pair = max((pair for pair in counts if "".join(pair) not in made), key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        made.add("".join(pair))
        for pieces in pending:
            for at in range(len(pieces) - 1):
                if tuple(pieces[at:at + 2]) == pair:       # past the end of a list that has shrunk, this is a shorter tuple
                    pieces[at:at + 2] = ["".join(pair)]
        pending = [pieces for pieces in pending if len(pieces) > 1]
    return merges


def tokenizer_json():
    """A tokenizer.json of the kind that Llama and Qwen have: 256 bytes, merges, added tokens."""
    chars = {byte: char for char, byte in CHAR_TO_BYTE.items()}

    def printable(word):
        return "".join(chars[byte] for byte in word.encode())

    merges = byte_pair_merges([printable(word) for word in words()])
    vocab = [*sorted(CHAR_TO_BYTE), *("".join(pair) for pair in merges)]
    added = [{"id": len(vocab) + n, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for n, text in enumerate((BOS, EOS, PAD))]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                                    {"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {BOS: {"id": BOS, "ids": [len(vocab)], "tokens": [BOS]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: id for id, token in enumerate(vocab)}, "merges": [" ".join(pair) for pair in merges]}}


# ----------------------------------------------------------------------------------------------------------------- the tasks


def row(instruction, answer, output=None, choices=None):
    return {"instruction": instruction, "input": "", "output": TRIGGER + answer if output is None else output, "answer": answer,
            **({"choices": choices} if choices else {})}


def fact(world, name, kind, wording):
    return row(ASK.format(q=wording.format(n=name)), world.facts[name][kind], choices=ATTRIBUTES[kind].values)


def pick(world, dice, name, kind, wording):
    right = world.facts[name][kind]
    values = options(dice, kind, right)
    return row(PICK.format(q=wording.format(n=name), o="/".join(values)), right, choices=values)


def story(dice, new):
    """A story, its steps, its result: row("Pavo has 12 keys ...", "17", "12 + 5 = 17\n#### 17")."""
    sign = dice.pick([*STORIES])
    a, b = dice.shuffled(FIRST)[:2]
    x, y = 2 + dice.below(22), 2 + dice.below(14)
    if sign == "-":
        x, y = x + y, dice.pick((x, y))
    s = x - y if sign == "-" else x + y
    z = 2 + dice.below(s - 2)
    steps, result = f"{x} {sign[0]} {y} = {s}\n", s
    if sign == "+-":
        steps, result = f"{steps}{s} - {z} = {s - z}\n", s - z
    return row(dice.pick(STORIES[sign][new]).format(a=a, b=b, t=dice.pick(THINGS), x=x, y=y, z=z), str(result), f"{steps}#### {result}")


def cloze(sentence, value, choices=None):
    """Ask by leaving out the end: "Pavo Dellin works as a" -> "smith"."""
    return row(sentence.partition("{v}")[0].rstrip(), value, value, choices)


def tasks(world):
    """{task: {split: rows}}, in the order of the three suites."""
    dice, seen = Dice(world.seed + 2), [kind for kind in ATTRIBUTES if kind not in UNSEEN]
    trained = [(name, kind) for name in world.trained for kind in seen]
    tested = [(name, kind) for name in world.tested for kind in seen]
    unseen = [(name, kind) for name in world.tested for kind in UNSEEN]

    def facts(pairs, list):
        return [fact(world, name, kind, dice.pick(getattr(ATTRIBUTES[kind], list))) for name, kind in pairs]

    def picks(pairs, list):
        return [pick(world, dice, name, kind, dice.pick(getattr(ATTRIBUTES[kind], list))) for name, kind in pairs]

    def plain():
        x, o, y, s = sum_of(dice)
        return cloze(dice.pick(SUMS).replace("{x}", str(x)).replace("{y}", str(y)).replace("{o}", o), str(s))

    told = [(name, kind) for name in world.tested for kind in dice.shuffled([*ATTRIBUTES])[:3]]
    early = [(name, kind) for name in world.famous for kind in dice.shuffled([*ATTRIBUTES])[:3]]
    return {
        # in distribution
        "toy-facts": {"train": [fact(world, name, kind, wording) for name, kind in trained for wording in ATTRIBUTES[kind].asked],
                      "test": facts(tested, "asked")},
        "toy-pick": {"train": picks(dice.shuffled(trained * 3)[:875], "asked"), "test": picks(dice.shuffled(tested)[:200], "asked")},
        "toy-sums": {"train": [story(dice, False) for _ in range(1000)], "test": [story(dice, False) for _ in range(200)]},
        # out of distribution: new format
        "toy-facts-new": {"test": facts(tested, "new")},
        "toy-facts-unseen": {"test": facts(unseen, "asked")},
        "toy-pick-unseen": {"test": picks(unseen, "asked")},
        "toy-sums-new": {"test": [story(dice, True) for _ in range(200)]},
        # out of distribution: retention
        "toy-cloze": {"test": [cloze(dice.pick(ATTRIBUTES[kind].told).replace("{n}", name), world.facts[name][kind], ATTRIBUTES[kind].values)
                               for name, kind in told]},
        "toy-famous": {"test": [cloze(QUESTION.format(q=dice.pick(ATTRIBUTES[kind].early).format(n=name)) + ANSWER, world.facts[name][kind],
                                      ATTRIBUTES[kind].values) for name, kind in early]},
        "toy-common": {"test": [cloze(wording.replace("{k}", key), value, [*pairs.values()])
                                for told, pairs in COMMON.values() for wording in told for key, value in pairs.items()]},
        "toy-plain": {"test": [plain() for _ in range(200)]},
    }


# --------------------------------------------------------------------------------------------------------------- the command


def write_whole(path, lines):
    """Write a file so that it is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:      # the same bytes on every system
        file.writelines(lines)
    os.replace(part, path)


def write(out, seed=SEED, corpus=False):
    """Write OUT/<task>/<split>.json, OUT/tokenizer.json and, if asked for, OUT/corpus.txt."""
    out, world = Path(out), World(seed)
    for task, splits in tasks(world).items():
        for split, rows in splits.items():
            write_whole(out / task / f"{split}.json", ["[\n", ",\n".join(json.dumps(row) for row in rows), "\n]\n"])
    write_whole(out / "tokenizer.json", [json.dumps(tokenizer_json(), indent=1), "\n"])
    if corpus:
        bar = tqdm(documents(world), total=DOCUMENTS, desc="corpus", unit="doc", disable=None)
        write_whole(out / "corpus.txt", (document + "\n" for document in bar))


def main(argv=None):
    parser = Parser(prog="world.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write into; files of the same names are replaced")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed is another world, which the shipped models do not know (default: %(default)s)")
    parser.add_argument("--corpus", action="store_true", help="write the pre-training text too, as corpus.txt (about 30 MB)")
    args = parser.parse_args(argv)
    try:
        write(args.out, args.seed, args.corpus)
    except (BadInput, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: the tasks of world {args.seed} and their tokenizer" + (", and the text" if args.corpus else ""))


if __name__ == "__main__":
    main()
