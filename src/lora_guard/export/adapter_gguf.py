"""Writes a guard's low-rank adapter as the GGUF file that llama.cpp attaches to a chat model."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_guard import files
from lora_guard.errors import ArtifactError, allowed
from lora_guard.norms import ARCHITECTURES

Array = NDArray[np.float32]


@dataclass(frozen=True)
class BaseShape:
    """What the file says of the base model: llama.cpp's architecture, decoder layers, query and key/value heads."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int


def architecture_of(model_type: str) -> str:
    """llama.cpp's name of a transformers model type.

    Raises:
        ArtifactError: there is no mapping.
    """
    if model_type not in ARCHITECTURES:
        raise ArtifactError(
            f"a base model of type {model_type!r} cannot be exported to llama.cpp; {allowed(model_type, ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def write_adapter(
    path: Path,
    tensors: Mapping[str, Array],
    *,
    alpha: float,
    invocation: Sequence[int] | None,
    base: BaseShape,
    name: str,
) -> None:
    """Write the file; the folder it stands in is the caller's to complete in one step.

    Args:
        path: of the new file.
        tensors: PEFT's names -> A ``[r, in]`` and B ``[out, r]``; kept in fp16, half of what fp32 takes in memory.
        alpha: ``lora_alpha``; llama.cpp divides by r itself.
        invocation: the token ids that switch an activated adapter on; None for one that reads everything.
        base: of the chat model.
        name: of the guard.

    Raises:
        ArtifactError: a tensor on a layer that llama.cpp does not have.
        ResourceError: the file cannot be written.
    """
    import gguf  # of 8 MB, for a file that is written once

    kind = next(a for a, written in gguf.MODEL_ARCH_NAMES.items() if written == base.architecture)
    names = gguf.get_tensor_name_map(kind, base.layers)
    writer = gguf.GGUFWriter(None, base.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if invocation is not None:
        writer.add_key_value(
            gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS,
            list(invocation),
            gguf.GGUFValueType.ARRAY,
            gguf.GGUFValueType.UINT32,
        )
    for written, tensor in sorted(tensors.items()):
        layer, matrix = _parsed(written)
        target = names.get_name(layer, try_suffixes=(".weight",))
        if target is None:
            raise ArtifactError(f"llama.cpp's {base.architecture!r} has no place for the adapter of {layer!r}")
        if matrix == "b" and base.architecture == "llama":
            tensor = _rotated(tensor, layer, base)
        writer.add_tensor(f"{target}.weight.lora_{matrix}", np.ascontiguousarray(tensor, dtype=np.float16))
    with files.writing(path):
        writer.open_output_file(path)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_floats(path: Path, data: bytes) -> dict[str, Array]:
    """The tensors of a safetensors file as numpy arrays: bf16 and fp16 become fp32.

    Without torch, for numpy has no bf16, and without safetensors' library, which would lie in a device's memory.

    Args:
        path: of the file, for the error.
        data: its contents.

    Raises:
        ArtifactError: it is no such file, or has a tensor of another dtype.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _array(name, entry, memoryview(data)[8 + length :]) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from error


def _array(name: str, entry: Mapping[str, Any], data: memoryview) -> Array:
    start, end = entry["data_offsets"]
    raw, shape = data[start:end], entry["shape"]
    if entry["dtype"] == "BF16":  # the upper half of an fp32 number
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if entry["dtype"] not in _DTYPES:
        raise ArtifactError(f"tensor {name!r} is of dtype {entry['dtype']}; {allowed(entry['dtype'], _DTYPES)}")
    return np.frombuffer(raw, _DTYPES[entry["dtype"]]).astype(np.float32).reshape(shape)


_DTYPES: dict[str, Any] = {"BF16": None, "F16": np.float16, "F32": np.float32}

_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<matrix>[AB])\.weight")


def _parsed(name: str) -> tuple[str, str]:
    """The layer of one of PEFT's tensor names, and ``a`` or ``b``."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ArtifactError(f"adapter tensor {name!r} is not a LoRA matrix; allowed: names that PEFT gives")
    return match["layer"], match["matrix"].lower()


def _rotated(tensor: Array, layer: str, base: BaseShape) -> Array:
    """The rows of B in the order of llama.cpp's rotary embedding: it pairs neighbours, transformers the halves."""
    heads = {"q_proj": base.heads, "k_proj": base.kv_heads}.get(layer.rpartition(".")[2])
    if heads is None:
        return tensor
    rows, r = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, r).swapaxes(1, 2).reshape(rows, r)
