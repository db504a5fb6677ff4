"""Whole tensors from parameters that several processes hold in shards (FSDP), and back.

Every process calls :func:`whole` and :func:`as_held`, in the same order: with a sharded tensor they are an exchange.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors as a file holds them: complete, on the CPU, contiguous, in ``dtype`` if one is given."""
    return {name: _whole(tensor).to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def as_held(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A complete tensor as its process holds the parameter: on the same device, and sharded alike.

    Raises:
        ValueError: another shape than the parameter's.
    """
    if value.shape != parameter.shape:
        raise ValueError(f"shape {list(value.shape)} where the model has {list(parameter.shape)}")
    held = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(held, parameter.device_mesh, parameter.placements)
    return held


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
