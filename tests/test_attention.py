"""Attention over prefixes: equal to plain attention over everything at once, whatever lengths, groups and windows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor

from lora_guard.attention import attend, over_prefixes
from lora_guard.errors import ModelError
from lora_guard.kv_cache import Prefix

LAYER: Any = SimpleNamespace(layer_idx=0)


def plain(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """One row of attention over all keys ``[kv_heads, all, width]`` of the last queries ``[heads, new, width]``."""
    groups, new, total = query.shape[0] // key.shape[0], query.shape[1], key.shape[1]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(total - new, total)[:, None] - torch.arange(total)
    scores = scores.masked_fill((behind < 0) | (behind >= (window or total)), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    new=st.integers(1, 4),
    groups=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 2, 5, 50]),
    softcap=st.sampled_from([None, 2.0]),
    padded=st.booleans(),
)
def test_it_equals_attention_over_everything_at_once(
    lengths: list[int], new: int, groups: int, window: int | None, softcap: float | None, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows, heads, longest = len(lengths), 2, max(lengths)
    query = torch.randn(rows, heads * groups, new, 4, generator=generator)
    key, value = torch.randn(2, rows, heads, new, 4, generator=generator)
    held_keys, held_values = torch.randn(2, rows, heads, longest, 4, generator=generator)
    if padded:
        prefixes = [Prefix([(held_keys, held_values)], torch.tensor(lengths))]
    else:
        pairs = [(held_keys[r : r + 1, :, :n], held_values[r : r + 1, :, :n]) for r, n in enumerate(lengths)]
        prefixes = [Prefix([pair]) for pair in pairs]
    found, _ = attend(
        LAYER, query, key, value, None, scaling=0.3, prefixes=prefixes, sliding_window=window, softcap=softcap
    )
    for row, length in enumerate(lengths):
        keys = torch.cat([held_keys[row, :, :length], key[row]], dim=1)
        values = torch.cat([held_values[row, :, :length], value[row]], dim=1)
        assert torch.allclose(found[row], plain(query[row], keys, values, 0.3, window, softcap), atol=1e-5)


def test_attention_sinks_are_refused() -> None:
    part = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ModelError, match="attention sinks"):
        attend(LAYER, part, part, part, None, scaling=1, prefixes=[Prefix([(part, part)])], s_aux=torch.zeros(1))


def test_the_models_own_attention_comes_back_even_after_an_error() -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    with over_prefixes(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    with pytest.raises(ZeroDivisionError), over_prefixes(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
