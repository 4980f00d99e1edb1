"""Fetch the public files of the 15 tasks, check every row, and put them where `train.py` and `eval.py` look for them.

    python data/prepare.py                          everything, into data/public
    python data/prepare.py boolq gsm8k              two tasks
    python data/prepare.py --from ~/LLM-Adapters    from files that are already on this disk

A file appears under its final name only when it is whole, every row has passed the checks of `tasks.py`, and its SHA-256 is the
recorded one (where one is). What has arrived of a cut download waits in FILE.partial; the next run goes on from there.
"""
import argparse
import errno
import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException, RemoteDisconnected
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))              # so that this file also runs as a command, from anywhere

from tqdm import tqdm  # noqa: E402

from data import BadInput, Parser, tasks  # noqa: E402

HOST = "https://raw.githubusercontent.com"
TIMEOUT, BACKOFF = 30, (1, 2, 4, 8)        # seconds: of silence before a connection counts as cut; of waiting before each new attempt
# The published files as they were when this was written (gsm8k: in our layout). Where a publisher changes one, see what changed,
# then record the new hash. Tasks that are absent here are checked row by row only.
SHA256 = {
    "boolq/train.json": "5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83",
    "boolq/test.json": "89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9",
    "ARC-Easy/train.json": "6a06cece3dec32f4fb1c1b0fc29dab14be7cf3053b417290dbc6cd845359f5ff",
    "ARC-Easy/test.json": "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc",
    "ARC-Challenge/train.json": "a9debff28aafed86a08211dc3584a3b6cb38edca8c56bb34cd5002ed54aeebfb",
    "ARC-Challenge/test.json": "4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7",
    "openbookqa/train.json": "a1e094eeea01f70c0baa880f37497b26700ae99b243927b9c529984de9b1fe90",
    "openbookqa/test.json": "8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e",
    "gsm8k/train.json": "ea2c72b3c65f1c6b62b0755adc9e0225327e8e4a40e7a40e1f6bf196ed415855",
    "gsm8k/test.json": "5a82ec432ea9539f20c681804b483a07a97380e7594b2f7df7f5f25610b1c1a8",
    "AddSub/test.json": "62a8662b1ad40879953c4df0e61883a749d03aa3fc5e71f1cdb842b816e139ff",
    "MultiArith/test.json": "a40f426807c8a563802c2a5b66bda3bcd1eba9c099038fd1199f0dd57de5fd28",
    "AQuA/test.json": "de677f5f0139340009eb01f17c0db781b4161912cd1f4efa77292f2fcf3478ee",
    "mawps/test.json": "c1a708979cbf2b3df9ac4020baacf3e8e73fcf089e1de7dd1b305b810bfaa15f",
}


class Cut(Exception):
    """The connection broke off, or the server asks for patience: worth another attempt."""


class Stale(Cut):
    """Worth another attempt, from the beginning: what we have is not the beginning of what the server has now."""


# ------------------------------------------------------------------------------------------------------------------ one download


class _Redirect(urllib.request.HTTPRedirectHandler):
    """urllib would also follow a redirect to ftp, or from https down to http, where anyone on the way can change the file."""

    def redirect_request(self, request, reply, code, message, headers, url):
        if urlsplit(url).scheme not in ("https", urlsplit(request.full_url).scheme):
            raise urllib.error.URLError(f"refused: it redirects to {url}, another kind of address")
        return super().redirect_request(request, reply, code, message, headers, url)


def _open(url, headers):
    """urlopen, with every failure sorted into worth another attempt (Cut) or not (BadInput)."""
    try:
        return urllib.request.build_opener(_Redirect).open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except (OSError, HTTPException, ValueError) as error:      # HTTPError and URLError are OSErrors
        code, reason = getattr(error, "code", 0), getattr(error, "reason", error)
        says = " ".join(f"the server answered {code} {reason}".split()) if code else f"no connection ({reason or type(reason).__name__})"
        if code == 416:
            raise Stale(says) from None
        if code in (408, 429) or code >= 500 or isinstance(reason, (TimeoutError, ConnectionResetError, RemoteDisconnected)):
            raise Cut(says) from None
        raise BadInput(f"{url}: {says}; check the address and the network, or use --mirror or --from") from None


