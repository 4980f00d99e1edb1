"""Find the bug

`python -m lab.course broken 1 --out DIR` writes a tree with one fault, the first of four, and
prints the symptom. Prove that it is wrong: write tests of `key_entropy` and its gradient,
`intervene`, `collate` and `attend` in tests/test_mine.py: functions test_..., without arguments,
that pass here and fail on whatever breaks a docstring's promise, or mixes up tokens, rows or heads.
Hidden faults are others in the same functions.
"""
import json
import random
import re
import runpy
import shutil
import sys
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from data import BadInput, write_whole
from lab.course import ROOT

MINUTES, POINTS = 150, 12
REMOVE = [f"tests/test_{name}.py" for name in ("02_entropy", "03_intervention", "07_step")]
BLANK = {"tests/test_mine.py": '"""Tests that fail on what is wrong, and on nothing else."""\n'}
HINTS = (
    "What can you work out by hand, and what holds for any k? Choose inputs that tell apart.",
    "3k has the entropy of k, so sum_i k_i dH/dk_i = 0. A token alone is what it is among others.",
    "Take k = (3, -1); two tokens, p = 1/4, both signs; two lengths; a cap, H = 4 and G = 2.")
FAULTS = (                             # symptom, file, what stands there, what takes its place
    ("lab.flux shows 8.2 nats in layers of 384 memories, but log 384 is 5.95", "infosteer.py",
     "h.copy_(s.log() - ", "h.copy_(1.4427 * s.log() - 1.4427 * "),
    ("with --steer int, no memory that is woken speaks against anything", "infosteer.py",
     "torch.where(k.detach().gather(-1, smallest) < 0, -sign, sign)", "sign.clone()"),
    ("a fine-tuned model answers, and then goes on without an end", "train.py",
     "torch.tensor(ids[n_prompt:])", "torch.tensor(ids[n_prompt:-1] + [IGNORE])"),
    ("the logits of Gemma 2, and of no other family, are wrong", "model.py", "/ softcap)", ")"))


def broken(number, out):
    """Write this tree with one of the faults, and print its symptom. Raises BadInput."""
    if Path(out).exists():
        raise BadInput(f"{out}: is there already; a broken tree needs a new folder")
    symptom, file, old, new = FAULTS[number - 1]
    shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    write_whole(Path(out, file), (ROOT / file).read_text("utf-8").replace(old, new))
    print(f"{out}: {symptom}")


def passes(change={}, seed=0, times=None):
    """Do all tests pass? change: {file: function of its text}. times: what clocks say, in turn."""
    for path in map(Path, ("infosteer.py", "model.py", "eval.py", "train.py")):        # in order
        sys.modules[path.stem] = module = ModuleType(path.stem)
        module.__file__, text = str(path.resolve()), path.read_text("utf-8")
        exec(compile(change.get(str(path), str)(text), path, "exec"), vars(module))
    torch.manual_seed(seed)
    random.seed(seed)
    clocks = dict.fromkeys(("time", "perf_counter", "monotonic"), lambda: next(times))
    with mock.patch.multiple("time", **clocks) if times else suppress(), suppress(Exception):
        made = runpy.run_path("tests/test_mine.py")
        for test in [made[name] for name in made if name.startswith("test")]:
            test()
        return True
    return False


def another_form(text):                # infosteer.py without its kernels, and with other names
    return re.sub(r"\b(magnitudes|accumulate)\b|# -+ the same num(?s:.*)",
                  lambda found: found[1] and f"{found[1]}_of" or "", text)


def right_code(seed):
    yield "are there tests?", "def test" in Path("tests/test_mine.py").read_text("utf-8")
    yield "do they pass on right code?", passes()
    yield "on right code in another form?", passes({"infosteer.py": another_form})
    yield "whatever the random seed?", all(passes(seed=seed + n) for n in range(1, 5))
    yield "if clocks stand, or leap?", all(passes(times=count(0, pace)) for pace in (0, 1000))


def caught(n, seed):
    _, file, old, new = (FAULTS if seed == 0 else json.loads(Path("hidden.json").read_text()))[n]
    yield "does a test fail on this fault, and none on right code?", passes() and not passes(
        {file: lambda text: text.replace(old, new)})


