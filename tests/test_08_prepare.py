"""Fetching the data: a download that is cut, changed, garbled or has no room, and still never leaves a wrong file behind.

After reading this you know where every file comes from and goes to, how a cut download goes on (Range), why it sometimes must not
(If-Range, ETag), and what a user sees when something is wrong: one line, exit status 2, and nothing under the final name.
The server is a thread on 127.0.0.1; no test uses the network.
"""
import errno
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import BadInput, prepare, tasks

ROOT = Path(__file__).resolve().parent.parent
LABEL = dict(boolq="true", piqa="solution1", social_i_qa="answer1", hellaswag="ending1", winogrande="option1", AQuA="C", commonsense="false")
GSM8K = [dict(question="How many?\u2028Say it.", answer="2 + 2 = <<2+2=4>>4\n#### 4"), dict(question="And now?", answer="many\n#### -1,000")]


def published(name, n=3):
    """A tiny stand-in for the published file of a task."""
    if name == "gsm8k":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GSM8K).encode()
    answer = LABEL.get(name, "answer1" if tasks.KNOWN[name].kind == "choice" else "3.0")
    return json.dumps([dict(instruction=f"{name} {i}", input="", output="o", answer=answer) for i in range(n)]).encode()


FILES = [(task, split) for task in tasks.KNOWN.values() for split in task.splits]
BOOLQ = "/" + tasks.TASKS["boolq"].source.format(split="test")


class Site(ThreadingHTTPServer):
    """Serves `files`; `cut` and `status` tell how to misbehave; `log` holds (path, Range, bytes of the body sent)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/" + task.source.format(split=split): published(task.name) for task, split in FILES}
        self.log, self.cut, self.status, self.redirect = [], {}, {}, {}
        self.ranges, self.if_range, self.tag = True, True, lambda body: f'"{hashlib.md5(body).hexdigest()}"'
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass                               # a client that hangs up is part of the lesson


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site, wanted = self.server, self.headers["Range"]
        statuses = site.status.get(self.path, [])
        body = site.files.get(self.path)
        if statuses or body is None:
            site.log.append((self.path, wanted, 0))
            return self.send_error(statuses.pop(0) if statuses else 404)
        if self.path in site.redirect:
            self.send_response(302)
            self.send_header("Location", site.redirect[self.path])
            return self.end_headers()
        start = 0
        if site.ranges and wanted and not (site.if_range and self.headers["If-Range"] != site.tag(body)):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(body):
            site.log.append((self.path, wanted, 0))
            return self.send_error(416)
        part = body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(part)))
        if site.tag(body):
            self.send_header("ETag", site.tag(body))
        self.end_headers()
        cuts = site.cut.get(self.path, [])
        part = part[:cuts.pop(0)] if cuts else part
        self.wfile.write(part)
        site.log.append((self.path, wanted, len(part)))


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prepare, "BACKOFF", (0, 0))        # 3 attempts, no waiting
    monkeypatch.setattr(prepare, "SHA256", {})
    site = Site()
    yield site
    site.shutdown()
    site.server_close()


def run(*argv, capsys):
    """prepare.py as a command -> (exit status, what it printed, its error line)."""
    try:
        prepare.main([str(arg) for arg in argv])
        status = 0
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def refused(*argv, capsys):
    """The one line with which a command is refused."""
    status, _, error = run(*argv, capsys=capsys)
    assert status == 2 and error.startswith("prepare.py: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def left(out):
    """All files below a folder, by their names."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------------------ the whole way


