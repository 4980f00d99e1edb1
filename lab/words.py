"""Kinds of words: which tokens of a text are punctuation, function words, copies, numbers, content.

    " 17 apples, and he's"  ->  17  apples  ,  and  he  's

A text is cut into words, and a token takes the class of its word, so that the pieces of a long word
are not taken for short words. The list is English: other languages have no function words here.
"""
import re
from unicodedata import category, normalize

TITLES = {"punctuation": "punctuation", "function": "function words",
          "copied": "copied from the prompt", "digits": "digits", "content": "content words"}
CLASSES = tuple(TITLES)                # in order of precedence: the first that fits is the class

# "have", "do" and "be" are here even where they are the verb of a sentence: only a parser can tell.
FUNCTION_WORDS = frozenset("""
a an the this that these those some any no each every either neither another other such both all few
many much more most less several enough own same
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we
us our ours ourselves they them their theirs themselves who whom whose which what someone something
anyone anything everyone everything nothing nobody none
about above across after against along among around as at before behind below beneath beside besides
between beyond by despite down during except for from in inside into near of off on onto out outside
over past per since than through throughout to toward towards under until up upon via with within
without and but or nor so yet if then because although though while whereas unless whether when
where why how
am is are was were be been being have has had having do does did doing can cannot could may might
must shall should will would ought
not too very also just only even there here again ever never
""".split())

CLITIC = r"(?:s|re|ve|m|ll|d)(?![a-z0])"       # in he's, they're, I've, I'm, we'll, she'd
WORD = re.compile(rf"0+(?:[.,]0+)*[a-z]*|'{CLITIC}|[a-z][a-z0]*(?:'(?!{CLITIC})[a-z][a-z0]*)*")


def words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are: [(start, end)]. All else is white space, punctuation, symbols.

    "don't" and "2nd" are one word, and so is a number with commas and a point; "he's" is two."""
    simple = ""                        # an ASCII character for each of the text, as WORD needs them
    for c in text:
        kind = category(c)[0]
        if kind == "M":                # an accent belongs to its letter, or to a symbol
            c = "a" if simple[-1:].isalpha() else "!"
        elif kind == "L" and not c.isascii():
            c = "a"
        elif kind == "N":
            c = "0"
        elif c == "’":
            c = "'"
        simple += c.lower() if c.isascii() else "!"
    return [found.span() for found in WORD.finditer(simple)]


def normal(word: str) -> str:
    """A word as it is compared: "The" is "the", and "10,000" is "10000"."""
    word = normalize("NFC", word).replace("’", "'").casefold()
    return word.replace(",", "") if category(word[0])[0] == "N" else word


def word_class(word: str, seen) -> str:
    """The class of one word, which is copied if its normal form is in `seen`."""
    word = normal(word)
    if word in FUNCTION_WORDS or word.endswith("n't") or word.startswith("'"):
        return "function"
    return "copied" if word in seen else "digits" if category(word[0])[0] == "N" else "content"


def token_classes(pieces: list[str], prompt: str = "") -> list[str]:
    """The class of each piece of a text that answers `prompt`; the pieces joined are the text.

    A piece belongs to the word that holds its first character other than a space. Without such a
    word it is punctuation; so are symbols, line breaks and spaces that stand alone.

    >>> token_classes(["Two", " ap", "ples", ",", " not", " 1", "7"], "How many Apples?")
    ['content', 'copied', 'copied', 'punctuation', 'function', 'digits', 'digits']
    """
    seen = {normal(prompt[start:end]) for start, end in words(prompt)}
    text, classes, start = "".join(pieces), [], 0
    of = {at: word_class(text[i:end], seen) for i, end in words(text) for at in range(i, end)}
    for piece in pieces:
        first = len(piece) - len(piece.lstrip())
        classes.append(of.get(start + first, "punctuation") if piece[first:] else "punctuation")
        start += len(piece)
    return classes
