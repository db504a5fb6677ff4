"""Bench memory: the peak of a process that chats under guard, against the chat model alone; the guard files' size."""

import time

from lora_guard.bench.peak import told
from lora_guard.bench.probe import ROWS
from lora_guard.bench.report import Figure, Report
from lora_guard.bench.rows import EVAL_FILE
from lora_guard.bench.setup import Setup
from lora_guard.bench.timing import cut, planned_rounds
from lora_guard.progress import progress

ROUNDS = 3
MEGABYTES = 8.0
SHARE = 0.03
"""Of a guard's files, at most, in the bytes of its base model in bf16."""


def run(setup: Setup, *, rounds: int = ROUNDS) -> Report:
    """Start processes in turns, each with the same imports and the same chat, and compare their peaks.

    Raises:
        ResourceError: a process failed, or the machine does not tell a process its peak.
    """
    rows = setup.read_rows(EVAL_FILE, ROWS)
    peaks: dict[str, list[float]] = {"guard": [], "alone": []}
    base: dict[str, float | str] = {}
    began, planned = time.monotonic(), rounds
    with progress("memory", 2 * rounds, unit="processes") as tick:
        for number in range(rounds):
            if number == planned:
                break
            for side in list(peaks) if number % 2 == 0 else list(peaks)[::-1]:
                found = _probe(side, setup)
                peaks[side].append(float(found["peak"]))
                base = found if side == "alone" else base
                tick(1, f"{side} {peaks[side][-1] / 1e6:,.0f} MB")
            if number == 0:
                planned = 1 + planned_rounds(rounds - 1, time.monotonic() - began, setup.deadline)
    ratios = [guard / alone for guard, alone in zip(peaks["guard"], peaks["alone"], strict=True)]
    size = sum(path.stat().st_size for path in setup.folder.iterdir())
    share = size / (2 * float(base["parameters"]))
    figures = {
        "peak": Figure("resident peak with guard ÷ chat model alone", ratios, 1.03),
        "files": Figure("guard files ÷ base model in bf16", [share], SHARE),
        "files-megabytes": Figure("guard files, MB", [size / 1e6], MEGABYTES),
        "alone-megabytes": Figure("resident peak of the chat model alone, MB", [p / 1e6 for p in peaks["alone"]]),
    }
    notes = cut("memory", len(ratios), rounds)
    return Report("memory", figures, str(base["dtype"]), rows.source, notes)


def _probe(side: str, setup: Setup) -> dict[str, float | str]:
    """What one process says of itself."""
    data = [] if setup.data is None else [str(setup.data)]
    return told("lora_guard.bench.probe", [side, setup.guard, str(setup.seed), *data])
