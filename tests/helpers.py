"""Small checkpoints and datasets, made on the spot."""
import json
import shutil
from pathlib import Path

from model import Config, Transformer

TOKENIZERS = Path(__file__).parent / "golden" / "tokenizers"


def checkpoint_folder(folder, family="llama", spoil=lambda model: None):
    """A model folder of random weights with the tokenizer of its family's kind."""
    name = {"llama": "llama", "qwen2": "qwen", "gemma2": "gemma"}[family]
    files = list((TOKENIZERS / name).glob("tokenizer*.json"))
    size = len(json.loads((TOKENIZERS / name / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]) + 300
    raw = dict(model_type=family, vocab_size=size, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=2, head_dim=8, sliding_window=64, torch_dtype="float32", tie_word_embeddings=True)
    model = Transformer(Config.from_dict(raw)).initialise(0)
    spoil(model)
    model.save_pretrained(folder)
    for file in files:
        shutil.copy(file, folder)
    return folder


def write_task(data, task, split, rows):
    """A task file in the common layout, from (question, answer) pairs."""
    (data / task).mkdir(parents=True, exist_ok=True)
    (data / task / f"{split}.json").write_text(json.dumps([
        {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer} for question, answer in rows]))
