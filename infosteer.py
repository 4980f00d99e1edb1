"""InfoSteer: steer how much of its feed-forward memory a language model uses (Deng, Chang and Chen,
"Steering Information Utility in Key-Value Memory for Language Model Post-Training", NeurIPS 2025).

    eq. 3    a feed-forward layer is a memory                          key_coefficients, recall
    eq. 4    int: the forward pass raises the smallest coefficients    intervene
    eq. 5    reg: the loss rewards a more uniform key distribution     key_entropy
    B.1      semantic, activation: int or reg, with a strength for each group of memories
    B.2      surrogate, surrogate-entropy: steering by what a memory says when decoded alone
    rivals   dropout, knowledge-entropy, resuscitation: not in the paper, to compare with

This file is the method and nothing else: tensors in, tensors out. `model.py` steers in one place,
`KeyValueMemory`. Shapes: d_m memories, d model width, V vocabulary, [...] any number of tokens.
"""
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from data.clusters import spherical_kmeans, split_groups, token_groups

# ------------------------------------------------ the paper's equations, then what rivals them


def key_coefficients(gate, up, act):
    """k_i = act(gate_i) * up_i (section 4.4): h W_gate, h W_up, both [..., d_m] -> k [..., d_m]."""
    return act(gate) * up


def gelu_tanh(x):                      # Gemma's activation; Llama's and Qwen's is torch's silu
    return F.gelu(x, approximate="tanh")


def recall(k, v):
    """FFN(h) = sum_i k_i v_i (eq. 3): coefficients k [..., d_m], vectors v [d_m, d] -> [..., d]."""
    return k @ v


def intervene(k, p: float = 0.01, alpha: float = 1.0, rank_by: str = "magnitude", dice=None):
    """Raise the smallest key coefficients (eq. 4): k [..., d_m] -> [..., d_m].

        k_s <- alpha * mean_i(k_i)      for the max(1, round(p * d_m)) smallest k_s of each token

    The mean is taken before the update. The gradient flows through the mean, not through replaced
    entries. The paper does not say what "smallest" means once k has both signs, as in gated layers:
    - "magnitude": the smallest |k| become alpha * mean|k| and keep their sign. A zero counts as
      positive. These are the idle memories, which the method means to wake. The best outside
      support for this reading is Kim et al. 2025, whom the paper cites: see `resuscitation`.
    - "value": the smallest k become alpha * mean(k). This is the literal reading. It picks the most
      negative coefficients. These belong to very active memories. Report both settings.
    - "random": as many k become alpha * mean|k| and keep their sign. This is no reading but a
      control: what it does as well has nothing to do with idle memories. Without `dice` k stays.

    >>> intervene(torch.tensor([4., -1., 3., -8.]), p=0.25)                       # mean|k| = 4
    tensor([ 4., -4.,  3., -8.])
    >>> intervene(torch.tensor([4., -1., 3., -8.]), p=0.25, rank_by="value")      # mean(k) = -0.5
    tensor([ 4.0000, -1.0000,  3.0000, -0.5000])
    """
    if p == 0 or rank_by == "random" and dice is None:
        return k
    size = k if rank_by == "value" else k.abs()                                    # [..., d_m]
    rank = uniform(dice, k) if rank_by == "random" else size
    n = max(1, round(p * k.shape[-1]))
    smallest = rank.topk(n, dim=-1, largest=False, sorted=False).indices           # [..., n]
    mean = size.mean(-1, keepdim=True, dtype=accumulate(k)).to(k.dtype)            # [..., 1]
    raised = (alpha * mean).expand(smallest.shape)                                 # [..., n]
    if rank_by != "value":
        raised = torch.where(k.gather(-1, smallest) < 0, -raised, raised)
    return k.scatter(-1, smallest, raised)


