"""Writes are whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard import files
from lora_guard.errors import ResourceError


def test_contents_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    files.write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text("utf-8")) == {"a": [1, None]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "file", float("nan"))


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_a_file_holds_the_bytes_written_last(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    for content in contents:
        files.write_bytes(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_run_stopped_while_it_writes_leaves_the_old_contents_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os if function == "fsync" else Path, function, stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_contents_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if function == "fsync" else Path, function, fail)
    with pytest.raises(ResourceError, match="file cannot be written: no space left on the disk"):
        files.write_text(path, "new")
    assert path.read_text("utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ResourceError, match="cannot be written: Not a directory"):
        files.write_text(tmp_path / "file" / "inner", "x")
    with pytest.raises(ResourceError, match="cannot be written"):
        files.append_text(tmp_path / "file" / "inner", "x")


def test_text_is_appended_to_a_file_that_need_not_exist(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        files.append_text(tmp_path / "new" / "file", line)
    assert (tmp_path / "new" / "file").read_text("utf-8") == "a\nb\n"


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "folder"
    for text in ("old", "new"):
        with files.new_folder(final) as temporary:
            (temporary / text).write_text(text, "utf-8")
            assert not final.exists() or [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in final.parent.iterdir()] == ["folder"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    with files.new_folder(final) as temporary:
        (temporary / "old").touch()
    with pytest.raises(RuntimeError, match="half way"), files.new_folder(final):
        raise RuntimeError("half way")
    assert [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    final = tmp_path / "folder"
    with files.new_folder(final) as temporary:
        (temporary / "old").touch()
    calls = 0
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ResourceError, match="no space left on the disk"), files.new_folder(final) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in final.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", "utf-8")
    with pytest.raises(ResourceError, match="file cannot be written"), files.new_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text("utf-8") == "kept"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
