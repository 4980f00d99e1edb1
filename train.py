"""Fine-tune a model, with or without steering its feed-forward memory.

    python train.py --steer reg                  a tiny model, in a minute, scored before and after
    python train.py --model DIR --task boolq --data data/public --steer reg --out out/boolq-reg

DIR is a checkpoint folder as published for Llama 3, Qwen 2.5 or 3, Gemma 2 or 3 (text). The result
is such a folder too, with its settings (args.json) and a line per step (log.jsonl). Without
--model, a tiny Llama learns the toy world's tasks. `python -m lab.experiment` compares runs.
"""
import ctypes
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import BadInput, Parser, command, not_negative, number, positive, progress, whole
from data.runs import (begin, claim, finish, load_state, peak_memory, read_run, same_run,
                       save_state)
from data.tasks import TASKS, TOY as TOY_TASKS, load as load_examples
from eval import (PER_MEMORY, TOY_FOLDER, TOY_TRAINING, base_folder, change_line, check_finite,
                  keys_of, load, pick_device, pick_dtype, score, set_threads, side_by_side,
                  split_names, usual_data, which_model, with_per_memory)
from infosteer import (DIVERGENCES, GENERIC, METHODS, NORMALISATIONS, RANKINGS, Before, Steering,
                       entropy, meaningful)
from model import Config, merge, save_tensors

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
MICRO_TOKENS = {"fp32": 1024, "bf16": 4096}    # as caches hold; as keep a GPU busy, cast rarely
DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}           # of --precision
DEVELOPMENT = 256                      # training rows that show how memories are used
IGNORE = -100                          # the target of tokens that are not supervised

# ------------------------------------------------------------------------------- settings

STEERING_FLAGS = {                     # name: (type or choices, what it means)
    "p": (number, "int, dropout, resuscitation: the fraction of the memories that is changed"),
    "alpha": (number, "int, resuscitation: they become alpha times the mean"),
    "rank_by": ((*RANKINGS, "random"), "int: smallest |k|, or k as in eq. 4, or random ones"),
    "lam": (number, "reg and ...-entropy: lambda of eq. 5; below 0 it concentrates the keys"),
    "normalise": (NORMALISATIONS, "reg: how k becomes a distribution, |k| / sum|k| or softmax(k)"),
    "generic": (GENERIC, "semantic, activation: the method whose change is scaled"),
    "groups": (positive, "semantic, activation: groups of memories in a layer"),
    "subgroups": (positive, "activation: groups within each of those"),
    "beta_max": (not_negative, "semantic, activation: the largest strength of a group"),
    "gamma": (number, "surrogate: growth of a coefficient per standard deviation of its score"),
    "lambda_1": (number, "surrogate: weight of a memory's entropy in its score"),
    "lambda_2": (number, "surrogate: weight of its divergence from the training responses"),
    "divergence": (DIVERGENCES, "surrogate: KL(target || memory), or KL(memory || target)"),
    "buckets": (positive, "surrogate-entropy: groups of like tokens in place of the vocabulary"),
    "layers": (str, "steer these only, from 1: 1-8 or 1,4,9-12 or 1-8:alpha=2,9-16:alpha=3"),
}
RECIPE_FLAGS = {       # name: (type, the paper's Appendix A or none, for data/toy, meaning)
    "epochs": (positive, 1, 3, "passes over the data"),
    "steps": (positive, None, None, "stop after so many optimizer steps, where the schedule ends"),
    "batch": (positive, 64, 32, "sequences in an optimizer step"),
    "max_length": (positive, 256, 256, "tokens of prompt and response; the rest is cut off"),
    "lr": (not_negative, 5e-5, 2e-4, "peak learning rate"),
    "warmup": (whole, 100, 20, "steps of linear warm-up; then linear decay to 0, our reading"),
    "weight_decay": (not_negative, 0.01, 0.01, "of matrices alone, which is our reading"),
    "clip": (not_negative, 1.0, 1.0, "largest gradient norm; 0 does not clip"),
    "eval_every": (positive, None, None, "log the loss of held-out rows every so many steps"),
    "held_out": (positive, None, None, "rows held out, drawn by seed; 64 with --eval-every"),
    "anchor": (not_negative, 0, 0, "rival: pull to the first weights, w -= lr N (w - w_0) a step"),
    "label_smoothing": (not_negative, 0, 0, "rival: the share of a target that goes to all tokens"),
    "confidence_penalty": (number, 0, 0, "rival: reward N times the entropy of a prediction"),
    "loss_on": (("response", "all"), "response", "response", "rival: prompts, too"),
}
RIVALS = "anchor", "label_smoothing", "confidence_penalty", "loss_on"  # each makes another arm
PAPER, TOY = ({name: row[column] for name, row in RECIPE_FLAGS.items()} for column in (1, 2))
SWITCHES = {
    "checkpoint": "compute activations twice: less memory, 1.3 to 1.9 times the time",
    "compile": "torch.compile each block: slow to start, then faster on a GPU",
    "train_only": "toy world: score neither base nor run",
    "resume": "go on with an interrupted run, given the same flags",
    "overwrite": "replace a finished or interrupted run at --out",
}


