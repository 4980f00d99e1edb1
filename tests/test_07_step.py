"""One optimizer step: how its rows become micro-batches, and which loss they add up to.

After reading this you know which tokens are supervised and which are not, what is averaged over
what, and why a step has the same gradient however it is cut into micro-batches.
"""
import itertools
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from eval import Watch
from infosteer import Steering
from model import Config, Transformer
from train import IGNORE, collate, learning_rate, micro_batches, order_of, step_loss

pytestmark = pytest.mark.course

RAW = dict(model_type="llama", vocab_size=80, hidden_size=32, intermediate_size=96,
           num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
           sliding_window=16)


def model_of(family="llama"):
    model = Transformer(Config.from_dict({**RAW, "model_type": family})).initialise(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)             # away from the flat start, where all coefficients are alike
    return model


def random_rows(n=23):
    """[(ids, number of prompt ids)] of ragged lengths, with responses of one to five tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 40, (n,), generator=generator).tolist()
    return [(torch.randint(0, 80, (length,), generator=generator).tolist(), length - 1 - i % 5)
            for i, length in enumerate(lengths)]


def counts(rows):
    """(supervised tokens, tokens) of a step; the last id of a row is a target only."""
    return (sum(len(ids) - n_prompt for ids, n_prompt in rows),
            sum(len(ids) - 1 for ids, _ in rows))


# -------------------------------------------------------------------------- rows of a step


def test_every_epoch_sees_every_row_once_in_a_new_order():
    steps = list(itertools.islice(order_of(10, 4, seed=1), 6))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert steps == list(itertools.islice(order_of(10, 4, seed=1), 6))
    assert steps != list(itertools.islice(order_of(10, 4, seed=2), 6))


def test_inputs_targets_and_padding_by_hand():
    # Each token is asked for the next one. Only the response counts: what follows the prompt.
    inputs, targets, real = collate([([5, 6, 7, 8], 2), ([9, 4], 1)])
    assert inputs.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert targets.tolist() == [[IGNORE, 7, 8], [4, IGNORE, IGNORE]]
    assert real.tolist() == [[True, True, True], [True, False, False]]


def test_rows_are_packed_as_many_as_the_budget_holds_and_not_one_by_one():
    # Six tokens hold the row of five alone, the two of three, and the three of two.
    lengths = [2, 5, 3, 2, 3, 2]
    assert micro_batches([0, 1, 2, 3, 4, 5], lengths, 6) == [[1], [2, 4], [0, 3, 5]]
    assert micro_batches([5, 1], lengths, 10) == [[1, 5]]      # the short one is padded to five
    assert micro_batches([5, 1], lengths, 9) == [[1], [5]]
    assert micro_batches([5, 1], lengths, 1) == [[1], [5]]     # a row is never cut


def test_micro_batches_hold_every_row_once_with_little_padding():
    lengths = [len(ids) for ids, _ in random_rows(200)]
    batches = micro_batches(range(200), lengths, 150)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert max(padded) <= 150 and sum(padded) < 1.05 * sum(lengths)    # which sorting is for


# -------------------------------------------------------------------------- the loss of a step


def test_without_steering_the_loss_is_the_mean_over_supervised_tokens():
    model, rows = model_of(), random_rows(3)
    losses = []
    for ids, n_prompt in rows:
        predicted = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)         # [T, V]
        losses += [-predicted[place - 1, ids[place]] for place in range(n_prompt, len(ids))]
    loss, lm, reward, _ = step_loss(model, rows, *counts(rows), Steering("none"))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert lm == loss and reward == 0


def test_the_flux_is_averaged_over_all_tokens_the_prompts_too_and_not_over_padding():
    model, rows = model_of(), random_rows(5)
    every, supervised = [], []
    for ids, n_prompt in rows:
        flux = model.hidden(torch.tensor([ids[:-1]]), Steering("reg"))[1][:, 0]    # [n_layers, T]
        every.append(flux)
        supervised.append(flux[:, n_prompt - 1:])
    every, supervised = torch.cat(every, 1).mean(1), torch.cat(supervised, 1).mean(1)
    _, _, reward, flux = step_loss(model, rows, *counts(rows), Steering("reg", lam=0.3))
    torch.testing.assert_close(flux, every)                                    # [n_layers]
    torch.testing.assert_close(reward, 0.3 * every.sum())
    assert not torch.allclose(every, supervised, rtol=1e-3)    # which is another number here


def test_the_reward_is_subtracted_so_that_descending_the_loss_raises_the_entropy():
    model, rows = model_of(), random_rows(5)

    def step(lam):
        return step_loss(model, rows, *counts(rows), Steering("reg", lam=lam))

    loss, lm, reward, flux = step(0.5)
    assert reward > 0 and loss.item() == pytest.approx(lm.item() - 0.5 * flux.sum().item())
    (loss - step(0.0)[0]).backward()                           # what the reward adds to the loss
    with torch.no_grad():
        for block in model.blocks:
            block.memory.key_up.weight -= 0.01 * block.memory.key_up.weight.grad
    assert step(0.5)[3].sum() > flux.sum()


# --------------------------------------------------- however a step is cut, its gradient is one


def step_gradients(model, rows, steering, budget):
    """The gradients of one optimizer step, cut into micro-batches of `budget` tokens."""
    model.zero_grad()
    for batch in micro_batches(range(len(rows)), [len(ids) - 1 for ids, _ in rows], budget):
        step_loss(model, [rows[row] for row in batch], *counts(rows), steering)[0].backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def reference_gradients(model, rows, steering):
    """The same from the definition: one big padded batch, logits of every token, and
    eq. 5 in plain autograd."""
    T = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])             # [B, T]
    labels = torch.tensor([[IGNORE] * n_prompt + ids[n_prompt:] + [IGNORE] * (T - len(ids))
                           for ids, n_prompt in rows])
    real = torch.tensor([[1.0] * (len(ids) - 1) + [0.0] * (T - len(ids)) for ids, _ in rows])
    keys, change = [], steering if steering.method == "int" else Steering("none")
    model.zero_grad()
    logits = model(tokens, Watch(lambda layer, k: keys.append(k), change))             # [B, T, V]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                           ignore_index=IGNORE)
    for layer, k in enumerate(keys):                                           # [B, T, d_m]
        if steering.at(layer).method == "reg":
            q = k[:, :-1].abs() / k[:, :-1].abs().sum(-1, keepdim=True)
            mean = (-(q * q.log()).sum(-1) * real).sum() / real.sum()
            loss = loss - steering.at(layer).lam * mean
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


STEERINGS = [Steering("none"), Steering("int", p=0.1, alpha=2.0), Steering("reg", lam=0.3),
             Steering("reg", lam=-0.3, layers={1: {}, 2: {"lam": 0.1}})]


@pytest.mark.parametrize("steering", STEERINGS, ids=lambda steering: steering.name)
@pytest.mark.parametrize("budget", [40, 200, 10**6])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_equal_those_of_one_padded_batch_with_all_logits(steering, budget, family):
    model, rows = model_of(family), random_rows()
    ours = step_gradients(model, rows, steering, budget)
    for name, expected in reference_gradients(model, rows, steering).items():
        assert (ours[name] - expected).norm() < 1e-5 * expected.norm(), name


def test_a_mean_of_the_means_of_micro_batches_would_be_another_gradient():
    # Many training loops compute this. If it passed, the test above would prove nothing.
    model, rows = model_of(), random_rows()
    expected = reference_gradients(model, rows, Steering("none"))
    model.zero_grad()
    batches = micro_batches(range(len(rows)), [len(ids) - 1 for ids, _ in rows], 200)
    for batch in batches:
        chosen = [rows[row] for row in batch]
        (step_loss(model, chosen, *counts(chosen), Steering("none"))[0] / len(batches)).backward()
    errors = [(weight.grad - expected[name]).norm() / expected[name].norm()
              for name, weight in model.named_parameters()]
    assert max(errors) > 1e-3


# --------------------------------------------------------------------------------- the schedule


def test_the_learning_rate_warms_up_and_decays_linearly():
    args = Namespace(lr=1.0, warmup=4)
    rates = [learning_rate(step, args, 8) for step in range(8)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
