"""Wake the idle

Equation 4 raises the smallest key coefficients of each token to alpha times the mean. Write
`intervene` in infosteer.py, for both readings of "smallest". Its docstring is the specification;
read what it says of the mean, of signs and zeros, of how many, and of where the gradient flows.
Plain PyTorch is enough, and the tensor that is given to you must stay as it is. "random" is not
asked for. Here: tests/test_03_intervention.py. Work out k = (4, -1, 3, -8) on paper first.
"""
import re

import torch

from lab.course.probe import draw

MINUTES, POINTS = 120, 14
BLANK = {"infosteer.py::intervene": None}
REMOVE = ("infosteer.py::Intervene", *(f"tests/test_03_intervention.py::{name}" for name in (
    "intervene_by_hand", "of_every_token", "test_the_intervention_equals_the_formula", "WRONG",
    "test_the_formula_refuses_an_intervention_where",
    "test_in_bf16_as_many_are_raised_to_the_same_value")))
HINTS = (
    "Three questions for each token: how many, which ones, and to what? By magnitude, an idle "
    "memory is one near 0, and it keeps its side when it is woken. By value, the smallest are the "
    "most negative. Make new tensors, and autograd does the rest.",
    "s = |k| or k, [..., d_m]. The n = max(1, round(p d_m)) smallest of the last dimension become "
    "alpha m, with m = mean of s over it, [..., 1], before anything changes; by magnitude times -1 "
    "where k < 0. dk'/dk is 0 at what is replaced, but for what comes by the mean.",
    "Choose n indices by topk with largest=False; not by comparing with the n-th smallest, since "
    "equals would all be raised. Take the mean with keepdim. By magnitude, negate it where k is "
    "below 0. Put the values at these indices of a copy: scatter without an underscore.",
)


def put(numbers):
    return torch.tensor(numbers).double()


def raised(seed):
    from infosteer import intervene
    small, hundred, k = put([[4, -1, 3, -8]]), torch.arange(1, 101).double(), draw(seed, 2, 3, 8)
    for by in ("magnitude", "value"):
        yield f"k = [[4, -1, 3, -8]], p = 1/4, by {by}", intervene(small, 0.25, 1.0, by)
        yield f"2 sequences, 3 tokens, by {by}", intervene(k, 0.3, 2.0, by)
    yield "k = [[1, 5], [30, 10]], p = 1/2", intervene(put([[1, 5], [30, 10]]), 0.5)
    for p in (0.001, 0.014, 0.026):
        yield f"of 100, how many p = {p} raises", (intervene(hundred, p, 3.0) != hundred).sum()
    yield "2 sequences, alpha = -1/2", intervene(k, 0.3, -0.5)
    yield "2 sequences, p = 0", intervene(k, 0.0)


def signs(seed):
    from infosteer import intervene
    for k in ([[0.0, -4.0]], [[-0.0, -4.0]], [[0.0, 0.0, 6.0, -1.0, -5.0]]):
        yield f"k = {k}, p = 0.4", intervene(put(k), 0.4)
    # Which of two equals is raised is free. How many are, and to what, is not.
    yield "k = [[1, 1, 1, 5]], p = 1/2, sorted", intervene(put([[1, 1, 1, 5]]), 0.5).sort().values
    k = draw(seed, 4, 300).bfloat16()
    kept, new = k.clone(), intervene(k, 0.1, 3.0)
    yield "300 coefficients in bf16: how many are raised", (new != kept).sum(-1)
    yield "300 coefficients in bf16, sorted", new.sort().values
    yield "is the given tensor as it was?", torch.equal(k, kept)


def gradient(seed):
    from infosteer import intervene
    k = put([[4, -1, 3, -8]]).requires_grad_()
    new = intervene(k * 1, 0.25)
    yield "k = [[4, -1, 3, -8]]: gradient of the one that is raised", torch.autograd.grad(
        new[0, 1], k, retain_graph=True)[0]
    yield "gradient of the others", torch.autograd.grad(new[0, [0, 2, 3]].sum(), k)[0]
    for rank_by in ("magnitude", "value"):
        k = draw(seed, 2, 3, 8).requires_grad_()
        new = intervene(k * 1, 0.3, 2.0, rank_by)
        yield f"2 sequences, 3 tokens, by {rank_by}", torch.autograd.grad(
            (new * draw(seed, 2, 3, 8).cos()).sum(), k)[0]


