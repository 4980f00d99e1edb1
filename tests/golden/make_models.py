"""Make the tiny checkpoints and the reference numbers that the tests compare model.py with.

    python tests/golden/make_models.py      # 20 seconds on one CPU core, always the same bytes

This is the one script that needs the reference library, so nobody has to run it: what it makes is
in the repository. models/made_by.json says the versions that it ran with, on a CPU.

    configs/<real model>.json     config.json as really published: facts, typed in by hand
    configs/parameters.json       how many parameters each of them has (a tied matrix counts once)
    models/<name>/                a tiny random model of each kind:
        config.json               newer style (rope_parameters, dtype, layer_types), as the library
                                  writes it
        config_classic.json       the same model in the published style: the keys of a
                                  configs/<real model>.json
        generation_config.json    the ids that end a text; wins over config.json, which then may
                                  say something else
        model.safetensors         float32, every tensor random
        golden.safetensors        tokens [2, 40], logits [2, 40, V]: what the model says
                                  states [layers + 1, 2, 40, d]: what enters the first block, then
                                  what each block makes of it, before the final norm
                                  prompts [4, 12] (padded right with 0), prompt_lengths [4],
                                  generated [4, 24]: greedy decoding of each prompt alone, eos
                                  included, then -1

A golden number only helps if a mistake would change it. At the usual initialisation it often would
not: norms are all 1, biases all 0, and swapping two of them changes nothing. So every tensor is
random here, and check_mistakes() makes the mistakes one by one (about 50 to 500 per model) and
insists that each is seen in the logits.
"""
import copy
import dataclasses
import itertools
import json
import platform
import shutil
import tempfile
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

HERE = Path(__file__).resolve().parent
CONFIGS, MODELS = HERE / "configs", HERE / "models"
T, NEW = 40, 24                     # longer than every window (8) and llama32's first context (32)
LENGTHS = (1, 12, 5, 9)             # of the four prompts
SEEN = 1e-2                         # a mistake moves at least one logit by more than this

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)            # sums in one order: the same bytes on every run
torch.set_grad_enabled(False)

# ---------------------------------------------------------------------------------------- The cases
# Published config.json files, shrunk. So are windows, caps and RoPE bases: real ones do nothing in
# 40 tokens.
TINY = dict(vocab_size=96, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, max_position_embeddings=1024, torch_dtype="float32",
            bos_token_id=2, rms_norm_eps=0.01)     # 1e-6 could be left out and nobody would notice


@dataclasses.dataclass
class Case:
    published: str                  # configs/<published>.json
    seed: int
    eos: str                        # see write()
    change: dict                    # what differs from the published file and from TINY
    drop: tuple = ()                # keys that other published files of this family leave out
    # Wrong readings of the config, in its own keys.
    mistakes: dict = dataclasses.field(default_factory=dict)


LLAMA3_SCALING = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, rope_type="llama3",
                      original_max_position_embeddings=32)       # with theta 100: see check_bands()
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def scaled(**change):
    return dict(rope_scaling={**LLAMA3_SCALING, **change})


def two_ropes(local, global_):
    return dict(rope_scaling=None, rope_parameters={LOCAL: local, GLOBAL: global_})


def rope(kind, theta, **factor):
    return dict(rope_type=kind, rope_theta=theta, **factor)