def make_parser():
    parser = Parser(prog="train.py", description=__doc__)
    add = parser.add_argument_group("what to train").add_argument
    trainable = [name for name, task in {**TASKS, **TOY_TASKS}.items() if "train" in task.splits]
    add("--model", metavar="DIR", help="a checkpoint folder (default: data/toy/llama)")
    add("--task", metavar="A,B", help=f"a comma list of: {', '.join(trainable)}; or commonsense, "
        "the mixture of 170k rows (default: the toy world's)")
    add("--data", metavar="DIR", help="the folder with TASK/train.json, as python data/prepare.py "
        "makes one (default: data/toy); its --help shows how to add a task of your own")
    add("--limit", type=positive, metavar="N", help="only the first N rows of each task")
    add("--out", metavar="DIR", help="the finished run; until then it grows in DIR.partial "
        "(default: out/MODEL-ARM-seedN)")

    add = parser.add_argument_group(
        "steering (a flag that means nothing for the method is refused; the defaults of p, alpha "
        "and lam are those of section 5.1, all others are ours)").add_argument
    add("--steer", choices=METHODS, default="none", help="none: plain fine-tuning; int: raise the "
        "smallest key coefficients in the forward pass (eq. 4); reg: reward the entropy of the key "
        "distribution in the loss (eq. 5); semantic, activation: one of these, with a strength for "
        "each group of memories with alike vectors, or that the same tokens activate (B.1); "
        "surrogate: amplify the memories that say what the training responses say; surrogate-"
        "entropy: reward the entropy of what the memories say together (B.2). Rivals: dropout, of "
        "key coefficients; knowledge-entropy: reward the entropy of the mean key distribution; "
        "resuscitation: scale up idle keys once, before training")
    usual = {**vars(Steering()), "layers": "all"}
    for name, (kind, meaning) in STEERING_FLAGS.items():
        add(flag(name), help=f"{meaning} (default: {usual[name]})",
            **{"choices" if isinstance(kind, tuple) else "type": kind})

    add = parser.add_argument_group("recipe (defaults: Appendix A, where it has one)").add_argument
    for name, (kind, paper, toy, meaning) in RECIPE_FLAGS.items():
        usual = f"{paper}; {toy} for the models in data/toy" if toy != paper else paper
        add(flag(name), help=f"{meaning} (default: {usual})",
            **{"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"})
    add("--seed", type=whole, default=0, help="the order of the examples (default: 0)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=DTYPES, default="auto",
        help="bf16 is autocast over fp32 weights (default: bf16 where the processor multiplies it "
        "by itself and the model is not tiny, else fp32)")
    add("--micro-tokens", type=positive, metavar="N", help="tokens in one pass; fewer need less "
        "memory, and the gradients stay the same (default: {bf16} in bf16 or on cuda, else {fp32})"
        .format(**MICRO_TOKENS))
    add("--threads", type=positive, metavar="N", help="on a CPU (default: 1 for the toy world)")
    add("--save-every", type=positive, metavar="N", help="save a state for --resume every N steps")
    for name, meaning in SWITCHES.items():
        add(flag(name), action="store_true", help=meaning)
    return parser


