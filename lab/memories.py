"""What single memories say, and which contexts activate them (paper, section 4.3).

    python -m lab.memories                       the clearest memories, and what activates them
    python -m lab.memories --token " Brindale"   the memories that promote one token
    python -m lab.memories --index 4:377         one memory, and the contexts that activate it
    python -m lab.memories --model RUN --moved data/toy/llama      what fine-tuning moved most

The LM head turns a memory vector v_i into a distribution over the V tokens. This is what the memory
says. Its most probable tokens are the memory's concept. The specificity is 0 if all tokens are
equally probable, and 1 if the memory says one token only:

    P_i = softmax(v_i W_decode)            Spec_i = 1 - H(P_i) / log V            --decode raw
    P_i = softmax(norm(v_i) W_decode)                                             --decode lens

The first is that of section 4.3. The lens is ours: what the model would say if v_i were all that it
had found. A hidden state goes through the final norm, and in Gemma through a norm before that.
Spec depends on the length of the vector: raw, it is near 0 for short ones; by the lens, 1 for many.
The clarity does not. It is how many standard deviations above the mean of all V logits the fifth
largest lies.

A context is the beginning of a text. Its last token activates memory i by the key coefficient k_i.
The memory is active there if k_i is among the largest hundredth of its layer. The clearest memories
are those of the largest clarity, of all that are active in at least five contexts.
"""
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from data import BadInput, Parser, command, positive, progress
from data.runs import locked
from data.tasks import find, load as load_examples
from eval import (TOY_FOLDER, TOY_TRAINING, keys_of, load, pick_device, set_threads, split_names,
                  which_model)
from infosteer import entropy
from lab import machine_flags
from lab.page import columns
from model import read_tensors, save_tensors
from train import encode

CONCEPT = 10                           # tokens of a concept
SHORT, PROBED = 1e-3, 8                # Spec of short vectors; vectors of a layer that are tried
LISTED = 5                             # tokens of a concept that tables show
FOUND = 20                             # memories shown for a token
CONTEXTS = 5                           # kept for each memory, at either end of k
CALLED = 3                             # of them shown for each of the clearest memories
SHOWN = 12                             # tokens of a context that are shown, the last ones
LONGEST = 256                          # tokens of a text, as in training
STEP = 32                              # texts read between two writes to disk
INDEX, TRIGGERS = "memories_{}.safetensors", "memory_triggers.safetensors"

# ------------------------------------------------------- what is found out once and then kept
# The index is made layer by layer, the triggers text by text. Each file is written whole after each
# step, so an interrupted pass goes on where it stopped. Each file names what it was made from.