def key_entropy(k, normalise: str = "magnitude"):
    """Entropy of the key distribution (eq. 5): k [..., d_m] -> [...] in nats, from 0 (one memory)
    to log d_m (all alike). For one token, this value is the paper's information flux (section 6).

        H = -sum_i q_i log q_i      q_i = |k_i| / sum_j |k_j|      "magnitude"
                                    q = softmax(k)                 "softmax", the other reading

    The paper writes k / sum k, which needs k >= 0. Sums are kept in fp32 (fp64 for fp64 input). If
    all k are 0, they count as uniform.

    >>> key_entropy(torch.tensor([[1., -1., 1., -1.], [0., 5., 0., -5.]]))        # log 4, log 2
    tensor([1.3863, 0.6931])
    """
    if normalise == "softmax":
        log_q = k.to(accumulate(k)).log_softmax(-1)                                # [..., d_m]
        return -(log_q.exp() * log_q).sum(-1)
    q = shares(k)                                                                  # [..., d_m]
    return -(q * q.clamp_min(torch.finfo(q.dtype).tiny).log()).sum(-1)


def accumulate(k):
    """The dtype in which sums over k are kept: fp32, or fp64 for fp64."""
    return torch.promote_types(k.dtype, torch.float32)


def magnitudes(k):
    """|k| in the dtype that sums are kept in, never quite 0, since log 0 is not a number."""
    return k.abs().to(accumulate(k)).clamp_min(torch.finfo(accumulate(k)).tiny)


def shares(k):
    """q_i = |k_i| / sum_j |k_j|, the key distribution: [..., d_m] -> [..., d_m]."""
    size = magnitudes(k)
    return size / size.sum(-1, keepdim=True)


def dropout(k, p: float, dice=None):
    """k_i m_i / (1 - p), where m_i is 0 with probability p, else 1 (Srivastava et al. 2014):
    k [B, T, d_m] -> [B, T, d_m]. Without dice, as at test time, k stays."""
    return k if dice is None else k * (uniform(dice, k) >= p) / max(1 - p, 1e-9)


def knowledge_entropy(k, usage):
    """-sum_i q_i log qbar_i in nats: k [..., d_m] -> [...]. usage [d_m] is qbar, the mean of q over
    the tokens of an optimizer step, a constant. So over these tokens the mean has the value and the
    gradient of H(qbar), which grows as other tokens use other memories. It is the knowledge entropy
    of Kim et al. 2025, who only measure it, and average |k| in place of q."""
    return -(shares(k) * usage.clamp_min(torch.finfo(usage.dtype).tiny).log()).sum(-1)


def uniform(dice, k):
    """Numbers in [0, 1) for k [B, T, d_m]: hashes (SplitMix64, Steele et al. 2014) of dice [B, n],
    position and memory. They are the same on any machine, when computed again, and in any pass."""
    at = [torch.arange(n, device=k.device) for n in k.shape[-2:]]                  # [T], [d_m]
    x = 0
    for number in (*dice.T[..., None, None], at[0][:, None], at[1]):
        x = x + number - 0x61C8864680B583EB
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            x = (x ^ x >> shift & 2**(64 - shift) - 1) * factor                    # [B, T, d_m]
    return (x >> 40 & 2**24 - 1) / 2**24


# ---------------------------------------------------------------------------------- settings

RANKINGS, NORMALISATIONS, GENERIC = ("magnitude", "value"), ("magnitude", "softmax"), ("int", "reg")
DIVERGENCES, COUNT = ("target", "memory"), (1, 2**20)
LIMITS = {"p": (0, 1), "beta_max": (0, 1e30), "groups": COUNT, "subgroups": COUNT, "buckets": COUNT}
STRENGTHS = ("p", "alpha", "lam", "beta_max", "gamma", "lambda_1", "lambda_2")


