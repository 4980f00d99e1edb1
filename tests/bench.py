"""Measure the project's speed and memory, and print one table. Not a test: pytest does not collect it.

    python tests/bench.py                                              a training step, its memory, decoding, loading: a small shape, on a CPU
    python tests/bench.py --shape head17 vocab152k --against hf        the same beside Hugging Face's model, after both computed the same
    python tests/bench.py --parts growth                               does time or memory grow faster than the model's FLOPs?
    python tests/bench.py --device cuda --shape qwen2.5-1.5b --compile --json out/h200.json

Weights and token ids are random; shapes and lengths are not: --shape names a published config.json (tests/golden/configs) or a model
for a CPU, --lengths takes the lengths of a task's examples. What is compared is run in turns, after one that is not counted. A value is
the median over turns, a ratio the median of the ratios within a turn: on a CPU only ratios travel to another machine.

A step is forward, backward, clipping and AdamW on 64 sequences, as in train.py. Its memory is the peak on top of weights, gradients and
optimizer states: the allocator's on CUDA; on a CPU the profiler's, which sees every allocation of a tensor (the script first checks
that on 5 MiB). A step's FLOPs count causal attention once and nothing that is computed again:

    6 x (parameters without embedding and head) x tokens  +  6 x V d x supervised tokens  +  6 x layers x H D x sum of squared lengths

The peer's loop is what one writes first: micro-batches of 4 in random order, padded, labels -100. Memory is compared with as many tokens
in a micro-batch of ours; activations are the peak of a forward pass, before there are gradients. In decoding, a row ends where its response's length was drawn to end: what it says there is made an end-of-sequence id for all.
"""
import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import infosteer
import train
from data import BadInput, read_json
from data.tasks import find, load
from data.tokenizer import Tokenizer
from eval import Parser, command, finite, pick_device, positive, write_whole
from infosteer import Steering
from model import Config, Transformer

PUBLISHED = {"qwen2.5-1.5b": "Qwen2.5-1.5B", "llama3.2-1b": "Llama-3.2-1B", "gemma2-2b": "gemma-2-2b", "llama3-8b": "Llama-3-8B"}
SMALL = {                              # Qwen 2.5 in sizes for a CPU
    "head17": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, vocab_size=6144),      # the head is 17% of 18M
    "vocab152k": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4),                   # |V| = 151,936: 83% of 47M
}
SHAPES = ("tiny", *SMALL, *PUBLISHED)
KINDS = {                              # task -> mean and spread of prompt and response lengths, tokens that all prompts begin with, most new tokens
    "choice": ((54, 5), (5, 0), 12, 32),                           # like BoolQ: 59 tokens, 8% of them supervised
    "maths": ((76, 22), (76, 28), 0, 256),                         # like GSM8K: 152 tokens, half of them supervised
}
BATCH, PEER_MICRO = 64, 4              # sequences of a step; of the peer's micro-batches
# the bare step: without the key entropy that train.py logs in every run
infosteer.METHODS["bare"] = infosteer.Method(entropies=lambda k, steering: (k.detach()[..., 0].float() * 0, None))
TARGETS = [                            # part, what, to what, only for this shape, only for this kind, the bound of the ratio, in words
    ("step", "none", "peer", "head17", "choice", 0.75, "SFT step <= 0.75x the peer's time at a head share of 17%"),
    ("step", "none", "peer", "vocab152k", "choice", 0.35, "SFT step <= 0.35x the peer's time at |V| = 152k"),
    ("memory", "forward pass", "peer's forward pass", None, "choice", 0.25, "activation peak <= 0.25x the peer's"),
    ("step", "reg", "none", None, None, 1.05, "reg <= 1.05x the time of none"),
    ("memory", "reg", "none", None, None, 1.02, "reg <= 1.02x the memory of none"),
    ("step", "int", "none", None, None, 1.08, "int <= 1.08x the time of none"),
    ("memory", "int", "none", None, None, 1.02, "int <= 1.02x the memory of none"),
    ("decode", "generate", "peer", None, "choice", 1.4, "decoding >= 1.4x the peer's prompts/s (choice)"),
    ("decode", "generate", "peer", None, "maths", 1.25, "decoding >= 1.25x the peer's prompts/s (maths)"),
    ("load", "from_pretrained, CPU", "peer", None, None, 0.55, "loading <= 0.55x the peer's process CPU time"),
    ("agree", "gradients", "peer", None, None, 1e-5, "gradients within 1e-5 of the peer's (fp32)"),
    ("agree", "rows of tokens that differ", "peer", None, None, 0, "all tokens are the peer's"),
]
rows = []                              # of the table: what `add` was given


