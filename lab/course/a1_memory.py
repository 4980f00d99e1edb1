"""A memory on paper

A feed-forward layer is a memory: it looks up vectors and adds them, as strongly as its key
coefficients say. Write the two functions in which this happens: `key_coefficients` in infosteer.py,
and `KeyValueMemory.forward` in model.py, where steering enters. The layer's parts (`key_gate`,
`key_up`, `act`, `values`) are made by its `__init__`. What forward returns:

- the answer [B, T, d]: the memory vectors, weighted by the coefficients and summed (equation 3);
- flux and reward [B, T], as `steering.measure(k)` gives them, or None where there is no steering.

`steering.change(k)` gives the coefficients that the layer shall use. The flux is that of what is
used. In the paper: equation 3, and section 4.4 for the gate. Here: tests/test_01_memory.py, whose
layer of three memories you can follow on paper.
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
    "model.py::KeyValueMemory.forward": '''
    def forward(self, h, steering=None):                                       # h: [B, T, d]
        raise NotImplementedError("assignment 1: write KeyValueMemory.forward")


''',
}
REMOVE = (
    "infosteer.py::KeyCoefficients", "infosteer.py::SLOPES",
    "tests/test_01_memory.py::test_a_coefficient_is_the_activated_gate_times_up",
    "tests/test_01_memory.py::test_a_negative_up_makes_a_negative_coefficient_as_only_the_gate_is_"
    "activated",
)
HINTS = (
    "A memory has two keys. The first decides whether it is called: a gate, open or shut by the "
    "activation function. The second says how loudly it speaks, and for or against. Then everything "
    "is added up. Steering sits between the coefficients and the sum.",
    "gate and up: [B, T, d] -> [B, T, d_m] each. k_i = act(gate_i) * up_i. Then k is changed, then "
    "measured, then used: answer = sum_i k_i v_i, [B, T, d_m] -> [B, T, d]. `values` is a Linear.",
    "Compute the coefficients from self.key_gate(h), self.key_up(h) and self.act. Start with flux and "
    "reward None. If there is a steering, replace the coefficients by what its change gives for them, "
    "and take both numbers from its measure of the new ones. Return self.values of the coefficients, "
    "the flux, the reward.",
)


def layer(h, weights, act="silu"):
    """A layer with weights [d_m, d], [d_m, d] and [d, d_m], and its input h [B, T, d], in fp64."""
    from model import Config, KeyValueMemory
    memory = KeyValueMemory(Config.from_dict(dict(
        model_type="llama", vocab_size=50, hidden_size=h.shape[-1], num_hidden_layers=1, head_dim=2,
        intermediate_size=len(weights[0]), num_attention_heads=1, hidden_act=act))).double()
    for ours, given in zip(memory.parameters(), weights):
        ours.data.copy_(given)
    return memory, h


def three_memories(h):                 # of tests/test_01_memory.py, for one token
    return layer(torch.tensor([[h]]).double(), [torch.tensor(weight) for weight in (
        [[100.0, 0], [0, 100], [-100, 100]], [[1.0, 1], [1, 0], [0, 2]], [[1.0, 0, 5], [0, 10, 5]])])


def random_layer(seed, act="silu"):
    gate, up = draw(seed, 7, 4), draw(seed, 7, 4).cos()                        # [d_m, d]
    h = draw(seed, 2, 3, 8)[..., :gate.shape[1]]                               # [B, T, d]
    return layer(h, [gate, up.flip(0) - 0.3, gate.T.sin()], act)


def recalled(seed):
    for h in ([2.0, 3.0], [2.0, 1.0], [1.0, -3.0]):
        memory, h = three_memories(h)
        yield f"three memories, h = {h[0, 0].tolist()}", memory(h)[0]
    for act in ("silu", "gelu_pytorch_tanh"):
        memory, h = random_layer(seed, act)
        answer, flux, reward = memory(h)
        yield f"a random layer with {act}", answer
        yield "without steering, flux and reward are None", flux is None and reward is None


def steered(seed):
    from eval import Watch
    from infosteer import Steering
    memory, h = three_memories([2.0, 1.0])
    answer, flux, reward = memory(h, Steering("int", p=1 / 3))
    yield "three memories, int with p = 1/3, h = [2, 1]: the answer", answer
    yield "the flux there", flux
    yield "int has no reward", reward is None
    (memory, h), seen = random_layer(seed), []
    answer, flux, _ = memory(h, Watch(lambda _, k: seen.append(k), Steering("int", p=0.3)))
    yield "a random layer, int with p = 0.3: the answer", answer
    yield "its flux", flux
    yield "the coefficients that a Watch sees", torch.cat(seen)


def gradients(seed):
    from infosteer import Steering
    (memory, h), keys = random_layer(seed), ("key_gate.weight", "key_up.weight")
    weights = [weight for name, weight in memory.named_parameters() if name in keys]
    for name in ("reg", "int", "none"):
        answer, flux, reward = memory(h, Steering(name))
        yield f"{name}: is there a reward?", reward is not None
        total = answer.square().sum() + (0 if reward is None else reward.sum())
        for key, grad in zip(keys, torch.autograd.grad(total, weights)):
            yield f"{name}: gradient of answer and reward by {key}", grad


PARTS = {"what is recalled": recalled, "where steering enters": steered, "gradients": gradients}
MEMORY = "python -m lab.memories --model data/toy/llama --index 4:377"
WRITTEN = {
    "coefficient": ("What is the largest key coefficient of memory 4:377 in the texts that are "
                    "read? Under `why`: what do the contexts that activate it have in common?", MEMORY),
    "probability": ("How probable is the token that this memory says first, in percent? Under `why`: "
                    "what would it be if all tokens were alike, and so why is its Spec 0.0008?", MEMORY),
}

# ------------------------------------------------------------------------------- not handed out

NUMBERS = {
    "coefficient": (lambda out: float(out.split("follows it:\n")[1].split()[0]), 0.01),
    "probability": (lambda out: float(out.split("\nsays ")[1].split("%")[0].split()[-1]), 0.01),
}
PRODUCT = "def key_coefficients(gate, up, act):\n    return act(gate) * up\n"
FORWARD = """
class KeyValueMemory(nn.Module):
    def forward(self, h, steering=None):
        gate, up = self.key_gate(h), self.key_up(h)
        k, flux, reward = self.act(gate) * up, None, None
        if steering is not None:
            k = steering.change(k)
            flux, reward = steering.measure(k)
        return self.values(k), flux, reward