@dataclass(frozen=True)
class Steering:
    """How to steer. p, alpha and lam have the paper's defaults (section 5.1); all other defaults
    are ours. Raises ValueError for a setting outside its range."""

    method: str = "none"
    p: float = 0.01                    # int, dropout, resuscitation: the fraction of the memories
    alpha: float = 1.0                 # int, resuscitation: it becomes alpha times the mean
    rank_by: str = "magnitude"         # int: what "smallest" means, see `intervene`
    lam: float = 0.01                  # reg: lambda of eq. 5; a negative one concentrates the keys
    normalise: str = "magnitude"       # reg: how k becomes a distribution, see `key_entropy`
    generic: str = "int"               # semantic, activation: the method whose change is scaled
    groups: int = 16                   # semantic, activation: groups of memories in a layer
    subgroups: int = 4                 # activation: groups within each of those
    beta_max: float = 4.0              # semantic, activation: the largest strength of a group
    gamma: float = 0.1                 # surrogate: growth of k_i per standard deviation of score
    lambda_1: float = 1.0              # surrogate: weight of a memory's entropy in its score
    lambda_2: float = 1.0              # surrogate: weight of its divergence from the target
    divergence: str = "target"         # surrogate: which way round it is, see `divergence`
    buckets: int = 256                 # surrogate-entropy: groups of tokens, `mixture_entropy`
    # The layers that are steered, from 1 as in Table 8, and what differs there: {1: {"p": 0.1}}
    layers: dict[int, dict[str, float]] | None = None
    # What a method found out about each memory, before training or a step: [n_layers, d_m, ...]
    per_memory: torch.Tensor | None = field(default=None, repr=False, compare=False)
    # While training: [B, 3] long, seed, step and row, of which all that is random is drawn
    dice: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        for name, allowed in dict(method=METHODS, rank_by=(*RANKINGS, "random"), generic=GENERIC,
                                  normalise=NORMALISATIONS, divergence=DIVERGENCES).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; "
                                 f"choose one of {', '.join(allowed)}")
        for name in (*STRENGTHS, "groups", "subgroups", "buckets"):
            low, high = LIMITS.get(name, (-1e30, 1e30))
            if not low <= getattr(self, name) <= high:         # NaN fails every comparison
                raise ValueError(f"{name} is {getattr(self, name)}; "
                                 f"it must be a number from {low:g} to {high:g}")
        for layer, strengths in (self.layers or {}).items():
            own = [name for name in STRENGTHS if name in self.settings]
            if not strengths.keys() <= set(own):
                raise ValueError(f"layer {layer} has {', '.join(strengths)}, but the strengths of "
                                 f"{self.method} are {', '.join(own)}")
            self.at(layer - 1)         # a layer's own strengths have the same limits

    @property
    def settings(self) -> dict:
        """The settings that mean something to the method: {"method": ..., ...}."""
        return {name: getattr(self, name)
                for name in ("method", *meaningful(self.method, self.generic))}

    @property
    def drawn(self) -> bool:
        """Is anything of it random, and so drawn from `dice`?"""
        return self.method == "dropout" or "random" in self.settings.values()

    @property
    def name(self) -> str:
        """A short name for folders and tables: Steering("int", p=0.05) -> "int-p0.05"."""
        parts, usual = [self.method], vars(Steering(self.method))
        for name, value in self.settings.items():
            if name == "layers" and value is not None:         # some systems allow no colon
                parts.append("layers" + format_layers(value).replace(":", "@"))
            elif value != usual[name]:
                parts.append(value if isinstance(value, str) else f"{name}{value:g}")
        return "-".join(parts)

    def __str__(self):
        values = {**self.settings, "layers": format_layers(self.layers)}
        return " ".join(f"{name}={values[name]}" for name in self.settings).removeprefix("method=")

    def at(self, layer: int) -> "Steering":
        """The steering of one layer, counted from 0 as in code."""
        if self.layers is not None and layer + 1 not in self.layers:
            return replace(self, method="none", layers=None, per_memory=None)
        strengths = (self.layers or {}).get(layer + 1, {})
        own = None if self.per_memory is None else self.per_memory[layer]
        dice = None if self.dice is None else F.pad(self.dice, (0, 1), value=layer)    # [B, 4]
        return replace(self, **strengths, layers=None, per_memory=own, dice=dice)

    def change(self, k):
        """What the method does in the forward pass of one layer: k [..., d_m] -> [..., d_m]."""
        change = METHODS[self.method].change
        return change(k, self) if change else k

    def measure(self, k):
        """(flux, reward) of one layer: k [..., d_m] -> [...] nats each. The flux is the entropy of
        the key distribution; the reward is what the loss rewards, times lambda, or None."""
        return METHODS[self.method].measure(k, self)


