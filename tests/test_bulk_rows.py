"""Reading rows for bulk moderation: from any place of a file the same rows, and a reason for each bad one."""

import io
import json
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from lora_guard.errors import DataError
from lora_guard.scale import bulk_rows, bulk_table
from lora_guard.scale.bulk_rows import Position, Row, form_of, header, rows
from lora_guard.verdict import Verdict


def read(data: bytes, path: str, position: Position = Position()) -> list[Row]:  # noqa: B008 - a tuple
    return list(rows(io.BytesIO(data), path, position))


@given(st.lists(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | st.lists(st.text())), min_size=1))
def test_jsonl_read_from_behind_any_row_goes_on_with_the_next(values: list[dict[str, object]]) -> None:
    data = b"\n".join(json.dumps(row).encode() + b"\n" for row in values)
    found = read(data, "a.jsonl")
    assert [row.values for row in found] == values
    for index, row in enumerate(found):
        assert read(data, "a.jsonl", row.after) == found[index + 1 :]


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
def test_csv_read_from_behind_any_row_goes_on_with_the_next(cells: list[tuple[str, str]]) -> None:
    def cell(text: str) -> str:
        return '"' + text.encode("utf-8", "replace").decode().replace('"', '""') + '"'

    data = "prompt,response\r\n" + "".join(f"{cell(one)},{cell(other)}\r\n" for one, other in cells)
    found = read(data.encode(), "a.csv")
    assert [tuple(map(cell, row.values.values())) for row in found] == [tuple(map(cell, pair)) for pair in cells]
    for index, row in enumerate(found):
        assert read(data.encode(), "a.csv", row.after) == found[index + 1 :]


def test_a_bad_line_of_jsonl_is_a_reason_with_its_place_and_text() -> None:
    good, *bad = read(b'{"prompt": "x"}\n\n[1]\nnot json\n\xff\n{"prompt"\n', "a.jsonl")
    assert good.values == {"prompt": "x"}
    assert not good.bad
    assert [(row.where, row.raw) for row in bad] == [
        ("a.jsonl:3", "[1]"),
        ("a.jsonl:4", "not json"),
        ("a.jsonl:5", "\\xff"),
        ("a.jsonl:6", '{"prompt"'),
    ]
    assert bad[0].bad == "list; allowed: a JSON object"
    assert all(row.bad and not row.values for row in bad)


def test_a_bad_record_of_csv_is_a_reason_with_its_place_and_text() -> None:
    data = b'prompt,response\nx,y\nalone\n\nx,\xff\n"two\nlines",y\n'
    found = read(data, "a.csv")
    assert [row.values for row in found] == [
        {"prompt": "x", "response": "y"},
        {},
        {},
        {"prompt": "two\nlines", "response": "y"},
    ]
    assert [(row.where, row.bad, row.raw) for row in found[1:3]] == [
        ("a.csv:3", "1 cells; the header has 2", "alone"),
        ("a.csv:5", "not UTF-8", "x,\\xff"),
    ]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b'"never closed,a', "not CSV: a quote is opened in this line and never closed"),
        (b'x,"closed "too" early"', "not CSV: ',' expected after '\"'"),
    ],
)
@pytest.mark.parametrize("behind", [b"x,y\nz,w\n", b'"x","y"\n"z","w"\n'])
def test_a_quote_that_is_not_closed_takes_no_other_row_with_it(broken: bytes, reason: str, behind: bytes) -> None:
    data = b"prompt,response\na,b\n" + broken + b"\n" + behind
    found = read(data, "a.csv")
    assert [tuple(row.values.values()) for row in found] == [("a", "b"), (), ("x", "y"), ("z", "w")]
    assert (found[1].where, found[1].raw) == ("a.csv:3", broken.decode())
    assert found[1].bad == reason or (found[1].bad == "not CSV: ',' expected after '\"'" and b'"' in behind)
    for index, row in enumerate(found):
        assert read(data, "a.csv", row.after) == found[index + 1 :]


def test_a_line_too_long_for_the_memory_is_a_bad_row_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_rows, "LONGEST", 64)
    lines = [json.dumps({"prompt": text}).encode() for text in ("a", "b" * 500, "c")]
    found = read(b"\n".join(lines), "a.jsonl")
    assert [row.values.get("prompt") for row in found] == ["a", None, "c"]
    assert "a line of more than" in found[1].bad
    assert len(found[1].raw) == 64
    assert read(b"\n".join(lines), "a.jsonl", found[1].after) == found[2:]


def test_parquet_is_read_from_any_row_of_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(pyarrow.table({"prompt": [str(number) for number in range(700)]}), path, row_group_size=600)
    for group, numbers in ((0, range(600)), (1, range(600, 700))):
        for before in (0, 1, 255, 256, 257, 99):
            found = read(path.read_bytes(), str(path), Position(group, before))
            assert [row.values["prompt"] for row in found] == [str(number) for number in numbers[before:]]


