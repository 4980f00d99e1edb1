"""InfoSteer: steer how much of its feed-forward memory a language model uses (Deng, Chang and Chen, NeurIPS 2025).

A feed-forward layer is a key-value memory (section 3, eq. 3):

    FFN(h) = sum_i k_i v_i            k = act(h W_gate) * (h W_up)    key coefficients   [d_m]
                                      v_i = row i of W_down           memory vectors     [d_m, d]

If a few k_i dominate, most of the memory is unused. Two generic ways to change that while fine-tuning, and four that know what is in
the memory:

    int                 the forward pass raises the smallest coefficients                                       (eq. 4)
    reg                 the loss rewards a more uniform key distribution                                        (eq. 5)
    semantic            int or reg, with a strength for each group of memories with alike vectors               (Appendix B.1)
    activation          the same, for memories that are also called by the same tokens                          (Appendix B.1)
    surrogate           the forward pass amplifies memories that say what the training data says                (Appendix B.2)
    surrogate-entropy   the loss rewards the entropy of what the memories say together, in words                (Appendix B.2)

This file is the method and its analysis, and nothing else: tensors in, tensors out. `model.py` steers in one place, `KeyValueMemory`.
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

RANKINGS = ("magnitude", "value")
NORMALISATIONS = ("magnitude", "softmax")
BASES = ("int", "reg")

# ----------------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Steering:
    """How to steer. Defaults are the paper's (section 5.1) where it has any. Raises ValueError for a setting outside its range."""

    method: str = "none"
    p: float = 0.01                    # int: the fraction of the d_m coefficients that is raised
    alpha: float = 1.0                 # int: raised to alpha times the mean
    rank_by: str = "magnitude"         # int: what "smallest" means, see `intervene`
    lam: float = 0.01                  # reg: lambda, the weight of the entropy in the loss; negative concentrates the keys
    normalise: str = "magnitude"       # reg: how k becomes the distribution whose entropy is taken, see `key_entropy`
    base: str = "int"                  # semantic, activation: the generic method whose change is scaled
    groups: int = 16                   # semantic, activation: groups of memories per layer
    subgroups: int = 4                 # activation: groups within each of those
    beta_max: float = 4.0              # semantic, activation: the largest strength of a group
    gamma: float = 0.1                 # surrogate: k_i grows by this for each standard deviation of its score
    lambda_1: float = 1.0              # surrogate: how much a memory's entropy counts against it
    lambda_2: float = 1.0              # surrogate: how much its divergence from the target counts against it
    buckets: int = 256                 # surrogate-entropy: groups of tokens, see `mixture_entropy`
    layers: dict[int, dict[str, float]] | None = None    # the layers that are steered, from 1 as in Table 8, and what is set differently there
    known: torch.Tensor | None = field(default=None, repr=False, compare=False)    # what the method knows of each memory: [n_layers, d_m, ...]

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("rank_by", RANKINGS), ("normalise", NORMALISATIONS), ("base", BASES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not 0 <= self.p <= 1:       # NaN fails every comparison, so it is refused here too
            raise ValueError(f"p is {self.p}; it is a fraction of the memories, from 0 to 1")
        for name in ("alpha", "lam", "gamma", "lambda_1", "lambda_2"):
            if not abs(getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        if not 0 <= self.beta_max < float("inf"):
            raise ValueError(f"beta_max is {self.beta_max}; it must be a number at or above 0")
        for name in ("groups", "subgroups", "buckets"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")

    @property
    def settings(self) -> dict:
        """The settings that mean something to the method, as JSON can hold them: {"method": ..., ...}."""
        return {name: getattr(self, name) for name in ("method", *meaningful(self.method, self.base))}

    def __str__(self):
        return " ".join([self.method, *(f"{name}={format_layers(value) if name == 'layers' else value}"
                                        for name, value in self.settings.items() if name != "method")])

    def knowing(self, profile: dict) -> "Steering":
        """The same, with what the method must know of the memories: profile {name: [n_layers, d_m, ...]} has METHODS[method].needs."""
        method = METHODS[self.method]
        if not method.needs:
            return self
        layers = zip(range(len(profile[method.needs[0]])), *(profile[name] for name in method.needs))
        return replace(self, known=torch.stack([method.know(self.at(layer), *tensors) for layer, *tensors in layers]))

    def at(self, layer: int) -> "Steering":
        """The steering of one layer (counted from 0, as in code): this one with what `layers` sets there, or none where it leaves it out."""
        if self.layers is not None and layer + 1 not in self.layers:
            return replace(self, method="none", layers=None, known=None)
        return replace(self, **(self.layers or {}).get(layer + 1, {}), layers=None, known=None if self.known is None else self.known[layer])

    def change(self, k):
        """The forward pass of one layer: key coefficients [..., d_m] -> [..., d_m]."""
        change = METHODS[self.method].change
        return change(k, self) if change else k

    def entropies(self, k):
        """(flux, reward) of one layer: the entropy of the key distribution, which is only seen, and what the loss rewards, times lambda,
        or None. [..., d_m] -> [...] nats. For `reg` both are one and the same."""
        return METHODS[self.method].entropies(k, self)


def meaningful(method, base="int"):
    """The names of the settings that mean something to a method."""
    own = METHODS[method].settings
    return own + tuple(name for name in METHODS[base].settings if name not in own) if "base" in own else own


STRENGTHS = ("p", "alpha", "lam", "beta_max", "gamma", "lambda_1", "lambda_2")     # what may differ from layer to layer


def parse_layers(text: str, n_layers: int) -> dict[int, dict[str, float]]:
    """Layers, from 1, of a list of ranges, each perhaps with strengths of its own: "1-2:alpha=2,4" -> {1: {"alpha": 2.0}, 2: {"alpha": 2.0}, 4: {}}.

    Raises ValueError outside 1..n_layers, for a layer with two strengths, and for what is not a strength.
    """
    layers = {}
    for part in text.split(","):
        part, *strengths = (piece.strip() for piece in part.split(":"))
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and first.isascii()) or (dash and not (last.isdecimal() and last.isascii())):
            raise ValueError(f"layers {text!r}: {part!r} is not a layer or a range; write, for example, 1-8 or 1,4,9-12 or 1-8:alpha=2,9-16:alpha=3")
        first, last = int(first), int(last or first)
        if not 1 <= first <= last <= n_layers:
            raise ValueError(f"layers {text!r}: {part!r} is outside the model's layers 1-{n_layers}, or runs backwards")
        here = {}
        for strength in strengths:
            name, _, value = (piece.strip() for piece in strength.partition("="))
            try:
                here[name.replace("-", "_")] = float(value)
            except ValueError:
                raise ValueError(f"layers {text!r}: {strength!r} is not a strength; write, for example, 1-8:alpha=2") from None
        if not here.keys() <= set(STRENGTHS):
            raise ValueError(f"layers {text!r}: {', '.join(sorted(here.keys() - set(STRENGTHS)))} is no strength; known are {', '.join(STRENGTHS)}")
        for layer in range(first, last + 1):
            if layers.setdefault(layer, here) != here:
                raise ValueError(f"layers {text!r}: layer {layer} has two different strengths")
    return dict(sorted(layers.items()))


def format_layers(layers) -> str:
    """The shortest text that `parse_layers` reads so: {1: {}, 2: {}, 4: {"alpha": 2.0}} -> "1-2,4:alpha=2". None -> "all"."""
    if layers is None:
        return "all"
    ranges = []
    for layer, here in sorted(layers.items()):
        if ranges and ranges[-1][1:] == [layer - 1, here]:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer, here])
    return ",".join(f"{first}{f'-{last}' if last > first else ''}{''.join(f':{name}={value:g}' for name, value in here.items())}" for first, last, here in ranges)


