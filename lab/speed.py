"""Measure speed and memory, on random weights of a real model's shape.

    python -m lab.speed                                a small shape on a CPU, a few minutes
    python -m lab.speed --shape head17 vocab152k --against hf
    python -m lab.speed --device cuda --shape MODEL/config.json --micro-tokens 16384
    python -m lab.speed --fits                         how much GPU memory each model needs
    python -m lab.speed --model DIR --task ARC-Easy --data data/public --precision bf16 --against hf

What is compared runs in turns of random order. The first turn is not counted. A value is the median
over turns, and a ratio is the median of the ratios within each turn. On a CPU, only ratios mean
something on another machine.

step      seconds of forward, backward, clipping and AdamW on 64 sequences, as in train.py. FLOPs
          count causal attention once and nothing that is computed again:
              6 x (parameters without embedding and head) x tokens
              + 6 x V d x supervised tokens + 6 x layers x H D x sum of squared lengths
memory    MiB at the peak of a step on top of weights, gradients and AdamW's moments, and of a
          forward pass of 4 sequences. On a CPU the profiler finds it, which sees every tensor.
decode    seconds to answer 64 prompts, token by token
rank      seconds to rank the answers of the items of a step by likelihood (with --model)

--model measures a published checkpoint on a task's training rows: a step, the memory of the process
after three, greedy decoding, and ranking the answers of each item.

--against hf does the same work with the transformers library, in the loop that one writes first:
micro-batches of 4 in random order, padded, the LM head on all tokens; with --model, its best of 4,
8 and 16. Whether both have the same gradients and say the same is looked at before it is timed.
"""
import dataclasses
import gc
import importlib.util
import itertools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from data import BadInput, Parser, command, positive, progress, read_json, write_whole
from data.runs import peak_memory
from data.tasks import load as load_examples
from eval import TOY_FOLDER, load, pairs_of, pick_device, pick_dtype
from infosteer import Steering
from model import Config, Transformer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "tests" / "golden" / "configs"                # published config.json files
QWEN = CONFIGS / "Qwen2.5-1.5B.json"
SHAPES = {                             # name -> a config.json, and what is smaller, for a CPU
    "tiny": (TOY_FOLDER / "llama" / "config.json", {}),
    "head17": (QWEN, dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
                          num_attention_heads=8, num_key_value_heads=2, vocab_size=6144,
                          bos_token_id=1, eos_token_id=2)),    # the LM head is 17% of 18M
    "vocab152k": (QWEN, dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
                             num_attention_heads=4)),          # the LM head is 83% of 47M
}
PARTS = ("step", "memory", "decode")
BATCH = 64                             # sequences in a step, and prompts to answer
PEER_STEP, PEER_DECODING = 4, 32       # sequences in a micro-batch of the peer
PEER_STEPS = 4, 8, 16                  # of which the best counts, for a published model
KINDS = {              # tokens: of a prompt, of a response, that all prompts begin with, to decode
    "choice": ((44, 64), (5, 5), 12, 32),      # like BoolQ, where 8% of the tokens is supervised
    "maths": ((40, 112), (30, 122), 0, 256),   # like GSM8K, where half of them is
}


class Results(list):
    """What was measured, one dict each. A line is printed as soon as its number is there."""

    def add(self, shape, kind, part, what, value, unit, ratio=None, to=None, tokens=0, flops=0):
        self.append(dict(part=part, shape=shape, kind=kind, what=what, value=value, unit=unit,
                         ratio=ratio, to=to, tokens_per_second=tokens, flops_per_second=flops))
        compared = f"  {ratio:.3g} x {to}" if to else ""
        speed = f"  {tokens:,.0f} tokens/s, {flops / 1e12:.3g} TFLOP/s" if tokens else ""
        print(f"{shape:9} {kind:6} {part:6} {what:24} {value:9.4g} {unit}{compared}{speed}",
              flush=True)