"""
CHANGE, MEASURE, END = FORWARD.splitlines(keepends=True)[-3:]


def keys(text):
    return {"infosteer.py": PRODUCT.replace("act(gate) * up", text)}


def forward(line, new):
    return {"model.py": FORWARD.replace(line, f"            {new}\n")}


RIGHT = {
    "plain autograd": {"infosteer.py": PRODUCT},
    "all in forward": {"model.py": FORWARD},
    "einsum over memories": {"infosteer.py": PRODUCT, "model.py": FORWARD.replace(
        "self.values(k)", 'torch.einsum("btm,dm->btd", k, self.values.weight)')},
}
WRONG = {
    "product activated": ("this is act(gate * up); the activation opens or shuts the gate alone, and a "
                          "negative `up` makes a loud negative coefficient", keys("act(gate * up)")),
    "swapped": ("gate and up are swapped: this is gate * act(up)", keys("gate * act(up)")),
    "gate alone": ("this is act(gate) alone; `up` says how loudly a memory speaks", keys("act(gate)")),
    "sum": ("this is act(gate) + up; a shut gate has to silence a memory, so they are multiplied",
            keys("act(gate) + up")),
    "no activation": ("this is gate * up; without the activation no gate is ever shut",
                      keys("gate * up")),
    "both activated": ("this is act(gate) * act(up); only the gate is activated",
                       keys("act(gate) * act(up)")),
    "steers the gate": ("the gate is steered; what is steered are the coefficients, after `up`",
                        forward(CHANGE, "k = steering.change(self.act(gate)) * up")),
    "flux before": ("the flux is that of the coefficients before the change; measure what is used",
                    {"model.py": FORWARD.replace(CHANGE + MEASURE, MEASURE + CHANGE)}),
    "change not used": ("the changed coefficients are measured, but the answer is that of the old ones",
                        forward(CHANGE + MEASURE, "flux, reward = steering.measure("
                                "steering.change(k))")),
    "detached": ("the entropy is that of detached coefficients, so the reward teaches nothing",
                 forward(MEASURE, "flux, reward = steering.measure(k.detach())")),
    "flux is the reward": ("the flux is returned as the reward too; only some methods have a reward",
                           forward(MEASURE, "flux = reward = steering.measure(k)[0]")),
    "h added": ("h is added to the answer; the block does that, after the memory",
                {"model.py": FORWARD.replace("self.values(k),", "h + self.values(k),")}),
}