def meaningful(method, generic="int"):
    """The names of the settings that mean something to a method."""
    own = METHODS[method].settings
    inner = METHODS[generic].settings if "generic" in own else ()
    return own + tuple(name for name in inner if name not in own)


def format_layers(layers) -> str:
    """Layers as --layers takes them: {1: {}, 2: {}, 4: {"alpha": 2.0}} -> "1-2,4:alpha=2"."""
    if layers is None:
        return "all"
    ranges = []                                                # [first, last, strengths as text]
    for layer, here in sorted(layers.items()):
        text = "".join(f":{name}={value:g}" for name, value in here.items())
        if ranges and ranges[-1][1:] == [layer - 1, text]:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer, text])
    return ",".join((f"{first}-{last}" if last > first else f"{first}") + text
                    for first, last, text in ranges)


# ------------------------------- Appendix B: what a method finds out about memories beforehand


@dataclass
class Before:
    """What a method may look at before training starts."""

    vectors: Iterable                  # for each layer, its memory vectors [d_m, d]
    decode: torch.Tensor               # the LM head, [V, d]
    keys: Iterable                     # for each development text, k [T, d_m] of every layer
    n_tokens: int                      # in all development texts
    target: torch.Tensor               # [V]  how often each token stands in training responses
    seed: int


def strengths_by_group(steering, before):
    """B.1: the strength of each memory's group, [n_layers, d_m]. Memories are grouped by their
    vectors; `activation` then splits each group by which tokens activate its memories."""
    n, usage, patterns, start = torch.tensor(before.n_tokens), 0, [], 0
    sampled = torch.linspace(0, n - 1, min(512, before.n_tokens)).long()   # tell memories apart
    for keys in before.keys:
        k = torch.stack([layer.float().abs() for layer in keys])                   # [L, T, d_m]
        here = sampled[(sampled >= start) & (sampled < start + k.shape[1])] - start
        patterns.append(k[:, here.to(k.device)].transpose(1, 2).to(torch.bfloat16))
        usage, start = usage + k.sum(1) / n, start + k.shape[1]                    # [L, d_m]
    patterns, strengths = torch.cat(patterns, 2), []                               # [L, d_m, some]
    for layer, v in enumerate(before.vectors):                                     # v: [d_m, d]
        groups, _ = spherical_kmeans(v, steering.groups, before.seed)              # [d_m]
        if steering.method == "activation":
            groups = split_groups(groups, patterns[layer], steering.subgroups, before.seed)
        strengths.append(group_strengths(groups, usage[layer], steering.at(layer).beta_max))
    return torch.stack(strengths)


def amplification_by_surrogate(steering, before):
    """B.2: the factor 1 + gamma S(phi_i) of each memory, [n_layers, d_m]."""
    target, factors = before.target + (steering.divergence == "memory"), []    # log 0 is infinite
    for layer, v in enumerate(before.vectors):                                     # v: [d_m, d]
        both = [(entropy(log_p), divergence(target / target.sum(), log_p, steering.divergence))
                for _, log_p in surrogates(v, before.decode)]
        h, kl, own = *map(torch.cat, zip(*both)), steering.at(layer)               # h, kl: [d_m]
        factors.append(1 + own.gamma * relevance(h, kl, own.lambda_1, own.lambda_2))
    return torch.stack(factors)


