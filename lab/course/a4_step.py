"""One step, head only where supervised

A step averages over its supervised tokens, however its rows are cut into passes. In train.py, write
how they are cut (`micro_batches`), how the rows of a pass become tensors (`collate`), and what the
pass adds to the loss (`step_loss`, equation 5). Padding costs time, and so do logits that nobody
asks for: sort by length, and let the head see supervised tokens only, as `Transformer.predict` can.
Here: tests/test_07_step.py. Work out the targets of two rows on paper first.
"""
import functools
import re
import time

import torch

from lab.course.probe import draw

MINUTES, POINTS = 150, 16
BLANK = dict.fromkeys(("train.py::micro_batches", "train.py::collate", "train.py::step_loss"))
REMOVE = [f"tests/test_07_step.py::{name}" for name in (
    "reference_gradients", "test_gradients_equal_those_of_one_padded_batch_with_all_logits",
    "test_a_mean_of_the_means_of_micro_batches_would_be_another_gradient")]
HINTS = (
    "A token is asked for the one after it, and only answers count. Every supervised token of a "
    "step weighs the same, in whichever pass it is. The entropy is that of all real tokens.",
    "targets[row, t] = ids[t + 1] from t = n_prompt - 1 on. lm = (sum of cross-entropies) / "
    "n_supervised, reward = sum_l lambda_l (sum of H of real tokens) / n_tokens, loss = lm - "
    "reward. A pass holds n rows if n times the longest of them is within the budget.",
    "Take the longest row first, and begin a new pass when the next does not fit. Give `predict` "
    "the flat places of supervised targets. Multiply the reward [n_layers, B, T] by `real`, sum "
    "over B and T, and weigh each layer by steering.at(layer).lam.")


def ragged(seed):                      # as train.encode makes rows, with answers of 1 to 4 tokens
    ids = [(row * 1000 % 1408).long().tolist()[:6 + 5 * i % 17]
           for i, row in enumerate(draw(seed, 7, 24).abs())]
    return [(row, len(row) - 1 - i % 4) for i, row in enumerate(ids)]


def targets(seed):
    from train import collate
    for rows in [([5, 6, 7, 8], 2), ([9, 4], 1)], ragged(seed), []:
        tokens, wanted, real = collate(rows)
        for what, found in ("real", real), ("targets", wanted), ("inputs", tokens[real]):
            yield f"rows {str(rows)[:60]}: {what}", found


def passes(seed):
    from train import micro_batches
    for lengths, budget in ([2, 5, 3, 2, 3, 2], 6), ([2, 5], 10), ([2, 5], 9), ([2, 5], 1):
        first = torch.zeros(len(lengths)).long()
        for batch in micro_batches([*range(len(lengths))], lengths, budget):
            first[batch] = min(batch)
        yield f"rows of {lengths}, {budget} tokens: the first row of each one's pass", first
    lengths = (draw(seed, 200).abs() * 20 + 1).long().tolist()
    batches = micro_batches([*range(len(lengths))], lengths, 150)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    yield "200 rows: is less than 5% padding?", padded < 1.05 * sum(lengths)
    yield "200 rows, 150 tokens: are passes few?", len(batches) < 1.3 * sum(lengths) / 150


@functools.cache
def toy():
    """A model; and what its head was called with, call by call."""
    from model import Transformer
    model, seen = Transformer.from_pretrained("data/toy/llama"), []
    logits = model.logits
    model.logits = lambda hidden: seen.append(hidden) or logits(hidden)
    return model, seen


def step(some, rows, **settings):
    """What `some` of the rows add to the loss of a step."""
    from infosteer import Steering
    from train import step_loss
    counts = sum(len(ids) - n for ids, n in rows), sum(len(ids) - 1 for ids, _ in rows)
    return step_loss(toy()[0], some, *counts, Steering(**settings))


def loss(seed):
    rows, reg = ragged(seed), dict(method="reg", lam=9.0)
    for settings in {}, reg, {**reg, "layers": {1: {}, 2: {"lam": -0.1}}}:
        for some in rows, rows[:2]:
            values = step(some, rows, **settings)
            for what, value in zip(("loss", "L_LM", "reward", "flux"), values):
                yield f"{settings}, {len(some)} of {len(rows)} rows: {what}", value
        grad, = torch.autograd.grad(values[0], [toy()[0].blocks[0].memory.key_up.weight])
        yield f"{settings}: gradient of key 0, divided by the norm of all", grad[0] / grad.norm()


def head(seed):
    for n in 1, 7:
        toy()[1].clear()
        step(ragged(seed)[:n], ragged(seed))
        yield f"rows of logits for {n} rows", sum(hidden[..., 0].numel() for hidden in toy()[1])


