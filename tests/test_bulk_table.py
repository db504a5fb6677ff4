"""The output's schema: one for all files, every input value kept, what is nested as JSON text."""

import datetime
import json
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.errors import DataError
from lora_guard.scale.bulk_table import Columns, add_row, add_schema, check_names, merged, schema, table
from lora_guard.verdict import Decision, Verdict

VERDICT = Verdict(True, 0.75, 0.5, "prompt", {"a": Decision(False, 0.25, 0.5)}, 2)
INTEGERS = st.integers() | st.sampled_from([2**31, 2**53 + 1, -(2**53) - 1])
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("ab"), inner))


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    columns: Columns = {}
    for row in rows:
        add_row(columns, row)
    return columns


@given(st.lists(st.dictionaries(st.sampled_from("xyz"), VALUES), min_size=1))
def test_every_value_comes_back_or_is_json_text(rows: list[dict[str, Any]]) -> None:
    columns = columns_of(rows)
    written = table(["id"] * len(rows), rows, [VERDICT] * len(rows), columns, ["a"]).to_pylist()
    for row, found in zip(rows, written, strict=True):
        for name, kind in columns.items():
            value = row.get(name)
            if value is None:
                assert found[name] is None
            elif kind is None:
                assert json.loads(found[name]) == value
            elif kind == pyarrow.float64():
                assert found[name] == value
            else:
                assert found[name] == value
                assert type(found[name]) is type(value)


@pytest.mark.parametrize("other", [0.5, pyarrow.float64(), pyarrow.float32()])
def test_an_integer_that_no_float_holds_is_kept_beside_fractions(other: object) -> None:
    row = {"x": 2**53 + 1}
    columns = columns_of([row] if isinstance(other, pyarrow.DataType) else [row, {"x": other}])
    if isinstance(other, pyarrow.DataType):
        add_schema(columns, pyarrow.schema({"x": other}))
    (found,) = table(["id"], [row], [VERDICT], columns, ["a"]).to_pylist()
    assert found["x"] == "9007199254740993"


def test_integers_of_any_width_are_written_as_those_of_64_bits() -> None:
    columns: Columns = {}
    add_schema(columns, pyarrow.schema({"x": pyarrow.uint32(), "y": pyarrow.int8(), "z": pyarrow.uint64()}))
    written = schema(merged([columns, columns_of([{"y": 1, "w": 1}])]), [])
    assert [written.field(name).type for name in "xywz"] == [pyarrow.int64()] * 3 + [pyarrow.uint64()]


@given(st.lists(st.lists(st.dictionaries(st.sampled_from("xyz"), VALUES)), min_size=1))
def test_the_columns_of_files_together_are_those_of_their_rows(files: list[list[dict[str, Any]]]) -> None:
    apart = merged([columns_of(rows) for rows in files])
    assert apart == columns_of([row for rows in files for row in rows])


def test_the_verdict_is_flat_and_behind_the_input() -> None:
    row = {"prompt": "x", "empty": {}, "none": None}
    (found,) = table(["id"], [row], [VERDICT], columns_of([row]), ["a"]).to_pylist()
    assert found == {
        "row_id": "id",
        "prompt": "x",
        "empty": "{}",
        "none": None,
        "verdict_flagged": True,
        "verdict_score": 0.75,
        "verdict_threshold": 0.5,
        "verdict_target": "prompt",
        "verdict_windows": 2,
        "verdict_a_flagged": False,
        "verdict_a_score": 0.25,
        "verdict_a_threshold": 0.5,
    }


def test_parquet_columns_keep_their_types_and_nested_ones_are_text() -> None:
    fields = {
        "when": pyarrow.timestamp("us"),
        "word": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        "messages": pyarrow.list_(pyarrow.struct({"role": pyarrow.string()})),
        "bytes": pyarrow.binary(),
        "large": pyarrow.large_string(),
        "small": pyarrow.int8(),
    }
    columns: Columns = {}
    add_schema(columns, pyarrow.schema(list(fields.items())))
    add_schema(columns, pyarrow.schema({"small": pyarrow.int32()}))
    row = {"when": datetime.datetime(2026, 1, 2), "word": "w", "messages": [{"role": "user"}], "bytes": b"\xff"}
    written = table(["id"], [row], [VERDICT], columns, ["a"])
    assert written.schema.field("when").type == pyarrow.timestamp("us")
    assert written.schema.field("bytes").type == pyarrow.binary()
    assert written.schema.field("small").type == pyarrow.int64()
    assert written.schema.field("large").type == written.schema.field("word").type == pyarrow.string()
    (found,) = written.to_pylist()
    assert found | row | {"messages": '[{"role": "user"}]'} == found


def test_a_lone_surrogate_that_parquet_cannot_hold_is_replaced() -> None:
    row = {"prompt": "lone \ud800"}
    (found,) = table(["id"], [row], [VERDICT], columns_of([row]), ["a"]).to_pylist()
    assert found["prompt"] == "lone \ufffd"


@pytest.mark.parametrize("name", ["row_id", "verdict_score", "verdict_a_flagged"])
def test_an_input_column_with_the_name_of_one_of_ours_is_refused(name: str) -> None:
    check_names({"verdict": None, "score": None}, ["a"])
    with pytest.raises(DataError, match=f"input column '{name}' has the name of an output column"):
        check_names({name: None}, ["a"])


def test_the_schema_does_not_depend_on_the_rows_of_a_shard() -> None:
    columns: Columns = {"x": pyarrow.null(), "y": None, "z": pyarrow.float64()}
    assert table([], [], [], columns, ["a"]).schema == schema(columns, ["a"])
