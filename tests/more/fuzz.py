r"""Breaks files on purpose, thousands of times, and checks what the readers make of them.

    python tests/more/fuzz.py --mutants 10000
    python tests/more/fuzz.py --kind weights --seed 0 --only 1234       one mutant, with its message

A mutant is a good set of files with one to three faults in one of them: a key deleted, a number
made huge, an offset moved, a byte flipped. Reading it must end in one of two ways:

refused     BadInput: one line of at most 600 printable characters that begins with the folder of
            the fault
accepted    with the meaning that the bytes have for the second, independent reader of its kind in
            second_readers.py:
    config       every field of Config follows from config.json; the same configuration has the same
                 logits; what save_pretrained writes is read back as the same model
    weights      every tensor equals numpy's reading of the safetensors file, and no byte of it is
                 left over or used twice
    tokenizer    ids are those of the merge rule applied by hand, and decode to the text; bos, eos
                 and pad are what the files say
    tasks        every example is its row of json.loads
    memory       what a fine-grained method found out equals the bytes of the file
    run          settings and scores are those of json.loads; a damaged run is left out by name

Everything else is a failure: another exception, a print (a library's panic), a crash, more than 5
seconds of processor time, more memory than 4 times the files and 32 MiB (a new process maps half of
that), a file written outside the output folder. Each mutant is read in a forked process of its own.
"""
import base64
import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

TESTS = Path(__file__).resolve().parents[1]
ROOT, GOLDEN = TESTS.parent, TESTS / "golden"
sys.path[:0] = [str(ROOT), str(TESTS)]

import second_readers as second  # noqa: E402
import train  # noqa: E402
from data import BadInput, Parser, positive, progress, tasks  # noqa: E402
from data.tokenizer import CHAR_TO_BYTE, Tokenizer  # noqa: E402
from eval import PER_MEMORY, with_per_memory  # noqa: E402
from infosteer import METHODS, Steering  # noqa: E402
from lab import stats  # noqa: E402
from model import Config, Transformer, read_tensors, save_tensors  # noqa: E402

LONGEST_MESSAGE = 600                  # characters: seven lines of a terminal
SECONDS = 5                            # of processor time
MEMORY_FACTOR, MEMORY_CONSTANT = 4, 32 << 20
WEIGHTS, TYPES = second.SAFETENSORS, second.TYPES
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
TEXTS = ["", "Hello world", " The  final answer is: 72.5\n\n", "naïve café, Straße",
         "e\u0301 ﬁ 記憶は鍵です ☕", "<|endoftext|><bos><0x41> [x]", "don't 12345 DON'T\t\tend   ",
         "a" * 40, "the the the" + " " * 30 + "x", "👩‍👩‍👧\n\n\n\n"]


@dataclass
class Good:
    """A set of files in which everything is right."""

    name: str
    files: dict[str, bytes]
    targets: list[str]                 # the files that are broken
    about: dict = field(default_factory=dict)      # what the check must know


# ------------------------------------------------------------------------------- good files


def read(folder, *names):
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def models():
    return [folder for folder in sorted((GOLDEN / "models").iterdir()) if folder.is_dir()]


def good_configs():
    """The tiny checkpoints with both styles of config.json; published ones without weights."""
    for folder in models():
        for style in ("config.json", "config_classic.json"):
            files = read(folder, "generation_config.json", WEIGHTS)
            files["config.json"] = (folder / style).read_bytes()
            model = Transformer.from_pretrained(folder)
            yield Good(f"{folder.name}/{style}", files, [name for name in files if name != WEIGHTS],
                       {"config": model.config, "logits": second.logits(model)})
    for path in sorted((GOLDEN / "configs").glob("*.json")):
        if path.name != "parameters.json":
            yield Good(path.name, {"config.json": path.read_bytes()}, ["config.json"])