def add(part, what, value, unit, ratio=None, to=None, **more):
    rows.append(dict(part=part, what=what, value=value, unit=unit, ratio=ratio, to=to, **more))
    print(f"{more['shape']} {more['kind']} {part}: {what} {value:.4g} {unit}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ what is run


def config_of(shape):
    """The config.json of a named shape, as a dict."""
    published = ROOT / "tests" / "golden" / "configs"
    if shape == "tiny":
        return read_json(ROOT / "data" / "toy" / "llama" / "config.json")
    if shape in PUBLISHED:
        return read_json(published / f"{PUBLISHED[shape]}.json")
    return {**read_json(published / "Qwen2.5-1.5B.json"), **SMALL[shape], "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def lengths_of(args, kind):
    """-> [(tokens of the prompt, of response and eos)], tokens that all prompts begin with, most new tokens: of a task file or of KINDS."""
    if args.lengths:
        file = Path(args.lengths)
        examples, tokenizer = load(file.parent.parent, file.parent.name, file.stem), Tokenizer.from_pretrained(args.tokenizer)
        encoded = train.encode(examples[:2000], tokenizer, args.max_length)
        shared = len(os.path.commonprefix([ids[:n] for ids, n in encoded]))
        return [(n, len(ids) - n) for ids, n in encoded if len(ids) > n], shared, find(file.parent.name).max_new_tokens
    prompt, response, shared, most = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    drawn = [[max(least, round(mean + spread * torch.randn((), generator=generator).item())) for mean, spread, least in ((*prompt, shared + 8), (*response, 2))]
             for _ in range(2000)]
    return [(min(p, args.max_length - 2), min(r, args.max_length - min(p, args.max_length - 2))) for p, r in drawn], shared, most


def draw(lengths, shared, V, n, seed):
    """n rows as train.encode makes them, [(ids, tokens of the prompt)], of random ids. The first `shared` are the same in all."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, V, (n,), generator=generator).tolist()
    first, chosen = ids(shared), torch.randint(len(lengths), (n,), generator=generator).tolist()
    return [(first[:lengths[i][0]] + ids(max(0, lengths[i][0] - shared) + lengths[i][1]), lengths[i][0]) for i in chosen]


def backward(args, model, method, rows, checkpoint=False, budget=None, forward=False):
    """The gradients of one optimizer step, as in train.py, and its loss. forward: the loss of the first micro-batch only, with all it keeps."""
    steering, lengths, total = Steering(method), [len(ids) - 1 for ids, _ in rows], 0.0
    n_tokens, n_supervised = sum(lengths), sum(len(ids) - n for ids, n in rows)
    for batch in train.micro_batches(range(len(rows)), lengths, budget or args.micro_tokens):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            lm, _, reward = train.losses(model, *train.collate([rows[row] for row in batch]), steering, checkpoint)
        loss = lm / n_supervised - steering.lam * reward.sum() / n_tokens
        if forward:
            return loss
        loss.backward()
        total = total + loss.detach()
    return total


def update(optimizer, model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def adamw(model):
    groups = [{"params": [w for w in model.parameters() if (w.dim() >= 2) == matrix], "weight_decay": 0.01 * matrix} for matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=1e-5, fused=True)


def compiled(model):
    """A twin that shares the weights and compiles each block, as train.py --compile does."""
    with torch.device("meta"):
        twin = Transformer(model.config)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    torch._dynamo.config.specialize_float = True           # p and alpha are settings of a run, not inputs
    for block in twin.blocks:
        block.compile(dynamic=True)
    return twin


def padded(rows, device, left=False, fill=0):
    """Lists of ids -> [rows, longest]"""
    T = max(map(len, rows))
    return torch.tensor([[fill] * (T - len(ids)) * left + ids + [fill] * (T - len(ids)) * (not left) for ids in rows], device=device)


class Peer:
    """Hugging Face's model with the same weights, in the loop that one writes around it first."""

    def __init__(self, args, model, raw):
        import transformers
        transformers.logging.set_verbosity_error()
        attention = "eager" if raw["model_type"] == "gemma2" else "sdpa"       # the squashed scores of Gemma 2 have no other
        with torch.device(args.device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**raw), attn_implementation=attention, dtype=model.embed.weight.dtype)
        missing, unexpected = self.model.load_state_dict({name: weight.detach() for _, name, weight in model._named()}, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self.model.tie_weights()
        self.args = args

    def backward(self, rows, bf16=None, forward=False):
        """The mean over the supervised tokens of the step, as ours; so is `forward`."""
        device, total, n_supervised = self.args.device, 0.0, sum(len(ids) - n for ids, n in rows)
        for part in (rows[start:start + PEER_MICRO] for start in range(0, len(rows), PEER_MICRO)):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16 if bf16 is None else bf16):
                loss = self.model(padded([ids for ids, _ in part], device), attention_mask=padded([[1] * len(ids) for ids, _ in part], device), use_cache=False,
                                  labels=padded([[-100] * n + ids[n:] for ids, n in part], device, fill=-100),
                                  num_items_in_batch=torch.tensor(n_supervised, device=device)).loss
            if forward:
                return loss
            loss.backward()
            total = total + loss.detach()
        return total

    @torch.inference_mode()
    def generate(self, prompts, most, eos):
        """Batches in the order of the data, padded on the left; each row up to its first end-of-sequence id."""
        outputs = []
        for part in (prompts[start:start + self.args.peer_batch] for start in range(0, len(prompts), self.args.peer_batch)):
            tokens, mask = padded(part, self.args.device, left=True), padded([[1] * len(p) for p in part], self.args.device, left=True)
            new = self.model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=most, use_cache=True, eos_token_id=list(eos), pad_token_id=0)
            outputs += [row[:next((i + 1 for i, id in enumerate(row) if id in eos), None)] for row in new[:, tokens.shape[1]:].tolist()]
        return outputs

    @torch.inference_mode()
    def log_likelihood(self, prompts, continuations):
        scores, pairs = [], [(p, p + c) for p, c in zip(prompts, continuations)]
        for part in (pairs[start:start + self.args.peer_batch] for start in range(0, len(pairs), self.args.peer_batch)):
            tokens, mask = padded([ids for _, ids in part], self.args.device), padded([[1] * len(ids) for _, ids in part], self.args.device)
            log_p = self.model(tokens, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
            scores += [log_p[i, len(p) - 1:len(ids) - 1].gather(-1, tokens[i, len(p):len(ids), None]).sum().item() for i, (p, ids) in enumerate(part)]
        return scores


# ---------------------------------------------------------------------------------------------------------------- measuring


def in_turns(works, repeats, device):
    """{name: function of the turn} -> {name: seconds of each turn}. Turn 0 is not counted; each turn has another order, since what ran before is felt."""
    seconds = {name: [] for name in works}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with tqdm(total=(repeats + 1) * len(works), desc="measuring", unit="run", leave=False, disable=None) as bar:
        for turn in range(repeats + 1):
            for name in random.Random(turn).sample([*works], len(works)):
                bar.set_postfix_str(name)
                wait()
                began = time.perf_counter()
                works[name](turn)
                wait()
                seconds[name].append(time.perf_counter() - began)
                bar.update()
    return {name: values[1:] for name, values in seconds.items()}


def ratio(ours, theirs):
    return statistics.median(a / b for a, b in zip(ours, theirs))


def peak_of(work, model, device):
    """Bytes of tensors at the peak of work(), on top of what was there before, with the gradients of the model among that."""
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
        peak = max(itertools.accumulate((e.nbytes() for e in events), initial=0))          # allocations, and releases below 0
    model.zero_grad()
    return peak


def flops_of(model, rows):
    """Of forward and backward of a step: the formula above."""
    config, lengths = model.config, [len(ids) - 1 for ids, _ in rows]
    body = sum(weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2 and not name.startswith(("embed.", "head.")))
    return (6 * body * sum(lengths) + 6 * config.vocab_size * config.d * sum(len(ids) - n for ids, n in rows)
            + 6 * config.n_layers * config.n_heads * config.head_dim * sum(t * t for t in lengths))


def measure_steps(args, shape, kind, raw):
    """Time and memory of a training step, and whether the peer computes the same."""
    lengths, shared, _ = lengths_of(args, kind)
    model, where = Transformer(Config.from_dict(raw)).initialise(0).to(args.device), dict(shape=shape, kind=kind)
    data = [draw(lengths, shared, model.config.vocab_size, BATCH, turn) for turn in range(args.repeats + 1)]
    works = {name: (model, partial(backward, args, model, name)) for name in ("none", "bare", "int", "reg")}      # name -> whose weights, and the gradients
    works |= {f"{name} + checkpoint": (model, partial(backward, args, model, name, checkpoint=True)) for name in ("none", "int", "reg")}
    if args.compile:
        twin = compiled(model)
        works |= {f"{name} + compile": (model, partial(backward, args, twin, name)) for name in ("none", "int", "reg")}
    to = dict.fromkeys(works, "none") | {"none": None}
    if args.against:
        peer = Peer(args, model, raw)
        works["peer"], to["none"], to["peer"] = (peer.model, peer.backward), "peer", None
        losses = [backward(type(args)(**{**vars(args), "bf16": False}), model, "none", data[0]).item(), peer.backward(data[0], bf16=False).item()]
        theirs = dict(peer.model.named_parameters())
        pairs = [(weight.grad, theirs[name].grad) for _, name, weight in model._named()]
        apart = (sum((a - b).square().sum().item() for a, b in pairs) / sum(b.square().sum().item() for _, b in pairs)) ** 0.5
        add("agree", "loss", losses[0], "nats", abs(losses[0] / losses[1] - 1), "peer", **where)
        add("agree", "gradients", apart, "of their norm", apart, "peer", **where)
    optimizers = {owner: adamw(owner) for owner, _ in works.values()}

    def step(name, turn):
        owner, gradients = works[name]
        gradients(data[turn])
        update(optimizers[owner], owner)

    for owner in optimizers:
        owner.zero_grad()
    if "step" in args.parts:
        seconds = in_turns({name: partial(step, name) for name in works}, args.repeats, args.device)
        tokens, flops = statistics.mean(sum(len(ids) - 1 for ids, _ in rows) for rows in data[1:]), statistics.mean(flops_of(model, rows) for rows in data[1:])
        for name in works:
            each = statistics.median(seconds[name])
            add("step", name, each, "s", to[name] and ratio(seconds[name], seconds[to[name]]), to[name], **where, tokens_per_second=tokens / each,
                tflops=flops / each / 1e12, mfu=flops / each / 1e12 / args.peak_tflops if args.bf16 else None)
    if "memory" in args.parts:
        exact = peak_of(lambda: torch.empty(2**20).add_(torch.empty(2**18).sum()), torch.nn.Module(), torch.device("cpu"))
        assert 0 <= exact - 5 * 2**20 < 2**12, f"a peak of 5 MiB is measured as {exact} bytes"
        if args.against:
            for also, checkpoint in (("", False), (" + checkpoint", True)):
                few = partial(backward, args, model, "none", checkpoint=checkpoint, budget=PEER_MICRO * max(len(ids) for ids, _ in data[0]))
                works[f"none{also}, {PEER_MICRO} at once"], to[f"none{also}, {PEER_MICRO} at once"] = (model, few), "peer"
                works[f"forward pass{also}"], to[f"forward pass{also}"] = (model, partial(few, forward=True)), "peer's forward pass"
            works["peer's forward pass"] = peer.model, partial(peer.backward, forward=True)
            to["peer's forward pass"] = to["none"] = None              # the peer takes fewer tokens at once
        seen = (name for name in works if args.device.type == "cuda" or "compile" not in name)         # the profiler does not see buffers of compiled code
        peaks = {name: peak_of(partial(works[name][1], data[0]), works[name][0], args.device) for name in seen}
        for name, peak in peaks.items():
            add("memory", name, peak / 2**20, "MiB", to[name] and peak / peaks[to[name]], to[name], **where)


def measure_decoding(args, shape, kind, raw):
    """Prompts per second of a task, and of ranking four answers of four tokens that differ in the last one."""
    lengths, shared, most = lengths_of(args, kind)
    most, where, model = min(most, args.max_new_tokens or most), dict(shape=shape, kind=kind), Transformer(Config.from_dict(raw)).initialise(0)
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight *= 4 if weight.dim() == 2 else 1        # at the usual scale a random model says one token again and again
    model = model.to(args.device, torch.bfloat16 if args.bf16 else torch.float32).eval()
    data = draw(lengths, shared, model.config.vocab_size, args.prompts, 0)
    prompts = [ids[:n] for ids, n in data]
    model.config = dataclasses.replace(model.config, eos_ids=())
    said = model.generate(prompts, most)
    eos = {row[len(ids) - n - 1] for row, (ids, n) in zip(said, data) if len(ids) - n <= most} or {2}
    model.config, found = dataclasses.replace(model.config, eos_ids=tuple(eos)), {}
    works = {"generate": lambda turn: found.update(ours=model.generate(prompts, most))}
    if kind.startswith("choice"):
        asked = [p for p in prompts for _ in range(4)], [[5, 6, 7, 8 + choice] for _ in prompts for choice in range(4)]
        works["likelihood"] = lambda turn: found.update(scores=model.log_likelihood(*asked))
    if args.against:
        peer = Peer(args, model, raw)
        works |= {"peer generate": lambda turn: found.update(theirs=peer.generate(prompts, most, eos))}
        works |= {"peer likelihood": lambda turn: found.update(their_scores=peer.log_likelihood(*asked))} if "likelihood" in works else {}
    for work in works.values():
        work(0)
    if args.against:
        differ = sum(a != b for a, b in zip(found["ours"], found["theirs"], strict=True))
        add("agree", "rows of tokens that differ", differ, f"of {len(data)}", differ, "peer", **where)
        if "likelihood" in works:
            apart = max(abs(a - b) for a, b in zip(found["scores"], found["their_scores"], strict=True))
            add("agree", "log-likelihoods", apart, "nats", apart, "peer", **where)
    add("decode", "new tokens of a prompt", statistics.mean(map(len, found["ours"])), f"at most {most}", **where)
    seconds = in_turns(works, args.repeats, args.device)
    for name in works:
        other = seconds.get(f"peer {name}")
        add("decode", name, len(data) / statistics.median(seconds[name]), "prompts/s", other and ratio(other, seconds[name]), other and "peer", **where)


LOAD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[4]))
if sys.argv[3] == "ours":
    from model import Transformer
    load = lambda folder: Transformer.from_pretrained(folder)
