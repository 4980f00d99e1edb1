"""What steering has to be compared with: random sets, dropout, knowledge entropy, resuscitation,
and rivals that do not steer.

After reading this you know what each of them computes, from what randomness is drawn, and that no
micro-batch, machine or interruption changes it.
"""
import inspect
import json
import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import train
from data import BadInput
from helpers import Interrupted, checkpoint_folder, even_or_odd, run_of, write_task
from infosteer import (Before, Steering, divergence, dropout, intervene, key_entropy,
                       knowledge_entropy, resuscitation, shares, uniform)
from lab.experiment import CONTROLS, main
from lab.report import method_of, read_log
from lab.stats import comparable, compare, scan
from model import Config, Transformer
from train import collate, encode, micro_batches, read_settings, step_loss

# Three rows of six tokens with forty memories each, of both signs, and the dice of these rows.
K = torch.randn(3, 6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DICE = torch.tensor([[0, 5, 17, 2], [0, 5, 3, 2], [0, 5, 2**40, 2]])   # seed, step, row, layer


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------- what is drawn


def uniform_by_hand(numbers):
    """SplitMix64 as published, over whole numbers of any size, chained over `numbers`."""
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x = x ^ x >> 31
    return (x >> 40) / 2**24


def drawn_by_hand(dice, T, d_m):
    return torch.tensor([[[uniform_by_hand([*row, t, i]) for i in range(d_m)] for t in range(T)]
                         for row in dice.tolist()])


def test_numbers_are_hashes_of_seed_step_row_layer_position_and_memory():
    assert torch.equal(uniform(DICE, K), drawn_by_hand(DICE, 6, 40))


def test_numbers_are_spread_evenly_and_do_not_follow_each_other():
    rows = torch.tensor([[0, 0, row, 0] for row in range(50)])
    u = uniform(rows, torch.empty(50, 20, 100)).double()
    assert 0 <= u.min() and u.max() < 1
    counts = u.flatten().mul(100).long().bincount(minlength=100)               # 1,000 each
    assert ((counts - 1000).square() / 1000).sum() < 160       # chi squared: 99 degrees of freedom
    for dim in range(3):               # neighbours in rows, positions, memories
        a, b = u.narrow(dim, 0, u.shape[dim] - 1) - 0.5, u.narrow(dim, 1, u.shape[dim] - 1) - 0.5
        assert (a * b).mean().abs() * 12 < 4 / math.sqrt(a.numel())


def test_other_seeds_steps_rows_and_layers_draw_other_numbers():
    dice = torch.tensor([[1, 1, 1, 1], [2, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 1], [1, 1, 1, 2]])
    u = uniform(dice, torch.empty(5, 6, 40))
    apart = (u[:, None] - u).abs().mean((2, 3)) + torch.eye(5)
    assert (apart > 0.25).all()                                # a third for independent ones


def test_neither_padding_nor_the_other_rows_of_a_pass_change_what_is_drawn():
    wide = uniform(DICE, torch.empty(3, 9, 40))
    assert torch.equal(wide[:, :6], uniform(DICE, K))
    assert torch.equal(wide[1:2], uniform(DICE[1:2], torch.empty(1, 9, 40)))


def test_a_layer_adds_its_number_to_the_dice():
    steering = Steering("dropout", dice=DICE[:, :3])
    assert torch.equal(steering.at(2).dice, DICE) and steering.at(3).dice[0, 3] == 3


# ----------------------------------------------------------------- eq. 4 on a random set

VERSIONS = {"as it is called": intervene, "plain": inspect.unwrap(intervene)}
each_version = pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)


def random_intervention_by_hand(k, dice, p, alpha):
    n, u, new = max(1, round(p * k.shape[-1])), drawn_by_hand(dice, *k.shape[1:]), k.clone()
    for row, position in ((row, position) for row in range(k.shape[0])
                          for position in range(k.shape[1])):
        token, drawn = k[row, position].tolist(), u[row, position].tolist()
        mean = sum(map(abs, token)) / len(token)
        for i in sorted(range(len(token)), key=drawn.__getitem__)[:n]:
            new[row, position, i] = -alpha * mean if token[i] < 0 else alpha * mean
    return new


