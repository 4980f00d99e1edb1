"""After this file you know what one optimizer step computes, and that a run is what its settings say: reproducible, resumable, whole."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from helpers import checkpoint_folder, write_task
from infosteer import Steering
from model import Config, Transformer
from train import IGNORE, collate, encode, learning_rate, losses, micro_batches, order_of

RAW = dict(model_type="llama", vocab_size=80, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def random_rows(n=23, seed=0):
    """[(ids, number of prompt ids)] of ragged lengths"""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 40, (n,), generator=g).tolist()
    return [(torch.randint(0, 80, (length,), generator=g).tolist(), max(1, length - 1 - i % 5)) for i, length in enumerate(lengths)]


# ------------------------------------------------------------------------------------------------------------- one step


def test_inputs_targets_and_padding_by_hand():
    inputs, targets, real = collate([([5, 6, 7, 8], 2), ([9, 4], 1)])
    assert inputs.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert targets.tolist() == [[IGNORE, 7, 8], [4, IGNORE, IGNORE]]           # the response is what follows the prompt
    assert real.tolist() == [[True, True, True], [True, False, False]]


def step_gradients(model, rows, steering, budget):
    """The gradients of one optimizer step, as the loop of train.py computes them."""
    lengths = [len(ids) - 1 for ids, _ in rows]
    n_tokens, n_supervised = sum(lengths), sum(len(ids) - n_prompt for ids, n_prompt in rows)
    lam = torch.tensor([steering.at(layer).lam for layer in range(model.config.n_layers)])
    model.zero_grad()
    for batch in micro_batches(range(len(rows)), lengths, budget):
        lm, _, reward = losses(model, *collate([rows[row] for row in batch]), steering)
        (lm / n_supervised - (lam * reward).sum() / n_tokens).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def reference_gradients(model, rows, steering):
    """The same from the definition: one big padded batch, full logits, keys caught at the down projection, eq. 5 in autograd."""
    T = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[IGNORE] * n + ids[n:] + [IGNORE] * (T - len(ids)) for ids, n in rows])
    real = torch.tensor([[1.0] * (len(ids) - 1) + [0.0] * (T - len(ids)) for ids, _ in rows])
    keys = []
    hooks = [block.memory.values.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0])) for block in model.blocks]
    model.zero_grad()
    logits = model(tokens, Steering("int", steering.p, steering.alpha) if steering.method == "int" else None)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    if steering.method == "reg":
        for layer, k in enumerate(keys):
            if steering.layers is None or layer + 1 in steering.layers:
                q = k[:, :-1].abs() / k[:, :-1].abs().sum(-1, keepdim=True)
                loss = loss - steering.at(layer).lam * ((-q * q.log()).sum(-1) * real).sum() / real.sum()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("steering", [Steering("none"), Steering("int", p=0.1, alpha=2.0), Steering("reg", lam=0.3),
                                      Steering("reg", lam=-0.3, layers={1: {}, 2: {"lam": 0.1}})], ids=lambda s: f"{s.method}{len(s.layers or ())}")
@pytest.mark.parametrize("budget", [40, 200, 10**6])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_equal_those_of_one_padded_batch_with_full_logits(steering, budget, family):
    model = Transformer(Config.from_dict({**RAW, "model_type": family, "head_dim": 8, "sliding_window": 16})).initialise(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)                             # away from the flat start, where all keys are alike
    ours, reference = step_gradients(model, random_rows(), steering, budget), reference_gradients(model, random_rows(), steering)
    for name in reference:
        error = (ours[name] - reference[name]).norm() / reference[name].norm()
        assert error < 1e-5, name


def test_a_mean_of_micro_batch_means_would_be_another_gradient():
    # The loss of the usual accumulation loop; if this were within the tolerance, the test above would prove nothing.
    model, rows = Transformer(Config.from_dict(RAW)).initialise(3), random_rows()
    expected = reference_gradients(model, rows, Steering("none"))
    model.zero_grad()
    batches = micro_batches(range(len(rows)), [len(ids) for ids, _ in rows], 200)
    for batch in batches:
        inputs, targets, real = collate([rows[row] for row in batch])
        lm, *_ = losses(model, inputs, targets, real, Steering("none"))
        (lm / (targets != IGNORE).sum() / len(batches)).backward()
    error = max((weight.grad - expected[name]).norm() / expected[name].norm() for name, weight in model.named_parameters())
    assert error > 1e-3


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [len(ids) for ids, _ in random_rows(200)]
    batches = micro_batches(range(200), lengths, 150)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 150 for batch in batches)
    padding = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches) / sum(lengths)
    assert padding < 1.05                              # which sorting is for
    assert [len(batch) for batch in micro_batches(range(200), lengths, 1)] == [1] * 200


def test_every_epoch_sees_every_row_once_in_a_new_order():
    steps = order_of(10, 2, 4, seed=1)
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert steps == order_of(10, 2, 4, seed=1) != order_of(10, 2, 4, seed=2)


def test_learning_rate_warms_up_and_decays_linearly():
    class args:
        lr, warmup = 1.0, 4
    assert [learning_rate(step, args, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


# ------------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a tiny boolq: questions about even numbers."""
    folder = tmp_path_factory.mktemp("train")
    checkpoint_folder(folder / "base")
    write_task(folder / "data", "boolq", "train", [(f"is {i} an even number?", str(i % 2 == 0).lower()) for i in range(60)])
    return folder


