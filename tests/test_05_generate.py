"""After this file you know how a batch of ragged prompts is decoded with a key-value cache, without changing what each would say alone."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import BadInput
from infosteer import Steering
from model import Transformer

GOLDEN = Path(__file__).parent / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    """(model, prompts, what the reference continues each with, alone)"""
    folder = GOLDEN / request.param
    model, file = Transformer.from_pretrained(folder), load_file(folder / "golden.safetensors")
    prompts = [row[:n].tolist() for row, n in zip(file["prompts"], file["prompt_lengths"])]
    return model, prompts, [until_eos(model, row) for row in file["generated"].tolist()]


def until_eos(model, ids):
    """The reference stops at generation_config.json's ids only, where that file has some; ours at those of config.json too."""
    ids = [i for i in ids if i >= 0]
    return ids[:next((n for n, i in enumerate(ids, 1) if i in model.config.eos_ids), len(ids))]


def test_ragged_prompts_continue_as_the_reference_continues_each_alone(golden):
    model, prompts, expected = golden
    assert model.generate(prompts, 24) == expected
    assert {len(row) for row in expected} != {24}, "some row should stop early"


def test_every_way_to_split_a_request_gives_the_same_ids(golden):
    model, prompts, expected = golden
    for settings in (dict(max_batch=1), dict(max_batch=3), dict(cache_bytes=1), dict(cache_bytes=50_000)):
        assert model.generate(prompts[::-1], 24, **settings) == expected[::-1]


def test_prompts_read_in_several_passes_give_the_same_ids(golden, monkeypatch):
    model, prompts, expected = golden
    monkeypatch.setattr("model.PREFILL_TOKENS", (15, 15))
    assert model.generate(prompts, 24) == expected
    longer = [[5, 6, 7] + prompt for prompt in prompts]
    assert model.generate(longer, 24) == [model.generate([prompt], 24)[0] for prompt in longer]


def test_a_prefix_shared_by_the_batch_changes_nothing(golden):
    model, prompts, _ = golden
    longer = [[5, 6, 7, 8, 9, 10, 11, 12, 13] + prompt for prompt in prompts] + [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]] * 2
    alone = [model.generate([prompt], 24)[0] for prompt in longer]
    assert model.generate(longer, 24) == alone


def test_generation_without_a_cache_gives_the_same_ids(golden):
    model, prompts, expected = golden
    for prompt, new in zip(prompts, expected):
        tokens = prompt + new
        with torch.no_grad():
            choices = model(torch.tensor([tokens]))[0].argmax(-1).tolist()
        assert choices[len(prompt) - 1:-1] == new


def test_rows_stop_at_any_end_of_sequence_id_which_is_their_last():
    several = 0
    for name in MODELS:
        model = Transformer.from_pretrained(GOLDEN / name)
        config, path = json.loads((GOLDEN / name / "config.json").read_text()), GOLDEN / name / "generation_config.json"
        stated = [config.get("eos_token_id"), json.loads(path.read_text()).get("eos_token_id") if path.exists() else None]
        stated = {i for ids in stated if ids is not None for i in (ids if isinstance(ids, list) else [ids])}
        assert set(model.config.eos_ids) == stated
        several += len(stated) > 1
        prompts = [[i] for i in range(3, 40)]
        for row in model.generate(prompts, 16):
            assert not stated & set(row[:-1]) and (len(row) == 16 or row[-1] in stated)
    assert several


def test_limits():
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    assert model.generate([], 5) == [] and model.generate([[3], [4, 5]], 0) == [[], []]
    for prompts, word in (([[3], []], "prompt 1 is empty"), ([[3, 10**6]], "outside"), ([[-1]], "outside")):
        with pytest.raises(BadInput, match=word):
            model.generate(prompts, 5)


def test_finished_rows_are_reported_once_each():
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    counts = []
    model.generate([[i] for i in range(3, 40)], 16, max_batch=10, done=counts.append)
    assert sum(counts) == 37


def test_the_intervention_can_stay_on_while_decoding():
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    prompts = [[i, i + 1] for i in range(3, 40)]
    steering = Steering("int", p=0.3, alpha=3.0)
    steered = model.generate(prompts, 8, steering)
    assert steered != model.generate(prompts, 8)
    assert steered == [model.generate([prompt], 8, steering)[0] for prompt in prompts]


def test_likelihood_of_continuations_equals_the_chain_rule(golden):
    model, prompts, expected = golden
    pairs = [(prompt, new[:n]) for prompt, new in zip(prompts, expected) for n in (1, 2, 5)] + [([3, 4], [9]), ([3, 4], [10])]
    scores = model.log_likelihood(*zip(*[(prompt, list(new)) for prompt, new in pairs]), batch_tokens=40)
    for (prompt, new), score in zip(pairs, scores):
        log_p = model(torch.tensor([prompt + list(new)]))[0].log_softmax(-1)
        by_hand = sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(new))
        assert score == pytest.approx(by_hand, abs=1e-4)


def test_the_cache_stays_within_its_budget(monkeypatch):
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    sizes, new_cache = [], Transformer.new_cache

    def watched(self, B, longest):
        cache = new_cache(self, B, longest)
        sizes.append(sum(t.numel() * t.element_size() for layer in cache for t in layer))
        return cache

    monkeypatch.setattr(Transformer, "new_cache", watched)
    model.generate([[i] * (1 + i % 9) for i in range(3, 90)], 12, cache_bytes=60_000)
    assert len(sizes) > 3 and 40_000 < max(sizes) <= 60_000
