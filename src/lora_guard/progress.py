"""Progress of long work: a live bar with ETA on a terminal, plain lines elsewhere; always on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Report ``count`` more finished units, with figures to show beside them."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def progress(task: str, total: int, *, done: int = 0, unit: str = "rows", shown: bool = True) -> Iterator[Advance]:
    """Show the progress of ``total`` units, of which ``done`` were finished before; nothing unless ``shown``.

    On a terminal the bar also shows elapsed and remaining time; elsewhere a line appears at most every ten seconds and
    at the end.
    """
    console = Console(stderr=True, quiet=not shown, emoji=False)
    if console.is_terminal and shown:
        with _bar(console) as bar:
            handle = bar.add_task(task, total=total, completed=done, note="")
            yield lambda count, note="": bar.update(handle, advance=count, note=note)
        return
    lines = _Lines(console, task, total, done, unit)
    yield lines.advance


def in_wholes(done: Callable[[int], None], wholes: int, parts: int) -> Callable[[int], None]:
    """A callback for finished parts that tells ``done`` of as large a share of the wholes, in whole numbers."""
    finished = 0

    def advance(count: int) -> None:
        nonlocal finished
        before, finished = finished * wholes // parts, finished + count
        done(finished * wholes // parts - before)

    return advance


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, console: Console, task: str, total: int, done: int, unit: str) -> None:
        self._console = console
        self._task, self._total, self._unit = task, total, unit
        self._start = self._finished = done
        self._began = time.monotonic()
        self._last = self._began - _SECONDS_BETWEEN_LINES

    def advance(self, count: int, note: str = "") -> None:
        self._finished += count
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and self._finished < self._total:
            return
        self._last = now
        remaining = (now - self._began) / max(1, self._finished - self._start) * (self._total - self._finished)
        eta = time.strftime("%H:%M:%S", time.gmtime(remaining))
        figures = f"{self._task}: {self._finished}/{self._total} {self._unit}, ETA {eta}"
        self._console.print(f"{figures}, {note}" if note else figures, markup=False, highlight=False, soft_wrap=True)
