"""A guard as llama.cpp takes it, on disk: the adapter, the heads, and vectors to test the pair of guard and model with.

::

    guard.json                  as in a guard folder, with form "llama-cpp"
    adapter.gguf                for llama_adapter_lora_init; not in a guard without adapter
    heads.safetensors           weight [outputs, hidden] and perhaps bias [outputs], fp32
    token_head.safetensors      weight [vocabulary], fp32; not in every guard (see token_head.py)
    test_vectors.safetensors    what the guard's own model gives (see export/vectors.py); not in the cache's bundles
    README.md
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_guard import files
from lora_guard.artifact import (
    CARD_FILE,
    CONFIG_FILE,
    HEADS_FILE,
    LICENCE_FILE,
    SPEC_FILE,
    TOKEN_HEAD_FILE,
    WEIGHTS_FILE,
    GuardSpec,
    check_file,
    read_adapter_config,
    read_checked,
    read_files,
    read_spec,
)
from lora_guard.errors import ArtifactError
from lora_guard.export.adapter_gguf import BaseShape, read_floats, write_adapter

Array = NDArray[Any]

ADAPTER_FILE = "adapter.gguf"
VECTORS_FILE = "test_vectors.safetensors"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked."""

    folder: Path
    spec: GuardSpec
    heads: dict[str, Array]

    @property
    def adapter(self) -> Path | None:
        """The adapter's file; None for a guard without."""
        return self.folder / ADAPTER_FILE if ADAPTER_FILE in self.spec.files else None


def write(
    folder: Path,
    guard: Path,
    base: BaseShape,
    *,
    norms: str | None = None,
    vectors: dict[str, Array] | None = None,
    card: str = "",
) -> None:
    """Make a bundle of a guard folder, in one step.

    Args:
        folder: replaced if it exists.
        guard: the guard folder.
        base: the shape of its chat model.
        norms: :mod:`lora_guard.norms`' fingerprint of the model that the guard was trained for; the guard's when None.
        vectors: contents of ``test_vectors.safetensors``.
        card: contents of ``README.md``; none when empty.

    Raises:
        ArtifactError: the guard is missing or corrupted, or llama.cpp has no place for its adapter.
        ResourceError: no disk space.
    """
    spec, contents = read_files(guard)
    with files.new_folder(folder) as temporary:
        if spec.adapter != "none":
            config = read_adapter_config(guard / CONFIG_FILE)
            write_adapter(
                temporary / ADAPTER_FILE,
                read_floats(guard / WEIGHTS_FILE, contents[WEIGHTS_FILE]),
                alpha=config.lora_alpha,
                invocation=config.alora_invocation_tokens,
                base=base,
                name=spec.name,
            )
        for name in {HEADS_FILE, TOKEN_HEAD_FILE} & contents.keys():
            files.write_bytes(temporary / name, contents[name])
        if vectors is not None:
            from safetensors.numpy import save

            files.write_bytes(temporary / VECTORS_FILE, save(vectors))
        hashes = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        base_reference = spec.base.model_copy(update={"norms": norms or spec.base.norms})
        written = spec.model_copy(update={"form": "llama-cpp", "base": base_reference, "files": hashes})
        files.write_text(temporary / SPEC_FILE, written.model_dump_json(indent=2) + "\n")
        if card:
            files.write_text(temporary / CARD_FILE, card)
        if (guard / LICENCE_FILE).is_file():
            files.write_bytes(temporary / LICENCE_FILE, (guard / LICENCE_FILE).read_bytes())


def read(folder: Path) -> Bundle:
    """Read a bundle: form, hashes and the shapes of the heads are checked.

    Raises:
        ArtifactError: what is missing, corrupted or of another form.
    """
    spec = read_spec(folder)
    if spec.form != "llama-cpp":
        raise ArtifactError(f"{folder} is a guard folder, not a bundle; run: lora-guard export --guard {folder}")
    needed = {HEADS_FILE} | ({ADAPTER_FILE} if spec.adapter != "none" else set())
    needed |= {TOKEN_HEAD_FILE} if spec.token_head else set()
    if set(spec.files) - {VECTORS_FILE} != needed:
        raise ArtifactError(f"{folder / SPEC_FILE}: 'files' lists {sorted(spec.files)}; allowed: {sorted(needed)}")
    if ADAPTER_FILE in needed:
        check_file(folder / ADAPTER_FILE, spec.files[ADAPTER_FILE])  # llama.cpp reads it, from the disk
    if spec.token_head:
        check_file(folder / TOKEN_HEAD_FILE, spec.files[TOKEN_HEAD_FILE])  # :mod:`lora_guard.token_head` reads it
    heads = read_checked(folder / HEADS_FILE, spec.files[HEADS_FILE])
    return Bundle(folder, spec, _heads(folder / HEADS_FILE, heads, spec))


def read_vectors(bundle: Bundle) -> dict[str, Array]:
    """The contents of ``test_vectors.safetensors``.

    Raises:
        ArtifactError: the bundle has none, or they are corrupted.
    """
    if VECTORS_FILE not in bundle.spec.files:
        raise ArtifactError(f"{bundle.folder} has no {VECTORS_FILE}; needed: a bundle that 'lora-guard export' wrote")
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = bundle.folder / VECTORS_FILE
    try:
        return load(read_checked(path, bundle.spec.files[VECTORS_FILE]))
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from error


def _heads(path: Path, data: bytes, spec: GuardSpec) -> dict[str, Array]:
    heads = read_floats(path, data)
    outputs = len(spec.taxonomy["categories"]) + spec.heads.harmful
    expected = {"weight": (outputs, spec.base.hidden_size)} | ({"bias": (outputs,)} if spec.heads.bias else {})
    found = {name: tensor.shape for name, tensor in heads.items()}
    if found != expected:
        raise ArtifactError(f"{path} holds tensors of shapes {found}; allowed: {expected}")
    if not all(np.isfinite(tensor).all() for tensor in heads.values()):
        raise ArtifactError(f"{path} holds NaN or infinite values; allowed: finite ones")
    return heads


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