CASES = {
    "llama3": Case(                 # head_dim is not in the file: it is d / heads
        "Llama-3-8B", 6, "more", dict(intermediate_size=48, rope_theta=300.0)),
    "llama32": Case(
        "Llama-3.2-1B", 8, "same",
        dict(intermediate_size=40, head_dim=16, rope_theta=100.0, rope_scaling=LLAMA3_SCALING),
        mistakes={
            "no scaling": dict(rope_scaling=None),
            "everything divided": dict(rope_scaling=dict(rope_type="linear", factor=32.0)),
            "low and high exchanged": scaled(low_freq_factor=4.0, high_freq_factor=1.0),
            "not smoothed": scaled(low_freq_factor=3.999),
            "original length ignored": scaled(original_max_position_embeddings=1024)}),
    "qwen25": Case(                 # a window is in the file, but switched off
        "Qwen2.5-1.5B", 6, "same",
        dict(intermediate_size=48, rope_theta=200.0, sliding_window=8, max_window_layers=1),
        mistakes={"window although off": dict(use_sliding_window=True)}),
    "qwen25_window": Case(          # switched on: from layer max_window_layers upwards
        "Qwen2.5-7B", 1, "config only",
        dict(intermediate_size=28, num_hidden_layers=3, rope_theta=200.0, use_sliding_window=True,
             sliding_window=8, max_window_layers=1),
        mistakes={
            "no window": dict(use_sliding_window=False),
            "window in all layers": dict(max_window_layers=0),
            "window in one layer": dict(max_window_layers=2)}),
    "qwen3": Case(
        "Qwen3-0.6B", 3, "same",
        dict(intermediate_size=40, head_dim=12, rope_theta=200.0, tie_word_embeddings=False,
             max_window_layers=2)),
    "gemma2": Case(
        "gemma-2-2b", 3, "same",
        dict(num_hidden_layers=4, intermediate_size=20, head_dim=10, query_pre_attn_scalar=14,
             rope_theta=200.0, sliding_window=8, attn_logit_softcapping=5.0,
             final_logit_softcapping=8.0),
        mistakes={
            "no attention cap": dict(attn_logit_softcapping=None),
            "no final cap": dict(final_logit_softcapping=None),
            "caps exchanged": dict(attn_logit_softcapping=8.0, final_logit_softcapping=5.0),
            "scale from head_dim": dict(query_pre_attn_scalar=10),
            "odd layers slide": dict(layer_types=[GLOBAL, LOCAL] * 2)}),
    "gemma3": Case(                 # like 4b and larger: global layers are scaled, and the file
        "gemma-3-1b-pt", 9, "same",     # has no sliding_window_pattern, which then is 6
        dict(num_hidden_layers=7, num_attention_heads=2, num_key_value_heads=1,
             intermediate_size=16, head_dim=8, query_pre_attn_scalar=3, sliding_window=8,
             rope_theta=1000, rope_local_base_freq=100,
             rope_scaling=dict(factor=8.0, rope_type="linear")),
        drop=("sliding_window_pattern",),
        mistakes={
            "no scaling": dict(rope_scaling=None),
            "local layers scaled too": two_ropes(rope("linear", 100, factor=8.0),
                                                 rope("linear", 1000, factor=8.0)),
            "only local layers scaled": two_ropes(rope("linear", 100, factor=8.0),
                                                  rope("default", 1000)),
            "one base": dict(rope_local_base_freq=1000),
            "the other base": dict(rope_theta=100),
            "bases exchanged": dict(rope_theta=100, rope_local_base_freq=1000),
            "scale from head_dim": dict(query_pre_attn_scalar=8),
            "first of six is global": dict(layer_types=[GLOBAL] + 5 * [LOCAL] + [GLOBAL])}),
    "gemma3_plain": Case(           # config.json then has _sliding_window_pattern 6 as well, but
        "gemma-3-1b-pt", 34, "apart",   # layer_types decides
        dict(num_hidden_layers=4, num_key_value_heads=1, intermediate_size=20, head_dim=10,
             query_pre_attn_scalar=4, sliding_window=8, sliding_window_pattern=2,
             rope_theta=1000, rope_local_base_freq=50),
        mistakes={
            "one base": dict(rope_local_base_freq=1000),
            "the other base": dict(rope_theta=50),
            "bases exchanged": dict(rope_theta=50, rope_local_base_freq=1000),
            "scale from head_dim": dict(query_pre_attn_scalar=10),
            "the usual pattern of 6": dict(sliding_window_pattern=6),
            "even layers are global": dict(layer_types=[GLOBAL, LOCAL] * 2)}),
}

# ---------------------------------------------------------------------------------- A random model


def build(classic, weights=None):
    """The library's model for a config in the published style, in float32, with these weights."""
    config = AutoConfig.for_model(**copy.deepcopy(classic))    # it changes the dicts it is given
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    if weights is not None:
        model.load_state_dict(weights, strict=True)
    return model