# ------------------------------------------------------------------------------------------------- eq. 4 and eq. 5: int and reg


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
    n, magnitude = max(1, round(p * k.shape[-1])), rank_by == "magnitude"
    size = k.detach().abs() if magnitude else k.detach()
    smallest = size.topk(n, dim=-1, largest=False, sorted=False).indices                  # [..., n]; 5x cheaper than a sort
    mean = size.mean(-1, keepdim=True, dtype=accumulate(k)).to(k.dtype)                   # [..., 1]
    sign = torch.ones_like(mean).expand(smallest.shape)                                   # [..., n]
    if magnitude:
        sign = torch.where(k.detach().gather(-1, smallest) < 0, -sign, sign)
    return _Raise.apply(k, smallest, sign, mean, alpha, magnitude)


class _Raise(torch.autograd.Function):
    """k'_i = alpha m s_i for the replaced entries R, with m = mean_j(s_j k_j) and s the sign of k (1 when ranked by value):

        dL/dk_j = [j not in R] dL/dk'_j + s_j (alpha / d_m) sum over i in R of s_i dL/dk'_i

    Written out because autograd would keep k beside k', a seventh more than the block keeps without; this takes the signs outside
    R from k', which the layer keeps anyway. It also halves the time of the backward pass.
    """

    @staticmethod
    def forward(ctx, k, smallest, sign, mean, alpha, magnitude):
        new = k.scatter(-1, smallest, alpha * mean * sign)
        ctx.save_for_backward(new, smallest, sign)
        ctx.share, ctx.magnitude = alpha / k.shape[-1], magnitude
        return new

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        new, smallest, sign = ctx.saved_tensors
        pull = ctx.share * (sign * grad.gather(-1, smallest)).sum(-1, keepdim=True)       # [..., 1]  on the mean, spread over all entries
        grad_k = new.sign().mul_(pull).add_(grad) if ctx.magnitude else grad + pull       # [..., d_m]
        return grad_k.scatter_(-1, smallest, sign * pull), None, None, None, None, None


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
        entropy, total = (k.new_empty(k.shape[:-1], dtype=accumulate(k)) for _ in range(2))           # [...], [...]
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
            slope = _magnitudes(rows).log_()
            torch.sub((s.log() - h)[:, None], slope, out=slope)
            out.copy_(slope.mul_((g / s)[:, None]).mul_(rows.sign()))
        return grad_k