else:
    import transformers
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    kind = getattr(transformers, sys.argv[3])
    load = lambda folder: kind.from_pretrained(folder, dtype=torch.float32)
cpu, wall = time.process_time(), time.perf_counter()
model = load(sys.argv[2])
loaded = time.process_time(), time.perf_counter()
print(loaded[0] - cpu, loaded[1] - wall, loaded[0], sum(float(w.detach().double().sum()) for w in model.parameters()))
"""


def measure_loading(args, shape, raw):
    """A bf16 checkpoint, read as fp32 in new processes: CPU time and wall time of the call alone, and CPU time of the process, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        Transformer(Config.from_dict(raw)).initialise(0).to(torch.bfloat16).save_pretrained(folder)
        found = {name: [] for name in ["ours"] + [raw["architectures"][0]] * bool(args.against)}
        for turn in tqdm(range(args.repeats + 1), desc="loading", unit="turn", leave=False, disable=None):
            for name, values in found.items():
                done = subprocess.run([sys.executable, "-c", LOAD, ROOT, folder, name, str(torch.get_num_threads())], capture_output=True, text=True)
                if done.returncode:
                    raise BadInput(f"loading {shape} failed: {done.stderr.strip().splitlines()[-1]}")
                values.append([float(number) for number in done.stdout.split()])
    checks = [values[0][-1] for values in found.values()]
    assert max(checks) - min(checks) <= 1e-6 * max(map(abs, checks)) + 1e-3, f"not the same weights: {checks}"
    for column, what in enumerate(("from_pretrained, CPU", "from_pretrained, wall", "with imports, CPU")):
        ours, *theirs = [[value[column] for value in values[1:]] for values in found.values()]
        add("load", what, statistics.median(ours), "s", ratio(ours, theirs[0]) if theirs else None, "peer" if theirs else None,
            shape=shape, kind="")


