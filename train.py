"""Fine-tune a model, with or without steering its feed-forward memory.

    python train.py --model DIR --task boolq --data data/public --steer reg --out out/boolq-reg

DIR is a checkpoint folder as published for Llama 3, Qwen 2.5, Qwen 3, Gemma 2 or Gemma 3 (text). The result in --out is such a
folder too, with settings (args.json) and one line per step (log.jsonl) beside it. Defaults are the paper's (Appendix A).
"""
import hashlib
import json
import math
import os
import pickle
import platform
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import BadInput
from data.tasks import TASKS, load as load_examples
from eval import Parser, command, finite, load, pick_device, positive, read_run, split_names, write_whole
from infosteer import METHODS, NORMALISATIONS, RANKINGS, Steering, parse_layers

try:
    import resource
except ImportError:                    # not on Windows: there the log has no peak memory on a CPU
    resource = None

IGNORE = -100                          # the target of tokens that are not supervised
MACHINE = ("device", "micro_tokens", "checkpoint", "versions")      # settings that --resume may change: the run stays the same

# ------------------------------------------------------------------------------------------------------------- settings


def number(text):
    """An argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def read_settings(argv=None):
    parser = Parser(prog="train.py", description=__doc__)
    group = parser.add_argument_group("what to train")
    group.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder: config.json, safetensors, tokenizer files")
    group.add_argument("--task", required=True, metavar="A,B", help="a comma list of: "
                       f"{', '.join(name for name, task in TASKS.items() if 'train' in task.splits)}; or commonsense, the 170k mixture")
    group.add_argument("--data", required=True, metavar="DIR", help="the folder with TASK/train.json (python data/prepare.py makes one)")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each task")
    group.add_argument("--out", required=True, metavar="DIR", help="the finished run; until then it grows in DIR.partial")

    group = parser.add_argument_group("steering (a flag that means nothing for the method is refused)")
    group.add_argument("--steer", choices=METHODS, default="none",
                       help="none: plain fine-tuning; int: raise the smallest key coefficients in the forward pass (eq. 4); "
                            "reg: reward the entropy of the key distribution in the loss (eq. 5)")
    group.add_argument("--p", type=number, help="int: the fraction of the memories that is raised (default: 0.01)")
    group.add_argument("--alpha", type=number, help="int: raised to alpha times the mean (default: 1)")
    group.add_argument("--rank-by", choices=RANKINGS, help="int: smallest by magnitude, the idle memories, or by value, the literal "
                       "reading of eq. 4 (default: magnitude)")
    group.add_argument("--lam", type=number, help="reg: lambda, the weight of the entropy; a negative one concentrates the keys (default: 0.01)")
    group.add_argument("--normalise", choices=NORMALISATIONS, help="reg: how k becomes a distribution: |k| / sum|k|, or softmax(k) "
                       "(default: magnitude)")
    group.add_argument("--layers", metavar="RANGES", help="int and reg: steer these layers only, from 1: 1-8 or 1,4,9-12 (default: all)")

    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=positive, default=1, help="(default: 1)")
    group.add_argument("--steps", type=positive, metavar="N", help="stop after N optimizer steps; the schedule ends there too")
    group.add_argument("--batch", type=positive, default=64, help="sequences per optimizer step (default: 64, the paper's 4 x 16)")
    group.add_argument("--max-length", type=positive, default=256, help="tokens of prompt and response; the rest is cut off (default: 256)")
    group.add_argument("--lr", type=finite, default=5e-5, help="peak learning rate (default: 5e-5)")
    group.add_argument("--warmup", type=int, default=100, metavar="N", help="steps of linear warm-up, before linear decay to 0 (default: 100)")
    group.add_argument("--weight-decay", type=finite, default=0.01, help="of matrices; norms and biases have none (default: 0.01)")
    group.add_argument("--clip", type=finite, default=1.0, help="largest gradient norm; 0 does not clip (default: 1)")
    group.add_argument("--seed", type=int, default=0, help="order of the examples (default: 0)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                       help="bf16: autocast over fp32 weights (default: bf16 on cuda, else fp32)")
    group.add_argument("--micro-tokens", type=positive, default=4096, metavar="N",
                       help="tokens, padding included, in one forward pass; lower it if memory is short, the gradients stay the same (default: 4096)")
    group.add_argument("--checkpoint", action="store_true", help="compute activations twice instead of keeping them: less memory, 1.3 to 1.9 times the time")
    group.add_argument("--save-every", type=positive, metavar="N", help="save the state of the run every N steps, for --resume")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run, given the same flags")
    group.add_argument("--overwrite", action="store_true", help="replace a finished or interrupted run at --out")
    args = parser.parse_args(argv)

    given = {name: getattr(args, name) for name in set(METHODS["int"] + METHODS["reg"]) if getattr(args, name) is not None}
    for name in sorted(given):
        if name not in METHODS[args.steer]:
            parser.error(f"--{name.replace('_', '-')} means nothing with --steer {args.steer}")
    if args.warmup < 0:
        parser.error("--warmup is below 0")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts it anew; give one of them")
    try:
        args.steering = Steering(args.steer, **{name: value for name, value in given.items() if name != "layers"})
    except ValueError as error:
        parser.error(str(error))
    return args


# ----------------------------------------------------------------------------------------------------------------- data


def encode(examples, tokenizer, max_length):
    """Examples -> [(ids, number of prompt ids)]: bos, prompt, response, eos, cut at max_length. Loss is on response and eos only.

    Prompt and response are encoded apart, as they are when the model answers a prompt.
    """
    rows = []
    for example in tqdm(examples, desc="encoding", unit="row", disable=None if len(examples) > 20_000 else True):
        prompt = tokenizer.encode(example.prompt, special=False)
        response = tokenizer.encode(example.response, bos=False, special=False) + [tokenizer.eos_id]
        rows.append(((prompt + response)[:max_length], len(prompt)))
    return rows


def order_of(n, epochs, batch, seed):
    """The rows of every optimizer step: [[row, ...], ...], each epoch a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(epochs):
        rows = torch.randperm(n, generator=generator).tolist()
        steps += [rows[start:start + batch] for start in range(0, n, batch)]
    return steps


