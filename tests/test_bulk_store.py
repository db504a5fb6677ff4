"""Where bulk moderation reads and writes: the same on a disk and on any file system of fsspec."""

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from lora_guard.errors import DataError, InputError
from lora_guard.scale import bulk_store


class RemoteFile(AbstractBufferedFile):
    """Reads as files of S3 and the like do: in ranges."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.store[self.path].getvalue()[start:end])


class RemoteFileSystem(MemoryFileSystem):
    """Memory, but its files are read as remote ones."""

    protocol = "remote"

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **more)
        if path not in self.store:
            raise FileNotFoundError(path)
        return RemoteFile(self, path, size=self.size(path))


fsspec.register_implementation("remote", RemoteFileSystem)


@pytest.fixture(params=["disk", "memory", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"{request.param}://{uuid.uuid4()}"


def test_what_is_written_is_found_listed_and_read(folder: str) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        bulk_store.write(f"{folder}/new/{name}", name.encode())
    found = bulk_store.matching(f"{folder}/new/*.jsonl")
    assert [name.rpartition("/")[2] for name in found] == ["a.jsonl", "b.jsonl"]
    with bulk_store.opened(found[0]) as file:
        assert file.readline(3) == b"a.j"
        assert file.read() == b"sonl"
        file.seek(2)
        assert file.read() == b"jsonl"
    assert bulk_store.size(found[0]) == 7
    assert bulk_store.matching(found[1]) == found[1:]
    assert bulk_store.names(f"{folder}/new") == {"a.jsonl", "b.jsonl", "c.csv"}
    assert bulk_store.names(f"{folder}/other") == set()
    assert bulk_store.exists(found[0])
    for _ in range(2):
        bulk_store.remove(found[0])
    assert not bulk_store.exists(found[0])


def test_input_that_is_not_there_is_one_clear_line(folder: str) -> None:
    bulk_store.write(f"{folder}/new/a.jsonl", b"")
    for pattern in ("new/*.csv", "new/b.jsonl", "new"):
        with pytest.raises(DataError, match=r"matches no file; allowed: a file, or a glob"):
            bulk_store.matching(f"{folder}/{pattern}")
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read"):
        bulk_store.size(f"{folder}/new/b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read"):
        bulk_store.opened(f"{folder}/new/b.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is a file; allowed: a folder"):
        bulk_store.names(f"{folder}/new/a.jsonl")


def test_what_stands_in_the_output_folder_is_no_input(folder: str) -> None:
    for name in ("a.jsonl", "out/part.jsonl", "out/_dead/part.jsonl", "outer/b.jsonl"):
        bulk_store.write(f"{folder}/{name}", b"{}")
    found = bulk_store.matching(f"{folder}/**", outside=f"{folder}/out/")
    assert sorted(name.removeprefix(found[0].removesuffix("a.jsonl")) for name in found) == ["a.jsonl", "outer/b.jsonl"]
    assert len(bulk_store.matching(f"{folder}/**", outside="memory://elsewhere")) == 4
    with pytest.raises(DataError, match=r"matches no file outside '.*out'; allowed"):
        bulk_store.matching(f"{folder}/out/*", outside=f"{folder}/out")


def test_an_output_folder_is_known_by_a_link_to_it(tmp_path: Path) -> None:
    bulk_store.write(f"{tmp_path}/in/a.jsonl", b"")
    bulk_store.write(f"{tmp_path}/in/out/b.jsonl", b"")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "out")
    assert bulk_store.matching(f"{tmp_path}/in/**", outside=f"{tmp_path}/link") == [f"{tmp_path}/in/a.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").touch()
    assert bulk_store.matching(str(tmp_path / "a[1].jsonl")) == [str(tmp_path / "a[1].jsonl")]


def test_an_unknown_file_system_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"nowhere://a.*; allowed: a path, or the URL of an fsspec file system"):
        bulk_store.matching("nowhere://a")


def test_only_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    kept = {tmp_path / "part-00000-000000.parquet", tmp_path / "_dead" / "part-00000-000000.jsonl", tmp_path / ".mine"}
    left = {tmp_path / ".part-00000-000001.parquet.x1", tmp_path / "_dead" / ".part-00000-000001.jsonl.x2"}
    (tmp_path / "_dead").mkdir()
    for path in kept | left:
        path.touch()
    bulk_store.remove_temporaries(str(tmp_path))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept
