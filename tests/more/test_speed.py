"""After this file you know what a number of the benchmark counts."""
import argparse
import json
import subprocess
import sys

import torch

from conftest import ROOT
from helpers import checkpoint_folder, even_or_odd, write_task
from lab.speed import backward, config_of, draw, flops_of, gpu_bytes, new_model, peak_of
from model import Config

CPU = argparse.Namespace(device=torch.device("cpu"), bf16=False, micro_tokens=256)


def test_the_peak_counts_every_tensor_and_not_what_was_there_before():
    before = torch.empty(2**20)

    def work():
        torch.empty(2**20).add_(torch.empty(2**18).sum())      # 4 MiB, then 1 MiB

    peak = peak_of(work, torch.nn.Module(), torch.device("cpu"))
    assert 0 <= peak - 5 * 2**20 < 2**12 and len(before) == 2**20


def test_flops_are_those_of_the_formula():
    model = new_model(config_of("tiny"), "cpu")                # d 128, d_m 384, H 4, G 2, D 32
    rows = [([0] * 11, 8), ([0] * 6, 2)]                       # 10 and 5 tokens, 3 and 4 supervised
    body = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
    assert flops_of(model, rows) == 6 * (body * 15 + 1408 * 128 * 7 + 4 * 128 * (100 + 25))


def test_rows_are_drawn_by_seed_and_look_like_the_task():
    rows = draw("choice", 1408, 200, 0)
    assert rows == draw("choice", 1408, 200, 0) != draw("choice", 1408, 200, 1)
    assert len({tuple(ids[:12]) for ids, _ in rows}) == 1, "all prompts begin alike"
    assert 0.07 < sum(len(ids) - n for ids, n in rows) / sum(len(ids) - 1 for ids, _ in rows) < 0.1


def test_a_step_has_the_same_loss_however_it_is_cut():
    model, rows = new_model(config_of("tiny"), "cpu"), draw("maths", 1408, 6, 0)
    losses = [backward(CPU, model, "reg", rows, checkpoint, budget).item()
              for checkpoint, budget in ((False, 256), (True, 256), (False, 4096))]
    assert max(losses) - min(losses) < 1e-4


def test_training_needs_16_bytes_a_parameter_and_less_with_every_setting():
    config = Config.from_dict(config_of("tiny"))
    needs = [gpu_bytes(config, *settings) for settings in (
        (4096, False, False), (1024, False, False), (1024, True, False), (1024, True, True))]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == 4
    assert needs[2] > 16 * 967_808 > needs[3]


def test_the_command_measures_and_writes_json(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lab.speed", "--shape", "tiny", "--kind", "choice", "--parts",
         "memory", "--turns", "1", "--json", str(tmp_path / "found.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    by_name = {(line["part"], line["what"]): line for line in found}
    assert by_name["memory", "int"]["ratio"] < 1.05 and by_name["memory", "int"]["to"] == "none"
    assert by_name["memory", "none + checkpoint"]["ratio"] < 0.6


def test_the_command_measures_a_checkpoint_folder(tmp_path):
    write_task(tmp_path, "boolq", "train", even_or_odd(8))
    command = [sys.executable, "-m", "lab.speed", "--model", str(checkpoint_folder(tmp_path / "m")),
               "--task", "boolq", "--data", str(tmp_path), "--rows", "4", "--turns", "1",
               "--json", str(tmp_path / "found.json"), "--precision"]
    done = subprocess.run([*command, "fp32"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [(line["part"], line["what"]) for line in found] == [
        ("memory", "the process, 3 steps"), ("step", "none"), ("decode", "new tokens in a row"),
        ("decode", "generate"), ("rank", "rank")]
    assert all(line["value"] > 0 for line in found)
    done = subprocess.run([*command, "bf16"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("not measured: ")
