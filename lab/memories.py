"""What single memories say, and which contexts activate them (paper, section 4.3).

    python -m lab.memories                       the most specific and the most general memories
    python -m lab.memories --token " Brindale"   the memories that promote one token
    python -m lab.memories --index 4:377         one memory, and the contexts that activate it

The LM head turns a memory vector v_i into a distribution over the V tokens. This is what the memory
says. Its most probable tokens are the memory's concept. The specificity is 0 if all tokens are
equally probable, and 1 if the memory says one token only:

    P_i = softmax(v_i W_decode)        Spec_i = 1 - H(P_i) / log V

A context is the beginning of a text. Its last token activates memory i by the key coefficient k_i.
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
from infosteer import entropy, surrogates
from lab import machine_flags
from lab.page import columns
from model import read_tensors, save_tensors
from train import encode

CONCEPT = 10                           # tokens of a concept
LISTED = 5                             # memories at either end of a layer, and tokens of each
FOUND = 20                             # memories shown for a token
CONTEXTS = 5                           # kept for each memory, at either end of k
SHOWN = 12                             # tokens of a context that are shown, the last ones
LONGEST = 256                          # tokens of a text, as in training
STEP = 32                              # texts read between two writes to disk
INDEX, TRIGGERS = "memories.safetensors", "memory_triggers.safetensors"

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


@torch.inference_mode()
def memory_index(model, made_from, path, overwrite=False):
    """What every memory says, kept in the file `path`: what `decode` gives, with n_layers in front.

    made_from: eval.which_model of the model's folder. Raises BadInput for a file that is not ours.
    """
    about = {"kind": "memory index", "made from": f"{made_from} {model.decode.dtype} {CONCEPT}"}
    index = resume(path, about, overwrite, fresh={})
    done, L, head = len(index.get("ids", ())), model.config.n_layers, model.decode.float()
    bar = progress(range(done, L), total=L, initial=done, desc="decoding memories", unit="layer")
    for layer in bar:
        said = decode(model.blocks[layer].memory.values.weight.T, head)
        index = {name: torch.stack([*index.get(name, ()), new]) for name, new in said.items()}
        save_tensors(index, path, about)
    return index


def decode(v, head):
    """What memories say: v [n, d], the LM head [V, d] -> on the CPU,

        entropy, log_z   [n]            H(P_i) in nats; log Z_i, of P_i(t) = exp(v_i . w_t) / Z_i
        ids, log_p       [n, CONCEPT]   the most probable tokens, the first one first

    In fp32 whatever the weights are in: bf16 keeps three digits of a logit, and tokens would tie.
    """
    v, head, said = v.float(), head.float(), []
    for here, log_p in surrogates(v, head):                                    # [piece, V]
        top, ids = log_p.topk(min(CONCEPT, len(head)))                         # [piece, CONCEPT]
        log_z = (v[here] * head[ids[:, 0]]).sum(-1) - top[:, 0]                # [piece]
        said.append((entropy(log_p), log_z, ids.int(), top))
    return {name: torch.cat(pieces).cpu()
            for name, pieces in zip(("entropy", "log_z", "ids", "log_p"), zip(*said))}


@torch.inference_mode()
def memory_triggers(model, made_from, texts, path, overwrite=False):
    """The contexts with the largest and the most negative coefficients of every memory, kept in the
    file `path`. texts: lists of at most LONGEST ids.

        k    [n_layers, 2, d_m, CONTEXTS]   [:, 0] the largest k_i, [:, 1] the largest -k_i
        at   [n_layers, 2, d_m, CONTEXTS]   (number of the text) * LONGEST + position, for each

    Where there are fewer contexts, k is -inf. made_from and errors are those of `memory_index`.
    """
    sha = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    about = {"kind": "memory triggers",
             "made from": f"{made_from} {model.decode.dtype} {CONTEXTS} {LONGEST} {sha}"}
    shape = model.config.n_layers, 2, model.config.d_m, CONTEXTS
    state = resume(path, about, overwrite, {
        "texts": torch.zeros(1, dtype=torch.int32),                            # how many were read
        "k": torch.full(shape, -torch.inf), "at": torch.full(shape, -1, dtype=torch.int32)})
    state = {name: tensor.to(model.decode.device) for name, tensor in state.items()}
    done, ends = int(state["texts"]), new_contexts(texts)
    reading = keys_of(model, [ids[:-1] for ids in texts[done:]])
    bar = progress(reading, total=len(texts), initial=done, desc="reading texts", unit="text")
    for n, keys in enumerate(bar, done):
        here = torch.tensor(ends[n], dtype=torch.int32, device=model.decode.device)
        for layer, k in enumerate(keys):                                       # [T, d_m]
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
        data, name, "train" if "train" in find(name).splits else "test")]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return [examples[i] for i in order[:n].tolist()]


# --------------------------------------------- three ways to look, each with its text for people


def specificity(entropies, V: int):
    """Spec(v) = 1 - H(P) / log V: 0 for a memory that says anything, 1 if it says one token."""
    return 1 - entropies / torch.tensor(float(V)).log()


def describe(tokenizer, V, index, layer, memory):
    """One memory as JSON prints it: its layer counted from 1, its concept, its specificity."""
    ids, log_p = (index[name][layer, memory] for name in ("ids", "log_p"))     # [CONCEPT]
    concept = [{"id": id, "token": token_text(tokenizer, id), "probability": p}
               for id, p in zip(ids.tolist(), log_p.exp().tolist())]
    return {"layer": layer + 1, "memory": memory, "concepts": concept,
            "specificity": specificity(index["entropy"][layer, memory], V).item()}


def row_of(memory, *more):
    """One memory as a row of a table."""
    return [f"{memory['layer']}:{memory['memory']}", *more, f"{memory['specificity']:.6f}",
            says(memory["concepts"][:LISTED])]


def says(concept):
    return "  ".join(f"{one['token']!r} {percentage(one['probability'])}" for one in concept)


def percentage(p):
    return f"{100 * p:.3g}%"


def survey(model, tokenizer, index, triggers, texts):
    """Of every layer: the mean specificity, the agreement, and the memories at either end."""
    V, layers, pairs = model.config.vocab_size, [], []
    spec = specificity(index["entropy"], V)                                    # [n_layers, d_m]
    for layer in range(len(spec)):
        active = triggers["k"][layer, 0, :, 0] > 0                             # [d_m]
        following = [texts[place // LONGEST][place % LONGEST + 1]
                     for place in triggers["at"][layer, 0, active, 0].tolist()]
        pairs.append(agreement(index["ids"][layer, active, 0], torch.tensor(following)))
        row = {"layer": layer + 1, "mean_specificity": spec[layer].mean().item(),
               "agreement": shares(pairs[-1])}
        for name, largest in (("most_specific", True), ("most_general", False)):
            ends = spec[layer].topk(min(LISTED, len(active)), largest=largest).indices.tolist()
            row[name] = [describe(tokenizer, V, index, layer, i) for i in ends]
        layers.append(row)
    return {"mean_specificity": spec.mean().item(), "agreement": shares(torch.cat(pairs, 1)),
            "by_layer": layers}


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
Spec: the specificity. It is small where the memory vector is short, since all tokens are about
      equally probable then. The order of the tokens is telling all the same.
agreement: of n memories, the share whose most probable token is what follows the context that
      activates the memory most. ± is the standard error, as if memories were independent.
chance: the agreement to be expected if contexts were shuffled among the memories of a layer."""]
    for row in result["by_layer"]:
        for name in ("most_specific", "most_general"):
            table = columns(["memory", "Spec", "says first"], [row_of(one) for one in row[name]])
            parts.append(f"layer {row['layer']}: the {name.replace('_', ' ')} memories\n{table}")
    return "\n\n".join(parts)


