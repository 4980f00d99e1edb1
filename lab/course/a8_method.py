"""Your own method

Design a way to steer: in infosteer.py one function, and one row `"mine"` in METHODS. It changes the
key coefficients k in the forward pass, or rewards something that is computed of them, or both.

- It sees k [..., d_m] in any dtype, gives a changed k of the same shape and dtype, and leaves the
  given one as it was. Flux and reward are [...], fp32 or wider.
- What it does to a token depends on that token alone, and is the same whenever it is done.
- No k gives an infinity or what is not a number, not even 0; nor does a gradient.
- How strong it is, its row names: settings that Steering has, such as alpha, gamma or lam.

Then it trains, resumes and stands in reports without another change. It need not win: a fair test
of a plausible idea counts, and an honest null result earns full marks.
"""
import io
import json
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

from lab.course.probe import draw

MINUTES, POINTS, REMOVE, BLANK = 240, 10, [], {"infosteer.py::METHODS": lambda table: table}
HINTS = (
    "What is an idle memory, and what should it do? intervene and key_entropy are two answers.",
    "change(k, s) -> [..., d_m]; measure(k, s) -> (flux, reward), [...] each, see only_flux. s "
    "is the steering. Keep sums over d_m in accumulate(k), and go back to k.dtype.",
    "Clamp what you divide by. A root has an infinite slope at 0. Take the strength from s, and "
    "name it and \"layers\" in the row's settings.")


def steered(k, **settings):            # -> (changed k, flux, reward or zeros) of the row "mine"
    from infosteer import Steering
    steering = Steering("mine", **settings)
    flux, reward = steering.measure(k := steering.change(k))
    return k, flux, 0 * flux if reward is None else reward


def equal(ones, others):
    return all(torch.allclose(*pair, equal_nan=True) for pair in zip(ones, others))


def shapes(seed):
    for dtype, wide in {torch.float32: 4, torch.bfloat16: 4, torch.float64: 8}.items():
        k = draw(seed, 2, 3, 8).to(dtype)
        new, *both = steered(kept := k.clone())
        yield f"{dtype} k: is the given one as it was?", torch.equal(k, kept)
        yield f"{dtype} k: has the new one its dtype?", new.shape == k.shape and new.dtype == dtype
        yield f"{dtype} k: are flux and reward a wide number for each token?", all(
            one.shape == k.shape[:2] and one.itemsize == wide for one in both)


def alone(seed):
    k = draw(seed, 2, 3, 8)
    whole = steered(k)
    yield "one token: the same alone?", equal(steered(k[1:, 1:2]), [one[1:, 1:2] for one in whole])
    yield "done again: the same?", equal(steered(k), whole)


def edges(seed):
    some = draw(seed, 2, 3, 8)
    for what, k in ("k = 0", 0 * some), ("many zeros", some.relu()), ("large k", some + 1e6):
        made = steered((k := k.requires_grad_()) * 1)
        yield f"{what}: are all numbers finite?", all(one.isfinite().all() for one in made)
        total = sum(one.sum() for one in made if one.requires_grad)
        yield f"{what}: are all gradients?", torch.autograd.grad(total, k)[0].isfinite().all()


def strength(seed):
    from infosteer import METHODS, Steering
    k, usual = draw(seed, 2, 3, 8).requires_grad_(), vars(Steering())
    new, _, reward = steered(k * 1)
    learnt = reward.requires_grad and torch.autograd.grad(reward.sum(), k)[0].abs().max() > 0
    yield "does it change k, or reward something?", not equal([new, reward], [k, 0 * reward])
    yield "does a reward depend on k?", learnt or equal([reward], [0 * reward])
    numbers = [name for name in METHODS["mine"].settings if isinstance(usual[name], (int, float))]
    yield "does its row name a setting that says how strong it is?", len(numbers) > 0
    yield 'does its row name "layers"?', "layers" in METHODS["mine"].settings
    yield "does every number in its row matter?", all(         # lambda multiplies a reward later
        learnt if name == "lam" else not equal(steered(k, **{name: usual[name] / 2}), steered(k))
        for name in numbers)


