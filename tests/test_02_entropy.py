"""The entropy of the key distribution (eq. 5), which section 6.2 calls information flux.

After reading this you know what it computes and how it grows, its two readings, its gradient, and
what becomes of it in bf16 and where coefficients are 0. The last tests hand wrong answers to the
first ones, which must not let them pass.
"""
import math

import pytest
import torch

from infosteer import NORMALISATIONS, key_entropy

pytestmark = pytest.mark.course

# Four sequences of seven tokens with forty memories each, of both signs: [B, T, d_m].
K = torch.randn(4, 7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------- eq. 5 as a loop over plain numbers


def entropy_by_hand(k):
    """From the paper's text alone: H of one token's coefficients, a list of numbers, in nats."""
    total = sum(abs(x) for x in k)
    return -sum(abs(x) / total * math.log(abs(x) / total) for x in k if x != 0)


def softmax_entropy_by_hand(k):
    """The other reading: q = softmax(k)."""
    total = sum(math.exp(x) for x in k)
    return -sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in k)


def of_every_token(function, k):
    """What a function of one token's coefficients says of k [B, T, d_m]: [B, T]."""
    return torch.tensor([[function(token) for token in tokens] for tokens in k.tolist()],
                        dtype=torch.float64)


REFERENCES = {"magnitude": entropy_by_hand, "softmax": softmax_entropy_by_hand}


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_entropy_equals_the_formula(normalise):
    expected = of_every_token(REFERENCES[normalise], K)
    torch.testing.assert_close(key_entropy(K, normalise), expected, rtol=1e-12, atol=1e-12)
    single = key_entropy(K.float(), normalise)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- what it measures


def test_it_runs_from_0_for_a_single_memory_to_log_m_for_equal_ones():
    one, all_alike = torch.tensor([[0.0, 0.0, 7.0, 0.0], [3.0, -3.0, 3.0, -3.0]])
    assert key_entropy(one).item() == pytest.approx(0, abs=1e-6)
    assert key_entropy(all_alike).item() == pytest.approx(math.log(4))


def test_it_is_the_logarithm_of_how_many_memories_speak():
    # n equal coefficients among many zeros count as n memories: e^H = n.
    for n in (1, 2, 5, 10):
        k = torch.cat([torch.full((n,), -0.3), torch.zeros(100)])
        assert key_entropy(k).exp().item() == pytest.approx(n, rel=1e-5)


def test_the_magnitudes_matter_and_neither_the_scale_nor_the_signs():
    torch.testing.assert_close(key_entropy(K * 1e6), key_entropy(K))
    torch.testing.assert_close(key_entropy(K.abs()), key_entropy(K))
    torch.testing.assert_close(key_entropy(-K), key_entropy(K))


def test_in_the_softmax_reading_scale_and_signs_matter_and_a_constant_does_not():
    torch.testing.assert_close(key_entropy(K + 5, "softmax"), key_entropy(K, "softmax"))
    assert (key_entropy(K * 10, "softmax") < key_entropy(K, "softmax")).all()
    # The shares are as e^2 : 1 : 1 or as e^-2 : 1 : 1. The sign says whether a memory stands out.
    loud, quiet = key_entropy(torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]), "softmax").tolist()
    assert loud == pytest.approx(math.log(math.e**2 + 2) - 2 * math.e**2 / (math.e**2 + 2))
    assert quiet == pytest.approx(math.log(math.e**-2 + 2) + 2 * math.e**-2 / (math.e**-2 + 2))


# ------------------------------------------------------------------------------- its gradient


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_it_has_the_gradient_of_the_formula(normalise):
    assert torch.autograd.gradcheck(lambda k: key_entropy(k, normalise),
                                    K[0, :3].clone().requires_grad_())


def test_the_gradient_pulls_small_coefficients_up_and_large_ones_down():
    # dH / d|k_i| = -(log q_i + H) / S with S = sum |k| = 14, which is positive for all below
    # S e^-H = 4.9: here for all but the 8.
    k = torch.tensor([8.0, -4.0, 1.0, -1.0], requires_grad=True)
    entropy = key_entropy(k)
    entropy.backward()
    magnitudes, signs = k.detach().abs(), k.detach().sign()
    slopes = -((magnitudes / 14).log() + entropy.detach()) / 14
    torch.testing.assert_close(k.grad, slopes * signs)
    assert slopes.sign().tolist() == [-1, 1, 1, 1] and magnitudes[0] > 14 * (-entropy).exp() > 4
    assert (magnitudes * slopes).sum().abs() < 1e-6            # along k, H does not change


# ------------------------------------------------------------------------- in bf16, and at zero


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_bf16_coefficients_are_summed_in_fp32(normalise):
    # 14,336 memories, as in Llama 3 8B. A bf16 sum of so many loses a tenth and more.
    k = torch.randn(3, 14_336, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    entropy = key_entropy(k, normalise)
    assert entropy.dtype == torch.float32
    exact = key_entropy(k.double(), normalise)
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [
    [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, -2.0, 0.0], [1e-30, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0]],
    ids=["all 0", "some 0", "next to 0", "one"])
@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_value_and_gradient_are_finite_where_coefficients_are_0(k, normalise, dtype):
    k = torch.tensor(k, dtype=dtype, requires_grad=True)
    entropy = key_entropy(k, normalise)
    entropy.backward()
    assert entropy.isfinite() and k.grad.isfinite().all()


def test_coefficients_that_are_all_0_count_as_uniform():
    assert key_entropy(torch.zeros(8)).item() == pytest.approx(math.log(8), abs=1e-5)


# ------------------------------------------------------------- would these tests catch a wrong one?

WRONG = {
    "its sign is flipped": lambda k: -key_entropy(k),
    "it is in bits": lambda k: key_entropy(k) / math.log(2),
    "it is that of squares": lambda k: key_entropy(k * k),
    "it leaves negative coefficients out": lambda k: key_entropy(k.clamp_min(0)),
    "it is over tokens and not over memories": lambda k: key_entropy(k.transpose(-1, -2))[..., :7],
    "it is that of the mean over tokens":
        lambda k: key_entropy(k.abs().mean(1, keepdim=True)).expand(k.shape[:-1]),
    "it is the other reading": lambda k: key_entropy(k, "softmax"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_formula_refuses_an_entropy_where(wrong):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(WRONG[wrong](K), of_every_token(entropy_by_hand, K), rtol=1e-3,
                                   atol=1e-3)