def _pieces(k, *others):
    """k [..., d_m] and tensors that go with it, as matching lists of pieces of some tokens each. On a CPU a piece and its
    temporaries stay in the cache, which is three times as fast as streaming all of k through memory five times; a GPU takes all at once."""
    in_cache = k.device.type == "cpu" and not torch.compiler.is_compiling()              # a compiler fuses all of it by itself
    tokens = max(1, 2**18 // k.shape[-1] if in_cache else k[..., 0].numel())
    return [t.reshape(-1, *t.shape[k.dim() - 1:]).split(tokens) for t in (k, *others)]


def _magnitudes(k):
    """|k| in the dtype that sums are kept in: a new tensor, never quite 0, since log(0) is not a number to average."""
    a = k.abs().to(accumulate(k))
    return a.clamp_min_(torch.finfo(a.dtype).tiny)


def accumulate(k):
    """The dtype in which sums over k are kept: fp32, or fp64 for fp64."""
    return torch.promote_types(k.dtype, torch.float32)


# ------------------------------------------------------------------------------- Appendix B.1: groups of memories, by their vectors


def spherical_kmeans(x, n: int, seed: int = 0, iterations: int = 50):
    """Cluster rows by their cosine: x [rows, d] -> (the group of each row [rows] long, 0..n-1 without gaps; the centres [n, d]). Where
    there are fewer rows than n, each is its own group.

    k-means on the unit sphere: a row joins the centre with the largest cosine, a centre is the direction of its rows' sum; first centres
    are drawn as in k-means++, each row with its distance 1 - cos to the centres so far as its chance. A group that loses its last row
    takes the row that fits worst elsewhere. Memory: x, one normalised copy of x, and rows x n cosines.
    """
    x = F.normalize(x.float(), dim=-1)                                                    # [rows, d]
    n, generator = min(n, len(x)), torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(x), (1,), generator=generator).item()]
    distance = 1 - x @ x[chosen[0]]                                                       # [rows]  to the nearest centre so far
    while len(chosen) < n:
        chance = distance.clamp_min(0).cpu()
        chance[chosen] = 0
        if not chance.sum() > 0:                                                          # all others are copies of centres: any of them
            chance = torch.ones(len(x)).scatter_(0, torch.tensor(chosen), 0.0)
        chosen.append(torch.multinomial(chance, 1, generator=generator).item())
        distance = torch.minimum(distance, 1 - x @ x[chosen[-1]])
    centres, group = x[chosen], None
    for _ in range(iterations):
        cosine, nearest = (x @ centres.T).max(-1)                                         # [rows], [rows]
        for empty in (nearest.bincount(minlength=n) == 0).nonzero()[:, 0].tolist():
            crowded = nearest.bincount(minlength=n)[nearest] > 1
            nearest[torch.where(crowded, cosine, torch.inf).argmin()] = empty
        if group is not None and torch.equal(nearest, group):
            break
        group = nearest
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, group, x), dim=-1)
    return group, centres


