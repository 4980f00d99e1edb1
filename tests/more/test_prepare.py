"""Fetching the data: a download that is cut, refused, garbled or another file never leaves a wrong
file behind.

After reading this you know where every file comes from and goes to, and what a user sees when
something is wrong: one line, exit status 2, and nothing under the final name. The server is a
thread on 127.0.0.1; no test uses the network.
"""
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import BadInput, prepare, tasks

ROOT = Path(__file__).resolve().parents[2]
LABEL = dict(boolq="true", piqa="solution1", social_i_qa="answer1", hellaswag="ending1",
             winogrande="option1", AQuA="C", commonsense="false")
GSM8K = [dict(question="How many?\u2028Say it.", answer="2 + 2 = <<2+2=4>>4\n#### 4"),
         dict(question="And now?", answer="many\n#### -1,000")]
WAITS = (0, 0)                             # seconds: three attempts without waiting


def published(name, n=3):
    """A tiny stand-in for the published file of a task."""
    if name == "gsm8k":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GSM8K).encode()
    usual = "answer1" if tasks.KNOWN[name].kind == "choice" else "3.0"
    return json.dumps([dict(instruction=f"{name} {i}", input="", output="o",
                            answer=LABEL.get(name, usual)) for i in range(n)]).encode()


FILES = [(task, split) for task in tasks.KNOWN.values() for split in task.splits]
BOOLQ = "/" + tasks.TASKS["boolq"].source.format(split="test")


class Site(ThreadingHTTPServer):
    """Serves `files`. By path, `cut` has the number of bytes after which it hangs up, `status` the
    errors it answers first, and `redirect` another address. `log` lists the paths asked for. With
    `silent` set, it does not answer before that event."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/{task.source.format(split=split)}": published(task.name)
                      for task, split in FILES}
        self.log, self.cut, self.status, self.redirect, self.silent = [], {}, {}, {}, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass                               # a client that hangs up is part of the lesson


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site, body = self.server, self.server.files.get(self.path)
        site.log.append(self.path)
        if site.silent:
            site.silent.wait(2)
            return
        if errors := site.status.get(self.path):
            return self.send_error(errors.pop(0))
        if self.path in site.redirect:
            self.send_response(302)
            self.send_header("Location", site.redirect[self.path])
            return self.end_headers()
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = site.cut.get(self.path)
        self.wfile.write(body[:cuts.pop(0)] if cuts else body)


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = Site()
    yield site
    site.shutdown()
    site.server_close()


def fetch(site, out, *names, recorded=None, waits=WAITS, timeout=30):
    """Prepare from the site."""
    get = partial(prepare.from_mirror, site.url, timeout=timeout, waits=waits)
    prepare.prepare(names, out, get, recorded or {})


def copy(folder, out, *names, recorded=None):
    """Prepare from a folder."""
    prepare.prepare(names, out, partial(prepare.from_folder, folder), recorded or {})


def refused(call, *args, **settings):
    """The one line with which a call is refused."""
    with pytest.raises(BadInput) as error:
        call(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def left(out):
    """All files below a folder, by their names."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------- the whole way


def test_everything_arrives_and_is_loadable(site, tmp_path, capsys):
    fetch(site, tmp_path)
    assert left(tmp_path) == sorted(f"{task.name}/{split}.json" for task, split in FILES)
    assert all(tasks.load(tmp_path, task.name, split) for task, split in FILES)
    assert (tmp_path / "piqa" / "train.json").read_bytes() == published("piqa")
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["boolq", "train", "3", "the", "label", "new"] in lines
    assert ["AddSub", "test", "3", "-", "new"] in lines
    assert ["gsm8k", "train", "2", "rationale,", "then", "number", "new"] in lines
    assert f"python train.py --model DIR --task boolq --data {tmp_path} " in printed


def test_a_second_run_asks_for_nothing_and_checks_again(site, tmp_path, capsys):
    fetch(site, tmp_path, "boolq")
    fetch(site, tmp_path, "boolq")
    assert len(site.log) == 2              # one request for each of two files
    assert capsys.readouterr().out.count("in place") == 2


def test_only_the_named_tasks_are_fetched_once_each(site, tmp_path, capsys):
    fetch(site, tmp_path, "AddSub", "openbookqa", "AddSub")
    assert left(tmp_path) == ["AddSub/test.json", "openbookqa/test.json", "openbookqa/train.json"]
    assert len(site.log) == 3 and "--task openbookqa" in capsys.readouterr().out