def not_utf_8(texts: list[bytes]) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts).buffers())


def test_a_parquet_row_whose_text_is_not_utf_8_is_a_bad_row_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = not_utf_8([b"one", b"t\xffo", b"three", b"four"])
    nested = pyarrow.ListArray.from_arrays([0, 1, 2, 3, 4], not_utf_8([b"1", b"2", b"3", b"\xff"]))
    words = pyarrow.array(["w"] * 4).dictionary_encode()
    write_table(pyarrow.table({"prompt": texts, "nested": nested, "word": words, "n": range(4)}), path)
    found = read(path.read_bytes(), str(path))
    assert [row.values.get("prompt") for row in found] == ["one", None, "three", None]
    assert [row.bad for row in found] == ["", "column 'prompt' is not UTF-8", "", "column 'nested' is not UTF-8"]
    assert json.loads(found[1].raw) == {"prompt": "t\\xffo", "nested": ["2"], "word": "w", "n": 1}
    for index, row in enumerate(found):
        assert read(path.read_bytes(), str(path), row.after) == found[index + 1 :]


def test_every_parquet_type_comes_through_as_it_is_or_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    far = pyarrow.array([1 << 40, None])
    source = {
        "prompt": pyarrow.array(["a", "b"]),
        "far": far.cast(pyarrow.timestamp("ms")),
        "year 30000": pyarrow.array([10**15, None]).cast(pyarrow.timestamp("ms")),
        "nanoseconds": pyarrow.array([123456789123456789, None]).cast(pyarrow.timestamp("ns", "UTC")),
        "time": pyarrow.array([12345, None]).cast(pyarrow.time64("ns")),
        "span": pyarrow.array([1 << 62, None]).cast(pyarrow.duration("ms")),
        "day": pyarrow.array([1, None], pyarrow.int32()).cast(pyarrow.date32()),
        "decimal": pyarrow.array([Decimal("1.50"), None], pyarrow.decimal128(20, 2)),
        "bytes": pyarrow.array([b"\xff", None]),
        "fixed": pyarrow.array([b"ab", None], pyarrow.binary(2)),
        "half": pyarrow.array([1.5, None], pyarrow.float16()),
        "word": pyarrow.array(["w", None]).dictionary_encode(),
        "nothing": pyarrow.nulls(2),
    }
    write_table(pyarrow.table(source), path)
    columns: bulk_table.Columns = {}
    bulk_table.add_schema(columns, pyarrow.parquet.read_schema(path))
    found = read(path.read_bytes(), str(path))
    assert [row.bad for row in found] == ["", ""]
    values = [row.values for row in found]
    written = bulk_table.table(["1", "2"], values, [Verdict(True, 1, 1, "prompt", {}, 1)] * 2, columns, [])
    for name, column in source.items():
        decoded = column.dictionary_decode() if name == "word" else column
        expected = decoded.cast(pyarrow.string()) if name == "nothing" else decoded
        assert written.column(name).combine_chunks().equals(expected), name
    text = json.loads(bulk_rows.as_text(found[0]))
    assert (text["year 30000"], text["nanoseconds"]) == (
        "<value out of range: 1000000000000000>",
        "1973-11-29 21:33:09.123456789Z",
    )
    two_types = dict.fromkeys(columns)
    as_json = bulk_table.table(["1", "2"], values, [Verdict(True, 1, 1, "prompt", {}, 1)] * 2, two_types, [])
    assert json.loads(as_json.to_pylist()[0]["year 30000"]) == "<value out of range: 1000000000000000>"


def test_a_date_within_a_list_that_python_lacks_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    days = pyarrow.array([1, 10**17]).cast(pyarrow.timestamp("ms"))
    write_table(pyarrow.table({"days": pyarrow.ListArray.from_arrays([0, 1, 2], days)}), path)
    good, bad = read(path.read_bytes(), str(path))
    assert not good.bad
    assert bad.bad.startswith("column 'days' cannot be read")


@pytest.mark.parametrize("text", [b"", b"a,a\n", b"\n", b"\xff\n"])
def test_a_csv_header_names_each_column_once(text: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1 is no CSV header"):
        header(io.BytesIO(text), "a.csv")


def test_another_ending_is_refused() -> None:
    assert form_of("s3://bucket/A.JSONL") == ".jsonl"
    with pytest.raises(DataError, match=r"allowed: \.jsonl, \.csv, \.parquet"):
        form_of("a.json")


def test_what_is_not_parquet_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"a\.parquet is not Parquet"):
        read(b"not parquet at all", "a.parquet")