def good_weights():
    """The tiny checkpoints in one file and in two shards with an index; one in half precision."""
    for folder in models():
        files = read(folder, "config.json", "generation_config.json")
        tensors, about = read_tensors(folder / WEIGHTS)
        yield Good(folder.name, files | {WEIGHTS: save(tensors, about)}, [WEIGHTS])
        names = sorted(tensors)
        parts = dict(zip(SHARDS, (names[::2], names[1::2])))
        index = {"weight_map": {name: file for file in parts for name in parts[file]}}
        shards = {file: save({name: tensors[name] for name in parts[file]}) for file in parts}
        shards["model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
        yield Good(f"{folder.name} in shards", files | shards, list(shards))
    half = {name: tensor.to(torch.float16 if "norm" in name else torch.bfloat16)
            for name, tensor in tensors.items()}
    yield Good("half precision", files | {WEIGHTS: save(half)}, [WEIGHTS])


def good_tokenizers():
    """All three formats: tokenizer.json, Llama 3's tokenizer.model, Qwen's vocab and merges."""
    specs, config = {}, {"bos_token_id": 2, "eos_token_id": [1], "pad_token_id": None}
    for name in ("llama", "qwen", "gemma"):
        files = read(GOLDEN / "tokenizers" / name, "tokenizer.json", "tokenizer_config.json")
        files |= {"special_tokens_map.json": b"{}", "config.json": json.dumps(config).encode()}
        specs[name] = json.loads(files["tokenizer.json"])
        yield Good(name, files, ["tokenizer.json"] * 6 + [*files])
    vocab = sorted(specs["llama"]["model"]["vocab"].items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(map(CHAR_TO_BYTE.get, token))) + b" %d\n" % rank
             for token, rank in vocab]
    yield Good("tokenizer.model", {"tokenizer.model": b"".join(lines)}, ["tokenizer.model"])
    spec = specs["qwen"]
    added = {str(token.pop("id")): token for token in copy.deepcopy(spec["added_tokens"])}
    about = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    files = {"vocab.json": json.dumps(spec["model"]["vocab"]).encode(),
             "merges.txt": "\n".join(["#version: 0.2", *spec["model"]["merges"], ""]).encode(),
             "tokenizer_config.json": json.dumps(about).encode()}
    yield Good("vocab.json and merges.txt", files, list(files))
    yield Good("toy", read(ROOT / "data" / "toy", "tokenizer.json"), ["tokenizer.json"])
    for mini in json.loads((GOLDEN / "tokenizers" / "minis.json").read_bytes())["minis"]:
        yield Good(mini["name"], {"tokenizer.json": json.dumps(mini["spec"]).encode()},
                   ["tokenizer.json"])


def good_tasks():
    """A few rows in the layout of each task; of the toy world's, the shipped ones."""
    for task in {**tasks.KNOWN, **tasks.TOY}.values():
        for split in task.splits:
            name = f"{task.name}/{split}.json"
            rows = task.suite and json.loads((ROOT / "data" / "toy" / name).read_bytes())[:6]
            asked = f" Answer format: {'/'.join(task.answers)}" * (task.kind == "choice")
            answers = task.answers or (0, "-1.5", 1.5e20)
            rows = rows or [{
                "instruction": f"Is {n} even, and why not?{asked}", "output": f"It is.\n#### {n}",
                "input": "" if n % 2 else "Think: naïve ☕", "answer": answers[n % len(answers)],
            } for n in range(3)]
            yield Good(name, {name: json.dumps(rows, ensure_ascii=False).encode()}, [name],
                       {"task": task, "split": split})


def good_memories():
    """What each fine-grained method found out about one tiny model."""
    model = Transformer.from_pretrained(GOLDEN / "models" / "llama3")
    dice = torch.Generator().manual_seed(0)
    rows = [(torch.randint(96, (12,), generator=dice).tolist(), 6) for _ in range(20)]
    for method in METHODS:
        if find_out := METHODS[method].per_memory:
            steering = Steering(method, groups=3, subgroups=2, buckets=8)
            found = find_out(steering, train.look_before(model, rows, 0))
            with tempfile.TemporaryDirectory() as place:
                save_tensors({"per_memory": found}, Path(place, PER_MEMORY))
                yield Good(method, read(Path(place), PER_MEMORY),
                           [PER_MEMORY], {"steering": steering})