def _beside(final):
    return final.with_name(final.name + ".partial"), final.with_name(final.name + ".etag")


def download(url: str, final: Path, label: str) -> bytes:
    """The bytes at url, by way of FINAL.partial. Raises BadInput; after a cut the partial file stays, for the next run."""
    partial, tag_file = _beside(final)
    for wait in (*BACKOFF, None):
        try:
            _attempt(url, partial, tag_file, label)
            return partial.read_bytes()
        except Cut as cut:
            if isinstance(cut, Stale):
                tag_file.unlink(missing_ok=True)
            if wait is None:
                raise BadInput(f"{url}: gave up after {len(BACKOFF) + 1} attempts ({cut}); run the same command again to go on") from None
            tqdm.write(f"{label}: {cut}; trying again in {wait} s")
            time.sleep(wait)


def _attempt(url, partial, tag_file, label):
    """One request, for what is missing. The tag file holds the version (ETag, else date) of which the partial file is the beginning;
    `If-Range` asks for the whole file if the server now has another. Without a version we start again: two must not be spliced."""
    tag = tag_file.read_text() if tag_file.is_file() else ""
    have = partial.stat().st_size if tag and partial.is_file() else 0
    headers = {"User-Agent": "infosteer", "Accept-Encoding": "identity"}
    with _open(url, headers | ({"Range": f"bytes={have}-", "If-Range": tag} if have else {})) as reply:
        version = reply.headers["ETag"] or ""
        if version[:2] in ("", "W/"):      # a weak tag promises the same meaning, not the same bytes
            version = reply.headers["Last-Modified"] or ""
        if reply.status == 206 and (version not in ("", tag) or not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
            raise Stale("the file on the server has changed; starting again")
        have, tag = (have, tag) if reply.status == 206 else (0, version)      # 200: the whole file, whatever we asked for
        length = reply.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with open(partial, "ab" if have else "wb") as file, tqdm(total=total, initial=have, desc=label, unit="B", unit_scale=True,
                                                                 leave=False, disable=None) as bar:
            tag_file.write_text(tag)
            while chunk := _read(reply, file.tell()):
                file.write(chunk)
                bar.update(len(chunk))
            if total is not None and file.tell() < total:
                raise Cut(f"the connection was cut after {file.tell():,} of {total:,} bytes")


def _read(reply, position):
    try:                                   # apart from write(), so that a full disk is not taken for a cut connection
        return reply.read(1 << 16)
    except (OSError, HTTPException) as error:
        raise Cut(f"the connection was cut after {position:,} bytes ({type(error).__name__})") from None


# ------------------------------------------------------------------------------------------------ files on this disk, and checking


def on_disk(folder: Path, task: tasks.Task, split: str):
    """(path, bytes in our layout) of a task's file in `folder`, or None. Of copies that differ, the one with the recorded hash."""
    if task.name == "gsm8k":
        places = ["grade-school-math/{}.jsonl", "grade_school_math/data/{}.jsonl", "grade-school-math/grade_school_math/data/{}.jsonl"]
    elif task is tasks.COMMONSENSE:
        places = ["ft-training_set/commonsense_170k.json", "commonsense/{}.json"]
    else:
        places = [f"dataset/{task.name}/{{}}.json", f"{task.name}/{{}}.json"]
    paths = [path for place in places if (path := folder / place.format(split)).is_file()]
    copies = [(path, our_layout(path.read_bytes(), path, task)) for path in paths]
    if len({data for _, data in copies}) > 1:
        right = [copy for copy in copies if hashlib.sha256(copy[1]).hexdigest() == SHA256.get(f"{task.name}/{split}.json")]
        if not right:
            raise BadInput(f"{copies[0][0]} and {copies[1][0]} differ, and neither has a recorded SHA-256: remove the wrong one")
        return right[0]
    return copies[0] if copies else None


def our_layout(raw: bytes, where, task: tasks.Task) -> bytes:
    """GSM8K's lines {"question", "answer": "...#### 1,000"} -> rows with their text unchanged as output, and "1000" as answer.
    Every other file has our layout already, and not a byte is touched."""
    if task.name != "gsm8k":
        return raw
    rows = []
    for number, line in enumerate(raw.split(b"\n"), 1):    # not splitlines(), which would cut a text at U+2028
        if line.strip():
            try:
                row = json.loads(line)
                answer = row["answer"].rsplit("#### ", 1)[1].strip().replace(",", "")
                rows.append(dict(instruction=row["question"], input="", output=row["answer"], answer=answer))
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                raise BadInput(f"{where}, line {number}: not a row of GSM8K, or cut short ({line[:40]!r}); fetch it again") from None
    return json.dumps(rows, indent=1).encode()


def check(data: bytes, where, task: tasks.Task, split: str) -> int:
    """The number of rows. Raises BadInput unless every row is good and the bytes have the recorded SHA-256, if there is one."""
    rows = len(tasks.parse(data, where, task, split))
    found, recorded = hashlib.sha256(data).hexdigest(), SHA256.get(f"{task.name}/{split}.json")
    if recorded not in (None, found):
        raise BadInput(f"{where}: not the published file: its SHA-256 is {found}, recorded in data/prepare.py is {recorded}")
    return rows


def save(final: Path, data: bytes):
    """Write under another name, push it to the disk, then rename: whoever looks sees the whole file or none."""
    partial, tag_file = _beside(final)
    tag_file.unlink(missing_ok=True)       # from here on the partial file is ours, and no beginning of the server's
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


# -------------------------------------------------------------------------------------------------------------------- the command


def prepare_one(task, split, out: Path, folder: Path | None, mirror: str, label: str):
    """Put one file in its place -> (rows, "in place" | "new"), or None if `folder` lacks it. Raises BadInput."""
    final = out / task.name / f"{split}.json"
    try:
        if final.is_file():
            try:
                return check(final.read_bytes(), final, task, split), "in place"
            except BadInput as error:      # perhaps the user's own work: not ours to overwrite
                raise BadInput(f"{error}; delete it, or choose another --out, then run this again") from None
        if folder:
            where, data = on_disk(folder, task, split) or (None, b"")
            if where is None:
                return None
            rows = check(data, where, task, split)
            final.parent.mkdir(parents=True, exist_ok=True)
        else:
            where = f"{mirror.rstrip('/')}/{task.source.format(split=split)}"
            final.parent.mkdir(parents=True, exist_ok=True)
            data = download(where, final, label)
            try:
                data = our_layout(data, where, task)
                rows = check(data, where, task, split)
            except BadInput as error:      # do not go on from this next time
                for path in _beside(final):
                    path.unlink(missing_ok=True)
                raise BadInput(f"{error} (what came is not kept)") from None
        save(final, data)
    except OSError as error:
        todo = "; free some room, then run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise BadInput(f"{error.filename or final}: {error.strerror or error}{todo}") from None
    if f"{task.name}/{split}.json" not in SHA256:
        tqdm.write(f"{task.name}/{split}.json: no SHA-256 on record; this one's is {hashlib.sha256(data).hexdigest()}")
    return rows, "new"


def prepare(names, out: Path, folder: Path | None = None, mirror: str = HOST):
    """Put the files of the named tasks (none named: of all) in place and say so. Raises BadInput at the first that is wrong."""
    if folder and not folder.is_dir():
        raise BadInput(f"--from {folder}: there is no such folder")
    if toys := [name for name in names or () if name in tasks.TOY]:
        raise BadInput(f"{toys[0]} is a task of the toy world: nothing to fetch, python data/world.py --out data/toy generates it")
    chosen = [tasks.find(name) for name in dict.fromkeys(names or tasks.KNOWN)]
    files = [(task, split) for task in chosen for split in task.splits]
    lines, absent, trainable = [], [], []
    with tqdm(files, desc="all files", unit="file", leave=False, disable=None) as bar:      # closed before an error is printed
        for number, (task, split) in enumerate(bar, 1):
            done = prepare_one(task, split, out, folder, mirror, f"{task.name}/{split}.json ({number} of {len(files)})")
            if done is None:
                absent.append(f"{task.name}/{split}")
                continue
            taught = "-" if split == "test" else "rationale, then number" if task.kind == "arithmetic" else "the label"
            lines.append((task.name, split, f"{done[0]:,}", taught, done[1]))
            trainable += [task.name] if split == "train" else []
    if absent and (names or not lines):    # nothing named means: what there is
        raise BadInput(f"{folder} has no {', '.join(absent)}; see --help for where --from looks")
    if all(line[-1] == "in place" for line in lines):
        print(f"Everything is in place in {out} ({len(lines)} files, checked again); nothing to do.")
    else:
        for task, split, rows, taught, state in (("task", "split", "rows", "what the loss sees", ""), *lines):
            print(f"{task:14} {split:6} {rows:>8}  {taught:23} {state}".rstrip())
    if absent:
        print(f"Not in {folder}: {', '.join(absent)}. Without --from they are downloaded.")
    if trainable:
        task = "boolq" if "boolq" in trainable else trainable[0]
        print(f"Next: python train.py --model DIR --task {task} --data {out} --steer reg --out out/{task}-reg")
    else:
        print("These are tests for models trained on gsm8k: python data/prepare.py gsm8k")


def address(text):
    if not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[!-~]*)?", text) or "?" in text or "#" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not an http:// or https:// address to which paths can be added")
    return text


