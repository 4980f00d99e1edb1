"""The words of bad input, the one command line, the one progress bar, files written whole."""
import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm


class BadInput(ValueError):
    """Something the user gave us is wrong. The message is one line: what, where, what to do.

    Commands print it and exit with status 2. All else that goes wrong is a bug and keeps its
    traceback. What a message quotes may be hostile or long: it is made printable and short here."""

    def __init__(self, message):
        words = " ".join(shorten(message).split())
        super().__init__(shorten("".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)))


def shorten(text, most=600):           # characters: seven lines of a terminal
    return text if len(text) <= most else f"{text[:most - 207]} [...] {text[-200:]}"


# ------------------------------------------------------------------------------- files


def read_json(path, kind=dict):
    """The JSON value of a file. Raises BadInput if the file is missing, and as `parse_json`."""
    try:
        return parse_json(Path(path).read_bytes(), path, kind)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot read it ({error.strerror})") from None


def parse_json(raw, where, kind):
    """The JSON value in a file's bytes; `where` names the file in messages. Raises BadInput if they
    are not UTF-8 JSON, or hold another kind of value than `kind`."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8, "
                       "or fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON, or cut short ({error}; it begins {raw[:20]!r}); "
                       "fetch it again") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise BadInput(f"{where}: a JSON {wanted} is needed, not a {type(value).__name__}")
    return value


def write_whole(path, text):
    """Write a text file so that it is there completely or not at all; its folder is made."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:  # the same bytes everywhere
            file.write(text)
    except OSError as error:           # a full disk names no file
        raise OSError(f"{part}: {error.strerror}") from None
    os.replace(part, path)


# ---------------------------------------------------------------------------- commands


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, and whose flags are never guessed from a prefix."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def whole(text, least=0):
    """An argparse type: a whole number at or above 0."""
    if not text.isdecimal() or len(text) > 12 or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number {'above' if least else 'at or above'} 0 that fits")
    return int(text)


positive = partial(whole, least=1)     # an argparse type: a whole number above 0


def number(text, least=-1e30):
    """An argparse type: a finite number."""
    value = float(text)
    if not least <= value <= 1e30:                             # NaN is within no limits
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to 1e30")
    return value


def not_negative(text):
    """An argparse type: a finite number at or above 0."""
    return number(text, 0)


def command(main):
    """Run the main() of a command. What the user can mend becomes one line on standard error and
    exit status 2: bad input, a file that cannot be read or written, too little memory."""
    name = Path(sys.argv[0]).name
    for stream in ("stdout", "stderr"):                        # one may be closed, or know no ±
        setattr(sys, stream, getattr(sys, stream) or open(os.devnull, "w"))
        getattr(sys, stream).reconfigure(errors="replace", line_buffering=True)
    try:
        return main()
    except BrokenPipeError:            # of `... | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (BadInput, OSError) as error:
        problem = " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
                or "can't allocate memory" in str(error)):     # so PyTorch says on a CPU
            raise
        problem = ("out of memory; first lower --micro-tokens (training), or --cache-gb or "
                   "--max-new-tokens (evaluation), then add --checkpoint (training)")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what was saved is kept", file=sys.stderr)
        sys.exit(130)
    print(f"{name}: error: {problem}", file=sys.stderr)
    sys.exit(2)


def progress(things=None, **settings):
    """tqdm for people: a bar on a terminal; elsewhere a line every half minute, and none for short
    work, so that a log file shows a sign of life and stays readable."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, about {remaining} left\n"
        settings |= dict(delay=30, mininterval=30, maxinterval=30, bar_format=line)
    return tqdm(things, **settings)