def both_heads():
    """Print what a head on every token costs, and one on supervised tokens."""
    from train import fine_tuning_data, read_settings
    rows = fine_tuning_data(read_settings(["--limit", "20"]))[2]
    for V, every in (1408, True), (1408, False), (30_000, True), (30_000, False):
        n = sum(len(ids) - (1 if every else n_prompt) for ids, n_prompt in rows)
        began, decode = time.perf_counter(), torch.randn(V, 128, requires_grad=True)
        (torch.randn(n, 128) @ decode.T).logsumexp(-1).sum().backward()
        print(f"V = {V}, {n} rows of logits: {time.perf_counter() - began:.3f} seconds")


PARTS = {"targets, padding": targets, "passes": passes, "loss": loss, "where the head runs": head}
WRITTEN = {"rows": (
    "The command runs the LM head on every token of 60 rows, and on supervised tokens only, for "
    "two vocabularies. How many times the rows is the former? Why do the times differ so?",
    "python -m lab.course.a4_step")}
if __name__ == "__main__":
    both_heads()

# ------------------------------------------------------------------------------- not handed out

NUMBERS = {"rows": (lambda said: int(re.findall(r"(\d+) rows", said)[0])
                    / int(re.findall(r"(\d+) rows", said)[1]), 0.02)}
CODE = """
from torch.nn.utils.rnn import pad_sequence

def micro_batches(rows, lengths, budget):
    batches = [[]]
    for row in sorted(rows, key=lambda row: lengths[row]):
        longest = max(lengths[one] for one in [*batches[-1], row])
        if batches[-1] and (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
        batches[-1].append(row)
    return batches

def padded(lists, fill):
    return pad_sequence([torch.tensor(one) for one in lists or [[fill]]], True, fill)

def collate(rows):
    return (padded([ids[:-1] for ids, _ in rows], 0),
            padded([[IGNORE] * (n - 1) + ids[n:] for ids, n in rows], IGNORE),
            padded([[True] * (len(ids) - 1) for ids, _ in rows], False))

def step_loss(model, rows, n_supervised, n_tokens, steering, checkpoint=False, device=None):
    inputs, targets, real = (one.to(model.embed.weight.device) for one in collate(rows))
    hidden, flux, reward = model.hidden(inputs, steering, checkpoint=checkpoint)
    asked = targets != IGNORE
    lm = F.cross_entropy(model.logits(hidden[asked]), targets[asked], reduction="sum")
    lm = lm / n_supervised
    reward = (reward * real).sum((1, 2)) / n_tokens
    reward = sum(steering.at(layer).lam * one for layer, one in enumerate(reward))
    return lm - reward, lm.detach(), reward.detach(), (flux.detach() * real).sum((1, 2)) / n_tokens
"""
TARGETS, SUM = "[IGNORE] * (n - 1) + ids[n:]", ', reduction="sum")\n    lm = lm / n_supervised'
RIGHT = {
    "boolean mask, shortest first": CODE,
    "index list": CODE[CODE.index("def step_loss"):].replace("targets != IGNORE", """tuple(
        torch.tensor([(i, t) for i, (ids, n) in enumerate(rows) for t in range(n - 1, len(ids) - 1)
                      ]).T)"""),
}
WRONG = {name: (why, CODE.replace(line, new)) for name, line, new, why in (
    ("unshifted", TARGETS, "[IGNORE] * n + ids[n:-1]", "each token is its own target; it is asked "
     "for the one after it"),
    ("prompt too", TARGETS, "ids[1:]", "the prompt is supervised too; only the answer counts"),
    ("eos dropped", TARGETS, "[IGNORE] * (n - 1) + ids[n:-1] + [IGNORE]", "the last id, which ends "
     "the answer, is no target, so that the model never learns to stop"),
    ("mean of means", SUM, ")", "this is the mean over a pass; divide the sum by the step's count"),
    ("padding", "(reward * real)", "reward", "padding is rewarded too; mask it by `real`"),
    ("supervised only", "(reward * real)", "(reward * asked)", "only supervised tokens are "
     "rewarded; eq. 5 means all real ones, those of prompts too"),
    ("sign", "lm - reward,", "lm + reward,", "the reward is added, which lowers the entropy"),
    ("no lambda", "steering.at(layer).lam * one", "one", "lambda is missing; the model gives H"),
    ("detached", "(reward * real)", "(reward.detach() * real)", "a detached reward has no effect"),
    ("full logits", "model.logits(hidden[asked])", "model.logits(hidden)[asked]", "the value is "
     "right, but the head runs on every token; pick the places first"),
    ("one row", "(len(batches[-1]) + 1) * longest > budget", "True", "each row is a pass of its "
     "own; a pass holds as many as the budget does"),
    ("true lengths", "(len(batches[-1]) + 1) * longest", "sum(lengths[one] for one in batches[-1])",
     "padding takes room too: a pass takes the number of its rows times the longest"),
    ("unsorted", "sorted(rows, key=lambda row: lengths[row])", "rows", "rows are taken as they "
     "come; sorted by length they need little padding"),
)}
