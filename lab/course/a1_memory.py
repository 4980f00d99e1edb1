"""A memory on paper

A feed-forward layer is a memory: it looks up vectors and adds them, as strongly as its key
coefficients say. Write the two functions in which this happens. The layer's parts (`key_gate`,
`key_up`, `act`, `values`) are made by its `__init__`. Its forward returns:

- the answer [B, T, d]: the memory vectors, weighted by the coefficients and summed (equation 3);
- flux and reward [B, T], as `steering.measure(k)` gives them, or None where there is no steering.

`steering.change(k)` gives the coefficients that the layer shall use. The flux is that of what is
used. In the paper: equation 3, section 4.4. Here: tests/test_01_memory.py, which fits on paper.
"""
import torch

from lab.course.probe import draw

MINUTES, POINTS = 60, 8
BLANK = {
    "infosteer.py::key_coefficients": '''def key_coefficients(gate, up, act):
    """The key coefficients (section 4.4): h W_gate and h W_up, both [..., d_m], and the activation
    function -> k [..., d_m]."""
    raise NotImplementedError("assignment 1: write key_coefficients")


''',
    "model.py::KeyValueMemory.forward": None,
}
REMOVE = ("infosteer.py::KeyCoefficients", "infosteer.py::SLOPES", *(
    f"tests/test_01_memory.py::test_a_{name}" for name in (
        "coefficient_is_the_activated_gate_times_up",
        "negative_up_makes_a_negative_coefficient_as_only_the_gate_is_activated")))
HINTS = (
    "A memory has two keys. The activation function opens or shuts the first, its gate. The second "
    "says how loudly it speaks, for or against. Steering sits between coefficients and sum.",
    "gate and up: [B, T, d] -> [B, T, d_m] each. k_i = act(gate_i) * up_i. Then k is changed, then "
    "measured, then used: answer = sum_i k_i v_i, [B, T, d_m] -> [B, T, d]. `values` is a Linear.",
    "Compute the coefficients from key_gate of h, key_up of h and act. Start with flux and reward "
    "None. If there is a steering, replace the coefficients by what its change gives for them, and "
    "take both numbers from its measure of the new ones. Return values of them, and both numbers.",
)


def layer(h, gate, up, values, act="silu"):
    """A layer with weights [d_m, d], [d_m, d], [d, d_m] and its input h [B, T, d], in fp64."""
    from model import Config, KeyValueMemory
    memory = KeyValueMemory(Config.from_dict(dict(
        model_type="llama", vocab_size=50, hidden_size=h.shape[-1], num_hidden_layers=1, head_dim=2,
        intermediate_size=len(gate), num_attention_heads=1, hidden_act=act))).double()
    for ours, given in zip(memory.parameters(), (gate, up, values)):
        ours.data.copy_(given)
    return memory, h.double()


def three_memories(h):                 # of tests/test_01_memory.py, for one token
    return layer(*map(torch.tensor, (
        [[h]], [[100.0, 0], [0, 100], [-100, 100]], [[1.0, 1], [1, 0], [0, 2]],
        [[1.0, 0, 5], [0, 10, 5]])))


def random_layer(seed, act="silu"):
    gate = draw(seed, 7, 4)                                                    # [d_m, d]
    h = draw(seed, 2, 3, 8)[..., :gate.shape[1]]                               # [B, T, d]
    return layer(h, gate, gate.flip(0).cos() - 0.3, gate.T.sin(), act)


def recalled(seed):
    for memory, h in map(three_memories, ([2.0, 3.0], [2.0, 1.0], [1.0, -3.0])):
        yield f"three memories, h = {h[0, 0].tolist()}", memory(h)[0]
    for act in ("silu", "gelu_pytorch_tanh"):
        memory, h = random_layer(seed, act)
        answer, *measured = memory(h)
        yield f"a random layer with {act}", answer
        yield "are flux and reward None without a steering?", measured == [None, None]