def test_gsm8k_becomes_our_layout(site, tmp_path):
    fetch(site, tmp_path, "gsm8k")
    first, second = json.loads((tmp_path / "gsm8k" / "train.json").read_bytes())
    assert first == dict(instruction="How many?\u2028Say it.", input="",
                         output="2 + 2 = <<2+2=4>>4\n#### 4", answer="4")
    assert second["answer"] == "-1000" and second["output"].endswith("#### -1,000")
    example = tasks.load(tmp_path, "gsm8k", "train")[0]
    assert example.response == "2 + 2 = <<2+2=4>>4\nThe final answer is: 4"


@pytest.mark.parametrize("line", [
    b'{"question": "q", "answer": "no mark"}', b'{"question": "q"}', b'["q"]', b'"q"', b"{",
    b"<html>", b"7", b'{"question": "q", "answer": 5}', b"\xff"])
def test_a_bad_line_of_gsm8k_is_named(line):
    raw = published("gsm8k") + line + b"\n"
    assert "FILE, line 3: not a row of GSM8K" in refused(prepare.gsm8k_layout, raw, "FILE")


def test_an_unknown_hash_is_printed_to_be_recorded(site, tmp_path, capsys):
    fetch(site, tmp_path, "mawps")
    found = sha256(published("mawps"))
    assert f"no SHA-256 on record; this one's is {found}" in capsys.readouterr().out


def test_bytes_are_kept_as_they_are(site, tmp_path):
    """A byte order mark and the line ends of Windows stay, or the hash would be another one."""
    site.files[BOOLQ] = body = b"\xef\xbb\xbf" + published("boolq").replace(b"}, ", b"},\r\n")
    fetch(site, tmp_path, "boolq")
    assert (tmp_path / "boolq" / "test.json").read_bytes() == body


# ----------------------------------------------------------------------- cut, refused, and repeated


def test_a_cut_download_is_tried_again(site, tmp_path, capsys):
    site.files[BOOLQ] = body = published("boolq", 5000)
    site.cut[BOOLQ] = [100_000, 0]
    fetch(site, tmp_path, "boolq")
    assert site.log.count(BOOLQ) == 3
    assert (tmp_path / "boolq" / "test.json").read_bytes() == body
    said = capsys.readouterr().err
    assert f"100000 bytes read, {len(body) - 100_000} more expected" in said
    assert "trying again in 0 s" in said


def test_attempts_are_bounded(site, tmp_path):
    site.cut[BOOLQ] = [10] * 9
    error = refused(fetch, site, tmp_path, "boolq")
    assert BOOLQ in error and "try again later" in error and site.log.count(BOOLQ) == 3
    assert left(tmp_path) == ["boolq/train.json"]


def test_waits_are_announced(site, tmp_path, capsys):
    site.status[BOOLQ] = [503, 429, 408]
    fetch(site, tmp_path, "boolq", waits=(0, 0.01, 0.02))
    said = capsys.readouterr().err
    assert "503: Service Unavailable; trying again in 0 s" in said
    assert "trying again in 0.01 s" in said and "trying again in 0.02 s" in said


def test_a_silent_server_counts_as_cut(site, tmp_path):
    site.silent = threading.Event()
    error = refused(fetch, site, tmp_path, "boolq", timeout=0.05)
    site.silent.set()
    assert "timed out" in error and len(site.log) == 3


def test_a_missing_file_on_the_server_is_named_and_not_asked_for_again(site, tmp_path):
    del site.files[BOOLQ]
    error = refused(fetch, site, tmp_path, "boolq")
    assert f"{site.url}{BOOLQ}: HTTP Error 404" in error and site.log.count(BOOLQ) == 1


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:1/x", "file:///etc/passwd"])
def test_redirects_to_another_kind_of_address_are_refused(site, tmp_path, target):
    site.redirect[BOOLQ] = target
    assert BOOLQ in refused(fetch, site, tmp_path, "boolq")
    assert left(tmp_path) == ["boolq/train.json"]


def test_a_redirect_to_the_same_kind_of_address_is_followed(site, tmp_path):
    site.redirect[BOOLQ], site.files["/elsewhere"] = "/elsewhere", published("boolq", 7)
    fetch(site, tmp_path, "boolq")
    assert len(tasks.load(tmp_path, "boolq", "test")) == 7


class Reply(io.BytesIO):
    url, length = "http://elsewhere/x", 1


def test_https_is_never_left_for_http():
    reply = Reply(b"x")
    error = refused(prepare.fetch, "https://host/x", "", 1, opener=lambda request, timeout: reply)
    assert "redirects to http://elsewhere/x" in error and reply.closed


