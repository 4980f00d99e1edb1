"""The fine-grained methods of Appendix B.

After reading this you know how memories are grouped, what a memory says when decoded alone, what is
found out about memories before training, and where a run keeps it.
"""
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import train
from conftest import ROOT
from data import BadInput
from data.tasks import load as load_examples
from helpers import Interrupted, checkpoint_folder, even_or_odd, run_of, write_task
from infosteer import (METHODS, Before, Steering, divergence, entropy, group_strengths, intervene,
                       key_entropy, mixture_entropy, relevance, spherical_kmeans, split_groups,
                       surrogates)
from lab.memories import specificity
from model import read_tensors, save_tensors

FINE = [name for name, method in METHODS.items() if method.per_memory]


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------- B.1: groups of memories


def planted(groups, each, d, seed):
    """Rows around `groups` random directions, of very different lengths, in random order -> (x,
    which direction each came from)."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(groups, d, generator=generator), dim=-1)
    noise = 0.1 * torch.randn(groups * each, d, generator=generator) / d ** 0.5
    order = torch.randperm(groups * each, generator=generator)
    x = (centres.repeat_interleave(each, 0) + noise)[order]
    lengths = torch.rand(len(x), 1, generator=generator).mul(9).exp()
    return x * lengths, torch.arange(groups).repeat_interleave(each)[order]


def test_kmeans_on_the_sphere_finds_directions_whatever_their_length():
    found = 0
    for seed in range(10):
        x, origin = planted(8, 30, 32, seed)
        group, centres = spherical_kmeans(x, 8, seed)
        found += len(set(zip(group.tolist(), origin.tolist()))) == 8   # the same, by other names
        torch.testing.assert_close(centres.norm(dim=-1), torch.ones(8))
    assert found >= 7                  # k-means may end in a worse place, but not often


def test_kmeans_ends_where_no_row_prefers_another_centre():
    x = random(500, 16, seed=1)
    group, _ = spherical_kmeans(x, 10, iterations=1000)
    unit = F.normalize(x, dim=-1)
    centres = F.normalize(torch.stack([unit[group == g].sum(0) for g in range(10)]), dim=-1)
    assert torch.equal((unit @ centres.T).argmax(-1), group)


def test_kmeans_is_decided_by_its_seed():
    x = random(300, 16, seed=1)
    group, _ = spherical_kmeans(x, 10, 5)
    assert torch.equal(spherical_kmeans(x, 10, 5)[0], group)
    assert not torch.equal(spherical_kmeans(x, 10, 6)[0], group)


@pytest.mark.parametrize("x, n", [
    (torch.ones(20, 4), 5), (torch.zeros(20, 4), 3), (torch.eye(4)[[0] * 9 + [1]], 4),
    (random(3, 4, seed=0), 8), (random(7, 4, seed=0), 1)],
    ids=["copies", "zeros", "two directions", "fewer rows than groups", "one group"])
def test_no_group_stays_empty(x, n):
    group, _ = spherical_kmeans(x, n)
    assert sorted(set(group.tolist())) == list(range(min(n, len(x))))


@pytest.mark.memory
def test_14336_memories_of_4096_dimensions_cluster_within_2_gb():
    code = """
import resource, torch
from infosteer import spherical_kmeans
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
x = torch.randn(4096, 14336).T
before = peak()
spherical_kmeans(x, 64, iterations=2)
print(peak() - before + x.numel() * 4)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2e9


def test_groups_split_by_which_tokens_activate_their_memories():
    # Within each of two groups, one token activates every other memory, another token the rest.
    groups = torch.tensor([0] * 6 + [1] * 6)
    patterns = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]] * 6)            # [d_m, tokens]
    finer = split_groups(groups, patterns, 2)
    assert sorted(finer.unique().tolist()) == [0, 1, 2, 3]
    alike = (groups[:, None] == groups) & (patterns[:, None] == patterns).all(-1)
    assert torch.equal(finer[:, None] == finer, alike)


