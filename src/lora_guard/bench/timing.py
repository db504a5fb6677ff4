"""Interleaved timing: every side in every round, in alternating order, as many rounds as the time allows."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lora_guard.progress import progress

_MARGIN = 1.1
"""A round may take this much longer than the warm-up before it would pass the deadline."""


@dataclass(frozen=True)
class Timings:
    """Seconds of each side in each round; ``notes`` say what was cut."""

    seconds: dict[str, list[float]]
    notes: list[str]

    def ratios(self, side: str, against: str) -> list[float]:
        """The side's time as a multiple of another's, round by round."""
        return [a / b for a, b in zip(self.seconds[side], self.seconds[against], strict=True)]


def interleave(task: str, sides: Mapping[str, Callable[[], object]], *, rounds: int, deadline: float) -> Timings:
    """Time the sides against each other, after one uncounted turn of each.

    Args:
        task: for the progress shown.
        sides: name -> one turn of that side.
        rounds: at most this many, and at least one.
        deadline: on the monotonic clock; the warm-up's time says how many rounds end before it.
    """
    began = time.monotonic()
    with progress(f"{task}, warm-up", len(sides), unit="turns") as tick:
        for name, side in sides.items():
            side()
            tick(1, name)
    warm_up = time.monotonic() - began
    planned = max(1, planned_rounds(rounds, _MARGIN * warm_up, deadline))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with progress(task, planned * len(sides), unit="turns") as tick:
        for number in range(planned):
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                start = time.perf_counter()
                sides[name]()
                seconds[name].append(time.perf_counter() - start)
                tick(1, f"{name} {seconds[name][-1]:.3g} s")
    return Timings(seconds, cut(task, planned, rounds))


def planned_rounds(wanted: int, seconds_each: float, deadline: float) -> int:
    """How many rounds end before the deadline, at most those wanted."""
    return max(0, int(min(wanted, (deadline - time.monotonic()) / max(seconds_each, 1e-9))))


def cut(task: str, done: int, wanted: int) -> list[str]:
    """What to say of rounds that did not fit."""
    return [] if done >= wanted else [f"{task}: {done} of {wanted} rounds fitted into the time"]
