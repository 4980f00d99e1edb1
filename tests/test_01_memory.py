"""A feed-forward layer as a memory, in numbers small enough for paper.

After reading this you know what a key-value memory is (eq. 3), where steering enters it, and what
it may not touch: three memories in two dimensions, whose every coefficient you can compute by hand.
"""
import inspect
import math

import pytest
import torch

from eval import Watch
from infosteer import Steering, key_coefficients, recall
from model import ACTIVATIONS, Config, KeyValueMemory, Transformer

pytestmark = pytest.mark.course

TINY = dict(model_type="llama", vocab_size=50, hidden_size=2, intermediate_size=3,
            num_hidden_layers=1, num_attention_heads=1)
THREE_LAYERS = {**TINY, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3}
TOKENS = torch.arange(20).view(2, 10)                                          # [B, T]


# ----------------------------------------------------------------------- eq. 3 without a model


def test_a_coefficient_is_the_activated_gate_times_up():
    gate, up = torch.tensor([2.0, 3.0, -1.0]), torch.tensor([5.0, -2.0, 6.0])
    assert key_coefficients(gate, up, torch.relu).tolist() == [10, -6, 0]


@pytest.mark.parametrize("version", [key_coefficients, inspect.unwrap(key_coefficients)],
                         ids=["as it is called", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_negative_up_makes_a_negative_coefficient_as_only_the_gate_is_activated(name, version):
    # silu(2) = 2 / (1 + e^-2) = 1.7616 and gelu(2) = 1.9546, times -3. The product activated,
    # silu(-6) = -0.0148, would call a memory idle that speaks loudly against something.
    k = version(torch.tensor(2.0), torch.tensor(-3.0), ACTIVATIONS[name])
    activated = {"silu": 1.7615942, "gelu_pytorch_tanh": 1.9545977}
    assert k.item() == pytest.approx(-3 * activated[name])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_coefficients_have_the_gradient_of_their_formula(name):
    generator = torch.Generator().manual_seed(0)
    gate, up = 5 * torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    inputs = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: key_coefficients(g, u, ACTIVATIONS[name]), inputs)


def test_what_is_recalled_is_the_sum_of_memory_vectors_weighted_by_coefficients():
    v = torch.tensor([[1.0, 0.0], [0.0, 10.0], [5.0, 5.0]])                    # [d_m, d]
    # 10 (1, 0) + 6 (0, 10) + 6 (5, 5)
    assert recall(torch.tensor([10.0, 6.0, 6.0]), v).tolist() == [40, 90]


# -------------------------------------------------------------------- eq. 3 as a layer of a model


def three_memories():
    """A layer of three memories. Its gates are so large that SiLU, x / (1 + e^-x), is exactly x for
    the positive ones and 0 for the negative ones."""
    memory = KeyValueMemory(Config.from_dict(TINY))
    with torch.no_grad():
        memory.key_gate.weight.copy_(torch.tensor(                             # [d_m, d]
            [[100.0, 0.0], [0.0, 100.0], [-100.0, 100.0]]))
        memory.key_up.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 2.0]]))
        memory.values.weight.copy_(torch.tensor(                               # [d, d_m]
            [[1.0, 0.0, 5.0],
             [0.0, 10.0, 5.0]]))
    return memory


def ask(h, steering=None):
    """What three memories answer to one token: its hidden state -> ([d], flux, reward)."""
    with torch.no_grad():
        answer, flux, reward = three_memories()(torch.tensor([[h]]), steering)
    return answer[0, 0].tolist(), flux, reward


def test_the_layer_recalls_what_its_coefficients_say():
    # h = (2, 3): gates (200, 300, 100), ups (5, 2, 6), so k = (1000, 600, 600), and
    # 1000 (1, 0) + 600 (0, 10) + 600 (5, 5) = (4000, 9000).
    assert ask([2.0, 3.0]) == ([4000, 9000], None, None)


def test_a_closed_gate_silences_a_memory():
    # h = (2, 1): gates (200, 100, -100), ups (3, 2, 2), so k = (600, 200, 0).
    assert ask([2.0, 1.0]) == ([600, 2000], None, None)


