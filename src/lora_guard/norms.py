"""Recognises a chat model's weights in any file and precision by its norms, which no quantisation changes.

llama.cpp keeps one-dimensional tensors in fp32 whatever the file's type, and training a model changes them.
docs/decisions/0009-a-bundle-names-its-base-by-norms.md says what this can and cannot tell apart.
"""

import hashlib
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_guard.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = NDArray[np.float32]

# transformers' model type -> llama.cpp's architecture; Mistral's models are Llama's to llama.cpp.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "phi3": "phi3",
}


def fingerprint(norms: Mapping[str, Array]) -> str:
    """``sha256:…`` of norm weights in fp32, by llama.cpp's names and in their order."""
    digest = hashlib.sha256()
    for name, values in sorted(norms.items()):
        digest.update(f"{name}\n".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return f"sha256:{digest.hexdigest()}"


def of_model(model: "PreTrainedModel") -> str | None:
    """The fingerprint of a transformers model's norms as its GGUF file has them; None for a type without mapping."""
    import gguf

    config: Any = model.config.get_text_config()
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        return None
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    offset = 1.0 if architecture == "gemma" else 0.0  # its converter stores what the norm multiplies by
    norms = {}
    for name, parameter in model.named_parameters():
        written = names.get_name(name, try_suffixes=(".weight",))
        if written is not None and written.endswith(_NORM):
            norms[written] = parameter.detach().float().cpu().numpy() + np.float32(offset)
    return fingerprint(norms)


def of_gguf(path: Path) -> str:
    """The fingerprint of the norms in a GGUF file.

    The header is read here because the ``gguf`` package takes seconds for a vocabulary that is only skipped.

    Raises:
        ModelError: the file is not a GGUF file of version 2 or 3, or has no norms in fp32.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            norms = _norms(data)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read as a GGUF file: {error}; allowed: a .gguf chat model") from error
    if not norms:
        raise ModelError(f"{path} has no norms in fp32; allowed: a .gguf chat model with normalised layers")
    return fingerprint(norms)


_NORM = "norm.weight"
_F32 = 0
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT_KEY = "general.alignment"


def _norms(data: mmap.mmap) -> dict[str, Array]:
    magic, version, tensors, entries = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    place, alignment = 24, 32
    for _ in range(entries):
        key, place = _text(data, place)
        (kind,) = struct.unpack_from("<I", data, place)
        if key == _ALIGNMENT_KEY:
            (alignment,) = struct.unpack_from("<I", data, place + 4)
        place = _skipped(data, place + 4, kind)
    found: dict[str, tuple[int, int]] = {}
    for _ in range(tensors):
        name, place = _text(data, place)
        (dimensions,) = struct.unpack_from("<I", data, place)
        sizes = struct.unpack_from(f"<{dimensions}Q", data, place + 4)
        kind, offset = struct.unpack_from("<IQ", data, place + 4 + 8 * dimensions)
        place += 16 + 8 * dimensions
        if name.endswith(_NORM) and kind == _F32 and dimensions == 1:
            found[name] = (offset, sizes[0])
    start = -(-place // alignment) * alignment
    return {name: np.frombuffer(data, "<f4", size, start + offset).copy() for name, (offset, size) in found.items()}


def _text(data: mmap.mmap, place: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, place)
    end = place + 8 + length
    return data[place + 8 : end].decode("utf-8"), end


def _skipped(data: mmap.mmap, place: int, kind: int) -> int:
    """The place behind a value of the kind."""
    if kind == _STRING:
        return place + 8 + int(struct.unpack_from("<Q", data, place)[0])
    if kind != _ARRAY:
        return place + _SIZES[kind]
    inner, count = struct.unpack_from("<IQ", data, place)
    place += 12
    if inner in _SIZES:
        return place + _SIZES[inner] * int(count)
    for _ in range(count):
        place = _skipped(data, place, inner)
    return place
