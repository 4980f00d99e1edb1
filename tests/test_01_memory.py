"""After this file you know what a key-value memory is, in numbers small enough for paper: three memories in two dimensions."""
import pytest
import torch

from infosteer import Steering
from model import ACTIVATIONS, Config, KeyValueMemory, Transformer, gated

TINY = dict(model_type="llama", vocab_size=50, hidden_size=2, intermediate_size=3, num_hidden_layers=1, num_attention_heads=1)


def three_memories():
    memory = KeyValueMemory(Config.from_dict(TINY))
    memory.act = torch.relu, None                                     # so that every number is a whole one
    with torch.no_grad():
        memory.key_gate.weight.copy_(torch.tensor([[1., 0.], [0., 1.], [-1., 1.]]))      # [d_m, d]  one row a memory
        memory.key_up.weight.copy_(torch.tensor([[1., 1.], [1., 0.], [0., 2.]]))
        memory.values.weight.copy_(torch.tensor([[1., 0., 5.], [0., 10., 5.]]))          # [d, d_m]  one column a memory vector
    return memory


def test_the_layer_sums_memory_vectors_weighted_by_key_coefficients():
    # h = (2, 3): gates relu(2, 3, 1), ups (5, 2, 6), so k = (10, 6, 6), and 10 (1, 0) + 6 (0, 10) + 6 (5, 5) = (40, 90)
    answer, flux, reward = three_memories()(torch.tensor([[[2., 3.]]]))
    assert answer.tolist() == [[[40., 90.]]] and flux is None and reward is None


def test_a_closed_gate_silences_a_memory():
    # h = (2, 1): gates relu(2, 1, -1), ups (3, 2, 2), so k = (6, 2, 0): the third memory is not called
    answer, *_ = three_memories()(torch.tensor([[[2., 1.]]]))
    assert answer.tolist() == [[[6., 20.]]]


def test_intervention_wakes_the_idle_memory():
    # k = (6, 2, 0) has mean 8/3; p = 1/3 picks one memory, the third: 6 (1, 0) + 2 (0, 10) + 8/3 (5, 5)
    answer, *_ = three_memories()(torch.tensor([[[2., 1.]]]), Steering("int", p=1 / 3))
    torch.testing.assert_close(answer, torch.tensor([[[6 + 40 / 3, 20 + 40 / 3]]]))


def test_flux_is_the_entropy_of_the_keys():
    # k = (6, 2, 0): shares 3/4, 1/4, 0, so H = 0.75 log(4/3) + 0.25 log 4
    _, flux, reward = three_memories()(torch.tensor([[[2., 1.]]]), Steering("reg"))
    torch.testing.assert_close(flux, torch.tensor([[0.5623351446]]))
    assert reward is flux and three_memories()(torch.tensor([[[2., 1.]]]), Steering("none"))[2] is None


def test_no_steering_is_the_plain_model_bit_for_bit():
    model = Transformer(Config.from_dict({**TINY, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3})).initialise(1)
    tokens = torch.arange(20).view(2, 10)
    plain = model(tokens)
    for steering in (Steering("none"), Steering("reg"), Steering("int", p=0.0)):
        assert torch.equal(model(tokens, steering), plain)
    assert not torch.equal(model(tokens, Steering("int")), plain)


def test_steering_reaches_only_the_layers_asked_for():
    model = Transformer(Config.from_dict({**TINY, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3})).initialise(1)
    tokens = torch.arange(20).view(2, 10)
    _, plain, _ = model.hidden(tokens, Steering("none"))                                    # [n_layers, B, T]
    _, second, _ = model.hidden(tokens, Steering("int", p=0.3, layers={2: {}}))
    assert torch.equal(second[0], plain[0]) and not torch.allclose(second[1], plain[1])
    _, flux, reward = model.hidden(tokens, Steering("reg", layers={1: {}, 3: {}}))
    for layer, rewarded in enumerate((True, False, True)):                               # layer 2 is seen, not rewarded
        gradient, = torch.autograd.grad(flux[layer].sum(), model.blocks[layer].memory.key_up.weight, retain_graph=True)
        assert gradient.any() == rewarded
        assert torch.equal(reward[layer], flux[layer] if rewarded else torch.zeros_like(flux[layer]))


def test_a_layers_own_memory_vectors_get_no_gradient_from_its_entropy():
    # H is a function of k, and k comes before the memory vectors: reg teaches keys which memories to call, never what they say.
    model = Transformer(Config.from_dict({**TINY, "hidden_size": 16, "intermediate_size": 48})).initialise(1)
    _, _, reward = model.hidden(torch.arange(10)[None], Steering("reg"))
    reward.sum().backward()
    assert model.blocks[0].memory.values.weight.grad is None
    assert model.blocks[0].memory.key_gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_gate_has_the_gradient_of_its_formula(act):
    gate, up, grad = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = (10 * gate).requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: gated(*x, ACTIVATIONS[act]), (gate, up))
    ours, plain = gated(gate, up, ACTIVATIONS[act]), ACTIVATIONS[act][0](gate) * up
    assert torch.equal(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (gate, up), grad), torch.autograd.grad(plain, (gate, up), grad)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bf16, steering", [(False, None), (False, Steering("reg")), (False, Steering("int")), (True, Steering("none"))])
def test_the_layer_keeps_its_input_its_gates_and_its_keys(bf16, steering):
    # Beside the weights: h, h W_gate, h W_up and k, each once; act(h W_gate) is computed again. Entropies and signs are small.
    block = Transformer(Config.from_dict({**TINY, "hidden_size": 32, "intermediate_size": 512})).initialise(1).blocks[0]
    kept = {}

    def keep(tensor):
        if tensor.numel() in (2 * 8 * 32, 2 * 8 * 512):                   # neither weights nor small
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        h = block.memory_norm(torch.randn(2, 8, 32, requires_grad=True))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer = block.memory(h, steering)
    assert sorted(tensor.numel() // 16 for tensor in kept.values()) == [32, 512, 512, 512]
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16 if bf16 else torch.float32} and answer[0].requires_grad