# ------------------------------------------------------------------------------- what is run


def config_of(shape):
    """The config.json of a named shape, or of a file, as a dict."""
    file, smaller = SHAPES.get(shape, (shape, {}))
    return {**read_json(file), **smaller}


def new_model(raw, device, dtype=torch.float32):
    return Transformer(Config.from_dict(raw)).initialise(0).to(device, dtype)


def draw(kind, vocab_size, n, seed):
    """n rows as train.encode makes them, of random ids: [(ids, tokens of the prompt)]."""
    (prompt, response, shared, _), generator = KINDS[kind], random.Random(seed)
    first, rows = generator.choices(range(3, vocab_size), k=shared), []
    for _ in range(n):
        n_prompt = generator.randint(*prompt)
        n_rest = n_prompt - shared + generator.randint(*response)
        rows.append((first + generator.choices(range(3, vocab_size), k=n_rest), n_prompt))
    return rows


def backward(args, model, method, rows, checkpoint=False, budget=None, forward=False):
    """The gradients of one optimizer step, as in train.py -> its loss. With `forward`, the loss of
    the first micro-batch only, and all that its backward pass would need."""
    steering, total, shared = Steering(method), 0.0, args.bf16 and args.device.type == "cpu"
    lengths = [len(ids) - 1 for ids, _ in rows]
    n_tokens, n_supervised = sum(lengths), sum(len(ids) - n for ids, n in rows)
    for batch in train.micro_batches(range(len(rows)), lengths, budget or args.micro_tokens,
                                     not shared):
        with torch.autocast(args.device.type, torch.bfloat16, args.bf16, cache_enabled=False):
            loss, *_ = train.step_loss(model, [rows[row] for row in batch], n_supervised, n_tokens,
                                       steering, checkpoint, shared=shared)
        if forward:
            return loss
        loss.backward()
        total = total + loss.detach()
    return total


def update(optimizer, model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def padded(rows, device, fill=0, left=False):
    """Lists of ids -> [rows, longest]"""
    T = max(map(len, rows))
    filled = [[fill] * (T - len(ids)) + ids if left else ids + [fill] * (T - len(ids))
              for ids in rows]
    return torch.tensor(filled, device=device)


class Peer:
    """The same weights in the transformers library, with the loop that one writes first."""

    def __init__(self, args, model, folder=None):
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # The squashed scores of Gemma 2 have no other kernel there.
        attention = "eager" if model.config.attn_softcap else "sdpa"
        with tempfile.TemporaryDirectory() as made:
            folder or model.save_pretrained(made)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder or made, attn_implementation=attention, dtype=model.embed.weight.dtype)
        self.model, self.args = self.model.to(args.device), args

    def backward(self, rows, forward=False, size=PEER_STEP):
        """As `backward` does; the loss is the mean over the supervised tokens of the step."""
        device, total = self.args.device, 0.0
        n_supervised = torch.tensor(sum(len(ids) - n for ids, n in rows), device=device)
        for start in range(0, len(rows), size):
            part = rows[start:start + size]
            tokens = padded([ids for ids, _ in part], device)                      # [size, T]
            mask = padded([[1] * len(ids) for ids, _ in part], device)
            labels = padded([[-100] * n + ids[n:] for ids, n in part], device, fill=-100)
            with torch.autocast(device.type, torch.bfloat16, self.args.bf16):
                loss = self.model(tokens, attention_mask=mask, labels=labels, use_cache=False,
                                  num_items_in_batch=n_supervised).loss
            if forward:
                return loss
            loss.backward()
            total = total + loss.detach()
        return total

    @torch.inference_mode()
    def generate(self, prompts, most, eos):
        """Batches in the order of the data, padded on the left; each row ends at its first eos."""
        outputs, device = [], self.args.device
        for start in range(0, len(prompts), PEER_DECODING):
            part = prompts[start:start + PEER_DECODING]
            tokens = padded(part, device, left=True)                               # [32, T]
            mask = padded([[1] * len(ids) for ids in part], device, left=True)
            new = self.model.generate(tokens, attention_mask=mask, do_sample=False, use_cache=True,
                                      max_new_tokens=most, eos_token_id=list(eos), pad_token_id=0)
            for row in new[:, tokens.shape[1]:].tolist():
                ends = [i + 1 for i, token in enumerate(row) if token in eos]
                outputs.append(row[:ends[0] if ends else None])
        return outputs


    @torch.inference_mode()
    def rank(self, pairs):
        """log P(continuation | prompt) of each pair: padded batches of whole texts, all logits."""
        scores, device = [], self.args.device
        for start in range(0, len(pairs), PEER_DECODING):
            part = pairs[start:start + PEER_DECODING]
            tokens = padded([prompt + more for prompt, more in part], device)      # [32, T]
            mask = padded([[1] * len(prompt + more) for prompt, more in part], device)
            logits = self.model(tokens, attention_mask=mask, use_cache=False).logits.float()
            found = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
            scores += [row[len(prompt) - 1:len(prompt + more) - 1].sum().item()
                       for row, (prompt, more) in zip(found, part)]
        return scores