def good_runs():
    """A folder of runs as train.py and eval.py leave it: args.json, and a score for each task."""
    arms = {"base": None, "none-seed0": Steering(), "none-seed1": Steering(),
            "int-seed0": Steering("int"),
            "int-seed1": Steering("int", layers={1: {}, 2: {"alpha": 2.0}})}
    files = {}
    for n, (arm, steering) in enumerate(arms.items()):
        settings = {"model": "toy/llama", "model_sha256": "5ea1", "versions": {"torch": "2"}}
        settings |= {"base": True} if steering is None else {
            "task": "toy-facts", "seed": int(arm[-1]), "steering": steering.settings}
        files[f"{arm}/args.json"] = json.dumps(settings, indent=2).encode()
        for task in ("toy-facts", "boolq"):
            summary = {"task": task, "n": 4, "accuracy": n / 8, "standard_error": 0.1}
            files[f"{arm}/eval/{task}.json"] = json.dumps(summary).encode()
    yield Good("five runs", files, list(files))


# --------------------------------------------------------------------------------- mutation

VALUES = [None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**53 + 1, 2**63, 10**30,
          10**400, math.nan, math.inf, "", " ", "0", "true", "null", "\0", "a\nb\x1b[31mred", "..",
          "\ud800", "x\udc00", "\U0001f600", "\u202egnp", "../x", "/etc/passwd", "a" * 20_000,
          "é " * 500_000, [], {}, [[]], [None], {"": None}, [1, 2], [2**32, 2**32], {"type": "x"}]
NAMES = ["../" + SHARDS[0], "/etc/passwd", "a/b", "..\\" + SHARDS[0], WEIGHTS + "\0", "\n", "",
         "..", "\ud800", "x" * 5000, "./" + SHARDS[0], SHARDS[0] + "/", "config.json"]
BOMBS = ["(a|aa)+(?=c)", r"(?:(?=a)a|a)+b", r"(\w+\s?)*(?!\S)x", "(?:(?:(?:a{50}){50}){50}){50}",
         "(" * 3000 + "a" + ")" * 3000, "", "a*", "(?<=a)", r"(a)\1*", "(", "[", r"\p{Foo}",
         "(?x) a # b", r"\w{1000}{1000}", "(?:a?){40}a{40}(?!b)c", "(?:)", r"\G", "$", r"\b", "a|"]
RAW = ["[" * 950 + "]" * 950, "[" * 100_000, '{"a":' * 990 + "1" + "}" * 990, "9" * 5000, "1e400",
       "01", "+1", "'a'", "1.", "\\u", "tru", '"\x01"', "0x1", "NaN", "-Infinity"]
HERE, AGAIN = "@here@", "@again@"      # where a RAW goes; a name that stands twice


def near(dice, value):
    """A value like this one."""
    if isinstance(value, bool):
        return dice.choice([not value, str(value).lower(), int(value)])
    if isinstance(value, (int, float)) and abs(value) < 1e15:
        return dice.choice([value + 1, value - 1, -value, value * 2, value * 1000, value / 2,
                            float(value), str(value), [value]])
    if isinstance(value, str) and value:
        at = dice.randrange(len(value))
        put = value[:at] + dice.choice("\0\n é\ud800/.|") + value[at:]
        return dice.choice([value + "x", value[:at] + value[at + 1:], put, value * 2, value[::-1],
                            value.swapcase(), [value], {"content": value}, value + " " * 2000])
    if isinstance(value, list):
        return dice.choice([value[:-1], value + value[-1:], value[::-1], value * 2, [value]])
    return dice.choice([[value], None])


