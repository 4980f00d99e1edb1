"""Llama, Qwen and Gemma in one hand-written transformer, whose feed-forward layers are explicit key-value memories.

In reading order: configuration, blocks, the transformer, loading and saving, decoding. Shapes stand beside the lines that
make them, in one alphabet:

    B sequences   T tokens   S tokens seen so far   d model width   d_m memories   H heads   G key-value heads   D head width   V vocabulary
"""
import json
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from data import BadInput, read_json

# ---------------------------------------------------------------------------------------------------------- configuration


ACTIVATIONS = {                        # name in config.json -> the function, and its backward pass: (gradient, x) -> gradient
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}

# model_type in config.json -> how the family differs from plain Llama. `defaults` are the keys that published files leave out.
GEMMA = dict(
    norm_offset=1.0,                   # RMSNorm multiplies by 1 + w
    four_norms=True,                   # one before and one after each sublayer
    scale_embeddings=True,             # by sqrt(d)
)
FAMILIES = {
    "llama": dict(),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, defaults=dict(head_dim=128)),
    "gemma2": dict(**GEMMA, defaults=dict(
        tie_word_embeddings=True, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=2,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0)),
    "gemma3_text": dict(**GEMMA, qk_norm=True, defaults=dict(
        tie_word_embeddings=True, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=6,
        rope_theta=1_000_000.0, rope_local_base_freq=10_000.0)),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"      # a layer sees the last `window` tokens, or all of them


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
    raw: dict = field(default_factory=dict, repr=False)    # config.json as it was read, to be written back

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "Config":
        """Read the keys of a `config.json`, classic or newer style. Raises BadInput naming the key that is missing or off."""
        if str(raw.get("model_type")) not in FAMILIES:
            raise BadInput(f"{where}: model_type is {raw.get('model_type')!r}; known families are {', '.join(FAMILIES)}")
        traits = dict(FAMILIES[raw["model_type"]])
        get = {**traits.pop("defaults", {}), **{key: value for key, value in raw.items() if value is not None}}.get
        # A null switches a soft cap off; for every other key it means "the default".
        softcaps = [raw.get(key, get(key)) for key in ("attn_logit_softcapping", "final_logit_softcapping")]

        def number(key, default=None, kind=int):
            return _positive(get(key, default), key, where, kind)

        def flag(key):
            if not isinstance(get(key, False), bool):
                raise BadInput(f"{where}: {key} is {get(key)!r}; true or false is needed")
            return get(key, False)

        for key in ("attention_bias", "mlp_bias", "quantization_config", "use_bidirectional_attention"):
            if get(key, False) is not False:
                raise BadInput(f"{where}: {key} is set, and this implementation has no such layer")
        act = get("hidden_activation", get("hidden_act", "gelu_pytorch_tanh" if traits.get("four_norms") else "silu"))
        if str(act) not in ACTIVATIONS:
            raise BadInput(f"{where}: the activation is {act!r}; known are {', '.join(ACTIVATIONS)}")

        d, n_heads, n_layers = number("hidden_size"), number("num_attention_heads"), number("num_hidden_layers")
        n_kv_heads, head_dim = number("num_key_value_heads", n_heads), number("head_dim", max(1, d // n_heads))
        if n_layers > 1000:
            raise BadInput(f"{where}: num_hidden_layers is {n_layers}, more than any published model has")
        if n_heads % n_kv_heads:
            raise BadInput(f"{where}: num_attention_heads is {n_heads}, not a multiple of num_key_value_heads, {n_kv_heads}")
        if head_dim % 2:
            raise BadInput(f"{where}: head_dim is {head_dim}; rotary embeddings need an even number")
        for key, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), softcaps):
            if cap is not None:
                number(key, kind=float)
        layer_types = _layer_types(get, number, flag, n_layers, where)
        return cls(
            vocab_size=number("vocab_size"), d=d, d_m=number("intermediate_size"), n_layers=n_layers, n_heads=n_heads,
            n_kv_heads=n_kv_heads, head_dim=head_dim, norm_eps=number("rms_norm_eps", 1e-6, float), act=act,
            tied=flag("tie_word_embeddings"), layer_types=layer_types,
            window=number("sliding_window") if LOCAL in layer_types else None,
            rope={kind: _rope(get, kind, where) for kind in sorted(set(layer_types))},
            attn_scale=number("query_pre_attn_scalar", head_dim, float) ** -0.5,
            attn_softcap=softcaps[0], final_softcap=softcaps[1], eos_ids=_ids(raw.get("eos_token_id"), where), raw=raw, **traits)

    @classmethod
    def from_pretrained(cls, folder) -> "Config":
        """Read `config.json` and, for further end-of-sequence ids, `generation_config.json`. Raises BadInput."""
        path, generation = Path(folder, "config.json"), Path(folder, "generation_config.json")
        if not path.is_file():
            raise BadInput(f"{path}: no such file; a model is a folder with config.json and safetensors files, as published")
        config = cls.from_dict(read_json(path), str(path))
        if generation.is_file():
            config = config.with_eos(*_ids(read_json(generation).get("eos_token_id"), str(generation)))
        return config

    def with_eos(self, *ids: int) -> "Config":
        """The same configuration, which also stops at these ids."""
        eos = tuple(dict.fromkeys(self.eos_ids + ids))
        return self if eos == self.eos_ids else replace(
            self, eos_ids=eos, raw={**self.raw, "eos_token_id": eos[0] if len(eos) == 1 else list(eos)})


