"""Your own method

Design a way to steer: one function, and one row `"mine"` in METHODS in infosteer.py. Change the key
coefficients k in the forward pass, or reward something that you compute of them, or both. What
holds for every method holds for yours:

- It sees k [..., d_m] in any dtype, gives a changed k of the same shape and dtype, and leaves the
  given one as it was. Flux and reward are [...], fp32 or wider.
- What it does to a token depends on that token alone, and is the same whenever it is done.
- No k gives an infinity or what is not a number, not even 0, and no gradient either.
- How strong it is, its row names: settings that Steering has, such as alpha, gamma or lam.

Then it trains, resumes, and stands in tables and reports, without another change. Do not look for
one that wins: a fair test of a plausible idea counts, and an honest null result earns full marks.
"""
import contextlib
import io
import json
import re
import tempfile
from pathlib import Path

import torch

from lab.course.probe import draw

MINUTES, POINTS, REMOVE = 240, 10, []
BLANK = {"infosteer.py::METHODS": lambda table: table}
HINTS = (
    "Ask what an idle memory is, and what you would like it to do. intervene and key_entropy are "
    "two answers. Rows of METHODS show what a method may be.",
    "change(k, s): [..., d_m] -> [..., d_m]. measure(k, s): -> (flux, reward), [...] each; flux is "
    "that of only_flux. Sums over d_m in accumulate(k), then back to k.dtype. s is the steering.",
    "Divide by nothing that can be 0: clamp it first. A root and a power below 1 have an infinite "
    "slope at 0. Take the strength from s, and name it and \"layers\" in the row's settings.")


def steered(k, **settings):            # -> (changed k, flux, reward or zeros) of the row "mine"
    from infosteer import Steering
    steering = Steering("mine", **settings)
    k = steering.change(k)
    flux, reward = steering.measure(k)
    return k, flux, torch.zeros_like(flux) if reward is None else reward


def equal(ones, others):
    return all(torch.allclose(*map(torch.nan_to_num, pair)) for pair in zip(ones, others))


def shapes(seed):
    for dtype in torch.float32, torch.bfloat16, torch.float64:
        k = draw(seed, 2, 3, 8).to(dtype)
        kept = k.clone()
        new, flux, reward = steered(k)
        yield f"{dtype} k: is the given one as it was?", torch.equal(k, kept)
        yield f"{dtype} k: has the new one its shape and dtype?", (
            new.shape == k.shape and new.dtype == dtype)
        wide = torch.promote_types(dtype, torch.float32)
        yield f"{dtype} k: are flux and reward a wide number for each token?", all(
            one.shape == k.shape[:2] and one.dtype == wide for one in (flux, reward))


def alone(seed):
    k = draw(seed, 2, 3, 8)
    whole = steered(k)
    yield "one text alone: the same as of two?", equal(steered(k[:1]), [one[:1] for one in whole])
    yield "one token alone: the same as of three?", equal(
        steered(k[:, 1:2]), [one[:, 1:2] for one in whole])
    yield "done again: the same?", equal(steered(k), whole)
    torch.manual_seed(seed)
    first = steered(k)
    torch.manual_seed(seed)
    yield "done again at one seed: the same?", equal(steered(k), first)


def edges(seed):
    few = draw(seed, 2, 3, 8).clamp_min(0)
    for what, k in ("k = 0", torch.zeros(1, 4)), ("many zeros", few), ("k = 1e6", few + 1e6):
        k = k.clone().requires_grad_()
        made = steered(k * 1)
        yield f"{what}: are all numbers finite?", all(one.isfinite().all() for one in made)
        total = sum(one.sum() for one in made if one.requires_grad)
        grad = torch.autograd.grad(total, k)[0] if torch.is_tensor(total) else k
        yield f"{what}: are all gradients?", grad.isfinite().all()


def strength(seed):
    from infosteer import METHODS, Steering
    k, usual = draw(seed, 2, 3, 8).requires_grad_(), vars(Steering())
    new, _, reward = steered(k * 1)
    learnt = reward.requires_grad and torch.autograd.grad(reward.sum(), k)[0].abs().max() > 0
    yield "does it change k, or reward something?", not equal([new, reward], [k, 0 * reward])
    yield "if it rewards, does the reward depend on k?", learnt or equal([reward], [0 * reward])
    row = METHODS["mine"].settings
    numbers = [name for name in row if isinstance(usual[name], (int, float))]
    yield "does its row name a setting that says how strong it is?", len(numbers) > 0
    yield 'does its row name "layers"?', "layers" in row
    yield "does every number in its row matter?", all(         # lambda multiplies a reward later
        learnt if name == "lam" else not equal(steered(k, **{name: usual[name] / 2}), steered(k))
        for name in numbers)