def randomise(model, seed):
    """Make every tensor random -> what each would be if it did nothing: norms at 1 (or 0 for
    1 + w), all else 0."""
    random, neutral = torch.Generator().manual_seed(seed), {}
    sandwich = hasattr(model.model.layers[0], "post_feedforward_layernorm")
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=random)
        # The library starts vectors at neutral.
        neutral[name] = p.clone() if p.dim() == 1 else torch.zeros_like(p)
        p.copy_(neutral[name] + 0.5 * noise if p.dim() == 1 else 0.3 * noise)
        if sandwich and ".post_" in name:
            # Gemma's embedding is loud and is also its output matrix: unless what the layers add is
            # louder, greedy decoding repeats its last token for ever.
            p.add_(2)
    return neutral


def logits_of(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


def states_of(model, tokens):
    """What enters the first layer and what leaves each layer: [layers + 1, B, T, d]."""
    states, layers = [], model.model.layers
    handles = [layers[0].register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0]))]
    for layer in layers:
        handles.append(layer.register_forward_hook(lambda layer, inputs, out: states.append(out)))
    logits_of(model, tokens)
    for handle in handles:
        handle.remove()
    assert len(states) == len(layers) + 1
    return torch.stack(states)


# ------------------------------------------------------------------------------------- The mistakes
def check_mistakes(case, classic, weights, neutral, tokens):
    """Make every mistake we can think of -> how many, and the name of the one that changes the
    logits least, with the change."""
    model = build(classic, weights)
    base, seen = logits_of(model, tokens), {}
    P, config = dict(model.named_parameters()), model.config

    def shift(logits):
        return (logits - base).abs().max().item()

    def with_values(what, values):      # {name: tensor}: put them in, look, put the old ones back
        old = {name: P[name].clone() for name in values}
        for name, value in values.items():
            P[name].copy_(value)
        seen[what] = shift(logits_of(model, tokens))
        for name, value in old.items():
            P[name].copy_(value)

    # tensors: each one left out, and each exchanged with every other it could be taken for
    def layer_of(name):
        return name.split("layers.")[1].split(".")[0] if "layers." in name else ""

    for name in P:
        with_values(f"{name} left out", {name: neutral[name]})
        if P[name].dim() == 2 and P[name].shape[0] == P[name].shape[1]:
            with_values(f"{name} transposed", {name: P[name].T.clone()})
    for a, b in itertools.combinations(P, 2):
        same_place = layer_of(a) == layer_of(b)
        same_part = layer_of(a) and layer_of(b) and a.split(".")[3:] == b.split(".")[3:]
        if P[a].shape == P[b].shape and (same_place or same_part):
            with_values(f"{a} <-> {b}", {a: P[b].clone(), b: P[a].clone()})

    # shapes: what a head is, and which half of it turns
    d_h, n_q = model.model.layers[0].self_attn.head_dim, config.num_attention_heads
    n_kv = config.num_key_value_heads

    def rows(p, order):
        return p.unflatten(0, (-1, d_h))[:, order].flatten(0, 1)

    turned = torch.arange(d_h).view(2, -1).T.flatten()  # 0 4 1 5 2 6 3 7: pairs side by side
    turning = ("q_proj", "k_proj", "q_norm", "k_norm")
    with_values("rope on neighbours instead of halves",
                {n: rows(p, turned) for n, p in P.items() if n.split(".")[-2] in turning})
    if 1 < n_kv < n_q:
        tiled = torch.arange(n_q).view(n_kv, -1).T.flatten()   # kv heads a b a b, not a a b b

        def heads(p):
            return p.unflatten(0, (n_q, d_h))[tiled].flatten(0, 1)

        with_values("kv heads repeated a b a b",
                    {n: heads(p) for n, p in P.items() if ".q_proj." in n}
                    | {n: heads(p.T).T for n, p in P.items() if ".o_proj." in n})

    # formulas
    norms = [n for n, p in P.items() if "norm" in n]
    one_plus = all((neutral[n] == 0).all() for n in norms)
    with_values("w instead of 1 + w, or the reverse",
                {n: P[n] + (-1 if one_plus else 1) for n in norms})
    if hasattr(model.model.embed_tokens, "embed_scale"):
        scale = model.model.embed_tokens.embed_scale
        old = scale.clone()
        scale.fill_(1.0)
        seen["embeddings not scaled"] = shift(logits_of(model, tokens))
        scale.copy_(old)

    # the config: what this case adds, and what all share
    readings = dict(case.mistakes)
    if LOCAL in (getattr(config, "layer_types", None) or []):
        readings |= {f"window {w}": dict(sliding_window=w) for w in (7, 9, T)}
    readings["rope_theta 10000"] = dict(rope_theta=10000.0)
    readings["rms_norm_eps 1e-6"] = dict(rms_norm_eps=1e-6)
    key = "hidden_activation" if "hidden_activation" in classic else "hidden_act"
    acts = {"silu", "gelu_pytorch_tanh"} - {classic[key]}
    readings |= {f"activation {act}": {key: act} for act in acts}
    for what, wrong in readings.items():
        seen[what] = shift(logits_of(build({**classic, **wrong}, weights), tokens))

    unseen = {what: change for what, change in seen.items() if not change > SEEN}
    assert not unseen, f"these mistakes would pass unnoticed: {unseen}"
    if key == "hidden_activation":      # the two GELUs differ by less than 0.0005: a tenth will do
        change = shift(logits_of(build({**classic, key: "gelu"}, weights), tokens))
        assert change > SEEN / 10, f"exact GELU changes the logits by {change} only"
    return len(seen), min(seen.items(), key=lambda item: item[1])