def _layer_types(get, number, flag, n_layers, where):
    """LOCAL or GLOBAL for each layer: listed in newer files; a pattern (Gemma) or a first local layer (Qwen) in classic ones."""
    types = get("layer_types")
    if types is None and flag("use_sliding_window"):
        first = 0 if get("max_window_layers") == 0 else number("max_window_layers", 28)
        types = [GLOBAL if i < first else LOCAL for i in range(n_layers)]
    elif types is None and get("sliding_window_pattern") is not None:
        types = [GLOBAL if (i + 1) % number("sliding_window_pattern") == 0 else LOCAL for i in range(n_layers)]
    elif types is None:
        types = [GLOBAL] * n_layers
    if not isinstance(types, list) or len(types) != n_layers or not {LOCAL, GLOBAL}.issuperset(map(str, types)):
        raise BadInput(f"{where}: layer_types must list {LOCAL} or {GLOBAL} for each of the {n_layers} layers")
    return tuple(types)


ROPE_KEYS = {"default": ("rope_theta",), "linear": ("rope_theta", "factor"), "llama3": (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def _rope(get, kind, where):
    """The rotary settings of one layer type, from `rope_parameters` (one set, or one per layer type) or from the classic keys."""
    classic = {"rope_theta": get("rope_theta", 10_000.0), "original_max_position_embeddings": get("max_position_embeddings")}
    if kind == LOCAL and get("rope_local_base_freq") is not None:              # Gemma 3: another base, never scaled
        classic["rope_theta"], scaling = get("rope_local_base_freq"), {}
    else:
        scaling = get("rope_scaling", {})
    scaling = get("rope_parameters", scaling)
    scaling = scaling.get(kind, scaling) if isinstance(scaling, dict) else scaling
    if not isinstance(scaling, dict):
        raise BadInput(f"{where}: the rotary settings are {scaling!r}; an object with rope_type is needed")
    rope = {**classic, **scaling}
    rope["rope_type"] = str(scaling.get("rope_type", scaling.get("type", "default")))
    if rope["rope_type"] not in ROPE_KEYS or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadInput(f"{where}: rotary embedding {rope['rope_type']!r} is not implemented; known are {', '.join(ROPE_KEYS)}, of the whole head")
    for key in ROPE_KEYS[rope["rope_type"]]:
        _positive(rope.get(key), f"{key} of the rotary embedding", where, float)
    return rope


LARGEST = {int: 2**20, float: 2.0**62}                     # far beyond any published model; products of three sizes are still 64-bit numbers


def _positive(value, key, where, kind=int):
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value <= LARGEST[kind]:
        raise BadInput(f"{where}: {key} is {value!r}; a positive {f'whole number up to {LARGEST[int]:,}' if kind is int else 'number'} is needed")
    return value


def _ids(value, where):
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise BadInput(f"{where}: eos_token_id is {value!r}; a token id or a list of them is needed")
    return tuple(ids)


# ----------------------------------------------------------------------------------------------------------------- blocks
# Weights come from a file or from `Transformer.initialise`, so no layer draws its own: building a model costs nothing.


class Linear(nn.Linear):
    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    def reset_parameters(self):
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + w), computed in fp32. `offset` is 1 in Gemma."""

    def __init__(self, d, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.offset, self.eps = config.norm_offset, config.norm_eps

    def forward(self, x):                                                      # [..., d]
        y = F.rms_norm(x.float(), self.weight.shape, self.offset + self.weight.float(), self.eps)
        device = x.device.type                                                 # under autocast, cast once for all the layers that read it
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)       # the meta device knows of none
        return y.to(torch.get_autocast_dtype(device) if autocast else x.dtype)


class _Gated(torch.autograd.Function):
    """act(gate) * up. Written out because autograd would keep act(gate) too, a quarter of what the memory keeps for its backward pass; it is
    computed again instead, which is cheap."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act[0](gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gate, up), (act, act_backward) = ctx.saved_tensors, ctx.act
        return act_backward(grad * up, gate), grad * act(gate), None


gated = _Gated.apply                   # (gate, up, (act, its backward pass)) -> act(gate) * up


class KeyValueMemory(nn.Module):
    """The feed-forward layer, read as an associative memory: FFN(h) = sum_i k_i v_i (eq. 3, and section 4.4 for the gate).

    Memory i is found by its two keys, row i of `key_gate` and of `key_up`, and answers with its memory vector v_i, column i of
    `values.weight`. How strongly it is called is its key coefficient k_i, and k is what InfoSteer steers.
    """

    def __init__(self, config):
        super().__init__()
        self.key_gate = Linear(config.d, config.d_m, bias=False)
        self.key_up = Linear(config.d, config.d_m, bias=False)
        self.values = Linear(config.d_m, config.d, bias=False)
        self.act = ACTIVATIONS[config.act]

    def forward(self, h, steering=None):                                       # h: [B, T, d]
        k = gated(self.key_gate(h), self.key_up(h), self.act)                  # [B, T, d_m]  key coefficients: act(key_gate(h)) * key_up(h)
        flux = reward = None
        if steering is not None:
            k = steering.change(k)                                             # int, and others of the forward pass: raise the smallest (eq. 4)
            flux, reward = steering.entropies(k)                               # [B, T]  nats; reg, and others of the loss: reward it (eq. 5)
        return self.values(k), flux, reward                                    # [B, T, d]    sum_i k_i v_i


class Attention(nn.Module):
    """Causal attention with rotary positions; H query heads share G key-value heads (GQA)."""

    def __init__(self, config):
        super().__init__()
        d, D = config.d, config.head_dim
        self.query = Linear(d, config.n_heads * D, bias=config.qkv_bias)
        self.key = Linear(d, config.n_kv_heads * D, bias=config.qkv_bias)
        self.value = Linear(d, config.n_kv_heads * D, bias=config.qkv_bias)
        self.output = Linear(config.n_heads * D, d, bias=False)
        self.query_norm = RMSNorm(D, config) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(D, config) if config.qk_norm else nn.Identity()
        self.head_dim, self.scale, self.softcap = D, config.attn_scale, config.attn_softcap

    def forward(self, x, view, cache=None):                                    # x: [B, T, d]
        B, T, _ = x.shape
        q = self.query_norm(self.query(x).view(B, T, -1, self.head_dim))       # [B, T, H, D]
        k = self.key_norm(self.key(x).view(B, T, -1, self.head_dim))           # [B, T, G, D]
        v = self.value(x).view(B, T, -1, self.head_dim)                        # [B, T, G, D]
        q, k = rotate(q, view.cos, view.sin), rotate(k, view.cos, view.sin)
        if cache is not None:                                                  # keys and values of all tokens so far: [B, S, G, D]
            k, v = (extend(seen, new, view) for seen, new in zip(cache, (k, v)))
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), view.mask, self.scale, self.softcap)
        return self.output(y.transpose(1, 2).reshape(B, T, -1))                # [B, T, d]