def test_groups_that_are_used_less_are_steered_more():
    # Usages 1, 1 | 4 | 0.1 have the means 1, 4 and 0.1, and those the mean 1.7. The strengths are
    # 1.7 / 1, 1.7 / 4, and 1.7 / 0.1, which is clipped to 4.
    usage = torch.tensor([1.0, 1.0, 4.0, 0.1])
    strengths = group_strengths(torch.tensor([0, 0, 1, 2]), usage, 4.0)
    torch.testing.assert_close(strengths, torch.tensor([1.7, 1.7, 0.425, 4.0]))


def test_a_group_that_is_never_used_is_steered_most():
    strengths = group_strengths(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), 3.0)
    assert strengths.tolist() == [3.0, 0.5]


# --------------------------------------------------------------------- B.2: what memories say

V, D_M, D = 97, 40, 16
VECTORS, DECODE = random(D_M, D, seed=2), random(V, D, seed=3)
TARGET = torch.zeros(V).index_fill_(0, torch.tensor([3, 4, 90]), 1 / 3)        # most never occur


def direct(v, decode):
    """P_i of every memory at once, in float64: the reference of this section."""
    return (v.double() @ decode.double().T).softmax(-1)                        # [d_m, V]


def divergence_by_hand(target, p):
    """KL(target || P) in nats, with 0 log 0 = 0."""
    return torch.stack([sum(t * (t.log() - q.log()) for t, q in zip(target.double(), row) if t > 0)
                        for row in p])


@pytest.mark.parametrize("vocabulary, pieces", [(V, 1), (2**19, 2)])           # 32 memories each
def test_surrogates_come_in_pieces_that_add_up(vocabulary, pieces):
    decode = random(vocabulary, D, seed=4)
    found = list(surrogates(VECTORS, decode))
    assert len(found) == pieces
    assert [i for here, _ in found for i in range(here.start, here.stop)] == list(range(D_M))
    p = torch.cat([log_p for _, log_p in found]).double().exp()
    torch.testing.assert_close(p, direct(VECTORS, decode), rtol=1e-4, atol=1e-9)


def test_entropy_specificity_and_divergence_of_surrogates_are_those_of_their_definitions():
    p = direct(VECTORS, DECODE)
    (_, log_p), = surrogates(VECTORS, DECODE)
    h = -(p * p.log()).sum(-1)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy(log_p).double(), h, **close)
    spec = specificity(entropy(log_p), V).double()
    torch.testing.assert_close(spec, 1 - h / math.log(V), **close)
    kl = divergence(TARGET, log_p).double()
    torch.testing.assert_close(kl, divergence_by_hand(TARGET, p), **close)
    assert divergence(p[5].float(), log_p)[5].abs() < 1e-5     # of a distribution from itself


def test_relevance_falls_with_entropy_and_divergence_and_is_standardised():
    h, kl = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([9.0, 1.0, 5.0, 2.0])
    raw = -2.0 * h - 0.5 * kl
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(relevance(h, kl, 2.0, 0.5), expected)
    assert relevance(h, kl, 1.0, 0.0).argmax() == 0 and relevance(h, kl, 0.0, 1.0).argmax() == 1
    assert relevance(torch.ones(4), torch.ones(4)).tolist() == [0.0] * 4       # none stands out


def test_mixture_entropy_is_exact_for_the_whole_vocabulary_and_a_lower_bound_for_token_groups():
    k, p = random(3, 5, D_M, seed=5, dtype=torch.float64), direct(VECTORS, DECODE)
    shares = k.abs() / k.abs().sum(-1, keepdim=True)
    mixture = (shares[..., None] * p).sum(-2)                                  # [3, 5, V]
    exact = -(mixture * mixture.log()).sum(-1)
    torch.testing.assert_close(mixture_entropy(k, p), exact)
    merged = torch.zeros(D_M, 10, dtype=torch.float64).index_add_(1, torch.arange(V) % 10, p)
    bound = mixture_entropy(k, merged)
    assert (bound <= exact).all() and (bound > 0).all()


