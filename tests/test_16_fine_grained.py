"""After this file you know the fine-grained methods of Appendix B: how memories are grouped, what a memory says when decoded alone, and what is
found out about them before training and kept."""
import json
import math
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from conftest import ROOT
from data import BadInput
from helpers import checkpoint_folder, write_task
from infosteer import (METHODS, Steering, divergence, entropy, group_strengths, intervene, key_entropy, meaningful, mixture_entropy, relevance, specificity,
                       spherical_kmeans, split_groups, surrogates)
from model import Config, Transformer

FINE = [name for name, method in METHODS.items() if method.needs]


def planted(groups, each, d, seed=0):
    """Directions around `groups` random centres, of very different lengths, and where each came from."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(groups, d, generator=generator), dim=-1)
    x = centres.repeat_interleave(each, 0) + 0.1 * torch.randn(groups * each, d, generator=generator) / d ** 0.5
    shuffled = torch.randperm(len(x), generator=generator)
    return (x * torch.rand(len(x), 1, generator=generator).mul(9).exp())[shuffled], torch.arange(groups).repeat_interleave(each)[shuffled]


# -------------------------------------------------------------------------------------------------- B.1: groups of memories


def test_kmeans_on_the_sphere_finds_directions_whatever_their_length():
    found = 0
    for seed in range(10):
        x, origin = planted(8, 30, 32, seed)
        group, centres = spherical_kmeans(x, 8, seed)
        found += len(set(zip(group.tolist(), origin.tolist()))) == 8           # the same partition, under other names
        torch.testing.assert_close(centres.norm(dim=-1), torch.ones(8))
    assert found >= 7                                                          # k-means may end in a worse place, but not often


def test_kmeans_ends_where_no_row_prefers_another_centre():
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    group, _ = spherical_kmeans(x, 10, iterations=1000)
    unit = F.normalize(x, dim=-1)
    centres = F.normalize(torch.stack([unit[group == g].sum(0) for g in range(10)]), dim=-1)
    assert torch.equal((unit @ centres.T).argmax(-1), group)


def test_kmeans_is_decided_by_its_seed():
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(spherical_kmeans(x, 10, 5)[0], spherical_kmeans(x, 10, 5)[0])
    assert not torch.equal(spherical_kmeans(x, 10, 5)[0], spherical_kmeans(x, 10, 6)[0])


@pytest.mark.parametrize("x, n", [(torch.ones(20, 4), 5), (torch.zeros(20, 4), 3), (torch.eye(4)[[0] * 9 + [1]], 4), (torch.randn(3, 4), 8),
                                  (torch.randn(7, 4), 1)], ids=["copies", "zeros", "two directions", "fewer rows than groups", "one group"])
def test_no_group_stays_empty(x, n):
    group, _ = spherical_kmeans(x, n)
    assert sorted(set(group.tolist())) == list(range(min(n, len(x))))


def test_14336_memories_of_4096_dimensions_cluster_within_2_gb():
    code = ("import torch, resource; from infosteer import spherical_kmeans; torch.set_num_threads(1)\n"
            "x = torch.randn(4096, 14336).T; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "spherical_kmeans(x, 64, iterations=2); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before + x.numel() * 4 / 1024)")
    kilobytes = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert kilobytes * 1024 < 2e9


def test_groups_split_by_what_calls_them():
    groups = torch.tensor([0] * 6 + [1] * 6)
    calls = torch.tensor([[1., 0., 0.], [0., 1., 0.]] * 6)                     # within each group, every other memory is called by another token
    finer = split_groups(groups, calls, 2)
    assert len(finer.unique()) == 4 and finer.max() == 3
    for a in range(12):
        for b in range(12):
            assert (finer[a] == finer[b]) == (a // 6 == b // 6 and a % 2 == b % 2)


def test_groups_that_are_used_less_are_steered_more():
    # usages 1, 1 | 4 | 0.1: means 1, 4, 0.1, their mean 1.7; strengths 1.7, 0.425, and 17 clipped to 4
    strengths = group_strengths(torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 1.0, 4.0, 0.1]), 4.0)
    torch.testing.assert_close(strengths, torch.tensor([1.7, 1.7, 0.425, 4.0]))
    assert group_strengths(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), 3.0).tolist() == [3.0, 0.5]          # never called at all


# ------------------------------------------------------------------------------------------- B.2: what memories say


def direct(v, decode):
    """P_i of every memory at once, in float64: the reference of this section."""
    return (v.double() @ decode.double().T).softmax(-1)


V, D_M, D = 97, 40, 16
VECTORS, DECODE = torch.randn(D_M, D, generator=torch.Generator().manual_seed(2)), torch.randn(V, D, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("vocabulary", [V, 2**19])                              # the second comes in pieces of 32 memories
def test_surrogates_come_in_pieces_that_add_up(vocabulary):
    decode = torch.randn(vocabulary, D, generator=torch.Generator().manual_seed(4))
    pieces = list(surrogates(VECTORS, decode))
    assert len(pieces) == (1 if vocabulary == V else 2)
    reference = direct(VECTORS, decode)
    torch.testing.assert_close(torch.cat([log_p for _, log_p in pieces]).double().exp(), reference, rtol=1e-4, atol=1e-9)
    assert [i for here, _ in pieces for i in range(here.start, here.stop)] == list(range(D_M))


def test_entropy_specificity_and_divergence_of_surrogates_from_their_definitions():
    p = direct(VECTORS, DECODE)
    (_, log_p), = surrogates(VECTORS, DECODE)
    h = -(p * p.log()).sum(-1)
    torch.testing.assert_close(entropy(log_p).double(), h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(specificity(entropy(log_p), V).double(), 1 - h / math.log(V), rtol=1e-5, atol=1e-5)
    target = torch.zeros(V)
    target[[3, 4, 90]] = torch.tensor([0.5, 0.25, 0.25])                       # most tokens never occur: 0 log 0 = 0
    kl = torch.stack([sum(t * (t.log() - q.log()) for t, q in zip(target.double(), row) if t > 0) for row in p])
    torch.testing.assert_close(divergence(target, log_p).double(), kl, rtol=1e-5, atol=1e-5)
    assert divergence(p[5].float(), log_p)[5].abs() < 1e-5                     # of a distribution from itself


def test_relevance_falls_with_entropy_and_divergence_and_is_standardised():
    h, kl = torch.tensor([1., 2., 3., 4.]), torch.tensor([9., 1., 5., 2.])
    score = relevance(h, kl, 2.0, 0.5)
    raw = -2.0 * h - 0.5 * kl
    torch.testing.assert_close(score, (raw - raw.mean()) / raw.std(correction=0))
    assert relevance(h, kl, 1.0, 0.0).argmax() == 0 and relevance(h, kl, 0.0, 1.0).argmax() == 1
    assert relevance(torch.ones(4), torch.ones(4)).tolist() == [0.0] * 4       # no memory stands out


def test_mixture_entropy_is_exact_for_the_whole_vocabulary_and_a_lower_bound_for_groups_of_tokens():
    k, p = torch.randn(3, 5, D_M, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), direct(VECTORS, DECODE)
    q = k.abs() / k.abs().sum(-1, keepdim=True)
    mixture = torch.stack([sum(q[b, t, i] * p[i] for i in range(D_M)) for b in range(3) for t in range(5)]).view(3, 5, V)
    exact = -(mixture * mixture.log()).sum(-1)
    torch.testing.assert_close(mixture_entropy(k, p), exact)
    bucket = torch.arange(V) % 10
    merged = torch.zeros(D_M, 10, dtype=torch.float64).index_add_(1, bucket, p)
    assert (mixture_entropy(k, merged) <= exact).all() and (mixture_entropy(k, merged) > 0).all()
    one = torch.zeros(D_M, dtype=torch.float64)
    one[7] = -3.0                                                              # a single memory speaks, whatever its sign
    torch.testing.assert_close(mixture_entropy(one, p), -(p[7] * p[7].log()).sum())


def test_mixture_entropy_has_the_gradient_of_its_formula():
    k = torch.randn(2, D_M, dtype=torch.float64, generator=torch.Generator().manual_seed(6), requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: mixture_entropy(k, direct(VECTORS, DECODE)), k)
    assert mixture_entropy(torch.zeros(D_M), direct(VECTORS, DECODE)).isfinite()


# -------------------------------------------------------------------------------------------------- what a method does to k


K = torch.randn(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
BETA = torch.linspace(0, 4, 40, dtype=torch.float64)


@pytest.mark.parametrize("method", ["semantic", "activation"])
@pytest.mark.parametrize("rank_by", ["magnitude", "value"])
def test_a_group_gets_its_share_of_what_int_would_change(method, rank_by):
    steering = Steering(method, p=0.2, alpha=3.0, rank_by=rank_by, known=BETA)
    torch.testing.assert_close(steering.change(K), K + BETA * (intervene(K, 0.2, 3.0, rank_by) - K))
    flux, reward = steering.entropies(K)
    assert reward is None and torch.equal(flux, key_entropy(K))


@pytest.mark.parametrize("method", ["semantic", "activation"])
def test_a_group_gets_its_share_of_the_gradient_of_reg(method):
    k = K.clone().requires_grad_()
    generic, = torch.autograd.grad(key_entropy(k).sum(), k)
    steering = Steering(method, base="reg", known=BETA)
    _, reward = steering.entropies(k)
    scaled, = torch.autograd.grad(reward.sum(), k)
    torch.testing.assert_close(scaled, BETA * generic)
    assert steering.change(k) is k and torch.equal(reward.detach(), key_entropy(K))


def test_strength_one_is_the_generic_method_and_gamma_zero_the_plain_model():
    assert torch.equal(Steering("semantic", p=0.1, known=torch.ones(40)).change(K.float()), intervene(K.float(), 0.1))
    known = METHODS["surrogate"].know(Steering("surrogate", gamma=0.0), torch.randn(40), torch.randn(40))
    assert torch.equal(Steering("surrogate", gamma=0.0, known=known).change(K.float()), K.float())


def test_surrogates_amplify_by_their_score():
    h, kl = torch.rand(40), torch.rand(40)
    steering = Steering("surrogate", gamma=0.3, lambda_1=2.0).knowing({"entropy": torch.stack([h, kl]), "divergence": torch.stack([kl, h])})
    for layer, (first, second) in enumerate([(h, kl), (kl, h)]):
        torch.testing.assert_close(steering.at(layer).change(K.float()), K.float() * (1 + 0.3 * relevance(first, second, 2.0, 1.0)))


def test_a_layer_may_have_its_own_strength_of_what_is_known():
    groups, usage = torch.tensor([[0, 1, 1]] * 2), torch.tensor([[1.0, 9.0, 9.0]] * 2)
    steering = Steering("semantic", layers={2: {"beta_max": 1.5}}).knowing({"semantic": groups, "usage": usage})
    assert steering.at(0).method == "none" and steering.at(1).known.max() == 1.5


# ------------------------------------------------------------------------------------------------------- the memory profile


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine")
    checkpoint_folder(folder / "base", spoil=lambda model: [weight.data.mul_(8) for weight in model.parameters()])
    write_task(folder / "data", "boolq", "train", [(f"Is {i} even?", "true" if i % 2 == 0 else "false") for i in range(40)])
    return folder


def run(place, name, *flags, steps=4):
    train.main(["--model", str(place / "base"), "--task", "boolq", "--data", str(place / "data"), "--out", str(place / name), "--batch", "8", "--warmup", "1",
                "--lr", "1e-3", "--steps", str(steps), "--device", "cpu", *flags])
    return load_file(place / name / "model.safetensors")


def test_a_profile_says_what_a_direct_computation_says(place):
    model, tokenizer = evaluation.load(place / "base")
    rows = train.encode(evaluation.load_examples(place / "data", "boolq", "train"), tokenizer, 256)
    decode, memory = model.embed.weight, model.blocks[1].memory
    found = evaluation.memory_profile(model, rows, Steering("activation", groups=4, subgroups=3))
    keys = []
    handle = memory.values.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0]))
    with torch.no_grad():
        for ids, _ in rows:
            model(torch.tensor([ids[:-1]]))
    handle.remove()
    torch.testing.assert_close(found["usage"][1], torch.cat(keys).abs().mean(0))
    assert torch.equal(found["semantic"][1], spherical_kmeans(memory.values.weight.T, 4)[0])
    coarse = found["semantic"][1][[(found["activation"][1] == g).nonzero()[0, 0].item() for g in found["activation"][1].tolist()]]
    assert torch.equal(coarse, found["semantic"][1]) and 4 < len(found["activation"][1].unique()) <= 12        # each lies within one

    p = direct(memory.values.weight.detach().T, decode.detach())
    found = evaluation.memory_profile(model, rows, Steering("surrogate"))
    responses = [i for ids, n in rows for i in ids[n:]]
    target = torch.bincount(torch.tensor(responses), minlength=len(decode)).double() / len(responses)
    torch.testing.assert_close(found["entropy"][1].double(), -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["divergence"][1].double(), torch.special.xlogy(target, target).sum() - p.log() @ target, rtol=1e-4, atol=1e-4)

    found = evaluation.memory_profile(model, rows, Steering("surrogate-entropy", buckets=10**6))
    torch.testing.assert_close(found["says"][1].double(), p, rtol=1e-4, atol=1e-6)                              # a bucket for each token
    found = evaluation.memory_profile(model, rows, Steering("surrogate-entropy", buckets=12))
    assert found["says"].shape == (3, 96, 12)
    torch.testing.assert_close(found["says"].sum(-1), torch.ones(3, 96))


@pytest.mark.parametrize("method", FINE)
def test_a_profile_is_made_once_kept_and_used_again(method, place, monkeypatch, capsys):
    plain = run(place, f"{method}-plain") if not (place / f"{method}-plain").exists() else None
    first = run(place, f"{method}-first", "--steer", method)
    assert any(not torch.equal(first[name], plain[name]) for name in plain)
    monkeypatch.setattr(train, "memory_profile", None)                         # must not be called again
    again = run(place, f"{method}-again", "--steer", method, "--memory-profile", str(place / f"{method}-first" / evaluation.PROFILE))
    assert all(torch.equal(first[name], again[name]) for name in first)
    settings = json.loads((place / f"{method}-first" / "args.json").read_text())["steering"]
    assert settings.keys() == {"method", *meaningful(method)} and str(evaluation.as_steering(settings)) in capsys.readouterr().out


def test_reg_and_its_base_in_groups_are_different_runs(place):
    semantic = run(place, "semantic-reg", "--steer", "semantic", "--base", "reg", "--lam", "0.5")
    reg = run(place, "reg", "--steer", "reg", "--lam", "0.5")
    assert any(not torch.equal(semantic[name], reg[name]) for name in reg)


def test_an_interrupted_run_goes_on_with_its_profile(place, monkeypatch):
    whole = run(place, "whole", "--steer", "activation", "--save-every", "2")
    save_state = train.save_state

    def killed(*state):
        save_state(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place, "cut", "--steer", "activation", "--save-every", "2")
    monkeypatch.undo()
    monkeypatch.setattr(train, "memory_profile", None)
    resumed = run(place, "cut", "--steer", "activation", "--save-every", "2", "--resume")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def profile_of(place, **changes):
    """The file of a semantic run with some tensors changed, or removed where the change is None."""
    if not (place / "donor").exists():
        run(place, "donor", "--steer", "semantic", steps=1)
    tensors = load_file(place / "donor" / evaluation.PROFILE)
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    save_file(tensors, place / "profile.safetensors", {"method": '"semantic"', "groups": "16"})
    return place / "profile.safetensors"


@pytest.mark.parametrize("changes, message", [
    (dict(usage=None), "has no usage"), (dict(fingerprint=torch.ones(3)), "another model"), (dict(usage=torch.ones(2, 96)), r"usage \[2, 96\] \(expected \[3, 96\]"),
    (dict(usage=torch.full((3, 96), math.nan)), "usage holds"), (dict(semantic=torch.full((3, 96), -1)), "semantic holds"),
    (dict(semantic=torch.full((3, 96), 96)), "semantic holds"), (dict(semantic=torch.ones(3, 96)), "semantic holds"), (dict(usage=torch.ones(3)), "another model")])
def test_a_profile_that_does_not_fit_is_refused(place, changes, message):
    with pytest.raises(BadInput, match=message):
        run(place, "refused", "--steer", "semantic", "--memory-profile", str(profile_of(place, **changes)))
    assert not (place / "refused").exists() and not (place / "refused.partial").exists()


def test_a_profile_of_another_method_or_grouping_or_no_profile_at_all_is_refused(place):
    good = str(profile_of(place))
    with pytest.raises(BadInput, match="has no entropy, divergence, which --steer surrogate needs"):
        run(place, "refused", "--steer", "surrogate", "--memory-profile", good)
    with pytest.raises(BadInput, match="made with groups 16, not 8; give --groups 16"):
        run(place, "refused", "--steer", "semantic", "--groups", "8", "--memory-profile", good)
    (place / "garbage").write_bytes(b"\x80\x04 not safetensors")
    for path in ("garbage", "missing"):
        with pytest.raises(BadInput, match=f"{path}: not a readable memory profile"):
            run(place, "refused", "--steer", "semantic", "--memory-profile", str(place / path))


@pytest.mark.parametrize("flags, message", [
    (["--steer", "int", "--base", "reg"], "--base means nothing with --steer int"), (["--steer", "semantic", "--lam", "1"], "--lam means nothing with --steer semantic"),
    (["--steer", "semantic", "--base", "reg", "--p", ".1"], "--p means nothing with --steer semantic --base reg"),
    (["--steer", "reg", "--memory-profile", "x"], "--memory-profile means nothing"), (["--steer", "semantic", "--groups", "0"], "--groups"),
    (["--steer", "semantic", "--beta-max", "-1"], "--beta-max"), (["--steer", "surrogate", "--gamma", "nan"], "--gamma")])
def test_flags_that_mean_nothing_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("layers, message", [("1:gamma=2", "gamma means nothing with --steer int"), ("1:p=3", "p is 3.0"), ("1-9", "outside the model's layers 1-4")])
def test_strengths_of_ranges_are_checked_against_method_and_model(layers, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        train.main(["--steer", "int", "--layers", layers, "--out", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())


def test_a_strength_for_each_range_reaches_the_training(place):
    flags = ["--steer", "reg", "--lam", "0.5"]
    one = run(place, "ranges", *flags, "--layers", "1-2,3:lam=0")
    other = run(place, "two-layers", *flags, "--layers", "1-2")
    assert all(torch.equal(one[name], other[name]) for name in one)            # lambda 0 rewards nothing
    assert json.loads((place / "ranges" / "args.json").read_text())["steering"]["layers"] == {"1": {}, "2": {}, "3": {"lam": 0.0}}


@pytest.mark.parametrize("method", ["semantic", "surrogate"])
def test_a_model_can_be_scored_as_it_was_trained(method, place, tmp_path):
    run(place, f"kept-{method}", "--steer", method, *(["--p", "0.5", "--alpha", "5"] if method == "semantic" else ["--gamma", "0.9"]))
    write_task(place / "data", "boolq", "test", [(f"Is {i} even?", "true" if i % 2 == 0 else "false") for i in range(30)])
    steering = evaluation.as_steering(evaluation.read_run(place / f"kept-{method}")["steering"])
    model, tokenizer = evaluation.load(place / f"kept-{method}")
    known = steering.knowing(evaluation.load_profile(place / f"kept-{method}" / evaluation.PROFILE, model, steering, own=True))
    prompts = [tokenizer.encode(e.prompt, special=False) for e in evaluation.load_examples(place / "data", "boolq", "test")]
    expected = [tokenizer.decode([i for i in ids if i not in model.config.eos_ids and i <= tokenizer.max_id])
                for ids in model.generate(prompts, 8, known)]
    evaluation.score(place / f"kept-{method}", ["boolq"], place / "data", tmp_path, device="cpu", max_new_tokens=8, steering=steering)
    lines = [json.loads(line) for line in open(tmp_path / "boolq-steered.jsonl")]
    assert [line["response"] for line in lines] == expected
    assert model.generate(prompts, 8, known) != model.generate(prompts, 8)
