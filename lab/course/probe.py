"""Run an assignment's parts on the code of a tree. Nothing here knows what is right.

The request comes from standard input. Each job (tree, number, [(part, seed, file)]) runs in a
process of its own, with limits on time and memory, and writes a safetensors file for each part: the
tensors of its cases and, as `error`, what went wrong. The exit status is 3 if students' code could
read the reference.
"""
import importlib
import json
import multiprocessing
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file


def draw(seed, *shape, dtype=torch.float64):
    """Normal numbers. Their shape is the given one for the public seed, 0; for another seed each
    side is up to three longer."""
    generator = torch.Generator().manual_seed(seed)
    longer = torch.randint(0, 4, (len(shape),), generator=generator).tolist()
    shape = [side + more * bool(seed) for side, more in zip(shape, longer)]
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def run(tree, number, parts):
    """Do one job in this process, which loads the code of `tree`."""
    with suppress(ImportError, ValueError):    # Windows has no limit; or a lower one holds already
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
    os.chdir(tree)
    sys.path[0] = tree
    path, = Path(tree, "lab", "course").glob(f"a{number}_*.py")
    for part, seed, file in parts:
        cases, error = {}, ""
        try:
            for case, found in importlib.import_module(f"lab.course.{path.stem}").PARTS[part](seed):
                cases[f"{len(cases):02} {case}"] = torch.as_tensor(found).detach().clone(
                    memory_format=torch.contiguous_format)
        except BaseException as problem:       # sys.exit too
            own = [f" ({Path(frame.filename).name}, line {frame.lineno})"      # in the tree's code
                   for frame in traceback.extract_tb(problem.__traceback__)
                   if Path(frame.filename).parent == Path(tree)]
            error = " ".join([f"{type(problem).__name__}:", *str(problem).split()])[:300]
            error += own[-1] if own else ""
        save_file(cases, file, {"error": error})


def main():
    request, status = json.load(sys.stdin), 0
    torch.set_num_threads(1)
    with suppress(OSError):            # the reference, if a student's code is graded
        open(request.get("secret", "")).close()
        status = 3
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs, at_once = request["jobs"], min(os.cpu_count(), 4)
    for some in (jobs[start:start + at_once] for start in range(0, len(jobs), at_once)):
        processes = [context.Process(target=run, args=job) for job in some]
        for process in processes:
            process.start()
        for process, (*_, parts) in zip(processes, some):
            process.join(request["seconds"] * len(parts))
            error = f"Ended: its process ended by itself, with exit code {process.exitcode}"
            if process.is_alive():
                error = f"Late: it took longer than {request['seconds']} seconds and was stopped"
            process.kill()
            process.join()
            for *_, file in parts:
                if not os.path.exists(file):
                    save_file({}, file, {"error": error})
    sys.exit(status)


if __name__ == "__main__":
    main()