def measure_growth(args, shape, raw):
    """A step as the work grows: time per FLOP, and memory per token of a micro-batch and memory of the model, relative to the first of a series."""
    wide = {**raw, **{key: 2 * raw[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")}}
    series = {"length": [(f"{n} x {T} tokens", raw, n, T) for T, n in ((64, 32), (128, 16), (256, 8), (512, 4), (1024, 2))],
              "batch": [(f"{n} x 128 tokens", raw, n, 128) for n in (8, 16, 32, 64)],
              "model": [("1 x", raw, 16, 128), ("2 x layers", {**raw, "num_hidden_layers": 2 * raw["num_hidden_layers"]}, 16, 128), ("2 x width", wide, 16, 128)]}
    for kind, sizes in series.items():
        models, works, first = {}, {}, None
        for label, change, n, T in sizes:
            model = Transformer(Config.from_dict(change)).initialise(0).to(args.device)
            data = draw([(T - T // 8, T // 8 + 1)], 0, model.config.vocab_size, n, 0)
            models[label] = model, data, partial(backward, args, model, "none", data)
            works[label] = lambda turn, of=models[label], optimizer=adamw(model): (of[2](), update(optimizer, of[0]))
        seconds = in_turns(works, args.repeats, args.device)
        for label, _, n, T in sizes:
            model, data, gradients = models[label]
            flops, each, peak = flops_of(model, data), statistics.median(seconds[label]), peak_of(gradients, model, args.device)
            now = [s / flops for s in seconds[label]], peak / min(n * T, max(args.micro_tokens, T)) / (model.config.n_layers * model.config.d_m)
            first = first or now
            where = dict(shape=shape, kind=kind)
            add("growth", f"{label}: time per FLOP", each, "s", ratio(now[0], first[0]), "first", **where, tflops=flops / each / 1e12, tokens_per_second=n * T / each)
            add("growth", f"{label}: memory per token and k_i", peak / 2**20, "MiB", now[1] / first[1], "first", **where)


# ------------------------------------------------------------------------------------------------------------------- output


def table():
    cells = [("part", "shape", "data", "what", "value", "", "ratio", "to", "tokens/s", "TFLOP/s", "MFU")]
    for row in rows:
        share = "" if row["ratio"] is None else f"{row['ratio']:{'.1e' if row['part'] == 'agree' else '.3f'}}"
        speed = (f"{row[key]:{form}}" if row.get(key) else "" for key, form in (("tokens_per_second", ",.0f"), ("tflops", ".3g"), ("mfu", ".1%")))
        cells.append((row["part"], row["shape"], row["kind"], row["what"], f"{row['value']:.4g}", row["unit"], share, row["to"] or "", *speed))
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) if i in (4, 6, 8, 9, 10) else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                     for line in cells)


def targets():
    """[(target, where, measured, met?)] for what was measured."""
    return [(words, f"{row['shape']} {row['kind']}".strip(), row["ratio"], row["ratio"] >= bound if ">=" in words else row["ratio"] <= bound)
            for part, what, to, shape, kind, bound, words in TARGETS for row in rows
            if (row["part"], row["what"], row["to"]) == (part, what, to) and shape in (None, row["shape"]) and row["kind"].startswith(kind or "")]


def main():
    parser = Parser(prog="tests/bench.py", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["head17"], help="(default: head17)")
    parser.add_argument("--parts", choices=("step", "memory", "decode", "load", "growth"), nargs="+", default=["step", "memory", "decode", "load"],
                        help="(default: step memory decode load)")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="built-in lengths: like BoolQ, like GSM8K (default: both)")
    parser.add_argument("--lengths", metavar="FILE", help="in place of --kind: the lengths of a task file, DATA/TASK/train.json or test.json")
    parser.add_argument("--tokenizer", metavar="DIR", default=str(ROOT / "data" / "toy" / "llama"), help="for --lengths (default: the toy world's)")
    parser.add_argument("--against", choices=("hf",), help="the peer: the same work on Hugging Face's model, if transformers is installed")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks (their memory on CUDA only)")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns that count (default: 5)")
    parser.add_argument("--prompts", type=positive, default=64, metavar="N", help="prompts that are answered in a turn (default: 64)")
    parser.add_argument("--peer-batch", type=positive, default=32, metavar="N", help="prompts in a batch of the peer (default: 32)")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="fewer new tokens than 32 (choice) and 256 (maths)")
    parser.add_argument("--max-length", type=positive, default=256, metavar="N", help="tokens of prompt and response (default: 256)")
    parser.add_argument("--micro-tokens", type=positive, metavar="N", help="as in train.py")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu). On cuda in bf16: autocast in training, weights in decoding")
    parser.add_argument("--threads", type=positive, metavar="N", help="of a CPU (default: torch's own choice)")
    parser.add_argument("--peak-tflops", type=finite, default=790, metavar="X", help="of the GPU, for MFU (default: 790, an H200 in bf16)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured here too")
    args = parser.parse_args()
    if args.against and not importlib.util.find_spec("transformers"):
        raise BadInput("--against hf needs the transformers library, which is not installed here; nothing else does")
    if args.lengths and not Path(args.lengths).is_file():
        raise BadInput(f"--lengths {args.lengths}: no such file; DATA/TASK/train.json or test.json is needed, as python data/prepare.py makes them")
    if args.max_length < 2:
        raise BadInput("--max-length 1 has no room for a prompt and a response")
    if args.json:
        folder = Path(args.json).resolve().parent                              # now, and not after all the work
        folder.mkdir(parents=True, exist_ok=True)
        if Path(args.json).is_dir() or not os.access(folder, os.W_OK):
            raise BadInput(f"--json {args.json}: cannot be written; give the name of a file in a folder of yours")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.device = pick_device(args.device)
    args.bf16 = args.device.type == "cuda"
    args.micro_tokens = args.micro_tokens or train.MICRO_TOKENS["cuda" if args.bf16 else "cpu"]
    task = args.lengths and find(Path(args.lengths).parent.name)
    kinds = [f"{'maths' if task.kind == 'arithmetic' else 'choice'}, {task.name}"] if task else args.kind
    for shape in args.shape:
        raw = config_of(shape)
        for kind in kinds:
            if {"step", "memory"} & set(args.parts):
                measure_steps(args, shape, kind, raw)
            if "decode" in args.parts:
                measure_decoding(args, shape, kind, raw)
        if "load" in args.parts:
            measure_loading(args, shape, raw)
        if "growth" in args.parts:
            measure_growth(args, shape, raw)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, " + (
        torch.cuda.get_device_name(args.device) if args.bf16 else f"{platform.processor() or platform.machine()} CPU: only the ratios travel")
    print(f"{table()}\n\n{machine}; medians of {args.repeats}")
    for words, where, measured, met in targets():
        print(f"{'met' if met else 'NOT met':8} {words}: {measured:.3g} ({where})")
    if args.json:
        settings = {key: str(value) if key == "device" else value for key, value in vars(args).items()}
        write_whole(args.json, json.dumps({"machine": machine, "settings": settings, "rows": rows, "targets": targets()}, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
