"""A run packs the rows of its steps into micro-batches of --micro-tokens, by any model and data.

After reading this you know how `train.train` can be watched, or given other work: `world` says who
does what, and `data` what is learnt.
"""
import itertools

import pytest

from test_07_step import model_of, random_rows
from train import ALONE, micro_batches, order_of, read_settings, train


class Watched(ALONE):
    """The world of a run that leaves nothing behind but the micro-batches of each step."""

    writes = False

    def __init__(self):
        self.seen = []

    def share(self, batches):
        self.seen.append(batches)
        return batches


@pytest.mark.parametrize("budget", [50, 99, 10**6])
def test_the_rows_of_each_step_are_packed_and_not_trained_one_by_one(tmp_path, budget):
    rows, world = random_rows(), Watched()
    args = read_settings(["--batch", "12", "--epochs", "2", "--micro-tokens", str(budget),
                          "--device", "cpu", "--out", str(tmp_path / "none")])
    train(args, world, lambda args: (model_of(), None, rows, [""] * len(rows), ""))
    lengths = [len(ids) - 1 for ids, _ in rows]
    steps = itertools.islice(order_of(len(rows), 12, args.seed), 4)            # two an epoch
    assert world.seen == [micro_batches(chosen, lengths, budget) for chosen in steps]
    assert all(len(batches) < sum(map(len, batches)) for batches in world.seen)
    assert not list(tmp_path.iterdir())
