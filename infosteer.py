"""InfoSteer: steer how much of its feed-forward memory a language model uses (Deng, Chang and Chen, NeurIPS 2025).

A feed-forward layer is a key-value memory (section 3, eq. 3):

    FFN(h) = sum_i k_i v_i            k = act(h W_gate) * (h W_up)    key coefficients   [d_m]
                                      v_i = row i of W_down           memory vectors     [d_m, d]

If a few k_i dominate, most of the memory is unused. Two ways to change that while fine-tuning:

    int    intervene(k)      the forward pass raises the smallest coefficients                       (eq. 4)
    reg    key_entropy(k)    the loss rewards a more uniform key distribution                        (eq. 5)

This file is the method and nothing else: tensors in, tensors out. `model.py` calls it in one place, `KeyValueMemory`.
"""
from dataclasses import dataclass, replace

import torch

METHODS = {                            # method -> the settings that mean something to it
    "none": (),
    "int": ("p", "alpha", "rank_by", "layers"),
    "reg": ("lam", "normalise", "layers"),
}
RANKINGS = ("magnitude", "value")
NORMALISATIONS = ("magnitude", "softmax")


@dataclass(frozen=True)
class Steering:
    """How to steer. Defaults are the paper's (section 5.1). Raises ValueError for a setting outside its range."""

    method: str = "none"
    p: float = 0.01                    # int: the fraction of the d_m coefficients that is raised
    alpha: float = 1.0                 # int: raised to alpha times the mean
    lam: float = 0.01                  # reg: lambda, the weight of the entropy in the loss; negative concentrates the keys
    layers: tuple[int, ...] | None = None    # steer only these layers, counted from 1 as in the paper's Table 8; None: all
    rank_by: str = "magnitude"         # int: what "smallest" means, see `intervene`
    normalise: str = "magnitude"       # how k becomes the distribution whose entropy is taken, see `key_entropy`

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("rank_by", RANKINGS), ("normalise", NORMALISATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not 0 <= self.p <= 1:       # NaN fails every comparison, so it is refused here too
            raise ValueError(f"p is {self.p}; it is a fraction of the memories, from 0 to 1")
        for name in ("alpha", "lam"):
            if not abs(getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")

    def __str__(self):
        return " ".join([self.method, *(f"{name}={getattr(self, name) or 'all'}" if name == "layers" else f"{name}={getattr(self, name)}"
                                        for name in METHODS[self.method])])

    def at(self, layer: int) -> "Steering":
        """The steering of one layer (counted from 0, as in code): this one, or none where `layers` leaves it out."""
        return self if self.layers is None or layer + 1 in self.layers else replace(self, method="none")


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Layer numbers, from 1, of a list of ranges: "1-3,8" -> (1, 2, 3, 8). Raises ValueError outside 1..n_layers."""
    layers = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"layers {text!r}: {part.strip()!r} is not a layer or a range; write, for example, 1-8 or 1,4,9-12")
        first, last = int(first), int(last or first)
        if not 1 <= first <= last <= n_layers:
            raise ValueError(f"layers {text!r}: {part.strip()!r} is outside the model's layers 1-{n_layers}, or runs backwards")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def intervene(k, p: float = 0.01, alpha: float = 1.0, rank_by: str = "magnitude"):
    """Raise the smallest key coefficients (eq. 4): k [..., d_m] -> [..., d_m]. The mean is taken before the update.

        k_s <- alpha * mean_i(k_i)      for the max(1, round(p * d_m)) smallest k_s of each token

    The paper does not say what "smallest" means once k has both signs, as in every gated FFN:
    - "magnitude": the smallest |k|, set to alpha * mean|k| under their own sign (a zero counts as positive). These are the
      idle memories, which the method means to wake.
    - "value": the smallest k, set to alpha * mean(k). The literal reading; these are the most negative, among the busiest.

    The gradient flows through the mean, and not through the entries that were replaced.

    >>> intervene(torch.tensor([4., -1., 3., -8.]), p=0.25)                       # mean|k| = 4
    tensor([ 4., -4.,  3., -8.])
    >>> intervene(torch.tensor([4., -1., 3., -8.]), p=0.25, rank_by="value")      # mean(k) = -0.5
    tensor([ 4.0000, -1.0000,  3.0000, -0.5000])
    """
    if p == 0:
        return k
    n = max(1, round(p * k.shape[-1]))
    size = k if rank_by == "value" else k.abs()
    smallest = size.detach().topk(n, dim=-1, largest=False, sorted=False).indices         # [..., n]; 5x cheaper than a sort
    mean = size.mean(-1, keepdim=True, dtype=accumulate(k)).to(k.dtype)                   # [..., 1]
    raised = (alpha * mean).expand(smallest.shape)                                        # [..., n]
    if rank_by == "magnitude":
        raised = torch.where(k.detach().gather(-1, smallest) < 0, -raised, raised)
    return k.scatter(-1, smallest, raised)


def key_entropy(k, normalise: str = "magnitude"):
    """Entropy of the key distribution in nats (eq. 5): k [..., d_m] -> [...]; from 0 (one memory) to log d_m (all alike).

        H = -sum_i q_i log q_i      q_i = |k_i| / sum_j |k_j|      ("magnitude"; the paper's k / sum k needs k >= 0)
                                    q = softmax(k)                 ("softmax", the other reading)

    Read one token at a time, this is also the paper's information flux (section 6).
    Sums are accumulated in fp32 (fp64 for fp64 input), whatever the dtype of k. All k = 0 counts as uniform.

    >>> key_entropy(torch.tensor([[1., -1., 1., -1.], [0., 5., 0., 0.]]))         # log 4 and 0
    tensor([1.3863, 0.0000])
    """
    if normalise == "softmax":
        log_q = k.to(accumulate(k)).log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1)
    return _KeyEntropy.apply(k)


class _KeyEntropy(torch.autograd.Function):
    """With a = |k| and S = sum a:  H = log S - (sum a log a) / S  and  dH/da_i = (log S - H - log a_i) / S.

    Written out because autograd would keep about four fp32 copies of k for the backward pass; this keeps k itself, which the
    layer keeps anyway. At k_i = 0 the slope is infinite; sign(0) = 0 makes it 0 there, and the clamp keeps every other finite.
    """

    @staticmethod
    def forward(ctx, k):
        entropy, total = k.new_empty((2, *k.shape[:-1]), dtype=accumulate(k))             # [...], [...]
        for rows, h, s in zip(*_pieces(k, entropy, total)):
            a = _magnitudes(rows)
            torch.sum(a, -1, out=s)
            h.copy_(s.log() - a.mul_(a.log()).sum(-1) / s)
        ctx.save_for_backward(k, entropy, total)
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        k, entropy, total = ctx.saved_tensors
        grad_k = torch.empty_like(k, memory_format=torch.contiguous_format)               # [..., d_m]
        for rows, out, h, s, g in zip(*_pieces(k, grad_k, entropy, total, grad.contiguous())):
            slope = _magnitudes(rows).log_().neg_().add_((s.log() - h)[:, None])
            out.copy_(slope.mul_((g / s)[:, None]).mul_(rows.sign()))
        return grad_k


def _pieces(k, *others):
    """k [..., d_m] and tensors that go with it, as matching lists of pieces of some tokens each. On a CPU a piece and its
    temporaries stay in the cache, which is three times as fast as streaming all of k through memory five times; a GPU takes all at once."""
    tokens = max(1, 2**18 // k.shape[-1] if k.device.type == "cpu" else k[..., 0].numel())
    return [t.reshape(-1, *t.shape[k.dim() - 1:]).split(tokens) for t in (k, *others)]


def _magnitudes(k):
    """|k| in the dtype that sums are kept in: a new tensor, never quite 0, since log(0) is not a number to average."""
    a = k.abs().to(accumulate(k))
    return a.clamp_min_(torch.finfo(a.dtype).tiny)


def accumulate(k):
    """The dtype in which sums over k are kept: fp32, or fp64 for fp64."""
    return torch.promote_types(k.dtype, torch.float32)
