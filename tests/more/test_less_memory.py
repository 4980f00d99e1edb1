"""The functions that save memory give what the plain ones give, and keep what they say they keep.

After reading this you know what a feed-forward layer keeps for its backward pass, and that the last
section of infosteer.py may be deleted: training then runs on the plain functions.
"""
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import infosteer
from conftest import ROOT
from infosteer import RANKINGS, Steering, intervene, key_coefficients, key_entropy
from model import ACTIVATIONS, Config, Transformer
from test_07_step import STEERINGS, model_of, random_rows, step_gradients

pytestmark = pytest.mark.memory

# Rounding of one number and of a sum, relative to the largest number there is.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
                       ).to(dtype)


def with_zeros(k):
    """The same coefficients, of which every third is 0, and those of the last token all are."""
    k = k.clone()
    k[..., ::3] = 0
    k[-1, -1] = 0
    return k


def values_and_gradients(function, *inputs):
    """[what it gives, its gradient with respect to each input], for a random gradient of its
    output."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    given = random(*out.shape, seed=9, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, given)]


def assert_same(function, *inputs):
    """`function` and the plain function inside agree in value, gradient and dtype."""
    plain = functools.partial(function.func.__wrapped__, **function.keywords)
    values = zip(values_and_gradients(function, *inputs), values_and_gradients(plain, *inputs),
                 strict=True)
    for ours, expected in values:
        assert ours.dtype == expected.dtype
        largest = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0,
                                   atol=TOLERANCES[inputs[0].dtype] * largest)


# ------------------------------------------------------------------- the same numbers


@each_dtype
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_key_coefficients_equal_the_plain_ones(name, dtype):
    gate, up = 4 * random(2, 5, 60, dtype=dtype), random(2, 5, 60, seed=1, dtype=dtype)
    assert_same(functools.partial(key_coefficients, act=ACTIVATIONS[name]), gate, up)
    assert torch.equal(key_coefficients(gate, up, ACTIVATIONS[name]), ACTIVATIONS[name](gate) * up)


def test_an_activation_whose_slope_nobody_wrote_down_takes_the_plain_way():
    assert_same(functools.partial(key_coefficients, act=torch.tanh), random(5), random(5, seed=1))


@each_dtype
@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("p, alpha", [(0.01, 1.0), (0.05, -2.0), (0.25, 0.0), (1.0, 1.0)])
def test_the_intervention_equals_the_plain_one(p, alpha, rank_by, dtype):
    function = functools.partial(intervene, p=p, alpha=alpha, rank_by=rank_by)
    assert_same(function, random(3, 7, 60, dtype=dtype))


@each_dtype
@pytest.mark.parametrize("normalise", infosteer.NORMALISATIONS)
@pytest.mark.parametrize("change", [lambda k: k, with_zeros, lambda k: k.transpose(0, 1),
                                    lambda k: k[0, 0]],
                         ids=["random", "zeros", "not contiguous", "one token"])
def test_the_entropy_equals_the_plain_one(change, normalise, dtype):
    assert_same(functools.partial(key_entropy, normalise=normalise),
                change(random(3, 7, 60, dtype=dtype)))


def test_the_entropy_of_more_tokens_than_fit_in_a_cache_equals_the_plain_one():
    assert_same(functools.partial(key_entropy), random(2, 7, 2**16, dtype=torch.float32))


def layer_gradients(steering, plain=False, dtype=torch.float32, autocast=False):
    """Gradients of a layer's input and weights, from its answer and, for reg, its entropy."""
    memory, h = a_block().memory.to(dtype), random(2, 8, 32, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if plain:
            k = F.silu(memory.key_gate(h)) * memory.key_up(h)
            if steering.method == "int":
                k = intervene.__wrapped__(k, steering.p)
            answer, flux = memory.values(k), key_entropy.__wrapped__(k)
        else:
            answer, flux, _ = memory(h, steering)
    loss = (answer.to(dtype) * random(2, 8, 32, seed=1, dtype=dtype)).sum()
    if steering.method == "reg":
        loss = loss - flux.sum()
    return torch.autograd.grad(loss, [h, *memory.parameters()])


def errors(gradients, exact):
    return [((one - other).norm() / other.norm()).item()
            for one, other in zip(gradients, exact, strict=True)]


each_method = pytest.mark.parametrize(
    "steering", [Steering("int", p=0.1), Steering("reg"), Steering("none")], ids=lambda s: s.method)


@each_method
def test_a_layer_has_the_gradients_of_the_plain_functions(steering):
    assert max(errors(layer_gradients(steering), layer_gradients(steering, plain=True))) < 1e-5


@each_method
def test_under_autocast_a_layer_is_as_close_to_the_exact_gradients_as_the_plain_functions(steering):
    exact = layer_gradients(steering, dtype=torch.float64)
    ours = errors(layer_gradients(steering, autocast=True), exact)
    plain = errors(layer_gradients(steering, autocast=True, plain=True), exact)
    assert all(one < 1.05 * other for one, other in zip(ours, plain, strict=True))


# --------------------------------------------------------- what the backward pass keeps


def a_block():
    return Transformer(Config.from_dict(dict(
        model_type="llama", vocab_size=50, hidden_size=32, intermediate_size=512,
        num_hidden_layers=1, num_attention_heads=1))).initialise(1).blocks[0]


def kept_by(function, *inputs):
    """(what it gives, the tensors that autograd keeps for its backward pass)."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        return function(*inputs), kept


def addresses(tensors, numel):
    return [tensor.data_ptr() for tensor in tensors if tensor.numel() == numel]


def test_the_coefficients_keep_gate_and_up_and_nothing_else():
    gate, up = random(2, 6, 100).unbind()
    _, kept = kept_by(lambda: key_coefficients(gate.requires_grad_(), up.requires_grad_(), F.silu))
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_the_intervention_keeps_the_new_coefficients_and_few_numbers_for_each_raised_one(rank_by):
    k = random(6, 1000).requires_grad_()
    new, kept = kept_by(lambda: intervene(k, 0.01, rank_by=rank_by))
    assert addresses(kept, 6000) == [new.data_ptr()]
    assert sum(tensor.numel() for tensor in kept) == 6000 + 2 * 6 * 10         # places and signs


def test_the_entropy_keeps_no_copy_of_the_coefficients():
    k = random(6, 1000, dtype=torch.bfloat16).requires_grad_()
    _, kept = kept_by(lambda: key_entropy(k))
    assert addresses(kept, 6000) == [k.data_ptr()]
    assert sum(tensor.numel() for tensor in kept) == 6000 + 2 * 6


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("steering", [None, Steering("none"), Steering("reg"), Steering("int")],
                         ids=lambda steering: steering.method if steering else "plain")
def test_a_layer_keeps_its_input_its_gates_and_its_coefficients_once_each(steering, autocast):
    # Beside weights and small tensors: h, h W_gate, h W_up and k. act(h W_gate) is computed again.
    block = a_block()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        h = block.memory_norm(torch.randn(2, 8, 32, requires_grad=True))
        _, kept = kept_by(block.memory, h, steering)
    large = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept
             if tensor.numel() in (16 * 32, 16 * 512)}
    assert sorted(tensor.numel() // 16 for tensor in large.values()) == [32, 512, 512, 512]
    dtype = torch.bfloat16 if autocast else torch.float32
    assert {tensor.dtype for tensor in large.values()} == {dtype}


# ----------------------------------------------------- without the last section of infosteer.py

CODE = """
import sys
import torch
import infosteer
from test_07_step import STEERINGS, model_of, random_rows, step_gradients

assert infosteer.__file__.startswith(sys.argv[1]), infosteer.__file__
assert not hasattr(infosteer.intervene, "__wrapped__")
model = model_of()
torch.save([step_gradients(model, random_rows(), steering, 200) for steering in STEERINGS],
           sys.argv[1] + "/gradients.pt")
"""


def test_without_that_section_a_training_step_has_the_same_gradients(tmp_path):
    text = Path(infosteer.__file__).read_text(encoding="utf-8")
    (tmp_path / "infosteer.py").write_text(text[:text.rindex("\n# ------")], encoding="utf-8")
    path = [str(tmp_path), str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{CODE}", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for steering, gradients in zip(STEERINGS, found, strict=True):
        ours = step_gradients(model_of(), random_rows(), steering, 200)
        assert max(errors(gradients.values(), ours.values())) < 1e-5, steering
