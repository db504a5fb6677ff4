"""Interleaving: every side in every round, in alternating order, and no more rounds than fit."""

import math
import time

from lora_guard.bench.timing import interleave, planned_rounds


def test_sides_take_turns_in_alternating_order_after_a_warm_up() -> None:
    turns: list[str] = []
    sides = {name: (lambda name=name: turns.append(name)) for name in "abc"}
    timings = interleave("t", sides, rounds=3, deadline=math.inf)
    assert "".join(turns) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert timings.notes == []
    assert len(timings.ratios("a", "b")) == 3


def test_what_does_not_fit_is_cut_and_said() -> None:
    turns: list[str] = []
    timings = interleave("t", {"a": lambda: turns.append("a")}, rounds=5, deadline=time.monotonic())
    assert turns == ["a", "a"]
    assert timings.notes == ["t: 1 of 5 rounds fitted into the time"]


def test_as_many_rounds_are_planned_as_end_before_the_deadline() -> None:
    assert planned_rounds(9, 1000.0, time.monotonic() + 3500) == 3
    assert planned_rounds(2, 1000.0, time.monotonic() + 3500) == 2
    assert planned_rounds(9, 1000.0, time.monotonic() - 1) == 0
