"""The audit log: a line of JSON for each decision, appended whole; a kill cuts at most the last one, which is told."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_guard.files import writing
from lora_guard.serving.config import ServeConfig


class AuditLog:
    """Appends decisions to a file and rotates it: ``audit.jsonl``, ``audit.jsonl.1`` (the newest before it), ….

    Args:
        path: the file.
        config: whether to write text, when to rotate, whether to wait for the disk.

    Raises:
        ResourceError: the file cannot be written.
    """

    def __init__(self, path: Path, config: ServeConfig) -> None:
        self._path = path
        self._config = config
        self._lock = threading.Lock()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _opened(path)

    def write(self, text: str, **fields: Any) -> None:
        """Append a decision on a text, of which the log holds the hash.

        Raises:
            ResourceError: the line is not in the file.
        """
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields, "sha256": text_hash(text)}
        if self._config.audit_text:
            record["text"] = text
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        with self._lock, writing(self._path):
            if os.fstat(self._file).st_size + len(line) > self._config.audit_bytes:
                self._rotate()
            self._append(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        """In one system call, so that a kill falls before or after it; a full disk's half line is taken back."""
        size = os.fstat(self._file).st_size
        written = os.write(self._file, line)
        if written < len(line):
            os.ftruncate(self._file, size)
            raise OSError(28, "no space left on the disk")
        if self._config.audit_sync:
            os.fsync(self._file)

    def _rotate(self) -> None:
        if os.fstat(self._file).st_size == 0:
            return  # a line longer than a whole file has one of its own
        if not self._is_in_place():
            file = _opened(self._path)  # somebody moved the old one: it is kept there
            os.close(self._file)
            self._file = file
            return
        # The next file comes first: where the disk has no room for it, all stays as it was.
        fresh = self._path.with_name(f"{self._path.name}.new")
        file = _opened(fresh)
        try:
            self._shift()
            fresh.replace(self._path)
        except OSError:
            os.close(file)
            raise
        os.close(self._file)
        self._file = file

    def _is_in_place(self) -> bool:
        return self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._file))

    def _shift(self) -> None:
        for number in range(self._config.audit_files - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _opened(path: Path) -> int:
    """For appending; a line that a kill cut short is ended, so that the next one stands alone."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file


def text_hash(text: str) -> str:
    """SHA-256 of the text in UTF-8; lone surrogates count as U+FFFD."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def read_audit(path: Path) -> Iterator[dict[str, Any]]:
    """The decisions of one file, oldest first; a line that a kill cut short is passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