@contextmanager
def alone_in(folder):
    """Hold a folder in which results are kept: other processes wait, and find them then. Raises
    BadInput where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "memories.lock", wait=True):
            yield
    except OSError as error:
        raise BadInput(f"{folder}: cannot keep results there ({error}); --out names another "
                       "folder") from None


def memory_index(model, made_from, path, overwrite=False, how="raw"):
    """What every memory says, kept in the file `path`: what `decode` gives, with n_layers in front.

    made_from: eval.which_model of the model's folder. Raises BadInput for a file that is not ours.
    """
    about = {"kind": "memory index",
             "made from": f"{made_from} {model.decode.dtype} {CONCEPT} {how}"}
    index = resume(path, about, overwrite, fresh={})
    done, L, head = len(index.get("ids", ())), model.config.n_layers, model.decode.float()
    bar = progress(range(done, L), total=L, initial=done, desc="decoding memories", unit="layer")
    for layer in bar:
        v, cap = decodable(model, layer, how)
        said = decode(v, head, cap)
        index = {name: torch.stack([*index.get(name, ()), new]) for name, new in said.items()}
        save_tensors(index, path, about)
    return index


@torch.inference_mode()
def decodable(model, layer, how):
    """What meets the LM head for each memory of a layer [d_m, d], and the cap of its logits."""
    block = model.blocks[layer]
    v = block.memory.values.weight.T.float()                                   # [d_m, d]
    if how == "raw":
        return v, None
    return model.norm(block.after_memory(v)), model.config.final_softcap


def logits_of(v, head, cap):
    """v [..., d], the LM head or some of its rows [V, d] -> [..., V]."""
    logits = v @ head.T
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.inference_mode()
def decode(v, head, cap=None):
    """What memories say: v [n, d] and cap of `decodable`, the LM head [V, d] -> on the CPU,

        entropy, log_z   [n]            H(P_i) in nats; log Z_i, of P_i(t) = exp(logit_t) / Z_i
        ids, log_p       [n, CONCEPT]   the most probable tokens, the first one first
        clarity          [n]            (logit of token LISTED - mean logit) / standard deviation

    In fp32 whatever the weights are in: bf16 keeps three digits of a logit, and tokens would tie.
    A piece at a time: all of a layer would be d_m x V numbers, gigabytes for most models.
    """
    said = []
    for piece in v.split(max(1, (2**24 if v.device.type == "cpu" else 2**28) // len(head))):
        logits = logits_of(piece, head, cap)                                   # [piece, V]
        log_p = logits.log_softmax(-1)
        top, ids = log_p.topk(min(CONCEPT, len(head)))                         # [piece, CONCEPT]
        log_z = logits.gather(-1, ids[:, :1])[:, 0] - top[:, 0]                # [piece]
        spread, mean = torch.std_mean(log_p, -1, correction=0)                 # [piece]
        clarity = (top[:, min(LISTED, len(head)) - 1] - mean) / spread         # [piece]
        said.append((entropy(log_p), log_z, ids.int(), top, clarity))
    return {name: torch.cat(pieces).cpu() for name, pieces in zip(
        ("entropy", "log_z", "ids", "log_p", "clarity"), zip(*said))}


def choose_decoding(model):
    """The decoding of --decode auto, and why, as a sentence. Raw logits grow with the length of the
    vector, so the longest vectors of each layer are tried."""
    head, largest = model.decode.float(), 0.0
    for layer in range(model.config.n_layers):
        v, _ = decodable(model, layer, "raw")
        longest = v[v.norm(dim=-1).topk(min(PROBED, len(v))).indices]          # [PROBED, d]
        spec = specificity(decode(longest, head)["entropy"], len(head))
        largest = max(largest, spec.max().item())
    how, word = ("lens", "below") if largest < SHORT else ("raw", "not below")
    return how, f"since raw Spec goes up to {largest:.2g} here, which is {word} {SHORT:g}"


@torch.inference_mode()
def memory_triggers(model, made_from, texts, path, overwrite=False):
    """The contexts with the largest and the most negative coefficients of every memory, kept in the
    file `path`. texts: lists of at most LONGEST ids.

        k       [n_layers, 2, d_m, CONTEXTS]   [:, 0] the largest k_i, [:, 1] the largest -k_i
        at      [n_layers, 2, d_m, CONTEXTS]   (number of the text) * LONGEST + position, for each
        active  [n_layers, d_m]                in how many contexts k_i is in the largest hundredth

    Where there are fewer contexts, k is -inf. made_from and errors are those of `memory_index`.
    """
    sha = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    about = {"kind": "memory triggers",
             "made from": f"{made_from} {model.decode.dtype} {CONTEXTS} {LONGEST} {sha}"}
    shape = model.config.n_layers, 2, model.config.d_m, CONTEXTS
    state = resume(path, about, overwrite, {
        "texts": torch.zeros(1, dtype=torch.int32),                            # how many were read
        "active": torch.zeros(shape[0], shape[2], dtype=torch.int32),
        "k": torch.full(shape, -torch.inf), "at": torch.full(shape, -1, dtype=torch.int32)})
    state = {name: tensor.to(model.decode.device) for name, tensor in state.items()}
    done, ends = int(state["texts"]), new_contexts(texts)
    reading = keys_of(model, [ids[:-1] for ids in texts[done:]])
    bar = progress(reading, total=len(texts), initial=done, desc="reading texts", unit="text")
    for n, keys in enumerate(bar, done):
        here = torch.tensor(ends[n], dtype=torch.int32, device=model.decode.device)
        for layer, k in enumerate(keys):                                       # [T, d_m]
            busiest = k[here].topk(max(1, k.shape[-1] // 100)).indices         # [contexts, d_m/100]
            state["active"][layer] += busiest.flatten().bincount(minlength=k.shape[-1])
            k = torch.stack([k[here].T, -k[here].T])                           # [2, d_m, contexts]
            state["k"][layer], state["at"][layer] = keep_best(
                state["k"][layer], state["at"][layer], k, n * LONGEST + here)
        state["texts"][0] = n + 1
        if (n + 1) % STEP == 0 or n + 1 == len(texts):
            save_tensors(state, path, about)
    return {name: tensor.cpu() for name, tensor in state.items()}


def keep_best(best, at, k, places):
    """The largest coefficients of each memory so far, and where they were: best, at [..., n] and
    new ones, k [..., T] at places [T] -> both, brought up to date."""
    best, chosen = torch.cat([best, k.to(best.dtype)], -1).topk(best.shape[-1])
    return best, torch.cat([at, places.expand(k.shape)], -1).gather(-1, chosen)


def new_contexts(texts):
    """The contexts of each text that are looked at: the positions of their last tokens.

    The first position is not looked at: it is the same in all texts, and models rest their
    attention there. Nor is a context that an earlier text has had: many prompts begin alike.
    """
    seen, positions = set(), []
    for ids in texts:
        prefix, here = 0, []
        for position, id in enumerate(ids[:-1]):
            prefix = hash((prefix, id))
            if position and prefix not in seen:
                here.append(position)
            seen.add(prefix)
        positions.append(here)
    return positions


def resume(path, about, overwrite, fresh):
    """The tensors that an earlier pass has kept in `path`, or `fresh` where there is no such file,
    where it was made from something else, or with overwrite. Raises BadInput for a file that is
    damaged, unless with overwrite, and for one that is not ours."""
    if not Path(path).is_file():
        return fresh
    try:
        kept, found = read_tensors(path)
    except BadInput:
        if overwrite:
            return fresh
        raise BadInput(f"{path}: this file is damaged; delete it, or python -m lab.memories "
                       "--overwrite makes it again") from None
    if found.get("kind") != about["kind"]:
        raise BadInput(f"{path}: this is no {about['kind']}, so it is never replaced; --out puts "
                       "ours into another folder")
    if overwrite:
        return fresh
    if found != about:
        print(f"{path}: made from another model or other texts; made again", file=sys.stderr)
    return kept if found == about else fresh


# -------------------------------------------------------------------------- tokens and texts


def token_text(tokenizer, id):
    """The text of a token; "<0xE2>" for a byte that is a part of a character, "<id 1234>" for an id
    that no token has."""
    token = tokenizer.token(id)
    try:
        return f"<id {id}>" if token is None else token.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in token)


def single_token(text, tokenizer):
    """The id of the token that is this text. Raises BadInput for a text that is none or several."""
    ids = tokenizer.encode(text, bos=False, special=False)
    if len(ids) != 1:
        pieces = " + ".join(repr(token_text(tokenizer, id)) for id in ids)
        raise BadInput(f"--token {text!r}: give one token of this model; these are {len(ids)}: "
                       f"{pieces}. Most words begin with their space, as in ' the'")
    return ids[0]


def development_examples(names, data, n):
    """n examples of the tasks, the same ones each time. They are from the training split, or from
    the test split of a task that has no other."""
    examples = [example for name in names for example in load_examples(
        data, name, "train" if "train" in find(name, data).splits else "test")]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return [examples[i] for i in order[:n].tolist()]


# --------------------------------------------- three ways to look, each with its text for people


def specificity(entropies, V: int):
    """Spec(v) = 1 - H(P) / log V: 0 for a memory that says anything, 1 if it says one token."""
    return 1 - entropies / torch.tensor(float(V)).log()


def describe(tokenizer, V, index, layer, memory):
    """One memory as JSON prints it: its layer counted from 1, its concept, how clear and specific
    it is. A ratio is how many times as probable a token is as if all were equally probable."""
    ids, log_p = (index[name][layer, memory] for name in ("ids", "log_p"))     # [CONCEPT]
    concept = [{"id": id, "token": token_text(tokenizer, id), "probability": p, "ratio": p * V}
               for id, p in zip(ids.tolist(), log_p.exp().tolist())]
    return {"layer": layer + 1, "memory": memory, "concepts": concept,
            "clarity": index["clarity"][layer, memory].item(),
            "specificity": specificity(index["entropy"][layer, memory], V).item()}


def row_of(memory, *more):
    """One memory as a row of a table."""
    return [f"{memory['layer']}:{memory['memory']}", *more, f"{memory['specificity']:.6f}",
            says(memory["concepts"][:LISTED])]


def says(concept):
    return "  ".join(f"{one['token']!r} {times(one['ratio'])}" for one in concept)


def times(ratio):
    """A ratio to three digits: 1.04 is "x1.04", 12345.6 is "x12,300"."""
    return f"x{float(f'{ratio:.3g}'):,.10g}"


def survey(tokenizer, V, index, n, triggers, texts, examples):
    """Of every layer the mean specificity and the agreement; the n clearest memories of all, and
    what activates them (see `look`)."""
    layers, pairs = [], []
    spec = specificity(index["entropy"], V)                                    # [n_layers, d_m]
    for layer in range(len(spec)):
        active = triggers["k"][layer, 0, :, 0] > 0                             # [d_m]
        following = [texts[place // LONGEST][place % LONGEST + 1]
                     for place in triggers["at"][layer, 0, active, 0].tolist()]
        pairs.append(agreement(index["ids"][layer, active, 0], torch.tensor(following)))
        layers.append({"layer": layer + 1, "mean_specificity": spec[layer].mean().item(),
                       "agreement": shares(pairs[-1])})
    active = triggers["active"] >= CONTEXTS                                    # [n_layers, d_m]
    order = index["clarity"].where(active, -torch.inf).flatten().argsort(descending=True)
    return {"mean_specificity": spec.mean().item(), "agreement": shares(torch.cat(pairs, 1)),
            "by_layer": layers, "clearest": [
                look(tokenizer, V, index, *divmod(i, spec.shape[1]), triggers, texts, examples)
                for i in order[:min(n, int(active.sum()))].tolist()]}


def agreement(concepts, following):
    """Is the most probable token of a memory what follows the context that activates it most (Geva
    et al. 2021)? The two tokens of n memories, both [n] -> [2, n]: 1 if so, else 0; and the chance,
    which is the share of the n contexts that this token follows."""
    chance = [(following == concept).double().mean() for concept in concepts]
    return torch.stack([(concepts == following).double(), torch.tensor(chance).double()])


def shares(pairs):
    """The mean of what `agreement` gives, with its binomial standard error; None for no memory."""
    n = pairs.shape[1]
    if not n:
        return None
    share, chance = pairs.mean(1).tolist()
    error = (share * (1 - share) / n) ** 0.5
    return {"n": n, "share": share, "standard_error": error, "chance": chance}


def survey_text(result):
    rows = []
    for name, row in [*((row["layer"], row) for row in result["by_layer"]), ("all", result)]:
        rows.append([name, f"{row['mean_specificity']:.6f}"])
        if a := row["agreement"]:
            rows[-1] += [f"{a['share']:.2%} ± {a['standard_error']:.2%}", f"{a['chance']:.2%}",
                         f"{a['n']:,}"]
    parts = [columns(["layer", "mean Spec", "agreement", "chance", "n"], rows), """\
