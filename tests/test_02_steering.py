"""After this file you know equations 4 and 5: what they compute, their gradients, and what they do in bf16 and at k = 0."""
import doctest
import math

import pytest
import torch

import infosteer
from infosteer import Steering, format_layers, intervene, key_entropy, parse_layers

torch.manual_seed(0)
K = torch.randn(4, 7, 40, dtype=torch.float64) * torch.rand(4, 7, 1, dtype=torch.float64).exp()     # [B, T, d_m], both signs


# Equations 4 and 5 as loops over numbers, from the paper's text alone: the reference of this file.


def entropy_by_hand(k):
    total = sum(abs(x) for x in k)
    return -sum(abs(x) / total * math.log(abs(x) / total) for x in k if x != 0)


def softmax_entropy_by_hand(k):
    total = sum(math.exp(x) for x in k)
    return -sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in k)


def intervene_by_hand(k, p, alpha, rank_by):
    n = max(1, round(p * len(k)))
    size = [abs(x) for x in k] if rank_by == "magnitude" else list(k)
    mean = sum(size) / len(k)
    for i in sorted(range(len(k)), key=lambda i: size[i])[:n]:
        k = [*k[:i], alpha * mean * (-1 if rank_by == "magnitude" and k[i] < 0 else 1), *k[i + 1:]]
    return k


def by_token(function, k):
    return torch.tensor([function(token.tolist()) for token in k.flatten(0, -2)], dtype=torch.float64).view(*k.shape[:-1], -1).squeeze(-1)


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(infosteer) == (0, 3)


# ------------------------------------------------------------------------------------------------------- entropy, eq. 5


def test_equal_keys_give_log_m_and_a_single_one_gives_0():
    assert key_entropy(torch.full((10,), -3.0)).item() == pytest.approx(math.log(10), abs=1e-6)
    assert key_entropy(torch.eye(10)[4] * 7).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalise, reference", [("magnitude", entropy_by_hand), ("softmax", softmax_entropy_by_hand)])