def runs(seed):
    import train
    from lab import experiment, report
    from tests.helpers import Interrupted, run_of
    held = all(found for part in (shapes, alone, edges, strength) for _, found in part(seed))
    yield "do the parts above hold?", held
    flags = ["--steer=mine", "--steps=3", "--batch=4", "--limit=8", "--out"]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        folder = train.run_folder(f"{out}/runs", "data/toy/llama", train.Steering("mine"), 0)
        for more, world in ((["--save-every=1"], Interrupted(3)), (["--resume"], train.ALONE),
                            ([], train.ALONE)) if held else ():
            with contextlib.suppress(KeyboardInterrupt):
                train.train(train.read_settings([
                    *flags, f"{folder if more else out + '/whole'}", *more]), world)
        if held:
            both = run_of(folder)[0], run_of(f"{out}/whole")[0]
            yield "are the weights of an interrupted run those of a whole one?", all(
                torch.equal(*pair) for pair in zip(*(weights.values() for weights in both)))
            experiment.main([*flags, f"{out}/runs", "--seed=0", "--items=1"])
            yield "is it an arm of lab.experiment?", "\n  mine" in said.getvalue()
        if held and seed:              # the report takes seconds
            Path(folder, "eval", "toy-plain.json").write_text(json.dumps({"accuracy": 0.5}))
            report.ITEMS = 1
            report.main([f"{out}/runs"])
            yield "is it in the report?", "mine" in Path(out, "runs/report.html").read_text("utf-8")


PARTS = {"shapes, dtypes, nothing in place": shapes, "a token by itself, always the same": alone,
         "finite": edges, "strength": strength, "trains, resumes, is reported": runs}
WRITTEN = {"half": (
    "Write your plan first (assignment 7), then run your method beside int, with this command and "
    "`mine` in it, and report what came out, whatever it is. How large must a difference in the nll "
    "of new formats be to be shown? Half of int's interval says about that.",
    "python -m lab.experiment --steer none int --seed 0 1 2 --steps 20 --items 40 --out out/7")}

# ------------------------------------------------------------------------------- not handed out
NUMBERS = {"half": (lambda said: float.__sub__(*map(float, re.search(
    r"int .*\[(\S+), (\S+)\]", said.split("new format")[2]).group(2, 1))) / 2, 0.15)}
CODE = """
seen = []
def louder(k, s):
    size = k.abs().mean(-1, keepdim=True, dtype=accumulate(k)).to(k.dtype)
    return k + s.gamma * size * k.sign()
METHODS = {**METHODS, "mine": Method(("gamma", "layers"), change=louder)}
"""
REWARD = """
def spread(k, s):
    a = k.abs().to(accumulate(k)).clamp_min(1e-30)
    q = a / a.sum(-1, keepdim=True)
    return only_flux(k, s)[0], -(q * q).sum(-1).log()
METHODS = {**METHODS, "mine": Method(("lam", "layers"), measure=spread)}
"""
REFERENCE = {"infosteer.py": CODE}
MEAN, NEW, ROW = "(-1, keepdim=True, dtype=accumulate(k))", "s.gamma * size * k.sign()", '"gamma", '
RIGHT = {"a change: all get louder": CODE, "a reward: Renyi's entropy": REWARD, "both": (
    REWARD + CODE).replace("change=louder", "louder, spread").replace(ROW, ROW + '"lam", ')}
WRONG = {why: (why, text.replace(line, new)) for text, line, new, why in (
    (CODE, MEAN, "()", "a token's change depends on the other tokens, by a mean over the batch"),
    (CODE, "k + " + NEW, f"k.add_({NEW})", "k is changed in place; flux and autograd need it"),
    (CODE.replace(ROW, ""), "s.gamma", "0.1", "its strength is a constant in the code, which no "
     "flag, args.json or folder's name knows; take it from s"),
    (CODE, "s.gamma", "0.1", "its row names a setting that has no effect"),
    (CODE, "k.sign()", "k / k.abs()", "0 / 0 is not a number: where k is 0, so is |k|"),
    (CODE, "k.sign()", "k.sign() * k.abs().sqrt()", "the slope of a root is infinite at 0"),
    (CODE, ".to(k.dtype)", "", "of bf16 it makes fp32, as sums do; go back to the dtype of k"),
    (CODE, "k.sign()", "torch.randn_like(k)", "its noise is new each time, so that a resumed run "
     "is another; what is done to a token must be the same"),
    (CODE, "s.gamma *", "seen.append(0) or len(seen) * s.gamma *", "it remembers what it did, so "
     "that the next call does something else; what is done to a token must be the same"),
    (CODE, "s.gamma *", "s.gamma * 0 *", "it does nothing: k stays, and nothing is rewarded"),
    (CODE, ', "layers"', ",", 'its row has no "layers", so that --layers is refused'),
    (REWARD, "q * q", "q.detach() ** 2", "the reward has no gradient, so nobody learns from it"),
    (REWARD, ".sum(-1).log()", ".sum(-1).log().mean()", "the reward is one number; each token has "
     "its own, since padding is masked"))}
