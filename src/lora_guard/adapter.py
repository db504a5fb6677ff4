"""Low-rank adapters on a frozen chat model, kept in PEFT's file format; of several at most one is on.

::

    x ──► W (frozen, untouched) ─────────────► + ──► y
     └──► dropout ──► A (r × in) ──► B (out × r) · alpha / r ─┘     while the switch is on

Forward hooks add the second way to the model's own linear layers, which keep their weights and their names; while no
adapter is on there are none. PEFT's layers do the same at a price that a check of a few tokens feels:
docs/decisions/0004-own-low-rank-layers.md.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lora_guard.artifact import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from lora_guard.errors import ArtifactError, ConfigError, allowed
from lora_guard.sharding import whole


@dataclass(frozen=True)
class LoraShape:
    """What a LoRA adapter looks like; the paper's values are r 8, alpha 16, dropout 0.05 on ``q_proj`` and ``v_proj``.

    ``layers`` are the decoder layers that get one, all of them when None. ``invocation`` are the token ids that switch
    an activated adapter on (aLoRA, arXiv 2504.12397): what comes before them is read by the base model alone. None for
    an adapter that reads everything.
    """

    r: int
    alpha: float
    dropout: float
    target_modules: Sequence[str]
    layers: Sequence[int] | None = None
    invocation: Sequence[int] | None = None


class Adapter:
    """An adapter on a model's layers, made by :func:`attach`.

    Args:
        shape: what it looks like.
        layers: the linear layers that it changes, by their names in the model.
        number: tells its modules on a layer from those of the layer's other adapters.
    """

    def __init__(self, shape: LoraShape, layers: dict[str, Any], number: int) -> None:
        self.shape = shape
        self.number = number
        self.layers = layers
        self.tokens: Tensor | None = None
        """Which tokens of a pass it reads, as indices into the flattened ``[rows · tokens]``; None for all."""
        self.down, self.up = (f"{module}_{number}" if number else module for module in ("lora_A", "lora_B"))
        self._handles: list[RemovableHandle] = []
        self._scale = shape.alpha / shape.r

    def switch(self, on: bool) -> None:
        """Put the hooks on the layers or take them off: what is off costs the generation path nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = [layer.register_forward_hook(self._add) for layer in self.layers.values()] if on else []

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names in PEFT's ``adapter_model.safetensors``."""
        return {
            f"{_FILE_PREFIX}{name}.{kind}.weight": getattr(layer, module).weight
            for name, layer in self.layers.items()
            for kind, module in (("lora_A", self.down), ("lora_B", self.up))
        }

    def _add(self, linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook: the base layer's output and the adapter's."""
        x, rows = inputs[0].flatten(0, -2), output.flatten(0, -2)  # as matrices: product and sum are one operation
        if self.tokens is None:
            return self._added(linear, x, rows).view_as(output)
        added = self._added(linear, x[self.tokens], rows[self.tokens])
        return rows.index_copy_(0, self.tokens, added).view_as(output)

    def _added(self, linear: Any, x: Tensor, rows: Tensor) -> Tensor:
        """``rows``, the base layer's outputs for ``x``, and the adapter's; all are matrices of a token a row."""
        down, up = getattr(linear, self.down), getattr(linear, self.up)
        x = x.to(down.weight.dtype)
        if self.shape.dropout and down.training:
            x = nn.functional.dropout(x, self.shape.dropout)
        low = nn.functional.linear(x, down.weight)
        return torch.addmm(rows, low.to(rows.dtype), up.weight.to(rows.dtype).t(), alpha=self._scale)


def attach(model: PreTrainedModel, shape: LoraShape) -> Adapter:
    """Put a fresh, switched-on adapter on the model's layers: A Kaiming-uniform, B zero, no bias, in fp32.

    Others that the model has stay, switched off.

    Raises:
        ConfigError: a target module or layer that the model does not have.
    """
    _check_shape(model, shape)
    layers = {name: module for name, module in model.named_modules() if _is_target(name, module, shape)}
    switch = _switch(model)
    taken = {other.number for other in switch.attached}
    attached = Adapter(shape, layers, next(number for number in itertools.count() if number not in taken))
    for linear in layers.values():
        device = linear.weight.device
        down = nn.Linear(linear.in_features, shape.r, bias=False, device=device, dtype=torch.float32)
        up = nn.Linear(shape.r, linear.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        setattr(linear, attached.down, down)
        setattr(linear, attached.up, up)
        linear.train(model.training)
    switch.attached.append(attached)
    switch.turn(attached)
    return attached


def detach(model: PreTrainedModel, attached: Adapter) -> None:
    """Take an adapter off the model for good; its memory is free once nobody holds its parameters."""
    switch = _switch(model)
    if switch.on is attached:
        switch.turn(None)
    switch.attached.remove(attached)
    for linear in attached.layers.values():
        delattr(linear, attached.down)
        delattr(linear, attached.up)


def attach_saved(
    model: PreTrainedModel, folder: Path, weights: dict[str, Tensor], invocation: Sequence[int] | None = None
) -> Adapter:
    """Put a saved adapter on the model's layers, in fp32 and switched off.

    Args:
        model: the chat model it was trained for.
        folder: holds ``adapter_config.json``.
        weights: the tensors of ``adapter_model.safetensors``.
        invocation: the token ids that the config must name, None for a plain adapter.

    Raises:
        ArtifactError: the config cannot be read, or keys or shapes differ from what the model and config ask for.
    """
    shape = _shape(read_adapter_config(folder / CONFIG_FILE))
    if shape.invocation != invocation:
        raise ArtifactError(
            f"{folder / CONFIG_FILE}: alora_invocation_tokens is {shape.invocation}; allowed: {invocation}, the "
            "guard's invocation in this base model's tokens"
        )
    try:
        attached = attach(model, shape)
    except ConfigError as error:
        raise ArtifactError(f"{folder / CONFIG_FILE}: {error}") from error
    expected = attached.parameters()
    try:
        check_tensors(weights, {name: p.shape for name, p in expected.items()}, folder / WEIGHTS_FILE)
    except ArtifactError:
        detach(model, attached)
        raise
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])
    _switch(model).turn(None)
    return attached


def config_dict(attached: Adapter, base_name: str) -> dict[str, Any]:
    """The contents of PEFT's ``adapter_config.json``, as PEFT itself writes it."""
    from peft import LoraConfig

    shape = attached.shape
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # PEFT's annotation says int, its arithmetic takes any number
        lora_dropout=shape.dropout,
        target_modules=list(shape.target_modules),
        layers_to_transform=None if shape.layers is None else list(shape.layers),
        alora_invocation_tokens=None if shape.invocation is None else list(shape.invocation),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    values = config.to_dict()  # type: ignore[no-untyped-call]
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def weights(attached: Adapter | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """An adapter's tensors by their names in PEFT's ``adapter_model.safetensors``; none without an adapter."""
    return {} if attached is None else whole(attached.parameters(), dtype)


@contextmanager
def switched(model: nn.Module, to: Adapter | None) -> Iterator[None]:
    """For the block, have exactly this adapter on, or none. With none the model is the base model bit for bit.

    The switch is state of the shared modules, not of a thread: callers hold the chat model's lock.
    """
    switch = _switch(model)
    before = switch.on
    switch.turn(to)
    try:
        yield
    finally:
        switch.turn(before)


@contextmanager
def reading_only(attached: Adapter | None, tokens: Tensor) -> Iterator[None]:
    """For the block, a switched-on adapter reads some tokens of each pass; on the others it is as if it were off.

    Args:
        attached: None does nothing.
        tokens: indices into the pass's flattened ``[rows · tokens]``.
    """
    if attached is None:
        yield
        return
    attached.tokens = tokens
    try:
        yield
    finally:
        attached.tokens = None


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


_ATTRIBUTE = "lora_guard_adapters"
_FILE_PREFIX = "base_model.model."
_LAYER_INDEX = re.compile(r"\.(\d+)\.")


class _Switch:
    """Which of a model's adapters is on."""

    def __init__(self) -> None:
        self.attached: list[Adapter] = []
        self.on: Adapter | None = None

    def turn(self, to: Adapter | None) -> None:
        """Switch one adapter on and the others off, or all off."""
        if to is self.on:
            return
        if self.on is not None:
            self.on.switch(False)
        if to is not None:
            to.switch(True)
        self.on = to


def _shape(config: AdapterConfig) -> LoraShape:
    return LoraShape(
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        layers=config.layers_to_transform,
        invocation=config.alora_invocation_tokens,
    )


def _switch(model: nn.Module) -> _Switch:
    if not hasattr(model, _ATTRIBUTE):
        setattr(model, _ATTRIBUTE, _Switch())
    return cast(_Switch, getattr(model, _ATTRIBUTE))


def _is_target(name: str, module: nn.Module, shape: LoraShape) -> bool:
    if not isinstance(module, nn.Linear) or name.rpartition(".")[2] not in shape.target_modules:
        return False
    index = _LAYER_INDEX.search(name)
    return shape.layers is None or (index is not None and int(index[1]) in shape.layers)


def _check_shape(model: PreTrainedModel, shape: LoraShape) -> None:
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    linear = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    for module in shape.target_modules:
        if module not in linear:
            raise ConfigError(f"target_modules: the base model has no {module!r}; {allowed(module, sorted(linear))}")
    depth = model.config.get_text_config().num_hidden_layers
    for layer in shape.layers or ():
        if not 0 <= layer < depth:
            raise ConfigError(f"layers: the base model has no layer {layer}; allowed: 0 to {depth - 1}")
