"""Everything that is text or a file of text: tokenizers, tasks, and fetching them."""


class BadInput(ValueError):
    """Something the user gave us is wrong. The message is one line: what, where, what to do.

    Commands print it and exit with status 2. Everything else that goes wrong is a bug and keeps its traceback.
    """