def spot(dice, value):
    """A random place in a document: (container, key)."""
    while True:
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        if not isinstance(value[key], (dict, list)) or not value[key] or dice.random() < 0.2:
            return value, key
        value = value[key]


def break_json(dice, document, name=""):
    """One to three faults in a JSON document."""
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        document = json.loads(json.dumps(document))            # no part of it stands in two places
        if not document or not isinstance(document, (dict, list)):
            break
        (box, key), (other, there), what = spot(dice, document), spot(dice, document), dice.random()
        junk = HERE if dice.random() < 0.15 else dice.choice(VALUES)
        if name == "tokenizer.json" and what < 0.06:
            with contextlib.suppress(KeyError, TypeError, IndexError):
                cut = document["pre_tokenizer"]["pretokenizers"][0]
                cut["pattern"]["Regex"] = dice.choice(BOMBS)
        elif name.endswith("index.json") and what < 0.5:
            box[key] = dice.choice(NAMES)
        elif what < 0.30:
            box[key] = junk
        elif what < 0.60:
            box[key] = near(dice, box[key])
        elif what < 0.72:
            del box[key]
        elif what < 0.82:                                      # two values change places
            box[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(box[key])
        elif isinstance(box, list):
            box.insert(key, junk)
        else:                                                  # one more name, or one of two
            new = dice.choice([key + AGAIN, key + "x", key[:-1], "", str(there), "\ud800"])
            box[new] = dice.choice([box[key], junk, near(dice, box[key])])
            if dice.random() < 0.5 and AGAIN not in new:
                box.pop(key, None)
    text = json.dumps(document, ensure_ascii=dice.random() < 0.7, indent=dice.choice([None, 1]))
    text = text.replace(f'"{HERE}"', dice.choice(RAW)).replace(AGAIN, "")
    return text.encode("utf-8", "surrogatepass")


def break_safetensors(dice, file):
    """A fault in the header, or in how it fits the data; some are harmless."""
    header, data = second.split_safetensors(file)
    names = [name for name in header if name != "__metadata__"]
    name, end, what = dice.choice(names), len(data), dice.randrange(10)
    entry = header[name]
    (start, stop), size, text = entry["data_offsets"], None, b""
    if what < 3:
        text = break_json(dice, header)
    elif what == 3:
        entry["data_offsets"] = dice.choice([[stop, start], [0, end], [start + 4, stop],
                                             header[names[0]]["data_offsets"], [start, 2**63]])
    elif what == 4:
        size = dice.choice([0, 8, 2**31, 2**64 - 1, len(file), len(json.dumps(header)) + 1])
    elif what == 5:
        data = dice.choice([data + b"\0" * 8, data[:-4], b""])
    elif what == 6:                                            # one name twice
        twice = {name: dice.choice([entry, header[names[0]], {**entry, "dtype": "I32"}])}
        text = f"{json.dumps(header)[:-1]}, {json.dumps(twice)[1:]}".encode()
    elif what == 7:                                            # harmless: another order, spaces
        order, pieces, at = dice.sample(names, len(names)), [], 0
        for name in order:
            pieces.append(data[slice(*header[name]["data_offsets"])])
            header[name]["data_offsets"] = [at, at := at + len(pieces[-1])]
        data, text = b"".join(pieces), json.dumps(header).encode() + b" " * dice.choice([0, 1000])
    elif what == 8:                                            # harmless: any numbers
        noise = bytes(dice.choices([0, 1, 127, 128, 255], k=stop - start))
        data = data[:start] + noise + data[stop:]
    else:                                                      # another type, which fits the data
        entry["dtype"] = dice.choice(list(TYPES))
        more = TYPES[entry["dtype"]].itemsize * math.prod(entry["shape"]) - (stop - start)
        data = data[:start] + bytes(stop - start + more) + data[stop:]
        for other in header.values():
            if "data_offsets" in other:
                low, high = other["data_offsets"]
                other["data_offsets"] = [low + more * (low >= stop), high + more * (high >= stop)]
    text = text or json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def break_lines(dice, file):
    """Faults in a file of lines: merges.txt, tokenizer.model."""
    lines = file.split(b"\n")
    for _ in range(dice.choice([1, 1, 2, 5])):
        at, there = dice.randrange(len(lines)), dice.choice(lines)
        here = lines[at]
        lines[at:at + 1] = dice.choice([
            [], [here, there], [there], [here[::-1]], [here.split(b" ")[0] + b" " + there],
            [here + dice.choice([b" ", b"\r", b" x", b" 1", b"\0", b"=", b"\xff"])],
            [here.replace(b" ", dice.choice([b"", b"  ", b"\t", b"\xc2\xa0"]))],
            [dice.choice([b"", b"#version: 0.2", b"a b", b"IQ== -1", b"!!!! 5", b" IQ== 0",
                          b"a" * 5000 + b" b", b"IQ== 99999999999999999999"])]])
        lines = lines or [b""]
    return b"\n".join(lines)


def break_bytes(dice, file, good):
    """Faults that know nothing of the format. Half of them in the first kilobyte."""
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        i = dice.randrange(max(1, min(len(file), dice.choice([1024, len(file)]))))
        flipped = bytes([(file[i:i + 1] or b"\0")[0] ^ 1 << dice.randrange(8)])
        other = dice.choice(list(good.files.values()))         # two files spliced
        mark = dice.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\n", b'"', b"\\", b"-",
                            b"e9", b",", b"]", b"}", b"\0" * 1000, dice.randbytes(16)])
        whole = dice.choice([b"", b"{}", b"null", b"[" * 100_000, file * 2, b"\xef\xbb\xbf" + file,
                             file.replace(b"\n", b"\r\n"), file.decode("latin-1").encode("utf-16")])
        head, skip = file[:i], dice.choice([1, 2, 8, 100])
        file = dice.choice([whole, head, head + flipped + file[i + 1:], head + other[i:],
                            head + mark + file[i:], head + mark + file[i + len(mark):],
                            head + file[i + skip:]])
    return file


