"""The guard path's attention: a few new tokens over keys and values that lie there already, read where they are.

No key or value of the prefix is copied, repeated or written, so a chat's cache can lend itself to any number of
judgements. Grouped queries fold into rows of one product for each key/value head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lora_guard.errors import ModelError
from lora_guard.kv_cache import Prefix

_NAME = "lora_guard"


@contextmanager
def over_prefixes(model: PreTrainedModel) -> Iterator[None]:
    """For the block, the model's forward pass takes ``prefixes`` (see :func:`attend`); the attention is state of its
    config, so callers hold the engine's lock."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    prefixes: Sequence[Prefix],
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of the new tokens over their row's prefix and themselves, as transformers calls it.

    Args:
        module: the attention layer; names its place in the model.
        query: ``[rows, heads, new, head_dim]``.
        key: ``[rows, kv_heads, new, head_dim]``, of the new tokens.
        value: as ``key``.
        attention_mask: None; the prefixes' lengths tell what is padding.
        scaling: of the products.
        prefixes: one for all rows, or one of a single row for each.
        sliding_window: how many tokens back a token sees.
        softcap: the scores' bound, in models that have one.
        s_aux: attention sinks, which are not supported.

    Returns:
        ``[rows, new, heads, head_dim]`` and None.

    Raises:
        ModelError: the model has attention sinks.
    """
    if s_aux is not None:
        raise ModelError("the base model has attention sinks; allowed: adapter 'lora', or a model without them")
    layer: Any = module.layer_idx
    if len(prefixes) == 1:
        pieces = [(slice(None), prefixes[0])]
    else:
        pieces = [(slice(row, row + 1), prefix) for row, prefix in enumerate(prefixes)]
    outputs = [
        _attend(query[rows] * scaling, key[rows], value[rows], prefix, layer, sliding_window, softcap)
        for rows, prefix in pieces
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    layer: int,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    before_keys, before_values = prefix.layers[layer]
    rows, heads, new, width = query.shape
    kv_heads, held = key.shape[1], before_keys.shape[2]
    groups = heads // kv_heads
    folded = query.reshape(rows * kv_heads, groups * new, width)
    before = torch.bmm(folded, before_keys.flatten(0, 1).transpose(1, 2))
    own = torch.bmm(folded, key.reshape(rows * kv_heads, new, width).transpose(1, 2))
    if softcap is not None:
        before, own = (torch.tanh(scores / softcap) * softcap for scores in (before, own))
    hidden = _hidden(prefix, held, new, groups, window)
    if hidden is not None:
        masked = before.view(rows, kv_heads, groups * new, held).masked_fill(hidden, -torch.inf)
        before = masked.view(rows * kv_heads, groups * new, held)
    scores = torch.cat([before, own + _causal(new, groups, window, query.device)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(before_values.dtype)
    read = torch.bmm(weights[..., :held], before_values.flatten(0, 1))
    read = read + torch.bmm(weights[..., held:].to(value.dtype), value.reshape(rows * kv_heads, new, width))
    return read.view(rows, heads, new, width).transpose(1, 2)


def _hidden(prefix: Prefix, held: int, new: int, groups: int, window: int | None) -> Tensor | None:
    """Which held tokens the new ones do not see, ``[rows, 1, groups · new or 1, held]``; None when they see all."""
    slides = window is not None and held + new > window
    if prefix.lengths is None and not slides:
        return None
    places = torch.arange(held, device=prefix.layers[0][0].device)
    hidden = places >= prefix.positions[:, None, None, None]
    if window is not None and slides:
        queries = prefix.positions[:, None] + torch.arange(new, device=places.device)
        hidden = hidden | (queries.repeat(1, groups)[:, None, :, None] - places >= window)
    return hidden


@lru_cache(maxsize=64)
def _causal(new: int, groups: int, window: int | None, device: torch.device) -> Tensor:
    """What is added to the scores of new tokens among themselves, ``[groups · new, new]``: minus infinity ahead."""
    with torch.inference_mode(False):
        distance = torch.arange(new, device=device)[:, None] - torch.arange(new, device=device)
        outside = (distance < 0) | (distance >= (window or new))
        return torch.zeros(new, new, device=device).masked_fill(outside, -torch.inf).repeat(groups, 1)


AttentionInterface.register(_NAME, attend)
