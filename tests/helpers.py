"""Small checkpoints, datasets and runs, made on the spot."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import train
from model import Config, Transformer, read_tensors

TOKENIZERS = Path(__file__).parent / "golden" / "tokenizers"


def checkpoint_folder(folder, family="llama", spoil=lambda model: None):
    """A model folder of random weights with the tokenizer of its family's kind."""
    files = TOKENIZERS / {"llama": "llama", "qwen2": "qwen", "gemma2": "gemma"}[family]
    tokenizer = json.loads((files / "tokenizer.json").read_text(encoding="utf-8"))
    model = Transformer(Config.from_dict(dict(
        model_type=family, vocab_size=len(tokenizer["model"]["vocab"]) + 300, hidden_size=32,
        intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=64, torch_dtype="float32", tie_word_embeddings=True)))
    spoil(model.initialise(0))
    model.save_pretrained(folder)
    for file in files.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


def write_task(data, task, split, rows):
    """A task file in the common layout, from (question, answer) pairs."""
    write_rows(data, task, split, [(question, f"the correct answer is {answer}", answer)
                                   for question, answer in rows])


def write_rows(data, task, split, rows):
    """A task file in the common layout, from (instruction, output, answer)."""
    (data / task).mkdir(parents=True, exist_ok=True)
    (data / task / f"{split}.json").write_text(json.dumps([
        {"instruction": instruction, "input": "", "output": output, "answer": answer}
        for instruction, output, answer in rows]))


def even_or_odd(n):
    """So many questions of boolq's kind, of ragged lengths: [(question, answer)]."""
    return [(f"Is {i} an even number?" + " Really?" * (i % 5), "false" if i % 2 else "true")
            for i in range(n)]


def run_of(folder):
    """A finished run's weights {name: tensor} and its log, a dictionary per step."""
    lines = Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return read_tensors(Path(folder, "model.safetensors"))[0], [json.loads(line) for line in lines]


class Interrupted(train.ALONE):
    """The world of a plain run that ends, as by Ctrl-C, when the step of that number begins."""

    def __init__(self, step):
        self.left = step

    def share(self, batches):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return batches


def reference(models, needs, script, *args):
    """What `script` prints, as JSON, in a Python that has the libraries `needs`, which the project
    itself does without: INFOSTEER_REFERENCE, or the one beside the published models. The script
    finds `args` in sys.argv[1:]; long input goes by a file. Skips the test where there is none."""
    python = os.environ.get("INFOSTEER_REFERENCE") or models / ".venv" / "bin" / "python"
    has = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {[*needs]})))"
    try:
        found = subprocess.run([python, "-c", has]).returncode == 0
    except OSError:
        found = False
    if not found:
        pytest.skip(f"needs a Python with {' and '.join(needs)}, not {python}; "
                    "INFOSTEER_REFERENCE names one")
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
