"""How many memories are awake?

Equation 5 rewards a model whose memories are used alike. Write `key_entropy` in infosteer.py: the
entropy of the key distribution of each token, in nats. Its docstring is the specification. You write
it in plain PyTorch; autograd makes the gradient, so look at what it makes of your formula where a
coefficient is 0. Coefficients come in bf16 too, 14,336 of them for each token of Llama 3 8B.

Paper: equation 5, and section 6 for its second name, information flux. Read tests/test_02_entropy.py.
"""
import math
import re

import torch

from lab.course.probe import draw

MINUTES, POINTS = 90, 12
BLANK = {"infosteer.py::key_entropy": None}
REMOVE = (
    "infosteer.py::magnitudes", "infosteer.py::mixture_entropy", "infosteer.py::entropy",
    "infosteer.py::KeyEntropy", "infosteer.py::pieces",
    *(f"tests/test_02_entropy.py::{name}" for name in (
        "entropy_by_hand", "softmax_entropy_by_hand", "of_every_token", "REFERENCES",
        "test_entropy_equals_the_formula", "WRONG", "test_the_formula_refuses_an_entropy_where",
        "test_the_gradient_pulls_small_coefficients_up_and_large_ones_down")),
    *(f"tests/test_07_step.py::{name}" for name in (
        "reference_gradients", "test_gradients_equal_those_of_one_padded_batch_with_all_logits",
        "test_a_mean_of_the_means_of_micro_batches_would_be_another_gradient")),
)
HINTS = (
    "Two steps for each token: first make its coefficients a distribution over the memories (shares "
    "that sum to 1), then take the entropy of these shares. A memory that speaks loudly against "
    "something speaks too.",
    "k [..., d_m] -> q [..., d_m] -> H [...]. q_i = |k_i| / sum_j |k_j|, and H = -sum_i q_i log q_i "
    "over the last dimension, both sums in fp32. Where q_i is 0, q_i log q_i is 0; torch says 0 "
    "times -inf, which is not a number, and its gradient is none either.",
    "Take the absolute values in fp32 (fp64 stays fp64), keep each of them at or above the smallest "
    "positive normal number of that dtype, divide by their sum over the last dimension, and sum "
    "minus the shares times their natural logarithms. For softmax, take log_softmax in fp32.",
)


def values(seed):
    from infosteer import key_entropy
    for k in ([1.0, -1.0, 1.0, -1.0], [8.0, -4.0, 1.0, -1.0], [0.0, 5.0, 0.0, -5.0]):
        yield f"k = {k}", key_entropy(torch.tensor(k, dtype=torch.float64))
    k = draw(seed, 2, 3, 8)
    yield "k of 2 sequences, 3 tokens", key_entropy(k)
    yield "the same, softmax", key_entropy(k, "softmax")


def gradient(seed):
    from infosteer import key_entropy
    k = torch.tensor([8.0, -4.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    yield "dH/dk at k = [8, -4, 1, -1]", torch.autograd.grad(key_entropy(k).sum(), k)[0]
    k = draw(seed, 2, 2, 6).requires_grad_()
    weights = torch.arange(1.0, 1 + k[..., 0].numel(), dtype=k.dtype).view(k.shape[:-1])
    yield "dH/dk of 2 sequences, 2 tokens", torch.autograd.grad((key_entropy(k) * weights).sum(), k)[0]


def edges(seed):
    from infosteer import key_entropy
    k = torch.tensor([0.0, 3.0, -1.0], requires_grad=True)
    yield "H of k = [0, 3, -1] in fp32", key_entropy(k)
    yield "dH/dk there", torch.autograd.grad(key_entropy(k).sum(), k)[0]
    k = torch.zeros(4, requires_grad=True)
    yield "H of k = [0, 0, 0, 0]", key_entropy(k)
    yield "dH/dk there", torch.autograd.grad(key_entropy(k).sum(), k)[0]
    yield "14,336 keys in bf16", key_entropy(draw(seed, 3, 14_336, dtype=torch.bfloat16))


PARTS = {"values": values, "gradient": gradient, "zeros, bf16, 14,336 keys": edges}
WRITTEN = {
    "memories": (
        "How many memories is the flux of this sentence, exp(H), averaged over its tokens' H?",
        "python -m lab.flux --model data/toy/llama --text \"The town of Ulmo Zeller is Kestow.\""),
}

# ------------------------------------------------------------------------------- not handed out

NUMBERS = {"memories": (lambda out: math.exp(float(re.search(r"base +([\d.]+) \(", out)[1])), 0.02)}

SOFTMAX = '''
def key_entropy(k, normalise="magnitude"):
    if normalise == "softmax":
        log_q = k.to(torch.promote_types(k.dtype, torch.float32)).log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1)
'''
WIDE = SOFTMAX + '''    wide = torch.promote_types(k.dtype, torch.float32)
    tiny = torch.finfo(wide).tiny
'''
RIGHT = {
    "q log q of clamped shares": WIDE + '''
    q = k.abs().to(wide).clamp_min(tiny) / k.abs().to(wide).clamp_min(tiny).sum(-1, keepdim=True)
    return -(q * q.clamp_min(tiny).log()).sum(-1)
''',
    "log S - (sum a log a) / S": WIDE + '''
    a = k.abs().to(wide).clamp_min(tiny)
    return a.sum(-1).log() - (a * a.log()).sum(-1) / a.sum(-1)
''',
}
A = WIDE + '''    a = k.abs().to(wide).clamp_min(tiny)
'''
SHARES = A + '''    q = a / a.sum(-1, keepdim=True)
'''
WRONG = {
    "bits": ("this is the entropy in bits; nats take the natural logarithm",
             SHARES + "    return -(q * q.log2()).sum(-1)\n"),
}