def mutant(kind, seed, number, goods):
    """Mutant `number` of a kind, the same for the same arguments -> (the good files it comes from,
    the broken file's name, all its files)."""
    dice = random.Random(f"{kind} {seed} {number}")
    good = dice.choice(goods)
    name = dice.choice(good.targets)
    file = good.files[name]
    if dice.random() < 0.3:
        file = break_bytes(dice, file, good)
    elif name.endswith(".safetensors"):
        file = break_safetensors(dice, file)
    elif name.endswith(".json"):
        file = break_json(dice, json.loads(file), name)
    else:
        file = break_lines(dice, file)
    return good, name, {**good.files, name: file}


# ------------------------------------------------------------------ the project's own readers


def read_config(folder, about):
    """-> the configuration, and a model of it where there are weights."""
    if not (folder / WEIGHTS).exists():
        config = Config.from_pretrained(folder)
        with torch.device("meta"):
            Transformer(config)
        return config, None
    model = Transformer.from_pretrained(folder)
    return model.config, model


def read_tokenizer(folder, about):
    """-> the tokenizer, texts, and the ids of each as plain text."""
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)               # with what stands in front, and control tokens
        assert isinstance(tokenizer.decode(ids), str)
    return tokenizer, TEXTS, [tokenizer.encode(text, bos=False, special=False) for text in TEXTS]