def split_groups(groups, patterns, n: int, seed: int = 0):
    """Split each group of memories by what calls them: groups [d_m], patterns |k| [d_m, tokens] -> finer groups [d_m], 0.. without gaps."""
    finer, total = torch.empty_like(groups), 0
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        inside, _ = spherical_kmeans(patterns[members], n, seed)
        finer[members] = total + inside
        total += inside.max() + 1
    return finer


def group_strengths(groups, usage, beta_max: float):
    """beta_g of each memory's group: groups [d_m], usage = mean |k_i| [d_m] -> [d_m]. Groups that are used less are steered more:

        beta_g = clip(mean usage of all groups / usage of g, 0, beta_max)         (the paper gives no rule; this one is ours)
    """
    sizes = groups.bincount()
    of_group = torch.zeros(len(sizes), device=usage.device).index_add_(0, groups, usage.float()) / sizes      # [groups]
    return (of_group.mean() / of_group.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, beta_max)[groups]


# -------------------------------------------------------------------------------- Appendix B.2: what a memory says, its surrogate


def surrogates(v, decode):
    """What each memory says when decoded alone: v [n, d], decode [V, d] -> pieces (slice of memories, log P [piece, V] fp32).

        phi_i = v_i W_decode      P_i = softmax(phi_i)

    A piece at a time: all of a layer's surrogates would be d_m x V numbers, 8 GB in fp32 for a 1.5B model.
    """
    rows = max(1, (2**24 if v.device.type == "cpu" else 2**28) // len(decode))
    for start in range(0, len(v), rows):
        here = slice(start, min(start + rows, len(v)))
        yield here, (v[here] @ decode.T).float().log_softmax(-1)


def entropy(log_p):
    """H(P) in nats of log P [..., V] -> [...]"""
    return -(log_p.exp() * log_p).sum(-1)


def specificity(entropies, V: int):
    """Spec(v) = 1 - H(P) / log V: 0 for a memory that says anything, 1 for one that says one token."""
    return 1 - entropies / torch.tensor(float(V)).log()


def divergence(target, log_p):
    """KL(target || P) in nats: target [V] sums to 1, log P [..., V] -> [...]"""
    return -torch.special.entr(target).sum() - log_p @ target


def relevance(entropies, divergences, lambda_1: float = 1.0, lambda_2: float = 1.0):
    """S of each memory of one layer, standardised: both [d_m] -> [d_m] with mean 0 and standard deviation 1 (0 where all are alike).

        S(phi_i) = -lambda_1 H(P_i) - lambda_2 KL(P_target || P_i)
    """
    score = -lambda_1 * entropies - lambda_2 * divergences
    score = score - score.mean()
    spread = score.std(correction=0)
    return score / spread if spread > 0 else torch.zeros_like(score)


def mixture_entropy(k, says):
    """Entropy in nats of what the memories say together: k [..., d_m], says [d_m, C] -> [...], from 0 to log C.

        M = sum_i khat_i P_i      khat_i = |k_i| / sum_j |k_j|

    Two approximations make it affordable, since P is d_m x V for every layer. The tokens are merged into C groups of like tokens, so that
    says[i, c] is the sum of P_i over group c: H of the merged mixture is a lower bound of H(M), and equal to it for C = V. And P_i is
    that of the model before training.
    """
    with torch.autocast(k.device.type, enabled=False):                                    # a sum of log x needs more digits than bf16 has
        a = k.to(accumulate(k)).abs()
        m = a @ says.to(a.dtype) / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)      # [..., C]
        return -(m * m.clamp_min(torch.finfo(a.dtype).tiny).log()).sum(-1)


