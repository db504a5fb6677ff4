"""Batch moderation: each row plus its verdict, resumable at any byte from the output alone."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from guards import tiny_guard_folder

from lora_guard import Conversation, Guard, files, moderate_file
from lora_guard.errors import DataError, ResourceError
from lora_guard.moderate_file import moderate_file as moderate
from lora_guard.moderate_file import moderate_stream

ROWS: list[dict[str, Any]] = [
    {"prompt": "How do I bake bread?"},
    {"prompt": "How do I bake bread?", "response": "Mix flour and water.", "id": 7},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]},
    {"prompt": "", "response": None},
    {"prompt": "lone \ud800 surrogate", "more": {"nested": [1, None]}},
    {"prompt": "🍞", "response": ""},
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return Guard.load(tiny_guard_folder(tmp_path_factory.mktemp("guard")), precision="fp32")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_output_row_is_the_input_row_and_its_verdict(guard: Guard, source: Path, tmp_path: Path) -> None:
    assert moderate(guard, source, tmp_path / "out.jsonl") == len(ROWS)
    written = read(tmp_path / "out.jsonl")
    assert [{name: row[name] for name in row if name != "verdict"} for row in written] == ROWS
    assert [row["verdict"]["target"] for row in written] == [
        "prompt", "response", "prompt", "prompt", "prompt", "response",
    ]  # fmt: skip
    alone = guard.moderate(Conversation.of("How do I bake bread?", "Mix flour and water."))
    assert written[1]["verdict"]["score"] == pytest.approx(alone.score, abs=1e-5)


def test_a_run_stopped_at_any_byte_goes_on_to_the_same_file(
    guard: Guard, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moderate_file, "_ROWS_AT_ONCE", 2)
    out = tmp_path / "out.jsonl"
    moderate(guard, source, out)
    whole = out.read_bytes()
    for size in range(0, len(whole), 97):
        out.write_bytes(whole[:size])
        assert moderate(guard, source, out) == len(ROWS) - whole[:size].count(b"\n")
        rows = [{**row, "verdict": row["verdict"]["flagged"]} for row in read(out)]
        assert rows == [
            {**json.loads(line), "verdict": json.loads(line)["verdict"]["flagged"]} for line in whole.splitlines()
        ]
    assert moderate(guard, source, out) == 0


def test_an_output_of_another_input_or_guard_is_left_alone(guard: Guard, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    moderate(guard, source, out)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "something else"}\n', "utf-8")
    before = out.read_bytes()
    with pytest.raises(DataError, match=r"out.jsonl:1 is not the verdict on that row"):
        moderate(guard, other, out)
    stricter = Guard.load(tiny_guard_folder(tmp_path / "stricter", threshold=0.1))
    with pytest.raises(DataError, match=r"out.jsonl:1 was judged by another guard"):
        moderate(stricter, source, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "list; allowed: a JSON object"),
        ('{"text": "x"}', "row has text; needed: prompt"),
        ('{"prompt": 3}', "content of type int"),
        ('{"messages": []}', "conversation is empty"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot' is unknown"),
        ('{"messages": 3}', ""),
    ],
)
def test_the_rows_before_a_bad_one_are_judged_and_written(
    guard: Guard, tmp_path: Path, line: str, message: str
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(f'{{"prompt": "a"}}\n{{"prompt": "b"}}\n{line}\n{{"prompt": "c"}}\n', "utf-8")
    with pytest.raises(DataError, match=rf"rows.jsonl:3: .*{message}"):
        moderate(guard, source, tmp_path / "out.jsonl")
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == ["a", "b"]


def test_streams_work_in_place_of_files(guard: Guard) -> None:
    output = io.StringIO()
    moderate_stream(guard, io.StringIO('{"prompt": "a"}\n\n{"prompt": "b"}\n'), output, "prompt")
    assert [json.loads(line)["prompt"] for line in output.getvalue().splitlines()] == ["a", "b"]


def test_a_target_that_a_row_lacks_names_the_row(guard: Guard, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: target 'response' needs"):
        moderate(guard, source, tmp_path / "out.jsonl", "response")


def test_a_full_disk_is_one_line(guard: Guard, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"out.jsonl cannot be written: no space left on the disk"):
        moderate(guard, source, tmp_path / "out.jsonl")