def runs(seed):
    import train
    from lab import experiment, report
    from tests.helpers import Interrupted, run_of
    held = all(found for part in (shapes, alone, edges, strength) for _, found in part(seed))
    yield "do the parts above hold?", held
    if not held:
        return
    said, flags = io.StringIO(), ["--steer=mine", "--steps=3", "--batch=4", "--limit=8", "--out"]
    with tempfile.TemporaryDirectory() as out, redirect_stderr(said), redirect_stdout(said):
        folder = str(train.run_folder(f"{out}/runs", "toy/llama", train.Steering("mine"), 0))
        train.train(train.read_settings([*flags, f"{out}/whole"]))
        with suppress(KeyboardInterrupt):
            train.train(train.read_settings([*flags, folder, "--save-every=1"]), Interrupted(3))
        train.train(train.read_settings([*flags, folder, "--resume"]))
        yield "has an interrupted run the weights of a whole one?", all(map(
            torch.equal, *(run_of(one)[0].values() for one in (folder, f"{out}/whole"))))
        if not seed:                   # it and the report take seconds
            experiment.main([*flags, f"{out}/runs", "--seed=0", "--items=1"])
            yield "is it an arm of lab.experiment?", "\n  mine" in said.getvalue()
        else:
            Path(folder, "eval").mkdir()
            Path(folder, "eval", "toy-plain.json").write_text(json.dumps({"accuracy": 0.5}))
            report.ITEMS = 1
            report.main([f"{out}/runs"])
            yield "is it in the report?", "mine" in Path(out, "runs/report.html").read_text("utf-8")


PARTS = {"shapes, dtypes, place": shapes, "each token alone, always": alone, "finite": edges,
         "strength": strength, "trains, resumes, is reported": runs}
WRITTEN = {"half": (
    "Plan as in assignment 7, run this with `mine` beside int, and report what came out, whatever "
    "it is. What is shown must be about as large as half of int's interval. How long is that half?",
    "python -m lab.experiment --steer none int --seed 0 1 2 --steps 20 --items 40 --out out/7")}

# ------------------------------------------------------------------------------- not handed out
from lab.course.a7_better import NUMBERS
CODE = """
def louder(k, s):
    size = k.abs().mean(-1, keepdim=True, dtype=accumulate(k)).to(k.dtype)
    return k + s.gamma * size * k.sign()
METHODS = {**METHODS, "mine": Method(("gamma", "layers"), change=louder)}
"""
REFERENCE, REWARD = {"infosteer.py": CODE}, """
def spread(k, s):
    a = k.abs().to(accumulate(k)).clamp_min(1e-30)
    q = a / a.sum(-1, keepdim=True)
    return only_flux(k, s)[0], -(q * q).sum(-1).log()
METHODS = {**METHODS, "mine": Method(("lam", "layers"), measure=spread)}
"""
MEAN, NEW, ROW = "(-1, keepdim=True, dtype=accumulate(k))", "s.gamma * size * k.sign()", '"gamma", '
RIGHT = {"a change of the forward pass": CODE, "a reward": REWARD}
WRONG = {why: text.replace(line, new) for text, line, new, why in (
    (CODE, MEAN, "()", "a token's change depends on the other tokens, by a mean over the batch"),
    (CODE, "k + " + NEW, f"k.add_({NEW})", "k is changed in place; flux and autograd need it"),
    (CODE.replace(ROW, ""), "s.gamma", "0.1", "its strength is a constant, not a setting in s"),
    (CODE, "s.gamma", "0.1", "its row names a setting that has no effect"),
    (CODE, "k.sign()", "k / k.abs()", "0 / 0 is not a number: where k is 0, so is |k|"),
    (CODE, "k.sign()", "k.sign() * k.abs().sqrt()", "the slope of a root is infinite at 0"),
    (CODE, ".to(k.dtype)", "", "of bf16 it makes fp32, as sums do; go back to the dtype of k"),
    (CODE, "k.sign()", "torch.randn_like(k)", "its noise has no seed: a resumed run is another"),
    (CODE, "s.gamma *", "s.gamma * 0 *", "it does nothing: k stays, and nothing is rewarded"),
    (CODE, ', "layers"', ",", 'its row has no "layers", so that --layers is refused'),
    (REWARD, "q * q", "q.detach() ** 2", "the reward has no gradient, so nobody learns from it"),
    (REWARD, ".log()", ".log().mean()", "the reward is one number; each token has its own"))}