def main(argv=None):
    table = "\n".join(f"  {task.name:14} {task.kind:11}" + "".join(f"{rows:>8,} {split}" for split, rows in reversed(task.splits.items()))
                      for task in tasks.KNOWN.values())
    parser = Parser(
        prog="prepare.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fetch the public files of the 15 tasks into DIR/<task>/{train,test}.json, checking every row.",
        epilog=f"""tasks, and their rows as published:
{table}
  choice: the answer is a label, learned without a rationale. arithmetic: a rationale, then a number (AQuA: a letter).
  No train split: an out-of-distribution test for models trained on gsm8k. commonsense mixes the training rows of the
  8 choice tasks and is the largest file (about 100 MB). Each benchmark keeps its own licence.

--mirror URL replaces {HOST}. Under it are
  {tasks.ADAPTERS}/dataset/<task>/<split>.json
  {tasks.COMMONSENSE.source}
  {tasks.TASKS["gsm8k"].source.replace("{split}", "<split>")}
--from DIR looks in DIR for dataset/<task>/<split>.json (as in a clone of LLM-Adapters), or <task>/<split>.json;
  commonsense: ft-training_set/commonsense_170k.json, or commonsense/train.json;
  gsm8k: grade-school-math/<split>.jsonl, or a clone of grade-school-math in DIR or as DIR.""")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="which to fetch; default: all of those below")
    parser.add_argument("--out", type=Path, default=Path(os.path.relpath(ROOT / "data" / "public")), metavar="DIR",
                        help="where to put them (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="copy from a folder; nothing is downloaded")
    source.add_argument("--mirror", type=address, default=HOST, metavar="URL", help="download from another address")
    args = parser.parse_args(argv)
    try:
        prepare(args.tasks, args.out, args.folder, args.mirror)
    except BadInput as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "prepare.py: stopped; run the same command again to go on\n")


if __name__ == "__main__":
    main()
