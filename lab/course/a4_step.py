"""One step, head only where supervised

A step averages over its supervised tokens, however its rows are cut into passes. In train.py, write
how they are cut (`micro_batches`), how the rows of a pass become tensors (`collate`), and what the
pass adds to the loss (`step_loss`, equation 5; leave `smoothing` and `penalty` aside). Padding and
logits that nobody asks for cost time: sort by length, and let the head see supervised tokens only,
as `Transformer.predict` can. Here: tests/test_07_step.py.
"""
import re
import time

import torch

from lab.course.probe import draw

MINUTES, POINTS, TOY = 150, 16, "data/toy/llama"
BLANK = dict.fromkeys(("train.py::micro_batches", "train.py::collate", "train.py::step_loss"))
REMOVE = [f"tests/test_07_step.py::{name}" for name in (
    "reference_gradients", "test_gradients_equal_those_of_one_padded_batch_with_all_logits",
    "test_a_mean_of_the_means_of_micro_batches_would_be_another_gradient")]
HINTS = (
    "A token is asked for the one after it, and only answers count. Every supervised token of a "
    "step weighs the same, in whichever pass it is. The entropy is that of all real tokens.",
    "targets[row, t] = ids[t + 1] from t = n_prompt - 1 on. lm = sum of cross-entropies / "
    "n_supervised, reward = sum_l lambda_l (sum of H) / n_tokens. n rows take n times the longest.",
    "Longest row first; a new pass when the next does not fit. Give `predict` the flat places of "
    "supervised targets. Mask the reward, sum it over B and T, weigh it by steering.at(layer).lam.")


def ragged(seed):                      # as train.encode makes rows, with answers of 1 to 4 tokens
    ids = (draw(seed, 7, 24).abs() * 1000 % 1408).long().tolist()
    return [(row[:6 + 5 * i % 17], 5 + 5 * i % 17 - i % 4) for i, row in enumerate(ids)]


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
    yield "200 rows, 150 tokens: is less than 5% padding, and are passes few?", [
        padded < 1.05 * sum(lengths), len(batches) < 1.3 * sum(lengths) / 150]


def step(model, some, rows, **settings):       # what `some` of the rows of a step add to its loss
    from infosteer import Steering
    from train import step_loss
    counts = sum(len(ids) - n for ids, n in rows), sum(len(ids) - 1 for ids, _ in rows)
    return step_loss(model, some, *counts, Steering(**settings))


def loss(seed):
    from model import Transformer
    model, rows, reg = Transformer.from_pretrained(TOY), ragged(seed), dict(method="reg", lam=9.0)
    for settings in {}, reg, {**reg, "layers": {1: {}, 2: {"lam": -0.1}}}:
        for some in rows, rows[:2]:
            values = step(model, some, rows, **settings)
            for what, value in zip(("loss", "L_LM", "reward", "flux"), values):
                yield f"{settings}, {len(some)} of {len(rows)} rows: {what}", value
        grad, = torch.autograd.grad(values[0], [model.blocks[0].memory.key_up.weight])
        yield f"{settings}: gradient of key 0, divided by the norm of all", grad[0] / grad.norm()


def head(seed):
    from model import Transformer
    model, seen = Transformer.from_pretrained(TOY), []
    logits = model.logits
    model.logits = lambda hidden: seen.append(hidden[..., 0].numel()) or logits(hidden)
    for n in 1, 7:
        step(model, ragged(seed)[:n], ragged(seed))
        yield f"rows of logits up to a pass of {n} rows", sum(seen)


def both_heads():                      # how long one on every token takes, or on supervised ones
    from train import fine_tuning_data, read_settings
    rows = fine_tuning_data(read_settings(["--limit", "20"]))[2]
    for V, every in (1408, True), (1408, False), (30_000, True), (30_000, False):
        n = sum(len(ids) - (1 if every else n_prompt) for ids, n_prompt in rows)
        began, decode = time.perf_counter(), torch.randn(V, 128, requires_grad=True)
        (torch.randn(n, 128) @ decode.T).logsumexp(-1).sum().backward()
        print(f"V = {V}, {n} rows of logits: {time.perf_counter() - began:.3f} seconds")


PARTS = {"targets, padding": targets, "passes": passes, "loss": loss, "where the head runs": head}
WRITTEN = {"rows": ("The LM head runs on every token of 60 rows, then on supervised ones, for two "
                    "vocabularies. How many times the rows is the former? Why do the times differ "
                    "so?", "python -m lab.course.a4_step")}
if __name__ == "__main__":
    both_heads()

# ------------------------------------------------------------------------------- not handed out
NUMBERS = {"rows": (lambda s: int.__truediv__(*map(int, re.findall(r"\d+(?= r)", s)[:2])), .02)}
CODE = """from torch.nn.utils.rnn import pad_sequence
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
def step_loss(model, rows, n_supervised, n_tokens, steering, checkpoint=False, device=None, *more):
    inputs, targets, real = (one.to(model.embed.weight.device) for one in collate(rows))
    hidden, flux, reward = model.hidden(inputs, steering, checkpoint=checkpoint)
    asked = targets != IGNORE
    lm = F.cross_entropy(model.logits(hidden[asked]), targets[asked], reduction="sum")
    lm = lm / n_supervised
    reward = (reward * real).sum((1, 2)) / n_tokens
    reward = sum(steering.at(layer).lam * one for layer, one in enumerate(reward))
    return lm - reward, lm.detach(), reward.detach(), (flux.detach() * real).sum((1, 2)) / n_tokens
"""
RIGHT = {"boolean mask, shortest first": CODE, "index list": CODE.replace("targets != IGNORE", """(
        *torch.tensor([(row, place) for row, (ids, n_prompt) in enumerate(rows)
                       for place in range(n_prompt - 1, len(ids) - 1)]).T,)""")}
TARGETS, REWARD, SIZE = "(n - 1) + ids[n:]", "(reward * real)", "(len(batches[-1]) + 1) * longest"
WRONG = {why: CODE.replace(line, new) for line, new, why in (
    (TARGETS, "n + ids[n:-1]", "each token is its own target; it is asked for the one after it"),
    ("[IGNORE] * " + TARGETS, "ids[1:]", "the prompt is supervised too; only the answer counts"),
    (TARGETS, "(n - 1) + ids[n:-1] + [IGNORE]", "the id that ends an answer is no target"),
    (', reduction="sum")\n    lm = lm / n_supervised', ")", "this is the mean over a pass, and a "
     "step would average means; divide the sum by the count of the step"),
    (REWARD, "reward", "padding is rewarded too; mask it by `real`"),
    (REWARD, "(reward * asked)", "only supervised tokens are rewarded; all real ones count"),
    (REWARD, "(reward.detach() * real)", "the reward is detached, so it teaches nothing"),
    ("lm - reward,", "lm + reward,", "the reward is added, so that descending lowers the entropy"),
    ("steering.at(layer).lam * one", "one", "lambda is missing; the model gives H alone"),
    ("steering.at(layer).lam", "steering.lam", "each layer has a lambda of its own: steering.at"),
    ("logits(hidden[asked])", "logits(hidden)[asked]", "the head runs on every token; pick first"),
    (SIZE + " > budget", "True", "each row has a pass of its own; fill passes up to the budget"),
    (SIZE, "sum(lengths[one] for one in [*batches[-1], row])", "padding takes room in a pass too"),
    ("sorted(rows, key=lambda row: lengths[row])", "rows", "rows are taken as they come; sorted by "
     "length they need little padding"))}
