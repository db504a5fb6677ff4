"""Batches: every row drawn as often as asked, shared by processes without loss, of rows of similar length."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lora_guard.data.batch import micro_batches, plan_epoch

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


@given(st.lists(st.floats(0, 4), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_a_row_is_drawn_as_often_as_asked_up_to_a_fraction(draws: list[float], size: int, seed: int) -> None:
    drawn = Counter(row for batch in plan_epoch([1] * len(draws), size, seed, 0, draws) for row in batch)
    assert all(math.floor(asked) <= drawn[row] <= math.ceil(asked) for row, asked in enumerate(draws))


def test_fractions_of_rows_are_other_rows_in_every_epoch() -> None:
    drawn = [{row for batch in plan_epoch([1] * 40, 4, 0, epoch, [0.5] * 40) for row in batch} for epoch in range(20)]
    assert set().union(*drawn) == set(range(40))
    assert drawn[0] != drawn[1]


def test_seeds_differ() -> None:
    assert plan_epoch([1] * 40, 4, 0, 0) != plan_epoch([1] * 40, 4, 1, 0)


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


@given(lengths_of_rows, st.integers(1, 5))
def test_processes_get_as_many_tokens_up_to_one_row(lengths: list[int], world: int) -> None:
    batch = list(range(len(lengths)))
    tokens = [
        sum(lengths[row] for part in micro_batches(batch, lengths, rank, world, 4) for row in part)
        for rank in range(world)
    ]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_a_process_without_rows_takes_part_with_empty_pieces() -> None:
    assert [micro_batches([1, 0], [3, 1], rank, 3, 2) for rank in range(3)] == [[[1]], [[0]], [[]]]
