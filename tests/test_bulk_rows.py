"""Reading rows for bulk moderation: from any place of a file the same rows, and a reason for each bad one."""

import io
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from lora_guard.errors import DataError
from lora_guard.scale import bulk_rows
from lora_guard.scale.bulk_rows import Position, Row, form_of, header, rows


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
