"""Low-rank adapters on a frozen chat model, stored in PEFT's format; the only module that imports peft."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_guard.errors import ArtifactError, ConfigError, allowed
from lora_guard.sharding import whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraShape:
    """What a LoRA adapter looks like; the paper's values are r 8, alpha 16, dropout 0.05 on ``q_proj`` and ``v_proj``.

    ``layers`` are the decoder layers that get one, all of them when None.
    """

    r: int
    alpha: float
    dropout: float
    target_modules: Sequence[str]
    layers: Sequence[int] | None = None


def attach(model: PreTrainedModel, shape: LoraShape, *, base_name: str) -> None:
    """Put a fresh, switched-on adapter into the model's layers: A Kaiming-uniform, B zero, no bias, in fp32.

    Raises:
        ConfigError: a target module or layer that the model does not have.
    """
    _check_shape(model, shape)
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # PEFT's annotation says int, its arithmetic takes any number
        lora_dropout=shape.dropout,
        target_modules=list(shape.target_modules),
        layers_to_transform=None if shape.layers is None else list(shape.layers),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    _inject(model, config)


def attach_saved(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Put a saved adapter into the model's layers, in fp32.

    Args:
        model: the chat model it was trained for.
        folder: holds ``adapter_config.json``.
        weights: the tensors of ``adapter_model.safetensors``.

    Raises:
        ArtifactError: the config cannot be read, or keys or shapes differ from what the model and config ask for.
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        _inject(model, config)
    except (OSError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / CONFIG_FILE}: {' '.join(str(error).split())}") from error
    expected = _parameters(model)
    check_tensors(weights, {name: p.shape for name, p in expected.items()}, folder / WEIGHTS_FILE)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])


def config_dict(model: PreTrainedModel) -> dict[str, Any]:
    """The contents of PEFT's ``adapter_config.json``."""
    config = cast(LoraConfig, model.peft_config[_ADAPTER])
    values = {**config.to_dict(), "inference_mode": True}  # type: ignore[no-untyped-call]
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors by their names in PEFT's ``adapter_model.safetensors``; empty without an adapter."""
    return whole(_parameters(model), dtype)


@contextmanager
def switched(model: nn.Module, on: bool) -> Iterator[None]:
    """Switch the adapter on or off for a block, then back. Off is bit for bit the base model.

    The switch is state of the shared modules, not of a thread: callers hold the engine's lock.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [not layer.disable_adapters for layer in layers]
    _switch(layers, [on] * len(layers))
    try:
        yield
    finally:
        _switch(layers, before)


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, torch.Size], path: Path) -> None:
    """Check that a file holds exactly the expected tensors, of their shapes, with finite values.

    Raises:
        ArtifactError: what is missing, extra, of another shape or not finite.
    """
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing:
        raise ArtifactError(
            f"{path} lacks {len(missing)} tensors, the first {missing[0]!r}; allowed: exactly the guard's"
        )
    if extra:
        raise ArtifactError(
            f"{path} has {len(extra)} unknown tensors, the first {extra[0]!r}; allowed: exactly the guard's"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ArtifactError(f"{path}: {name!r} has shape {list(tensor.shape)}; allowed: {list(expected[name])}")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: {name!r} holds NaN or infinite values; allowed: finite ones")


# PEFT's own default; under this name its files lie in the folder itself.
_ADAPTER = "default"
_FILE_PREFIX = "base_model.model."


def _inject(model: PreTrainedModel, config: LoraConfig) -> None:
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    model.train(model.training)  # new modules start in training mode, with dropout on
    for parameter in _parameters(model).values():
        parameter.data = parameter.data.float()


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    infix = f".{_ADAPTER}."
    return {
        _FILE_PREFIX + name.replace(infix, "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def _switch(layers: Sequence[BaseTunerLayer], states: Sequence[bool]) -> None:
    for layer, on in zip(layers, states, strict=True):
        if layer.disable_adapters == on:
            layer.enable_adapters(on)


def _check_shape(model: PreTrainedModel, shape: LoraShape) -> None:
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in shape.target_modules:
        if module not in linear:
            raise ConfigError(f"target_modules: the base model has no {module!r}; {allowed(module, sorted(linear))}")
    depth = model.config.get_text_config().num_hidden_layers
    for layer in shape.layers or ():
        if not 0 <= layer < depth:
            raise ConfigError(f"layers: the base model has no layer {layer}; allowed: 0 to {depth - 1}")
