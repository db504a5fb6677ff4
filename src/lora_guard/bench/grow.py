"""Bench grow: what checks every 16 tokens cost as an answer gets longer, over generation alone."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_guard.bench.chat import EVERY, Prompt, prompt_of
from lora_guard.bench.report import Figure, Report
from lora_guard.bench.rows import EVAL_FILE
from lora_guard.bench.setup import Setup, dtype_of
from lora_guard.bench.timing import cut, planned_rounds
from lora_guard.guard import Guard
from lora_guard.progress import Advance, progress

PROMPT_TOKENS = 64
LENGTHS = (64, 128, 256, 512, 1024)
ROUNDS = 3
ROWS = 16
EXPONENT = 1.15


def run(
    setup: Setup, *, prompt_tokens: int = PROMPT_TOKENS, lengths: Sequence[int] = LENGTHS, rounds: int = ROUNDS
) -> Report:
    """Stream two answers side by side, 16 tokens of one and then of the other, one of them checked.

    Side by side, because the difference of two long runs would be that of the machine's moods. The exponent is the
    slope of log(difference) over log(tokens).

    Args:
        setup: guard, rows, seed and deadline.
        prompt_tokens: of the prompt, which is computed before the clock starts.
        lengths: multiples of 16, ascending.
        rounds: at most.

    Raises:
        InputError: the model's context has no room for prompt and answer.
    """
    rows = setup.read_rows(EVAL_FILE, ROWS)
    guard = setup.load_guard()
    prompt = prompt_of(guard.engine.renderer, rows.examples, prompt_tokens)
    _race(guard, prompt, [EVERY], setup, lambda count, note="": None)
    races: list[Race] = []
    began, planned = time.monotonic(), rounds
    with progress("grow", rounds * lengths[-1], unit="tokens") as tick:
        while len(races) < planned:
            races.append(_race(guard, prompt, lengths, setup, tick))
            if len(races) == 1:
                planned = 1 + planned_rounds(rounds - 1, time.monotonic() - began, setup.deadline)
    exponents = [exponent for race in races if (exponent := race.exponent()) is not None]
    figures = {"exponent": Figure("growth of the checks' cost with the answer's length", exponents, EXPONENT)}
    for length in lengths:
        ratios = [race.checked[length] / race.alone[length] for race in races if length in race.checked]
        figures[f"ratio-{length}"] = Figure(f"{length:,} tokens with checks ÷ generation alone", ratios)
    notes = cut("grow", len(races), rounds)
    if any(lengths[-1] not in race.checked for race in races):
        notes.append(f"grow: a round was stopped before {lengths[-1]:,} tokens; longer ratios are of fewer rounds")
    return Report("grow", figures, dtype_of(setup.load_base()), rows.source, notes)


@dataclass(frozen=True)
class Race:
    """Tokens of the answer -> seconds taken so far, of each side; only the lengths reached before the deadline."""

    alone: dict[int, float] = field(default_factory=dict)
    checked: dict[int, float] = field(default_factory=dict)

    def exponent(self) -> float | None:
        """Slope of log(checked - alone) over log(tokens); None with less than two lengths where that is positive."""
        points = [
            (math.log(length), math.log(self.checked[length] - self.alone[length]))
            for length in self.checked
            if self.checked[length] > self.alone[length]
        ]
        if len(points) < 2:
            return None
        return statistics.linear_regression(*zip(*points, strict=True)).slope


def _race(guard: Guard, prompt: Prompt, lengths: Sequence[int], setup: Setup, tick: Advance) -> Race:
    """Stream both answers to the last length, in alternating order."""
    sessions = {"alone": guard.session(seed=setup.seed), "checked": guard.session(seed=setup.seed)}
    seconds = dict.fromkeys(sessions, 0.0)
    race = Race()
    for session in sessions.values():
        session.append(prompt.ids)
    for number in range(1, lengths[-1] // EVERY + 1):
        if time.monotonic() > setup.deadline:
            break
        for name in list(sessions) if number % 2 else list(sessions)[::-1]:
            began = time.perf_counter()
            for _ in range(EVERY):
                sessions[name].sample()
            if name == "checked":
                sessions[name].judge("response")
            seconds[name] += time.perf_counter() - began
        tick(EVERY)
        if number * EVERY in lengths:
            race.alone[number * EVERY], race.checked[number * EVERY] = seconds["alone"], seconds["checked"]
    return race
