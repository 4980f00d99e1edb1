"""Fetch the public files of the 15 tasks to where `train.py` and `eval.py` look for them.

    python data/prepare.py                          everything, into data/public
    python data/prepare.py boolq gsm8k              two tasks
    python data/prepare.py --from ~/LLM-Adapters    from files that are already on this disk

A file gets its name only when it is whole, when every row has passed the checks of `tasks.py`, and
when its SHA-256 is the recorded one, if one is recorded.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import time
from functools import partial
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))              # to run from anywhere

from data import BadInput, Parser, command, progress, tasks, write_whole  # noqa: E402

HOST = "https://raw.githubusercontent.com"
TIMEOUT, WAITS = 30, (1, 2, 4, 8)          # seconds: of silence; before each new attempt

# The published files when this was written (gsm8k: in our layout). Where a publisher changes one,
# see what changed, then record the new hash. Files that are not listed have their rows checked.
RECORDED = Path(__file__).with_name("SHA256SUMS")          # `sha256sum -c` reads it too
SHA256 = dict(reversed(line.split()) for line in RECORDED.read_text().splitlines())


# --------------------------------------------------------------------- from the network or a disk


def from_mirror(mirror, task, split, label, timeout=TIMEOUT, waits=WAITS):
    """(address, bytes) of a task's file, downloaded. Where the connection fails or the server is
    busy, tries again after each of `waits` seconds. Raises BadInput at the end, or where the server
    refuses."""
    url = f"{mirror.rstrip('/')}/{task.source.format(split=split)}"
    for wait in (*waits, None):
        try:
            return url, fetch(url, label, timeout)
        except (OSError, HTTPException) as error:          # HTTPError and URLError are OSErrors
            problem = str(error) or type(error).__name__
            code = getattr(error, "code", 500)             # 408: timeout, 429: too many requests
            if wait is None or code < 500 and code not in (408, 429):
                raise BadInput(f"{url}: {problem}; check the address and the network, try again "
                               "later, or use --mirror or --from") from None
        print(f"{label}: {problem}; trying again in {wait} s", file=sys.stderr)
        time.sleep(wait)


def fetch(url, label, timeout, opener=urlopen):
    """One attempt at the bytes of an address."""
    with opener(Request(url, headers={"User-Agent": "infosteer"}), timeout=timeout) as reply:
        if urlsplit(reply.url).scheme != urlsplit(url).scheme:     # from https to http, for example
            raise BadInput(f"{url}: refused, because it redirects to {reply.url}")
        data = bytearray()
        with progress(total=reply.length, desc=label, unit="byte", unit_scale=True,
                      leave=False) as bar:
            while chunk := reply.read(1 << 16):
                data += chunk
                bar.update(len(chunk))
        if reply.length:                                           # what has not come
            raise IncompleteRead(data, reply.length)
        return bytes(data)


def from_folder(folder, task, split, label=""):
    """(path, bytes) of the first copy of a task's file in a folder, or None. --help lists where."""
    clone = task.source.split("/", 3)[3].format(split=split)       # where a clone has it
    places = [clone, f"{task.name}/{split}.json"]
    if task.name == "gsm8k":
        places = [f"grade-school-math/{split}.jsonl", clone, f"grade-school-math/{clone}"]
    paths = [folder / place for place in places if (folder / place).is_file()]
    return (paths[0], paths[0].read_bytes()) if paths else None


def gsm8k_layout(raw, where):
    """OpenAI's lines {"question", "answer": "...#### 1,000"} -> a file in our layout, as bytes. The
    text becomes the output unchanged, and "1000" the answer. Raises BadInput for another line."""
    rows = []
    for number, line in enumerate(raw.split(b"\n"), 1):    # splitlines() would cut at U+2028 too
        if line.strip():
            try:
                row = json.loads(line)
                question, text = row["question"], row["answer"]
                answer = text.rsplit("#### ", 1)[1].strip().replace(",", "")
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                raise BadInput(f"{where}, line {number}: not a row of GSM8K, or cut short "
                               f"({line[:40]!r}); fetch it again") from None
            rows.append(dict(instruction=question, input="", output=text, answer=answer))
    return json.dumps(rows, indent=1).encode()


def check(data, where, task, split, recorded):
    """The number of rows in a file's bytes. Raises BadInput unless every row is good and the bytes
    have the recorded SHA-256, if there is one."""
    rows, found = len(tasks.parse(data, where, task, split)), hashlib.sha256(data).hexdigest()
    if recorded not in (None, found):
        raise BadInput(f"{where}: not the published file: its SHA-256 is {found}, "
                       f"recorded in data/SHA256SUMS is {recorded}")
    return rows


# ----------------------------------------------------------------------------------- the command


