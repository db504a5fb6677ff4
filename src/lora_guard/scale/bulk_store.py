"""Where bulk moderation reads and writes: this machine's disk, or any file system that fsspec knows."""

import os
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from lora_guard import files
from lora_guard.errors import DataError, InputError, ResourceError

_MAGIC = frozenset("*?[")


def matching(pattern: str, outside: str | None = None) -> list[str]:
    """The files of a path or glob, in order of name: absolute paths, or URLs on other file systems.

    Args:
        pattern: a path, URL or glob.
        outside: a folder whose files are left out, those below it too.

    Raises:
        DataError: none.
        InputError: a file system that is unknown, or whose package is not installed.
    """
    system, path = _located(pattern)
    try:
        globbed = _MAGIC & set(path) and not system.isfile(path)
        found = [name for name in (sorted(system.glob(path)) if globbed else [path]) if system.isfile(name)]
    except OSError as error:
        raise DataError(f"input {pattern!r} cannot be listed: {_reason(error)}") from error
    if outside is not None:
        other, folder = _located(outside)
        within = f"{_real(system, folder)}/"
        found = [name for name in found if other is not system or not f"{_real(system, name)}/".startswith(within)]
    if not found:
        but = f" outside {outside!r}" if outside else ""
        raise DataError(f"input {pattern!r} matches no file{but}; allowed: a file, or a glob such as 'folder/*.jsonl'")
    return found if _is_local(system) else [system.unstrip_protocol(name) for name in found]


def opened(place: str) -> IO[bytes]:
    """A file to read and seek in.

    Raises:
        DataError: it cannot be opened.
    """
    system, path = _located(place)
    try:
        file: Any = system.open(path, "rb")
    except OSError as error:
        raise DataError(f"{place} cannot be read: {_reason(error)}") from error
    # Remote files of fsspec read lines of any length alone, where a bound is what keeps memory flat.
    return cast(IO[bytes], BufferedReader(file) if isinstance(file, AbstractBufferedFile) else file)


def exists(place: str) -> bool:
    """Whether there is such a file now.

    Raises:
        DataError: that cannot be found out.
    """
    system, path = _located(place)
    system.invalidate_cache()  # as for names
    try:
        return bool(system.isfile(path))
    except OSError as error:
        raise DataError(f"{place} cannot be read: {_reason(error)}") from error


def size(place: str) -> int:
    """A file's length in bytes.

    Raises:
        DataError: there is no such file.
    """
    system, path = _located(place)
    try:
        return int(system.size(path))
    except OSError as error:
        raise DataError(f"{place} cannot be read: {_reason(error)}") from error


def names(folder: str) -> set[str]:
    """The names in a folder; none if there is no such folder.

    Raises:
        DataError: it is no folder, or cannot be listed.
    """
    system, path = _located(folder)
    system.invalidate_cache()  # object stores keep listings, and others write here
    try:
        if not system.exists(path):
            return set()
        if not system.isdir(path):
            raise DataError(f"{folder} is a file; allowed: a folder, new or of a run to resume")
        return {str(name).rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False)} - {""}
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {_reason(error)}") from error


def write(place: str, data: bytes) -> None:
    """Write a file in one step: a reader sees all of it or nothing.

    On a disk by temporary file, fsync and rename. An object store shows an object once its upload is complete.

    Raises:
        ResourceError: it cannot be written.
    """
    system, path = _located(place)
    if _is_local(system):
        with files.writing(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(Path(path), data)
        return
    try:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, data)
    except OSError as error:
        raise ResourceError(f"{place} cannot be written: {_reason(error)}") from error


def remove(place: str) -> None:
    """Remove a file if it is there.

    Raises:
        ResourceError: it cannot be removed.
    """
    if exists(place):
        system, path = _located(place)
        try:
            system.rm_file(path)
        except OSError as error:
            raise ResourceError(f"{place} cannot be removed: {_reason(error)}") from error


def remove_temporaries(folder: str) -> None:
    """Remove what :func:`write` left below a folder when its process was killed; only a disk has such files."""
    system, path = _located(folder)
    if _is_local(system):
        for pattern in (".part-*", "._manifest.json.*"):
            for left in Path(path).rglob(pattern):
                left.unlink(missing_ok=True)


def absolute(place: str) -> str:
    """The place as every process understands it: a path gets its folder, a URL stays as it is."""
    system, path = _located(place)
    return path if _is_local(system) else place.rstrip("/")


def _located(place: str) -> tuple[Any, str]:
    try:
        system, path = url_to_fs(place)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{place!r}: {reason}; allowed: a path, or the URL of an fsspec file system") from error
    return system, str(path)


def _real(system: object, path: str) -> str:
    """A path without links; other file systems have none."""
    return os.path.realpath(path) if _is_local(system) else path.rstrip("/")


def _is_local(system: object) -> bool:
    return isinstance(system, LocalFileSystem)


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split()) or type(error).__name__
