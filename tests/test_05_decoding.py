"""After this file you know how a batch of ragged prompts is decoded with a key-value cache, and
that this changes nothing: each prompt is continued as it would be alone.

The golden files hold how the reference library continues each prompt alone, greedily, with 24 ids
at most.
"""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infosteer import Steering
from model import Transformer

pytestmark = pytest.mark.course
GOLDEN = Path(__file__).parent / "golden" / "models"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    """(a model, four prompts, what the reference continues each with)"""
    model = Transformer.from_pretrained(GOLDEN / request.param)
    file = load_file(GOLDEN / request.param / "golden.safetensors")
    prompts = [row[:n].tolist() for row, n in zip(file["prompts"], file["prompt_lengths"])]
    return model, prompts, [until_the_end(model, row) for row in file["generated"].tolist()]


def until_the_end(model, ids):
    """A row of the golden file without its padding, -1, up to the first id that ends a text.

    The reference stops at the ids of generation_config.json only, if that file has some. We also
    stop at those of config.json.
    """
    ids = [i for i in ids if i >= 0]
    ends = [n for n, i in enumerate(ids, 1) if i in model.config.eos_ids]
    return ids[:min(ends, default=len(ids))]


def test_ragged_prompts_continue_as_the_reference_continues_each_alone(golden):
    model, prompts, expected = golden
    assert model.generate(prompts, 24) == expected
    assert {len(row) for row in expected} != {24}, "some row should stop early"


def test_reading_the_whole_text_again_for_each_new_id_gives_the_same_ids(golden):
    model, prompts, expected = golden
    for prompt, new in zip(prompts, expected):
        with torch.no_grad():
            choices = model(torch.tensor([prompt + new]))[0].argmax(-1).tolist()
        assert choices[len(prompt) - 1:-1] == new


def test_reading_token_by_token_from_the_cache_gives_the_same_logits(golden):
    # The cache holds the keys and values of attention, one of each for a token. The keys and values
    # of the memories are weights: they are the same for all tokens, and no cache holds them.
    model, prompts, expected = golden
    tokens = torch.tensor([max(prompts, key=len) + expected[0]])               # [1, T]
    T = tokens.shape[1]
    cache = model.new_cache(1, T)
    with torch.no_grad():
        states = [model.hidden(tokens[:, :5], cache=cache)[0]]
        for place in range(5, T):
            positions = torch.tensor([[place]])
            states.append(model.hidden(tokens[:, place:place + 1], None, positions, cache)[0])
        logits = model.logits(torch.cat(states, 1))
        torch.testing.assert_close(logits, model(tokens), atol=1e-4, rtol=0)


def test_a_row_stops_at_any_id_that_ends_a_text_and_that_id_is_its_last(golden):
    model, _, _ = golden
    ends = set(model.config.eos_ids)
    for row in model.generate([[i] for i in range(3, 40)], 16):
        assert not ends & set(row[:-1])
        assert len(row) == 16 or row[-1] in ends


def test_ids_that_end_a_text_come_from_both_files():
    # config.json of this model has 6 and 4, and generation_config.json 6 and 32.
    assert Transformer.from_pretrained(GOLDEN / "gemma3_plain").config.eos_ids == (6, 4, 32)


def test_a_prefix_shared_by_the_batch_changes_nothing(golden):
    model, prompts, _ = golden
    shared = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    longer = [shared + prompt for prompt in prompts] + [shared + [14]] * 2
    assert model.generate(longer, 24) == [model.generate([prompt], 24)[0] for prompt in longer]


def test_steering_can_stay_on_while_decoding():
    model = Transformer.from_pretrained(GOLDEN / "llama3")
    prompts, steering = [[i, i + 1] for i in range(3, 40)], Steering("int", p=0.3, alpha=3.0)
    steered = model.generate(prompts, 8, steering)
    assert steered != model.generate(prompts, 8)
    assert steered == [model.generate([prompt], 8, steering)[0] for prompt in prompts]


def test_the_likelihood_of_a_continuation_is_the_product_over_its_tokens(golden):
    model, prompts, expected = golden
    for prompt, new in zip(prompts, expected):
        score, = model.log_likelihood([prompt], [new[:5]])
        log_p = model(torch.tensor([prompt + new[:5]]))[0].log_softmax(-1)     # [T, V]
        by_hand = sum(log_p[len(prompt) - 1 + n, i].item() for n, i in enumerate(new[:5]))
        assert score == pytest.approx(by_hand, abs=1e-4)
