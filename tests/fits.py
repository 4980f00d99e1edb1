"""What fits where: memory of a training step of published models, computed without a GPU and without their weights.

    python tests/fits.py

Weights, gradients and AdamW's two moments are fp32: 4 + 4 + 8 bytes a parameter. What a step keeps for its backward pass is measured by running
the forward pass on tensors without data (shapes and number formats only), in bf16 as on a GPU; this includes the bf16 copies of the weights
and, for every norm, an fp32 copy of its input that CUDA's kernel does without. On top come a copy of the logits' gradient and, in smaller
parts, what a kernel needs for a moment, which is not counted: leave a tenth free.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import Parser
from infosteer import Steering
from model import Config, Transformer

CONFIGS = Path(__file__).parent / "golden" / "configs"
# Qwen3-1.7B has the layout of 0.6B, wider.
MODELS = {"Qwen-2.5-1.5B": "Qwen2.5-1.5B", "Qwen-2.5-7B": "Qwen2.5-7B", "LLaMA-3.2-1B": "Llama-3.2-1B", "LLaMA-3-8B": "Llama-3-8B", "Gemma-2-2B": "gemma-2-2b",
          "Gemma-2-9B": "gemma-2-9b", "Qwen3-0.6B": "Qwen3-0.6B", "Qwen3-1.7B": ("Qwen3-0.6B", dict(hidden_size=2048, intermediate_size=6144)),
          "Gemma-3-270M": "gemma-3-270m", "Gemma-3-1B": "gemma-3-1b-pt"}
CARDS = (16, 24, 48, 80, 140)          # GB
LENGTH, SHARE = 256, 0.1               # tokens of a row, and how many of them are supervised, as in the choice tasks
CHOICES = (("", 4096, False, False), ("--micro-tokens 1024", 1024, False, False), ("--micro-tokens 1024 --checkpoint", 1024, True, False),
           ("--micro-tokens 1024 --checkpoint --offload", 1024, True, True))


def config(entry):
    name, changes = entry if isinstance(entry, tuple) else (entry, {})
    return Config.from_dict({**json.loads((CONFIGS / f"{name}.json").read_text()), **changes})


def kept_bytes(config, tokens, checkpoint):
    """Bytes that autograd keeps for the backward pass of one micro-batch, and the numbers of parameters: all, of a block, outside the blocks."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model, kept = Transformer(config), {}
        ours = {weight.untyped_storage()._cdata for weight in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in ours:
                kept[storage._cdata] = storage                                 # held on to, so that no other gets its number
            return tensor

        at = torch.zeros(int(SHARE * tokens), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            logits, *_ = model.predict(torch.zeros(tokens // LENGTH, LENGTH, dtype=torch.long), at, Steering("none"), checkpoint)
            F.cross_entropy(logits, at)
        block = sum(weight.numel() for weight in model.blocks[0].parameters())
        every = sum(weight.numel() for weight in model.parameters())
        return sum(storage.nbytes() for storage in kept.values()), every, block, every - block * len(model.blocks)


def main():
    Parser(prog="tests/fits.py", description=__doc__).parse_args()
    print("| model | parameters | weights + gradients + AdamW | kept for backward, 4,096 tokens | 1,024 | 1,024 with `--checkpoint` | "
          + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---" * (6 + len(CARDS)) + "|")
    for name, entry in MODELS.items():
        of = config(entry)
        peaks, kept = {}, []
        for flags, tokens, checkpoint, offload in CHOICES:
            saved, every, block, rest = kept_bytes(of, tokens, checkpoint)
            kept += [saved] * (not offload)
            held = 16 * every if not offload else 8 * rest + (3 * 4 + 2) * block       # on the GPU: embedding and head with gradients; two blocks, gradients of one
            working = 18 * block if checkpoint else 0                          # a block that is computed again, about what its weights take
            peaks[flags] = held + saved + working + 8 * int(SHARE * tokens) * of.vocab_size
        cells = [next((flags or "yes" for flags, peak in peaks.items() if 1.1 * peak < card * 1e9), "no") for card in CARDS]
        cells = [cell.replace("--micro-tokens 1024 --checkpoint --offload", "offload").replace("--micro-tokens 1024 --checkpoint", "checkpoint").replace(
            "--micro-tokens 1024", "micro") for cell in cells]
        print(f"| {name} | {every / 1e9:.2f} B | {16 * every / 1e9:.1f} GB | " + " | ".join(f"{saved / 1e9:.1f} GB" for saved in kept) + " | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
