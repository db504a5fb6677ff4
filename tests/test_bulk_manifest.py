"""Manifests: a bulk run is resumed only on the same input, by the same guard, and never by accident."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_guard.errors import DataError, InputError
from lora_guard.scale import bulk_manifest
from lora_guard.scale.bulk_plan import InputFile, Shard
from lora_guard.scale.bulk_shard import Judge

JUDGE = Judge("default", None, False, "torch", "fp32", "balanced", None, "1" * 64)
FILES = [InputFile(f"/{name}.jsonl", name * 64, 10, [Shard(0, 0, 3, 0, 0)], {}) for name in "ab"]


def manifest(**changes: Any) -> dict[str, Any]:
    return bulk_manifest.describe(replace(JUDGE, **changes), 1024, FILES)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert bulk_manifest.read(str(tmp_path), resume=False) is None
    assert bulk_manifest.read(str(tmp_path / "new"), resume=True) is None
    bulk_manifest.write(str(tmp_path), manifest())
    found = bulk_manifest.read(str(tmp_path), resume=True)
    assert found == manifest()
    bulk_manifest.check_same(manifest(), manifest(), str(tmp_path))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for resume in (False, True):
        with pytest.raises(InputError, match=r"is not empty and no bulk run's; allowed: a new or empty folder"):
            bulk_manifest.read(str(tmp_path), resume=resume)
    bulk_manifest.write(str(tmp_path), manifest())
    with pytest.raises(InputError, match=r"holds a bulk run; allowed: --resume"):
        bulk_manifest.read(str(tmp_path), resume=False)


def test_a_run_killed_before_its_manifest_was_there_begins_anew(tmp_path: Path) -> None:
    (tmp_path / f".{bulk_manifest.MANIFEST}.x1y2").touch()
    assert bulk_manifest.read(str(tmp_path), resume=True) is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"policy": "strict"}, "policy 'balanced', not 'strict'"),
        ({"target": "prompt"}, "target None, not 'prompt'"),
        ({"spec_sha256": "2" * 64}, "spec_sha256"),
        ({"engine": "llama-cpp"}, "engine 'torch', not 'llama-cpp'"),
        ({"base": "other"}, "base None, not 'other'"),
    ],
)
def test_a_run_by_another_guard_or_policy_is_not_gone_on_with(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=rf"output 'out' was begun with {name}"):
        bulk_manifest.check_same(manifest(), manifest(**changes), "out")


@pytest.mark.parametrize(
    ("files", "change"),
    [
        ([FILES[0]], "'/b.jsonl' was removed"),
        ([*FILES, replace(FILES[0], path="/c.jsonl")], "'/c.jsonl' was added"),
        ([FILES[0], replace(FILES[1], sha256="c" * 64)], "'/b.jsonl' was changed"),
    ],
)
def test_a_run_on_other_input_is_not_gone_on_with(files: list[InputFile], change: str) -> None:
    now = bulk_manifest.describe(JUDGE, 1024, files)
    with pytest.raises(InputError, match=f"input {change} since output 'out' was begun"):
        bulk_manifest.check_same(manifest(), now, "out")


def test_a_manifest_of_another_version_is_one_clear_line(tmp_path: Path) -> None:
    for text in ("[]", "{", '{"format_version": 0}'):
        (tmp_path / bulk_manifest.MANIFEST).write_text(text)
        with pytest.raises(DataError, match=r"_manifest\.json"):
            bulk_manifest.read(str(tmp_path), resume=True)