def flag(name):
    return f"--{name.replace('_', '-')}"


def read_settings(argv=None):
    """A command line -> the settings of one run. Raises BadInput."""
    args = (parser := make_parser()).parse_args(argv)
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    given = {name: value for name in STEERING_FLAGS if (value := getattr(args, name)) is not None}
    for name in given:
        if name not in meaningful(args.steer, args.generic or "int"):
            parser.error(f"{flag(name)} means nothing with --steer {args.steer}"
                         + f" --generic {args.generic}" * bool(args.generic))
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts it anew; give one of them")
    if args.model and not is_toy(args.model) and not (args.task and args.data):
        parser.error(f"--model {args.model} needs --task and --data; without --model, a tiny model "
                     "learns the toy world's tasks")
    args.model = args.model or os.path.relpath(TOY_FOLDER / "llama")
    args.task = args.task or TOY_TRAINING
    args.data = args.data or usual_data(split_names(args.task))
    if (args.label_smoothing or 0) > 1:
        parser.error(f"--label-smoothing {args.label_smoothing} is no share from 0 to 1")
    for name, value in (TOY if is_toy(args.model) else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.held_out = args.held_out or 64 * bool(args.eval_every)
    try:
        if args.layers is not None:
            n_layers = Config.from_pretrained(args.model).n_layers
            given["layers"] = parse_layers(args.layers, n_layers)
        args.steering = Steering(args.steer, **given)
    except ValueError as error:        # BadInput is one
        parser.error(str(error))
    args.arm = "-".join([args.steering.name, *(
        f"{name}={value}".removesuffix(".0") for name in RIVALS
        if (value := getattr(args, name)) != PAPER[name])])
    named = args.out or run_folder("out", args.model, args.arm, args.seed)
    args.resume |= not (args.out or args.overwrite) and Path(f"{named}.partial").exists()
    args.out = os.path.normpath(named)                         # of x/.., for example
    return args


def is_toy(model):
    """Is this one of the tiny models in data/toy?"""
    return Path(model).resolve().parent == TOY_FOLDER


def run_folder(out, model, arm, seed):
    """Where the run of one arm and seed lives in a folder of several."""
    return Path(out, f"{Path(model).resolve().name}-{arm}-seed{seed}")


def parse_layers(text: str, n_layers: int) -> dict[int, dict[str, float]]:
    """Layers of a list of ranges: "1-2:alpha=2,4" -> {1: {"alpha": 2.0}, 2: {"alpha": 2.0}, 4: {}}.
    Raises ValueError outside 1..n_layers and for a layer with two strengths."""
    layers = {}
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?((?::[a-z0-9_-]+=[-+.0-9e]+)*)", part)
        if not found:
            raise ValueError(f"--layers {text!r}: {part!r} is not a layer, a range or a strength, "
                             "as in 1-8:alpha=2,9,11-16:alpha=3")
        first, last = int(found[1]), int(found[2] or found[1])
        given = (strength.split("=") for strength in found[3].split(":")[1:])
        here = {name.replace("-", "_"): float(value) for name, value in given}
        if not 1 <= first <= last <= n_layers:
            raise ValueError(f"--layers {text!r}: {part!r} is outside the model's layers "
                             f"1-{n_layers}, or runs backwards")
        for layer in range(first, last + 1):
            if layers.setdefault(layer, here) != here:
                raise ValueError(f"--layers {text!r}: layer {layer} has two different strengths")
    return dict(sorted(layers.items()))


# ----------------------------------------------------------------------------------- data


def encode(examples, tokenizer, max_length):
    """Examples -> [(ids, number of prompt ids)]: bos, prompt, response, eos, cut at max_length.
    Prompt and response are encoded apart, as they are when the model answers a prompt."""
    rows = []
    for example in progress(examples, desc="encoding", unit="row"):
        prompt = tokenizer.encode(example.prompt, special=False)
        response = tokenizer.encode(example.response, bos=False, special=False)
        rows.append(((prompt + response + [tokenizer.eos_id])[:max_length], len(prompt)))
    return rows


def fine_tuning_data(args):
    """-> model on the CPU, tokenizer, rows of `encode`, their names, a remark. Raises BadInput."""
    examples = [example for name in split_names(args.task, args.data)
                for example in load_examples(args.data, name, "train")[:args.limit]]
    model, tokenizer = load(args.model)
    rows = encode(examples, tokenizer, args.max_length)
    cut = sum(ids[-1] != tokenizer.eos_id for ids, _ in rows)
    used = [row for row, (ids, n_prompt) in enumerate(rows) if len(ids) > n_prompt]
    if not used:
        raise BadInput(f"--max-length {args.max_length} leaves no token of a response; raise it")
    remark = f"; {cut:,} were longer than {args.max_length} tokens and lost their end" * (cut > 0)
    if len(used) < len(rows):
        remark += f"; {len(rows) - len(used):,} had no response left and are not used"
    names = [f"{examples[row].task.name} row {examples[row].index}" for row in used]
    return model, tokenizer, [rows[row] for row in used], names, remark


def order_of(n, batch, seed):
    """The rows of every optimizer step, without end; each epoch is a new permutation of n rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(n, generator=generator).tolist()
        yield from (rows[start:start + batch] for start in range(0, n, batch))


def micro_batches(rows, lengths, budget, padded=True):
    """Cut the rows of one step, sorted by length, into micro-batches of at most `budget` tokens,
    padding included where there is any."""
    def size(batch):                                           # the first of a batch is the longest
        return len(batch) * lengths[batch[0]] if padded else sum(lengths[row] for row in batch)

    batches = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if batches and size([*batches[-1], row]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows):
    """[(ids, n_prompt)] -> inputs [B, T], targets [B, T] (IGNORE where not supervised), real [B, T]
    (False on padding). The last id of a row is a target only. Padding is on the right, where causal
    attention cannot see it. No rows make one token of padding, which adds nothing to any sum."""
    B, T = max(1, len(rows)), max((len(ids) - 1 for ids, _ in rows), default=1)
    inputs = torch.zeros(B, T, dtype=torch.long)
    targets = torch.full((B, T), IGNORE)
    real = torch.zeros(B, T, dtype=torch.bool)
    for row, (ids, n_prompt) in enumerate(rows):
        inputs[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, n_prompt - 1:len(ids) - 1] = torch.tensor(ids[n_prompt:])
        real[row, :len(ids) - 1] = True
    return inputs, targets, real


# ------------------------------------------------------------------------- loss and schedule


def step_loss(model, rows, n_supervised, n_tokens, steering, checkpoint=False, device=None,
              smoothing=0.0, penalty=0.0, shared=False):
    """What one micro-batch of rows adds to the loss of its optimizer step (eq. 5), in nats:

        loss = L_LM - reward        reward = sum_l lambda_l (mean of H over the step's tokens)

    Which tokens count, those of prompts too, is our reading. L_LM is the mean of -log p(y|x).
    `smoothing` gives a share of it to the mean over all y (Szegedy et al. 2016); `penalty`
    subtracts so many times the entropy of p(.|x) (Pereyra et al. 2017). `shared` reads what rows
    begin with once for all of them, without padding. n_supervised and n_tokens count the whole
    step, so that every supervised token of a step weighs the same in whichever micro-batch.
    -> loss; without gradient L_LM, reward, flux [n_layers]."""
    device = device or model.embed.weight.device
    inputs, targets, real = collate(rows)
    at = supervised = (targets.flatten() != IGNORE).nonzero()[:, 0]    # [S]  on the CPU: no waiting
    spread = None
    if rows and shared:
        inputs, spread = merge([ids[:-1] for ids, _ in rows])          # [1, N], [B, T]
        at, real = spread.flatten()[supervised], spread[real].bincount()[None]     # [1, N] counts
    logits, flux, reward = model.predict(                      # [S, V], [n_layers, B, T] twice
        inputs.to(device), at.to(device), steering, checkpoint, spread)
    wanted = targets.flatten()[supervised].to(device)          # [S]
    lm = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing) / n_supervised
    if penalty:
        lm = lm - penalty * entropy(logits.log_softmax(-1)).sum() / n_supervised
    real = real.to(device)
    lam = torch.tensor([steering.at(layer).lam for layer in range(len(reward))], device=device)
    reward = (lam * (reward * real).sum((1, 2))).sum() / n_tokens  # 0 unless the method has one
    flux = (flux.detach() * real).sum((1, 2)) / n_tokens       # [n_layers]
    return lm - reward, lm.detach(), reward.detach(), flux


def learning_rate(step, args, total):
    """Linear warm-up, then linear decay to 0. Steps count from 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (total - step) / max(1, total - args.warmup)


# --------------------------------------------------------------------------------- the loop


class ALONE:                           # the world of a plain run: this process does everything
    writes, wait = True, staticmethod(lambda: None)
    share = sum = whole = staticmethod(lambda thing: thing)
    prepare = staticmethod(lambda model, device: model.to(device))
    state = staticmethod(lambda *parts: [part.state_dict() for part in parts])
    restore = staticmethod(lambda states, *parts: [
        part.load_state_dict(state) for part, state in zip(parts, states)])


def train(args, world=ALONE, data=fine_tuning_data):
    """One run, from its settings to its folder. `world` says who does what, `data` what is learnt.
    Raises BadInput."""
    out = Path(args.out)
    with claim(out, args.resume, args.overwrite) if world.writes else nullcontext():
        world.wait()
        run(args, world, data, out, Path(f"{out}.partial"))
    print(f"saved      {out}")


def run(args, world, data, out, work):
    """The run itself: it grows in the folder `work` and then appears at `out`."""
    # ---- data, model and folder
    device = pick_device(args.device)
    model, tokenizer, rows, names, remark = data(args)
    before = read_run(work) if args.resume else {}             # {}: it died before it wrote any
    if args.precision == "auto":       # on another processor, an interrupted run keeps its own
        args.precision = before.get("precision", "auto")
    bf16 = pick_dtype(DTYPES[args.precision], device, model.config) == "bfloat16"
    args.precision, large = "bf16" if bf16 else "fp32", bf16 or device.type == "cuda"
    args.micro_tokens = args.micro_tokens or MICRO_TOKENS["bf16" if large else "fp32"]
    settings = settings_of(args) | {
        "examples": len(rows), "data_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    order = next(order_of(len(rows), len(rows), args.seed))
    if args.held_out >= len(rows):
        raise BadInput(f"--held-out {args.held_out} leaves none of {len(rows)} rows to train on")
    held = [rows[row] for row in order[:args.held_out]]
    rows, names = ([of[row] for row in sorted(order[args.held_out:])] for of in (rows, names))
    lengths = [len(ids) - 1 for ids, _ in rows]
    total = min(args.epochs * -(-len(rows) // args.batch), args.steps or math.inf)     # steps
    settings["steps_total"] = total
    if before:
        same_run(settings, before, work)
    log = (begin(work, settings, tokenizer, args.overwrite) if world.writes
           else open(os.devnull, "a"))
    world.wait()

    # ---- steering
    steering, change = args.steering, ""
    if find_out := METHODS[steering.method].per_memory:
        if world.writes and not (work / PER_MEMORY).is_file():
            found = find_out(steering, look_before(model.to(device), rows, args.seed))
            save_tensors({"per_memory": found}, work / PER_MEMORY)
        world.wait()
        steering = with_per_memory(steering, work / PER_MEMORY, device)
    if METHODS[steering.method].change and steering.generic == "int" and world is ALONE:
        prompts = [ids[:n_prompt] for ids, n_prompt in rows[:64]]
        change = "\n           " + change_line(model.to(device), prompts, steering)
    if METHODS[steering.method].scales_keys:
        for block, factors in zip(model.blocks, steering.per_memory.to(model.decode)):
            block.memory.key_up.weight.data *= factors[:, None]                    # [d_m, d]
    if args.loss_on == "all":          # instruction modelling (Shi et al. 2024)
        rows = [(ids, 1) for ids, _ in rows]

    # ---- model and optimizer
    n_parameters = sum(weight.numel() for weight in model.parameters())
    model = world.prepare(model, device)
    if args.compile:
        torch._dynamo.config.specialize_float = True           # p and alpha are constants of a run
        for block in model.blocks:
            block.compile(dynamic=True)
    initial = [weight.detach().clone() for weight in model.parameters() if args.anchor]
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]    # they never decay
    optimizer = torch.optim.AdamW([
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0}], lr=args.lr, fused=True)
    start, log_bytes, states = 0, 0, None
    if args.resume and (work / "state.pt").is_file():
        start, log_bytes, states = load_state(work / "state.pt")
        world.restore(states, model, optimizer)
    if world.writes:
        log.truncate(log_bytes)        # forget the steps that will be done again

    supervised = sum(len(ids) - n_prompt for ids, n_prompt in rows)
    print(f"model      {args.model}: {n_parameters:,} parameters, "
          f"{model.config.n_layers} layers of {model.config.d_m:,} memories\n"
          f"data       {len(rows):,} rows, {sum(lengths):,} tokens, {supervised:,} of them "
          f"supervised{remark}\n"
          f"steering   {steering}{change}\n"
          f"recipe     {total:,} steps of {args.batch}, lr {args.lr:g}, {args.warmup} warm-up, "
          f"seed {args.seed}, {args.precision} on {device}"
          + f"\n           --warmup {args.warmup} takes the whole run" * (args.warmup >= total)
          + f"\nresuming   after step {start}" * bool(start), flush=True)

    # ---- loop
    model.train()
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, cache_enabled=False,
                    enabled=bf16)
    # 0.8 of the time on ARC-Easy, where a third is padding or said before. A GPU would add up in
    # another order each time, fp32's numbers stay as they were, and what is random is each row's.
    shared = bf16 and device.type == "cpu" and not steering.drawn

    def held_out_nll():                # per token of the responses; unsteered, without rivals
        asked, wanted = ([ids[:n] for ids, n in held], [ids[n:] for ids, n in held])
        with torch.autocast(**autocast):
            scores = model.log_likelihood(asked, wanted, batch_tokens=args.micro_tokens)
        return -sum(scores) / sum(map(len, wanted))

    bar = progress(total=total, initial=start, desc="training", unit="step")
    steps = itertools.islice(order_of(len(rows), args.batch, args.seed), start, total)
    trimmed = time.perf_counter()
    with bar, log:
        if held and not start:
            log.write(json.dumps({"step": 0, "held_out_nll": held_out_nll()}) + "\n")
        for step, chosen in enumerate(steps, start):
            began = time.perf_counter()
            if began - trimmed > 60 and hasattr(LIBC, "malloc_trim"):
                LIBC.malloc_trim(0)    # the holes that blocks of other sizes leave would add up
                trimmed = began
            n_tokens = sum(lengths[row] for row in chosen)
            n_supervised = sum(len(rows[row][0]) - rows[row][1] for row in chosen)
            batches = world.share(micro_batches(chosen, lengths, args.micro_tokens, not shared))
            parts = []
            if per_step := METHODS[steering.method].per_step:  # a look at the whole step first
                with torch.autocast(**autocast):
                    found = sum(model.totals(*collate([rows[row] for row in batch])[::2], per_step)
                                for batch in batches)
                steering = replace(steering, per_memory=world.sum(found) / n_tokens)
            for batch in batches:
                dice = torch.tensor([[args.seed, step, row] for row in batch or [-1]])
                with torch.autocast(**autocast):
                    loss, lm, reward, flux = step_loss(
                        model, [rows[row] for row in batch], n_supervised, n_tokens,
                        replace(steering, dice=dice.to(device)), args.checkpoint, device,
                        args.label_smoothing, args.confidence_penalty, shared)
                loss.backward()
                parts.append(torch.cat([lm[None], reward[None], flux]))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            norm, parts = world.whole(norm).item(), torch.stack(parts)     # [passes, 2 + n_layers]
            lm, reward, *flux = world.sum(parts.sum(0)).tolist()
            if not math.isfinite(lm + reward + norm):
                bad = [batch for batch, part in zip(batches, parts) if not part.isfinite().all()]
                rows_of = ", ".join(names[row] for row in (bad or batches)[0][:8])
                sys.exit(f"train.py: step {step + 1}: the loss is not finite (lm_loss {lm:g}, "
                         f"reward {reward:g}, gradient norm {norm:g}) in the batch of {rows_of}; "
                         f"the last saved state is kept in {work}; a lower --lr often helps"
                         + ", or a weaker steering" * (steering.method != "none"))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args, total)
            for weight, first in zip(model.parameters(), initial):     # none without --anchor
                weight.data.lerp_(first, args.anchor * group["lr"])
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - began
            line = {"step": step + 1, "loss": lm - reward, "lm_loss": lm, "reward": reward,
                    "flux": sum(flux) / len(flux), "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": norm, "tokens": n_tokens, "supervised_tokens": n_supervised,
                    "examples": len(chosen), "tokens_per_second": n_tokens / seconds,
                    "examples_per_second": len(chosen) / seconds,
                    "peak_memory_bytes": peak_memory(device)}
            if held and ((step + 1) % (args.eval_every or total) == 0 or step + 1 == total):
                line["held_out_nll"] = held_out_nll()
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{line['loss']:.3f}", flux=f"{line['flux']:.3f}",
                            tok_s=f"{line['tokens_per_second']:,.0f}", refresh=False)
            bar.update()
            if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < total:
                states = world.state(model, optimizer)
                if world.writes:
                    save_state(work / "state.pt", step + 1, log.tell(), states)

    # ---- the finished run appears as a whole
    model = world.whole(model)
    if world.writes:
        check_finite(model, f"{work}: after the last step")
        model.save_pretrained(work)
        finish(work, out)
    world.wait()


