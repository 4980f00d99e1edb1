"""Fine-tune a model, with or without steering its feed-forward memory.

    python train.py --steer reg                                  a tiny model, in a minute or two, scored before and after
    python train.py --steer none int reg --seed 0 1 2            the same as an experiment: every arm, every seed, compared
    python train.py --model DIR --task boolq --data data/public --steer reg --out out/boolq-reg

DIR is a checkpoint folder as published for Llama 3, Qwen 2.5, Qwen 3, Gemma 2 or Gemma 3 (text). The result in --out is such a
folder too, with settings (args.json) and one line per step (log.jsonl) beside it. Without --model it is a tiny Llama that ships with
the project (data/toy; also --model data/toy/qwen and data/toy/gemma), and the toy world's tasks.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

from data import BadInput
from data.tasks import TASKS, TOY as TOY_TASKS, load as load_examples
from data.tokenizer import Tokenizer
from data.world import DOCUMENTS, World, documents
from eval import (BAR, PROFILE, RANK, TOY_FOLDER, TOY_TRAINING, WORLD, Parser, arm_name, base_folder, change_line, command, compare, comparison_table, find_runs,
                  finite, join, load, load_profile, memory_profile, pick_device, positive, read_run, run_folder, save_profile, score, side_by_side,
                  split_names, wait, write_whole)
from infosteer import BASES, METHODS, NORMALISATIONS, RANKINGS, Steering, meaningful, parse_layers
from model import Config, Transformer

try:
    import fcntl
    import resource
except ImportError:                    # not on Windows: there the log has no peak memory on a CPU, and nothing stops two from resuming one run
    fcntl = resource = None

# Three recipes. Every value is a flag; a flag that is not given has the value of the recipe.
PAPER = {"epochs": 1, "steps": None, "batch": 64, "max_length": 256, "lr": 5e-5, "warmup": 100, "weight_decay": 0.01, "clip": 1.0,
         "micro_tokens": None}                                                    # Appendix A
TOY = {**PAPER, "epochs": 3, "batch": 32, "lr": 2e-4, "warmup": 20}               # fine-tuning a model in data/toy
PRETRAIN = {**PAPER, "batch": 32, "max_length": 129, "lr": 2e-3, "micro_tokens": 4096}         # --pretrain: making one
MICRO_TOKENS = {"cpu": 1024, "cuda": 4096}                                        # as many as the caches hold; as many as keep a GPU busy
TOY_SHAPE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                 rms_norm_eps=1e-6, rope_theta=10_000.0, max_position_embeddings=256, tie_word_embeddings=True)
TOY_FAMILIES = {                       # --pretrain NAME -> what its config.json says beside the shape
    "llama": dict(TOY_SHAPE, model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu"),
    "qwen": dict(TOY_SHAPE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu"),
    "gemma": dict(TOY_SHAPE, model_type="gemma2", architectures=["Gemma2ForCausalLM"], hidden_activation="gelu_pytorch_tanh",
                  query_pre_attn_scalar=32, sliding_window=64, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
}
IGNORE = -100                          # the target of tokens that are not supervised
CONTROL = ("train_only", "resume", "overwrite", "save_every", "steering", "out", "arms")      # flags that are no settings of a run
SETTINGS = sorted({name for method in METHODS for base in BASES for name in meaningful(method, base)})      # flags of the steering
MACHINE = ("command", "device", "micro_tokens", "checkpoint", "compile", "offload", "versions")      # settings that --resume may change: the run stays the same

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
    group.add_argument("--model", metavar="DIR", help="a checkpoint folder: config.json, safetensors, tokenizer files (default: data/toy/llama)")
    group.add_argument("--task", metavar="A,B", help="a comma list of: "
                       f"{', '.join(name for name, task in TASKS.items() if 'train' in task.splits)}; or commonsense, the 170k mixture; or of the toy "
                       f"world's: {', '.join(name for name, task in TOY_TASKS.items() if 'train' in task.splits)} (default: the toy world's)")
    group.add_argument("--data", metavar="DIR", help="the folder with TASK/train.json, as python data/prepare.py makes one (default: data/toy)")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each task")
    group.add_argument("--out", metavar="DIR", help="the finished run; until then it grows in DIR.partial. With several arms or seeds, the folder of "
                       "their folders (default: out/MODEL-ARM-seedN)")
    group.add_argument("--pretrain", choices=TOY_FAMILIES, help="instead of fine-tuning, make a tiny model of this family from nothing but the toy "
                       "world's text: how those in data/toy were made")

    group = parser.add_argument_group("steering (a flag that means nothing for the method is refused)")
    group.add_argument("--steer", choices=METHODS, nargs="+", default=["none"],
                       help="one or several of none: plain fine-tuning; int: raise the smallest key coefficients in the forward pass (eq. 4); "
                            "reg: reward the entropy of the key distribution in the loss (eq. 5); semantic and activation: one of these, with a strength "
                            "for each group of memories, alike in their vectors or also in what calls them (B.1); surrogate: amplify the memories "
                            "that say what the training responses say; surrogate-entropy: reward the entropy of what the memories say together (B.2)")
    group.add_argument("--p", type=number, help="int: the fraction of the memories that is raised (default: 0.01)")
    group.add_argument("--alpha", type=number, help="int: raised to alpha times the mean (default: 1)")
    group.add_argument("--rank-by", choices=RANKINGS, help="int: smallest by magnitude, the idle memories, or by value, the literal "
                       "reading of eq. 4 (default: magnitude)")
    group.add_argument("--lam", type=number, help="reg, surrogate-entropy: lambda, the weight of the entropy; a negative one concentrates the keys (default: 0.01)")
    group.add_argument("--normalise", choices=NORMALISATIONS, help="reg: how k becomes a distribution: |k| / sum|k|, or softmax(k) "
                       "(default: magnitude)")
    group.add_argument("--base", choices=BASES, help="semantic, activation: whose change is scaled; the flags of int or reg go with it (default: int)")
    group.add_argument("--groups", type=positive, metavar="N", help="semantic, activation: groups of memories per layer (default: 16)")
    group.add_argument("--subgroups", type=positive, metavar="N", help="activation: groups within each of those (default: 4)")
    group.add_argument("--beta-max", type=finite, help="semantic, activation: the largest strength of a group (default: 4)")
    group.add_argument("--gamma", type=number, help="surrogate: a memory is amplified by gamma for each standard deviation of its score (default: 0.1)")
    group.add_argument("--lambda-1", type=number, help="surrogate: how much the entropy of what a memory says counts against it (default: 1)")
    group.add_argument("--lambda-2", type=number, help="surrogate: how much its divergence from the training responses counts against it (default: 1)")
    group.add_argument("--buckets", type=positive, metavar="N", help="surrogate-entropy: groups of like tokens that stand for the vocabulary (default: 256)")
    group.add_argument("--layers", metavar="RANGES", help="steer these layers only, from 1, and perhaps with other strengths: 1-8 or 1,4,9-12 or "
                       "1-8:alpha=2,9-16:alpha=3,17-24:alpha=1 (default: all)")
    group.add_argument("--memory-profile", metavar="FILE", help=f"semantic, activation, surrogate, surrogate-entropy: what an earlier run with the same model "
                       f"found out about its memories, RUN/{PROFILE}, instead of finding it out again")

    def usual(name):
        return f"(default: {PAPER[name]}; {TOY[name]} for the models in data/toy)" if PAPER[name] != TOY[name] else f"(default: {PAPER[name]})"

    group = parser.add_argument_group("recipe (defaults: the paper's, Appendix A)")
    group.add_argument("--epochs", type=positive, help=usual("epochs"))
    group.add_argument("--steps", type=positive, metavar="N", help="stop after N optimizer steps; the schedule ends there too")
    group.add_argument("--batch", type=positive, help=f"sequences per optimizer step; the paper's 4 x 16 {usual('batch')}")
    group.add_argument("--max-length", type=positive, help=f"tokens of prompt and response; the rest is cut off {usual('max_length')}")
    group.add_argument("--lr", type=finite, help=f"peak learning rate {usual('lr')}")
    group.add_argument("--warmup", type=int, metavar="N", help=f"steps of linear warm-up, before linear decay to 0 {usual('warmup')}")
    group.add_argument("--weight-decay", type=finite, help=f"of matrices; norms and biases have none {usual('weight_decay')}")
    group.add_argument("--clip", type=finite, help=f"largest gradient norm; 0 does not clip {usual('clip')}")
    group.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several: the order of the examples (default: 0)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                       help="bf16: autocast over fp32 weights (default: bf16 on cuda, else fp32)")
    group.add_argument("--micro-tokens", type=positive, metavar="N", help="tokens, padding included, in one forward pass; lower it if memory is short, "
                       f"the gradients stay the same (default: {MICRO_TOKENS['cuda']} on cuda, else {MICRO_TOKENS['cpu']})")
    group.add_argument("--checkpoint", action="store_true", help="compute activations twice instead of keeping them: less memory, 1.3 to 1.9 times the time")
    group.add_argument("--compile", action="store_true", help="torch.compile each block: slow to start, then faster on a GPU")
    group.add_argument("--offload", action="store_true", help="keep gradients, optimizer state and master weights in CPU memory: less GPU memory, slower "
                       "(torchrun --nproc-per-node N -- train.py ... spreads them over N GPUs instead, or as well)")
    group.add_argument("--save-every", type=positive, metavar="N", help="save the state of the run every N steps, for --resume")
    group.add_argument("--train-only", action="store_true", help="the laptop experiment: do not score base and run afterwards")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run, given the same flags")
    group.add_argument("--overwrite", action="store_true", help="replace a finished or interrupted run at --out")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])

    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    meant = {method: meaningful(method, args.base or "int") for method in args.steer}
    for name in given:
        if not any(name in names for names in meant.values()):
            parser.error(f"--{name.replace('_', '-')} means nothing with --steer {' '.join(args.steer)}{f' --base {args.base}' if args.base else ''}")
    if args.memory_profile and not any(METHODS[method].needs for method in args.steer):
        parser.error(f"--memory-profile means nothing with --steer {' '.join(args.steer)}, which needs to know nothing of the memories")
    if len(set(args.steer)) < len(args.steer) or len(set(args.seed)) < len(args.seed):
        parser.error("--steer and --seed take each method and each seed once")
    if args.warmup is not None and args.warmup < 0:
        parser.error("--warmup is below 0")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts it anew; give one of them")
    if args.pretrain and (args.model or args.task or given or args.steer != ["none"] or len(args.seed) > 1):
        parser.error("--pretrain makes one plain model of the toy world's text; it goes with no --model, --task, --steer or second --seed")
    if args.model and not is_toy(args.model) and not (args.task and args.data):
        parser.error(f"--model {args.model} needs --task and --data; without --model, a tiny model learns the toy world's tasks")

    args.model = f"new {args.pretrain}" if args.pretrain else args.model or os.path.relpath(TOY_FOLDER / "llama")
    args.data = args.data or os.path.relpath(TOY_FOLDER)
    args.task = None if args.pretrain else args.task or TOY_TRAINING
    recipe = PRETRAIN if args.pretrain else TOY if is_toy(args.model) else PAPER
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        args.arms = [Steering(method, **{name: value for name, value in given.items() if name in meant[method] and name != "layers"}) for method in args.steer]
    except ValueError as error:
        parser.error(str(error))
    return args


def is_toy(model):
    """Is this one of the tiny models in data/toy?"""
    return Path(model).resolve().parent == TOY_FOLDER


# ----------------------------------------------------------------------------------------------------------------- data


def encode(examples, tokenizer, max_length):
    """Examples -> [(ids, number of prompt ids)]: bos, prompt, response, eos, cut at max_length. Loss is on response and eos only.

    Prompt and response are encoded apart, as they are when the model answers a prompt.
    """
    rows = []
    for example in tqdm(examples, desc="encoding", unit="row", disable=BAR if len(examples) > 20_000 else True):
        prompt = tokenizer.encode(example.prompt, special=False)
        response = tokenizer.encode(example.response, bos=False, special=False) + [tokenizer.eos_id]
        rows.append(((prompt + response)[:max_length], len(prompt)))
    return rows


def fine_tuning_data(args, device):
    """-> model, tokenizer, rows of `encode`, a name for each row, a remark. Raises BadInput."""
    examples = [example for name in split_names(args.task) for example in load_examples(args.data, name, "train")[:args.limit]]
    model, tokenizer = load(args.model, torch.float32, "cpu" if spread(args) else device, weights=RANK == 0)     # process 0 hands them out
    rows = encode(examples, tokenizer, args.max_length)
    cut = sum(ids[-1] != tokenizer.eos_id for ids, _ in rows)
    kept = [row for row, (ids, n_prompt) in enumerate(rows) if len(ids) > n_prompt]
    if not kept:
        raise BadInput(f"--max-length {args.max_length}: no example has a token of its response left; raise it")
    remark = f"; {cut:,} were longer than {args.max_length} tokens and lost their end" if cut else ""
    remark += f"; {len(rows) - len(kept):,} of these had no response left and are not used" if len(kept) < len(rows) else ""
    return model, tokenizer, [rows[row] for row in kept], [f"{examples[row].task} row {examples[row].index}" for row in kept], remark


def pretraining_data(args, device):
    """The same for --pretrain: a new model, and the toy world's text packed into rows of max_length ids, all but the first supervised."""
    tokenizer = Tokenizer.from_pretrained(args.data)
    ids, text = [], hashlib.sha256()
    for document in tqdm(documents(World()), total=DOCUMENTS, desc="writing the toy world", unit="document", disable=BAR):
        ids += tokenizer.encode(document, special=False) + [tokenizer.eos_id]
        text.update(document.encode())
    config = Config.from_dict(dict(TOY_FAMILIES[args.pretrain], vocab_size=max(tokenizer.max_id, tokenizer.pad_id) + 1,
                                   bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, torch_dtype="float32"))
    stride = args.max_length - 1                       # the last id of a row is a target only, and the first id of the next
    rows = [(ids[start:start + args.max_length], 1) for start in range(0, len(ids) - stride, stride)][:args.limit]
    return Transformer(config).initialise(args.seed).to("cpu" if spread(args) else device), tokenizer, rows, [f"row {row} of the text" for row in range(len(rows))], (
        f"; SHA-256 of the text {text.hexdigest()}")


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


