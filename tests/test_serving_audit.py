"""The audit log: every decision on its own whole line, through rotation, kills and full disks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_guard.errors import ResourceError
from lora_guard.serving.audit import AuditLog, read_audit, text_hash
from lora_guard.serving.config import ServeConfig


def log_at(path: Path, **config: Any) -> AuditLog:
    return AuditLog(path, ServeConfig(**config))


def test_text_is_written_as_its_hash_unless_asked(tmp_path: Path) -> None:
    for name, config in (("hash", {}), ("text", {"audit_text": True})):
        log = log_at(tmp_path / name, **config)
        log.write("secret words \ud800", id="1")
        log.close()
    (hashed,) = read_audit(tmp_path / "hash")
    assert "secret" not in (tmp_path / "hash").read_text()
    assert hashed["sha256"] == text_hash("secret words \ud800")
    assert (tmp_path / "text").stat().st_mode & 0o077 == 0


def test_a_line_that_was_cut_short_breaks_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = log_at(path)
    log.write("a", id="1")
    log.close()
    with path.open("a") as file:
        file.write('{"id": "2", "sco')
    log = log_at(path)
    log.write("b", id="3")
    log.close()
    assert [record["id"] for record in read_audit(path)] == ["1", "3"]


def test_rotation_keeps_the_newest_files_and_tears_no_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = log_at(path, audit_bytes=1000, audit_files=2)
    for number in range(40):
        log.write("text", id=number)
    log.close()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    ids = [record["id"] for name in reversed(names) for record in read_audit(tmp_path / name)]
    assert ids == list(range(ids[0], 40))
    assert all((tmp_path / name).stat().st_size <= 1000 for name in names)


def test_a_rotation_that_fails_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = log_at(path, audit_bytes=1000, audit_files=2)
    for number in range(3):
        log.write("text", id=number)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def refuse(*_: object) -> int:
        raise OSError(28, "no space left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for _ in range(3):
            with pytest.raises(ResourceError, match="no space left"):
                log.write("text", id="lost" * 250)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    for number in range(3, 12):
        log.write("text", id=number)
    log.close()
    assert [record["id"] for file in (tmp_path / "audit.jsonl.1", path) for record in read_audit(file)] == list(
        range(12)
    )


def test_a_log_that_somebody_moved_is_begun_anew_and_shifts_no_older_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = log_at(path, audit_bytes=1000, audit_files=2)
    for number in range(14):
        log.write("text", id=number)
    older = (tmp_path / "audit.jsonl.1").read_bytes()
    path.rename(tmp_path / "moved")
    while not path.exists():
        log.write("text", id=14)
    log.close()
    assert (tmp_path / "audit.jsonl.1").read_bytes() == older
    assert [record["id"] for record in read_audit(path)] == [14]


def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = log_at(path)
    log.write("a", id="1")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:10]))
        with pytest.raises(ResourceError, match="no space left on the disk"):
            log.write("b", id="2")
    log.write("c", id="3")
    log.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "3"]


def test_a_kill_loses_no_line_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    program = (
        "import sys, pathlib\n"
        "from lora_guard.serving.audit import AuditLog\n"
        "from lora_guard.serving.config import ServeConfig\n"
        "log = AuditLog(pathlib.Path(sys.argv[1]), ServeConfig())\n"
        "for number in range(10**9):\n"
        "    log.write('text', id=number)\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(50):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().splitlines(keepends=True)
    last = 49 + sum(line.endswith("\n") for line in said)
    ids = [record["id"] for record in read_audit(path)]
    assert ids[: last + 1] == list(range(last + 1))
    assert len(ids) <= last + 2


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        log_at(tmp_path / "file" / "audit.jsonl")
