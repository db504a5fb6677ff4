"""Activation checkpointing: a decoder layer keeps its input alone, and computes the rest again in the backward pass."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def checkpoint_layers(base: PreTrainedModel) -> None:
    """Checkpoint every decoder layer from now on, in passes that gradients will go back through.

    transformers' own switch acts on models in training mode only, and a frozen chat model is never in it.

    Args:
        base: the chat model, its adapter attached. A pass that fills a cache is left as it is: run twice it would fill
            the cache twice.
    """
    for layer in cast(Any, base).get_decoder().layers:
        layer.forward = _checkpointed(layer.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*inputs: Any, **settings: Any) -> Any:
        if not torch.is_grad_enabled() or settings.get("past_key_values") is not None:
            return forward(*inputs, **settings)
        return checkpoint(forward, *inputs, use_reentrant=False, **settings)

    return run