def steered(seed):
    from eval import Watch
    from infosteer import Steering
    memory, h = three_memories([2.0, 1.0])
    answer, flux, reward = memory(h, Steering("int", p=1 / 3))
    yield "three memories, int with p = 1/3, h = [2, 1]: the answer", answer
    yield "the flux there", flux
    yield "int has no reward there", reward is None
    (memory, h), seen = random_layer(seed), []
    answer, flux, _ = memory(h, Watch(lambda _, k: seen.append(k), Steering("int", p=0.3)))
    yield "a random layer, int with p = 0.3: the answer", answer
    yield "its flux", flux
    yield "the coefficients that a Watch sees", torch.cat(seen)


def gradients(seed):
    from infosteer import Steering
    memory, h = random_layer(seed)
    keys = {"key_gate": memory.key_gate.weight, "key_up": memory.key_up.weight}
    for name in ("reg", "int", "none"):
        answer, flux, reward = memory(h, Steering(name))
        yield f"{name}: is there a reward?", reward is not None
        total = answer.square().sum() + (0 if reward is None else reward.sum())
        for key, grad in zip(keys, torch.autograd.grad(total, keys.values())):
            yield f"{name}: the gradient of {key}", grad


PARTS = {"what is recalled": recalled, "where steering enters": steered, "gradients": gradients}
TOY, REAL = (f"python -m lab.memories --model {words}" for words in (
    "data/toy/llama --index 4:377", "MODELS/smollm2-135m-instruct --index 29:1407 --items 100"))
WRITTEN = {
    "coefficient": ("What is memory 4:377's largest key coefficient? What calls it (`why`)?", TOY),
    "probability": ("How many times as probable as others is what it says first?", TOY),
    "real coefficient": ("The largest one of a published model's memory 29:1407?", REAL)}

# ------------------------------------------------------------------------------- not handed out
NUMBERS = dict.fromkeys(WRITTEN, (lambda said: float(said.split("it:\n")[1].split()[0]), 0.01))
NUMBERS["probability"] = (lambda said: float(said.split("' x")[1].split()[0])), 0.01
FORWARD = """
class KeyValueMemory(nn.Module):
    def forward(self, h, steering=None):
        gate, up, flux, reward = self.key_gate(h), self.key_up(h), None, None
        k = self.act(gate) * up
        if steering is not None:
            k = steering.change(k)
            flux, reward = steering.measure(k)
        return self.values(k), flux, reward
"""
K = "self.act(gate) * up"
CHANGE, MEASURE = "k = steering.change(k)", "flux, reward = steering.measure(k)"
RIGHT = {
    "plain autograd": "def key_coefficients(gate, up, act):\n    return act(gate) * up\n",
    "all in forward": {"model.py": FORWARD},
    "einsum over memories": {"model.py": FORWARD.replace(
        "self.values(k)", 'torch.einsum("btm,dm->btd", k, self.values.weight)')},
}
WRONG = {why: {"model.py": FORWARD.replace(line, new)} for line, new, why in (
    (K, "self.act(gate * up)", "this is act(gate * up); only the gate is activated, so "
     "that a negative `up` can make a loud negative coefficient"),
    (K, "gate * self.act(up)", "gate and up are swapped: this is gate * act(up)"),
    (K, "self.act(gate)", "this is act(gate) alone; `up` says how loudly it speaks"),
    (K, "self.act(gate) + up", "this is act(gate) + up; a shut gate has to silence its "
     "memory, so they are multiplied"),
    (K, "gate * up", "this is gate * up; without `act` no gate is ever shut"),
    (CHANGE, "k = steering.change(self.act(gate)) * up",
     "the gate is steered; what is steered are the coefficients, after `up`"),
    (CHANGE, f"{MEASURE}; return self.values(steering.change(k)), flux, reward",
     "the flux is that of the coefficients before the change; measure what is used"),
    (MEASURE, f"{MEASURE}; k = self.act(gate) * up",
     "the changed coefficients are measured, but the answer is that of the old ones"),
    (MEASURE, "flux, reward = steering.measure(k.detach())",
     "the entropy is that of detached coefficients, so the reward teaches nothing"),
    (MEASURE, "flux = reward = steering.measure(k)[0]",
     "the flux is returned as the reward too; only some methods have a reward"),
)}
