"""After this file you know that five families are one transformer with a few traits, and that ours
computes what theirs do.

The golden files under golden/models were made once by golden/make_models.py, with the library that
published these families. Every tensor in them is random, norms and biases too, and the sequences
are longer than the sliding windows: what could be forgotten would be seen.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infosteer import Steering
from model import GLOBAL, LOCAL, Config, Transformer, make_view

pytestmark = pytest.mark.course
GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path.name for path in (GOLDEN / "models").iterdir() if path.is_dir())
PUBLISHED = json.loads((GOLDEN / "configs" / "parameters.json").read_text())
CLOSE = dict(atol=1e-4, rtol=0)


@pytest.fixture(params=MODELS)
def golden(request):
    """(a model, what the reference library says about the same weights)"""
    folder = GOLDEN / "models" / request.param
    return Transformer.from_pretrained(folder), load_file(folder / "golden.safetensors")


def read(*path):
    return json.loads(Path(GOLDEN, *path).read_text())


# ------------------------------------------------------------------------- one layer after another


@torch.no_grad()
def states_of(model, tokens):
    """What enters the first block, and what each block makes of it: n_layers + 1 times [B, T, d].

    A transformer is this loop. `Transformer.hidden` has the same one, and a norm after it.
    """
    config, T = model.config, tokens.shape[1]
    views = {kind: make_view(config, kind, None, T, T, tokens.device) for kind in config.rope}
    states = [model.embed(tokens) * (config.d ** 0.5 if config.scale_embeddings else 1)]
    for block, kind in zip(model.blocks, config.layer_types):
        state, flux, reward = block(states[-1], views[kind])
        states.append(state)
    return states


def first_difference(states, expected):
    """The first layer whose state is not the reference's, in words; None where there is none."""
    for layer, (ours, theirs) in enumerate(zip(states, expected, strict=True)):
        error = (ours - theirs).abs().max().item()
        if not error < 1e-4:           # so that NaN is a difference too
            name = f"layer {layer}" if layer else "embedding"
            return f"{name}: off by {error:.2g}"
    return None


def test_every_layer_equals_the_reference(golden):
    model, expected = golden
    assert first_difference(states_of(model, expected["tokens"]), expected["states"]) is None


def test_the_logits_equal_the_reference(golden):
    model, expected = golden
    logits = model(expected["tokens"])                                         # [B, T, V]
    assert logits.dtype == torch.float32 and expected["logits"].std() > 0.5
    torch.testing.assert_close(logits, expected["logits"], **CLOSE)


def test_a_difference_names_the_layer_where_it_begins(golden):
    model, expected = golden
    for layer in range(model.config.n_layers, 0, -1):      # from the last, so that one shows first
        with torch.no_grad():
            model.blocks[layer - 1].memory.values.weight[0, 0] += 1
        difference = first_difference(states_of(model, expected["tokens"]), expected["states"])
        assert difference.startswith(f"layer {layer}: off by ")


def test_a_wrong_embedding_is_named_as_such(golden):
    model, expected = golden
    with torch.no_grad():
        model.embed.weight += 1
    difference = first_difference(states_of(model, expected["tokens"]), expected["states"])
    assert difference.startswith("embedding: off by ")


# ------------------------------------------------------------------------------------ other ways


def test_every_family_is_there():
    families = {read("models", name, "config.json")["model_type"] for name in MODELS}
    assert families == {"llama", "qwen2", "qwen3", "gemma2", "gemma3_text"}


@pytest.mark.parametrize("name", MODELS)
def test_classic_and_newer_config_keys_mean_the_same(name):
    classic, newer = (read("models", name, file) for file in ("config_classic.json", "config.json"))
    assert "rope_parameters" in newer and not {"rope_parameters", "layer_types"} & classic.keys()
    same = Transformer(Config.from_dict(classic))
    same.load_state_dict(Transformer.from_pretrained(GOLDEN / "models" / name).state_dict())
    expected = load_file(GOLDEN / "models" / name / "golden.safetensors")
    torch.testing.assert_close(same(expected["tokens"]), expected["logits"], **CLOSE)


def test_padding_on_the_right_changes_nothing(golden):
    model, expected = golden
    padded = torch.nn.functional.pad(expected["tokens"][:, :20], (0, 7), value=3)
    torch.testing.assert_close(model(padded)[:, :20], expected["logits"][:, :20], **CLOSE)


def test_recomputing_activations_changes_no_gradient(golden):
    model, expected = golden
    gradients = []
    for checkpoint in (False, True):
        hidden, flux, _ = model.hidden(expected["tokens"], Steering("reg"), checkpoint=checkpoint)
        (model.logits(hidden).logsumexp(-1).mean() - flux.mean()).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
        model.zero_grad()
    for one, other in zip(*gradients):
        assert torch.equal(one, other) and one.any()


# --------------------------------------------------------------------- configurations as published


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_as_many_parameters_as_the_reference(name):
    config = Config.from_dict(read("configs", f"{name}.json"))
    with torch.device("meta"):         # a tensor there has a shape and no numbers
        model = Transformer(config)
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]


def test_gemma_2_slides_in_every_other_layer():
    config = Config.from_dict(read("configs", "gemma-2-2b.json"))
    assert config.layer_types == (LOCAL, GLOBAL) * 13 and config.window == 4096


def test_gemma_3_slides_in_five_of_six_layers_with_a_rotary_base_of_their_own():
    config = Config.from_dict(read("configs", "gemma-3-1b-pt.json"))
    assert config.layer_types[:7] == (LOCAL,) * 5 + (GLOBAL, LOCAL) and config.window == 512
    assert config.rope[LOCAL]["rope_theta"] == 10_000
    assert config.rope[GLOBAL]["rope_theta"] == 1_000_000


def test_a_model_without_memory_tells_its_shapes():
    with torch.device("meta"):
        model = Transformer(Config.from_pretrained(GOLDEN / "models" / "llama3"))
        tokens = torch.zeros(2, 9, dtype=torch.long)
    assert model(tokens).shape == (2, 9, model.config.vocab_size)