# ------------------------------------------------------------------------------- measuring


def in_turns(args, add, part, works, to=lambda name: "peer", size=lambda name: (0, 1)):
    """Time {name: function of the turn}. Each turn has another order, since what ran before is
    felt. to(name) is what a work is compared with, and size(name) its tokens and FLOPs."""
    seconds = {name: [] for name in works}
    wait = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    with progress(total=(args.turns + 1) * len(works), desc="measuring", unit="run") as bar:
        for turn in range(args.turns + 1):
            for name in random.Random(turn).sample([*works], len(works)):
                wait()
                began = time.perf_counter()
                works[name](turn)
                wait()
                seconds[name].append(time.perf_counter() - began)
                bar.update()
    for name in works:
        others = [other for other in works if other != name
                  and (other == to(name) or other.startswith(f"{to(name)}, "))]
        other = min(others, key=lambda other: statistics.median(seconds[other][1:]), default=None)
        pairs = zip(seconds[name][1:], seconds[other or name][1:])
        share = statistics.median(ours / theirs for ours, theirs in pairs)
        each, (tokens, flops) = statistics.median(seconds[name][1:]), size(name)
        add(part, name, each, "s", share, other, tokens / each, flops / each)


def peak_of(work, model, device):
    """Bytes of tensors at the peak of work(), on top of those before it. The gradients of the model
    are there before."""
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profiler:
            work()
        events = [event for event in profiler.profiler.kineto_results.events()
                  if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())        # allocations, releases below 0
        peak = max(itertools.accumulate((event.nbytes() for event in events), initial=0))
    model.zero_grad()
    return peak


def flops_of(model, rows):
    """Of forward and backward of a step: the formula above."""
    config, lengths = model.config, [len(ids) - 1 for ids, _ in rows]
    body = sum(weight.numel() for weight in model.blocks.parameters() if weight.dim() == 2)
    head = config.vocab_size * config.d * sum(len(ids) - n for ids, n in rows)
    pairs = config.n_layers * config.n_heads * config.head_dim * sum(T * T for T in lengths)
    return 6 * (body * sum(lengths) + head + pairs)


def check_gradients(args, add, model, peer, rows, gradients):
    """Do both compute the same? The gradients are 0 afterwards. Raises BadInput if not."""
    add("agree", "loss", abs(gradients(rows) / peer.backward(rows) - 1).item(), "of it")
    theirs = {name: weight.grad for name, weight in peer.model.named_parameters()}
    apart = max(((weight.grad - theirs[name]).norm() / theirs[name].norm()).item()
                for _, name, weight in model._named())
    add("agree", "gradients", apart, "of their norm")
    if not apart < (0.2 if args.bf16 else 1e-3):               # of bf16, in each of many layers
        raise BadInput("--against hf: the gradients differ, so there is nothing to compare")
    model.zero_grad()
    peer.model.zero_grad()


