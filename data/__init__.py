"""Everything that is text or a file of text: tokenizers, tasks, and fetching them."""
import argparse
import json
from pathlib import Path


LONGEST_MESSAGE = 600                  # seven lines of a terminal


class BadInput(ValueError):
    """Something the user gave us is wrong. The message is one line: what, where, what to do.

    Commands print it and exit with status 2. Everything else that goes wrong is a bug and keeps its traceback. What a message quotes
    comes from the very file that is wrong, so it is made printable here, and a long one loses its middle.
    """

    def __init__(self, message):
        words = " ".join(shorten(message).split())
        super().__init__(shorten("".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)))


def shorten(text):
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE - 207]} [...] {text[-200:]}"


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line; the usage is a --help away."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def read_json(path, kind=dict):
    """The JSON value of a file. Raises BadInput if it is missing, is not UTF-8 JSON, or holds another kind of value than `kind`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot read it ({error.strerror})") from None
    except (ValueError, RecursionError) as error:          # a UnicodeDecodeError is a ValueError
        raise BadInput(f"{path}: not readable as JSON ({error}); if it was downloaded, fetch it again") from None
    if not isinstance(value, kind):
        raise BadInput(f"{path}: a JSON {'object' if kind is dict else 'list'} is needed, not a {type(value).__name__}")
    return value
