"""Batches: every row drawn as often as asked, shared by processes without loss, padded little and on the right."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lora_guard.data.batch import collate, micro_batches, plan_epoch

lengths_of_rows = st.lists(st.integers(1, 200), min_size=1, max_size=120)


@given(lengths_of_rows, st.integers(1, 16), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_draws_every_row_once_in_full_batches(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(lengths, size, seed, epoch)
    assert sorted(row for batch in plan for row in batch) == list(range(len(lengths)))
    assert sum(len(batch) != size for batch in plan) <= 1
    assert plan == plan_epoch(lengths, size, seed, epoch)


def test_weights_are_draws_an_epoch() -> None:
    plan = plan_epoch([1] * 300, 7, 0, 0, [2.0] * 100 + [0.5] * 100 + [1.0] * 100)
    drawn = Counter(row for batch in plan for row in batch)
    assert all(drawn[row] == 2 for row in range(100))
    assert 30 <= sum(drawn[row] for row in range(100, 200)) <= 70
    assert all(drawn[row] == 1 for row in range(200, 300))


def test_epochs_differ_and_batches_hold_rows_of_like_length() -> None:
    lengths = [1 + (n * 37) % 150 for n in range(640)]
    assert plan_epoch(lengths, 8, 0, 0) != plan_epoch(lengths, 8, 0, 1)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in plan_epoch(lengths, 8, 0, 0))
    assert padded < 1.05 * sum(lengths)


@given(lengths_of_rows, st.integers(1, 5), st.integers(1, 9))
def test_processes_share_a_batch_without_loss_in_the_same_number_of_passes(
    lengths: list[int], world: int, size: int
) -> None:
    batch = list(range(len(lengths)))
    shares = [micro_batches(batch, lengths, rank, world, size) for rank in range(world)]
    assert sorted(row for share in shares for part in share for row in part) == batch
    assert len({len(share) for share in shares}) == 1
    assert all(len(part) <= size for share in shares for part in share)


def test_rows_are_padded_on_the_right_to_their_own_longest() -> None:
    batch = collate([[5, 6, 7], [8]], [[1.0, math.nan], [0.0, 1.0]], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.isnan().tolist() == [[False, True], [False, False]]