@each_version
@pytest.mark.parametrize("p, alpha", [(0.01, 1.0), (0.3, 2.0), (1.0, -0.5)])
def test_a_random_set_of_the_same_size_is_raised_under_its_own_sign(p, alpha, version):
    expected = random_intervention_by_hand(K, DICE, p, alpha)
    torch.testing.assert_close(version(K, p, alpha, "random", DICE), expected, rtol=1e-12, atol=0)


@each_version
def test_a_zero_in_a_random_set_counts_as_positive(version):
    k = torch.tensor([[[0.0, -0.0, 4.0, -4.0]]])
    assert version(k, 1.0, 1.0, "random", DICE[:1]).tolist() == [[[2, 2, 2, -2]]]


@each_version
def test_the_gradient_of_the_random_set_flows_through_the_mean_alone(version):
    assert torch.autograd.gradcheck(lambda k: version(k, 0.2, 2.0, "random", DICE[:1]),
                                    K[:1, :2].clone().requires_grad_())
    k = K.clone().requires_grad_()
    new = version(k, 1.0, 3.0, "random", DICE)                 # all are raised: to 3 mean|k|
    grad, = torch.autograd.grad(new[0, 0, 7], k)
    expected = torch.zeros_like(K)
    expected[0, 0] = 3 * K[0, 0, 7].sign() * K[0, 0].sign() / 40
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("steering", [
    Steering("int", p=0.5, rank_by="random"), Steering("dropout", p=0.5),
    Steering("semantic", p=0.5, rank_by="random", per_memory=torch.ones(2, 40).double())])
def test_nothing_random_happens_without_dice_as_at_test_time(steering):
    assert torch.equal(steering.at(1).change(K), K)
    assert not torch.equal(replace(steering, dice=DICE[:, :3]).at(1).change(K), K)


# ------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_equals_the_formula(p):
    kept = drawn_by_hand(DICE, 6, 40) >= p
    k = K.clone().requires_grad_()
    new = dropout(k, p, DICE)
    torch.testing.assert_close(new, K * kept / (1 - p))
    grad, = torch.autograd.grad((new * random(3, 6, 40, seed=1)).sum(), k)
    torch.testing.assert_close(grad, random(3, 6, 40, seed=1) * kept / (1 - p))