def test_no_server_at_all_is_one_line(site, tmp_path):
    site.shutdown()
    site.server_close()
    error = refused(fetch, site, tmp_path, "boolq")
    assert "refused" in error and "--from" in error


# ------------------------------------------------------------------------------------ wrong content


def test_a_wrong_hash_is_refused_and_nothing_is_kept(site, tmp_path):
    error = refused(fetch, site, tmp_path, "boolq", recorded={"boolq/test.json": "0" * 64})
    assert "not the published file" in error and sha256(published("boolq")) in error
    assert left(tmp_path) == ["boolq/train.json"]


def test_the_recorded_hash_is_accepted(site, tmp_path, capsys):
    recorded = {f"boolq/{split}.json": sha256(published("boolq")) for split in ("train", "test")}
    fetch(site, tmp_path, "boolq", recorded=recorded)
    assert left(tmp_path) == ["boolq/test.json", "boolq/train.json"]
    assert "SHA-256" not in capsys.readouterr().out


@pytest.mark.parametrize("body, says", [
    (b"<!DOCTYPE html><title>Log in to the network</title>", "not JSON"), (b"", "not JSON"),
    (published("boolq")[:-5], "cut short"), (b"[]", "an empty list"),
    (b'{"message": "moved"}', "list is needed"), (published("AddSub"), "row 0"),
    (b"\x1f\x8b\x08", "not UTF-8")])
def test_a_page_that_is_not_the_file_is_refused(site, tmp_path, body, says):
    site.files[BOOLQ] = body
    error = refused(fetch, site, tmp_path, "boolq")
    assert says in error and site.url + BOOLQ in error and left(tmp_path) == ["boolq/train.json"]


@pytest.mark.parametrize("content, says", [
    (published("mawps", 9), "not the published file"), (published("mawps")[:-3], "cut short")])
def test_what_the_user_changed_is_not_overwritten(site, tmp_path, content, says):
    path = tmp_path / "mawps" / "test.json"
    path.parent.mkdir()
    path.write_bytes(content)
    recorded = {"mawps/test.json": sha256(published("mawps"))}
    error = refused(fetch, site, tmp_path, "mawps", recorded=recorded)
    assert says in error and "delete it" in error
    assert path.read_bytes() == content and not site.log


