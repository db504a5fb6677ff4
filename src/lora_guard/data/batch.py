"""From rows to batches: the order of an epoch and a process's share of a batch."""

from collections.abc import Sequence

import numpy as np

_BATCHES_SORTED_TOGETHER = 64


def plan_epoch(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, draws: Sequence[float] | None = None
) -> list[list[int]]:
    """The global batches of an epoch as row indices, a function of seed and epoch alone.

    Rows are shuffled, sorted by length within runs of 64 batches, cut, and the batches shuffled: little padding, and
    still another company for each row in every epoch.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch; the last may have fewer.
        seed: of the run.
        epoch: counted from 0.
        draws: expected draws of each row in the epoch; 1 each when absent. 0.5 draws a random half of such rows, 2.5
            each twice and a random half once more.
    """
    random = np.random.default_rng([seed, epoch])
    expected = np.ones(len(lengths)) if draws is None else np.asarray(draws, dtype=float)
    counts = np.floor(expected + random.random(len(expected))).astype(int)
    rows = random.permutation(np.repeat(np.arange(len(expected)), counts))
    batches: list[list[int]] = []
    run = batch_size * _BATCHES_SORTED_TOGETHER
    for start in range(0, len(rows), run):
        ordered = sorted(rows[start : start + run].tolist(), key=lambda row: lengths[row])
        batches.extend(ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size))
    return [batches[place] for place in random.permutation(len(batches))]


def micro_batches(batch: Sequence[int], lengths: Sequence[int], rank: int, world: int, size: int) -> list[list[int]]:
    """One process's share of a global batch, in pieces of at most ``size`` rows.

    Rows are dealt by length, so that processes get similar numbers of tokens. Every process gets the same number of
    pieces, because each is a forward pass that all must take; a process short of rows gets empty ones.
    """
    ordered = sorted(batch, key=lambda row: lengths[row])
    share = ordered[rank::world]
    most = -(-len(ordered) // world)
    return [share[start : start + size] for start in range(0, most, size)]