def measure_steps(args, add, model, data, folder=None):
    """Time and memory of training steps, whose rows are in `data`, and whether the peer computes
    the same. A published model in `folder` is compared with the peer's best of PEER_STEPS."""
    four = PEER_STEP * max(len(ids) - 1 for ids, _ in data[0])
    plain = partial(backward, args, model, "none")
    passes = {"none": (plain, model, "peer")}      # name: (gradients of rows, whose, compared with)
    forward = {"forward": (partial(plain, budget=four, forward=True), model, "peer's forward")}
    if not folder:
        passes |= {"int": (partial(backward, args, model, "int"), model, "none"),
                   "reg": (partial(backward, args, model, "reg"), model, "none"),
                   "none + checkpoint": (partial(plain, checkpoint=True), model, "none")}
    optimizers = {model: torch.optim.AdamW(model.parameters(), 0.0, fused=True)}
    if folder:
        for rows in data[:3]:          # before the peer is there
            plain(rows)
            update(optimizers[model], model)
        add("memory", "the process, 3 steps", peak_memory(args.device) / 2**30, "GiB")
    if args.against:
        peer = Peer(args, model, folder)
        optimizers[peer.model] = torch.optim.AdamW(peer.model.parameters(), 0.0, fused=True)
        check_gradients(args, add, model, peer, data[0], plain)
        for n in PEER_STEPS if folder else [PEER_STEP]:
            name = f"peer, {n} rows" if folder else "peer"
            passes[name] = partial(peer.backward, size=n), peer.model, None
        forward["peer's forward"] = partial(peer.backward, forward=True), peer.model, None
    if args.compile:
        torch._dynamo.config.specialize_float = True           # p and alpha are constants of a run
        for block in model.blocks:
            block.compile(dynamic=True)
    if "step" in args.parts:
        def step(gradients, owner, _, turn):
            gradients(data[turn])
            update(optimizers[owner], owner)

        size = (statistics.mean(sum(len(ids) - 1 for ids, _ in rows) for rows in data[1:]),
                statistics.mean(flops_of(model, rows) for rows in data[1:]))
        in_turns(args, add, "step", {name: partial(step, *each) for name, each in passes.items()},
                 lambda name: passes[name][2], lambda name: size)
    if "memory" in args.parts and not folder and (args.bf16 or not args.compile):
        passes.pop("peer", None)       # it takes fewer tokens at a time; compare the forward passes
        peaks = {name: peak_of(partial(gradients, data[0]), owner, args.device) / 2**20
                 for name, (gradients, owner, _) in {**passes, **forward}.items()}
        for name, (_, _, to) in {**passes, **forward}.items():
            to = to if to in peaks else None
            add("memory", name, peaks[name], "MiB", to and peaks[name] / peaks[to], to)


def measure_shape(args, add, kind, raw):
    """A step, and decoding where a row ends where its drawn response does: what the model says
    there ends a sequence."""
    model, most = new_model(raw, args.device), KINDS[kind][-1]
    vocabulary = model.config.vocab_size
    if {"step", "memory"} & set(args.parts):
        measure_steps(args, add, model, [draw(kind, vocabulary, BATCH, turn)
                                         for turn in range(args.turns + 1)])
    if "decode" not in args.parts:
        return
    model = new_model(raw, args.device, torch.bfloat16 if args.bf16 else torch.float32).eval()
    with torch.no_grad():
        for weight in model.blocks.parameters():   # at the usual scale it repeats one token
            weight *= 4 if weight.dim() == 2 else 1
    rows = draw(kind, vocabulary, BATCH, 0)
    prompts = [ids[:n] for ids, n in rows]
    model.config = dataclasses.replace(model.config, eos_ids=())
    said = model.generate(prompts, most)
    ends = {row[len(ids) - n - 1] for row, (ids, n) in zip(said, rows) if len(ids) - n <= most}
    model.config = dataclasses.replace(model.config, eos_ids=tuple(ends))
    measure_decoding(args, add, model, prompts, most)