@torch.inference_mode()
def token_search(model, tokenizer, token, index):
    """The memories of all layers that give a token the largest probability, and the token's rank
    among all that each of them says."""
    head = model.decode.float()                                                # [V, d]
    vectors = [block.memory.values.weight.T for block in model.blocks]         # [d_m, d] each
    log_p = torch.cat([v.float() @ head[token] - log_z.to(v.device)
                       for v, log_z in zip(vectors, index["log_z"])])          # [n_layers * d_m]
    best, places = log_p.topk(min(FOUND, len(log_p)))
    rows = []
    for p, place in zip(best.exp().tolist(), places.tolist()):
        layer, memory = divmod(place, model.config.d_m)
        logits = head @ vectors[layer][memory].float()                         # [V]
        rows.append({**describe(tokenizer, len(head), index, layer, memory),
                     "probability": p, "rank": 1 + int((logits > logits[token]).sum())})
    return {"token": {"id": token, "token": token_text(tokenizer, token)}, "found": rows}


def token_search_text(result):
    token, even = result["token"], percentage(1 / result["vocabulary"])
    rows = [row_of(memory, percentage(memory["probability"]), memory["rank"])
            for memory in result["found"]]
    return f"""\
The memories that make {token['token']!r} (id {token['id']}) most probable
rank: its place in the order of probability. If all tokens were equal, each would have {even}.

{columns(["memory", "P(token)", "rank", "Spec", "says first"], rows)}"""


