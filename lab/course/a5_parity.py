"""Parity, layer by layer

Make these models compute what the library computes that published them. In model.py, write the norm
and the rotation of pairs (x_i, x_{i + D/2}); `make_view`, whose angles are position times
`inverse_frequencies`, and whose mask lets a token see itself and those before it, in LOCAL layers
the last config.window only; grouped attention, where Gemma 2 caps its scores; `Attention` with
norms, rotation and cache (`extend`); `Block`; the row of Gemma 2. `texts` and `home` stay None.
tests/test_04_families.py names the layer where a difference begins, and what the row needs.
"""
import re
from functools import partial

import torch

from lab.course.probe import draw

MINUTES, POINTS, GOLDEN = 240, 16, "tests/golden/models/"
BLANK = {**dict.fromkeys(f"model.py::{name}" for name in (
    "RMSNorm.forward", "rotate", "make_view", "attend", "Attention.forward", "Block.forward")),
    "model.py::FAMILIES": lambda text: re.sub(r'    "gemma2".*?\)\),\n', "", text, flags=re.S)}
REMOVE = []
HINTS = (
    "First make right what has a check of its own, then Llama, Qwen 3, Gemma 2. Which layer is the "
    "first that differs, and what does it have that those before it lack?",
    "y = x / sqrt(mean(x^2) + eps) * (offset + w). Query head h asks key head h // (H / G). The "
    "mask: 0 <= position of the query - that of the key < window. cap tanh(scores / cap).",
    "Turn halves (a, b) into (a cos - b sin, b cos + a sin). Repeat each key head for its group in "
    "place. Give `extend` keys that are rotated. In a block, both norms are inside the branch.")


def norm(seed):
    from model import Transformer
    x, model = draw(seed, 3, 40)[:, :32].float(), Transformer.from_pretrained(GOLDEN + "gemma3")
    for what, x in ("small numbers", x * 0.1), ("bf16", x.bfloat16()):
        yield what, model.norm(x)


def rotation(seed):
    from model import rotate
    x = draw(seed, 2, 3, 2, 4)
    angle = x[:, :, :1].cos()
    yield "random numbers", rotate(torch.cat([x, x.exp()], -1), angle.cos(), angle.sin())


def views(seed):
    from model import GLOBAL, LOCAL, Config, make_view
    config, n = Config.from_pretrained(GOLDEN + "qwen25_window"), 12 + seed % 9
    for kind in LOCAL, GLOBAL:
        for at, seen, T in (None, 3, 3), (None, n, n), (torch.tensor([[9], [19]]), 20, 1):
            view = make_view(config, kind, at, seen, T, "cpu")
            mask = torch.ones(1, 1, T, T).tril() if view.mask is None else view.mask
            for what, found in ("mask", mask.bool()), ("cos", view.cos), ("sin", view.sin):
                yield f"{kind}, {T} of {seen} tokens (1: at 9 and at 19), {what}", found


def attention(seed):
    from model import attend
    k = draw(seed, 2, 2, 5, 4).float()                                         # [B, G, T, D]
    q, near = torch.cat([k.sin(), k.flip(0)], 1), torch.ones(1, 1, *[k.shape[2]] * 2).tril()
    near = near.bool() & ~near.tril(-3).bool()
    for mask, cap in (None, None), (near, None), (near, 0.7):
        yield f"windowed: {mask is not None}; cap: {cap}", attend(q, k, k.cos(), mask, 0.4, cap)


def family(name, seed):
    from model import Transformer
    model, states = Transformer.from_pretrained(GOLDEN + name), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, made: states.append((given[0], made[0])))
    tokens = (draw(seed, 2, 20).abs() * 1000 % 96).long()
    logits = model(tokens)
    for n, state in enumerate([states[0][0], *(made for _, made in states)]):
        yield f"the last token after layer {n}", state[:, -1]
    yield "its logits", logits[:, -1]
    yield "what it says next, token by token", torch.tensor(model.generate(tokens.tolist(), 4)[0])


PARTS = {"norm": norm, "rotation": rotation, "views": views, "attend": attention, **{
    f"{name}, layer by layer": partial(family, name) for name in ("llama3", "qwen3", "gemma2")}}
WRITTEN = {"accuracy": (
    "How accurate is the toy Gemma? Then put in faults, one at a time: pairs interleaved, heads "
    "tiled, all positions from 1, the window one too wide. Under `why`: why do two cost nothing?",
    "python eval.py --overwrite --model data/toy/gemma --task toy-plain --limit 100 --out out/5")}