agreement: of n memories, the share whose most probable token is what follows the context that
      activates the memory most. ± is the standard error, as if memories were independent.
chance: the agreement to be expected if contexts were shuffled among the memories of a layer."""]
    for one in result["clearest"]:
        parts.append(heading(one) + "".join(map(context_line, one["largest"][:CALLED])))
    return "\n\n".join(parts)


@torch.inference_mode()
def token_search(model, tokenizer, token, index, how="raw"):
    """The memories of all layers that give a token the largest probability, and the token's rank
    among all that each of them says."""
    head, L = model.decode.float(), model.config.n_layers                      # [V, d]
    of_layers, log_p = [decodable(model, layer, how) for layer in range(L)], []
    for (v, cap), log_z in zip(of_layers, index["log_z"]):                     # v: [d_m, d]
        log_p.append(logits_of(v, head[token, None], cap)[:, 0] - log_z.to(v.device))
    log_p = torch.cat(log_p)                                                   # [n_layers * d_m]
    best, places = log_p.topk(min(FOUND, len(log_p)))
    rows = []
    for p, place in zip(best.exp().tolist(), places.tolist()):
        layer, memory = divmod(place, model.config.d_m)
        v, cap = of_layers[layer]
        others = logits_of(v[memory], head, cap)                               # [V]
        rows.append({**describe(tokenizer, len(head), index, layer, memory), "probability": p,
                     "ratio": p * len(head), "rank": 1 + int((others > others[token]).sum())})
    return {"token": {"id": token, "token": token_text(tokenizer, token)}, "found": rows}


def token_search_text(result):
    token = result["token"]
    rows = [row_of(memory, times(memory["ratio"]), memory["rank"]) for memory in result["found"]]
    return f"""\
