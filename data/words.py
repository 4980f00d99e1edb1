"""Kinds of words: which tokens of a text are punctuation, function words, copies, numbers, content.

    " 17 apples, and he's"  ->  17  apples  ,  and  he  's

A text is cut into words first, and a token then takes the class of the word it belongs to, so that the pieces of a long word are not
taken for short ones. Made for English; a text in another language has no function words here, and one without spaces between its words is
long words.
"""
import re
import unicodedata

CLASSES = ("punctuation", "function", "copied", "digits", "content")       # in order of precedence: the first that fits is the class
TITLES = dict(zip(CLASSES, ("punctuation", "function words", "copied from the prompt", "digits", "content words")))

# Closed classes. "have", "do" and "be" are here also where they are the verb of the sentence: telling would take a parser.
FUNCTION_WORDS = frozenset("""
a an the this that these those some any no each every either neither another other such both all few many much more most less several enough own same
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours ourselves they them their theirs
themselves who whom whose which what someone something anyone anything everyone everything nothing nobody none
about above across after against along among around as at before behind below beneath beside besides between beyond by despite down during except for from
in inside into near of off on onto out outside over past per since than through throughout to toward towards under until up upon via with within without
and but or nor so yet if then because although though while whereas unless whether when where why how
am is are was were be been being have has had having do does did doing can cannot could may might must shall should will would ought
not too very also just only even there here again ever never
""".split())

CLITIC = r"(?:s|re|ve|m|ll|d)(?![a-z0])"                   # the ends of he's, they're, I've, I'm, we'll, she'd: words of their own
WORD = re.compile(rf"0+(?:[.,]0+)*[a-z]*|'{CLITIC}|[a-z][a-z0]*(?:'(?!{CLITIC})[a-z][a-z0]*)*")


def words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are: [(start, end)]. All else is white space, punctuation and symbols.

    A number is one word with its commas and point, and with letters behind it (2nd). "don't" and "o'clock" are one word, "he's" is two.
    """
    simple = []                                            # one ASCII character for each of the text: the expression above stays readable
    for c in text:
        kind = unicodedata.category(c)[0]
        if kind == "M":                                    # an accent belongs to its letter; after an emoji it is part of a symbol
            c = "a" if simple and simple[-1].isalpha() else "!"
        elif kind == "L":
            c = c.lower() if c.isascii() else "a"
        elif kind == "N":
            c = "0"
        elif c == "’":
            c = "'"
        simple.append(c if c.isascii() else "!")
    return [found.span() for found in WORD.finditer("".join(simple))]


def normal(word: str) -> str:
    """A word as it is compared: "The" and "the" are the same, and so are "10,000" and "10000"."""
    word = unicodedata.normalize("NFC", word).replace("’", "'").casefold()
    return word.replace(",", "") if is_number(word) else word


def is_number(word: str) -> bool:
    return unicodedata.category(word[0])[0] == "N"


def word_class(word: str, seen) -> str:
    """The class of one word, which is copied if its normal form is in `seen`."""
    word = normal(word)
    if word in FUNCTION_WORDS or word.endswith("n't") or word.startswith("'"):
        return "function"
    return "copied" if word in seen else "digits" if is_number(word) else "content"


def token_classes(pieces: list[str], prompt: str = "") -> list[str]:
    """The class of each piece of a text that answers `prompt`; the pieces, one after the other, are the text.

    A piece belongs to the word that holds its first character other than a space. Where no word does it is punctuation, which
    includes symbols, line breaks and spaces that stand alone.

    >>> token_classes(["Two", " ap", "ples", ",", " not", " 1", "7"], "How many Apples?")
    ['content', 'copied', 'copied', 'punctuation', 'function', 'digits', 'digits']
    """
    text = "".join(pieces)
    seen = {normal(prompt[start:end]) for start, end in words(prompt)}
    of_character = {at: word_class(text[start:end], seen) for start, end in words(text) for at in range(start, end)}
    classes, start = [], 0
    for piece in pieces:
        first = start + len(piece) - len(piece.lstrip())
        start += len(piece)
        classes.append(of_character.get(first, "punctuation") if first < start else "punctuation")
    return classes