def test_dropout_drops_the_share_p_and_keeps_the_mean():
    dice = torch.tensor([[0, 0, row, 0] for row in range(100)])
    new = dropout(torch.ones(100, 10, 100), 0.3, dice)
    assert (new == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert new.mean().item() == pytest.approx(1, abs=0.01)
    assert dropout(torch.ones(100, 10, 100), 1.0, dice).abs().max() == 0
    assert dropout(torch.ones(2, 3, 4).bfloat16(), 0.3, dice[:2]).dtype == torch.bfloat16


# --------------------------------------------------------------------------- knowledge entropy


def entropy_of_the_mean(k):
    """H(qbar) of k [tokens, d_m] from its definition, differentiable throughout."""
    q = torch.stack([token.abs() / token.abs().sum() for token in k])
    qbar = q.mean(0)
    return -sum(share * share.log() for share in qbar)


def test_knowledge_entropy_has_the_value_and_the_gradient_of_the_entropy_of_the_mean():
    k = K.flatten(0, 1).clone().requires_grad_()                               # [18, d_m]
    expected = entropy_of_the_mean(k)
    slope, = torch.autograd.grad(expected, k)
    usage = shares(k.detach()).mean(0)
    mean = knowledge_entropy(k, usage).mean()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(torch.autograd.grad(mean, k)[0], slope, rtol=1e-9, atol=1e-12)
    own, = torch.autograd.grad(key_entropy(k).mean(), k)       # what reg rewards is something else
    assert (own - slope).norm() > 0.5 * slope.norm()


def test_tokens_that_use_different_memories_have_little_entropy_each_and_much_together():
    k = torch.eye(8) * torch.tensor([1.0, -1.0] * 4)
    assert key_entropy(k).max() < 1e-5
    assert knowledge_entropy(k, shares(k).mean(0)).mean().item() == pytest.approx(math.log(8))


def test_knowledge_entropy_is_finite_where_a_memory_is_never_used():
    k = torch.tensor([[1.0, 0.0, -2.0]], requires_grad=True)
    value = knowledge_entropy(k, shares(k.detach()).mean(0))
    value.sum().backward()
    assert value.isfinite().all() and k.grad.isfinite().all()


# ------------------------------------------------------------------------------ resuscitation


def before(keys):
    """What a method may look at, with coefficients [L, T, d_m] of two texts."""
    texts = [[layer[:5] for layer in keys], [layer[5:] for layer in keys]]
    return Before([], torch.zeros(1, 1), texts, keys.shape[1], torch.ones(1), 0)


def resuscitation_by_hand(keys, p, alpha):
    factors = torch.ones(keys.shape[0], keys.shape[2])
    for layer, k in enumerate(keys):
        usage = k.abs().mean(0).tolist()
        mean = sum(usage) / len(usage)
        for i in sorted(range(len(usage)), key=usage.__getitem__)[:max(1, round(p * len(usage)))]:
            factors[layer, i] = alpha * mean / usage[i]
    return factors


@pytest.mark.parametrize("p, alpha", [(0.01, 1.0), (0.5, 2.0)])
def test_resuscitation_equals_the_formula(p, alpha):
    keys = random(2, 14, 40, seed=3).float()
    found = resuscitation(Steering("resuscitation", p=p, alpha=alpha), before(keys))
    torch.testing.assert_close(found, resuscitation_by_hand(keys, p, alpha))


def test_resuscitation_leaves_other_layers_alone_and_no_factor_is_infinite():
    keys = random(3, 14, 40, seed=3).float()
    keys[1, :, 7] = 0                                          # a memory that is never used
    found = resuscitation(Steering("resuscitation", layers={2: {"alpha": 3.0}}), before(keys))
    assert (found[[0, 2]] == 1).all() and (found[1] != 1).nonzero().tolist() == [[7]]
    assert found[1, 7].item() == pytest.approx(3e6)
    assert (resuscitation(Steering("resuscitation", p=0.0), before(keys)) == 1).all()


def test_resuscitation_does_nothing_while_training():
    steering = Steering("resuscitation", per_memory=torch.full((2, 40), 5.0))
    assert steering.at(1).change(K) is K and steering.at(1).measure(K)[1] is None


# ------------------------------------------------------------------- KL the other way round


def test_the_divergence_of_a_memory_from_the_target_equals_the_formula():
    log_p = random(5, 12, seed=4).log_softmax(-1)
    target = random(12, seed=5).softmax(-1)
    expected = torch.stack([sum(q.exp() * (q - t.log()) for q, t in zip(row, target))
                            for row in log_p])
    torch.testing.assert_close(divergence(target, log_p, "memory"), expected)
    assert divergence(target, target.log()[None], "memory").abs().item() < 1e-12
    assert not torch.allclose(divergence(target, log_p), expected, rtol=0.01)


def test_a_token_that_no_response_holds_does_not_make_the_divergence_infinite():
    vectors, decode = random(2, 20, 8, seed=6).float(), random(30, 8, seed=7).float()
    target = torch.zeros(30).index_fill_(0, torch.tensor([3, 4]), 50.0)        # counts
    given = Before(vectors, decode, [], 0, target, 0)
    steering = Steering("surrogate", gamma=0.3, lambda_1=0.0, divergence="memory")
    found = train.METHODS["surrogate"].per_memory(steering, given)
    smooth = (target + 1) / 130
    for layer in range(2):
        log_p = (vectors[layer] @ decode.T).log_softmax(-1)
        score = -(log_p.exp() * (log_p - smooth.log())).sum(-1)
        score = (score - score.mean()) / score.std(correction=0)
        torch.testing.assert_close(found[layer], 1 + 0.3 * score, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- the loss of a step

RAW = dict(model_type="llama", vocab_size=80, hidden_size=32, intermediate_size=96,
           num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def model():
    model = Transformer(Config.from_dict(RAW)).initialise(3).double()
    for weight in model.parameters():
        weight.data.mul_(4)
    return model


def ragged(n=13):
    """[(ids, number of prompt ids)] of lengths from 6 to 30."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 30, (n,), generator=generator).tolist()
    return [(torch.randint(0, 80, (length,), generator=generator).tolist(), length - 1 - i % 5)
            for i, length in enumerate(lengths)]


def counts(rows):
    return (sum(len(ids) - n_prompt for ids, n_prompt in rows),
            sum(len(ids) - 1 for ids, _ in rows))


@pytest.mark.parametrize("smoothing, penalty", [(0.1, 0.0), (0.0, 0.5), (0.3, -0.2)])
def test_smoothed_labels_and_penalised_confidence_equal_their_formulas(model, smoothing, penalty):
    rows, terms = ragged(4), []
    for ids, n_prompt in rows:
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)             # [T, V]
        for place in range(n_prompt, len(ids)):
            p = log_p[place - 1]
            right = (1 - smoothing) * p[ids[place]] + smoothing * p.sum() / 80
            terms.append(-right + penalty * (p.exp() * p).sum())
    expected = torch.stack(terms).mean()
    loss, lm, *_ = step_loss(model, rows, *counts(rows), Steering(), smoothing=smoothing,
                             penalty=penalty)
    torch.testing.assert_close(loss, expected.to(loss), rtol=1e-5, atol=0)     # logits are fp32
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True),
                          torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert lm.item() == loss.item()


@pytest.mark.parametrize("budget", [40, 10**6])
def test_knowledge_entropy_is_that_of_the_whole_step_however_it_is_cut(model, budget):
    rows, steering = ragged(), Steering("knowledge-entropy", lam=0.7, layers={1: {}, 3: {}})
    weights = [block.memory.key_up.weight for block in model.blocks]
    keys = [torch.cat([k for ids, _ in rows for k in layer(model, ids, number)])
            for number, layer in enumerate([coefficients] * 3)]
    expected = torch.autograd.grad(
        sum(0.7 * entropy_of_the_mean(keys[layer]) for layer in (0, 2)), weights)
    batches = micro_batches(range(len(rows)), [len(ids) - 1 for ids, _ in rows], budget)
    usage = sum(model.totals(*collate([rows[row] for row in batch])[::2], shares)
                for batch in batches) / counts(rows)[1]
    for layer in range(3):
        torch.testing.assert_close(usage[layer], shares(keys[layer].detach()).mean(0))
    found, total = [0, 0, 0], 0
    for batch in batches:              # so many supervised tokens leave the reward alone
        loss, _, reward, _ = step_loss(model, [rows[row] for row in batch], 10**15,
                                       counts(rows)[1], replace(steering, per_memory=usage))
        parts = torch.autograd.grad(-loss, weights)
        found, total = [a + b for a, b in zip(found, parts)], total + reward
    torch.testing.assert_close(total, 0.7 * sum(entropy_of_the_mean(keys[i]) for i in (0, 2)))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def coefficients(model, ids, number):
    """k [T, d_m] of one layer for one unpadded text, with its gradient."""
    kept = []
    model.hidden(torch.tensor([ids[:-1]]), evaluation.Watch(
        lambda layer, k: kept.append(k[0]) if layer == number else None))
    return kept


# ------------------------------------------------------------------------------- whole runs

STEPS, OF_THE_MACHINE = 5, {"tokens_per_second", "examples_per_second", "peak_memory_bytes"}
RANDOM_SET = ["--steer", "int", "--rank-by", "random", "--p", "0.3"]
DROPOUT = ["--steer", "dropout", "--p", "0.3"]
KNOWLEDGE = ["--steer", "knowledge-entropy", "--lam", "2"]
ARMS = {
    "int-p0.3-random": RANDOM_SET, "dropout-p0.3": DROPOUT, "knowledge-entropy-lam2": KNOWLEDGE,
    "resuscitation-p0.5-alpha2": ["--steer", "resuscitation", "--p", "0.5", "--alpha", "2"],
    "none-anchor=100": ["--anchor", "100"],
    "none-label_smoothing=0.2": ["--label-smoothing", ".2"],
    "none-confidence_penalty=0.5": ["--confidence-penalty", "0.5"],
    "none-loss_on=all": ["--loss-on", "all"],
    "reg-lam0.1-anchor=5-label_smoothing=0.1-confidence_penalty=0.1-loss_on=all": [
        "--steer", "reg", "--lam", "0.1", "--anchor", "5", "--label-smoothing", "0.1",
        "--confidence-penalty", "0.1", "--loss-on", "all"],
}
each_arm = pytest.mark.parametrize("arm", ARMS)
few_arms = pytest.mark.parametrize("arm", [*ARMS][:4] + [*ARMS][-1:])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a tiny boolq."""
    folder = tmp_path_factory.mktemp("controls")

    def louder(model):
        for weight in model.parameters():
            weight.data.mul_(6 if weight.dim() > 1 else 1)     # so that memories matter

    checkpoint_folder(folder / "base", spoil=louder)
    for split in ("train", "test"):
        write_task(folder / "data", "boolq", split, even_or_odd(60))
    return folder


def flags(place, name, *more):
    return ["--model", str(place / "base"), "--task", "boolq", "--data", str(place / "data"),
            "--out", str(place / name), "--batch", "8", "--steps", str(STEPS), "--warmup", "2",
            "--lr", "1e-3", "--device", "cpu", *more]


def run(place, name, *more):
    """train.py in this process, once for each name -> the weights and the log."""
    if not (place / name).exists():
        train.main(flags(place, name, *more))
    return run_of(place / name)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def apart(one, other):
    """The relative distance of two models."""
    return math.sqrt(sum((one[name] - other[name]).square().sum() for name in one)
                     / sum(other[name].square().sum() for name in one))


def timeless(log):
    return [{key: line[key] for key in line.keys() - OF_THE_MACHINE} for line in log]


@each_arm
def test_every_rival_trains_another_model_than_plain_fine_tuning(place, arm):
    assert apart(run(place, arm, *ARMS[arm])[0], run(place, "none")[0]) > 1e-4


@few_arms
def test_micro_batches_and_checkpointing_change_nothing(place, arm):
    weights, log = run(place, arm, *ARMS[arm])
    pieces, cut = run(place, f"cut-{arm}", *ARMS[arm], "--micro-tokens", "60", "--checkpoint")
    moved = apart(weights, run_of_base(place))
    assert apart(pieces, weights) < 1e-3 * moved
    for line, other in zip(log, cut, strict=True):
        for key in ("loss", "reward", "flux", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-3)


def run_of_base(place):
    return evaluation.read_tensors(place / "base" / "model.safetensors")[0]


@few_arms
def test_an_interrupted_run_goes_on_to_the_same_weights(place, arm):
    more = [*ARMS[arm], "--held-out", "9", "--eval-every", "2", "--save-every", "3"]
    whole, log = run(place, f"whole-{arm}", *more)
    with pytest.raises(KeyboardInterrupt):
        train.train(read_settings(flags(place, f"left-{arm}", *more)), Interrupted(5))
    train.main([*flags(place, f"left-{arm}", *more), "--resume"])
    weights, log_of_both = run_of(place / f"left-{arm}")
    assert same(weights, whole) and timeless(log_of_both) == timeless(log)


@pytest.mark.parametrize("arm", ["int-p0.3-random", "dropout-p0.3"])
def test_another_seed_draws_other_sets_and_the_same_seed_the_same(place, arm):
    # One row, so that the order of the rows is the same for every seed.
    more = [*ARMS[arm], "--limit", "1"]
    one, _ = run(place, f"seed0-{arm}", *more)
    assert same(one, run(place, f"seed0-again-{arm}", *more)[0])
    assert not same(one, run(place, f"seed1-{arm}", *more, "--seed", "1")[0])


def test_every_step_draws_anew(place):
    _, log = run(place, "frozen", *DROPOUT, "--limit", "1", "--epochs", "5", "--lr", "0")
    assert len({line["loss"] for line in log}) == STEPS


def test_the_reward_of_a_run_is_the_knowledge_entropy_of_the_whole_step(place):
    _, log = run(place, "knowledge-entropy-lam2", *KNOWLEDGE)
    model, tokenizer = evaluation.load(place / "base")
    rows = encode(evaluation.load_examples(place / "data", "boolq", "train"), tokenizer, 256)
    first = [rows[row] for row in next(train.order_of(60, 8, 0))]
    keys = [torch.cat([k for ids, _ in first for k in coefficients(model, ids, layer)]).detach()
            for layer in range(3)]
    expected = 2 * sum(entropy_of_the_mean(k) for k in keys)
    assert log[0]["reward"] == pytest.approx(expected.item(), rel=1e-5)


def test_resuscitation_scales_the_rows_of_key_up_once(place):
    settings = ["--steer", "resuscitation", "--p", "0.5", "--alpha", "2", "--lr", "0"]
    weights, _ = run(place, "scaled", *settings)
    base, factors = run_of_base(place), evaluation.read_tensors(
        place / "scaled" / "per_memory.safetensors")[0]["per_memory"]
    assert ((factors != 1).sum(-1) == 48).all()                # half of the 96 memories
    for name, weight in base.items():
        if name.endswith("up_proj.weight"):
            weight = weight * factors[int(name.split(".")[2])][:, None]
        assert torch.equal(weights[name], weight), name
    # On the rows that were looked at, usage in the first layer is now twice the mean.
    usage = []
    for folder in ("base", "scaled"):
        model, tokenizer = evaluation.load(place / folder)
        rows = encode(evaluation.load_examples(place / "data", "boolq", "train"), tokenizer, 256)
        keys = [keys[0].abs() for keys in evaluation.keys_of(model, [ids[:-1] for ids, _ in rows])]
        usage.append(torch.cat(keys).mean(0))
    least = factors[0] != 1
    torch.testing.assert_close(usage[1][least], (2 * usage[0].mean()).expand(48), rtol=1e-3, atol=0)
    torch.testing.assert_close(usage[1][~least], usage[0][~least])


def test_the_anchor_pulls_as_the_formula_says(place):
    weights, log = run(place, "none-anchor=100", "--anchor", "100")
    model, tokenizer = evaluation.load(place / "base")
    rows = encode(evaluation.load_examples(place / "data", "boolq", "train"), tokenizer, 256)
    first = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([
        {"params": [weight for weight in model.parameters() if weight.dim() > 1]},
        {"params": [weight for weight in model.parameters() if weight.dim() < 2],
         "weight_decay": 0.0}], lr=1e-3, weight_decay=0.01)
    args = Namespace(lr=1e-3, warmup=2)
    for step, chosen in zip(range(STEPS), train.order_of(60, 8, 0)):
        batch = [rows[row] for row in chosen]
        step_loss(model, batch, *counts(batch), Steering())[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = train.learning_rate(step, args, STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight -= rate * 100 * (weight - first[name])
        optimizer.step()
        optimizer.zero_grad()
    for (_, theirs, weight) in model._named():
        torch.testing.assert_close(weights[theirs], weight.detach(), rtol=1e-3, atol=2e-5)
    base = run_of_base(place)
    assert apart(weights, base) < 0.95 * apart(run(place, "none")[0], base)


def test_with_the_loss_on_all_every_token_but_the_first_is_supervised(place):
    _, log = run(place, "none-loss_on=all", "--loss-on", "all")
    model, tokenizer = evaluation.load(place / "base")
    rows = encode(evaluation.load_examples(place / "data", "boolq", "train"), tokenizer, 256)
    ids = [rows[row][0] for row in next(train.order_of(60, 8, 0))]
    losses = [-model(torch.tensor([one[:-1]]))[0].log_softmax(-1)[range(len(one) - 1), one[1:]]
              for one in ids]
    assert log[0]["lm_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert all(line["supervised_tokens"] == line["tokens"] for line in log)


# ---------------------------------------------------------------------------- held-out rows


def test_the_loss_of_held_out_rows_is_logged_before_between_and_after(place):
    weights, log = run(place, "watched", "--held-out", "9", "--eval-every", "2", "--loss-on", "all")
    assert [line["step"] for line in log] == list(range(STEPS + 1))
    assert [line["step"] for line in log if "held_out_nll" in line] == [0, 2, 4, 5]
    model, tokenizer = evaluation.load(place / "base")
    rows = encode(evaluation.load_examples(place / "data", "boolq", "train"), tokenizer, 256)
    held = next(train.order_of(60, 60, 0))[:9]
    for folder, line in (("base", log[0]), ("watched", log[-1])):
        model, _ = evaluation.load(place / folder)
        batch = [rows[row] for row in held]
        _, expected, *_ = step_loss(model, batch, *counts(batch), Steering())  # of responses alone
        assert line["held_out_nll"] == pytest.approx(expected.item(), rel=1e-5)
    curve = read_log({"folder": place / "watched"})            # of the steps that were trained
    assert [point[0] for point in curve] == list(range(1, STEPS + 1))


class Watched(train.ALONE):
    """Notes which rows are trained on, by their tokens."""

    rows = []

    @classmethod
    def share(cls, batches):
        cls.rows.append(sorted(row for batch in batches for row in batch))
        return batches


def test_held_out_rows_are_not_trained_on_and_watching_them_changes_nothing(place):
    weights, log = run(place, "held", "--held-out", "52", "--epochs", "3")
    train.train(read_settings(flags(place, "held-seen", "--held-out", "52", "--eval-every",
                                          "1", "--epochs", "3")), Watched)
    assert Watched.rows == [list(range(8))] * 3                # three epochs of eight rows
    seen, log_of_seen = run_of(place / "held-seen")
    assert same(weights, seen) and [line["step"] for line in log_of_seen] == [0, 1, 2, 3]
    assert [line["step"] for line in log if "held_out_nll" in line] == [0, 3]
    rows = encode(evaluation.load_examples(place / "data", "boolq", "train"),
                  evaluation.load(place / "base")[1], 256)
    kept = [rows[row] for row in next(train.order_of(60, 60, 0))[52:]]
    assert log[0]["step"] == 0 and log[1]["tokens"] == counts(kept)[1]
    settings = json.loads((place / "held" / "args.json").read_text())
    assert (settings["held_out"], settings["eval_every"], settings["examples"]) == (52, None, 60)


def test_each_seed_holds_out_rows_of_its_own_and_is_compared_all_the_same(place):
    settings = []
    for seed in ("0", "1"):
        run(place, f"own{seed}", "--seed", seed, "--held-out", "20", "--steps", "1")
        settings.append(json.loads((place / f"own{seed}" / "args.json").read_text()))
    assert settings[0]["data_sha256"] == settings[1]["data_sha256"]
    assert run_of(place / "own0")[1][0] != run_of(place / "own1")[1][0]


# ---------------------------------------------------------------------------- names, refusals


@each_arm
def test_a_rival_makes_an_arm_of_its_own_with_a_folder_of_its_own(arm):
    args = read_settings(ARMS[arm])
    assert args.arm == arm and args.out.endswith(f"llama-{arm}-seed0")


def test_a_rival_that_is_off_is_no_other_arm():
    off = ["--anchor", "0", "--label-smoothing", "0", "--confidence-penalty", "0", "--loss-on",
           "response"]
    assert read_settings(off).arm == "none"


def test_rivals_are_arms_and_not_recipes_to_the_scan_of_a_folder(place, tmp_path):
    for arm in ("none", "none-anchor=100", "none-loss_on=all"):
        run(place, arm, *ARMS.get(arm, []))
        (tmp_path / arm).symlink_to(place / arm)
        (place / arm / "eval").mkdir(exist_ok=True)
        (place / arm / "eval" / "boolq.json").write_text(json.dumps({"accuracy": 0.5, "n": 60}))
    said = []
    runs = comparable(scan(tmp_path, said.append), said.append)
    assert [run["arm"] for run in runs] == ["none", "none-anchor=100", "none-loss_on=all"]
    assert not said and [row["difference"] for row in compare(runs)] == [None, 0, 0]


def test_the_paper_s_claims_are_not_judged_by_its_controls():
    for arm in ("int", "int-p0.02-value", "none", "int-layers1@alpha=2"):
        assert method_of(arm) == arm[:4].rstrip("-")
    for arm in ("int-random", "none-anchor=10", "int-anchor=10", "none-loss_on=all"):
        assert method_of(arm) == ""


def test_the_controls_are_arms_of_an_experiment(place, capsys):
    what = flags(place, "experiment", "--limit", "4", "--epochs", "2")
    main(["controls", "--seed", "0", "--items", "1", *what])
    said, arms = capsys.readouterr().out, [read_settings(arm.split()).arm for arm in CONTROLS]
    assert arms[:4] == ["none", "int", "int-value", "int-random"] and "Table 2," in said
    assert [line.split()[0] for line in said.splitlines()[4:19]] == ["base", *arms]
    assert {path.name for path in (place / "experiment").glob("base-*")} == {
        "base-base", *(f"base-{arm}-seed0" for arm in arms)}
    assert len({(place / "experiment" / f"base-{arm}-seed0" / "model.safetensors").read_bytes()
                for arm in arms}) == len(arms) == 14


@pytest.mark.parametrize("more, message", [
    (["--label-smoothing", "1.5"], "--label-smoothing 1.5 is no share from 0 to 1"),
    (["--anchor", "-1"], "argument --anchor"), (["--loss-on", "prompt"], "argument --loss-on"),
    (["--eval-every", "0"], "argument --eval-every"), (["--held-out", "0"], "argument --held-out"),
    (["--divergence", "memory"], "--divergence means nothing with --steer none"),
    (["--steer", "dropout", "--alpha", "2"], "--alpha means nothing with --steer dropout"),
    (["--steer", "resuscitation", "--rank-by", "random"], "--rank-by means nothing with"),
    (["--steer", "dropout", "--p", "1.5"], "p is 1.5")])
def test_what_means_nothing_is_refused(more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        read_settings(more)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_to_hold_out_every_row_is_refused_before_anything_is_written(place):
    with pytest.raises(BadInput, match="--held-out 60 leaves none of 60 rows to train on"):
        train.main(flags(place, "none-left", "--held-out", "60"))
    assert not (place / "none-left.partial").exists()


@pytest.mark.parametrize("arm", ["int-p0.3-random", "dropout-p0.3"])
def test_what_was_random_in_training_cannot_be_kept_at_test_time(place, arm):
    run(place, arm, *ARMS[arm])
    with pytest.raises(BadInput, match="or with a random one, so there is none to keep"):
        evaluation.main(["--model", str(place / arm), "--task", "boolq", "--data",
                         str(place / "data"), "--steered"])


def test_the_change_of_a_random_steering_is_that_of_training(place):
    model, tokenizer = evaluation.load(place / "base")
    prompts = [tokenizer.encode(question, special=False) for question, _ in even_or_odd(5)]
    shares_of = [float(evaluation.change_line(model, prompts, Steering("dropout", p=p))
                       .split(" answer by ")[1].split("%")[0]) for p in (0.01, 0.5)]
    assert 1 < shares_of[0] < 30 and shares_of[1] > 2 * shares_of[0]
    assert shares_of[1] == pytest.approx(100, rel=0.3)         # noise as large as the answer
