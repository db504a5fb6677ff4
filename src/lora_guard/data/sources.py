"""Where rows are read from: JSONL, CSV and Parquet files, and data sets on the Hugging Face hub."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_guard.config import Source
from lora_guard.data.example import Example, parse_row
from lora_guard.data.relabel import check_names, relabel
from lora_guard.errors import DataError
from lora_guard.taxonomy import Taxonomy

_LABEL_FIELDS = ("prompt", "response", "unsafe")
_HUB = "hub:"
_BEAVERTAILS_SPLIT = "30k_train"


def read(source: Source, taxonomy: Taxonomy, seed: int = 0) -> list[Example]:
    """The examples of a source; ``source.rows`` of them, drawn with the seed and in file order, if it says so.

    Raises:
        DataError: missing, empty or unreadable data, a bad row (with file and line), or none that ``only`` keeps.
    """
    check_names(source, taxonomy)
    if source.path.startswith(_HUB):
        pairs = _read_hub(source, taxonomy)
    else:
        pairs = _read_file(Path(source.path), taxonomy, source.columns)
    kept = [pair for pair in pairs if all(pair[1].get(column) in words for column, words in source.only.items())]
    if not kept:
        raise DataError(f"{source.path}: no row is of {source.only}; the file has other words in these columns")
    examples = [relabel(example, row, source, taxonomy, where) for example, row, where in kept]
    if source.prompts_are is not None:
        examples = list({example.prompt: example for example in reversed(examples)}.values())[::-1]
    if source.rows is None or source.rows >= len(examples):
        return examples
    chosen = np.sort(np.random.default_rng(seed).choice(len(examples), source.rows, replace=False))
    return [examples[index] for index in chosen]


def read_file(path: Path, taxonomy: Taxonomy, columns: Mapping[str, str] | None = None) -> list[Example]:
    """The examples of a .jsonl, .csv or .parquet file.

    Args:
        path: the file.
        taxonomy: names the categories that may occur.
        columns: our field (``prompt``, ``response``, ``unsafe`` or a category) -> the file's column. A column with the
            name of a field or category needs no entry.

    Raises:
        DataError: missing, empty or unreadable, a column that is not there, or a bad row.
    """
    return [example for example, _, _ in _read_file(path, taxonomy, columns or {})]


def read_foreign(path: Path, taxonomy: Taxonomy) -> tuple[list[Example], bool]:
    """The examples of a file that may have been labelled by another taxonomy, and whether it was.

    A file none of whose categories is of the taxonomy is read without them; one that shares some must share all.

    Raises:
        DataError: as of :func:`read_file`.
    """
    without = _read_file(path, Taxonomy(taxonomy.name, ()), {})
    raw = [row.get("categories", row.get("category")) or {} for _, row, _ in without]
    named = {str(name) for categories in raw if isinstance(categories, Mapping) for name in categories}
    if taxonomy.categories and named and named.isdisjoint(taxonomy.categories):
        return [example for example, _, _ in without], True
    return read_file(path, taxonomy), False


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL file with their places (``file.jsonl:12``); blank lines are skipped.

    Raises:
        DataError: a missing file, or a line that is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", parse_line(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"data file {str(path)!r} cannot be read: {error.strerror}") from error


def parse_line(line: str | bytes, where: str) -> dict[str, Any]:
    """One line of JSONL.

    Raises:
        DataError: not a JSON object in UTF-8.
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # besides bad syntax, an integer of thousands of digits
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__}; allowed: a JSON object")
    return row


_Found = list[tuple[Example, Mapping[str, Any], str]]
"""Each row as an example, as it was, and its place."""


def _read_file(path: Path, taxonomy: Taxonomy, columns: Mapping[str, str]) -> _Found:
    readers = {".jsonl": read_rows, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"data file {str(path)!r} has ending {path.suffix!r}; allowed: {', '.join(readers)}")
    rows = readers[path.suffix.lower()](path)
    if path.suffix.lower() != ".jsonl" or columns:
        rows = ((where, _map_columns(row, columns, taxonomy, where)) for where, row in rows)
    found: _Found = [(parse_row(row, taxonomy, where, path.stem), row, where) for where, row in rows]
    if not found:
        raise DataError(f"data file {str(path)!r} is empty; needed: at least one row")
    return found


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    end = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: row has another number of cells than the header")
                end = reader.line_num
                yield f"{path}:{end}", row
    except OSError as error:
        raise DataError(f"data file {str(path)!r} cannot be read: {error.strerror}") from error
    except csv.Error as error:  # it may be raised at the end of the file, for a quote that was opened long before
        raise DataError(f"{path}: the row behind line {end} is not CSV: {error}; needed: each quote closed") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data file {str(path)!r} is not CSV in UTF-8: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except OSError as error:
        reason = error.strerror or error  # pyarrow's own errors of this type have no strerror
        raise DataError(f"data file {str(path)!r} cannot be read: {reason}") from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"data file {str(path)!r} is not Parquet: {error}") from error


def _map_columns(row: dict[str, Any], columns: Mapping[str, str], taxonomy: Taxonomy, where: str) -> dict[str, Any]:
    """The row in our form: named fields and category columns gathered; a response cell without text is none."""
    for field, column in {**columns, "prompt": columns.get("prompt", "prompt")}.items():
        if field not in (*_LABEL_FIELDS, *taxonomy.categories):
            raise DataError(f"{where}: columns name {field!r}; allowed: {', '.join(_LABEL_FIELDS)} or a category")
        if column not in row:
            raise DataError(f"{where}: no column {column!r}; the file has {', '.join(map(str, row))}")
    renamed = {**row, **{field: row[column] for field, column in columns.items()}}
    flat = {category: renamed[category] for category in taxonomy.categories if category in renamed}
    nested = renamed.get("categories") or {}
    if not nested and isinstance(renamed.get("category"), Mapping):  # BeaverTails; elsewhere often a column of text
        nested = renamed["category"]
    if isinstance(nested, Mapping):  # another type is for parse_row to refuse
        nested = {**nested, **flat}
    return {**renamed, "response": renamed.get("response") or None, "categories": nested}


def _read_hub(source: Source, taxonomy: Taxonomy) -> _Found:
    import datasets

    name = source.path.removeprefix(_HUB)
    try:
        rows = datasets.load_dataset(name, split=source.split or _BEAVERTAILS_SPLIT, revision=source.revision)
    except Exception as error:  # the hub client raises errors of a dozen libraries
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"hub data set {name!r} cannot be loaded: {reason}") from error
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{name}:{number}"
        mapped = _map_columns(row, source.columns, taxonomy, where) if source.columns else row
        found.append((parse_row(mapped, taxonomy, where, name), mapped, where))
    if not found:
        raise DataError(f"hub data set {name!r} is empty; needed: at least one row")
    return found