def attend(q, k, v, mask, scale, softcap):
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]. mask [B or 1, 1, T, S] is True where a token may look; None: causal."""
    (B, H, T, D), groups = q.shape, q.shape[1] // k.shape[1]
    if softcap is None and (mask is None or groups == 1):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1)
    if softcap is None:                                                        # no fast kernel takes a mask and shared heads: let the queries
        q, mask = q.reshape(B, -1, groups * T, D), mask.repeat(1, 1, groups, 1)          # of one key-value head be so many more tokens
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).view(B, H, T, D)
    # Gemma 2 squashes its scores, which no fused kernel does.
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)      # [B, H, S, D]
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)   # [B, H, T, S]
    return scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


def rotate(x, cos, sin):
    """Rotary position embedding (RoPE): turn each pair (x_i, x_{i + D/2}) by its position's angle. x [B, T, H, D], cos [B or 1, T, 1, D/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def inverse_frequencies(rope, head_dim, device):
    """Radians per position of each pair of dimensions, [D/2], fp32."""
    pairs = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    turn = rope["rope_theta"] ** -pairs
    if rope["rope_type"] == "linear":
        turn = turn / rope["factor"]
    if rope["rope_type"] == "llama3":     # divide slow turns by the factor, keep fast ones, blend between
        turns = rope["original_max_position_embeddings"] * turn / (2 * torch.pi)            # within the first training length
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        turn = turn * (keep + (1 - keep) / rope["factor"])
    return turn


