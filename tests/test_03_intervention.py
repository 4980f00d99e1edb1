"""The intervention (eq. 4), which wakes the idle memories in the forward pass.

After reading this you know which coefficients it raises and how far, what "smallest" may mean where
coefficients have both signs, and where its gradient flows. The last tests hand wrong answers to the
first ones, which must not let them pass.
"""
import doctest
import inspect

import pytest
import torch

import infosteer
from infosteer import RANKINGS, intervene

pytestmark = pytest.mark.course

# Four sequences of seven tokens with forty memories each, of both signs: [B, T, d_m].
K = torch.randn(4, 7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# `intervene` may come in a version that keeps less for the backward pass; the plain one is inside.
VERSIONS = {"as it is called": intervene, "plain": inspect.unwrap(intervene)}
each_version = pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)


# ----------------------------------------------------------- eq. 4 as a loop over plain numbers


def intervene_by_hand(k, p, alpha, rank_by):
    """From the paper's text alone: the coefficients of one token, a list of numbers -> a list."""
    n = max(1, round(p * len(k)))
    size = [abs(x) for x in k] if rank_by == "magnitude" else list(k)
    mean, raised = sum(size) / len(k), list(k)
    for i in sorted(range(len(k)), key=lambda i: size[i])[:n]:
        raised[i] = -alpha * mean if rank_by == "magnitude" and k[i] < 0 else alpha * mean
    return raised


def of_every_token(k, p, alpha, rank_by):
    """The same for k [B, T, d_m]."""
    return torch.tensor([[intervene_by_hand(token, p, alpha, rank_by) for token in tokens]
                         for tokens in k.tolist()], dtype=torch.float64)


@each_version
@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("p, alpha", [(0.01, 1.0), (0.06, 2.0), (0.5, -0.5), (1.0, 1.0)])
def test_the_intervention_equals_the_formula(p, alpha, rank_by, version):
    expected = of_every_token(K, p, alpha, rank_by)
    torch.testing.assert_close(version(K, p, alpha, rank_by), expected, rtol=1e-12, atol=1e-12)


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(infosteer)
    assert result.failed == 0 and result.attempted >= 3


# -------------------------------------------------------------------------- how many, how far


@each_version
@pytest.mark.parametrize("p, n", [(0.001, 1), (0.01, 1), (0.014, 1), (0.024, 2), (0.026, 3)])
def test_the_number_of_raised_coefficients_is_rounded_to_the_nearest_and_never_up(p, n, version):
    # Of a hundred memories 1.4 make one, 2.4 two and 2.6 three. At least one is raised.
    k = torch.arange(1.0, 101.0)
    assert (version(k, p) != k).sum() == n


@each_version
def test_p_0_raises_none(version):
    assert version(K, 0.0) is K


@each_version
def test_the_mean_is_that_of_all_memories_before_the_update(version):
    # mean |k| = (4 + 1 + 3 + 8) / 4 = 4. Once -1 has become -4, it would be 19 / 4; without the
    # raised one it would be 5.
    k = torch.tensor([4.0, -1.0, 3.0, -8.0])
    assert version(k, 0.25).tolist() == [4, -4, 3, -8]
    assert version(k, 0.25, alpha=2.0).tolist() == [4, -8, 3, -8]
    # p = 1/2 raises the 3 as well, to the same mean.
    assert version(k, 0.5).tolist() == [4, -4, 4, -8]


def test_every_token_has_a_mean_and_smallest_ones_of_its_own():
    k = torch.tensor([[[1.0, 5.0], [30.0, 10.0]]])                             # [B, T, d_m]
    assert intervene(k, 0.5).tolist() == [[[3, 5], [30, 20]]]


# ---------------------------------------------------------------------------- both signs of k


def test_by_magnitude_the_smallest_are_the_idle_memories_which_keep_their_sign():
    k = torch.tensor([0.1, -9.0, 5.0, -1.9])                                   # mean |k| = 4
    torch.testing.assert_close(intervene(k, 0.5), torch.tensor([4.0, -9.0, 5.0, -4.0]))


def test_by_value_the_smallest_are_memories_that_speak_loudly_against_something():
    k = torch.tensor([1.0, -9.0, 5.0, -1.0])                                   # mean k = -1
    assert intervene(k, 0.25, rank_by="value").tolist() == [1, -1, 5, -1]


@each_version
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_counts_as_positive(zero, version):
    assert version(torch.tensor([zero, -4.0]), 0.5).tolist() == [2, -4]


# ------------------------------------------------------------------------------- its gradient


@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("alpha", [1.0, -0.5, 0.0])
def test_it_has_the_gradient_of_the_formula(alpha, rank_by):
    assert torch.autograd.gradcheck(lambda k: intervene(k, 0.1, alpha, rank_by),
                                    K[0, :2].clone().requires_grad_())


def test_the_gradient_flows_through_the_mean_and_not_through_what_was_replaced():
    # k = (4, -1, 3, -8) becomes (4, -m, 3, -8) with m = (|k_1| + |k_2| + |k_3| + |k_4|) / 4.
    k = torch.tensor([4.0, -1.0, 3.0, -8.0], requires_grad=True)
    new = intervene(k, 0.25)
    kept, = torch.autograd.grad(new[[0, 2, 3]].sum(), k, retain_graph=True)
    assert kept.tolist() == [1, 0, 1, 1]
    raised, = torch.autograd.grad(new[1], k)
    assert raised.tolist() == [-0.25, 0.25, -0.25, 0.25]


# --------------------------------------------------------------------------------------- in bf16


@each_version
@pytest.mark.parametrize("rank_by", RANKINGS)
def test_in_bf16_as_many_are_raised_to_the_same_value(rank_by, version):
    # bf16 has ties. Which of two equal coefficients is raised is free; how many are, and how far,
    # is not. 45 of 896 are raised, to what is 3 times the mean but for rounding.
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(50, 896, generator=generator).to(torch.bfloat16)
    new = version(k, 0.05, 3.0, rank_by)
    size = k.double().abs() if rank_by == "magnitude" else k.double()
    changed, largest = new != k, size.sort(-1).values[:, 44:45].expand_as(size)
    assert new.dtype == torch.bfloat16
    assert ((changed.sum(-1) == 45) | (changed.sum(-1) == 44)).all()   # one may be there already
    assert (size[changed] <= largest[changed]).all()
    to = 3.0 * size.mean(-1, keepdim=True).expand_as(size)[changed]
    if rank_by == "magnitude":
        to = to * torch.where(k[changed] < 0, -1, 1)
    torch.testing.assert_close(new[changed].double(), to, rtol=0.02, atol=0.001)


# ------------------------------------------------------------- would these tests catch a wrong one?

WRONG = {
    "the largest are raised": lambda k: -intervene(-k, 0.1, rank_by="value"),
    "the mean is that after the update": lambda k: intervene(intervene(k, 0.1), 0.1),
    "the sign is lost": lambda k: intervene(k.abs(), 0.1),
    "the smallest are those over tokens":
        lambda k: intervene(k.transpose(-1, -2), 0.1).transpose(-1, -2),
    "the mean is that of the whole batch":
        lambda k: torch.where(intervene(k, 0.1) == k, k, k.sign() * k.abs().mean()),
    "the smallest become 0": lambda k: intervene(k, 0.1, alpha=0.0),
    "one more is raised": lambda k: intervene(k, 0.125),
    "it is the other reading": lambda k: intervene(k, 0.1, rank_by="value"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_formula_refuses_an_intervention_where(wrong):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(WRONG[wrong](K), of_every_token(K, 0.1, 1.0, "magnitude"))