def run(place, out, *flags):
    """train.py in this process; returns the weights and the log."""
    train.main([
        "--model", str(place / "base"), "--task", "boolq", "--data", str(place / "data"), "--out", str(place / out), "--batch", "8",
        "--lr", "1e-3", "--warmup", "2", "--device", "cpu", *flags])
    return load_file(place / out / "model.safetensors"), [json.loads(line) for line in open(place / out / "log.jsonl")]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_a_whole_folder_and_a_line_per_step(place):
    weights, log = run(place, "plain")
    assert sorted(path.name for path in (place / "plain").iterdir()) == [
        "args.json", "config.json", "log.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [line["step"] for line in log] == list(range(1, 9)) and [line["examples"] for line in log] == [8] * 7 + [4]
    for line in log:
        assert line["loss"] == pytest.approx(line["lm_loss"] + line["reg_loss"]) and line["reg_loss"] == 0
        assert 0 < line["key_entropy"] < math.log(96) and line["grad_norm"] > 0 and line["peak_memory_bytes"] > 2**20
        assert line["tokens_per_second"] > 0 and line["supervised_tokens"] < line["tokens"]
    assert [line["lr"] for line in log] == pytest.approx([5e-4, 1e-3] + [1e-3 * (8 - step) / 6 for step in range(2, 8)])
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    settings = json.loads((place / "plain" / "args.json").read_text())
    assert settings["steering"]["method"] == "none" and settings["lr"] == 1e-3 and settings["steps_total"] == 8


def test_same_seed_same_weights_bit_for_bit(place):
    one, _ = run(place, "one", "--steer", "reg")
    two, _ = run(place, "two", "--steer", "reg")
    other, _ = run(place, "other", "--steer", "reg", "--seed", "1")
    assert same(one, two) and not same(one, other)


@pytest.mark.parametrize("method", ["none", "int", "reg"])
@pytest.mark.parametrize("when", [1, 2])
def test_an_interrupted_run_resumes_to_the_same_weights(place, monkeypatch, method, when):
    flags = ["--steer", method, "--epochs", "2", "--save-every", "3"]
    whole, whole_log = run(place, f"whole-{method}-{when}", *flags)
    saves, save_state = [], train.save_state

    def killed(path, *state):
        save_state(path, *state)
        saves.append(path)
        if len(saves) == when:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place, f"cut-{method}-{when}", *flags)
    assert not (place / f"cut-{method}-{when}").exists()
    monkeypatch.setattr(train, "save_state", save_state)
    with open(place / f"cut-{method}-{when}.partial" / "log.jsonl", "a") as log:
        log.write('{"step": 99, "half a li')               # what a kill may leave behind
    resumed, log = run(place, f"cut-{method}-{when}", *flags, "--resume")
    assert same(whole, resumed)
    timeless = [{key: value for key, value in line.items() if "second" not in key and "memory" not in key} for line in log]
    assert timeless == [{key: value for key, value in line.items() if key in timeless[0]} for line in whole_log]
    assert not (place / f"cut-{method}-{when}" / "state.pt").exists()