def settings_of(args):
    """What args.json says of a run before its data are read: all that is no control of the loop."""
    control = {"train_only", "resume", "overwrite", "save_every", "out", "steer", *STEERING_FLAGS}
    return {key: value for key, value in vars(args).items() if key not in control} | {
        "steering": json.loads(json.dumps(args.steering.settings)),
        "model_sha256": which_model(args.model),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def look_before(model, rows, seed):
    """What a fine-grained method may look at: the memories, and DEVELOPMENT rows drawn by seed."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [rows[row][0][:-1] for row in chosen[:DEVELOPMENT]]
    said = torch.tensor([i for ids, n_prompt in rows for i in ids[n_prompt:]])
    vectors = [block.memory.values.weight.detach().T for block in model.blocks]
    decode = model.decode.detach()
    return Before(progress(vectors, desc="reading memories", unit="layer"), decode,
                  progress(keys_of(model, texts), total=len(texts), desc="watching", unit="text"),
                  sum(map(len, texts)), said.bincount(minlength=len(decode)).to(decode), seed)


# ---------------------------------------------------------------------------------- command


def keep_memory():
    """Tell glibc, where it is, to keep freed memory, which each step takes again: 0.95 of its time
    (0.85 where a new page is dear)."""
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(-4, 0)            # M_MMAP_MAX: large blocks come from the heap too
        LIBC.mallopt(-1, -1)           # M_TRIM_THRESHOLD: and the heap does not shrink


def finished(args):
    """Is there a finished run of these settings at --out? Raises BadInput for one of others."""
    before = {} if args.overwrite else read_run(args.out)
    if before:
        same_run(settings_of(args) | {"precision": before.get("precision")}, before, args.out)
    return bool(before)


def main(argv=None):
    args = read_settings(argv)
    keep_memory()
    names = split_names(args.task, args.data)
    set_threads(args.threads, names)
    if compare := is_toy(args.model) and {*names} <= TOY_TASKS.keys() and not args.train_only:
        base = base_folder(Path(args.out).parent, args.model) / "eval"
    if finished(args):
        print(f"{args.out} is a finished run; --overwrite trains it again")
    else:
        train(args)
    if not compare:
        flags = [f"--model={args.out}", f"--task={args.task}", f"--data={args.data}"]
        return print("next       " + shlex.join(["python", "eval.py", *flags]))
    scores = {"base": score(args.model, TOY_TASKS, TOY_FOLDER, base, device=args.device),
              args.arm: score(args.out, TOY_TASKS, TOY_FOLDER, device=args.device)}
    print(f"\n{side_by_side(scores)}\n\n"
          "next       python -m lab.experiment --steer none int reg --seed 0 1 2")


if __name__ == "__main__":
    command(main)