The memories that make {token['token']!r} (id {token['id']}) most probable
rank: its place in the order of probability

{columns(["memory", "P(token)", "rank", "Spec", "says first"], rows)}"""


@torch.inference_mode()
def one_memory(model, tokenizer, layer, memory, how, *read):
    """What one memory says, layer from 0, and what activates it: see `look`."""
    v, cap = decodable(model, layer, how)
    said = decode(v[memory, None], model.decode.float(), cap)
    index = {name: {(layer, memory): of[0]} for name, of in said.items()}
    return look(tokenizer, model.config.vocab_size, index, layer, memory, *read)


def look(tokenizer, V, index, layer, memory, triggers, texts, examples):
    """What `describe` gives, in how many contexts the memory is active, and those with its largest
    and its most negative coefficients. examples: what the texts were made of."""
    one = describe(tokenizer, V, index, layer, memory)
    one["active"] = int(triggers["active"][layer, memory])
    for end, (name, sign) in enumerate((("largest", 1), ("smallest", -1))):
        k, places = (triggers[of][layer, end, memory].tolist() for of in ("k", "at"))
        one[name] = []
        for k, place in zip(k, places):
            if k > 0:
                text, at = divmod(place, LONGEST)
                ids, example = texts[text], examples[text]
                before = [id for id in ids[max(0, at - SHOWN + 1):at] if id != tokenizer.bos_id]
                one[name].append({
                    "k": sign * k, "task": example.task.name, "row": example.index,
                    "position": at, "context": tokenizer.decode(before),
                    "token": token_text(tokenizer, ids[at]),
                    "next": token_text(tokenizer, ids[at + 1])})
    return one


def heading(one):
    return (f"memory {one['layer']}:{one['memory']}, clarity {one['clarity']:.1f}, Spec "
            f"{one['specificity']:.6f}, active in {one['active']:,} contexts\n"
            f"says {says(one['concepts'])}")


def context_line(found):
    before, token = (repr(found[part])[1:-1] for part in ("context", "token"))
    cut = "…" if found["position"] >= SHOWN else ""
    return (f"\n{found['k']:>+9.3f}  {cut}{before}«{token}» {found['next']!r}  "
            f"({found['task']} row {found['row']})")


def one_memory_text(one):
    parts = [heading(one)]
    for name, title in (("largest", "largest"), ("smallest", "most negative")):
        parts.append(f"The {title} coefficients k, with «the last token» and what follows it:")
        parts[-1] += "".join(map(context_line, one[name]))
    return "\n\n".join([*parts, "With a negative k, what the memory says gets less probable."])


@torch.inference_mode()
def moved(model, tokenizer, base, n, how):
    """The n memories whose vectors moved most from those of `base`, by |v - v_base| / |v_base|, and
    what they say in both; the mean over all memories."""
    V, heads, distances = model.config.vocab_size, [of.decode.float() for of in (base, model)], []
    for before, after in zip(base.blocks, model.blocks):
        v, w = (block.memory.values.weight.float().T for block in (before, after))     # [d_m, d]
        distances.append((w - v).norm(dim=-1) / v.norm(dim=-1))                # [d_m]
    distances = torch.stack(distances)                                         # [n_layers, d_m]
    rows = []
    for place in distances.flatten().topk(min(n, distances.numel())).indices.tolist():
        layer, memory = divmod(place, distances.shape[1])
        said = []
        for of, head in zip((base, model), heads):
            v, cap = decodable(of, layer, how)
            index = {name: {(layer, memory): value[0]}
                     for name, value in decode(v[memory, None], head, cap).items()}
            said.append(describe(tokenizer, V, index, layer, memory))
        rows.append({"distance": distances[layer, memory].item(), "before": said[0],
                     "after": said[1]})
    return {"mean_distance": distances.mean().item(), "moved": rows}


def moved_text(result):
    rows = [[f"{one['before']['layer']}:{one['before']['memory']}", f"{one['distance']:.3f}",
             *(says(one[when]["concepts"][:LISTED - 2]) for when in ("before", "after"))]
            for one in result["moved"]]
    return f"""\