def put(task, split, final, get, label, recorded):
    """Put one file in its place -> rows, "in place" or "new"; None where `get` finds no such file.
    What is there already and is another file is perhaps the user's own work: it stays."""
    if final.is_file():
        try:
            return check(final.read_bytes(), final, task, split, recorded), "in place"
        except BadInput as error:
            raise BadInput(f"{error}; delete it, or choose another --out") from None
    found = get(task, split, label)
    if found is None:
        return None
    where, data = found
    if task.name == "gsm8k":
        data = gsm8k_layout(data, where)
    rows = check(data, where, task, split, recorded)
    write_whole(final, data.decode())
    if not recorded:
        print(f"no SHA-256 on record; this one's is {hashlib.sha256(data).hexdigest()}")
    return rows, "new"


def prepare(names, out, get, recorded=SHA256):
    """Put the files of the named tasks (none named: of all) into `out`, and print a table.

    get(task, split, label) gives (where it is from, bytes), or None where there is no such file.
    Raises BadInput at the first file that is wrong; the files before it stay.
    """
    chosen = [tasks.find(name) for name in dict.fromkeys(names or tasks.KNOWN)]
    if toys := [task.name for task in chosen if task.suite]:
        raise BadInput(f"{toys[0]} is a task of the toy world: nothing to fetch, "
                       "python data/world.py --out data/toy generates it")
    files = [(task, split) for task in chosen for split in task.splits]
    absent, trainable = [], []
    print(f"{'task':14} {'split':6} {'rows':>8}  what the loss sees")
    for number, (task, split) in enumerate(files, 1):
        name = f"{task.name}/{split}.json"
        label = f"{name} ({number} of {len(files)})"
        done = put(task, split, out / name, get, label, recorded.get(name))
        if done is None:
            absent.append(name)
            continue
        seen = "rationale, then number" if task.kind == "arithmetic" else "the label"
        seen = seen if split == "train" else "-"
        print(f"{task.name:14} {split:6} {done[0]:>8,}  {seen:23} {done[1]}")
        trainable += [task.name] if split == "train" else []
    if absent:
        problem = f"not found: {', '.join(absent)}; see --help for where --from looks"
        if names or len(absent) == len(files):             # no name means: what there is
            raise BadInput(problem)
        print(problem)
    if trainable:
        print(f"Next: python train.py --model DIR --task {trainable[0]} --data {out} "
              f"--steer reg --out out/{trainable[0]}-reg")


def address(text):
    """An argparse type: an https:// address to which paths can be added."""
    name = "[A-Za-z0-9-]{1,63}"
    if not re.fullmatch(rf"https://{name}(\.{name})*(:[0-9]{{1,5}})?(/[\w./~-]*)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not an https:// address")
    return text


def main(argv=None):
    table = "\n".join(
        f"  {task.name:14} {task.kind:11}"
        + "".join(f"{rows:>8,} {split}" for split, rows in reversed(task.splits.items()))
        for task in tasks.KNOWN.values())
    parser = Parser(
        prog="prepare.py", description="Fetch the files of the 15 tasks, and check every row.",
        epilog=f"""tasks, and their rows as published:
{table}
  choice: a label is learned. arithmetic: a rationale, then a number (AQuA: a letter).
  A task without a train split is an out-of-distribution test for models trained on gsm8k.
  commonsense mixes the training rows of the 8 choice tasks. It is the largest file (about 100 MB).
  Each benchmark keeps its own licence.

A task of your own is a folder DIR/NAME (letters, digits, - _ .) with three files, as in
  task.json    {{"kind": "choice", "answers": ["yes", "no"]}}
  train.json   [{{"instruction": "Is 7 odd?", "input": "", "output": "", "answer": "yes"}}, ...]
  test.json    the same; one of the two files is enough to train only, or to score only
  It is used as --task NAME --data DIR. The response that is learned is "{tasks.TRIGGER}yes".
  Of {{"kind": "arithmetic"}}, "answer" is a number, "output" the rationale that is learned, with
  "#### 72" as its last line. "max_new_tokens": N in task.json is the room for a response, else 32
  for choice and 256 for arithmetic. {{"kind": "text"}} is plain text, of which only the loss is
  measured: "output" is how "instruction" goes on, with its first space; there is no answer.

--mirror URL replaces {HOST}; the paths under it stay.
--from DIR takes the first of these that it finds in DIR:
  dataset/<task>/<split>.json (as in a clone of LLM-Adapters), <task>/<split>.json
  commonsense: ft-training_set/commonsense_170k.json, commonsense/train.json
  gsm8k: grade-school-math/<split>.jsonl, or a clone of grade-school-math in DIR or as DIR""")
    parser.add_argument("tasks", nargs="*", metavar="TASK",
                        help="which to fetch; default: all of those below")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        default=Path(os.path.relpath(ROOT / "data" / "public")),
                        help="where to put them (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from", dest="folder", type=Path, metavar="DIR",
                        help="copy from a folder; nothing is downloaded")
    source.add_argument("--mirror", type=address, default=HOST, metavar="URL",
                        help="download from another https:// address")
    args = parser.parse_args(argv)
    if args.folder and not args.folder.is_dir():
        raise BadInput(f"--from {args.folder}: there is no such folder")
    get = partial(from_folder, args.folder) if args.folder else partial(from_mirror, args.mirror)
    prepare(args.tasks, args.out, get)


if __name__ == "__main__":
    command(main)
