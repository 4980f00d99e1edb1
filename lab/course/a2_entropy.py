"""How many memories are awake?

Equation 5 rewards a model that uses its memories alike. Write `key_entropy` in infosteer.py: for
each token the entropy of its key distribution, in nats. Its docstring is the specification. Plain
PyTorch is enough, and autograd makes the gradient. But look at what it makes of your formula where
a coefficient is 0, and at what becomes of a sum in bf16: Llama 3 8B has 14,336 coefficients for
each token and layer.

In the paper: equation 5, and section 6 for its second name, information flux. Here:
tests/test_02_entropy.py. Work out log 4 for four equal memories first.
"""
import math
import re

import torch

from lab.course.probe import draw

MINUTES, POINTS = 90, 12
BLANK = {"infosteer.py::key_entropy": None}
REMOVE = (
    *(f"infosteer.py::{name}" for name in (
        "magnitudes", "shares", "knowledge_entropy", "mixture_entropy", "entropy", "KeyEntropy",
        "pieces")),
    *(f"tests/test_02_entropy.py::{name}" for name in (
        "entropy_by_hand", "softmax_entropy_by_hand", "of_every_token", "REFERENCES", "WRONG",
        "test_entropy_equals_the_formula", "test_the_formula_refuses_an_entropy_where",
        "test_the_gradient_pulls_small_coefficients_up_and_large_ones_down")),
    *(f"tests/test_07_step.py::{name}" for name in (
        "reference_gradients", "test_gradients_equal_those_of_one_padded_batch_with_all_logits",
        "test_a_mean_of_the_means_of_micro_batches_would_be_another_gradient")),
)
HINTS = (
    "For each token, first make its coefficients a distribution over the memories: shares that are "
    "not negative and sum to 1. Then take the entropy of the shares. A memory that speaks loudly "
    "against something is awake too.",
    "k [..., d_m] -> q [..., d_m] -> H [...]: q_i = |k_i| / sum_j |k_j|, H = -sum_i q_i log q_i, "
    "over the last dimension, in fp32 or wider. 0 log 0 counts as 0, but a computer says that 0 "
    "times minus infinity is not a number; and the slope of q log q at 0 is infinite.",
    "Take absolute values, in fp32 unless they are fp64. Let none be smaller than the smallest "
    "normal number of that dtype. Divide them by their sum over the last dimension, multiply each "
    "share by its own natural logarithm, sum, and change the sign. For softmax, take log_softmax.",
)


def values(seed):
    from infosteer import key_entropy
    for k in ([[1.0, -1.0, 1.0, -1.0]], [[8.0, -4.0, 1.0, -1.0], [1.0, 2.0, 3.0, 4.0]]):
        yield f"k = {k}", key_entropy(torch.tensor(k, dtype=torch.float64))
    k = draw(seed, 2, 3, 8)
    yield "k of 2 sequences and more, 3 tokens, 8 memories", key_entropy(k)
    yield "the same, normalised by softmax", key_entropy(k, "softmax")


