"""Atomic writes: a reader, or the run after a kill, finds the old contents or the new, never a half."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp
from typing import Any

from lora_guard.errors import ResourceError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's contents: temporary file beside it, fsync, rename.

    Raises:
        ResourceError: the file cannot be written; what was there stays.
    """
    with writing(path), NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())  # temporary files begin as private to their owner
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_bytes`, as indented JSON; NaN is refused, JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """A file's hash, hexadecimal; it is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_text(path: Path, text: str) -> None:
    """Add to a file, made with its folder if need be, and wait until it is on the disk.

    A kill can cut short what is added, never what was there.

    Raises:
        ResourceError: the file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside ``final`` that becomes it when the block ends without an error.

    A folder that was at ``final`` is replaced.

    Raises:
        ResourceError: it cannot be written; what was there stays.
    """
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    try:
        yield temporary
        with writing(final):
            temporary.chmod(0o777 & ~_umask())
            _replace(final, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the disk while ``path`` is written into a ResourceError."""
    try:
        yield
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise ResourceError(f"{path} cannot be written: {reason}") from error


def _replace(final: Path, new: Path) -> None:
    """Put ``new`` in the place of the folder ``final``; if that fails, the old one is there again."""
    existed = final.exists()
    old = Path(mkdtemp(dir=final.parent, prefix=f".{final.name}.old."))
    try:
        if existed:
            final.replace(old)
        new.replace(final)
    except OSError:
        if existed and not final.exists():
            old.replace(final)
        else:
            old.rmdir()
        raise
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make renames within the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