def test_mixture_entropy_of_a_single_memory_is_its_own_whatever_its_sign():
    p, one = direct(VECTORS, DECODE), torch.zeros(D_M, dtype=torch.float64)
    one[7] = -3.0
    torch.testing.assert_close(mixture_entropy(one, p), -(p[7] * p[7].log()).sum())


def test_mixture_entropy_has_the_gradient_of_its_formula_and_is_finite_at_0():
    p = direct(VECTORS, DECODE)
    k = random(2, D_M, seed=6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: mixture_entropy(k, p), k)
    assert mixture_entropy(torch.zeros(D_M), p).isfinite()


# -------------------------------------------------------------------- what a method does to k

K = random(4, D_M, seed=7, dtype=torch.float64)
BETA = torch.linspace(0, 4, D_M, dtype=torch.float64)


@pytest.mark.parametrize("method", ["semantic", "activation"])
@pytest.mark.parametrize("rank_by", ["magnitude", "value"])
def test_a_group_gets_its_share_of_what_int_would_change(method, rank_by):
    steering = Steering(method, p=0.2, alpha=3.0, rank_by=rank_by, per_memory=BETA)
    expected = K + BETA * (intervene(K, 0.2, 3.0, rank_by) - K)
    torch.testing.assert_close(steering.change(K), expected)
    flux, reward = steering.measure(K)
    assert reward is None and torch.equal(flux, key_entropy(K))


@pytest.mark.parametrize("method", ["semantic", "activation"])
def test_a_group_gets_its_share_of_the_gradient_of_reg(method):
    k = K.clone().requires_grad_()
    generic, = torch.autograd.grad(key_entropy(k).sum(), k)
    steering = Steering(method, generic="reg", per_memory=BETA)
    _, reward = steering.measure(k)
    scaled, = torch.autograd.grad(reward.sum(), k)
    torch.testing.assert_close(scaled, BETA * generic)
    assert steering.change(k) is k and torch.equal(reward.detach(), key_entropy(K))


def test_strength_1_in_every_group_is_the_generic_method():
    steering = Steering("semantic", p=0.1, per_memory=torch.ones(D_M))
    assert torch.equal(steering.change(K.float()), intervene(K.float(), 0.1))


def test_a_surrogates_factor_amplifies_its_memory():
    steering = Steering("surrogate", per_memory=1 + BETA)
    torch.testing.assert_close(steering.change(K), K * (1 + BETA))
    assert steering.measure(K)[1] is None


def test_the_entropy_of_the_mixture_is_rewarded_and_the_flux_stays_that_of_the_keys():
    p = direct(VECTORS, DECODE)
    flux, reward = Steering("surrogate-entropy", per_memory=p).measure(K)
    assert torch.equal(reward, mixture_entropy(K, p)) and torch.equal(flux, key_entropy(K))


# -------------------------------------------------------------- what is found out before training


def found_out(steering):
    """What the method finds out about two layers of memories and what two random texts do to them
    -> (per memory [n_layers, d_m, ...], memory vectors [n_layers, d_m, d], coefficients
    [n_layers, tokens, d_m])."""
    vectors, keys = random(2, D_M, D, seed=10), random(2, 14, D_M, seed=11)
    texts = [[layer[:5] for layer in keys], [layer[5:] for layer in keys]]
    before = Before(vectors=vectors, decode=DECODE, keys=texts, n_tokens=14, target=TARGET, seed=0)
    return METHODS[steering.method].per_memory(steering, before), vectors, keys


def test_semantic_groups_memories_by_their_vectors_and_steers_by_their_usage():
    found, vectors, keys = found_out(Steering("semantic", groups=4, beta_max=9.0))
    for layer in range(2):
        groups, _ = spherical_kmeans(vectors[layer], 4)
        expected = group_strengths(groups, keys[layer].abs().mean(0), 9.0)
        torch.testing.assert_close(found[layer], expected)