def losses(model, inputs, targets, real, steering, checkpoint=False, device=None):
    """Sums over one micro-batch, in nats: cross-entropy over its supervised tokens [], key entropy and reward over its tokens [n_layers] each.

    The caller divides them by the counts of the whole optimizer step, so that every supervised token of a step weighs the same,
    whichever micro-batch it fell into. device: where to compute, if not where the weights are kept.
    """
    device = device or model.embed.weight.device
    supervised = (targets.flatten() != IGNORE).nonzero()[:, 0]                 # [S]  found on the CPU: no wait for the GPU
    # [S, V], [n_layers, B, T] twice; the head runs where there is something to learn
    logits, flux, reward = model.predict(inputs.to(device), supervised.to(device), steering, checkpoint)
    lm = F.cross_entropy(logits, targets.flatten()[supervised].to(device), reduction="sum")
    real = real.to(device)
    return lm, (flux.detach() * real).sum((1, 2)), (reward * real).sum((1, 2))         # [], [n_layers], [n_layers]


def learning_rate(step, args, total):
    """Linear warm-up, then linear decay to 0. Steps count from 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (total - step) / max(1, total - args.warmup)


# ------------------------------------------------------------- more than one GPU, or less memory than the model takes: PyTorch's FSDP2

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)               # a state dict of whole tensors, at process 0
HANDED_OUT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shards_on_a_cpu():
    """Can this version of PyTorch spread a model without a GPU? 2.9 can and 2.6 cannot; nothing between was tried."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def spread(args):
    """Is the model spread over processes, or partly in CPU memory?"""
    return WORLD > 1 or args.offload