# -------------------------------------------------------------------------------------------------------- the table of methods


def _seen(k, steering):
    return key_entropy(k.detach(), steering.normalise), None


def _rewarded(k, steering):
    flux = key_entropy(k, steering.normalise)
    return flux, flux


def _change_by_group(k, steering):
    """k_i + beta_g dk_i, where dk is what int would do; reg changes nothing in the forward pass."""
    if steering.base == "reg":
        return k
    return torch.lerp(k, intervene(k, steering.p, steering.alpha, steering.rank_by), steering.known.to(k.dtype))


def _rewarded_by_group(k, steering):
    """reg moves k_i through the gradient of the entropy, so that is what beta_g scales; the entropy itself is the same."""
    if steering.base == "int":
        return _seen(k, steering)
    return _rewarded(torch.lerp(k.detach(), k, steering.known.to(k.dtype)), steering)


@dataclass(frozen=True)
class Method:
    """One row of the table: a method is what it changes in the forward pass, what its loss rewards, and what it knows of the memories."""

    settings: tuple[str, ...] = ()     # the fields of Steering that mean something to it
    change: Callable | None = None     # (k [..., d_m], steering of the layer) -> k
    entropies: Callable = _seen        # (k, steering of the layer) -> (flux, reward or None)
    needs: tuple[str, ...] = ()        # tensors of the memory profile, made once before training
    know: Callable | None = None       # (steering of the layer, those tensors of the layer) -> steering.known


METHODS = {
    "none": Method(),
    "int": Method(("p", "alpha", "rank_by", "layers"), change=lambda k, s: intervene(k, s.p, s.alpha, s.rank_by)),
    "reg": Method(("lam", "normalise", "layers"), entropies=_rewarded),
    "semantic": Method(("base", "groups", "beta_max", "layers"), _change_by_group, _rewarded_by_group,
                       needs=("semantic", "usage"), know=lambda s, groups, usage: group_strengths(groups, usage, s.beta_max)),
    "activation": Method(("base", "groups", "subgroups", "beta_max", "layers"), _change_by_group, _rewarded_by_group,
                         needs=("activation", "usage"), know=lambda s, groups, usage: group_strengths(groups, usage, s.beta_max)),
    "surrogate": Method(("gamma", "lambda_1", "lambda_2", "layers"), change=lambda k, s: k * s.known.to(k.dtype), needs=("entropy", "divergence"),
                        know=lambda s, h, kl: 1 + s.gamma * relevance(h, kl, s.lambda_1, s.lambda_2)),
    "surrogate-entropy": Method(("lam", "buckets", "layers"), needs=("says",), know=lambda s, says: says,
                                entropies=lambda k, s: (key_entropy(k.detach()), mixture_entropy(k, s.known))),
}


# ------------------------------------------------------------------------------------------- section 6: information flux, in numbers
# Flux itself is `key_entropy`, averaged over layers. Tokens of one text are not independent of each other, so every standard error here
# takes texts, not tokens, for what was drawn: `text` [N] long says which text each of the N tokens is from.


def terciles(x):
    """Cut numbers into three equal parts: x [N], N > 0 -> (the part of each [N] long: 0 low, 1 middle, 2 high; the two cuts [2])."""
    cuts = x.quantile(torch.tensor([1 / 3, 2 / 3], dtype=x.dtype, device=x.device))
    return torch.bucketize(x, cuts), cuts