def micro_batches(rows, lengths, budget):
    """Cut the rows of one step, sorted by length, into micro-batches of at most `budget` tokens, padding included."""
    batches = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:     # the first row of a batch is its longest
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows):
    """[(ids, n_prompt)] -> inputs [B, T], targets [B, T] (IGNORE where not supervised), real [B, T] (False on padding).

    The last id of a row is a target only. Padding is on the right, where causal attention cannot see it.
    """
    T = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), IGNORE)
    real = torch.zeros(len(rows), T, dtype=torch.bool)
    for row, (ids, n_prompt) in enumerate(rows):
        inputs[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, n_prompt - 1:len(ids) - 1] = torch.tensor(ids[n_prompt:])
        real[row, :len(ids) - 1] = True
    return inputs, targets, real


# ----------------------------------------------------------------------------------------------------------------- loss


def losses(model, inputs, targets, real, steering, checkpoint=False):
    """Sums over one micro-batch: cross-entropy over its supervised tokens [], and key entropy over its tokens [n_layers], in nats.

    The caller divides both by the counts of the whole optimizer step, so that every supervised token of a step weighs the same,
    whichever micro-batch it fell into.
    """
    device = model.embed.weight.device
    supervised = (targets.flatten() != IGNORE).nonzero()[:, 0]                 # [S]  found on the CPU: no wait for the GPU
    hidden, flux = model.hidden(inputs.to(device), steering, checkpoint=checkpoint)     # [B, T, d], [n_layers, B, T]
    logits = model.logits(hidden.flatten(0, 1)[supervised.to(device)])         # [S, V]  the head runs where there is something to learn
    lm = F.cross_entropy(logits, targets.flatten()[supervised].to(device), reduction="sum")
    entropy = (flux * real.to(device)).sum((1, 2))                             # [n_layers]
    return lm, entropy