PARTS = {"which, how many, how far": raised, "signs, zeros, ties": signs, "gradient": gradient}
CHANGE = "python eval.py --change --task toy-plain --data data/toy --model "
ASK = ("How far does eq. 4 with p = 1% move what the memories of a {} model answer, by {}, in "
       "percent? Estimate it on paper under `why`. Here goes the mean that the command prints.")
WRITTEN = {f"{name} {rank_by}": (ASK.format(name, rank_by), CHANGE + model)
           for name, model in (("toy", "data/toy/llama"), ("real", "MODELS/smollm2-135m-instruct"))
           for rank_by in ("magnitude", "value")}

# ------------------------------------------------------------------------------- not handed out


NUMBERS = {key: (lambda said, name=name: float(re.search(rf"^{name} changes.* ([\d.]+)%  *\(", said,
                                                        re.M)[1]), 0.05)
           for key, name in zip(WRITTEN, ("int", "int-value") * 2)}
CODE = """
def intervene(k, p=0.01, alpha=1.0, rank_by="magnitude", dice=None):
    if p == 0:
        return k
    magnitude = rank_by == "magnitude"
    size = k.abs() if magnitude else k
    n = max(1, round(p * k.shape[-1]))
    chosen = torch.zeros_like(k).bool().scatter(-1, size.topk(n, largest=False).indices, True)
    mean = size.mean(-1, keepdim=True)
    raised = alpha * mean * (torch.where(k < 0, -1, 1) if magnitude else torch.ones_like(k))
    return torch.where(chosen, raised, k)
"""
BY, SIZE, N, CHOSEN, MEAN, RAISED, END = CODE.splitlines(keepends=True)[-7:]


def but(line, new):
    """The right answer with one line changed."""
    return CODE.replace(line, f"    {new}\n")


RIGHT = {
    "mask and where": CODE,
    "scatter": but(END, "where = size.topk(n, largest=False).indices\n"
                        "    return k.scatter(-1, where, raised.gather(-1, where))"),
    "sort": but(CHOSEN, "chosen = size.argsort(-1).argsort(-1) < n"),
}
WRONG = {
    "the mean is detached; the gradient flows through it to every coefficient":
        but(MEAN, "mean = size.mean(-1, keepdim=True).detach()"),
    "this is the mean of k with its signs, which cancel; by magnitude it is that of |k|":
        but(MEAN, "mean = k.mean(-1, keepdim=True)"),
    "the number is cut off by int(); it is rounded to the nearest":
        but(N, "n = max(1, int(p * k.shape[-1]))"),
    "the number is rounded up; it is rounded to the nearest":
        but(N, "n = -int(-p * k.shape[-1] // 1)"),
    "the mean is that of the whole batch; each token has a mean of its own":
        but(MEAN, "mean = size.mean()"),
    "the sign is lost: by magnitude, a negative coefficient stays negative":
        but(RAISED, "raised = alpha * mean * torch.ones_like(k)"),
    "torch.sign(0) is 0, so what is 0 stays asleep; a zero counts as positive":
        CODE.replace("torch.where(k < 0, -1, 1)", "k.sign()"),
    "equals are all raised, so more than n; choose n by their places, not by comparing":
        but(CHOSEN, "chosen = size <= size.kthvalue(n, -1, keepdim=True).values"),
    "the gradient flows through replaced entries as if they had stayed":
        but(END, "return k + (torch.where(chosen, raised, k) - k).detach()"),
    "the given tensor is changed in place; others still need it, autograd too":
        but(END, "k[chosen] = raised[chosen].detach()\n    return k"),
    "the largest are replaced; eq. 4 raises the smallest":
        CODE.replace("largest=False", "largest=True"),
    "alpha times the mean is added to the coefficient; eq. 4 puts it in its place":
        but(RAISED, RAISED.strip() + " + k"),
    "this is the mean of those that stay; it is the mean of all, before":
        but(MEAN, "kept = (~chosen).sum(-1, keepdim=True)\n"
                  "    mean = (size * ~chosen).sum(-1, keepdim=True) / kept"),
    "the smallest are those of the whole batch; each token has its own":
        but(CHOSEN, "n *= k[..., 0].numel()\n"
                    "    chosen = size.flatten().argsort().argsort().view_as(k) < n"),
    'rank_by="value" gives the same as "magnitude"': but(BY, "magnitude = True"),
}