The memories whose vectors moved most; the mean of all is {result['mean_distance']:.4f}
moved: the length of the difference, as a share of the length before

{columns(["memory", "moved", "says before", "and after"], rows)}"""


# ------------------------------------------------------------------------------------ command


def read_settings(argv):
    parser = Parser(prog="python -m lab.memories", description=__doc__, epilog=f"""\
Decoding every memory and reading the texts takes long, so both are done once and kept in the folder
--out, as {INDEX} and {TRIGGERS}. What was interrupted goes on.""")
    add, one = parser.add_argument, parser.add_mutually_exclusive_group()
    one.add_argument("--token", metavar="TEXT", help="show the memories that promote this token, "
                     'given with its leading space (" Paris")')
    one.add_argument("--index", metavar="LAYER:MEMORY", help="show this memory; layers are counted "
                     "from 1, memories from 0")
    one.add_argument("--moved", metavar="BASE", help="show the memories that moved most from those "
                     "of this base model; reads no texts")
    add("--clearest", type=positive, metavar="N", default=20, help="how many of the clearest "
        "memories, or of those that moved most, are shown (default: 20)")
    add("--decode", choices=("auto", "raw", "lens"), default="auto", help="how memories are "
        "decoded, see above (default: the lens where raw Spec is below a thousandth, else raw)")
    add("--model", metavar="DIR", default=os.path.relpath(TOY_FOLDER / "llama"),
        help="a run of train.py or a published checkpoint (default: data/toy/llama)")
    add("--task", metavar="A,B", default=TOY_TRAINING,
        help="the tasks whose training texts are read (default: %(default)s)")
    add("--data", metavar="DIR", default=TOY_FOLDER,
        help="the folder with TASK/train.json (default: data/toy)")
    add("--items", type=positive, metavar="N", default=100, help="texts to read (default: 100)")
    add("--out", metavar="DIR", help="where results are kept (default: MODEL/eval)")
    add("--overwrite", action="store_true", help="make the kept results again")
    machine_flags(add)
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights (default: as they are stored)")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_settings(argv)
    names = split_names(args.task, args.data)
    set_threads(args.threads, names)
    examples = development_examples(names, args.data, args.items)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)       # None: as stored
    model, tokenizer = load(args.model, dtype, pick_device(args.device))
    model.to(model.embed.weight.dtype)                         # a folder may hold several
    texts = [ids for ids, _ in encode(examples, tokenizer, LONGEST)]
    L, d_m, V = model.config.n_layers, model.config.d_m, model.config.vocab_size
    token = None if args.token is None else single_token(args.token, tokenizer)
    layer, _, memory = (args.index or "1:0").partition(":")
    if not (layer.isdecimal() and 1 <= int(layer) <= L
            and memory.isdecimal() and int(memory) < d_m):
        raise BadInput(f"--index {args.index}: give LAYER:MEMORY; this model has the layers 1 to "
                       f"{L}, each with the memories 0 to {d_m - 1}")

    how, why = (args.decode, "as asked") if args.decode != "auto" else choose_decoding(model)
    if args.moved:
        base, _ = load(args.moved, model.embed.weight.dtype, model.embed.weight.device)
        if (base.config.d_m, base.config.n_layers, base.config.d) != (d_m, L, model.config.d):
            raise BadInput(f"--moved {args.moved}: has other memories than {args.model}, which "
                           f"has {L} layers of {d_m}")
        found, text = moved(model, tokenizer, base, args.clearest, how), moved_text
    else:
        sha, out = which_model(args.model), Path(args.out or Path(args.model, "eval"))
        with alone_in(out):
            if not args.index:
                index = memory_index(model, sha, out / INDEX.format(how), args.overwrite, how)
            if token is None:
                triggers = memory_triggers(model, sha, texts, out / TRIGGERS, args.overwrite)
                read = triggers, texts, examples
        if token is not None:
            found, text = token_search(model, tokenizer, token, index, how), token_search_text
        elif args.index:
            found = one_memory(model, tokenizer, int(layer) - 1, int(memory), how, *read)
            text = one_memory_text
        else:
            found, text = survey(tokenizer, V, index, args.clearest, *read), survey_text
    result = {"model": args.model, "layers": L, "memories": d_m, "vocabulary": V, "decode": how,
              "why": why, "tasks": names, "texts": len(texts),
              "contexts": sum(map(len, new_contexts(texts))), **found}
    found_in = f"{result['contexts']:,} contexts in {len(texts):,} texts of {', '.join(names)}"
    print(json.dumps(result, indent=2) if args.json else f"""\
{args.model}: {L} layers of {d_m:,} memories
--decode {how}, {why}
{f"moved from {args.moved}" if args.moved else found_in}
x830: 830 times as probable as if all {V:,} tokens were equally probable

{text(result)}""")


if __name__ == "__main__":
    command(main)