def test_a_memory_with_a_negative_coefficient_takes_its_vector_away():
    # h = (1, -3): gates (100, -300, -400), ups (-2, 1, -6), so k = (-200, 0, 0).
    assert ask([1.0, -3.0]) == ([-200, 0], None, None)


def test_steering_wakes_the_idle_memory():
    # k = (600, 200, 0) has the mean 800 / 3. p = 1/3 of three memories is one, the third:
    # 600 (1, 0) + 200 (0, 10) + 800 / 3 (5, 5).
    answer, _, reward = ask([2.0, 1.0], Steering("int", p=1 / 3))
    assert answer == pytest.approx([600 + 4000 / 3, 2000 + 4000 / 3]) and reward is None


def test_flux_is_the_entropy_of_the_coefficients_and_reg_rewards_it():
    # k = (600, 200, 0) has the shares 3/4, 1/4 and 0, so H = 3/4 log(4/3) + 1/4 log 4.
    answer, flux, reward = ask([2.0, 1.0], Steering("reg"))
    assert flux.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert reward is flux and answer == [600, 2000]
    assert ask([2.0, 1.0], Steering("none"))[1:] == (flux, None)


def test_watching_shows_the_coefficients_after_steering():
    seen = []
    watch = Watch(lambda layer, k: seen.append((layer, k.tolist())), Steering("int", p=1 / 3))
    ask([2.0, 1.0], watch.at(5))
    assert seen == [(5, [[pytest.approx([600, 200, 800 / 3])]])]


# ------------------------------------------------------------------------ steering a whole model


def new_model():
    return Transformer(Config.from_dict(THREE_LAYERS)).initialise(1)


@pytest.mark.parametrize("steering", [
    Steering("none"), Steering("reg"), Steering("int", p=0.0), Watch(lambda layer, k: None)],
    ids=["none", "reg", "p0", "watch"])
def test_what_changes_no_coefficient_is_the_plain_model_bit_for_bit(steering):
    model = new_model()
    assert torch.equal(model(TOKENS, steering), model(TOKENS))
    assert not torch.equal(model(TOKENS, Steering("int")), model(TOKENS))


def test_watching_sees_what_every_layer_recalls_with_once_and_in_order():
    model, seen, recalled = new_model(), [], []
    for block in model.blocks:
        block.memory.values.register_forward_pre_hook(lambda _, given: recalled.append(given[0]))
    model.hidden(TOKENS, Watch(lambda layer, k: seen.append((layer, k)), Steering("int")))
    assert [layer for layer, _ in seen] == [0, 1, 2]
    assert all(torch.equal(k, given) for (_, k), given in zip(seen, recalled, strict=True))


def test_steering_reaches_only_the_layers_asked_for():
    model = new_model()
    _, plain, _ = model.hidden(TOKENS, Steering("none"))                       # [n_layers, B, T]
    _, second, _ = model.hidden(TOKENS, Steering("int", p=0.3, layers={2: {}}))
    assert torch.equal(second[0], plain[0]) and not torch.allclose(second[1], plain[1])


@pytest.mark.parametrize("layer, rewarded", [(0, True), (1, False), (2, True)])
def test_the_flux_of_a_layer_that_is_not_asked_for_is_seen_and_not_rewarded(layer, rewarded):
    model = new_model()
    _, flux, reward = model.hidden(TOKENS, Steering("reg", layers={1: {}, 3: {}}))
    assert flux[layer].gt(0).all() and torch.equal(reward[layer], flux[layer] * rewarded)
    own = model.blocks[layer].memory.key_up.weight
    gradient, = torch.autograd.grad(flux[layer].sum(), own)
    assert gradient.any() == rewarded


def test_a_layers_own_memory_vectors_get_no_gradient_from_its_entropy():
    # H is a function of k, and k comes before the memory vectors: reg teaches the keys which
    # memories to call, and never the memories what to say.
    model = Transformer(Config.from_dict({**THREE_LAYERS, "num_hidden_layers": 1})).initialise(1)
    _, _, reward = model.hidden(TOKENS, Steering("reg"))
    reward.sum().backward()
    assert model.blocks[0].memory.values.weight.grad is None
    assert model.blocks[0].memory.key_gate.weight.grad.abs().sum() > 0
