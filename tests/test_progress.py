"""Progress: on stderr alone, as a bar on a terminal and as plain lines elsewhere, and nothing unless shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard import progress as module
from lora_guard.progress import in_wholes, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, for tests to set."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_off_a_terminal_plain_lines_go_to_stderr(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress("score [a] :smile:", 3, unit="files") as tick:
        clock[0] += 30
        tick(1, "loss 0.5")
        clock[0] += 1
        tick(1)
        tick(1, "[bold]done[/bold]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "score [a] :smile:: 1/3 files, ETA 00:01:00, loss 0.5",
        "score [a] :smile:: 3/3 files, ETA 00:00:00, [bold]done[/bold]",
    ]


def test_lines_come_at_most_every_ten_seconds_and_at_the_end(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress("score", 1000) as tick:
        for _ in range(1000):
            clock[0] += 0.1
            tick(1)
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 12
    assert lines[-1].startswith("score: 1000/1000 rows")


def test_a_continued_task_counts_what_was_done_but_not_its_time(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress("score", 100, done=90) as tick:
        clock[0] += 10
        tick(5)
    assert capsys.readouterr().err == "score: 95/100 rows, ETA 00:00:10\n"


@given(st.lists(st.integers(0, 9), max_size=9), st.integers(0, 20), st.integers(0, 5))
def test_any_counts_give_whole_lines(counts: list[int], total: int, done: int) -> None:
    with pytest.MonkeyPatch.context() as patch, progress("score", total, done=done, shown=True) as tick:
        patch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
        for count in counts:
            tick(count)


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("score", 2, shown=False) as tick:
        tick(2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_gets_a_bar_with_the_time_that_remains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with progress("score", 4, done=1) as tick:
        tick(3, "loss 0.5")
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("score", "4/4", "ETA", "loss 0.5"):
        assert part in captured.err


def test_an_error_inside_is_not_held_back() -> None:
    with pytest.raises(ValueError, match="inside"), progress("score", 2):
        raise ValueError("inside")


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 50))
def test_parts_are_told_as_wholes_and_all_parts_as_all_wholes(counts: list[int], wholes: int) -> None:
    told: list[int] = []
    advance = in_wholes(told.append, wholes, sum(counts) or 1)
    for count in counts:
        advance(count)
    assert all(count >= 0 for count in told)
    assert sum(told) == (wholes if sum(counts) else 0)