def gradient(seed):
    from infosteer import key_entropy
    k = torch.tensor([[8.0, -4.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    yield "dH/dk at k = [[8, -4, 1, -1]]", torch.autograd.grad(key_entropy(k).sum(), k)[0]
    k = draw(seed, 2, 2, 6).requires_grad_()
    yield "dH/dk of 2 sequences, 2 tokens, 6 memories", torch.autograd.grad(
        (key_entropy(k) * k[..., 0].detach()).sum(), k)[0]


def edges(seed):
    from infosteer import key_entropy
    for numbers in ([[0.0, 3.0, -1.0]], [[0.0, 0.0, 0.0]]):
        k = torch.tensor(numbers, requires_grad=True)
        entropy = key_entropy(k)
        yield f"H in fp32 of k = {numbers}", entropy
        yield f"dH/dk in fp32 at k = {numbers}", torch.autograd.grad(entropy.sum(), k)[0]
    yield "14,336 coefficients in bf16", key_entropy(draw(seed, 3, 14_336).bfloat16())


PARTS = {"values": values, "gradient": gradient, "zeros, bf16, 14,336 keys": edges}
FLUX = "python -m lab.flux --model "
WRITTEN = {
    "memories": ("The mean flux H of a sentence, generating: how many memories is exp(H)? A "
                 "layer has 384: under `why`, what is the difference, and what would reg do to it?",
                 FLUX + 'data/toy/llama --text "The town of Ulmo Zeller is Kestow."'),
    "real memories": ("The same for a published model, whose layers have 1,536.",
                      FLUX + 'MODELS/smollm2-135m-instruct --text "The sky is blue."')}

# ------------------------------------------------------------------------------- not handed out


def exp_of_flux(output):
    return math.exp(float(re.search(r"\nbase +generating +(\d+\.\d+) \(", output)[1]))


NUMBERS = dict.fromkeys(WRITTEN, (exp_of_flux, 0.02))
CODE = """
def key_entropy(k, normalise="magnitude"):
    wide = torch.promote_types(k.dtype, torch.float32)
    if normalise == "softmax":
        log_q = k.to(wide).log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1)
    a = k.abs().to(wide).clamp_min(torch.finfo(wide).tiny)
    q = a / a.sum(-1, keepdim=True)
    return -(q * q.log()).sum(-1)
"""
A, Q, H = CODE.splitlines(keepends=True)[-3:]


def but(line, new):
    """The right answer with one line changed."""
    return CODE.replace(line, f"    {new}\n")


RIGHT = {
    "q log q of clamped shares": CODE,
    "log S - (sum a log a) / S": but(H, "S = a.sum(-1)\n"
                                        "    return S.log() - (a * a.log()).sum(-1) / S"),
    "logsumexp of log a": but(H, "b = a.log()\n    return b.logsumexp(-1) - (q * b).sum(-1)"),
}
WRONG = {
    "this is the entropy in bits; nats take the natural logarithm":
        but(H, "return -(q * q.log2()).sum(-1)"),
    "k has both signs, and k / sum k has negative shares, which have no logarithm":
        but(A, "a = k.to(wide)"),
    "negative coefficients are left out; a memory that speaks against something is awake too: it "
    "is the magnitude that counts": but(A, "a = k.to(wide).clamp_min(torch.finfo(wide).tiny)"),
    "these are shares by softmax of |k|; eq. 5 divides |k| by its sum": but(Q, "q = a.softmax(-1)"),
    "these are the shares of k squared, as of energy; eq. 5 takes |k|":
        but(A, "a = k.to(wide).square().clamp_min(torch.finfo(wide).tiny)"),
    "something like 1e-6 is added inside the logarithm, which changes every value: with thousands "
    "of memories the shares are not far above it": but(H, "return -(q * (q + 1e-6).log()).sum(-1)"),
    "these are the gradients with sum|k| detached; the total depends on k too":
        but(Q, "q = a / a.sum(-1, keepdim=True).detach()"),
    "the sums are kept in bf16, whose three digits are lost over 14,336 addends":
        but(A, "a = k.abs().clamp_min(torch.finfo(k.dtype).tiny)").replace(
            H, "    return -(q * q.log()).sum(-1).to(wide)\n"),
    "at k = 0 the slope of -q log q is infinite, as of torch.special.entr, and times the slope of "
    "|k| it is not a number; keep |k| above 0":
        but(A, "a = k.abs().to(wide)").replace(H, "    return torch.special.entr(q).sum(-1)"),
    "this is a distribution over tokens; the memories are the last dimension":
        but(Q, "q = a / a.sum(-2, keepdim=True)"),
    "this is the mean over the memories; the entropy is a sum over them":
        but(H, "return -(q * q.log()).mean(-1)"),
    "the sign is that of sum q log q; an entropy is not negative":
        but(H, "return (q * q.log()).sum(-1)"),
    "|k| is not divided by its sum, so these are no shares": but(Q, "q = a"),
    "this is one number for all tokens; each token has an entropy of its own":
        but(H, "return -(q * q.log()).sum(-1).mean()"),
    'this is the softmax reading; the default is "magnitude"':
        CODE.replace('if normalise == "softmax"', "if True"),
}