def test_activation_splits_each_group_by_which_tokens_activate_its_memories():
    found, vectors, keys = found_out(Steering("activation", groups=4, subgroups=3, beta_max=9.0))
    for layer in range(2):
        groups, _ = spherical_kmeans(vectors[layer], 4)
        finer = split_groups(groups, keys[layer].abs().T.to(torch.bfloat16), 3)
        expected = group_strengths(finer, keys[layer].abs().mean(0), 9.0)
        torch.testing.assert_close(found[layer], expected)
        assert 4 < len(finer.unique()) <= 12


def test_surrogate_amplifies_by_relevance():
    found, vectors, _ = found_out(Steering("surrogate", gamma=0.3, lambda_1=2.0))
    for layer in range(2):
        p = direct(vectors[layer], DECODE)
        h, kl = -(p * p.log()).sum(-1), divergence_by_hand(TARGET, p)
        expected = 1 + 0.3 * relevance(h, kl, 2.0, 1.0)
        torch.testing.assert_close(found[layer].double(), expected, rtol=1e-4, atol=1e-4)


def test_surrogate_with_gamma_0_is_the_plain_model():
    found, *_ = found_out(Steering("surrogate", gamma=0.0))
    assert found.tolist() == [[1.0] * D_M] * 2


def test_surrogate_entropy_merges_what_memories_say_over_groups_of_tokens():
    found, *_ = found_out(Steering("surrogate-entropy", buckets=12))
    assert found.shape == (2, D_M, 12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, D_M))


def test_surrogate_entropy_with_a_bucket_for_each_token_merges_nothing():
    found, vectors, _ = found_out(Steering("surrogate-entropy", buckets=10**6))
    for layer in range(2):
        p = direct(vectors[layer], DECODE)
        torch.testing.assert_close(found[layer].double(), p, rtol=1e-4, atol=1e-6)


