"""Llama, Qwen and Gemma in one transformer, whose feed-forward layers are key-value memories.

In reading order: configuration, blocks, transformer, loading and saving, decoding. Shapes are of

    B sequences     T tokens         S tokens seen so far     V vocabulary
    d model width   d_m memories     H heads     G key-value heads     D head width
"""
import json
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute

from data import BadInput, read_json, write_whole
from infosteer import gelu_tanh, key_coefficients

# ----------------------------------------------------------------------------------- configuration

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": gelu_tanh}         # by name in config.json

# model_type in config.json -> how the family differs from plain Llama; `defaults` are keys that
# published files leave out. Gemma's RMSNorm multiplies by 1 + w, and stands before and after each
# sublayer; Gemma's embeddings are scaled by sqrt(d).
GEMMA = dict(norm_offset=1.0, four_norms=True, scale_embeddings=True)
GEMMA_DEFAULTS = dict(
    tie_word_embeddings=True, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096)
FAMILIES = {
    "llama": dict(),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, defaults=dict(head_dim=128)),
    "gemma2": dict(**GEMMA, defaults=dict(
        **GEMMA_DEFAULTS, sliding_window_pattern=2,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0)),
    "gemma3_text": dict(**GEMMA, qk_norm=True, defaults=dict(
        **GEMMA_DEFAULTS, sliding_window_pattern=6,
        rope_theta=1_000_000.0, rope_local_base_freq=10_000.0)),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"      # sees the last `window` tokens, or all

