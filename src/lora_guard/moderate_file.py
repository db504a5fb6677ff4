"""Moderates a JSONL file row by row; the output file alone tells where a stopped run goes on."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lora_guard import files
from lora_guard.conversation import TARGETS, Conversation, Target
from lora_guard.data.sources import parse_line, read_rows
from lora_guard.errors import DataError, InputError
from lora_guard.guard import Guard
from lora_guard.progress import progress

_ROWS_AT_ONCE = 256
"""Rows judged together, and written together: a kill loses at most this many verdicts.

A score depends a little on the rows beside it in a batch. A resumed run therefore begins with a whole group, and writes
what an uninterrupted one would have written.
"""


def moderate_file(guard: Guard, source: Path, output: Path, target: Target | None = None) -> int:
    """Write each input row plus ``verdict`` to ``output``; groups of rows that are there already are not judged again.

    Args:
        guard: judges the rows.
        source: JSONL; a row has ``prompt`` and perhaps ``response``, or chat ``messages``.
        output: JSONL; appended to if it holds the verdicts of the first rows of ``source``.
        target: ``prompt`` or ``response`` for every row; by default each row's last message decides.

    Returns:
        How many rows were judged by this call.

    Raises:
        DataError: no such file, a bad row (with file and line), or an output that belongs to another input.
        ResourceError: no disk space, or an output that cannot be written; what is written stays.
    """
    total = _rows_of(source)
    done = _rows_done(guard, source, output, total)
    files.append_text(output, "")
    with progress("moderate", total, done=done) as tick:
        for judged in moderate_rows(guard, islice(read_rows(source), done, None), target, tick):
            files.append_text(output, "".join(line + "\n" for line in judged))
    return total - done


def moderate_stream(
    guard: Guard, rows: Iterable[tuple[str, dict[str, Any]]], output: IO[str], target: Target | None = None
) -> None:
    """As :func:`moderate_file`, to a text stream, without resuming; each row comes with its place."""
    for judged in moderate_rows(guard, rows, target):
        output.write("".join(line + "\n" for line in judged))
        output.flush()


def moderate_rows(
    guard: Guard,
    rows: Iterable[tuple[str, dict[str, Any]]],
    target: Target | None,
    done: Callable[[int], None] = lambda rows: None,
) -> Iterator[list[str]]:
    """Judge rows in groups; the JSON lines of each group. The rows before a bad one are judged before it raises.

    ``done`` is called with the number of rows as they are judged, before their group is complete.
    """
    pending: list[tuple[dict[str, Any], Conversation]] = []
    try:
        for where, row in rows:
            pending.append((row, conversation_of(row, where, target)))
            if len(pending) == _ROWS_AT_ONCE:
                yield _judge(guard, pending, target, done)
                pending = []
    except DataError:
        if pending:
            yield _judge(guard, pending, target, done)
        raise
    if pending:
        yield _judge(guard, pending, target, done)


def conversation_of(row: Mapping[str, Any], where: str, target: Target | None = None) -> Conversation:
    """The conversation of a row: chat ``messages``, or ``prompt`` and perhaps ``response``.

    Raises:
        DataError: neither, a bad value, or no message of the target's kind; it begins with ``where``.
    """
    try:
        if "messages" in row:
            conversation = Conversation.from_messages(row["messages"])
        elif "prompt" in row:
            conversation = Conversation.of(row["prompt"], row.get("response"))
        else:
            raise InputError(
                f"row has {', '.join(sorted(row)) or 'no field'}; needed: prompt (and response), or messages"
            )
        conversation.up_to(target or conversation.target)
    except (InputError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error
    return conversation


def stream_rows(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of JSONL lines with their places (``stdin:12``); blank lines are skipped.

    Raises:
        DataError: a line that is not a JSON object.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name}:{number}", parse_line(line, f"{name}:{number}")


def _judge(
    guard: Guard, rows: list[tuple[dict[str, Any], Conversation]], target: Target | None, done: Callable[[int], None]
) -> list[str]:
    verdicts = guard.moderate([conversation for _, conversation in rows], target=target, done=done)
    # ASCII escapes, so that a lone surrogate in an input row can be written as it came.
    return [json.dumps({**row, "verdict": v.to_dict()}) for (row, _), v in zip(rows, verdicts, strict=True)]


def _rows_of(source: Path) -> int:
    try:
        with source.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise DataError(f"input {str(source)!r} cannot be read: {error.strerror}") from error


def _rows_done(guard: Guard, source: Path, output: Path, total: int) -> int:
    """How many rows the output holds in whole groups; what a kill left behind them is removed.

    Raises:
        DataError: the output's rows are not those of the source, or were judged with other categories or thresholds.
        ResourceError: the output cannot be written.
    """
    if not output.exists():
        return 0
    kept = kept_bytes = done = done_bytes = 0
    with files.writing(output):
        with output.open("rb") as file:
            rows = read_rows(source)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                _check_written(parse_line(line, f"{output}:{number}"), next(rows, ("", None))[1], guard, output, number)
                done, done_bytes = done + 1, done_bytes + len(line)
                if done % _ROWS_AT_ONCE == 0 or done == total:
                    kept, kept_bytes = done, done_bytes
        os.truncate(output, kept_bytes)
    return kept


def _check_written(
    written: Mapping[str, Any], row: Mapping[str, Any] | None, guard: Guard, output: Path, number: int
) -> None:
    verdict = written.get("verdict")
    if row is None or not isinstance(verdict, Mapping) or _without_verdict(written) != _without_verdict(row):
        raise DataError(f"{output}:{number} is not the verdict on that row of the input; allowed: a new output file")
    expected = [_expected(guard, target) for target in TARGETS if target == verdict.get("target")]
    if [_thresholds(verdict)] != expected:
        raise DataError(f"{output}:{number} was judged by another guard or policy; allowed: a new output file")


def _expected(guard: Guard, target: Target) -> tuple[Any, dict[str, Any]]:
    """The thresholds that the guard holds a target's scores against, in the form of :func:`_thresholds`."""
    heads = guard.spec.calibration.of(target)
    return heads.harmful.thresholds[guard.policy], {
        name: head.thresholds[guard.policy] for name, head in heads.categories.items()
    }


def _thresholds(verdict: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The threshold of harmfulness and of each category in a written verdict, None where there is none."""
    categories = verdict.get("categories")
    decisions = categories if isinstance(categories, Mapping) else {}
    return verdict.get("threshold"), {
        name: decision.get("threshold") if isinstance(decision, Mapping) else None
        for name, decision in decisions.items()
    }


def _without_verdict(row: Mapping[str, Any]) -> str:
    """The row as text to compare: in Python, a NaN differs from itself and True equals 1."""
    return json.dumps({name: value for name, value in row.items() if name != "verdict"}, sort_keys=True)