def resuscitation(steering, before):
    """Kim et al. 2025, "Knowledge Entropy Decay": the rows of key_up are scaled, once, before
    training, by factors [n_layers, d_m]:

        alpha * mean(usage) / usage_i    for the max(1, round(p * d_m)) least used, 1 for others

    k_i is linear in its row, so usage, the mean |k_i| over development texts, changes as by eq. 4.
    In their code p is the ratio, alpha the amplifying factor, and k that of a gated model, too."""
    usage = sum(torch.stack([k.float().abs().sum(0) for k in keys]) for keys in before.keys)
    usage = usage.clamp_min(1e-6 * usage.mean(-1, keepdim=True))                   # [L, d_m]
    return torch.stack([intervene(of, s.p * (s.method != "none"), s.alpha) / of
                        for of, s in zip(usage, map(steering.at, range(len(usage))))])


def merged_surrogates(steering, before):
    """B.2: P_i summed over groups of like tokens, [n_layers, d_m, C], see `mixture_entropy`."""
    bucket, merged = token_groups(before.decode, steering.buckets, before.seed), []
    for v in before.vectors:                                                       # [d_m, d]
        says = torch.zeros(len(v), int(bucket.max()) + 1, device=v.device)         # [d_m, C]
        for here, log_p in surrogates(v, before.decode):
            says[here].index_add_(1, bucket, log_p.exp())
        merged.append(says)
    return torch.stack(merged)


def group_strengths(groups, usage, beta_max: float):
    """beta_g = clip(mean usage of all groups / usage of g, 0, beta_max) of each memory's group:
    groups [d_m], usage = mean |k_i| [d_m] -> [d_m]. The paper gives no rule; this one is ours."""
    sizes = groups.bincount()                                                      # [groups]
    of_group = usage.new_zeros(len(sizes)).float().index_add_(0, groups, usage.float()) / sizes
    return (of_group.mean() / of_group.clamp_min(1e-37)).clamp(0, beta_max)[groups]


