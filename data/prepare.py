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
SHA256 = dict(reversed(line.split()) for line in """
5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83  boolq/train.json
89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9  boolq/test.json
6a06cece3dec32f4fb1c1b0fc29dab14be7cf3053b417290dbc6cd845359f5ff  ARC-Easy/train.json
3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc  ARC-Easy/test.json
a9debff28aafed86a08211dc3584a3b6cb38edca8c56bb34cd5002ed54aeebfb  ARC-Challenge/train.json
4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7  ARC-Challenge/test.json
a1e094eeea01f70c0baa880f37497b26700ae99b243927b9c529984de9b1fe90  openbookqa/train.json
8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e  openbookqa/test.json
ea2c72b3c65f1c6b62b0755adc9e0225327e8e4a40e7a40e1f6bf196ed415855  gsm8k/train.json
5a82ec432ea9539f20c681804b483a07a97380e7594b2f7df7f5f25610b1c1a8  gsm8k/test.json
62a8662b1ad40879953c4df0e61883a749d03aa3fc5e71f1cdb842b816e139ff  AddSub/test.json
a40f426807c8a563802c2a5b66bda3bcd1eba9c099038fd1199f0dd57de5fd28  MultiArith/test.json
de677f5f0139340009eb01f17c0db781b4161912cd1f4efa77292f2fcf3478ee  AQuA/test.json
c1a708979cbf2b3df9ac4020baacf3e8e73fcf089e1de7dd1b305b810bfaa15f  mawps/test.json
""".strip().splitlines())


# --------------------------------------------------------------------- from the network or a disk


def download(url, label, timeout=TIMEOUT, waits=WAITS):
    """The bytes at an address. Where the connection fails or the server is busy, tries again after
    each of `waits` seconds. Raises BadInput at the end, or where the server refuses."""
    for wait in (*waits, None):
        try:
            return fetch(url, label, timeout)
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


def from_mirror(mirror, task, split, label, timeout=TIMEOUT, waits=WAITS):
    """(address, bytes) of a task's file, downloaded."""
    url = f"{mirror.rstrip('/')}/{task.source.format(split=split)}"
    return url, download(url, label, timeout, waits)


def from_folder(folder, task, split, label=""):
    """(path, bytes) of the first copy of a task's file in a folder, or None. --help lists where."""
    if task.name == "gsm8k":
        clone = f"grade_school_math/data/{split}.jsonl"
        places = [f"grade-school-math/{split}.jsonl", clone, f"grade-school-math/{clone}"]
    elif task is tasks.COMMONSENSE:
        places = ["ft-training_set/commonsense_170k.json", "commonsense/train.json"]
    else:
        places = [f"dataset/{task.name}/{split}.json", f"{task.name}/{split}.json"]
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


def check(data, where, task, split, recorded=SHA256):
    """The number of rows in a file's bytes. Raises BadInput unless every row is good and the bytes
    have the recorded SHA-256, if there is one."""
    rows = len(tasks.parse(data, where, task, split))
    found, expected = hashlib.sha256(data).hexdigest(), recorded.get(f"{task.name}/{split}.json")
    if expected not in (None, found):
        raise BadInput(f"{where}: not the published file: its SHA-256 is {found}, "
                       f"recorded in data/prepare.py is {expected}")
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
    if f"{task.name}/{split}.json" not in recorded:
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
        done = put(task, split, out / name, get, f"{name} ({number} of {len(files)})", recorded)
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