def shard(model, device, offload):
    """Spread parameters, gradients and optimizer state over the processes: process 0's model -> the same model, a part of each tensor here.

    A block's tensors are put together when it is used, and its gradients are summed and divided as they come.
    """
    if device.type == "cpu" and not shards_on_a_cpu():
        raise BadInput(f"several processes, and --offload, need torch 2.9 where there is no GPU; this is {torch.__version__}")
    with torch.device("meta"):
        sharded = Transformer(model.config)
    mesh, policy = init_device_mesh(device.type, (WORLD,)), CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for part in (*sharded.blocks, sharded):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    register_fsdp_forward_method(sharded, "predict")
    sharded.to_empty(device="cpu" if offload else device)
    set_model_state_dict(sharded, model.state_dict() if RANK == 0 else {}, options=HANDED_OUT)
    return sharded


def whole(model):
    """The whole of a sharded model, on the CPU of process 0 (elsewhere, an empty one)."""
    weights = get_model_state_dict(model, options=WHOLE)
    with torch.device("meta"):
        together = Transformer(model.config)
    if RANK == 0:
        together.load_state_dict(weights, assign=True)
    return together


# ------------------------------------------------------------------------------------------------------------- the loop


def train(args):
    """One run, from its settings to its folder."""
    out = Path(args.out)
    work = out.with_name(out.name + ".partial")
    state_file, log_file = work / "state.pt", work / "log.jsonl"
    if out.exists() and not read_run(out):
        raise BadInput(f"{out}: exists and is not a run of train.py, so it is never replaced; choose another --out")
    if out.exists() and not args.overwrite:
        raise BadInput(f"{out}: a finished run; --overwrite replaces it, or choose another --out")
    if work.exists() and not (args.resume or args.overwrite):
        raise BadInput(f"{work}: an interrupted run; --resume goes on with it, --overwrite starts anew")
    if args.resume and not work.exists():
        raise BadInput(f"{work}: no interrupted run to resume; leave --resume away to start one")
    wait()                                                                     # until every process has looked, and one may write

    # ---- data and model
    device = pick_device(args.device)
    args.micro_tokens = args.micro_tokens or MICRO_TOKENS["cuda" if device.type == "cuda" else "cpu"]
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" else "fp32"
    model, tokenizer, rows, names, remark = (pretraining_data if args.pretrain else fine_tuning_data)(args, device)
    lengths = [len(ids) - 1 for ids, _ in rows]
    steps = order_of(len(rows), args.epochs, args.batch, args.seed)[:args.steps]

    # ---- what a fine-grained method must know of the memories beforehand
    steering, profile_file = args.steering, work / PROFILE
    if METHODS[steering.method].needs and RANK == 0:
        source = args.memory_profile or (profile_file if args.resume and profile_file.is_file() else None)
        home = model.embed.weight.device                                       # a CPU, if the model is to be spread
        profile = load_profile(source, model, steering) if source else memory_profile(model.to(device), rows, steering, args.seed)
        model.to(home)

    # ---- the run's folder
    settings = {key: value for key, value in vars(args).items() if key not in CONTROL}
    settings |= {"steering": steering.settings, "steps_total": len(steps), "examples": len(rows),
                 "data_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
                 "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    if args.resume:
        before = read_run(work)
        differing = [key for key in settings if before.get(key) != json.loads(json.dumps(settings[key])) and key not in MACHINE]
        if differing:
            raise BadInput(f"{work}: was started with another {', '.join(differing)}; resume with the same flags, or --overwrite")
    wait()
    log = open(os.devnull, "a")
    if RANK == 0:
        if args.overwrite and work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        log = open(log_file, "a", encoding="utf-8")
        try:
            fcntl and fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)          # until the file is closed, or the process gone
        except BlockingIOError:
            raise BadInput(f"{work}: another process is training this run") from None
        write_whole(work / "args.json", json.dumps(settings, indent=2) + "\n")
        if METHODS[steering.method].needs:
            save_profile(profile_file, profile, model, steering)
    wait()

    # ---- steering
    change = None
    if METHODS[steering.method].needs:
        steering = steering.knowing(load_profile(profile_file, model, steering, own=True, device=device))
    if METHODS[steering.method].change and steering.base == "int" and not spread(args):
        change = change_line(model, [ids[:n_prompt] for ids, n_prompt in rows[:64]], steering)
    lam = torch.tensor([steering.at(layer).lam for layer in range(model.config.n_layers)], device=device)     # eq. 5, for each layer

    # ---- model and optimizer
    n_parameters = sum(weight.numel() for weight in model.parameters())
    if spread(args):
        model = shard(model, device, args.offload)
    if args.compile:
        torch._dynamo.config.specialize_float = True                           # p and alpha are constants of a run, and how many entries they mean too
        for block in model.blocks:
            block.compile(dynamic=True)
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]    # decaying a norm or a bias pulls it to a meaningless 0
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, fused=True)
    start, log_bytes = load_state(state_file, model, optimizer, spread(args)) if args.resume and state_file.is_file() else (0, 0)
    if RANK == 0:
        log.truncate(log_bytes)                                                # forget the steps that will be done again

    tokens, supervised = sum(lengths), sum(len(ids) - n_prompt for ids, n_prompt in rows)
    print(f"model      {args.model}: {n_parameters:,} parameters, {model.config.n_layers} layers of {model.config.d_m:,} memories")
    print(f"data       {len(rows):,} {'rows' if args.pretrain else 'examples'}, {tokens:,} tokens, {supervised:,} of them supervised{remark}")
    print(f"steering   {steering}" + (f"\n           {change}" if change else ""))
    print(f"recipe     {len(steps):,} steps of {args.batch}, lr {args.lr:g}, {args.warmup} warm-up, seed {args.seed}, {args.precision} on "
          + (f"{WORLD} x {device.type}" if WORLD > 1 else str(device)) + (", offloaded" if args.offload else "")
          + ("; note: the warm-up takes the whole run, --warmup sets it" if args.warmup >= len(steps) else ""))
    if start:
        print(f"resuming   after step {start}")

    # ---- loop
    model.train()
    bar = tqdm(total=len(steps), initial=start, desc="training", unit="step", disable=BAR)
    with bar, log:
        for step in range(start, len(steps)):
            began = time.perf_counter()
            batches = micro_batches(steps[step], lengths, args.micro_tokens)
            batches += [[]] * (-len(batches) % WORLD)                          # every process takes part in every pass, some with nothing to say
            n_tokens = sum(lengths[row] for row in steps[step])
            n_supervised = sum(len(rows[row][0]) - rows[row][1] for row in steps[step])
            parts = []                                                         # of each micro-batch: its share of L_LM, of the reward, of H per layer
            for batch in batches[RANK::WORLD]:
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False):
                    sums = losses(model, *collate([rows[row] for row in batch or steps[step][:1]]), steering, args.checkpoint, device)
                lm, entropy, reward = sums if batch else [0 * each for each in sums]
                lm, entropy, reg = lm / n_supervised, entropy / n_tokens, -(lam * reward).sum() / n_tokens       # eq. 5; only reg and its kind reward
                ((lm + reg) * WORLD).backward()                                # the processes' gradients are averaged, and here a sum is meant
                parts.append(torch.cat([lm.detach()[None], reg.detach()[None], entropy]))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
            norm = norm.full_tensor() if spread(args) else norm
            parts = torch.stack(parts)                                         # [micro-batches, 2 + n_layers]
            total = parts.sum(0)
            if WORLD > 1:
                dist.all_reduce(total)
            total, parts = total.cpu(), parts.cpu()
            lm, reg, entropy = total[0].item(), total[1].item() + 0.0, total[2:]
            if not math.isfinite(lm + reg + norm.item()):
                bad = next((batch for batch, part in zip(batches[RANK::WORLD], parts) if not part.isfinite().all()), batches[RANK])
                sys.exit(f"train.py: step {step + 1}: the loss is not finite (lm_loss {lm:g}, reg_loss {reg:g}, gradient norm {norm.item():g}) in the batch of "
                         f"{', '.join(names[row] for row in bad[:8])}{', ...' if len(bad) > 8 else ''}; the last saved state is kept in {work}; a lower --lr often helps")
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
                save_state(state_file, model, optimizer, step + 1, log.tell())

    # ---- the finished run appears as a whole
    model = whole(model) if spread(args) else model
    if RANK == 0:
        model.save_pretrained(work)
        for name in tokenizer.files:
            shutil.copyfile(Path(args.data if args.pretrain else args.model, name), work / name)
        old = out.with_name(out.name + ".old")
        if out.exists():
            os.replace(out, old)                                               # a crash from here on leaves the old run or the new one
        os.replace(work, out)
        shutil.rmtree(old, ignore_errors=True)
        (out / "state.pt").unlink(missing_ok=True)
    wait()
    print(f"saved      {out}")