def surrogates(v, decode):
    """What each memory says when decoded alone: P_i = softmax(phi_i) with phi_i = v_i W_decode.
    v [n, d], decode [V, d] -> pieces (slice of memories, log P [piece, V] fp32). A piece at a time:
    all of a layer would be d_m x V numbers, 8 GB in fp32 for a model of 1.5B parameters."""
    rows = max(1, (2**24 if v.device.type == "cpu" else 2**28) // len(decode))
    for start in range(0, len(v), rows):
        here = slice(start, min(start + rows, len(v)))
        yield here, (v[here] @ decode.T).float().log_softmax(-1)


def entropy(log_p):
    """H(P) in nats of log P [..., V] -> [...]."""
    return -(log_p.exp() * log_p).sum(-1)


def divergence(target, log_p, of: str = "target"):
    """KL(target || P) in nats; of="memory": KL(P || target), as "divergence from the target" reads,
    infinite where the target is 0. target [V] sums to 1, log P [..., V] -> [...]."""
    if of == "memory":
        return -entropy(log_p) - log_p.exp() @ target.log()
    return -torch.special.entr(target).sum() - log_p @ target


def relevance(entropies, divergences, lambda_1: float = 1.0, lambda_2: float = 1.0):
    """S(phi_i) = -lambda_1 H(P_i) - lambda_2 `divergence` of P_i of the memories of one layer, both
    [d_m] -> [d_m], standardised to mean 0 and standard deviation 1 (0 where all are alike)."""
    score = -lambda_1 * entropies - lambda_2 * divergences
    score = score - score.mean()
    spread = score.std(correction=0)
    return score / spread if spread > 0 else torch.zeros_like(score)


def mixture_entropy(k, says):
    """Entropy in nats of what the memories say together, M = sum_i khat_i P_i with khat_i =
    |k_i| / sum_j |k_j|: k [..., d_m], says [d_m, C] -> [...], from 0 to log C.

    Two approximations make it affordable. Like tokens are merged into C groups, says[i, c] being
    the sum of P_i over group c: a lower bound, and equal to H(M) for C = V. And P_i is that of the
    model before training. The mixture is our invention, the paper gives no formula for this."""
    with torch.autocast(k.device.type, enabled=False):         # x log x needs more digits than bf16
        a = k.to(accumulate(k)).abs()
        tiny = torch.finfo(a.dtype).tiny
        m = a @ says.to(a.dtype) / a.sum(-1, keepdim=True).clamp_min(tiny)         # [..., C]
        return -(m * m.clamp_min(tiny).log()).sum(-1)


# ----------------------------------------------------------------------- the table of methods


def change_by_group(k, s):
    """k_i + beta_g dk_i, where dk is the change that int would make. reg makes none here."""
    if s.generic == "reg":
        return k
    return torch.lerp(k, intervene(k, s.p, s.alpha, s.rank_by, s.dice), s.per_memory.to(k.dtype))


def only_flux(k, s):
    return key_entropy(k.detach(), s.normalise), None


def flux_is_rewarded(k, s):
    flux = key_entropy(k, s.normalise)
    return flux, flux


def flux_is_rewarded_by_group(k, s):
    """reg moves k_i through the gradient of the entropy, so beta_g scales that gradient."""
    if s.generic == "int":
        return only_flux(k, s)
    return flux_is_rewarded(torch.lerp(k.detach(), k, s.per_memory.to(k.dtype)), s)


@dataclass(frozen=True)
class Method:
    """One row of the table. A new method is a function and a row."""

    settings: tuple[str, ...] = ()     # the fields of Steering that mean something to it
    change: Callable | None = None     # (k [..., d_m], the layer's steering) -> k
    measure: Callable = only_flux      # (k, the layer's steering) -> (flux, reward or None)
    per_memory: Callable | None = None             # (steering, Before) -> [n_layers, d_m, ...]
    scales_keys: bool = False          # once, before training: row i of key_up by its per_memory
    per_step: Callable | None = None   # k -> [..., d_m], whose mean over a step is its per_memory


METHODS = {
    "none": Method(),
    "int": Method(("p", "alpha", "rank_by", "layers"),
                  change=lambda k, s: intervene(k, s.p, s.alpha, s.rank_by, s.dice)),
    "reg": Method(("lam", "normalise", "layers"), measure=flux_is_rewarded),
    "semantic": Method(("generic", "groups", "beta_max", "layers"),
                       change_by_group, flux_is_rewarded_by_group, strengths_by_group),
    "activation": Method(("generic", "groups", "subgroups", "beta_max", "layers"),
                         change_by_group, flux_is_rewarded_by_group, strengths_by_group),
    "surrogate": Method(("gamma", "lambda_1", "lambda_2", "divergence", "layers"),
                        change=lambda k, s: k * s.per_memory.to(k.dtype),
                        per_memory=amplification_by_surrogate),
    "surrogate-entropy": Method(("lam", "buckets", "layers"), per_memory=merged_surrogates,
                                measure=lambda k, s: (key_entropy(k.detach()),
                                                      mixture_entropy(k, s.per_memory))),
    "dropout": Method(("p", "layers"), change=lambda k, s: dropout(k, s.p, s.dice)),
    "knowledge-entropy": Method(("lam", "layers"), per_step=shares, measure=lambda k, s: (
        key_entropy(k.detach()), knowledge_entropy(k, s.per_memory))),
    "resuscitation": Method(("p", "alpha", "layers"), per_memory=resuscitation, scales_keys=True),
}


# ------------------------------------------------------- the same numbers with less memory
# Autograd would keep several copies of k. These functions take the names of the plain ones, which
# stay at hand as `intervene.__wrapped__` and run if this section is deleted.


class KeyCoefficients(torch.autograd.Function):
    """act(gate) would be a quarter of what a memory keeps. It is computed again, which is cheap."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return SLOPES[ctx.act](grad * up, gate), grad * ctx.act(gate), None


SLOPES = {                             # (gradient of act(x), x) -> gradient of x
    F.silu: torch.ops.aten.silu_backward,
    gelu_tanh: functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


@functools.wraps(key_coefficients)
def key_coefficients(gate, up, act):
    return KeyCoefficients.apply(gate, up, act) if act in SLOPES else act(gate) * up


class Intervene(torch.autograd.Function):
    """k'_i = alpha m s_i for the replaced entries R, with m = mean_j(s_j k_j) and s the sign of k
    (1 when ranked by value). The signs outside R are those of k', so k need not be kept.

        dL/dk_j = [j not in R] dL/dk'_j + s_j (alpha / d_m) sum over i in R of s_i dL/dk'_i
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
        pull = ctx.share * (sign * grad.gather(-1, smallest)).sum(-1, keepdim=True)    # [..., 1]
        grad_k = new.sign().mul_(pull).add_(grad) if ctx.magnitude else grad + pull
        return grad_k.scatter_(-1, smallest, sign * pull), None, None, None, None, None


@functools.wraps(intervene)
def intervene(k, p=0.01, alpha=1.0, rank_by="magnitude", dice=None):
    if p == 0 or rank_by == "random" and dice is None:
        return k
    n, magnitude = max(1, round(p * k.shape[-1])), rank_by != "value"
    size = k.detach().abs() if magnitude else k.detach()
    rank = uniform(dice, k) if rank_by == "random" else size
    smallest = rank.topk(n, dim=-1, largest=False, sorted=False).indices           # [..., n]
    mean = size.mean(-1, keepdim=True, dtype=accumulate(k)).to(k.dtype)            # [..., 1]
    sign = torch.ones_like(mean).expand(smallest.shape)                            # [..., n]
    if magnitude:
        sign = torch.where(k.detach().gather(-1, smallest) < 0, -sign, sign)
    return Intervene.apply(k, smallest, sign, mean, alpha, magnitude)


class KeyEntropy(torch.autograd.Function):
    """H = log S - (sum a log a) / S and dH/da_i = (log S - H - log a_i) / S, a = |k|, S = sum a. At
    k_i = 0 the slope is infinite; sign(0) = 0 makes it 0 there."""

    @staticmethod
    def forward(ctx, k):
        entropy, total = (k.new_empty(k.shape[:-1], dtype=accumulate(k)) for _ in range(2))
        for rows, h, s in zip(*pieces(k, entropy, total)):
            a = magnitudes(rows)
            torch.sum(a, -1, out=s)
            h.copy_(s.log() - a.mul_(a.log()).sum(-1) / s)
        ctx.save_for_backward(k, entropy, total)
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        k, entropy, total = ctx.saved_tensors
        grad_k = torch.empty_like(k, memory_format=torch.contiguous_format)        # [..., d_m]
        for rows, out, h, s, g in zip(*pieces(k, grad_k, entropy, total, grad.contiguous())):
            slope = magnitudes(rows).log_()
            torch.sub((s.log() - h)[:, None], slope, out=slope)
            out.copy_(slope.mul_((g / s)[:, None]).mul_(rows.sign()))
        return grad_k


def pieces(k, *others):
    """k [..., d_m] and tensors that go with it, as matching lists of pieces of some tokens each. On
    a CPU a piece stays in the cache, which is three times as fast. Others take all at once."""
    in_cache = k.device.type == "cpu" and not torch.compiler.is_compiling()
    tokens = max(1, 2**18 // k.shape[-1] if in_cache else k[..., 0].numel())
    return [t.reshape(-1, *t.shape[k.dim() - 1:]).split(tokens) for t in (k, *others)]


@functools.wraps(key_entropy)
def key_entropy(k, normalise="magnitude"):
    plain = key_entropy.__wrapped__
    return KeyEntropy.apply(k) if normalise == "magnitude" else plain(k, normalise)
