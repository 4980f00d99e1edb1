"""The folder of a run: it grows in OUT.partial, to be OUT when it is finished, and the process that
writes it holds OUT.lock. Only what this program wrote is ever deleted: a folder with any other
file in it is left alone."""
import json
import os
import pickle
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from data import BadInput, read_json, write_whole
from data.tokenizer import FILES

try:
    import fcntl
    import resource
except ImportError:                    # Windows: no lock on a run, no peak memory on a CPU
    fcntl = resource = None

WRITTEN = {"args.json", "log.jsonl", "state.pt", "per_memory.safetensors", "config.json",
           "model.safetensors", "pretraining.json", "eval", *FILES}
SCORED = {".json", ".jsonl", ".partial", ".part", ".lock", ".safetensors"}         # in OUT/eval
MACHINE = {"command", "model", "data", "device", "micro_tokens", "checkpoint", "compile", "threads",
           "versions", "arm"}          # what --resume may change, or what the others tell


def read_run(folder) -> dict:
    """A run's settings, or {} where `folder` is no run of train.py. Raises BadInput."""
    path = Path(folder, "args.json")
    return read_json(path) if path.is_file() else {}


def same_run(settings, before, where):
    """Raises BadInput unless `before`, the settings found at `where`, are of the same run."""
    differing = [key for key in settings.keys() - MACHINE if before.get(key) != settings[key]]
    if differing:
        raise BadInput(f"{where}: was started with another {', '.join(sorted(differing))}; "
                       "give the same flags, or --overwrite, or another --out")


@contextmanager
def locked(path, wait=False):
    """Hold a lock file while this process lives. If another holds it, wait, or raise BadInput."""
    while True:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a")     # what is not empty is somebody's, and no lock of ours
            if os.fstat(file.fileno()).st_size:
                raise FileExistsError(0, "is somebody's file and no lock")
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            why = ("another process is writing this run; wait until it is done"
                   if isinstance(error, BlockingIOError) else error.strerror)
            raise BadInput(f"{path}: {why}; or choose another --out") from None
        if os.fstat(file.fileno()).st_nlink:                   # else its holder has just removed it
            break
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        file.close()


@contextmanager
def claim(out, resume, overwrite):
    """Hold the run at `out` for this process while it writes there. Raises BadInput where another
    process does, and where the run may not be written."""
    work = Path(f"{out}.partial")
    if os.path.lexists(out) and not overwrite or out.suffix == ".partial":
        raise BadInput(f"{out}: is there already, or named as a run in the making; --overwrite "
                       "replaces finished runs, and nothing that is not a run; change --out")
    with locked(f"{out}.lock"):
        if work.exists() and not (resume or overwrite):
            raise BadInput(f"{work}: an interrupted run; --resume goes on with it, --overwrite "
                           "starts anew")
        if resume and not work.exists():
            raise BadInput(f"{work}: no interrupted run to resume; leave --resume away")
        check_ours(out)
        check_ours(work)
        yield


def check_ours(folder):
    """Raises BadInput if there is anything at `folder` that this program did not write."""
    if not os.path.lexists(folder):
        return
    names = {path.name for path in folder.glob("*")} - {"args.json.part"}      # written first
    others = {name for name in names if name.removesuffix(".part") not in WRITTEN}
    others |= {path.name for path in folder.glob("eval/*") if path.suffix not in SCORED}
    if others or not folder.is_dir() or names and "model" not in read_run(folder):
        raise BadInput(f"{folder}: holds {', '.join(others) or 'no args.json of a run'}, so it is "
                       "not a run of train.py alone and never replaced; choose another --out")
    for lock in folder.glob("eval/*.lock"):                    # is somebody scoring this run?
        with locked(lock):
            pass


def begin(work, settings, tokenizer, overwrite):
    """Make or take over the folder in which a run grows -> its log, open for appending."""
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    write_whole(work / "args.json", json.dumps(settings, indent=2) + "\n")
    for name in tokenizer.files:       # now, since the base model may be gone when the run ends
        shutil.copyfile(Path(tokenizer.folder, name), work / name)
    return open(work / "log.jsonl", "a", encoding="utf-8")


def finish(work, out):
    """Let the finished run appear as a whole. A crash leaves the old run or the new one."""
    check_ours(out)                    # somebody may have put something there meanwhile
    (work / "state.pt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as old:
        if out.exists():
            os.replace(out, Path(old, out.name))
        os.replace(work, out)


def save_state(path, step, log_bytes, states):
    """Replace what --resume goes on from, at once: a crash leaves the old state or the new one."""
    part = path.with_suffix(".pt.part")
    try:
        with open(part, "wb") as file:
            torch.save({"step": step, "log_bytes": log_bytes, "states": states}, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:                              # which torch.save makes of OSError
        raise OSError(f"{part}: cannot write it ({str(error).splitlines()[0]}); is the disk full? "
                      "The state saved before is kept") from None
    os.replace(part, path)


def load_state(path):
    """Read what `save_state` wrote -> steps done, bytes of the log, states. Raises BadInput."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state["step"], state["log_bytes"], state["states"]
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError):
        raise BadInput(f"{path}: not a state of this run; --overwrite starts anew") from None


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024             # Linux counts in KiB
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
