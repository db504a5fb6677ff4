"""Bench check: what one judgement costs behind a context of growing length, against a full second pass."""

from collections.abc import Callable, Mapping

from lora_guard.bench.chat import prompt_of
from lora_guard.bench.paper import PaperGuard
from lora_guard.bench.report import Figure, Report
from lora_guard.bench.rows import EVAL_FILE
from lora_guard.bench.setup import Setup, dtype_of
from lora_guard.bench.timing import Timings, interleave

SPEEDUPS: Mapping[int, tuple[str, float | None]] = {
    64: ("speedup-64", None),
    256: ("speedup-256", None),
    1024: ("speedup", 15.0),
    2048: ("speedup-2048", None),
    4096: ("speedup-4096", 50.0),
}
"""Tokens of context -> the figure's name and goal."""

ROUNDS = 11
ROWS = 256


def run(setup: Setup, *, speedups: Mapping[int, tuple[str, float | None]] = SPEEDUPS, rounds: int = ROUNDS) -> Report:
    """Time a judgement by the session and by the paper at each length, in turns.

    Raises:
        InputError: a length beyond the model's context.
    """
    rows = setup.read_rows(EVAL_FILE, ROWS)
    guard, copy = setup.load_guard(), setup.load_base()
    paper = PaperGuard(copy, len(guard.taxonomy.categories), setup.seed)
    sides: dict[str, Callable[[], object]] = {}
    for length in speedups:
        session = guard.session(seed=setup.seed)
        ids = prompt_of(guard.engine.renderer, rows.examples, length).ids
        session.append(ids)
        sides[f"ours {length}"] = lambda session=session: session.judge("response")  # type: ignore[misc]
        sides[f"paper {length}"] = lambda ids=ids: paper.judge(ids)  # type: ignore[misc]
    timings = interleave("check", sides, rounds=rounds, deadline=setup.deadline)
    figures = {
        name: Figure(f"full pass ÷ our check, {length:,} tokens", _speedup(timings, length), goal, "at least")
        for length, (name, goal) in speedups.items()
    }
    for name, goal in (("ours", 2.0), ("paper", None)):
        key = "flatness" if name == "ours" else "paper-flatness"
        figures[key] = Figure(f"{name}: slowest length ÷ fastest", _flatness(timings, name, list(speedups)), goal)
    for length in speedups:
        figures[f"milliseconds-{length}"] = Figure(
            f"our check behind {length:,} tokens, ms", [1000 * taken for taken in timings.seconds[f"ours {length}"]]
        )
    return Report("check", figures, dtype_of(copy), rows.source, timings.notes)


def _speedup(timings: Timings, length: int) -> list[float]:
    return timings.ratios(f"paper {length}", f"ours {length}")


def _flatness(timings: Timings, name: str, lengths: list[int]) -> list[float]:
    """Round by round, the slowest length's time over the fastest's."""
    rounds = zip(*(timings.seconds[f"{name} {length}"] for length in lengths), strict=True)
    return [max(times) / min(times) for times in rounds]
