"""Moderates a JSONL file row by row; the output file alone tells where a stopped run goes on."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lora_guard import files
from lora_guard.conversation import Conversation, Target
from lora_guard.data.sources import parse_line, read_rows
from lora_guard.errors import DataError, InputError
from lora_guard.guard import Guard
from lora_guard.progress import progress

_ROWS_AT_ONCE = 256
"""Rows judged together, and written together: a kill loses at most this many verdicts."""


def moderate_file(guard: Guard, source: Path, output: Path, target: Target | None = None) -> int:
    """Write each input row plus ``verdict`` to ``output``; rows that are there already are not judged again.

    Args:
        guard: judges the rows.
        source: JSONL; a row has ``prompt`` and perhaps ``response``, or chat ``messages``.
        output: JSONL; appended to if it holds the verdicts of the first rows of ``source``.
        target: ``prompt`` or ``response`` for every row; by default each row's last message decides.

    Returns:
        How many rows were judged by this call.

    Raises:
        DataError: a bad row (with file and line), or an output that belongs to another input.
        ResourceError: no disk space; what is written stays.
    """
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    done = _rows_done(guard, source, output)
    files.append_text(output, "")
    with progress("moderate", total, done=done) as tick:
        for judged in moderate_rows(guard, islice(read_rows(source), done, None), target, tick):
            files.append_text(output, "".join(line + "\n" for line in judged))
    return total - done


def moderate_stream(guard: Guard, source: IO[str], output: IO[str], target: Target | None = None) -> None:
    """As :func:`moderate_file`, from one text stream to another, without resuming."""
    for judged in moderate_rows(guard, _stream_rows(source), target):
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


def _judge(
    guard: Guard, rows: list[tuple[dict[str, Any], Conversation]], target: Target | None, done: Callable[[int], None]
) -> list[str]:
    verdicts = guard.moderate([conversation for _, conversation in rows], target=target, done=done)
    # ASCII escapes, so that a lone surrogate in an input row can be written as it came.
    return [json.dumps({**row, "verdict": v.to_dict()}) for (row, _), v in zip(rows, verdicts, strict=True)]


def _stream_rows(source: IO[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(source, 1):
        if line.strip():
            yield f"stdin:{number}", parse_line(line, f"stdin:{number}")


def _rows_done(guard: Guard, source: Path, output: Path) -> int:
    """How many rows the output already holds; a last line that a kill cut short is removed.

    Raises:
        DataError: the output's rows are not those of the source, or were judged with another threshold.
    """
    if not output.exists():
        return 0
    complete = 0
    done = 0
    with output.open("rb") as file:
        rows = read_rows(source)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            found = parse_line(line.decode("utf-8"), f"{output}:{number}")
            _, row = next(rows, ("", None))
            if "verdict" not in found or row is None or _without_verdict(found) != _without_verdict(row):
                raise DataError(
                    f"{output}:{number} is not the verdict on that row of {source}; allowed: a new output file"
                )
            if found["verdict"]["threshold"] != guard.spec.calibration.harmful.threshold:
                raise DataError(f"{output}:{number} was judged by another guard; allowed: a new output file")
            complete += len(line)
            done += 1
    os.truncate(output, complete)
    return done


def _without_verdict(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "verdict"}
