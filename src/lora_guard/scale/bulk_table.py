"""One schema for all output files of a bulk moderation: what types the input columns have, and tables of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow

from lora_guard.conversation import valid_unicode
from lora_guard.errors import DataError
from lora_guard.verdict import Verdict

Columns = dict[str, pyarrow.DataType | None]
"""Input column -> the type of its values; None where they are written as JSON text. ``int32`` stands for all integers
of up to 32 bits: beside fractions, longer ones might not come through as floats."""

_PARTS = {"flagged": pyarrow.bool_(), "score": pyarrow.float64(), "threshold": pyarrow.float64()}


def add_row(columns: Columns, row: Mapping[str, Any]) -> None:
    """Widen the columns until they hold the row's values."""
    for name, value in row.items():
        found = _type_of(value)
        known = columns.get(name, pyarrow.null())
        columns[name] = known if known == found else _merged(known, found)


def add_schema(columns: Columns, schema: pyarrow.Schema) -> None:
    """Widen the columns until they hold those of a Parquet file."""
    for field in schema:
        columns[field.name] = _merged(columns.get(field.name, pyarrow.null()), _plain(field.type))


def merged(parts: Sequence[Columns]) -> Columns:
    """The columns that hold those of all files, in the order in which they are met first."""
    together: Columns = {}
    for columns in parts:
        for name, found in columns.items():
            together[name] = _merged(together.get(name, pyarrow.null()), found)
    return together


def check_names(columns: Columns, categories: Sequence[str]) -> None:
    """See that no input column has the name of one of ours.

    Raises:
        DataError: one has.
    """
    taken = sorted(columns.keys() & set(schema({}, categories).names))
    if taken:
        raise DataError(f"input column {taken[0]!r} has the name of an output column; allowed: rename it")


def schema(columns: Columns, categories: Sequence[str]) -> pyarrow.Schema:
    """``row_id``, every input column, then the verdict: flat, in the order of ``Verdict.to_dict``."""
    inputs = {name: _written(kind) for name, kind in columns.items()}
    verdict: dict[str, pyarrow.DataType] = {f"verdict_{part}": kind for part, kind in _PARTS.items()}
    verdict |= {"verdict_target": pyarrow.string(), "verdict_windows": pyarrow.int32()}
    verdict |= {f"verdict_{name}_{part}": kind for name in categories for part, kind in _PARTS.items()}
    return pyarrow.schema(list({"row_id": pyarrow.string(), **inputs, **verdict}.items()))


def table(
    ids: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    columns: Columns,
    categories: Sequence[str],
) -> pyarrow.Table:
    """The output of one shard, a row for each id."""
    values: dict[str, list[Any]] = {"row_id": list(ids)}
    for name, kind in columns.items():
        values[name] = [_cell(row.get(name), kind) for row in rows]
    for part in (*_PARTS, "target", "windows"):
        values[f"verdict_{part}"] = [getattr(verdict, part) for verdict in verdicts]
    for name in categories:
        for part in _PARTS:
            values[f"verdict_{name}_{part}"] = [getattr(verdict.categories[name], part) for verdict in verdicts]
    return pyarrow.table(values, schema=schema(columns, categories))


def _cell(value: Any, kind: pyarrow.DataType | None) -> Any:
    if value is None:
        return None
    if kind is None:
        return json.dumps(value, default=as_text)
    return valid_unicode(value) if isinstance(value, str) else value


def as_text(value: object) -> str:
    """What JSON has no form for; a cell of Arrow's as Arrow writes it, which knows more years and nanoseconds."""
    return str(value.cast(pyarrow.string()).as_py() if isinstance(value, pyarrow.Scalar) else value)


def _type_of(value: Any) -> pyarrow.DataType | None:
    """The type of a JSON value: null, true or false, a number, a string; None for what is nested or too large."""
    if value is None:
        return pyarrow.null()
    if isinstance(value, bool):
        return pyarrow.bool_()
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return pyarrow.int32()
        return pyarrow.int64() if -(1 << 63) <= value < 1 << 63 else None
    return {float: pyarrow.float64(), str: pyarrow.string()}.get(type(value))


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    """A Parquet column's type in the output."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pyarrow.string()
    if types.is_integer(kind) and kind.bit_width <= 32:
        return pyarrow.int32()
    return None if types.is_nested(kind) or isinstance(kind, pyarrow.BaseExtensionType) else kind


def _merged(one: pyarrow.DataType | None, other: pyarrow.DataType | None) -> pyarrow.DataType | None:
    """The type that holds the values of two; None, JSON text, where only that does."""
    if one is None or other is None or one == other:
        return one if one == other else None
    if pyarrow.null() in (one, other):
        return other if one == pyarrow.null() else one
    kinds = (one, other)
    if not all(pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) for kind in kinds):
        return None
    if all(map(pyarrow.types.is_integer, kinds)):
        return None if pyarrow.uint64() in kinds else pyarrow.int64()
    return None if {pyarrow.int64(), pyarrow.uint64()} & set(kinds) else pyarrow.float64()


def _written(kind: pyarrow.DataType | None) -> pyarrow.DataType:
    """A column's type in the output: whatever its integers, 64 bits, so that runs over like input have one schema."""
    if kind is None or kind == pyarrow.null():
        return pyarrow.string()
    return pyarrow.int64() if pyarrow.types.is_integer(kind) and kind != pyarrow.uint64() else kind
