"""Loads a guard on a GGUF chat model into the llama.cpp engine, without torch: a bundle, or a guard folder at once."""

import hashlib
import os
from pathlib import Path

from filelock import FileLock

from lora_guard import files, norms
from lora_guard.artifact import SPEC_FILE, GuardSpec, read_spec
from lora_guard.default_model import DEFAULT, cache_folder, packaged
from lora_guard.engine.llama_cpp import Adapter, Model
from lora_guard.engine.llama_cpp_engine import Heads, LlamaCppEngine
from lora_guard.errors import ArtifactError, ModelError
from lora_guard.export import bundle
from lora_guard.export.adapter_gguf import BaseShape
from lora_guard.export.bundle import Bundle
from lora_guard.process_memory import suit_llama_cpp


def load(
    folder: Path, *, base: str | None = None, allow_other_base: bool = False
) -> tuple[GuardSpec, LlamaCppEngine, None, str]:
    """Load a guard and the chat model in a GGUF file.

    A guard folder is made into a bundle on first use, in the user's cache; that takes less than a second.

    Args:
        folder: a bundle or a guard folder.
        base: ``default`` or a .gguf file; None for the guard's own base, which then is the default.
        allow_other_base: accept a file whose norms differ from those of the guard's base.

    Returns:
        What the guard is, the engine, nothing for the number of its parameters, and what tells this file from others.

    Raises:
        ArtifactError: the guard is missing, corrupted, or made for other weights.
        ModelError: the file cannot be read.
        ResourceError: the cache cannot be written, or no memory.
    """
    suit_llama_cpp(os.environ)
    spec = read_spec(folder)
    model = checked_model(spec, folder, base or spec.base.name, allow_other_base=allow_other_base)
    read = bundle.read(folder if spec.form == "llama-cpp" else _cached(folder, model))
    return read.spec, engine(read, model), None, f"gguf:{norms.of_file(model.path)}"


def as_bundle(folder: Path, *, base: str | None = None, allow_other_base: bool = False) -> Path:
    """The bundle of a guard on a GGUF file: a guard folder's is in the user's cache, made if need be.

    Args:
        folder: a bundle or a guard folder.
        base: as for :func:`load`.
        allow_other_base: as for :func:`load`.

    Raises:
        ArtifactError: the guard is missing, corrupted, or made for other weights.
        ModelError: the file cannot be read.
        ResourceError: the cache cannot be written.
    """
    spec = read_spec(folder)
    if spec.form == "llama-cpp":
        return folder
    return _cached(folder, checked_model(spec, folder, base or spec.base.name, allow_other_base=allow_other_base))


def checked_model(spec: GuardSpec, folder: Path, base: str, *, allow_other_base: bool = False) -> Model:
    """The model in a GGUF file, if it is the one that the guard in ``folder`` was trained for.

    Raises:
        ArtifactError: it has other norms or sizes.
        ModelError: there is no such file, or it cannot be read.
    """
    model = Model(gguf_file(base))
    if spec.base.norms is None and not allow_other_base:
        raise ArtifactError(
            f"{folder} does not say how to recognise its base in a GGUF file; run: lora-guard export --guard {folder}"
        )
    if spec.base.norms != model.norms and not allow_other_base:
        raise ArtifactError(
            f"{folder} was trained on {spec.base.name!r}, and {str(model.path)!r} has other norms than that; "
            "allowed: the same model in any quantisation, or --allow-other-base"
        )
    if spec.base.hidden_size != model.hidden_size:
        raise ArtifactError(
            f"{folder} is for features of {spec.base.hidden_size}; {str(model.path)!r} has {model.hidden_size}"
        )
    return model


def gguf_file(base: str) -> Path:
    """The GGUF file that a base model's name means here.

    Raises:
        ModelError: it means none, or there is no such file.
    """
    path = packaged()[0] if base == DEFAULT else Path(base).expanduser()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        raise ModelError(f"base model {base!r} is no GGUF file; allowed with engine 'llama-cpp': default, a .gguf file")
    return path


def engine(read: Bundle, model: Model) -> LlamaCppEngine:
    """The engine of a bundle on a model.

    Raises:
        ArtifactError: the adapter is not one of this model, or its invocation is not the guard's in the model's tokens.
    """
    spec = read.spec
    built = LlamaCppEngine(
        model,
        None if read.adapter is None else Adapter(model, read.adapter),
        kind=spec.adapter,
        heads=Heads(read.heads["weight"], read.heads.get("bias"), harmful=spec.heads.harmful),
        invocation=spec.invocation,
        max_length=spec.max_length,
    )
    named = None if built.adapter is None else built.adapter.invocation
    if named != (built.invocation if spec.adapter == "alora" else None):
        raise ArtifactError(
            f"{read.folder}: the adapter's invocation is {named}; allowed: {built.invocation}, the guard's in the "
            f"tokens of {str(model.path)!r}"
        )
    return built


def shape_of(model: Model) -> BaseShape:
    """What an adapter's file says of the model."""
    architecture = model.meta("general.architecture") or ""
    heads = int(model.meta(f"{architecture}.attention.head_count") or 0)
    kv_heads = int(model.meta(f"{architecture}.attention.head_count_kv") or heads)
    return BaseShape(architecture, int(model.meta(f"{architecture}.block_count") or 0), heads, kv_heads)


def _cached(guard: Path, model: Model) -> Path:
    """The bundle of a guard folder in the user's cache."""
    key = hashlib.sha256((guard / SPEC_FILE).read_bytes() + model.norms.encode()).hexdigest()
    folder = cache_folder() / "bundles" / f"{_BUNDLE_VERSION}-{key[:16]}"
    if not (folder / SPEC_FILE).is_file():
        with files.writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / SPEC_FILE).is_file():
                bundle.write(folder, guard, shape_of(model))
    return folder


_BUNDLE_VERSION = 3