def learning_rate(step, args, total):
    """Linear warm-up, then linear decay to 0. Steps count from 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (total - step) / max(1, total - args.warmup)


# ------------------------------------------------------------------------------------------------------------- the loop


def train(args):
    out = Path(args.out)
    work = out.with_name(out.name + ".partial")
    state_file, log_file = work / "state.pt", work / "log.jsonl"
    if args.resume and read_run(out):
        return print(f"{out} is a finished run; nothing to resume")
    if out.exists() and not read_run(out):
        raise BadInput(f"{out}: exists and is not a run of train.py, so it is never replaced; choose another --out")
    if out.exists() and not args.overwrite:
        raise BadInput(f"{out}: a finished run; --overwrite replaces it, or choose another --out")
    if work.exists() and not (args.resume or args.overwrite):
        raise BadInput(f"{work}: an interrupted run; --resume goes on with it, --overwrite starts anew")
    if args.resume and not work.exists():
        raise BadInput(f"{work}: no interrupted run to resume; leave --resume away to start one")

    # ---- data
    examples = []
    for name in split_names(args.task):
        examples += load_examples(args.data, name, "train")[:args.limit]
    device = pick_device(args.device)
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" else "fp32"
    model, tokenizer = load(args.model, torch.float32, device)
    rows = encode(examples, tokenizer, args.max_length)
    cut = sum(ids[-1] != tokenizer.eos_id for ids, _ in rows)
    kept = [row for row, (ids, n_prompt) in enumerate(rows) if len(ids) > n_prompt]
    if not kept:
        raise BadInput(f"--max-length {args.max_length}: no example has a token of its response left; raise it")
    unusable = len(rows) - len(kept)
    examples, rows = [examples[row] for row in kept], [rows[row] for row in kept]
    lengths = [len(ids) - 1 for ids, _ in rows]
    steps = order_of(len(rows), args.epochs, args.batch, args.seed)[:args.steps]

    # ---- model and steering
    steering = args.steering
    if args.layers is not None:
        try:
            steering = Steering(**{**vars(steering), "layers": parse_layers(args.layers, model.config.n_layers)})
        except ValueError as error:
            raise BadInput(f"--layers: {error}") from None
    rewarded = [layer for layer in range(model.config.n_layers) if steering.at(layer).method == "reg"]

    # ---- optimizer
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]    # decaying a norm or a bias pulls it to a meaningless 0
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, fused=True)

    # ---- the run's folder
    settings = {key: value for key, value in vars(args).items() if key not in ("resume", "overwrite", "save_every", "steering", "out")}
    settings |= {"steering": vars(steering), "steps_total": len(steps), "examples": len(rows),
                 "data_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
                 "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    start = 0
    if args.overwrite and work.exists():
        shutil.rmtree(work)
    if args.resume:
        before = read_run(work)
        differing = [key for key in settings if before.get(key) != json.loads(json.dumps(settings[key])) and key not in MACHINE]
        if differing:
            raise BadInput(f"{work}: was started with another {', '.join(differing)}; resume with the same flags, or --overwrite")
        log_bytes = 0
        if state_file.is_file():
            try:
                state = torch.load(state_file, map_location=device, weights_only=True)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                start, log_bytes = state["step"], state["log_bytes"]
            except (RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
                raise BadInput(f"{state_file}: not a state of this run ({str(error).splitlines()[0]}); --overwrite starts anew") from None
            del state
        if log_file.is_file():
            os.truncate(log_file, log_bytes)                                   # forget the steps that will be done again
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / "args.json", json.dumps(settings, indent=2) + "\n")

    tokens, supervised = sum(lengths), sum(len(ids) - n_prompt for ids, n_prompt in rows)
    print(f"model      {args.model}: {sum(w.numel() for w in model.parameters()):,} parameters, {model.config.n_layers} layers of {model.config.d_m:,} memories")
    print(f"data       {len(rows):,} examples, {tokens:,} tokens, {supervised:,} of them supervised"
          + (f"; {cut:,} were longer than {args.max_length} tokens and lost their end" if cut else "")
          + (f"; {unusable:,} of these had no response left and are not used" if unusable else ""))
    print(f"steering   {steering}")
    print(f"recipe     {len(steps):,} steps of {args.batch}, lr {args.lr:g}, {args.warmup} warm-up, seed {args.seed}, {args.precision} on {device}"
          + (f"; note: the warm-up takes the whole run, --warmup sets it" if args.warmup >= len(steps) else ""))
    if start:
        print(f"resuming   after step {start}")

    # ---- loop
    model.train()
    bar = tqdm(total=len(steps), initial=start, desc="training", unit="step", disable=None)
    with bar, open(log_file, "a", encoding="utf-8") as log:
        for step in range(start, len(steps)):
            began = time.perf_counter()
            batches = micro_batches(steps[step], lengths, args.micro_tokens)
            n_tokens = sum(lengths[row] for row in steps[step])
            n_supervised = sum(len(rows[row][0]) - rows[row][1] for row in steps[step])
            parts = []                                                         # of each micro-batch: its share of L_LM, of H per layer
            for batch in batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    lm, entropy = losses(model, *collate([rows[row] for row in batch]), steering, args.checkpoint)
                lm, entropy = lm / n_supervised, entropy / n_tokens
                loss = lm - steering.lam * entropy[rewarded].sum()             # eq. 5; without reg nothing is rewarded
                loss.backward()
                parts.append(torch.cat([lm.detach()[None], entropy.detach()]))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            parts = torch.stack(parts).cpu()                                   # [micro-batches, 1 + n_layers]
            lm, entropy = parts[:, 0].sum().item(), parts[:, 1:].sum(0)
            reg = -steering.lam * entropy[rewarded].sum().item()
            if not math.isfinite(lm + reg + norm.item()):
                bad = next((batch for batch, part in zip(batches, parts) if not part.isfinite().all()), batches[-1])
                names = ", ".join(f"{examples[row].task} row {examples[row].index}" for row in bad[:8])
                sys.exit(f"train.py: step {step + 1}: the loss is not finite (lm_loss {lm:g}, reg_loss {reg:g}, gradient norm {norm:g}) in the batch of "
                         f"{names}{', ...' if len(bad) > 8 else ''}; the last saved state is kept in {work}; a lower --lr often helps")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args, len(steps))
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - began
            line = {"step": step + 1, "loss": lm + reg, "lm_loss": lm, "reg_loss": reg, "key_entropy": entropy.mean().item(),
                    "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(), "tokens": n_tokens, "supervised_tokens": n_supervised,
                    "examples": len(steps[step]), "tokens_per_second": n_tokens / seconds, "examples_per_second": len(steps[step]) / seconds,
                    "peak_memory_bytes": peak_memory(device)}
            log.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{line['loss']:.3f}", H=f"{line['key_entropy']:.3f}", tok_s=f"{line['tokens_per_second']:,.0f}", refresh=False)
            bar.update()
            if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < len(steps):
                log.flush()
                save_state(state_file, {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "log_bytes": log.tell()})

    # ---- the finished run appears as a whole
    model.save_pretrained(work)
    for name in tokenizer.files:
        shutil.copyfile(Path(args.model, name), work / name)
    if out.exists():
        shutil.rmtree(out)
    os.replace(work, out)
    (out / "state.pt").unlink(missing_ok=True)
    print(f"saved      {out}\nnext       python eval.py --model {out} --task {args.task} --data {args.data}")


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)     # Linux counts in KiB


def save_state(path, state):
    """Replace the resume state at once: a crash leaves the old one or the new one, never half of one."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


if __name__ == "__main__":
    command(lambda: train(read_settings()))