def test_everything_arrives_is_loadable_and_a_second_run_does_nothing(site, tmp_path, capsys):
    status, printed, _ = run("--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert status == 0
    assert left(tmp_path) == sorted(f"{task.name}/{split}.json" for task, split in FILES)       # and no .partial, no .etag
    for task, split in FILES:
        assert tasks.load(tmp_path, task.name, split)
    assert (tmp_path / "piqa" / "train.json").read_bytes() == published("piqa")                 # not a byte is touched
    lines = [line.split() for line in printed.splitlines()]
    assert ["boolq", "train", "3", "the", "label", "new"] in lines and ["AddSub", "test", "3", "-", "new"] in lines
    assert ["gsm8k", "train", "2", "rationale,", "then", "number", "new"] in lines
    assert f"python train.py --model DIR --task boolq --data {tmp_path} --steer reg --out out/boolq-reg" in printed
    requests = len(site.log)
    assert requests == len(FILES)
    status, printed, _ = run("--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert status == 0 and "Everything is in place" in printed and len(site.log) == requests


def test_only_the_named_tasks_are_fetched_once_each(site, tmp_path, capsys):
    status, printed, _ = run("AddSub", "openbookqa", "AddSub", "--mirror", site.url + "/", "--out", tmp_path, capsys=capsys)
    assert status == 0 and left(tmp_path) == ["AddSub/test.json", "openbookqa/test.json", "openbookqa/train.json"]
    assert len(site.log) == 3 and "--task openbookqa" in printed and printed.count("AddSub  ") == 1
    _, printed, _ = run("AddSub", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert "train.py" not in printed and "gsm8k" in printed      # nothing there to train on


def test_gsm8k_becomes_our_layout(site, tmp_path, capsys):
    assert run("gsm8k", "--mirror", site.url, "--out", tmp_path, capsys=capsys)[0] == 0
    first, second = json.loads((tmp_path / "gsm8k" / "train.json").read_bytes())
    assert first == dict(instruction="How many?\u2028Say it.", input="", output="2 + 2 = <<2+2=4>>4\n#### 4", answer="4")
    assert second["answer"] == "-1000" and second["output"].endswith("#### -1,000")
    assert tasks.load(tmp_path, "gsm8k", "train")[0].response == "2 + 2 = <<2+2=4>>4\nThe final answer is: 4"


@pytest.mark.parametrize("line", [b'{"question": "q", "answer": "no mark"}', b'{"question": "q"}', b'["q"]', b'"q"', b"{", b"<html>", b"7",
                                  b'{"question": "q", "answer": 5}'])
def test_a_bad_line_of_gsm8k_is_named(line):
    with pytest.raises(BadInput, match=r"FILE, line 3: not a row of GSM8K"):
        prepare.our_layout(published("gsm8k") + line + b"\n", "FILE", tasks.TASKS["gsm8k"])


def test_unknown_hashes_are_printed_to_be_recorded(site, tmp_path, capsys):
    _, printed, _ = run("mawps", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert f"mawps/test.json: no SHA-256 on record; this one's is {hashlib.sha256(published('mawps')).hexdigest()}" in printed


# ------------------------------------------------------------------------------------------------------------------ cut and changed


def test_a_cut_download_goes_on_where_it_stopped(site, tmp_path, capsys):
    site.files[BOOLQ] = body = published("boolq", 5000)
    site.cut[BOOLQ] = [100_000, 150_000]
    prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    asked = [(wanted, sent) for path, wanted, sent in site.log if path == BOOLQ]
    assert asked == [(None, 100_000), ("bytes=100000-", 150_000), ("bytes=250000-", len(body) - 250_000)]      # no byte was sent twice
    assert (tmp_path / "boolq" / "test.json").read_bytes() == body
    assert f"cut after 100,000 of {len(body):,} bytes" in capsys.readouterr().out


def test_attempts_are_bounded_and_the_next_run_goes_on(site, tmp_path, capsys):
    site.files[BOOLQ] = body = published("boolq", 5000)
    site.cut[BOOLQ] = [1000, 1000, 1000]
    error = refused("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert "gave up after 3 attempts" in error and "run the same command again" in error
    assert left(tmp_path / "boolq") == ["test.json.etag", "test.json.partial", "train.json"]
    assert (tmp_path / "boolq" / "test.json.partial").read_bytes() == body[:3000]
    assert run("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)[0] == 0
    assert site.log[-1] == (BOOLQ, "bytes=3000-", len(body) - 3000)
    assert (tmp_path / "boolq" / "test.json").read_bytes() == body and left(tmp_path / "boolq") == ["test.json", "train.json"]


def test_waits_grow_and_are_announced(site, tmp_path, capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(prepare, "BACKOFF", (1, 2))
    monkeypatch.setattr(prepare.time, "sleep", slept.append)
    site.status[BOOLQ] = [503, 429]
    prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    assert slept == [1, 2]
    assert "the server answered 503 Service Unavailable; trying again in 1 s" in capsys.readouterr().out


def test_a_server_that_ignores_range_makes_us_start_again(site, tmp_path):
    site.files[BOOLQ] = body = published("boolq", 5000)
    site.ranges, site.cut[BOOLQ] = False, [100_000]
    prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    assert [entry[1:] for entry in site.log if entry[0] == BOOLQ] == [(None, 100_000), ("bytes=100000-", len(body))]
    assert (tmp_path / "boolq" / "test.json").read_bytes() == body


@pytest.mark.parametrize("if_range", [True, False], ids=["server knows If-Range", "server ignores If-Range"])
def test_two_versions_of_a_file_are_never_spliced(site, tmp_path, if_range):
    """Both versions are good JSON of the same length, and so is their splice: only the ETag can tell."""
    old, new = (json.dumps([dict(instruction=f"{word} {i}", output="", answer="true") for i in range(99)]).encode() for word in ("old", "new"))
    site.files[BOOLQ], site.cut[BOOLQ], site.if_range = old, [1000] * 3, if_range
    with pytest.raises(BadInput, match="gave up"):
        prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    site.files[BOOLQ], site.cut[BOOLQ] = new, []
    prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    assert (tmp_path / "boolq" / "test.json").read_bytes() == new


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_strong_tag_nothing_is_resumed(site, tmp_path, tag):
    site.files[BOOLQ] = body = published("boolq", 500)
    site.tag, site.cut[BOOLQ] = lambda body: tag, [1000]
    prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    assert [wanted for path, wanted, _ in site.log if path == BOOLQ] == [None, None]
    assert (tmp_path / "boolq" / "test.json").read_bytes() == body


def test_a_partial_file_longer_than_the_servers_is_dropped(site, tmp_path):
    folder = tmp_path / "boolq"
    folder.mkdir()
    (folder / "test.json.partial").write_bytes(b"x" * 9999)
    (folder / "test.json.etag").write_text(site.tag(site.files[BOOLQ]))
    prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    assert [wanted for path, wanted, _ in site.log if path == BOOLQ] == ["bytes=9999-", None]
    assert (folder / "test.json").read_bytes() == published("boolq")


def test_a_silent_server_counts_as_cut(site, tmp_path, monkeypatch):
    site.files[BOOLQ], hold = published("boolq"), threading.Event()
    monkeypatch.setattr(prepare, "TIMEOUT", 0.05)
    monkeypatch.setattr(Handler, "do_GET", lambda self: hold.wait(2))
    with pytest.raises(BadInput, match=r"gave up after 3 attempts \(no connection \(timed out"):
        prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    hold.set()


# ------------------------------------------------------------------------------------------------------------ wrong content, no room


def test_a_wrong_hash_is_refused_and_nothing_is_kept(site, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "SHA256", {"boolq/test.json": "0" * 64})
    error = refused("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert "not the published file" in error and hashlib.sha256(published("boolq")).hexdigest() in error
    assert left(tmp_path) == ["boolq/train.json"]
    monkeypatch.setattr(prepare, "SHA256", {"boolq/test.json": hashlib.sha256(published("boolq")).hexdigest()})
    assert run("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)[0] == 0


@pytest.mark.parametrize("body, says", [
    (b"<!DOCTYPE html><title>Log in to the network</title>", "not JSON"), (b"", "not JSON"), (published("boolq")[:-5], "cut short"),
    (b"[]", "an empty list"), (b'{"message": "moved"}', "not a list"), (published("AddSub"), "row 0"), (b"\x1f\x8b\x08", "not UTF-8")])
def test_a_page_that_is_not_the_file_is_refused(site, tmp_path, capsys, body, says):
    site.files[BOOLQ] = body
    error = refused("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert says in error and site.url + BOOLQ in error and left(tmp_path) == ["boolq/train.json"]


def test_a_missing_file_on_the_server_is_named_and_not_asked_for_again(site, tmp_path, capsys):
    del site.files[BOOLQ]
    error = refused("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert f"{site.url}{BOOLQ}: the server answered 404" in error
    assert len([entry for entry in site.log if entry[0] == BOOLQ]) == 1


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_redirects_to_another_kind_of_address_are_refused(site, tmp_path, capsys, target):
    site.redirect[BOOLQ] = target
    error = refused("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
    assert BOOLQ in error and target in error and left(tmp_path) == ["boolq/train.json"]


def test_a_redirect_within_http_is_followed(site, tmp_path):
    site.redirect[BOOLQ], site.files["/elsewhere"] = "/elsewhere", published("boolq", 7)
    prepare.prepare(["boolq"], tmp_path, mirror=site.url)
    assert len(tasks.load(tmp_path, "boolq", "test")) == 7


def test_https_is_never_left_for_http():
    with pytest.raises(prepare.urllib.error.URLError, match="refused"):
        prepare._Redirect().redirect_request(prepare.urllib.request.Request("https://a/b"), None, 302, "", {}, "http://a/b")


def test_no_server_at_all(site, tmp_path, capsys):
    with socket.socket() as free:          # bound but not listening: whoever connects is refused
        free.bind(("127.0.0.1", 0))
        error = refused("boolq", "--mirror", f"http://127.0.0.1:{free.getsockname()[1]}", "--out", tmp_path, capsys=capsys)
    assert "no connection" in error and "--from" in error


class FullDisk(io.FileIO):
    """A file on a disk that has no room left."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("source", ["--mirror", "--from"])
def test_a_full_disk_is_one_line_and_no_half_file(site, tmp_path, capsys, monkeypatch, source):
    (tmp_path / "boolq").mkdir()
    for split in ("train", "test"):
        (tmp_path / "boolq" / f"{split}.json").write_bytes(published("boolq", 500))
    site.files[BOOLQ.replace("test", "train")] = published("boolq", 500)
    monkeypatch.setattr(prepare, "open", FullDisk, raising=False)
    origin = site.url if source == "--mirror" else tmp_path
    error = refused("boolq", source, origin, "--out", tmp_path / "out", capsys=capsys)
    assert "No space left on device; free some room" in error and "out/boolq/train.json" in error
    assert left(tmp_path / "out") == (["boolq/train.json.etag", "boolq/train.json.partial"] if source == "--mirror" else [])


def test_on_a_really_full_disk_the_download_waits_for_room(site, tmp_path, capsys):
    """A 64 KB disk, made 4 MB after the failure. Needs the right to mount."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True) if hasattr(os, "geteuid") else None
    if mount is None or mount.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        site.files[BOOLQ] = body = published("boolq", 5000)
        error = refused("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
        assert "No space left on device" in error and left(tmp_path / "boolq") == ["test.json.etag", "test.json.partial", "train.json"]
        have = (tmp_path / "boolq" / "test.json.partial").stat().st_size
        assert have > 10_000
        subprocess.run(["mount", "-o", "remount,size=4m", tmp_path], check=True)
        assert run("boolq", "--mirror", site.url, "--out", tmp_path, capsys=capsys)[0] == 0
        assert site.log[-1] == (BOOLQ, f"bytes={have}-", len(body) - have)
        assert (tmp_path / "boolq" / "test.json").read_bytes() == body
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(prepare.os, "fsync", lambda number: steps.append("fsync"))
    monkeypatch.setattr(prepare.os, "replace", lambda old, new: steps.append((Path(old).read_bytes(), Path(new).exists())))
    prepare.save(tmp_path / "test.json", b"whole")
    assert steps == ["fsync", (b"whole", False)]


# --------------------------------------------------------------------------------------------------------------------- from a disk


def lay(folder, layout, names):
    for task, split in FILES:
        if task.name in names:
            path = folder / layout.format(task=task.name, split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(published(task.name))


@pytest.mark.parametrize("layout", ["dataset/{task}/{split}.json", "{task}/{split}.json"])
def test_a_clone_or_a_plain_folder_is_enough(tmp_path, capsys, monkeypatch, layout):
    monkeypatch.setattr(prepare, "SHA256", {})
    monkeypatch.setattr(prepare, "download", None)         # any attempt to use the network fails
    source, out = tmp_path / "source", tmp_path / "out"
    lay(source, layout, ["boolq", "AQuA"])
    before = {name: (source / name).read_bytes() for name in left(source)}
    status, printed, _ = run("--from", source, "--out", out, capsys=capsys)
    assert status == 0 and left(out) == ["AQuA/test.json", "boolq/test.json", "boolq/train.json"]
    assert f"Not in {source}: piqa/train" in printed and "gsm8k/train" in printed
    assert {name: (source / name).read_bytes() for name in left(source)} == before      # the source is only read
    assert "Everything is in place" in run("--from", source, "--out", out, capsys=capsys)[1]


@pytest.mark.parametrize("layout", ["grade-school-math/{split}.jsonl", "grade_school_math/data/{split}.jsonl",
                                    "grade-school-math/grade_school_math/data/{split}.jsonl"])
def test_gsm8k_is_taken_from_openais_files(tmp_path, capsys, monkeypatch, layout):
    monkeypatch.setattr(prepare, "SHA256", {})
    lay(tmp_path, layout, ["gsm8k"])
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_bytes(published("AddSub"))        # LLM-Adapters' copy: not this one
    assert run("gsm8k", "--from", tmp_path, "--out", tmp_path / "out", capsys=capsys)[0] == 0
    assert [example.answer for example in tasks.load(tmp_path / "out", "gsm8k", "test")] == ["4", "-1000"]


def test_the_mixture_comes_from_the_clones_other_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "SHA256", {})
    lay(tmp_path, "ft-training_set/commonsense_170k.json", ["commonsense"])
    assert run("commonsense", "--from", tmp_path, "--out", tmp_path / "out", capsys=capsys)[0] == 0
    assert len(tasks.load(tmp_path / "out", "commonsense", "train")) == 3


def test_of_two_copies_the_recorded_one_is_taken_or_neither(tmp_path, capsys, monkeypatch):
    lay(tmp_path, "dataset/{task}/{split}.json", ["mawps"])
    lay(tmp_path, "{task}/{split}.json", ["mawps"])
    monkeypatch.setattr(prepare, "SHA256", {})
    assert run("mawps", "--from", tmp_path, "--out", tmp_path / "same", capsys=capsys)[0] == 0
    right = published("mawps", 4)
    (tmp_path / "mawps" / "test.json").write_bytes(right)
    error = refused("mawps", "--from", tmp_path, "--out", tmp_path / "differ", capsys=capsys)
    assert "dataset/mawps/test.json and" in error and "differ" in error
    monkeypatch.setattr(prepare, "SHA256", {"mawps/test.json": hashlib.sha256(right).hexdigest()})
    assert run("mawps", "--from", tmp_path, "--out", tmp_path / "out", capsys=capsys)[0] == 0
    assert (tmp_path / "out" / "mawps" / "test.json").read_bytes() == right


def test_named_but_absent_is_an_error(tmp_path, capsys):
    assert "has no piqa/train, piqa/test" in refused("piqa", "--from", tmp_path, "--out", tmp_path / "out", capsys=capsys)
    lay(tmp_path, "{task}/{split}.json", ["SVAMP"])
    error = refused("SVAMP", "piqa", "--from", tmp_path, "--out", tmp_path / "out", capsys=capsys)
    assert "has no piqa/train, piqa/test" in error and left(tmp_path / "out") == ["SVAMP/test.json"]
    for path in (tmp_path / "SVAMP", tmp_path / "out" / "SVAMP"):
        (path / "test.json").unlink()
    assert "has no boolq/train" in refused("--from", tmp_path, "--out", tmp_path / "out", capsys=capsys)
    assert "no such folder" in refused("--from", tmp_path / "nowhere", "--out", tmp_path / "out", capsys=capsys)


def test_what_the_user_changed_is_not_overwritten(site, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mawps" / "test.json"
    path.parent.mkdir()
    monkeypatch.setattr(prepare, "SHA256", {"mawps/test.json": hashlib.sha256(published("mawps")).hexdigest()})
    for content, says in ((published("mawps", 9), "not the published file"), (published("mawps")[:-3], "cut short")):
        path.write_bytes(content)
        error = refused("mawps", "--mirror", site.url, "--out", tmp_path, capsys=capsys)
        assert says in error and "delete it" in error and path.read_bytes() == content and not site.log


# -------------------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host/x", "file:///etc", "http://", "http:///x", "http://a b/", "http://x:abc/", "http://[bad/",
                                 "http://x/?a=1", "http://x/#a", "http://x\n/", "https://ex\u00e4mple.org", "//host/x", "javascript:1"])
def test_a_mirror_that_is_no_web_address_is_refused(tmp_path, capsys, url):
    assert "argument --mirror" in refused("--mirror", url, "--out", tmp_path / "out", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_port_that_cannot_exist_is_one_line(site, tmp_path, capsys):
    assert "no connection" in refused("boolq", "--mirror", "http://127.0.0.1:99999", "--out", tmp_path, capsys=capsys)


@pytest.mark.parametrize("argv, says", [
    (["toy-facts"], "data/world.py"), (["bolq"], "did you mean boolq?"), (["../../etc"], "there is no task '../../etc'"), (["boolq/../piqa"], "there is no task"),
    (["--fro", "x"], "unrecognized arguments"), (["--from", "a", "--mirror", "http://b"], "not allowed with"), (["--out"], "expected one argument")])
def test_a_wrong_command_is_one_line(tmp_path, capsys, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(*argv, capsys=capsys)
    assert left(tmp_path) == []


def test_an_out_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "source" / "mawps").mkdir(parents=True)
    (tmp_path / "source" / "mawps" / "test.json").write_bytes(published("mawps"))
    (tmp_path / "out").write_text("mine")
    refused("mawps", "--from", tmp_path / "source", "--out", tmp_path / "out", capsys=capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_stopping_it_by_hand_says_how_to_go_on(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, "prepare", stop)
    status, _, error = run(capsys=capsys)
    assert status == 130 and "run the same command again" in error


def test_the_help_names_every_task_and_the_command_runs_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for name in (*tasks.KNOWN, "--mirror", "--from", "--out", "170,420", "9,427", "licence"):
        assert name in done.stdout
    assert os.path.relpath(ROOT / "data" / "public", tmp_path) in done.stdout.replace("\n", "")


# ------------------------------------------------------------------------------------------------------------- the published files


def test_the_recorded_hashes_are_those_of_the_published_files(shared, tmp_path, capsys):
    status, printed, _ = run("--from", shared / "datasets", "--out", tmp_path, capsys=capsys)
    assert status == 0 and sorted(left(tmp_path)) == sorted(prepare.SHA256)


def test_llm_adapters_gsm8k_asks_openais_questions_in_another_order(shared, tmp_path, capsys):
    run("gsm8k", "--from", shared / "datasets", "--out", tmp_path, capsys=capsys)
    theirs = {row["instruction"]: float(row["answer"]) for row in json.loads((shared / "datasets" / "gsm8k" / "test.json").read_bytes())}
    ours = {row["instruction"]: float(row["answer"]) for row in json.loads((tmp_path / "gsm8k" / "test.json").read_bytes())}
    assert ours == theirs and list(ours) != list(theirs) and len(ours) == 1319


def test_both_rules_read_every_gsm8k_response_back(shared, tmp_path, capsys):
    run("gsm8k", "--from", shared / "datasets", "--out", tmp_path, capsys=capsys)
    for split, n in (("train", 7473), ("test", 1319)):
        examples = tasks.load(tmp_path, "gsm8k", split)
        verdicts = [tasks.judge(example, example.response) for example in examples]
        assert len(examples) == n and all(verdict["correct"] and verdict["strict_correct"] for verdict in verdicts)
