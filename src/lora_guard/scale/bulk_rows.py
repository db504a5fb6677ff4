"""Reads rows of JSONL, CSV and Parquet from any place within a file; a bad row becomes a reason, never an error."""

import csv
import json
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow
from pyarrow.parquet import ParquetFile

from lora_guard.conversation import Conversation, Target, valid_unicode
from lora_guard.data.sources import parse_line
from lora_guard.errors import DataError
from lora_guard.moderate_file import conversation_of
from lora_guard.scale import bulk_table

FORMS = (".jsonl", ".csv", ".parquet")
LONGEST = 16 << 20
"""Bytes of the longest line and the longest CSV cell: a file without line breaks must not fill the memory."""

_ROWS_AT_ONCE = 256


class Position(NamedTuple):
    """Where reading can begin: a byte with the lines before it, or a row group of Parquet with the rows before it."""

    start: int = 0
    before: int = 0


class Row(NamedTuple):
    """A row, or what stands in the place of one."""

    where: str
    """``file:line`` for messages."""
    values: dict[str, Any]
    """Column -> value; empty if the row is bad."""
    bad: str
    """Why it is no row; empty if it is one."""
    raw: str
    """A bad row as it stands in the file, so that it can be mended."""
    after: Position
    """Where the next one begins."""


def form_of(path: str) -> str:
    """A file's ending.

    Raises:
        DataError: one that is not read.
    """
    form = next((form for form in FORMS if path.lower().endswith(form)), None)
    if form is None:
        raise DataError(f"input {path!r} has another ending than those allowed: {', '.join(FORMS)}")
    return form


def conversation(row: Row, form: str, target: Target | None) -> Conversation:
    """As ``lora-guard moderate`` reads a row; in a table a null, and in CSV a response without text, is none.

    Raises:
        DataError: the row is none that can be judged; the message begins with its place.
    """
    values = {name: value for name, value in row.values.items() if value is not None}
    if form == ".csv" and not values.get("response"):
        values.pop("response", None)
    return conversation_of(values, row.where, target)


def rows(file: IO[bytes], path: str, position: Position) -> Iterator[Row]:
    """The rows from a position on, to the end of the file; of Parquet, to the end of the row group.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    try:
        yield from readers[form_of(path)](file, path, position)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def header(file: IO[bytes], path: str) -> list[str]:
    """The column names of a CSV file.

    Raises:
        DataError: none, two of one name, or not UTF-8.
    """
    return _header(file, path)[0]


def _jsonl(file: IO[bytes], path: str, position: Position) -> Iterator[Row]:
    for line, after in _lines(file, position):
        where = f"{path}:{after.before}"
        if not line.strip():
            continue
        try:
            if _is_cut(line):
                raise DataError(f"{where}: a line of more than {LONGEST >> 20} MiB")
            values = parse_line(line, where)
            if any(name != valid_unicode(name) for name in values):
                raise DataError(f"{where}: a field's name is not valid Unicode, which Parquet cannot hold")
            yield Row(where, values, "", "", after)
        except DataError as error:
            yield _bad(where, str(error).removeprefix(f"{where}: "), line, after)


def _csv(file: IO[bytes], path: str, position: Position) -> Iterator[Row]:
    columns, first = _header(file, path)
    after = max(first, position)
    taken: list[tuple[bytes, Position]] = []  # the lines of the record that is being read, and where each ends

    def text() -> Iterator[str]:
        for line, behind in _lines(file, after):
            taken.append((line, behind))
            yield line.decode("utf-8", "surrogateescape")

    csv.field_size_limit(LONGEST)
    reader = csv.reader(text(), strict=True)
    while True:
        taken.clear()
        bad, cells = "", []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad = _csv_reason(error)
            # A quote that is not closed takes in the rows behind it: only its own line is bad, they are read anew.
            del taken[1:]
            reader = csv.reader(text(), strict=True)
        lines, (_, after) = [line for line, _ in taken], taken[-1]
        if not (cells or bad):
            continue
        bad = bad or _bad_cells(cells, columns, lines)
        where = f"{path}:{after.before}"
        if bad:
            yield _bad(where, bad, b"".join(lines), after)
        else:
            yield Row(where, dict(zip(columns, cells, strict=True)), "", "", after)


def _csv_reason(error: csv.Error) -> str:
    """Why a record is none; the module's own words for an open quote at the end of a file do not name the quote."""
    open_quote = str(error) == "unexpected end of data"
    return f"not CSV: {'a quote is opened in this line and never closed' if open_quote else error}"