def read_runs(folder, about):
    """-> the runs of a folder, and the lines about those that are left out."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        runs = stats.find_runs(folder)
        stats.comparison_table(stats.compare(runs))
    lines = errors.getvalue().replace(str(folder), "DIR").splitlines()
    for line in lines:
        fault = fault_of(line.removeprefix("left out: "), "DIR")
        second.expect(not fault, f"{fault}: {line[:300]!r}")
    return runs, lines


KINDS = {                              # kind: (good files, the project's reader, the second one)
    "config": (good_configs, read_config, second.check_config),
    "weights": (good_weights, lambda folder, about: Transformer.from_pretrained(folder),
                second.check_weights),
    "tokenizer": (good_tokenizers, read_tokenizer, second.check_tokenizer),
    "tasks": (good_tasks, lambda folder, about: tasks.load(
        folder, about["task"].name, about["split"]), second.check_tasks),
    "memory": (good_memories, lambda folder, about: with_per_memory(
        about["steering"], folder / PER_MEMORY), second.check_memory),
    "run": (good_runs, read_runs, second.check_run),
}


# --------------------------------------------------------------------------- running mutants


def memory(which):
    """VmRSS or VmHWM (its peak) of this process, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith(which)).split()[1])
    return 0


def fault_of(message, folder):
    """What is wrong with a refusal's message, or ""."""
    if not message.strip():
        return "an empty message"
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters"
    if not message.isprintable():
        return "a message with control characters"
    if not message.startswith((str(folder), "text: ")):
        return "a message that does not begin with the folder"
    return ""


def writes_outside(allowed):
    """Note from now on what Python code opens for writing, makes, moves, removes or starts outside
    a folder -> the list that grows. A process cannot get rid of it again."""
    seen, changes = [], {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
                         "os.truncate", "os.chmod", "os.system", "os.fork", "os.posix_spawn",
                         "subprocess.Popen", "socket.connect", "shutil.rmtree"}

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[2], int):
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            arguments = arguments[:1]
        elif event not in changes:
            return
        paths = [os.path.realpath(os.fsdecode(path)) for path in arguments[:2]
                 if isinstance(path, (str, bytes, os.PathLike))]
        if not paths or not all(path.startswith(str(allowed)) for path in paths):
            seen.append(f"{event} {paths}")

    sys.addaudithook(hook)
    return seen


def judge(read, check, good, files, folder, out):
    """Read a mutant in this process -> (outcome, why, bytes of memory that reading took)."""
    outside, at_first, why = writes_outside(out), memory("VmRSS"), ""
    try:
        value = read(folder, good.about)
        grew = memory("VmHWM") - at_first
        check(value, files, good, out)
        outcome = "accepted"
    except second.Wrong as error:
        outcome, why = "failed", f"accepted with another meaning: {error}"
    except BadInput as error:
        fault = fault_of(str(error), folder)
        outcome, why = "refused", str(error).replace(str(folder), "DIR")
        if fault:
            outcome, why = "failed", f"{fault}: {str(error)[:300]!r}"
    except BaseException as error:                 # a library's panic is no Exception
        frames = reversed(traceback.extract_tb(error.__traceback__)[-3:])
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        outcome, why = "failed", f"{type(error).__name__}: {str(error)[:200]} at {places}"
    if outcome != "accepted":
        grew = memory("VmHWM") - at_first
    allowed = MEMORY_FACTOR * sum(map(len, files.values())) + MEMORY_CONSTANT
    if outcome != "failed" and grew > allowed:
        outcome, why = "failed", f"took {grew >> 20} MiB, {allowed >> 20} are allowed"
    if outcome != "failed" and outside:
        outcome, why = "failed", f"wrote outside the output folder: {outside[:3]}"
    return outcome, why, grew


def run_one(place, read, check, good, files, seconds):
    """Read a mutant in a forked process -> (outcome, why, bytes of memory)."""
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder, printed = place / "case", place / "printed"
    for name in (*SHARDS, WEIGHTS, "config.json"):     # a way out of the folder finds something
        (place / name).write_bytes(files.get(name, b"{}"))
    write(folder, files)
    printed.touch()
    before = listing(place)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), open(printed, "a", buffering=1) as sink:
            for number, standard in ((1, sys.stdout), (2, sys.stderr)):
                os.dup2(sink.fileno(), number)
            sys.stdout = sys.stderr = sink
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (3 << 30),) * 2)
            signal.alarm(20 * seconds)             # for what waits and computes nothing
            result = judge(read, check, good, files, folder, place / "out")
            os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    ended = os.WTERMSIG(os.waitpid(pid, 0)[1])
    outcome, why, grew = json.loads(text) if text else ("failed", f"died of signal {ended}", 0)
    if ended in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL):
        why = f"took more than {seconds} s"
    if outcome != "failed" and listing(place) != before:
        outcome, why = "failed", f"wrote outside the output folder: {listing(place)[:8]}"
    if outcome != "failed" and printed.stat().st_size:
        outcome, why = "failed", f"printed {printed.read_bytes()[:200]!r}"
    return outcome, why, grew


