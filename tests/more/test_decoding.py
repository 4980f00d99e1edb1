"""Decoding within limits: batches, budgets and passes of any size give the same ids, and no forward
pass does more than it is asked for."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import BadInput
from infosteer import Steering
from model import Transformer

GOLDEN = Path(__file__).parent.parent / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
SINGLES = [[i] for i in range(3, 40)]


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    """(a model, prompts, what it continues each with when it is alone)"""
    model = Transformer.from_pretrained(GOLDEN / request.param)
    file = load_file(GOLDEN / request.param / "golden.safetensors")
    prompts = [row[:n].tolist() for row, n in zip(file["prompts"], file["prompt_lengths"])]
    prompts += [[5, 6, 7] + prompt for prompt in prompts]
    return model, prompts, [model.generate([prompt], 24)[0] for prompt in prompts]


class Counted(Transformer):
    """A model that remembers what it was asked for."""

    def __init__(self, config):
        super().__init__(config)
        self.head_rows, self.read_tokens, self.cache_sizes = [], [], []

    def logits(self, hidden):
        self.head_rows.append(hidden[..., 0].numel())
        return super().logits(hidden)

    def hidden(self, tokens, *rest, **more):
        self.read_tokens.append(tokens.numel())
        return super().hidden(tokens, *rest, **more)

    def new_cache(self, B, longest):
        cache = super().new_cache(B, longest)
        self.cache_sizes.append(sum(
            tensor.numel() * tensor.element_size() for layer in cache for tensor in layer))
        return cache


@pytest.fixture
def counted():
    return Counted.from_pretrained(GOLDEN / "llama3")


# ---------------------------------------------------------------------------- the same whatever way


@pytest.mark.parametrize("settings", [
    dict(cache_bytes=1), dict(cache_bytes=50_000), dict(prefill_tokens=1),
    dict(prefill_tokens=15), dict(max_batch=5, prefill_tokens=24)], ids=str)
def test_every_way_to_split_a_request_gives_the_same_ids(golden, settings):
    model, prompts, expected = golden
    assert model.generate(prompts[::-1], 24, **settings) == expected[::-1]


@pytest.mark.parametrize("prefill_tokens", [1, 15, None])
def test_a_shared_prefix_may_be_followed_by_several_passes(golden, prefill_tokens):
    model, prompts, _ = golden
    shared = [[9, 8, 7, 6] + prompt for prompt in prompts]
    alone = [model.generate([prompt], 12)[0] for prompt in shared]
    assert model.generate(shared, 12, prefill_tokens=prefill_tokens) == alone


def test_equal_prompts_are_continued_alike(golden):
    model, prompts, expected = golden
    assert model.generate([prompts[1]] * 3, 24) == [expected[1]] * 3


def test_nothing_to_do_is_done():
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    assert model.generate([], 5) == []
    assert model.generate([[3], [4, 5]], 0) == [[], []]
    assert model.log_likelihood([], []) == []


@pytest.mark.parametrize("prompts", [[[3], []], [[3], [10**6]], [[3], [-1]], [[3], [4, 96]]])
def test_a_prompt_that_the_model_cannot_read_is_named(prompts):
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    with pytest.raises(BadInput, match="prompt 1 .* ids from 0 to 95 are needed"):
        model.generate(prompts, 5)


def test_finished_rows_are_reported_once_each():
    model, counts = Transformer.from_pretrained(GOLDEN / "llama3"), []
    model.generate(SINGLES, 16, max_batch=10, done=counts.append)
    assert sum(counts) == len(SINGLES) and min(counts) >= 0


def test_finished_pairs_are_reported_once_each():
    model, counts = Transformer.from_pretrained(GOLDEN / "llama3"), []
    labels = [[5], [6], [7, 8], [7, 9], [7, 9, 10]]
    model.log_likelihood([[3, 4]] * 5, labels, batch_tokens=6, done=counts.append)
    assert sum(counts) == 5


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_likelihoods_do_not_depend_on_the_batch(golden, batch_tokens):
    model, prompts, expected = golden
    pairs = [(prompt, new[:n]) for prompt, new in zip(prompts, expected) for n in (1, 2, 5)]
    pairs += [([3, 4], [9]), ([3, 4], [10]), ([3], [4, 9])]       # one text for the model to read
    scores = model.log_likelihood(*zip(*pairs), batch_tokens=batch_tokens)
    alone = [model.log_likelihood([prompt], [new])[0] for prompt, new in pairs]
    assert scores == pytest.approx(alone, abs=1e-4)


def test_a_steering_is_used_in_likelihoods():
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    steering, ids = Steering("int", p=0.2, alpha=3.0), [3, 4, 5, 6]
    found, = model.log_likelihood([ids[:2]], [ids[2:]], steering)
    log_p = model(torch.tensor([ids]), steering)[0].log_softmax(-1)
    assert found == pytest.approx((log_p[1, 5] + log_p[2, 6]).item(), abs=1e-4)
    assert found != pytest.approx(model.log_likelihood([ids[:2]], [ids[2:]])[0], abs=1e-3)


def test_each_continuation_needs_a_prompt():
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    with pytest.raises(ValueError):
        model.log_likelihood([[3], [4]], [[5]])


# ------------------------------------------------------------------------ no more than asked for


def test_training_runs_the_lm_head_on_the_asked_positions_only(counted):
    at = torch.tensor([3, 4, 17])
    logits, flux, _ = counted.predict(torch.arange(18).view(2, 9), at, Steering("reg"))
    assert counted.head_rows == [3] and logits.shape == (3, counted.config.vocab_size)
    assert flux.shape == (counted.config.n_layers, 2, 9)           # of all positions
    everywhere = counted(torch.arange(18).view(2, 9)).flatten(0, 1)
    torch.testing.assert_close(logits, everywhere[at])


def test_reading_prompts_runs_the_lm_head_on_their_last_positions_only(counted):
    counted.generate([[3, 4, 5], [6, 7, 8, 9], [10]], 1)
    assert counted.head_rows == [3]


def test_decoding_reads_one_token_for_each_row_that_goes_on(counted):
    rows = counted.generate(SINGLES, 16)
    alive = [sum(len(row) > step for row in rows) for step in range(max(map(len, rows)))]
    assert counted.head_rows == alive and len(set(alive)) > 1
    assert counted.read_tokens == alive                    # prompts of one token, then new ones


def test_likelihoods_run_the_lm_head_once_for_each_place(counted):
    # Places: the 4, for 9, 10 and 11; and the 9 after it, for 11 and 12. All is read once.
    counted.log_likelihood([[3, 4]] * 4, [[9], [10], [9, 11], [9, 12]])
    assert sum(counted.head_rows) == 2 and sum(counted.read_tokens) == 3


def test_an_items_prompt_is_read_once_for_all_its_options(counted):
    prompts = [[5] * 20, [6] * 20]
    options = [[7, 8, 9], [10, 11, 12], [13, 14, 15]]
    counted.log_likelihood([p for p in prompts for _ in options], options * 2)
    assert sum(counted.read_tokens) == 2 * (20 + 3 * 2) and sum(counted.head_rows) == 2 * 7


def test_prompts_are_read_in_passes_of_the_size_asked_for(counted):
    counted.generate([[i, i + 1, i + 2, i + 3] for i in range(30)], 1, prefill_tokens=40)
    assert counted.read_tokens == [40, 40, 40]


def test_a_prefix_shared_by_all_prompts_is_read_once(counted):
    counted.generate([[5] * 20 + [i] for i in range(6, 36)], 1)
    assert counted.read_tokens == [20, 30]


def test_caches_stay_within_their_budget(counted):
    counted.generate([[i] * (1 + i % 9) for i in range(3, 90)], 12, cache_bytes=60_000)
    assert len(counted.cache_sizes) > 3 and 40_000 < max(counted.cache_sizes) <= 60_000


def test_no_batch_has_more_rows_than_asked_for(counted):
    counted.generate(SINGLES, 1, max_batch=10)
    assert counted.head_rows == [10, 10, 10, 7]
