"""A run packs the rows of its steps into micro-batches of --micro-tokens, by any model and data.

After reading this you know how `train.train` can be watched, or given other work: `world` says who
does what, and `data` what is learnt.
"""
import itertools
from pathlib import Path

import pytest
import torch

from infosteer import Steering
from model import Transformer, attend, merge
from test_07_step import counts, model_of, random_rows
from train import ALONE, micro_batches, order_of, read_settings, step_loss, train

GOLDEN = Path(__file__).parent.parent / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


class Watched(ALONE):
    """The world of a run that leaves nothing behind but the micro-batches of each step."""

    writes = False

    def __init__(self):
        self.seen = []

    def share(self, batches):
        self.seen.append(batches)
        return batches


@pytest.mark.parametrize("budget", [50, 99, 10**6])
def test_the_rows_of_each_step_are_packed_and_not_trained_one_by_one(tmp_path, budget):
    rows, world = random_rows(), Watched()
    args = read_settings(["--batch", "12", "--epochs", "2", "--micro-tokens", str(budget),
                          "--device", "cpu", "--out", str(tmp_path / "none")])
    train(args, world, lambda args: (model_of(), None, rows, [""] * len(rows), ""))
    lengths = [len(ids) - 1 for ids, _ in rows]
    steps = itertools.islice(order_of(len(rows), 12, args.seed), 4)            # two an epoch
    assert world.seen == [micro_batches(chosen, lengths, budget) for chosen in steps]
    assert all(len(batches) < sum(map(len, batches)) for batches in world.seen)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------- what rows begin with is read once, in bf16


def alike(n=9):
    """Rows that begin alike, some with one another and some with all: [(ids, n_prompt)]."""
    return [([5, 6, 7, 8] + [9] * (i % 3) + ids[:20 + i], 8) for i, (ids, _) in
            enumerate((torch.randint(3, 80, (40,), generator=torch.Generator().manual_seed(i)
                                     ).tolist(), 0) for i in range(n))]


def gradients(model, rows, steering, bf16, shared):
    """The loss of rows and its gradients, in fp32 or as --precision bf16 computes them."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        loss, *_ = step_loss(model, rows, *counts(rows), steering, shared=shared)
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
def test_merged_texts_have_the_hidden_states_and_gradients_of_each_alone(name):
    model = Transformer.from_pretrained(GOLDEN / name, torch.float64)
    texts = [ids for ids, _ in alike()]
    tokens, spread = merge(texts)
    assert tokens.shape[1] == len({tuple(ids[:n]) for ids in texts for n in range(1, len(ids) + 1)})
    together, flux, _ = model.hidden(tokens, Steering("reg"), spread=spread)   # [1, N, d]
    pull = torch.randn(together.shape[1:], dtype=torch.float64)                # [N, d]
    places = [spread[row, :len(ids)] for row, ids in enumerate(texts)]
    (model.logits(together[0]) * 0).sum().backward(retain_graph=True)
    sum((together[0, at] * pull[at]).sum() for at in places).backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    for ids, at in zip(texts, places):
        alone, its_flux, _ = model.hidden(torch.tensor([ids]), Steering("reg"))
        torch.testing.assert_close(together[0, at], alone[0])
        torch.testing.assert_close(flux[:, 0, at], its_flux[:, 0])
        (alone[0] * pull[at]).sum().backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:    # norms and rotations compute in fp32 whatever the weights
            assert (ours[name] - weight.grad).norm() <= 1e-5 * weight.grad.norm(), name


@pytest.mark.parametrize("method", ["none", "int", "reg"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_bf16_has_the_loss_and_gradients_of_fp32(name, method):
    """Read once for all rows, what rows begin with is as exact as when it is read row by row."""
    model = Transformer.from_pretrained(GOLDEN / name)
    expected, exact = gradients(model, alike(), Steering(method), False, False)
    once, same = gradients(model, alike(), Steering(method), False, True)
    assert once == pytest.approx(expected, rel=1e-5) and (same - exact).norm() < 1e-4 * exact.norm()
    (loss, ours), (usual, theirs) = (gradients(model, alike(), Steering(method), True, shared)
                                     for shared in (True, False))
    assert loss == pytest.approx(expected, rel=0.01) and usual == pytest.approx(expected, rel=0.01)
    apart, usually = ((found - exact).norm() / exact.norm() for found in (ours, theirs))
    assert 0 < apart < 1.5 * usually + 0.01


@pytest.mark.parametrize("T, window", [(7, None), (40, None), (40, 5)])
@pytest.mark.parametrize("H, G", [(4, 4), (6, 2)])
def test_attention_as_plain_products_equals_the_fused_one(T, window, H, G):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(3, heads, T, 8, generator=generator).bfloat16().double()
             .requires_grad_() for heads in (H, G, G)]
    ours = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    back = torch.arange(T)[:, None] - torch.arange(T)
    mask = ((back >= 0) & (back < window))[None, None] if window else None
    y, expected = (attend(*qkv, mask, 0.3, None) for qkv in (ours, exact))
    y.sum().backward()
    expected.sum().backward()
    for a, b in zip([y, *(tensor.grad for tensor in ours)],
                    [expected, *(tensor.grad for tensor in exact)]):
        assert (a - b).norm() < 0.02 * b.norm() + 1e-2