def test_a_layer_may_have_its_own_strength_of_what_is_found_out():
    steering = Steering("semantic", groups=4, layers={2: {"beta_max": 1.01}})
    found, *_ = found_out(steering)
    steering = replace(steering, per_memory=found)
    assert steering.at(0).method == "none" and steering.at(0).per_memory is None
    assert torch.equal(steering.at(1).per_memory, found[1])
    assert found[1].max() == torch.tensor(1.01) and found[0].max() > 1.01


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a tiny boolq."""
    folder = tmp_path_factory.mktemp("fine")

    def spoil(model):
        for weight in model.parameters():
            weight.data.mul_(8)        # so that memories differ

    checkpoint_folder(folder / "base", spoil=spoil)
    for split in ("train", "test"):
        write_task(folder / "data", "boolq", split, even_or_odd(40))
    return folder


def flags(place, name, *more):
    return ["--model", str(place / "base"), "--task", "boolq", "--data", str(place / "data"),
            "--out", str(place / name), "--batch", "8", "--warmup", "1", "--lr", "1e-3",
            "--steps", "4", "--device", "cpu", *more]


def run(place, name, *more):
    """train.py in this process, once for each name -> the weights."""
    if not (place / name).exists():
        train.main(flags(place, name, *more))
    return run_of(place / name)[0]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_before_training_the_development_rows_are_watched_and_responses_counted(place):
    model, tokenizer = evaluation.load(place / "base")
    rows = train.encode(load_examples(place / "data", "boolq", "train"), tokenizer, 256)
    looked = train.look_before(model, rows, seed=3)
    keys = torch.cat([text[1] for text in looked.keys])                        # [tokens, d_m]
    assert len(keys) == looked.n_tokens == sum(len(ids) - 1 for ids, _ in rows)
    caught, memory = [], model.blocks[1].memory
    hook = memory.values.register_forward_pre_hook(lambda _, given: caught.append(given[0][0]))
    for ids, _ in rows:
        model(torch.tensor([ids[:-1]]))
    hook.remove()
    torch.testing.assert_close(keys.abs().mean(0), torch.cat(caught).detach().abs().mean(0))
    assert torch.equal(list(looked.vectors)[1], memory.values.weight.T)
    assert torch.equal(looked.decode, model.embed.weight)
    for token in (tokenizer.eos_id, rows[0][0][-2], 5):
        said = sum(ids[n_prompt:].count(token) for ids, n_prompt in rows)
        assert looked.target[token] == said


@pytest.mark.parametrize("method", FINE)
def test_a_run_keeps_what_it_found_out_and_trains_with_it(method, place):
    weights = run(place, method, "--steer", method)
    assert not same(weights, run(place, "plain"))
    (name, found), = read_tensors(place / method / "per_memory.safetensors")[0].items()
    assert name == "per_memory" and found.shape[:2] == (3, 96) and found.isfinite().all()
    kept = evaluation.steering_of(place / method)
    assert kept == Steering(method) and torch.equal(kept.per_memory, found)


@pytest.mark.parametrize("method", FINE)
def test_an_interrupted_run_goes_on_with_what_it_found_out(method, place):
    settings = flags(place, f"cut-{method}", "--steer", method, "--save-every", "2")
    with pytest.raises(KeyboardInterrupt):
        train.train(train.read_settings(settings), Interrupted(4))
    path = place / f"cut-{method}.partial" / "per_memory.safetensors"
    written = path.stat().st_mtime_ns
    train.main([*settings, "--resume"])
    assert (place / f"cut-{method}" / path.name).stat().st_mtime_ns == written
    assert same(run_of(place / f"cut-{method}")[0], run(place, method, "--steer", method))


def test_reg_and_reg_in_groups_are_different_runs(place):
    semantic = run(place, "semantic-reg", "--steer", "semantic", "--generic", "reg", "--lam", "0.5")
    assert not same(semantic, run(place, "reg", "--steer", "reg", "--lam", "0.5"))


def test_strengths_of_ranges_of_layers_reach_the_training(place):
    reg = ["--steer", "reg", "--lam", "0.5", "--layers"]
    one = run(place, "ranges", *reg, "1-2,3:lam=0")
    other = run(place, "two-layers", *reg, "1-2")
    assert same(one, other)                                    # a lambda of 0 rewards nothing
    settings = json.loads((place / "ranges" / "args.json").read_text())
    assert settings["steering"]["layers"] == {"1": {}, "2": {}, "3": {"lam": 0.0}}


@pytest.mark.parametrize("method, strong", [
    ("semantic", ["--p", "0.5", "--alpha", "5"]), ("surrogate", ["--gamma", "0.9"])])
def test_a_model_can_be_scored_with_the_steering_it_was_trained_with(method, strong, place,
                                                                     tmp_path):
    out = place / f"strong-{method}"
    run(place, out.name, "--steer", method, *strong)
    model, tokenizer = evaluation.load(out)
    steering, prompts = evaluation.steering_of(out), [
        tokenizer.encode(example.prompt, special=False)
        for example in load_examples(place / "data", "boolq", "test")]
    expected = [tokenizer.decode([i for i in ids if i not in model.config.eos_ids
                                  and i <= tokenizer.max_id])
                for ids in model.generate(prompts, 8, steering)]
    evaluation.score(out, ["boolq"], place / "data", tmp_path, device="cpu", max_new_tokens=8,
                     steered=True)
    lines = (tmp_path / "boolq-steered.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["response"] for line in lines] == expected
    assert model.generate(prompts, 8, steering) != model.generate(prompts, 8)


def test_a_run_without_what_it_found_out_cannot_be_scored_steered(place, tmp_path):
    (tmp_path / "args.json").write_text((place / "semantic" / "args.json").read_text())
    path = tmp_path / evaluation.PER_MEMORY
    with pytest.raises(BadInput, match=path.name):
        evaluation.steering_of(tmp_path)
    path.write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(BadInput, match=path.name):
        evaluation.steering_of(tmp_path)
    save_tensors({"usage": torch.ones(3, 96)}, path)
    with pytest.raises(BadInput, match="holds no per_memory; train the run again"):
        evaluation.steering_of(tmp_path)