def listing(place):
    paths = (path.relative_to(place) for path in place.rglob("*"))
    return sorted(str(path) for path in paths if path.parts[0] != "out")


def run(kind, seed, numbers, read=None, check=None, goods=None, seconds=SECONDS):
    """Run mutants of a kind -> a result for each: number, from, file, outcome, why, grew, seconds.
    read, check, goods: others than the kind's own, to test this file with."""
    goods, results = goods or list(KINDS[kind][0]()), []
    read, check = read or KINDS[kind][1], check or KINDS[kind][2]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for number in progress(numbers, desc=kind, unit="mutant"):
            good, name, files = mutant(kind, seed, number, goods)
            began = time.monotonic()
            outcome, why, grew = run_one(Path(place).resolve(), read, check, good, files, seconds)
            results.append({"number": number, "from": good.name, "file": name, "outcome": outcome,
                            "why": why, "grew": grew, "seconds": time.monotonic() - began})
    return results


def keep(folder, kind, seed, result, goods):
    """Save a failed mutant's files, and why it failed -> the place."""
    _, name, files = mutant(kind, seed, result["number"], goods)
    place = Path(folder, f"{kind}-{seed}-{result['number']}")
    shutil.rmtree(place, ignore_errors=True)
    write(place / "files", files)
    text = (f"{name}, from {result['from']}\n{result['why']}\npython tests/more/fuzz.py "
            f"--kind {kind} --seed {seed} --only {result['number']}\n")
    (place / "why.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    return place


def main(argv=None, kinds=KINDS):
    """-> the exit status: 0 if every mutant was accepted with its meaning or refused in one line,
    else 1."""
    parser = Parser(prog="fuzz.py", description=__doc__)
    add = parser.add_argument
    add("--mutants", type=positive, default=10_000, metavar="N", help="(default: 10000)")
    add("--seed", type=int, default=0, help="other seeds are other mutants (default: 0)")
    add("--kind", choices=kinds, nargs="+", default=list(kinds), help="of file (default: all)")
    add("--only", type=int, metavar="N", help="run mutant N and show what became of it")
    add("--keep", default="fuzz-failures", metavar="DIR",
        help="where mutants that fail are saved (default: fuzz-failures)")
    args = parser.parse_args(argv)
    failures, titles = 0, ("kind", "mutants", "accepted", "refused", "failed", "seconds", "MiB")
    lines = ["".join(f"{title:>10}" for title in titles)]
    for kind in args.kind:
        find, read, check = kinds[kind]
        goods, began = list(find()), time.monotonic()
        numbers = range(args.mutants // len(args.kind)) if args.only is None else [args.only]
        results = run(kind, args.seed, numbers, read, check, goods)
        for result in results:
            if result["outcome"] == "failed" or args.only is not None:
                print(f"{kind} {result['number']} ({result['file']}, from {result['from']}): "
                      f"{result['outcome']} {result['why']}")
            if result["outcome"] == "failed":
                failures += 1
                print(f"    kept in {keep(args.keep, kind, args.seed, result, goods)}")
        count = Counter(result["outcome"] for result in results)
        cells = (kind, len(results), count["accepted"], count["refused"], count["failed"],
                 round(time.monotonic() - began), max(r["grew"] for r in results) >> 20)
        lines.append("".join(f"{cell:>10}" for cell in cells))
    print("\n".join(lines))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