# ------------------------------------------------------------------------------- not handed out
NUMBERS = {"accuracy": (lambda text: float(re.search(r"plain +100 +\S+ +(\S+)", text)[1]), 0.01)}
CODE = """
class RMSNorm(nn.Module):
    def forward(self, x):
        y = x.float() / (x.float().square().mean(-1, keepdim=True) + self.eps).sqrt()
        return (y * (self.offset + self.weight.float())).to(x.dtype)
def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
def make_view(config, kind, positions, seen, T, device, texts=None, home=None):
    at = torch.arange(T, device=device)[None] if positions is None else positions
    angle = at[:, :, None, None] * inverse_frequencies(config.rope[kind], config.head_dim, device)
    back = at[:, None, :, None] - torch.arange(seen, device=device)
    mask = (back >= 0) & (back < (config.window if kind == LOCAL else seen))
    return View(angle.cos(), angle.sin(), mask, positions, seen, texts, home)
def attend(q, k, v, mask, scale, softcap):
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = torch.ones(scores.shape[-2:]).tril() > 0 if mask is None else mask
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
class Attention(nn.Module):
    def forward(self, x, view, cache=None):
        q, k, v = (one(x).unflatten(-1, (-1, self.head_dim))
                   for one in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, view.cos, view.sin), rotate(k, view.cos, view.sin)
        if cache is not None:
            k, v = (extend(seen, new, view) for seen, new in zip(cache, (k, v)))
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        y = attend(q, k, v, view.mask, self.scale, self.softcap)
        return self.output(y.transpose(1, 2).flatten(2))
class Block(nn.Module):
    def forward(self, x, view, steering=None, cache=None):
        x = x + self.after_attention(self.attention(self.attention_norm(x), view, cache))
        answer, flux, reward = self.memory(self.memory_norm(x), steering)
        return x + self.after_memory(answer), flux, reward
"""
SUM = "torch.cat([a * cos - b * sin, b * cos + a * sin], -1)"
HEADS = "k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))"
RIGHT = {"explicit softmax": CODE, "complex rotation": CODE.replace(
    SUM, "torch.view_as_real(torch.complex(a, b) * torch.complex(cos, sin)).mT.flatten(-2)"),
    "einsum over groups": CODE.replace(HEADS, "q = q.unflatten(1, (k.shape[1], -1))").replace(
        "q @ k.transpose(-1, -2)", 'torch.einsum("bghtd,bgsd->bghts", q, k).flatten(1, 2)').replace(
        "1) @ v", "1).unflatten(1, q.shape[1:3]).matmul(v[:, :, None]).flatten(1, 2)")}
NORMS, TURNS = (f"{line}\n" for line in CODE.splitlines() if line.startswith("        q, k = "))
FAMILY = "FAMILIES = dict(llama={}, qwen2=dict(qkv_bias=True), qwen3=dict(qk_norm=True), gemma2="
WRONG = {why: line if new is None else CODE.replace(line, new) for line, new, why in (
    (f"x.chunk(2, -1)\n    return {SUM}", f"x.unflatten(-1, (-1, 2)).unbind(-1)\n    return {SUM}"
     ".unflatten(-1, (2, -1)).mT.flatten(-2)", "pairs are interleaved; x_i goes with x_{i + D/2}"),
    ("config.window if", "config.window + 1 if", "the window is one too wide; it counts the token"),
    ("repeat_interleave(q.shape[1] // k.shape[1], 1)", "repeat(1, q.shape[1] // k.shape[1], 1, 1)",
     "key heads are tiled, 0 1 0 1; neighbours share one, 0 0 1 1"),
    (" + self.eps).sqrt()", ").sqrt().add(self.eps)", "eps is outside the root; it belongs inside"),
    ("(self.offset + self.weight.float())", "self.weight.float()", "Gemma's norm takes 1 + w, and "
     "this takes w; `offset` says which"),
    ("x.float() / (x.", "(x.float() - x.float().mean(-1, keepdim=True)) / (x.", "the mean is "
     "subtracted, as in LayerNorm; RMSNorm only divides"),
    ("torch.tanh(scores / softcap)", "torch.tanh(scores)", "the cap is not divided by inside tanh"),
    (NORMS + TURNS, TURNS + NORMS, "q and k have their norms after the rotation; they come first"),
    ("at[:, :, None, None] *", "(at[:, :, None, None] + 1) *", "positions start at 1, not at 0"),
    (FAMILY + "dict(norm_offset=1.0, four_norms=True))", None, "the embedding is not scaled"),
    ("x + self.after_memory(answer)", "self.after_memory(x + answer)", "the norm after a branch "
     "takes in the residual x; it is for what is added alone"))}
