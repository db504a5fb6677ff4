"""Recognises a chat model in any file and precision by its norms, and tells its GGUF files from one another.

llama.cpp keeps one-dimensional tensors in fp32 whatever the file's type, and training a model changes them.
docs/decisions/0009-a-bundle-names-its-base-by-norms.md says what this can and cannot tell apart.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

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

    The header is read here because the ``gguf`` package takes seconds for a vocabulary that is only skipped. It is
    read, not mapped: a map of the file would lie in memory beside llama.cpp's own, 60 MB of it with the default model.

    Raises:
        ModelError: the file is not a GGUF file of version 2 or 3, or has no norms in fp32.
    """
    with _opened(path) as (file, tensors):
        norms = {
            name: _vector(file, tensor.place, tensor.sizes[0])
            for name, tensor in tensors.items()
            if name.endswith(_NORM) and tensor.kind == _F32 and len(tensor.sizes) == 1
        }
    if not norms:
        raise ModelError(f"{path} has no norms in fp32; allowed: a .gguf chat model with normalised layers")
    return fingerprint(norms)


def of_file(path: Path) -> str:
    """``sha256:…`` of a GGUF file's size, its header and a sample of each tensor: 4 KiB at its start and every MiB.

    Files of one model in other quantisations, or of a fine-tune, differ in it though their norms may not. Reading all
    would take seconds with a large model; a change of fewer numbers than lie between two samples may go unseen.

    Raises:
        ModelError: the file is not a GGUF file of version 2 or 3.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with _opened(path) as (file, tensors):
        starts = sorted({tensor.place for tensor in tensors.values()})
        blocks = range(0, min([*starts, size]), _SAMPLE)  # the header, whole: its vocabulary decides the tokens
        samples = (range(start, end, _STRIDE) for start, end in pairwise([*starts, size]))
        for place in chain(blocks, *samples):
            file.seek(place)
            digest.update(file.read(_SAMPLE))
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, dict[str, "_Tensor"]]]:
    """The file, open, and its tensors by name; what cannot be read, there or in the block, is one clear line."""
    try:
        with path.open("rb") as file:
            yield file, _tensors(file)
    except (OSError, ValueError, ArithmeticError, struct.error) as error:
        raise ModelError(f"{path} cannot be read as a GGUF file: {error}; allowed: a .gguf chat model") from error


class _Tensor(NamedTuple):
    """A tensor of a GGUF file: its type by GGML's number, its sizes, and the place of its first byte in the file."""

    kind: int
    sizes: tuple[int, ...]
    place: int


_SAMPLE, _STRIDE = 4 << 10, 1 << 20
_NORM = "norm.weight"
_F32 = 0
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT_KEY = "general.alignment"
_LONGEST = 1 << 28  # bytes of one text or norm; a damaged length would ask for more memory than there is


def _tensors(file: BinaryIO) -> dict[str, _Tensor]:
    magic, version, tensors, entries = _read(file, "4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    alignment = 32
    for _ in range(entries):
        key = _text(file)
        (kind,) = _read(file, "I")
        if key == _ALIGNMENT_KEY:
            (alignment,) = _read(file, "I")
        else:
            _skip(file, kind)
    found: dict[str, _Tensor] = {}
    for _ in range(tensors):
        name = _text(file)
        (dimensions,) = _read(file, "I")
        sizes = _read(file, f"{dimensions}Q")
        kind, offset = _read(file, "IQ")
        found[name] = _Tensor(kind, sizes, offset)
    start = -(-file.tell() // alignment) * alignment  # where the tensors' offsets count from
    return {name: tensor._replace(place=start + tensor.place) for name, tensor in found.items()}


def _vector(file: BinaryIO, place: int, size: int) -> Array:
    file.seek(place)
    return np.frombuffer(_bytes(file, 4 * size), "<f4")


def _read(file: BinaryIO, form: str) -> tuple[Any, ...]:
    """The next values, little-endian and without gaps."""
    form = "<" + form
    return struct.unpack(form, _bytes(file, struct.calcsize(form)))


def _bytes(file: BinaryIO, size: int) -> bytes:
    if size > _LONGEST:
        raise ValueError(f"it has a value of {size} bytes")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends too early")
    return data


def _text(file: BinaryIO) -> str:
    (length,) = _read(file, "Q")
    return _bytes(file, length).decode("utf-8")


def _skip(file: BinaryIO, kind: int) -> None:
    """Go on behind a value of the kind."""
    count = 1
    if kind == _ARRAY:
        kind, count = _read(file, "IQ")
    if kind == _STRING:
        for _ in range(count):
            _bytes(file, *_read(file, "Q"))
    elif kind not in _SIZES:
        raise ValueError(f"it has a value of the unknown kind {kind}")
    else:
        file.seek(_SIZES[kind] * count, os.SEEK_CUR)
