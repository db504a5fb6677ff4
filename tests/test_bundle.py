"""A bundle is written in one step and read with every file checked; a guard folder and a bundle are told apart."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guards import tiny_guard_folder

from lora_guard import Guard, artifact
from lora_guard.errors import ArtifactError
from lora_guard.export import bundle
from lora_guard.export.adapter_gguf import BaseShape

BASE = BaseShape("llama", layers=2, heads=4, kv_heads=2)
VECTORS = {"ids": np.arange(3, dtype=np.int32)}


@pytest.fixture(params=[("lora", False), ("alora", True), ("none", True)], ids=str)
def guard(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, token_head = request.param
    return tiny_guard_folder(tmp_path, adapter_kind=kind, token_head=token_head)


@pytest.fixture
def folder(guard: Path, tmp_path: Path) -> Path:
    bundle.write(tmp_path / "bundle", guard, BASE, norms="sha256:0", vectors=VECTORS, card="# tiny\n")
    return tmp_path / "bundle"


def test_what_is_read_is_what_the_guard_holds(guard: Path, folder: Path) -> None:
    saved, read = artifact.read(guard), bundle.read(folder)
    assert read.spec.calibration == saved.spec.calibration
    assert read.spec.base.norms == "sha256:0"
    assert {name: tensor.tolist() for name, tensor in read.heads.items()} == {
        name: tensor.tolist() for name, tensor in saved.heads.items()
    }
    assert (read.adapter is None) == (saved.spec.adapter == "none")
    assert bundle.read_vectors(read)["ids"].tolist() == [0, 1, 2]
    assert (folder / "README.md").read_text("utf-8") == "# tiny\n"


def test_a_damaged_or_missing_file_is_named(folder: Path) -> None:
    for name in bundle.read(folder).spec.files:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        with pytest.raises(ArtifactError, match=re.escape(name) + " is corrupted"):
            bundle.read_vectors(bundle.read(folder))
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=re.escape(name) + " cannot be read"):
            bundle.read_vectors(bundle.read(folder))
        (folder / name).write_bytes(content)


MISSING = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 0), ("lora_alpha", None), ("peft_type", "IA3"), ("use_dora", True), ("alora_invocation_tokens", ["x"])]
    + [(field, MISSING) for field in ("peft_type", "r", "lora_alpha", "target_modules")],
)
def test_a_wrong_adapter_config_is_the_torch_engines_line(field: str, value: Any, tmp_path: Path) -> None:
    guard = tiny_guard_folder(tmp_path)
    config, spec = (json.loads((guard / name).read_text("utf-8")) for name in ("adapter_config.json", "guard.json"))
    config[field] = value
    config = {name: found for name, found in config.items() if found is not MISSING}
    content = json.dumps(config).encode()
    (guard / "adapter_config.json").write_bytes(content)
    spec["files"]["adapter_config.json"] = hashlib.sha256(content).hexdigest()
    (guard / "guard.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(ArtifactError, match=rf"adapter_config\.json: field '{field}") as refused:
        bundle.write(tmp_path / "bundle", guard, BASE)
    with pytest.raises(ArtifactError) as expected:
        Guard.load(guard)
    assert str(refused.value) == str(expected.value)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_and_a_guard_folder_are_not_mistaken_for_each_other(guard: Path, folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is a bundle for llama\.cpp; allowed: a guard folder"):
        Guard.load(folder)
    with pytest.raises(ArtifactError, match="is a guard folder, not a bundle; run: lora-guard export"):
        bundle.read(guard)


def test_a_bundle_of_the_cache_has_no_vectors(guard: Path, tmp_path: Path) -> None:
    bundle.write(tmp_path / "cached", guard, BASE, norms="sha256:0")
    with pytest.raises(ArtifactError, match=r"has no test_vectors\.safetensors"):
        bundle.read_vectors(bundle.read(tmp_path / "cached"))


def test_heads_of_another_shape_are_refused(folder: Path) -> None:
    spec = json.loads((folder / "guard.json").read_text("utf-8"))
    spec["taxonomy"]["categories"].append("c")
    (folder / "guard.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(ArtifactError, match=r"heads\.safetensors holds tensors of shapes"):
        bundle.read(folder)