def _bad_cells(cells: list[str], columns: list[str], lines: list[bytes]) -> str:
    if any(map(_is_cut, lines)):
        return f"a line of more than {LONGEST >> 20} MiB"
    if len(cells) != len(columns):
        return f"{len(cells)} cells; the header has {len(columns)}"
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return "not UTF-8"
    return ""


def _header(file: IO[bytes], path: str) -> tuple[list[str], Position]:
    line, after = next(_lines(file, Position()), (b"", Position()))
    try:
        names = next(csv.reader([line.decode("utf-8-sig")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}:1 is no CSV header: {error}") from error
    if not names or len(set(names)) != len(names):
        raise DataError(f"{path}:1 is no CSV header; needed: column names in one line, each once")
    return names, after


def _parquet(file: IO[bytes], path: str, position: Position) -> Iterator[Row]:
    group, index = position.start, 0
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group]):
            skipped = min(batch.num_rows, max(0, position.before - index))
            index += skipped
            for place in range(skipped, batch.num_rows):
                index += 1
                where = f"{path}:row group {group}, row {index}"
                yield _table_row(batch, place, where, Position(group, index))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not Parquet: {error}") from error


def _table_row(batch: pyarrow.RecordBatch, place: int, where: str, after: Position) -> Row:
    """A row of Parquet. Dates and times stay Arrow's: Python has not all of their years, nor nanoseconds."""
    values: dict[str, Any] = {}
    bad = ""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        cell = column[place]
        try:
            if pyarrow.types.is_dictionary(cell.type):
                cell = column.slice(place, 1).dictionary_decode()[0]
            is_time = pyarrow.types.is_temporal(cell.type) and cell.is_valid
            values[name] = cell if is_time else cell.as_py()
        except UnicodeDecodeError:
            bad = bad or f"column {name!r} is not UTF-8"
            buffer = getattr(cell, "as_buffer", bytes)()  # none where the text stands within a list or struct
            values[name] = bytes(buffer).decode("utf-8", "backslashreplace")
        except (ValueError, OverflowError) as error:  # a date within a list or struct
            bad = bad or f"column {name!r} cannot be read: {error}"
            values[name] = None
    raw = json.dumps(values, default=bulk_table.as_text) if bad else ""
    return Row(where, {} if bad else values, bad, raw, after)


def as_text(row: Row) -> str:
    """A row as it stands in the file, or as JSON."""
    return row.raw or json.dumps(row.values, default=bulk_table.as_text)


def _lines(file: IO[bytes], position: Position) -> Iterator[tuple[bytes, Position]]:
    """Lines, and where each ends; of one that is longer than ``LONGEST``, the beginning alone."""
    end, number = position
    file.seek(end)
    while line := file.readline(LONGEST):
        rest, end = line, end + len(line)
        while _is_cut(rest) and (rest := file.readline(LONGEST)):
            end += len(rest)
        number += 1
        yield line, Position(end, number)


def _is_cut(line: bytes) -> bool:
    return len(line) >= LONGEST and not line.endswith(b"\n")


def _bad(where: str, reason: str, raw: bytes, after: Position) -> Row:
    return Row(where, {}, reason, raw.decode("utf-8", "backslashreplace").rstrip("\r\n"), after)