@dataclass
class View:
    """What the tokens of one forward pass see in layers of one type: shared by those layers."""

    cos: torch.Tensor                  # [B or 1, T, 1, D/2]
    sin: torch.Tensor
    mask: torch.Tensor | None          # [B or 1, 1, T, S] or None: plain causal attention, which has the fastest kernels
    positions: torch.Tensor | None     # [B or 1, T] where tokens stand in their sequence; None: 0, 1, 2, ...
    seen: int                          # S: tokens in the longest sequence so far


def look(config, kind, positions, seen, T, device):
    """The `View` of the layers of one type."""
    at = torch.arange(T, device=device)[None] if positions is None else positions         # [B or 1, T]
    angle = at[:, :, None, None] * inverse_frequencies(config.rope[kind], config.head_dim, device)     # [B or 1, T, 1, D/2]
    window = config.window if kind == LOCAL and seen > config.window else None
    mask = None
    if window or positions is not None or config.attn_softcap:
        back = at[:, None, :, None] - torch.arange(seen, device=device)        # [B or 1, 1, T, S]  how far back each token lies
        mask = (back >= 0) & (back < window) if window else back >= 0
    return View(angle.cos(), angle.sin(), mask, positions, seen)


def extend(seen, new, view):
    """Write new keys or values [B, T, G, D] into the cache [B, longest, G, D] at their positions, and return what is seen."""
    if view.positions is None:
        seen[:, :view.seen] = new
    else:
        seen[torch.arange(len(new), device=new.device)[:, None], view.positions] = new.to(seen.dtype)
    return seen[:, :view.seen]


class Block(nn.Module):
    """x -> x + attention(norm(x)) -> x + memory(norm(x)); Gemma also normalises what each sublayer adds."""

    def __init__(self, config):
        super().__init__()
        after = (lambda: RMSNorm(config.d, config)) if config.four_norms else nn.Identity
        self.attention_norm, self.attention, self.after_attention = RMSNorm(config.d, config), Attention(config), after()
        self.memory_norm, self.memory, self.after_memory = RMSNorm(config.d, config), KeyValueMemory(config), after()

    def forward(self, x, view, steering=None, cache=None):                     # x: [B, T, d]
        x = x + self.after_attention(self.attention(self.attention_norm(x), view, cache))
        answer, flux, reward = self.memory(self.memory_norm(x), steering)      # [B, T, d], [B, T] or None
        return x + self.after_memory(answer), flux, reward


# ------------------------------------------------------------------------------------------------------------ transformer


PREFILL_TOKENS = 1024, 8192            # prompt tokens read in one forward pass on a CPU, whose caches are small, and on a GPU


