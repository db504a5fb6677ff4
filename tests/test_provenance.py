"""A figure's provenance names the commit of the source that made it, and none that is not its own."""

import subprocess
from pathlib import Path

import pytest
from guards import tiny_guard_folder

from lora_guard import Guard
from lora_guard.evaluation import provenance
from lora_guard.evaluation.provenance import commit


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_source_and_says_if_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "provenance.py"
    source.write_text("one\n", "utf-8")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert commit() is None  # no checkout
    git(tmp_path, "init")
    assert commit() is None  # another project's checkout: the source is not tracked there
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    assert commit() == git(tmp_path, "rev-parse", "HEAD")
    source.write_text("two\n", "utf-8")
    assert commit() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"


def test_the_weights_that_ran_are_named_beside_those_the_guard_was_made_for(tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path))
    other = Guard(guard.spec, guard.engine, base_fingerprint="gguf:quantised")
    assert provenance.provenance(guard, {}, "eval")["weights"] == guard.spec.base.fingerprint
    assert provenance.provenance(other, {}, "eval")["weights"] == "gguf:quantised"