def clustered_mean(x, text):
    """Mean over tokens, and its standard error clustered by text: x [N], text [N] long -> (mean, error). The error is None for one text.

        error^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / N^2           g runs over the G texts
    """
    x = x.double()
    if not len(x):
        return None, None
    _, text = text.unique(return_inverse=True)
    G = int(text.max()) + 1
    sums = x.new_zeros(G).index_add_(0, text, x - x.mean())                # [G]
    return x.mean().item(), (G / (G - 1) * sums.square().sum()).sqrt().item() / len(x) if G > 1 else None


def grouped_correlation(x, y, group, text):
    """Pearson's correlation within groups, and its jackknife error over texts: x, y [N], group, text [N] long -> (r, error).

        r        of x and y after each is centred on its mean in the token's group; one group for all gives the plain correlation
        error^2  = (G - 1) / G * sum_g (r without text g - their mean)^2

    None for what is undefined: r where x or y does not vary within groups, or for fewer than three tokens; the error for one text, or where
    an r without one text is undefined.
    """
    x, y = x.double(), y.double()
    if len(x) < 3 or any(values.std() <= 1e-9 * values.mean().abs() for values in (x, y)):
        return None, None
    x, y = ((values - values.mean()) / values.std() for values in (x, y))                 # changes no r, and keeps the sums below small
    (_, group), (_, text) = group.unique(return_inverse=True), text.unique(return_inverse=True)
    sums = x.new_zeros(int(text.max()) + 1, int(group.max()) + 1, 6)                      # of 1, x, y, x^2, y^2, xy in each text and group
    sums.index_put_((text, group), torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], -1), accumulate=True)

    def r(sums):                                                                          # [..., groups, 6] -> [...]
        n, sx, sy, xx, yy, xy = sums.unbind(-1)
        xx, yy, xy = ((total - a * b / n.clamp_min(1)).sum(-1) for total, a, b in ((xx, sx, sx), (yy, sy, sy), (xy, sx, sy)))
        constant = torch.minimum(xx, yy) <= 1e-12 * n.sum(-1)                             # not quite 0, where large sums cancel
        return torch.where(constant | (n.sum(-1) < 3), torch.nan, xy / (xx * yy).sqrt())

    whole, without, G = r(sums.sum(0)), r(sums.sum(0) - sums), len(sums)                  # [], [G]
    error = ((G - 1) / G * (without - without.mean()).square().sum()).sqrt() if G > 1 else whole * torch.nan
    return tuple(None if value.isnan() else value.item() for value in (whole, error))


# ------------------------------------------------------------------------------- reading memories: what they say, what calls them


def token_log_probability(v, w, log_z):
    """log P_i(t) = v_i . w_t - log Z_i of one token t: v [n, d], its row of the LM head w [d], log Z [n] -> [n] nats."""
    return v @ w - log_z


def keep_largest(kept, at, k, positions):
    """The largest coefficients of each memory so far: kept [d_m, n] and the positions they were seen at [d_m, n], k [T, d_m] at positions [T]
    -> both, brought up to date. -inf in kept is a place that is still free."""
    largest, chosen = torch.cat([kept, k.T.to(kept.dtype)], 1).topk(kept.shape[1])                      # [d_m, n]
    return largest, torch.cat([at, positions.to(at.dtype).expand(len(at), -1)], 1).gather(1, chosen)


def agreement(concepts, following):
    """How often what a memory says is what comes after the text that calls it (Geva et al. 2021): two token ids for each memory, both [n]
    -> (share of memories where they are the same token, its binomial standard error, chance).

        chance = sum_t  share of memories whose concept is t  x  share of memories whose trigger is followed by t
    """
    share = (concepts == following).double().mean().item()
    size = int(max(concepts.max(), following.max())) + 1
    chance = (concepts.bincount(minlength=size).double() @ following.bincount(minlength=size).double()).item() / len(concepts) ** 2
    return share, (share * (1 - share) / len(concepts)) ** 0.5, chance