class Transformer(nn.Module):
    """A decoder. `Transformer.from_pretrained` loads one; `Transformer(config).initialise(seed)` makes a new one."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d, config)
        self.head = None if config.tied else Linear(config.d, config.vocab_size, bias=False)

    def forward(self, tokens, steering=None):
        """tokens [B, T] -> logits [B, T, V] in fp32."""
        return self.logits(self.hidden(tokens, steering)[0])

    def hidden(self, tokens, steering=None, positions=None, cache=None, checkpoint=False, seen=None):
        """Everything but the LM head: tokens [B, T] -> (hidden states [B, T, d], flux, reward: both [n_layers, B, T] in nats).

        steering     an `infosteer.Steering`; None computes the plain model, no flux and no reward. The reward is 0 in layers where the
                     method has none
        positions    [B or 1, T] where the tokens stand in their sequences; None: 0, 1, 2, ... Padding goes on the right, where
                     causal attention cannot see it
        cache        from `new_cache`; the tokens' keys and values are written into it
        checkpoint   keep only each block's input for the backward pass and compute the rest again: less memory, more time
        seen         tokens in the longest sequence so far; None: read off the positions, for which a GPU has to be waited for
        """
        config = self.config
        x = self.embed(tokens)                                                 # [B, T, d]
        if config.scale_embeddings:
            x = x * float(torch.tensor(config.d ** 0.5, dtype=x.dtype))        # rounded as the weights are, as in training
        seen = tokens.shape[1] if positions is None else seen or int(positions.max()) + 1
        views = {kind: look(config, kind, positions, seen, tokens.shape[1], tokens.device) for kind in config.rope}
        fluxes, rewards = [], []
        for layer, (block, kind) in enumerate(zip(self.blocks, config.layer_types)):
            arguments = x, views[kind], steering and steering.at(layer), cache and cache[layer]
            x, flux, reward = recompute(block, *arguments, use_reentrant=False) if checkpoint else block(*arguments)
            fluxes.append(flux)
            rewards.append(torch.zeros_like(flux) if steering and reward is None else reward)
        return (self.norm(x), torch.stack(fluxes), torch.stack(rewards)) if steering else (self.norm(x), None, None)

    def predict(self, tokens, at, steering=None, checkpoint=False):
        """What training needs, in one pass: tokens [B, T], at [S] places of the flattened tokens -> (logits [S, V], flux, reward as in `hidden`)."""
        hidden, flux, reward = self.hidden(tokens, steering, checkpoint=checkpoint)
        return self.logits(hidden.flatten(0, 1)[at]), flux, reward

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
        """Draw new weights: normal(0, 0.02) for matrices, none for biases, neutral norms. Returns the model itself."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
                else:
                    weight.fill_(0 if name.endswith("bias") else 1 - self.config.norm_offset)
        return self

    # ---------------------------------------------------------------------------------------------------- loading, saving

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "Transformer":
        """Load a checkpoint folder as published: config.json beside model.safetensors or its indexed shards.

        The files are memory-mapped and the model is built without memory of its own, so each tensor is moved once and the peak is
        the weights in `dtype`. Raises BadInput for a folder, file, name, shape or number format that does not fit.
        """
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(Config.from_pretrained(folder))
        expected = {theirs: (ours, list(weight.shape)) for ours, theirs, weight in model._named()}
        files = _open(folder)                                                  # checkpoint name -> the open file it is in
        found = {name: (list(part.get_shape()), part.get_dtype()) for name, file in files.items() for part in [file.get_slice(name)]}
        head = files.get("lm_head.weight") if model.head is None else None     # some tied checkpoints store both
        if head:
            found.pop("lm_head.weight")
        _check(folder, expected, found)
        state = {expected[name][0]: files[name].get_tensor(name).to(device, dtype, copy=True) for name in found}
        if head and not torch.equal(head.get_tensor("lm_head.weight").to(device, dtype), state["embed.weight"]):
            raise BadInput(f"{folder}: config.json ties the LM head to the embedding, but lm_head.weight differs from it; "
                           "set tie_word_embeddings to false to use it")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder) -> None:
        """Write config.json and model.safetensors under the checkpoint's own names, for any tool that reads such folders."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.embed.weight.dtype).removeprefix("torch.")
        config = {**self.config.raw, "dtype" if "dtype" in self.config.raw else "torch_dtype": dtype}
        weights = {theirs: weight.detach() for _, theirs, weight in self._named()}
        save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
        part = folder / "config.json.part"
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / "config.json")

    def _named(self):
        """(our name, checkpoint name, parameter) for every parameter."""
        table = {**NAMES, **(GEMMA_NAMES if self.config.four_norms else {})}
        ours_to_theirs = {ours: theirs for theirs, ours in table.items()}
        for ours, weight in self.named_parameters():
            parts = ours.split(".")
            layer = parts[1] if parts[0] == "blocks" else ""
            theirs = ours_to_theirs[".".join(["blocks", "{}", *parts[2:-1]] if layer else parts[:-1])]
            yield ours, f"{theirs.format(layer)}.{parts[-1]}", weight

    # ----------------------------------------------------------------------------------------------------------- decoding

    def new_cache(self, B: int, longest: int):
        """Room for the keys and values of B sequences of at most `longest` tokens: per layer two tensors [B, longest, G, D]."""
        shape = (B, longest, self.config.n_kv_heads, self.config.head_dim)
        like = self.embed.weight
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens: int, steering=None, cache_bytes: int = 2 << 30, max_batch: int = 256,
                 done=lambda n: None) -> list[list[int]]:
        """Continue each prompt greedily, and return only the new ids, in the order of the prompts.

        A row ends at the first of `config.eos_ids`, which is its last id then, or after max_new_tokens. Prompts are sorted by length
        and decoded in batches whose key-value cache takes at most `cache_bytes` (a single longer prompt is decoded alone), at most
        `max_batch` at a time. `done(n)` is called as rows finish. Raises BadInput for an empty prompt or an id outside the vocabulary.
        """
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise BadInput(f"prompt {row} is empty; a model needs at least one token to continue")
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise BadInput(f"prompt {row} has an id outside 0..{self.config.vocab_size - 1}; is this the model's tokenizer?")
        per_token = 2 * self.config.n_layers * self.config.n_kv_heads * self.config.head_dim * self.embed.weight.element_size()
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))    # the largest batch first: if memory is short, it shows now
        outputs = [[] for _ in prompts]
        while order and max_new_tokens > 0:
            longest = len(prompts[order[0]]) + max_new_tokens
            size = max(1, min(max_batch, cache_bytes // (per_token * longest)))
            batch, order = order[:size], order[size:]
            self._generate_batch([prompts[i] for i in batch], [outputs[i] for i in batch], max_new_tokens, steering, done)
        return outputs

    def _generate_batch(self, prompts, outputs, max_new_tokens, steering, done):
        """Decode one batch, longest prompt first, appending new ids to `outputs`."""
        device, eos, B = self.embed.weight.device, set(self.config.eos_ids), len(prompts)
        lengths, longest = torch.tensor([len(p) for p in prompts], device=device), len(prompts[0])         # [B]
        cache = self.new_cache(B, longest + max_new_tokens)
        shared = _common_prefix(prompts) if B > 1 else 0                       # at most all but the last token of the shortest
        if shared:                                                             # what all prompts begin with is read once
            first = [(k[:1], v[:1]) for k, v in cache]
            self.hidden(torch.tensor([prompts[0][:shared]], device=device), steering, cache=first)
            for layer in cache:
                for seen in layer:
                    seen[1:, :shared] = seen[:1, :shared]
        rest = nn.utils.rnn.pad_sequence([torch.tensor(p[shared:]) for p in prompts], batch_first=True).to(device)    # [B, T]
        x, start = [], 0
        while start < B:                                                       # some rows at a time, of about the same length
            T = len(prompts[start]) - shared
            rows = slice(start, start + max(1, PREFILL_TOKENS[device.type == "cuda"] // T))
            positions = torch.arange(shared, shared + T, device=device)[None] if shared else None
            hidden, *_ = self.hidden(rest[rows, :T], steering, positions, [(k[rows], v[rows]) for k, v in cache], seen=shared + T)     # [rows, T, d]
            x.append(hidden[torch.arange(len(hidden), device=device), lengths[rows] - shared - 1])         # at each prompt's last token
            start = rows.stop
        x = torch.cat(x)                                                       # [B, d]
        for step in range(max_new_tokens):
            new = self.logits(x).argmax(-1)                                    # [B]
            ids = new.tolist()
            for output, i in zip(outputs, ids):
                output.append(i)
            alive = [row for row, i in enumerate(ids) if i not in eos]
            done(len(ids) - len(alive))
            if not alive or step == max_new_tokens - 1:
                done(len(alive))
                return
            if len(alive) < len(ids):                                          # finished rows leave the batch
                outputs, keep = [outputs[row] for row in alive], torch.tensor(alive, device=device)
                cache = [(k[keep], v[keep]) for k, v in cache]
                new, lengths = new[keep], lengths[keep]
            x, *_ = self.hidden(new[:, None], steering, (lengths + step)[:, None], cache, seen=longest + step + 1)
            x = x[:, 0]                                                        # [B, d]

    @torch.inference_mode()
    def log_likelihood(self, prompts, continuations, batch_tokens: int = 8192, done=lambda n: None) -> list[float]:
        """log P(continuation | prompt) in nats, summed over the continuation's tokens, for each pair of id lists.

        The model reads a prompt once for all continuations that differ in their last token only, as the labels of a task often do.
        """
        device = self.embed.weight.device
        pairs = {}                                                             # what the model reads -> the pairs it answers
        for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            pairs.setdefault((*prompt, *continuation[:-1]), []).append(i)
        order = sorted(pairs, key=len, reverse=True)
        scores = [0.0] * len(prompts)
        while order:
            size = max(1, batch_tokens // len(order[0]))
            batch, order = order[:size], order[size:]
            tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)     # [B, T]
            asked = [(row, position, i, token) for row, ids in enumerate(batch) for i in pairs[ids]
                     for position, token in enumerate(continuations[i], len(prompts[i]) - 1)]
            rows, positions, owners, targets = (list(column) for column in zip(*asked))
            places = sorted(set(zip(rows, positions)))                         # where the head is needed
            at = torch.tensor(places, device=device)                           # [places, 2]
            logits = self.logits(self.hidden(tokens)[0][at[:, 0], at[:, 1]])   # [places, V]
            where = {place: n for n, place in enumerate(places)}
            picked = logits.log_softmax(-1)[[where[place] for place in zip(rows, positions)], targets]    # [asked]
            for i, score in zip(owners, picked.tolist()):
                scores[i] += score
            done(sum(len(pairs[ids]) for ids in batch))
        return scores


def _common_prefix(prompts):
    """How many tokens all prompts begin with, leaving each at least one."""
    first, last = min(prompts), max(prompts)                                   # all others lie between them
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


# ------------------------------------------------------------------------------------------------------- checkpoint files

# Name in the checkpoint -> name here. The feed-forward rows are the lesson: a projection is a set of keys or of memory vectors.
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
# Gemma has four norms a block, and the trap: its post_attention_layernorm is another norm than Llama's of that name.
GEMMA_NAMES = {
    "model.layers.{}.post_attention_layernorm": "blocks.{}.after_attention",
    "model.layers.{}.pre_feedforward_layernorm": "blocks.{}.memory_norm",
    "model.layers.{}.post_feedforward_layernorm": "blocks.{}.after_memory",
}


def save_tensors(tensors, path, about):
    """Write a safetensors file so that it is there completely or not at all; about: {name: text}. Raises OSError where there is no room."""
    part = Path(f"{path}.part")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part, about)
    except SafetensorError as error:
        raise OSError(f"{part}: cannot write it ({error}); is the disk full?") from None
    os.replace(part, path)


def _open(folder):
    """The checkpoint's tensors in its memory-mapped safetensors files: {tensor name: open file}. Never a pickle."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise BadInput(f"{index}: weight_map must map tensor names to file names")
        names = sorted(set(map(str, names.values())))
    else:
        raise BadInput(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there"
                       + ("; only safetensors are read, convert the .bin or .pth files first" if [*folder.glob("*.bin"), *folder.glob("*.pth")] else ""))
    files = {}
    for name in names:
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise BadInput(f"{index}: shard {name!r} is not a plain file name; refused, since it could leave the folder")
        if not os.path.isfile(folder / name):                                  # also false for what can be no name, which Path.is_file() is not
            raise BadInput(f"{folder / name}: no such file, though {index.name} lists it; is the download complete?")
        try:
            file = safe_open(folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{folder / name}: not a readable safetensors file ({error}); is the download complete?") from None
        for tensor in file.keys():
            if tensor in files:
                raise BadInput(f"{folder / name}: {tensor} is in more than one file; are these shards of one checkpoint?")
            files[tensor] = file
    return files


def _check(folder, expected, found):
    """Compare {name: (our name, shape)} with {name: (shape, dtype)}; raise BadInput listing every difference."""
    def listed(kind, names):
        names = sorted(names)
        return [f"{len(names)} {kind}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"] if names else []

    both = expected.keys() & found.keys()
    problems = listed("missing", expected.keys() - found.keys()) + listed("unexpected", found.keys() - expected.keys()) + listed(
        "of another shape", (f"{n} {found[n][0]} (expected {expected[n][1]})" for n in both if found[n][0] != expected[n][1])) + listed(
        "not F32, F16 or BF16", (f"{n} ({found[n][1]})" for n in both if found[n][1] not in ("F32", "F16", "BF16")))
    if problems:
        raise BadInput(f"{folder}: the tensors do not fit config.json: {'; '.join(problems)}")