PARTS = {"right code passes": right_code,
         **{f"fault {n + 1} is caught": partial(caught, n) for n in range(4)}}
WRITTEN = {"tests": ("How many tests guard the families? Under `why`: which of yours is not there?",
                     "python -m pytest tests/test_04_families.py -q --co")}

# ------------------------------------------------------------------------------- not handed out
NUMBERS = {"tests": (lambda said: float(re.search(r"(\d+) tests c", said)[1]), 0)}
HIDDEN = [["", *fault] for fault in (
    ("infosteer.py", "(s.log() - h)[:, None]", "s.log()[:, None]"),
    ("infosteer.py", "mean = size.mean(", "mean = (size * 0 + size.mean()).mean("),
    ("train.py", "real[row, :len(ids) - 1] = True", "real[row] = True"),
    ("model.py", "k.repeat_interleave(groups, 1)", "k.repeat(1, groups, 1, 1)"))]
CODE = """from infosteer import intervene, key_entropy
import torch, train, model
def near(found, wanted):
    return torch.allclose(found, torch.tensor(wanted), atol=1e-3)
def test_entropy():
    k = torch.tensor([[3.0, -1.0]], requires_grad=True)
    key_entropy(k).sum().backward()
    assert near(key_entropy(k), [0.5623]) and near(k.grad, [[-0.0687, -0.2060]])
def test_raised():
    k = torch.tensor([[4.0, -1, 3, -8], [1, 2, 3, -14]])
    assert near(intervene(k, 0.25), [[4.0, -4, 3, -8], [5, 2, 3, -14]])
def test_rows():
    _, targets, real = train.collate([([5, 6, 7, 8], 2), ([9, 4], 1)])
    assert targets.tolist() == [[-100, 7, 8], [4, -100, -100]]
    assert real.tolist() == [[1, 1, 1], [1, 0, 0]]
def test_heads():
    k, v = torch.tensor([[[[0.0], [2]], [[0], [0]]]]), torch.tensor([[[[0.0], [1]], [[0], [1]]]])
    out = model.attend(torch.ones(1, 4, 1, 1), k, v, torch.ones(1, 1, 1, 2) > 0, 1, 2)
    assert near(out.flatten(), [0.8210, 0.8210, 0.5, 0.5])
"""
PROPERTIES = """import torch, infosteer, model, train
def test_properties():
    k = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    H = infosteer.key_entropy(k)
    assert (H <= torch.tensor(8.0).log()).all()
    assert torch.autograd.grad(H.sum(), k)[0].mul(k).sum(-1).abs().max() < 1e-4
    new = infosteer.intervene(k)
    assert (new * k >= 0).all() and torch.allclose(new[:1], infosteer.intervene(k[:1]))
    _, targets, real = train.collate([([5, 6, 7, 8], 2), ([9, 4], 1)])
    assert (targets != train.IGNORE).sum() == 3 and real.sum() == 4
    q, mask = k.view(1, 4, 5, 2), torch.ones(1, 1, 5, 5).tril() > 0
    plain, capped = (model.attend(q, q[:, :2], q[:, 2:], mask, 1, cap) for cap in (None, 1e4))
    assert torch.allclose(plain, capped, atol=1e-4)
"""
REFERENCE, RIGHT = {"tests/test_mine.py": CODE}, {"by hand": CODE, "properties": PROPERTIES}
WRONG = {why: text for text, why in (
    ("def test():\n    assert 0", "a test fails on right code, so its failing says nothing"),
    (PROPERTIES.split("    H =")[0], "no test fails on a fault, as if code were its own judge"),
    (CODE.replace("def test", "def check"), "no function is called test_..., so nothing is tested"),
    (CODE + "from infosteer import KeyEntropy", "right code may lack what they import: internals"),
    (CODE + "import time\ndef test_fast():\n    began = time.perf_counter()\n    test_rows()\n"
     "    assert time.perf_counter() - began < 1", "they time seconds, which are the machine's"),
    (CODE + "def test_luck():\n    assert torch.rand(1) > 0.3", "they pass by luck, with no seed"),
    (CODE.replace("atol=1e-3", "atol=1"), "the tolerance is wider than some faults are"))}


def prepare(tree, seed):               # a hand-out does not have the hidden faults
    if seed:
        write_whole(tree / "hidden.json", json.dumps(HIDDEN))