def measure_checkpoint(args, add):
    """A published model on a task's rows: steps, decoding, and ranking of each item's options."""
    examples = load_examples(args.data, args.task, "train")[:args.rows * (args.turns + 1)]
    model, tokenizer = load(args.model, device=args.device)
    rows = train.encode(examples, tokenizer, LONGEST)
    data = [rows[start:start + args.rows] for start in range(0, len(rows), args.rows)]
    if {"step", "memory"} & set(args.parts):
        measure_steps(args, add, model, data * (args.turns + 1), args.model)
    if "decode" in args.parts:
        model = model.to(torch.bfloat16 if args.bf16 else torch.float32).eval()
        pairs = [pair for example in examples[:args.rows]
                 for pair in pairs_of(tokenizer, example, "choice")[0]]
        measure_decoding(args, add, model, [ids[:n] for ids, n in data[0]], 32, pairs, args.model)


def measure_decoding(args, add, model, prompts, most, pairs=(), folder=None):
    """Answering prompts with at most so many tokens; the likelihood of (prompt, continuation)s."""
    said = model.generate(prompts, most)
    add("decode", "new tokens in a row", statistics.mean(map(len, said)), "")
    decode = {"generate": lambda turn: model.generate(prompts, most)}
    rank = {"rank": lambda turn: model.log_likelihood(*zip(*pairs))}
    if args.against:
        peer, ends = Peer(args, model, folder), set(model.config.eos_ids)
        decode["peer"] = lambda turn: peer.generate(prompts, most, ends)
        rank["peer"] = lambda turn: peer.rank(pairs)
        differing = sum(ours != theirs for ours, theirs in zip(said, decode["peer"](0)))
        add("agree", "rows with other tokens", differing, f"of {len(prompts)}")
    in_turns(args, add, "decode", decode)
    if pairs and args.against:
        scores = zip(rank["rank"](0), rank["peer"](0), strict=True)
        apart = max(abs(ours - theirs) for ours, theirs in scores)
        add("agree", "likelihoods", apart, "nats at most")
    in_turns(args, add, "rank", rank if pairs else {})


# ---------------------------------------------------------------------------- what fits where

SETTINGS = {           # flags: (tokens in a micro-batch, is --checkpoint given?, is --offload?)
    "as it is": (4096, False, False),
    "--micro-tokens 1024": (1024, False, False),
    "and --checkpoint": (1024, True, False),
    "and lab.spread --offload": (1024, True, True),
}
LONGEST, SUPERVISED = 256, 0.1         # tokens in a row; the share of supervised ones


