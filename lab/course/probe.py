"""Run an assignment's parts on the code of a tree. Nothing here knows what is right.

The request comes from standard input. Each job (tree, number, [(part, seed, file)]) runs in a
process of its own, with limits on time and memory, and writes a safetensors file for each part: the
tensors of its cases and, as `error`, what went wrong.
"""
import json
import multiprocessing
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file


def draw(seed, *shape):
    """Normal numbers in fp64. Their shape is the given one for the public seed, 0; for another seed
    each side is up to three longer."""
    generator = torch.Generator().manual_seed(seed)
    longer = torch.randint(0, 4, (len(shape),), generator=generator).tolist()
    shape = [side + more * bool(seed) for side, more in zip(shape, longer)]
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def run(tree, number, parts):
    """Do one job in this process, which loads the code of `tree`."""
    with suppress(ImportError, ValueError):    # Windows has no limit; or a lower one holds already
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
    os.chdir(tree)
    sys.path[0] = tree
    for part, seed, file in parts:
        cases, error = {}, ""
        try:
            from lab.course import load
            for case, found in load(number).PARTS[part](seed):
                cases[f"{len(cases):02} {case}"] = torch.as_tensor(found).detach().clone(
                    memory_format=torch.contiguous_format)
        except BaseException as problem:       # sys.exit too
            error = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
            own = [f" ({Path(frame.filename).name}, line {frame.lineno})"      # in the tree's code
                   for frame in traceback.extract_tb(problem.__traceback__)
                   if Path(frame.filename).parent == Path(tree)]
            error += "".join(own[-1:])
        save_file(cases, file, {"error": error})


def main():
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs, seconds, at_once = request["jobs"], request["seconds"], min(os.cpu_count(), 4)
    for some in (jobs[start:start + at_once] for start in range(0, len(jobs), at_once)):
        processes = [context.Process(target=run, args=job) for job in some]
        for process in processes:
            process.start()
        for process, (*_, parts) in zip(processes, some):
            process.join(seconds * len(parts))
            late = f"Late: it took longer than {seconds} seconds and was stopped"
            for *_, file in parts if process.is_alive() else ():
                if not os.path.exists(file):
                    save_file({}, file, {"error": late})
            process.kill()
            process.join()


if __name__ == "__main__":
    main()