def test_entropy_equals_the_formula(normalise, reference):
    torch.testing.assert_close(key_entropy(K, normalise), by_token(reference, K), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(key_entropy(K.float(), normalise).double(), by_token(reference, K), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalise", infosteer.NORMALISATIONS)
def test_entropy_has_the_right_gradient(normalise):
    assert torch.autograd.gradcheck(lambda k: key_entropy(k, normalise), K[0, :3].clone().requires_grad_())


def test_entropy_ignores_the_scale_and_the_signs_of_k():
    torch.testing.assert_close(key_entropy(K * 1e6), key_entropy(K))
    torch.testing.assert_close(key_entropy(K.abs()), key_entropy(K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalise", infosteer.NORMALISATIONS)
def test_entropy_and_its_gradient_are_finite_at_zero(dtype, normalise):
    for k in (torch.zeros(3, 8), torch.tensor([[0.0, 1.0, -2.0, 0.0]]), torch.tensor([[1e-30, 0.0, 0.0]]), torch.eye(4) * 1e4):
        k = k.to(dtype).requires_grad_()
        entropy = key_entropy(k, normalise)
        entropy.sum().backward()
        assert entropy.isfinite().all() and k.grad.isfinite().all()


def test_all_zero_keys_count_as_uniform():
    assert key_entropy(torch.zeros(8)).item() == pytest.approx(math.log(8), abs=1e-5)


@pytest.mark.parametrize("normalise", infosteer.NORMALISATIONS)
def test_entropy_of_bf16_keys_is_summed_in_fp32(normalise):
    # 14,336 memories, as in Llama 3 8B: a bf16 sum of so many loses a tenth and more; an fp32 sum is right to five digits.
    k = torch.randn(3, 14_336, dtype=torch.float64).to(torch.bfloat16)
    entropy = key_entropy(k, normalise)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), key_entropy(k.double(), normalise), rtol=1e-5, atol=0)


def test_the_backward_pass_keeps_no_copy_of_the_keys():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        k = torch.randn(6, 1000, dtype=torch.bfloat16).requires_grad_()
        key_entropy(k)
    assert [t.data_ptr() for t in kept if t.numel() == k.numel()] == [k.data_ptr()]


# -------------------------------------------------------------------------------------------------- intervention, eq. 4


@pytest.mark.parametrize("rank_by", infosteer.RANKINGS)
@pytest.mark.parametrize("p, alpha", [(0.01, 1.0), (0.05, 2.0), (0.5, -0.5), (1.0, 1.0)])
def test_intervention_equals_the_formula(p, alpha, rank_by):
    expected = by_token(lambda k: intervene_by_hand(k, p, alpha, rank_by), K)
    torch.testing.assert_close(intervene(K, p, alpha, rank_by), expected, rtol=1e-12, atol=1e-12)


def test_at_least_one_coefficient_is_raised_and_p_0_raises_none():
    k = torch.randn(100)
    assert (intervene(k, 1e-9) != k).sum() == 1
    assert (intervene(k, 0.026) != k).sum() == 3
    assert intervene(k, 0.0) is k


def test_a_zero_counts_as_positive():
    assert intervene(torch.tensor([0.0, -4.0]), 0.5).tolist() == [2.0, -4.0]
    assert intervene(torch.tensor([-0.0, -4.0]), 0.5).tolist() == [2.0, -4.0]


def test_the_two_readings_pick_opposite_memories():
    k = torch.tensor([0.1, -9.0, 5.0, 2.0])
    assert (intervene(k, 0.25) != k).tolist() == [True, False, False, False]                        # the idle one
    assert (intervene(k, 0.25, rank_by="value") != k).tolist() == [False, True, False, False]       # the busiest


@pytest.mark.parametrize("rank_by", infosteer.RANKINGS)
def test_the_gradient_flows_through_the_mean_and_not_through_what_was_replaced(rank_by):
    k = K[0, 0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda k: intervene(k, 0.1, 2.0, rank_by), k)
    new = intervene(k, 0.1, 2.0, rank_by)
    replaced = (new != k).nonzero()[:, 0]
    kept = (new == k).nonzero()[:, 0]
    gradient, = torch.autograd.grad(new[kept].sum(), k, retain_graph=True)
    assert gradient[replaced].eq(0).all() and gradient[kept].eq(1).all()
    gradient, = torch.autograd.grad(new[replaced[0]], k)                      # alpha * mean: every entry moves it by +-alpha / d_m
    torch.testing.assert_close(gradient.abs(), torch.full_like(gradient, 2.0 / 40))


@pytest.mark.parametrize("rank_by", infosteer.RANKINGS)
def test_intervention_in_bf16_replaces_as_many_by_the_same_value(rank_by):
    # bf16 has ties, so which of two equal entries is replaced is free; how many, and by what, is not.
    k = torch.randn(50, 896).to(torch.bfloat16)
    new = intervene(k, 0.05, 3.0, rank_by)
    size = k.double().abs() if rank_by == "magnitude" else k.double()
    threshold = size.sort(-1).values[:, 44:45]                                # round(0.05 * 896) = 45
    changed = new != k
    assert new.dtype == torch.bfloat16 and changed.sum(-1).le(45).all() and changed.sum(-1).ge(44).all()
    assert (size[changed] <= threshold.expand_as(size)[changed]).all()
    value = (3.0 * size.mean(-1, keepdim=True)).expand_as(size)[changed]
    raised = new[changed].double().abs() if rank_by == "magnitude" else new[changed].double()
    torch.testing.assert_close(raised, value, rtol=0.02, atol=0.001)
    if rank_by == "magnitude":
        assert torch.equal(new[changed] < 0, k[changed] < 0)


@pytest.mark.parametrize("rank_by", infosteer.RANKINGS)
@pytest.mark.parametrize("alpha", [1.0, -0.5, 0.0])
def test_the_gradient_of_the_intervention_is_that_of_the_formula(rank_by, alpha):
    k, weight = K.clone().requires_grad_(), torch.randn(K.shape, dtype=K.dtype, generator=torch.Generator().manual_seed(1))
    size = k.abs() if rank_by == "magnitude" else k
    threshold = size.sort(-1).values[..., 3:4]                                # the 4 smallest of 40
    sign = torch.where(k < 0, -1.0, 1.0) if rank_by == "magnitude" else 1.0
    plain = torch.where(size <= threshold, alpha * size.mean(-1, keepdim=True) * sign, k)
    expected, = torch.autograd.grad((plain * weight).sum(), k)
    gradient, = torch.autograd.grad((intervene(k, 0.1, alpha, rank_by) * weight).sum(), k)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank_by", infosteer.RANKINGS)
def test_the_backward_pass_of_the_intervention_keeps_the_new_keys_only(rank_by):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        new = intervene(torch.randn(6, 1000).requires_grad_(), 0.01, rank_by=rank_by)
    assert [t.data_ptr() for t in kept if t.numel() == new.numel()] == [new.data_ptr()]
    assert sum(t.numel() for t in kept) == new.numel() + 2 * 6 * 10


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("settings, word", [
    (dict(method="reg2"), "method"), (dict(p=1.5), "p is 1.5"), (dict(p=-0.1), "p is"), (dict(p=math.nan), "p is nan"),
    (dict(alpha=math.inf), "alpha"), (dict(lam=math.nan), "lam"), (dict(rank_by="size"), "rank_by"), (dict(normalise="l2"), "normalise")])
def test_settings_outside_their_range_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        Steering(**settings)


def test_layers_are_counted_from_1_as_in_the_paper():
    assert list(parse_layers("1-3,8", 12)) == [1, 2, 3, 8]
    assert parse_layers(" 2 , 2-3", 12) == {2: {}, 3: {}}
    steering = Steering("int", layers={1: {}, 3: {}})
    assert [steering.at(layer).method for layer in range(3)] == ["int", "none", "int"]


def test_each_range_of_layers_may_have_its_own_strength():
    layers = parse_layers("1-2:alpha=2, 3-4 : alpha=3 : p=.5,6", 6)
    assert layers == {1: {"alpha": 2.0}, 2: {"alpha": 2.0}, 3: {"alpha": 3.0, "p": 0.5}, 4: {"alpha": 3.0, "p": 0.5}, 6: {}}
    assert parse_layers(format_layers(layers), 6) == layers and format_layers(layers) == "1-2:alpha=2,3-4:alpha=3:p=0.5,6" and format_layers(None) == "all"
    steering = Steering("int", alpha=7.0, layers=layers)
    assert [(s.method, s.alpha, s.p) for s in map(steering.at, range(6))] == [
        ("int", 2.0, 0.01), ("int", 2.0, 0.01), ("int", 3.0, 0.5), ("int", 3.0, 0.5), ("none", 7.0, 0.01), ("int", 7.0, 0.01)]


@pytest.mark.parametrize("text, word", [("1:beta=2", "beta is no strength"), ("1:alpha", "'alpha' is not a strength"), ("1:alpha=x", "not a strength"),
                                        ("1-3:alpha=1,2", "layer 2 has two"), ("1:", "'' is not a strength"), ("1:method=2", "no strength")])
def test_strengths_that_mean_nothing_are_refused(text, word):
    with pytest.raises(ValueError, match=word):
        parse_layers(text, 12)


@pytest.mark.parametrize("text", ["", "0", "13", "3-2", "1-13", "a", "1-", "-3", "1,,2", "1.5", "1-2-3", "²"])
def test_layers_outside_the_model_are_refused(text):
    with pytest.raises(ValueError, match="layers"):
        parse_layers(text, 12)


# ------------------------------------------------------------------------------------ would these tests catch a wrong one?

WRONG_ENTROPIES = {
    "the sign is flipped": lambda k: -key_entropy(k),
    "in bits": lambda k: key_entropy(k) / math.log(2),
    "over tokens, not memories": lambda k: key_entropy(k.transpose(-1, -2)).mean(-1, keepdim=True).expand(k.shape[:-1]),
    "of squares": lambda k: key_entropy(k * k),
    "of positive coefficients only": lambda k: key_entropy(k.clamp_min(0)),
}


@pytest.mark.parametrize("wrong", WRONG_ENTROPIES)
def test_the_formula_rejects_a_wrong_entropy(wrong):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(WRONG_ENTROPIES[wrong](K), by_token(entropy_by_hand, K), rtol=1e-3, atol=1e-3)


WRONG_INTERVENTIONS = {
    "the largest": lambda k: -intervene(-k, 0.1, rank_by="value"),
    "the mean after the update": lambda k: intervene(intervene(k, 0.1), 0.1),
    "the mean without its sign kept": lambda k: intervene(k.abs(), 0.1),
    "over tokens": lambda k: intervene(k.transpose(-1, -2), 0.1).transpose(-1, -2),
    "set to 0": lambda k: intervene(k, 0.1, alpha=0.0),
}


@pytest.mark.parametrize("wrong", WRONG_INTERVENTIONS)
def test_the_formula_rejects_a_wrong_intervention(wrong):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(WRONG_INTERVENTIONS[wrong](K), by_token(lambda k: intervene_by_hand(k, 0.1, 1.0, "magnitude"), K))