def gpu_bytes(config, tokens, checkpoint, offload):
    """The peak of a training step. Weights, gradients and AdamW's two moments are fp32: 16 bytes a
    parameter. What autograd keeps in bf16 comes on top, and a copy of the logits' gradient."""
    kept = {}

    def keep(tensor):                  # storages are held on to, so that none gets another's number
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    n_supervised = int(SUPERVISED * tokens)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):      # shapes, no data
        model = Transformer(config)
        weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        at = torch.zeros(n_supervised, dtype=torch.long)
        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
              torch.autocast("cpu", torch.bfloat16, cache_enabled=False)):
            ids = torch.zeros(tokens // LONGEST, LONGEST, dtype=torch.long)
            F.cross_entropy(model.predict(ids, at, Steering(), checkpoint)[0], at)
        block = sum(weight.numel() for weight in model.blocks[0].parameters())
        every = sum(weight.numel() for weight in model.parameters())
        saved = sum(kept[number].nbytes() for number in kept.keys() - weights)
    held = 16 * every
    if offload:        # there are embedding and head with gradients; two blocks, gradients of one
        held = 8 * (every - block * config.n_layers) + (3 * 4 + 2) * block
    again = 18 * block if checkpoint else 0        # a block computed again, as much as its weights
    return held + saved + again + 8 * n_supervised * config.vocab_size


def what_fits(shapes):
    """Print the GPU memory that training needs, computed from shapes alone: no GPU, no weights."""
    print(f"| GB, a tenth to spare | {' | '.join(SETTINGS)} |\n{'|---' * (len(SETTINGS) + 1)}|")
    for shape in shapes:
        config = Config.from_dict(config_of(shape))
        needs = [1.1e-9 * gpu_bytes(config, *settings) for settings in SETTINGS.values()]
        print(f"| {Path(shape).stem} | {' | '.join(f'{need:.1f}' for need in needs)} |", flush=True)


# ------------------------------------------------------------------------------------ command


def main(argv=None):
    parser = Parser(prog="lab.speed", description=__doc__)
    add = parser.add_argument
    add("--shape", nargs="+", metavar="S", help=f"{', '.join(SHAPES)}, or a published config.json "
        "(default: head17; with --fits, the published models in tests/golden/configs)")
    add("--parts", choices=PARTS, nargs="+", default=PARTS, help="(default: all)")
    add("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="lengths (default: both)")
    add("--model", metavar="DIR", help="measure this checkpoint folder")
    add("--task", default="ARC-Easy", help="on this task's training rows (default: ARC-Easy)")
    add("--data", metavar="DIR", default="data/public", help="(default: data/public)")
    add("--rows", type=positive, default=32, metavar="N", help="in a step (default: 32)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="with --model, as "
        "in train.py; bf16 is not measured on a processor that does not multiply it by itself")
    add("--against", choices=("hf",), help="do the same work with transformers, if it is installed")
    add("--compile", action="store_true", help="compile each block, as train.py "
        "--compile does (the memory of compiled blocks is measured on cuda only)")
    add("--turns", type=positive, default=5, metavar="N", help="turns that count (default: 5)")
    add("--micro-tokens", type=positive, metavar="N", help="as in train.py")
    add("--device", default="cpu", help="cpu, cuda, ..., where all is in bf16 (default: cpu)")
    add("--json", metavar="FILE", help="write what was measured here too")
    add("--fits", action="store_true", help="compute the GPU memory of training, and no more")
    args = parser.parse_args(argv)
    if args.fits:
        published = [path for path in sorted(CONFIGS.glob("*.json")) if path.stem != "parameters"]
        return what_fits(args.shape or published)
    if args.against and not importlib.util.find_spec("transformers"):
        raise BadInput("--against hf needs the transformers library, which is not installed here")
    args.device = pick_device(args.device)
    args.bf16 = args.device.type == "cuda"
    if args.model:
        train.keep_memory()
        native = pick_dtype("auto", args.device, Config.from_pretrained(args.model)) == "bfloat16"
        if args.precision == "bf16" and not native:
            return print(f"not measured: on this {args.device}, bf16 does not pay for this model")
        args.bf16 = native and args.precision != "fp32"
    args.micro_tokens = args.micro_tokens or train.MICRO_TOKENS["bf16" if args.bf16 else "fp32"]
    cuda = args.device.type == "cuda"
    processor = torch.cuda.get_device_name(args.device) if cuda else platform.machine()
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}"
    print(f"{machine}, medians of {args.turns} turns")
    results = Results()
    if args.model:
        measure_checkpoint(args, partial(results.add, Path(args.model).name[:9], args.task[:6]))
    for shape in args.shape or ([] if args.model else ["head17"]):
        raw, name = config_of(shape), Path(shape).stem
        for kind in args.kind:
            measure_shape(args, partial(results.add, name, kind), kind, raw)
    if args.json:
        about = {"machine": machine, "command": argv or sys.argv[1:], "results": results}
        write_whole(args.json, json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