# Keys of config.json: kind, least, most, and a default if they may be missing. The limits lie far
# beyond any published model: products of three sizes are still 64-bit numbers.
SIZE, NUMBER = (int, 1, 2**20), (float, 1e-18, 1e18)
KEYS = (
    ("vocab_size hidden_size intermediate_size num_attention_heads", *SIZE),
    ("num_hidden_layers", int, 1, 1000),
    ("num_key_value_heads head_dim sliding_window sliding_window_pattern", *SIZE, None),
    ("max_window_layers", int, 0, 2**20, 28),
    ("rms_norm_eps", *NUMBER, 1e-6),
    ("query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping", *NUMBER, None),
    ("tie_word_embeddings use_sliding_window", bool, 0, 1, False),
    ("attention_bias mlp_bias use_bidirectional_attention quantization_config", bool, 0, 0, False),
)
ROPE_KEYS = {                                              # rope_type -> the numbers it needs
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Config:
    """Sizes and traits of one model, resolved from its `config.json` by `from_dict`."""

    vocab_size: int
    d: int                             # model width
    d_m: int                           # memories per layer
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    act: str
    tied: bool                         # the LM head is the embedding
    layer_types: tuple[str, ...]       # LOCAL or GLOBAL, one per layer
    window: int | None                 # tokens a LOCAL layer sees, itself included
    rope: dict[str, dict]              # layer type -> rope_theta, rope_type, factor, ...
    attn_scale: float
    attn_softcap: float | None = None
    final_softcap: float | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    four_norms: bool = False
    scale_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    raw: dict = field(default_factory=dict, repr=False)    # config.json as it was read

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "Config":
        """Read a `config.json`, classic or newer. Raises BadInput naming the key that is off."""
        traits = dict(FAMILIES[_check(raw.get("model_type"), "model_type", where, FAMILIES)])
        keys = _checked(raw, traits.pop("defaults", {}), where)
        act = "gelu_pytorch_tanh" if "four_norms" in traits else "silu"
        act = keys.get("hidden_activation", keys.get("hidden_act", act))
        d, n_heads = keys["hidden_size"], keys["num_attention_heads"]
        n_kv_heads = keys["num_key_value_heads"] or n_heads
        head_dim = keys["head_dim"] or max(1, d // n_heads)
        if n_heads % n_kv_heads or head_dim % 2:
            raise BadInput(f"{where}: num_attention_heads, {n_heads}, must be a multiple of "
                           f"num_key_value_heads, {n_kv_heads}, and head_dim, {head_dim}, even")
        layer_types, window = _layer_types(keys, where), None
        if LOCAL in layer_types:
            window = _check(keys["sliding_window"], "sliding_window", where, *SIZE)
        return cls(
            vocab_size=keys["vocab_size"], d=d, d_m=keys["intermediate_size"],
            n_layers=keys["num_hidden_layers"], n_heads=n_heads, n_kv_heads=n_kv_heads,
            head_dim=head_dim, norm_eps=keys["rms_norm_eps"],
            act=_check(act, "the activation", where, ACTIVATIONS),
            tied=keys["tie_word_embeddings"], layer_types=layer_types, window=window,
            rope={kind: _rope(keys, kind, where) for kind in sorted(set(layer_types))},
            attn_scale=(keys["query_pre_attn_scalar"] or head_dim) ** -0.5,
            attn_softcap=keys["attn_logit_softcapping"],
            final_softcap=keys["final_logit_softcapping"],
            eos_ids=_ids(raw.get("eos_token_id"), where), raw=raw, **traits)

    @classmethod
    def from_pretrained(cls, folder) -> "Config":
        """Read `config.json`, and more end-of-sequence ids from `generation_config.json`."""
        path, generation = Path(folder, "config.json"), Path(folder, "generation_config.json")
        if not path.is_file():
            there = f"{path}: no such file" if path.parent.is_dir() else f"{folder}: no such folder"
            raise BadInput(f"{there}; a model has config.json, safetensors and tokenizer files")
        config = cls.from_dict(read_json(path), str(path))
        if generation.is_file():
            more = read_json(generation).get("eos_token_id")
            config = config.with_eos(*_ids(more, str(generation)))
        return config

    def with_eos(self, *ids: int) -> "Config":
        """The same configuration, which also stops at these ids."""
        eos = tuple(dict.fromkeys(self.eos_ids + ids))
        if eos == self.eos_ids:
            return self
        raw = {**self.raw, "eos_token_id": eos[0] if len(eos) == 1 else list(eos)}
        return replace(self, eos_ids=eos, raw=raw)


def _check(value, key, where, kind, least=0, most=0):
    """A value of config.json that is one of the names `kind`, or of the type `kind` and within its
    limits. Raises BadInput for any other."""
    if not isinstance(kind, type):
        fits, needed = str(value) in kind, f"known are {', '.join(kind)}"
    else:
        fits = (isinstance(value, (int, kind)) and isinstance(value, bool) == (kind is bool)
                and least <= value <= most)        # NaN is within no limits
        needed = f"a {'whole ' * (kind is int)}number from {least:,} to {most:,} is needed"
        if kind is bool:
            needed = "true or false is needed" if most else "there is no such layer here"
    if not fits:
        raise BadInput(f"{where}: {key} is {value!r}; {needed}")
    return value


def _checked(raw, defaults, where):
    """What config.json says, with every key of KEYS in it and checked."""
    # A null switches a soft cap off; for every other key it means the default.
    given = {key: value for key, value in raw.items()
             if value is not None or key.endswith("_softcapping")}
    keys = {**defaults, **given}
    for names, kind, least, most, *default in KEYS:
        for key in names.split():
            if keys.setdefault(key, *default) is not None or not default:
                _check(keys[key], key, where, kind, least, most)
    return keys


def _layer_types(keys, where):
    """LOCAL or GLOBAL for each layer: listed, or by a pattern (Gemma) or a first layer (Qwen)."""
    n_layers, types = keys["num_hidden_layers"], keys.get("layer_types")
    every = keys["sliding_window_pattern"]
    if types is None and keys["use_sliding_window"]:
        types = [GLOBAL if i < keys["max_window_layers"] else LOCAL for i in range(n_layers)]
    elif types is None:
        types = [LOCAL if every and (i + 1) % every else GLOBAL for i in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers:
        raise BadInput(f"{where}: layer_types must have a type for each of the {n_layers} layers")
    return tuple(_check(kind, "one of layer_types", where, (LOCAL, GLOBAL)) for kind in types)


def _rope(keys, kind, where):
    """The rotary settings of one layer type, from `rope_parameters` or from the classic keys."""
    theta, scaling = keys.get("rope_theta", 10_000.0), keys.get("rope_scaling", {})
    if kind == LOCAL and "rope_local_base_freq" in keys:   # Gemma 3: another base, never scaled
        theta, scaling = keys["rope_local_base_freq"], {}
    scaling = keys.get("rope_parameters", scaling)
    if isinstance(scaling, dict):
        scaling = scaling.get(kind, scaling)
    if not isinstance(scaling, dict):
        raise BadInput(f"{where}: rope_parameters or rope_scaling is {scaling!r}, not an object")
    rope = {"rope_theta": theta, "partial_rotary_factor": 1.0, **scaling}
    rope.setdefault("original_max_position_embeddings", keys.get("max_position_embeddings"))
    name = rope["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
    _check(name, "rope_type", where, ROPE_KEYS)
    _check(rope["partial_rotary_factor"], "partial_rotary_factor", where, float, 1, 1)
    for key in ROPE_KEYS[name]:
        _check(rope.get(key), f"{key} of the rotary embedding", where, *NUMBER)
    return rope


def _ids(value, where):
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_check(i, "eos_token_id", where, int, 0, 2**31) for i in ids)


# ------------------------------------------------------------------------------------------ blocks


class KeyValueMemory(nn.Module):
    """The feed-forward layer, read as an associative memory: FFN(h) = sum_i k_i v_i (eq. 3).

    Memory i has two keys, row i of `key_gate` and row i of `key_up`, and one memory vector v_i,
    column i of `values.weight`. Its key coefficient k_i says how strongly the input h activates
    it (section 4.4 for the gate), and k is what InfoSteer steers.

    Attention has keys and values too. They are others: they belong to tokens, these to the layer.
    """

    def __init__(self, config):
        super().__init__()
        self.key_gate = nn.Linear(config.d, config.d_m, bias=False)
        self.key_up = nn.Linear(config.d, config.d_m, bias=False)
        self.values = nn.Linear(config.d_m, config.d, bias=False)
        self.act = ACTIVATIONS[config.act]

    def forward(self, h, steering=None):                                       # h: [B, T, d]
        k = key_coefficients(self.key_gate(h), self.key_up(h), self.act)       # [B, T, d_m]
        flux = reward = None
        if steering is not None:
            k = steering.change(k)     # methods that act in the forward pass change k here (eq. 4)
            flux, reward = steering.measure(k)     # [B, T] nats; the loss takes the reward (eq. 5)
        return self.values(k), flux, reward        # [B, T, d]   sum_i k_i v_i   (eq. 3)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + w), computed in fp32. `offset` is 1 in Gemma."""

    def __init__(self, d, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.offset, self.eps = config.norm_offset, config.norm_eps

    def forward(self, x):                                                      # [..., d]
        y = F.rms_norm(x.float(), self.weight.shape, self.offset + self.weight.float(), self.eps)
        device = x.device.type         # under autocast, cast once for all the layers that read it
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return y.to(torch.get_autocast_dtype(device) if autocast else x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions; H query heads share G key-value heads (GQA)."""

    def __init__(self, config):
        super().__init__()
        d, D = config.d, config.head_dim
        self.query = nn.Linear(d, config.n_heads * D, bias=config.qkv_bias)
        self.key = nn.Linear(d, config.n_kv_heads * D, bias=config.qkv_bias)
        self.value = nn.Linear(d, config.n_kv_heads * D, bias=config.qkv_bias)
        self.output = nn.Linear(config.n_heads * D, d, bias=False)
        self.query_norm = RMSNorm(D, config) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(D, config) if config.qk_norm else nn.Identity()
        self.head_dim, self.scale, self.softcap = D, config.attn_scale, config.attn_softcap

    def forward(self, x, view, cache=None):                                    # x: [B, T, d]
        B, T, _ = x.shape
        q = self.query_norm(self.query(x).view(B, T, -1, self.head_dim))       # [B, T, H, D]
        k = self.key_norm(self.key(x).view(B, T, -1, self.head_dim))           # [B, T, G, D]
        v = self.value(x).view(B, T, -1, self.head_dim)                        # [B, T, G, D]
        q, k = rotate(q, view.cos, view.sin), rotate(k, view.cos, view.sin)
        if cache is not None:                      # of all tokens so far: both [B, S, G, D]
            k, v = (extend(seen, new, view) for seen, new in zip(cache, (k, v)))
        if view.texts is None:
            y = self.read(q, k, v, view.mask)                                  # [B, T, H D]
        else:                                      # only attention reads each text as a whole
            parts = []
            for at in view.texts:                                              # [b, t] of the N
                qkv = (tensor[0].index_select(0, at.flatten()).unflatten(0, at.shape)
                       for tensor in (q, k, v))
                mask = None if view.mask is None else view.mask[..., :at.shape[1], :at.shape[1]]
                parts.append(self.read(*qkv, mask).flatten(0, 1))              # [b t, H D]
            y = torch.cat(parts).index_select(0, view.home)[None]              # [1, N, H D]
        return self.output(y)                                                  # [B, T, d]

    def read(self, q, k, v, mask):
        """q [B, T, H, D], k and v [B, S, G, D] -> [B, T, H D]"""
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))             # heads before tokens
        return attend(q, k, v, mask, self.scale, self.softcap).transpose(1, 2).flatten(2)


def attend(q, k, v, mask, scale, softcap):
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]. mask [B or 1, 1, T, S] is True where a
    token may look; None is plain causal attention."""
    (B, H, T, D), groups = q.shape, q.shape[1] // k.shape[1]
    if softcap is not None:            # Gemma 2 squashes its scores, which no fused kernel does
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # [B, H, S, D]
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)   # [B, H, T, S]
        return scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v
    # On a CPU the fused kernel's backward pass is slow in bf16. At this length plain products take
    # a quarter of its time, and the step 0.85 to 0.89 of it.
    plain = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and T <= 512
    if plain and mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    if not plain and (mask is None or groups == 1):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1)
    # No fast kernel takes a mask and shared heads: queries of one key head become more tokens.
    q, mask = q.reshape(B, -1, groups * T, D), mask.repeat(1, 1, groups, 1)
    if plain:
        bias = q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        return (((q * scale) @ k.transpose(-1, -2) + bias).softmax(-1) @ v).view(B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).view(B, H, T, D)


def rotate(x, cos, sin):
    """Rotary position embedding (RoPE): turn each pair (x_i, x_{i + D/2}) by its position's angle.
    x [B, T, H, D], cos and sin [B or 1, T, 1, D/2] -> [B, T, H, D]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def inverse_frequencies(rope, head_dim, device):
    """Radians per position of each pair of dimensions, [D/2], fp32."""
    pairs = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    turn = rope["rope_theta"] ** -pairs
    if rope["rope_type"] == "linear":
        turn = turn / rope["factor"]
    if rope["rope_type"] == "llama3":  # divide slow turns by the factor, keep fast ones, blend
        turns = rope["original_max_position_embeddings"] * turn / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        turn = turn * (keep + (1 - keep) / rope["factor"])
    return turn


@dataclass
class View:
    """What the tokens of one forward pass see in layers of one type: shared by those layers."""

    cos: torch.Tensor                  # [B or 1, T, 1, D/2]
    sin: torch.Tensor
    mask: torch.Tensor | None          # [B or 1, 1, T, S]; None: causal, with the fastest kernels
    positions: torch.Tensor | None     # [B or 1, T] places in the sequence; None: 0, 1, 2, ...
    seen: int                          # S: tokens in the longest sequence so far
    texts: list[torch.Tensor] | None   # of merged texts: [b, t] numbers of tokens, some texts each
    home: torch.Tensor | None          # [N] a place of each token among all those


def make_view(config, kind, positions, seen, T, device, texts=None, home=None):
    """The `View` of the layers of one type."""
    at = torch.arange(T, device=device)[None] if positions is None else positions  # [B or 1, T]
    turn = inverse_frequencies(config.rope[kind], config.head_dim, device)     # [D/2]
    angle = at[:, :, None, None] * turn                                        # [B or 1, T, 1, D/2]
    if texts is not None:
        places = torch.cat([at[:, :part.shape[1]].expand_as(part).flatten() for part in texts])
        angle = angle[:, places[home]]                                         # [1, N, 1, D/2]
    window = config.window if kind == LOCAL and seen > config.window else None
    mask = None
    if window or positions is not None or config.attn_softcap:
        back = at[:, None, :, None] - torch.arange(seen, device=device)        # [B or 1, 1, T, S]
        mask = (back >= 0) & (back < window) if window else back >= 0
    return View(angle.cos(), angle.sin(), mask, positions, seen, texts, home)


def merge(texts):
    """Texts that begin alike, without what they repeat and without padding, for `hidden`. A token
    sees only those before it, so where these are the same, so is all that is computed from it.

    Lists of ids -> tokens [1, N]; spread [B, T], the number among the N of each token of each text.
    Behind a text's end it is 0, which no token of the text sees.
    >>> merge([[5, 6, 7], [5, 6, 8], [5, 9]])
    (tensor([[5, 6, 7, 8, 9]]), tensor([[0, 1, 2],
            [0, 1, 3],
            [0, 4, 0]]))
    """
    numbers, spread = {}, []           # (number of the token before, id) -> number
    for ids in texts:
        row = [-1]
        for i in ids:
            row.append(numbers.setdefault((row[-1], i), len(numbers)))
        spread.append(torch.tensor(row[1:]))
    return torch.tensor([[i for _, i in numbers]]), pad_sequence(spread, batch_first=True)


def extend(seen, new, view):
    """Write new keys or values [B, T, G, D] into the cache [B, longest, G, D] at their positions,
    and return what is seen: [B, S, G, D]."""
    if view.positions is None:
        seen[:, :view.seen] = new
    else:
        rows = torch.arange(len(new), device=new.device)[:, None]
        seen[rows, view.positions] = new.to(seen.dtype)
    return seen[:, :view.seen]


class Block(nn.Module):
    """x + attention(norm(x)), then x + memory(norm(x)); Gemma also normalises what is added."""

    def __init__(self, config):
        super().__init__()
        after = (lambda: RMSNorm(config.d, config)) if config.four_norms else nn.Identity
        self.attention_norm, self.attention = RMSNorm(config.d, config), Attention(config)
        self.after_attention = after()
        self.memory_norm, self.memory = RMSNorm(config.d, config), KeyValueMemory(config)
        self.after_memory = after()

    def forward(self, x, view, steering=None, cache=None):                     # x: [B, T, d]
        x = x + self.after_attention(self.attention(self.attention_norm(x), view, cache))
        answer, flux, reward = self.memory(self.memory_norm(x), steering)      # [B, T, d], [B, T]
        return x + self.after_memory(answer), flux, reward


# ------------------------------------------------------------------------------------- transformer


class Transformer(nn.Module):
    """A decoder. `from_pretrained` loads one; `Transformer(config).initialise(seed)` is new."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding.from_pretrained(         # not drawn: loaded, or `initialise`
            torch.empty(config.vocab_size, config.d), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d, config)
        self.head = None if config.tied else nn.Linear(config.d, config.vocab_size, bias=False)

    def forward(self, tokens, steering=None):
        """tokens [B, T] -> logits [B, T, V] in fp32."""
        return self.logits(self.hidden(tokens, steering)[0])

    def hidden(self, tokens, steering=None, positions=None, cache=None, checkpoint=False,
               seen=None, spread=None):
        """Everything but the LM head: tokens [B, T] -> (hidden states [B, T, d], flux, reward).
        Flux and reward are [n_layers, B, T] in nats; the reward is 0 where a method has none.

        steering     an `infosteer.Steering` or `Watch`; None: the plain model, flux and reward None
        positions    [B or 1, T] places of the tokens in their sequences; None: 0, 1, 2, ...
                     Padding goes on the right, where causal attention cannot see it
        cache        from `new_cache`; the tokens' keys and values are written into it
        checkpoint   keep only each block's input for the backward pass and compute the rest again
        seen         tokens in the longest sequence so far; None: a GPU has to be waited for
        spread       of `merge`, as tokens then are: [1, N], and so is all that is returned
        """
        config, T = self.config, (tokens if spread is None else spread).shape[1]
        texts = home = None
        if spread is not None:         # a few texts at a time, as long as the longest of them
            texts = [part[:, :1 + int(part[:, 1:].any(0).sum())] for part in spread.split(8)]
            number = torch.cat([part.flatten() for part in texts])             # [M] of each place
            home = torch.arange(len(number), device=tokens.device)
            home = home.new_full(tokens.shape[1:], len(home)).scatter_reduce(
                0, number, home, "amin")           # [N] the first place; that of 0 is no padding
        x = self.embed(tokens)                                                 # [B, T, d]
        if config.scale_embeddings:    # by a number that is rounded as the weights are
            x = x * float(torch.tensor(config.d ** 0.5, dtype=x.dtype))
        seen = T if positions is None else seen or int(positions.max()) + 1
        views = {kind: make_view(config, kind, positions, seen, T, tokens.device, texts, home)
                 for kind in config.rope}
        fluxes, rewards = [], []
        for layer, (block, kind) in enumerate(zip(self.blocks, config.layer_types)):
            here = x, views[kind], steering and steering.at(layer), cache and cache[layer]
            run = partial(recompute, block, use_reentrant=False) if checkpoint else block
            x, flux, reward = run(*here)
            fluxes.append(flux)
            rewards.append(torch.zeros_like(flux) if steering and reward is None else reward)
        measured = (torch.stack(fluxes), torch.stack(rewards)) if steering else (None, None)
        return self.norm(x), *measured

    def predict(self, tokens, at, steering=None, checkpoint=False, spread=None):
        """What training needs, in one pass: tokens [B, T], at [S] places of the flattened tokens
        -> (logits [S, V] of these places alone, flux, reward as in `hidden`)."""
        hidden, flux, reward = self.hidden(tokens, steering, checkpoint=checkpoint, spread=spread)
        return self.logits(hidden.flatten(0, 1)[at]), flux, reward

    @torch.no_grad()
    def totals(self, tokens, real, what):
        """The sum over tokens of what(k) [..., d_m], which a method may have to know before a step:
        tokens [B, T], real [B, T] (False on padding) -> [n_layers, d_m]."""
        device = self.embed.weight.device
        real = real.to(device)[..., None]
        look = SimpleNamespace(at=lambda layer: look, change=lambda k: k,
                               measure=lambda k: ((what(k) * real).sum((0, 1)), None))
        return self.hidden(tokens.to(device), look)[1]

    @property
    def decode(self):
        """The LM head's weight, W_decode: [V, d]."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden):
        """The LM head: hidden states [..., d] -> logits [..., V] in fp32."""
        logits = F.linear(hidden, self.decode).float()
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def initialise(self, seed: int = 0) -> "Transformer":
        """Draw new weights: normal(0, 0.02) for matrices, no biases, neutral norms -> self."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
                else:
                    weight.fill_(0 if name.endswith("bias") else 1 - self.config.norm_offset)
        return self

    # ------------------------------------------------------------------------- loading, saving

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "Transformer":
        """Load a checkpoint folder as published: config.json beside model.safetensors or its
        indexed shards. Raises BadInput for a file, name, shape or number format that does not fit.
        The files are memory-mapped: each tensor is moved once, and the peak is the weights."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(Config.from_pretrained(folder))
        expected = {theirs: (ours, list(weight.shape)) for ours, theirs, weight in model._named()}
        files = _open(weight_files(folder))        # checkpoint name -> the open file it is in
        found = {name: file.get_slice(name) for name, file in files.items()}
        tied = model.head is None and found.pop("lm_head.weight", None) is not None    # stored too
        _compare(folder, expected, found)
        state = {expected[name][0]: files[name].get_tensor(name).to(device, dtype, copy=True)
                 for name in found}
        if tied:
            head = files["lm_head.weight"].get_tensor("lm_head.weight").to(device, dtype)
            if not torch.equal(head, state["embed.weight"]):
                raise BadInput(f"{folder}: config.json ties the LM head to the embedding, but "
                               "lm_head.weight differs; set tie_word_embeddings to false to use it")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder) -> None:
        """Write config.json and model.safetensors under the published names, for any tool."""
        key = "dtype" if "dtype" in self.config.raw else "torch_dtype"
        config = {**self.config.raw, key: str(self.embed.weight.dtype).removeprefix("torch.")}
        weights = {theirs: weight.detach() for _, theirs, weight in self._named()}
        save_tensors(weights, Path(folder, "model.safetensors"), {"format": "pt"})
        write_whole(Path(folder, "config.json"), json.dumps(config, indent=2) + "\n")

    def _named(self):
        """(our name, checkpoint name, parameter) for every parameter."""
        table = {**NAMES, **(GEMMA_NAMES if self.config.four_norms else {})}
        ours_to_theirs = {ours: theirs for theirs, ours in table.items()}
        for ours, weight in self.named_parameters():
            module, _, kind = ours.rpartition(".")
            layer = module.split(".")[1] if module.startswith("blocks.") else ""
            theirs = ours_to_theirs[module.replace(f".{layer}.", ".{}.", 1) if layer else module]
            yield ours, f"{theirs.format(layer)}.{kind}", weight

    # ------------------------------------------------------------------------------- decoding

    def new_cache(self, B: int, longest: int):
        """Room for keys and values: for each layer two tensors [B, longest, G, D]."""
        shape = (B, longest, self.config.n_kv_heads, self.config.head_dim)
        zeros = self.embed.weight.new_zeros
        return [(zeros(shape), zeros(shape)) for _ in self.blocks]

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens: int, steering=None, cache_bytes: int = 2 << 30,
                 max_batch: int = 256, prefill_tokens=None, done=lambda n: None) -> list[list[int]]:
        """Continue each prompt greedily -> only the new ids, in the order of the prompts.

        A row ends after max_new_tokens or with the first of `config.eos_ids`. At most `max_batch`
        prompts are decoded at a time, whose key-value cache takes at most `cache_bytes`; a longer
        prompt is decoded alone. One pass reads about `prefill_tokens`; None: what caches hold.
        `done(n)` is called as rows finish. Raises BadInput for an empty prompt or a foreign id.
        """
        config, weight = self.config, self.embed.weight
        for row, prompt in enumerate(prompts):
            if not prompt or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
                raise BadInput(f"prompt {row} is empty or not of this model's tokenizer; "
                               f"ids from 0 to {config.vocab_size - 1} are needed")
        prefill_tokens = prefill_tokens or (8192 if weight.device.type == "cuda" else 1024)
        room = 2 * config.n_layers * config.n_kv_heads * config.head_dim * weight.element_size()
        # The largest batch comes first: if memory is short, it shows now.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        outputs = [[] for _ in prompts]
        while order and max_new_tokens > 0:
            row_bytes = room * (len(prompts[order[0]]) + max_new_tokens)
            size = max(1, min(max_batch, cache_bytes // row_bytes))
            batch, order = order[:size], order[size:]
            self._generate_batch([prompts[i] for i in batch], [outputs[i] for i in batch],
                                 max_new_tokens, steering, prefill_tokens, done)
        return outputs

    def _generate_batch(self, prompts, outputs, max_new_tokens, steering, prefill_tokens, done):
        """Decode one batch, the longest prompt first, and append the new ids to `outputs`."""
        device, eos, longest = self.embed.weight.device, set(self.config.eos_ids), len(prompts[0])
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)         # [B]
        cache = self.new_cache(len(prompts), longest + max_new_tokens)
        x = self._read(prompts, lengths, cache, steering, prefill_tokens)      # [B, d]
        if not x.isfinite().all():
            raise BadInput("the model's numbers overflow; are its weights right, and --dtype?")
        for step in range(max_new_tokens):
            new = self.logits(x).argmax(-1)                                    # [B]
            ids = new.tolist()
            for output, i in zip(outputs, ids):
                output.append(i)
            alive = [row for row, i in enumerate(ids) if i not in eos]
            done(len(ids) - len(alive))
            if not alive or step == max_new_tokens - 1:
                return done(len(alive))
            if len(alive) < len(ids):  # finished rows leave the batch
                outputs, keep = [outputs[row] for row in alive], torch.tensor(alive, device=device)
                cache = [(k[keep], v[keep]) for k, v in cache]
                new, lengths = new[keep], lengths[keep]
            at = (lengths + step)[:, None]                                     # [B, 1]
            x = self.hidden(new[:, None], steering, at, cache, seen=longest + step + 1)[0][:, 0]

    def _read(self, prompts, lengths, cache, steering, prefill_tokens):
        """Read prompts into the cache -> the hidden state at the last token of each, [B, d]."""
        device, B = lengths.device, len(prompts)
        shared, limit = 0, len(prompts[-1]) - 1            # each keeps a token of its own
        if B > 1:
            first, last = min(prompts), max(prompts)       # all others lie between them
            shared = next((i for i in range(limit) if first[i] != last[i]), limit)
        if shared:                     # what all prompts begin with is read once
            tokens = torch.tensor([prompts[0][:shared]], device=device)        # [1, shared]
            self.hidden(tokens, steering, cache=[(k[:1], v[:1]) for k, v in cache])
            for seen in (seen for layer in cache for seen in layer):
                seen[1:, :shared] = seen[:1, :shared]
        rest = pad_sequence([torch.tensor(prompt[shared:]) for prompt in prompts], batch_first=True)
        x, start = [], 0
        while start < B:               # some rows at a time, of about the same length
            T = len(prompts[start]) - shared
            rows = slice(start, start + max(1, prefill_tokens // T))
            at = torch.arange(shared, shared + T, device=device)[None] if shared else None
            part = [(k[rows], v[rows]) for k, v in cache]
            tokens = rest[rows, :T].to(device)                                 # [rows, T]
            hidden, *_ = self.hidden(tokens, steering, at, part, seen=shared + T)
            last = lengths[rows] - shared - 1                                  # [rows]
            x.append(hidden[torch.arange(len(hidden), device=device), last])
            start = rows.stop
        return torch.cat(x)

    @torch.no_grad()
    def log_likelihood(self, prompts, continuations, steering=None, batch_tokens: int = 8192,
                       done=lambda n: None) -> list[float]:
        """log P(continuation | prompt) in nats, the sum over its tokens, for each pair of id lists.
        What several texts begin with is read once, as an item's prompt for all its options."""
        texts = [[*prompt, *continuation[:-1]]
                 for prompt, continuation in zip(prompts, continuations, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: (-len(prompts[i]), texts[i]))
        scores = [0.0] * len(texts)
        while order:
            size, longest = 0, 0       # of about the same length; an item's options are neighbours
            for i in order:
                longest = max(longest, len(texts[i]))
                if size and (size + 1) * longest > batch_tokens:
                    break
                size += 1
            batch, order = order[:size], order[size:]
            tokens, spread = merge([texts[i] for i in batch])                  # [1, N], [B, T]
            asked = [(spread[row, place].item(), i, token) for row, i in enumerate(batch)
                     for place, token in enumerate(continuations[i], len(prompts[i]) - 1)]
            places, owners, targets = (list(column) for column in zip(*asked))
            needed, of = torch.tensor(places).unique(return_inverse=True)      # by the head
            tokens, spread, needed = (x.to(self.embed.weight.device)
                                      for x in (tokens, spread, needed))
            hidden = self.hidden(tokens, steering, spread=spread)[0][0]        # [N, d]
            logits = self.logits(hidden[needed])                               # [needed, V]
            for i, score in zip(owners, logits.log_softmax(-1)[of, targets].tolist()):
                scores[i] += score
            if not logits.isfinite().all():
                raise BadInput("the model's numbers overflow; are its weights right, and --dtype?")
            done(len(batch))
        return scores


# -------------------------------------------------------------------------------- checkpoint files

# Name in the checkpoint -> name here. The feed-forward rows are the lesson: a projection is a set
# of keys or of memory vectors.
NAMES = {
    "model.embed_tokens": "embed",
    "model.layers.{}.input_layernorm": "blocks.{}.attention_norm",
    "model.layers.{}.self_attn.q_proj": "blocks.{}.attention.query",
    "model.layers.{}.self_attn.k_proj": "blocks.{}.attention.key",
    "model.layers.{}.self_attn.v_proj": "blocks.{}.attention.value",
    "model.layers.{}.self_attn.q_norm": "blocks.{}.attention.query_norm",
    "model.layers.{}.self_attn.k_norm": "blocks.{}.attention.key_norm",
    "model.layers.{}.self_attn.o_proj": "blocks.{}.attention.output",
    "model.layers.{}.post_attention_layernorm": "blocks.{}.memory_norm",
    "model.layers.{}.mlp.gate_proj": "blocks.{}.memory.key_gate",
    "model.layers.{}.mlp.up_proj": "blocks.{}.memory.key_up",
    "model.layers.{}.mlp.down_proj": "blocks.{}.memory.values",
    "model.norm": "norm",
    "lm_head": "head",
}
# Gemma has four norms in a block, and a trap: its post_attention_layernorm is not Llama's.
GEMMA_NAMES = {
    "model.layers.{}.post_attention_layernorm": "blocks.{}.after_attention",
    "model.layers.{}.pre_feedforward_layernorm": "blocks.{}.memory_norm",
    "model.layers.{}.post_feedforward_layernorm": "blocks.{}.after_memory",
}


def save_tensors(tensors, path, about={}):
    """Write a safetensors file so that it is there completely or not at all; make its folder if
    need be. tensors: {name: tensor}, about: {name: text}. Raises OSError where there is no room."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    mode = part.stat().st_mode         # of an ordinary file: safetensors lets its owner alone read
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, part, about)
    except SafetensorError as error:
        raise OSError(f"{part}: cannot write it ({error}); is the disk full?") from None
    part.chmod(mode)
    os.replace(part, path)


def read_tensors(path):
    """A safetensors file -> ({name: tensor}, about) as `save_tensors` was given them. Raises
    BadInput for a file that is missing or not readable."""
    files = _open([path])
    about = next((file.metadata() for file in files.values()), None)
    return {name: file.get_tensor(name) for name, file in files.items()}, about or {}


def weight_files(folder) -> list[Path]:
    """The safetensors files that loading a checkpoint folder would open; never a pickle. Raises
    BadInput where there is none, where one is missing or its name is not a plain one."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise BadInput(f"{folder}: neither model.safetensors nor {index.name} is there; only "
                       "safetensors are read, so convert .bin or .pth files first")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BadInput(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(map(str, names.values())))
    for name in names:
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise BadInput(f"{index}: shard {name!r} is not a plain file name, and so is refused")
        if not os.path.isfile(folder / name):      # also false for a name that no file can have
            raise BadInput(f"{folder / name}: no such file, though {index.name} lists it")
    return [folder / name for name in names]


def _open(paths):
    """Memory-mapped safetensors files -> {tensor name: the open file it is in}."""
    files = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path}: not a readable safetensors file ({error}); "
                           "is the download complete?") from None
        for name in file.keys():
            if name in files:
                raise BadInput(f"{path}: {name} is in more than one file of this checkpoint")
            files[name] = file
    return files


def _compare(folder, expected, found):
    """Raise BadInput that lists all differences, if found tensors are not the expected ones."""
    wrong = {"missing": expected.keys() - found.keys(), "of another shape": [],
             "unexpected": found.keys() - expected.keys(), "not F32, F16 or BF16": []}
    for name in expected.keys() & found.keys():
        shape, wanted, dtype = found[name].get_shape(), expected[name][1], found[name].get_dtype()
        if list(shape) != wanted:
            wrong["of another shape"].append(f"{name} {shape} (expected {wanted})")
        if dtype not in ("F32", "F16", "BF16"):
            wrong["not F32, F16 or BF16"].append(f"{name} ({dtype})")
    problems = [f"{len(names)} {kind}: {', '.join(sorted(names)[:6])}{', ...' * (len(names) > 6)}"
                for kind, names in wrong.items() if names]
    if problems:
        raise BadInput(f"{folder}: the tensors do not fit config.json: {'; '.join(problems)}")