def test_a_run_cut_before_its_first_save_starts_again(place, monkeypatch):
    whole, _ = run(place, "early-whole")
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: (_ for _ in ()).throw(KeyboardInterrupt()) if step == 2 else 1e-3)
    with pytest.raises(KeyboardInterrupt):
        run(place, "early")
    monkeypatch.undo()
    resumed, log = run(place, "early", "--resume")
    assert same(whole, resumed) and len(log) == 8


def test_reg_raises_the_key_entropy_and_a_negative_lambda_lowers_it(place):
    entropy = {lam: run(place, f"lam{lam}", "--steer", "reg", "--lam", lam, "--epochs", "3")[1][-1]["key_entropy"] for lam in ("-1", "0", "1")}
    assert entropy["-1"] < entropy["0"] - 0.01 and entropy["0"] + 0.01 < entropy["1"]


def test_int_trains_other_weights_and_the_saved_model_is_plain(place):
    plain, _ = run(place, "int-plain")
    steered, _ = run(place, "int-steered", "--steer", "int", "--p", "0.1", "--alpha", "2", "--layers", "2")
    assert plain.keys() == steered.keys() and not same(plain, steered)
    settings = json.loads((place / "int-steered" / "args.json").read_text())["steering"]
    assert settings == {"method": "int", "p": 0.1, "alpha": 2.0, "rank_by": "magnitude", "layers": {"2": {}}}


def test_checkpointing_and_micro_batches_change_speed_only(place):
    one, _ = run(place, "all-at-once", "--steer", "reg")
    two, log = run(place, "in-pieces", "--steer", "reg", "--checkpoint", "--micro-tokens", "60")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_overwrite_and_resume_of_a_finished_run(place, capsys):
    first, _ = run(place, "done")
    run(place, "done", "--resume")
    assert "is a finished run" in capsys.readouterr().out
    again, _ = run(place, "done", "--overwrite", "--seed", "5")
    assert not same(first, again) and not (place / "done.partial").exists()


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_batch(place, capsys, tmp_path):
    folder = checkpoint_folder(tmp_path / "broken", spoil=lambda model: model.blocks[1].memory.values.weight.data.fill_(math.nan))
    with pytest.raises(SystemExit) as stop:
        run(place, "nan", "--model", str(folder))
    assert stop.value.code.startswith("train.py: step 1: the loss is not finite (lm_loss nan") and "boolq row " in stop.value.code
    assert not (place / "nan").exists()


# ----------------------------------------------------------------------------------------------------------- text to ids


def test_prompt_and_response_are_plain_text_between_bos_and_eos(place):
    from data.tasks import load
    from data.tokenizer import Tokenizer
    tokenizer = Tokenizer.from_pretrained(place / "base")
    write_task(place / "trap", "boolq", "train", [("is <|end_of_text|> the end?", "false")])
    (ids, n_prompt), = encode(load(place / "trap", "boolq", "train"), tokenizer, 256)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids[1:n_prompt]).startswith("is <|end_of_text|> the end?")
    assert tokenizer.decode(ids[n_prompt:-1]) == "the correct answer is false"
    (cut, n), = encode(load(place / "trap", "boolq", "train"), tokenizer, n_prompt + 2)
    assert cut == ids[:n_prompt + 2] and n == n_prompt