def test_on_a_full_disk_no_file_gets_its_name(site, tmp_path):
    """A disk of 64 KB. Needs the right to mount."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]
    if not hasattr(os, "geteuid") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        site.files[BOOLQ] = published("boolq", 5000)
        with pytest.raises(OSError, match="No space left on device"):
            fetch(site, tmp_path, "boolq")
        assert (tmp_path / "boolq" / "train.json").is_file()
        assert not (tmp_path / "boolq" / "test.json").exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# -------------------------------------------------------------------------------------- from a disk


def lay(folder, layout, *names):
    for task, split in FILES:
        if task.name in names:
            path = folder / layout.format(task=task.name, split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(published(task.name))


@pytest.mark.parametrize("layout", ["dataset/{task}/{split}.json", "{task}/{split}.json"])
def test_a_clone_or_a_plain_folder_is_enough(tmp_path, capsys, layout):
    source, out = tmp_path / "source", tmp_path / "out"
    lay(source, layout, "boolq", "AQuA")
    before = {name: (source / name).read_bytes() for name in left(source)}
    copy(source, out)
    assert left(out) == ["AQuA/test.json", "boolq/test.json", "boolq/train.json"]
    assert "not found: piqa/train.json" in capsys.readouterr().out
    assert {name: (source / name).read_bytes() for name in left(source)} == before


@pytest.mark.parametrize("layout", [
    "grade-school-math/{split}.jsonl", "grade_school_math/data/{split}.jsonl",
    "grade-school-math/grade_school_math/data/{split}.jsonl"])
def test_gsm8k_is_taken_from_openais_files(tmp_path, layout):
    lay(tmp_path, layout, "gsm8k")
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_bytes(published("AddSub"))    # LLM-Adapters' copy
    copy(tmp_path, tmp_path / "out", "gsm8k")
    examples = tasks.load(tmp_path / "out", "gsm8k", "test")
    assert [example.answer for example in examples] == ["4", "-1000"]


def test_the_mixture_comes_from_the_other_folder_of_the_clone(tmp_path):
    lay(tmp_path, "ft-training_set/commonsense_170k.json", "commonsense")
    copy(tmp_path, tmp_path / "out", "commonsense")
    assert len(tasks.load(tmp_path / "out", "commonsense", "train")) == 3


def test_of_two_copies_the_one_of_the_clone_is_taken(tmp_path):
    lay(tmp_path, "dataset/{task}/{split}.json", "mawps")
    (tmp_path / "mawps").mkdir()
    (tmp_path / "mawps" / "test.json").write_bytes(published("mawps", 4))
    copy(tmp_path, tmp_path / "out", "mawps")
    assert (tmp_path / "out" / "mawps" / "test.json").read_bytes() == published("mawps")


def test_named_but_absent_is_an_error_after_the_others(tmp_path):
    lay(tmp_path, "{task}/{split}.json", "SVAMP")
    error = refused(copy, tmp_path, tmp_path / "out", "piqa", "SVAMP")
    assert "not found: piqa/train.json, piqa/test.json" in error
    assert left(tmp_path / "out") == ["SVAMP/test.json"]


def test_a_folder_without_any_file_is_an_error(tmp_path):
    assert "not found: boolq/train.json" in refused(copy, tmp_path, tmp_path / "out")


# -------------------------------------------------------------------------------------- the command


def command(*argv, cwd=None):
    """prepare.py as a command."""
    return subprocess.run([sys.executable, ROOT / "data" / "prepare.py", *argv], cwd=cwd,
                          capture_output=True, text=True)


@pytest.mark.parametrize("argv, says", [
    (["toy-facts"], "data/world.py"), (["bolq"], "did you mean boolq?"),
    (["../../etc"], "there is no task '../../etc'"), (["--fro", "x"], "unrecognized arguments"),
    (["--from", "a", "--mirror", "https://b"], "not allowed with"),
    (["--from", "nowhere"], "no such folder"), (["--mirror", "http://a"], "not an https://"),
    (["--out"], "expected one argument")])
def test_a_wrong_command_is_one_line_and_status_2(tmp_path, argv, says):
    run = command(*argv, cwd=tmp_path)
    assert run.returncode == 2 and says in run.stderr
    assert run.stderr.startswith("prepare.py: error: ") and run.stderr.count("\n") == 1
    assert left(tmp_path) == []


def test_an_out_that_is_a_file_is_one_line_and_stays(tmp_path):
    lay(tmp_path / "source", "{task}/{split}.json", "SVAMP")       # no hash of it is recorded
    (tmp_path / "out").write_text("mine")
    run = command("SVAMP", "--from", tmp_path / "source", "--out", tmp_path / "out")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "Not a directory" in run.stderr
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("url", [
    "", "nonsense", "http://host/x", "ftp://host/x", "file:///etc", "https://", "https:///x",
    "https://a b/", "https://x:abc/", "https://[bad/", "https://x/?a=1", "https://x/#a",
    "https://x\n/", "https://ex\u00e4mple.org", "https://a..b", "https://x:123456", "//host/x"])
def test_a_mirror_that_is_no_https_address_is_refused(url):
    with pytest.raises(prepare.argparse.ArgumentTypeError, match="not an https:// address"):
        prepare.address(url)


@pytest.mark.parametrize("url", [prepare.HOST, "https://10.0.0.7:8443/mirror/of_data.v2/~me/"])
def test_a_mirror_may_have_a_port_and_a_path(url):
    assert prepare.address(url) == url


def test_the_help_names_every_task_and_the_command_runs_from_anywhere(tmp_path):
    run = command("--help", cwd=tmp_path)
    assert run.returncode == 0 and not run.stderr
    for name in (*tasks.KNOWN, "--mirror", "--from", "--out", "170,420", "9,427", "licence"):
        assert name in run.stdout
    assert os.path.relpath(ROOT / "data" / "public", tmp_path) in run.stdout.replace("\n", "")


# ------------------------------------------------------------------------------ the published files


@pytest.fixture
def real(shared, tmp_path):
    """The published files in our layout, so far as there are copies."""
    run = command("--from", shared / "datasets", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    return tmp_path


def test_the_recorded_hashes_are_those_of_the_published_files(real):
    assert left(real) == sorted(prepare.SHA256)


def test_llm_adapters_gsm8k_asks_openais_questions_in_another_order(shared, real):
    theirs, ours = (
        {row["instruction"]: float(row["answer"])
         for row in json.loads((folder / "gsm8k" / "test.json").read_bytes())}
        for folder in (shared / "datasets", real))
    assert ours == theirs and list(ours) != list(theirs) and len(ours) == 1319


@pytest.mark.parametrize("split, n", [("train", 7473), ("test", 1319)])
def test_both_rules_read_every_gsm8k_response_back(real, split, n):
    examples = tasks.load(real, "gsm8k", split)
    verdicts = [tasks.judge(example, example.response) for example in examples]
    assert len(examples) == n
    assert all(verdict["correct"] and verdict["strict_correct"] for verdict in verdicts)