@torch.inference_mode()
def one_memory(model, tokenizer, layer, memory, triggers, texts, examples):
    """What one memory says, layer from 0, and the contexts with its largest and its most negative
    coefficients. examples: what the texts were made of."""
    v = model.blocks[layer].memory.values.weight[:, memory]                    # [d]
    said = {name: of[None] for name, of in decode(v[None], model.decode).items()}      # [1, 1, ...]
    result = {**describe(tokenizer, model.config.vocab_size, said, 0, 0),
              "layer": layer + 1, "memory": memory}
    for end, (name, sign) in enumerate((("largest", 1), ("smallest", -1))):
        k, places = (triggers[of][layer, end, memory].tolist() for of in ("k", "at"))
        result[name] = []
        for k, place in zip(k, places):
            if k > 0:
                text, at = divmod(place, LONGEST)
                ids, example = texts[text], examples[text]
                before = [id for id in ids[max(0, at - SHOWN + 1):at] if id != tokenizer.bos_id]
                result[name].append({
                    "k": sign * k, "task": example.task.name, "row": example.index,
                    "position": at, "context": tokenizer.decode(before),
                    "token": token_text(tokenizer, ids[at]),
                    "next": token_text(tokenizer, ids[at + 1])})
    return result


def one_memory_text(result):
    parts = [f"memory {result['layer']}:{result['memory']}, Spec {result['specificity']:.6f}\n"
             f"says {says(result['concepts'])}"]
    for name, title in (("largest", "largest"), ("smallest", "most negative")):
        parts.append(f"The {title} coefficients k, with «the last token» and what follows it:")
        for one in result[name]:
            before, token = (repr(one[part])[1:-1] for part in ("context", "token"))
            cut = "…" if one["position"] >= SHOWN else ""
            parts[-1] += (f"\n{one['k']:>+9.3f}  {cut}{before}«{token}» {one['next']!r}  "
                          f"({one['task']} row {one['row']})")
    return "\n\n".join([*parts, "With a negative k, what the memory says gets less probable."])


# ------------------------------------------------------------------------------------ command


def main(argv=None):
    parser = Parser(prog="python -m lab.memories", description=__doc__, epilog=f"""\
Decoding every memory and reading the texts takes long, so both are done once and kept in the folder
--out, as {INDEX} and {TRIGGERS}. What was interrupted goes on.""")
    add, one = parser.add_argument, parser.add_mutually_exclusive_group()
    one.add_argument("--token", metavar="TEXT", help="show the memories that promote this token, "
                     'given with its leading space (" Paris")')
    one.add_argument("--index", metavar="LAYER:MEMORY", help="show this memory; layers are counted "
                     "from 1, memories from 0")
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
    args = parser.parse_args(argv)

    names = split_names(args.task)
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

    sha, out = which_model(args.model), Path(args.out or Path(args.model, "eval"))
    with alone_in(out):
        if not args.index:
            index = memory_index(model, sha, out / INDEX, args.overwrite)
        if token is None:
            triggers = memory_triggers(model, sha, texts, out / TRIGGERS, args.overwrite)
    if token is not None:
        found, text = token_search(model, tokenizer, token, index), token_search_text
    elif args.index:
        text = one_memory_text
        found = one_memory(model, tokenizer, int(layer) - 1, int(memory), triggers, texts, examples)
    else:
        found, text = survey(model, tokenizer, index, triggers, texts), survey_text
    result = {"model": args.model, "layers": L, "memories": d_m, "vocabulary": V, "tasks": names,
              "texts": len(texts), "contexts": sum(map(len, new_contexts(texts))), **found}
    print(json.dumps(result, indent=2) if args.json else f"""\
{args.model}: {L} layers of {d_m:,} memories
{result['contexts']:,} contexts in {len(texts):,} texts of {', '.join(names)}

{text(result)}""")


if __name__ == "__main__":
    command(main)