def check_bands(classic):
    """Llama 3's scaling keeps short waves, divides long ones and smooths between: this head has all
    three kinds."""
    s, d_h = classic["rope_scaling"], classic["head_dim"]
    waves = 2 * torch.pi * classic["rope_theta"] ** (torch.arange(0, d_h, 2) / d_h)
    kept = waves < s["original_max_position_embeddings"] / s["high_freq_factor"]
    divided = waves > s["original_max_position_embeddings"] / s["low_freq_factor"]
    bands = kept, divided, ~kept & ~divided
    assert all(band.any() for band in bands), f"a band is missing: {waves.tolist()}"


# ---------------------------------------------------------------------------------- Greedy decoding
def greedy(model, prompt, eos=()):
    """The new ids, and how close the two best logits ever came. Without a cache, so that it also
    checks the library's own."""
    ids, gap = list(prompt), float("inf")
    while len(ids) < len(prompt) + NEW and not (len(ids) > len(prompt) and ids[-1] in eos):
        best = logits_of(model, torch.tensor([ids]))[0, -1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        ids.append(best.indices[0].item())
    return ids[len(prompt):], gap


def choose_eos(prompts, rows):
    """Ids (a, b, c): a ends one row, b another, a third goes on to the end although it has c."""
    def good(a, b, c):
        ends = [next((i for i, t in enumerate(row) if t in (a, b)), None) for row in rows]
        enders = {row[end] for row, end in zip(rows, ends) if end is not None and 2 <= end <= 20}
        return {a, b} <= enders and any(end is None and c in row for row, end in zip(rows, ends))

    inside = set(sum(prompts, []))      # better still if an eos stands in a prompt: it ends nothing
    found = [ids for ids in itertools.permutations(sorted(set(sum(rows, []))), 3) if good(*ids)]
    assert found, f"no three tokens end these rows as wanted: {rows}"
    return min(found, key=lambda ids: (ids[0] not in inside, ids[1] not in inside, ids))


# ------------------------------------------------------------------------ Writing, and reading back
def dump(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write(folder, case, classic, weights, eos):
    a, b, c = eos
    in_config, in_generation = {"same": (a, a),             # as in most base models
                                "more": (a, [a, b]),        # as in Llama-3-8B-Instruct
                                "apart": ([a, c], [a, b]),  # c would end a text too early
                                "config only": ([a, b], None)}[case.eos]
    classic["eos_token_id"] = in_config
    model = build(classic, weights)
    # Only the fields that the library knows: it also carries along classic keys, which do not
    # belong in the newer style.
    known = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
    model.config = type(model.config)(**known)
    ids = dict(bos_token_id=classic["bos_token_id"], pad_token_id=classic.get("pad_token_id"))
    model.generation_config = GenerationConfig(eos_token_id=in_generation, **ids)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if in_generation is None:
        (folder / "generation_config.json").unlink()
    dump(folder / "config_classic.json", classic)
    newer = json.loads((folder / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= set(newer)
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & set(newer)
    return set(torch.tensor(in_generation or in_config).view(-1).tolist())


def load(folder, config="config.json"):
    """As anybody would load it, with one of the two config files."""
    with tempfile.TemporaryDirectory() as place:
        for file in ("model.safetensors", "generation_config.json"):
            if (folder / file).exists():
                shutil.copy(folder / file, place)
        shutil.copy(folder / config, Path(place) / "config.json")
        return AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()


def padded(rows, width, value):
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def make(name, case):
    published = json.loads((CONFIGS / f"{case.published}.json").read_text())
    classic = {**published, **TINY, **case.change, "eos_token_id": None}
    unknown = set(classic) - set(published)
    assert not unknown, f"{name}: not a key of the published file: {unknown}"
    classic = {key: value for key, value in sorted(classic.items()) if key not in case.drop}
    if name == "llama32":
        check_bands(classic)

    model = build(classic)
    neutral = randomise(model, case.seed)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.Generator().manual_seed(case.seed + 1000)
    tokens = torch.randint(classic["vocab_size"], (2, T), generator=random)
    prompts = [torch.randint(classic["vocab_size"], (n,), generator=random).tolist()
               for n in LENGTHS]
    tried, (by, smallest) = check_mistakes(case, classic, weights, neutral, tokens)

    ends = choose_eos(prompts, [greedy(model, prompt)[0] for prompt in prompts])
    eos = write(MODELS / name, case, classic, weights, ends)

    # From here on with what was written, so that the files and the numbers cannot disagree.
    model, twin = load(MODELS / name), load(MODELS / name, "config_classic.json")
    logits, states = logits_of(model, tokens), states_of(model, tokens)
    assert torch.equal(logits, logits_of(twin, tokens)), f"{name}: the two config files differ"
    assert logits.isfinite().all() and logits.std() > 1, f"{name}: logits spread {logits.std()}"
    read = model.lm_head(model.model.norm(states[-1]))     # nothing else comes after the last block
    cap = getattr(model.config, "final_logit_softcapping", None)
    assert torch.equal(logits, cap * torch.tanh(read / cap) if cap else read), f"{name}: states"

    generated, gaps = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=NEW, pad_token_id=0)[0, len(prompt):].tolist()
        slow, gap = greedy(model, prompt, eos)
        assert new == slow, f"{name}: generate() says {new}, step by step it is {slow}"
        generated.append(new)
        gaps.append(gap)
    assert min(gaps) > 1e-3, f"{name}: decoding is a coin toss ({min(gaps)}): take another seed"
    full = [new for new in generated if len(new) == NEW]
    assert 0 < len(full) < len(generated), f"{name}: all end early, or none: {generated}"
    assert all(len(set(new)) >= 8 for new in full), f"{name}: goes round in circles: {generated}"

    save_file(dict(tokens=tokens, logits=logits, states=states,
                   prompts=padded(prompts, max(LENGTHS), 0), prompt_lengths=torch.tensor(LENGTHS),
                   generated=padded(generated, NEW, -1)), MODELS / name / "golden.safetensors")
    exact = logits_of(model.double(), tokens)
    size = sum(file.stat().st_size for file in (MODELS / name).iterdir())
    error = (logits - exact).abs().max()
    print(f"{name:14s} {size / 1024:4.0f} KB  logits +-{logits.std():.1f}, "
          f"float32 error {error:.0e}  new ids {[len(new) for new in generated]}, "
          f"closest call {min(gaps):.3f}  {tried} mistakes, "
          f"the mildest moves {smallest:.3f}: {by}", flush=True)


def count_parameters():
    """Of the real models, without weights: a tensor on the meta device has a shape, no numbers."""
    counts = {}
    for file in sorted(CONFIGS.glob("*.json")):
        if file.stem != "parameters":
            with torch.device("meta"):
                config = AutoConfig.for_model(**json.loads(file.read_text()))
                model = AutoModelForCausalLM.from_config(config)
            counts[file.stem] = sum(p.numel() for p in model.parameters())
    dump(CONFIGS / "parameters.json", counts)


if __name__ == "__main__":
    MODELS.mkdir(exist_ok=True)
    count_parameters()
    for name, case in CASES.items():
        make(name, case)
    dump(MODELS / "made_by.json", dict(
        python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__, safetensors=safetensors.__version__))