def peak_memory(device):
    """Bytes: the allocator's peak on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)     # Linux counts in KiB


def save_state(path, model, optimizer, step, log_bytes):
    """Replace the resume state at once: a crash leaves the old one or the new one, never half of one. It holds whole tensors, so that a run
    may go on with another number of processes."""
    weights, moments = get_state_dict(model, optimizer, options=WHOLE)
    if RANK == 0:
        part = path.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                torch.save({"step": step, "log_bytes": log_bytes, "model": weights, "optimizer": moments}, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:                                          # which torch.save makes of an OSError
            raise OSError(f"{part}: cannot write it ({str(error).splitlines()[0]}); is the disk full? The state saved before is kept") from None
        os.replace(part, path)


def load_state(path, model, optimizer, handed_out):
    """Read what `save_state` wrote into model and optimizer -> (steps done, bytes of the log). Raises BadInput."""
    state = {"model": {}, "optimizer": {}, "step": 0, "log_bytes": 0}
    try:
        if RANK == 0:
            state = torch.load(path, map_location="cpu", weights_only=True)
        options = HANDED_OUT if handed_out else StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        done = [state["step"], state["log_bytes"]]
    except (RuntimeError, KeyError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path}: not a state of this run ({str(error).splitlines()[0]}); --overwrite starts anew") from None
    if WORLD > 1:
        dist.broadcast_object_list(done)
    return done


# -------------------------------------------------------------------------------------------------------------- command


def plan(args):
    """The runs that the flags ask for: [(settings of one run, is it finished?)], one per arm and seed. Raises BadInput."""
    several = len(args.arms) * len(args.seed) > 1 or not args.out
    runs, layers = [], None
    if args.layers is not None:
        try:
            layers = parse_layers(args.layers, Config.from_pretrained(args.model).n_layers)
        except ValueError as error:
            raise BadInput(error if isinstance(error, BadInput) else f"--layers: {error}") from None
    for steering, seed in ((steering, seed) for steering in args.arms for seed in args.seed):
        meant = meaningful(steering.method, steering.base)
        if layers and steering.method != "none":
            for name in {name for here in layers.values() for name in here} - set(meant):
                raise BadInput(f"--layers: {name} means nothing with --steer {steering.method}")
            steering = replace(steering, layers=layers)
            try:
                [steering.at(layer - 1) for layer in layers]
            except ValueError as error:
                raise BadInput(f"--layers: {error}") from None
        unmeant = {name: None for name in SETTINGS if name not in meant}       # flags for the other arms
        run = argparse.Namespace(**{**vars(args), "steer": steering.method, "steering": steering, "seed": seed, **unmeant})
        run.memory_profile = args.memory_profile if METHODS[steering.method].needs else None
        if several:
            run.out = str(run_folder(args.out or "out", args.model, steering, seed))
            run.resume = not args.overwrite and Path(run.out + ".partial").exists()
        before = {} if args.overwrite else read_run(run.out)
        differing = [key for key in before if key in vars(run) and key not in (*CONTROL, *MACHINE, "precision") and vars(run)[key] != before[key]]
        if several and differing:
            raise BadInput(f"{run.out}: a finished run with another {', '.join(differing)}; --overwrite replaces it, or choose another --out")
        runs.append((run, bool(before) and (several or args.resume)))
    return runs


def main(argv=None):
    args = read_settings(argv)
    join(pick_device(args.device), alone=args.offload)
    if args.pretrain:
        args.out = args.out or os.path.relpath(TOY_FOLDER / args.pretrain)
        args.steering, args.seed = args.arms[0], args.seed[0]
        train(args)
        return describe_pretraining(args)
    runs = plan(args)
    wait()
    for run, finished in runs:
        if finished:
            print(f"{run.out} is a finished run; --overwrite trains it again")
        else:
            train(run)
    if not is_toy(args.model) or args.train_only:
        return print(f"next       python eval.py --model {runs[0][0].out} --task {args.task} --data {args.data}")

    # ---- the laptop experiment: score the base model and every run on all three suites
    base = base_folder(Path(runs[0][0].out).parent, args.model)
    scores = {"base": score(args.model, list(TOY_TASKS), os.path.relpath(TOY_FOLDER), base / "eval", device=args.device, overwrite=args.overwrite)}
    for run, _ in runs:
        scores[f"{arm_name(run.steering)} seed {run.seed}"] = score(run.out, list(TOY_TASKS), os.path.relpath(TOY_FOLDER), device=args.device)
    if len(runs) == 1:
        print(f"\n{side_by_side(scores)}\n\nnext       python train.py --steer none int reg --seed 0 1 2      all arms, three seeds, compared")
    else:
        print(f"\n{comparison_table(compare([run for run in find_runs(base.parent) if run['model'] == args.model]))}\n\nnext       python eval.py --compare {base.parent}")


def describe_pretraining(args):
    """Write pretraining.json beside a new tiny model: how it was made, and how much it knows."""
    log = [json.loads(line) for line in open(Path(args.out, "log.jsonl"), encoding="utf-8")]
    settings, cloze = read_run(args.out), score(args.out, ["toy-cloze"], args.data, device=args.device)[0]
    shutil.rmtree(Path(args.out, "eval"))
    last = log[-50:]
    write_whole(Path(args.out, "pretraining.json"), json.dumps({
        "command": f"python train.py --pretrain {args.pretrain}", "seed": args.seed, "versions": settings["versions"], "threads": torch.get_num_threads(),
        "steps": len(log),
        "tokens": sum(line["tokens"] for line in log), "rows_sha256": settings["data_sha256"],
        "final_loss": sum(line["lm_loss"] for line in last) / len(last), "cloze_accuracy": cloze["accuracy"], "cloze_items": cloze["n"],
        "cloze_standard_error": cloze["standard_error"]}, indent=2) + "\n")
    print(Path(args.out, "pretraining.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    command(main)
