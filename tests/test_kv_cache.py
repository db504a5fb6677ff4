"""The cache in place: what it holds equals what transformers' own holds, at linear cost, and views of it stay true."""

import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache, LlamaConfig

from lora_guard.errors import ModelError
from lora_guard.kv_cache import KVCache, Prefix

CONFIG = LlamaConfig(num_hidden_layers=2)


def token(seed: int, rows: int = 1, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, count, 8, generator=generator)
    return keys, values


def filled(cache: KVCache | DynamicCache, steps: int) -> None:
    for step in range(steps):
        for layer in range(2):
            cache.update(*token(10 * step + layer), layer)


def test_it_holds_what_a_concatenating_cache_holds() -> None:
    ours, theirs = KVCache(CONFIG), DynamicCache(config=CONFIG)
    filled(ours, 600)  # beyond the first buffer
    filled(theirs, 600)
    assert ours.get_seq_length() == 600
    for (keys, values), layer in zip(ours.prefix().layers, theirs.layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)


def test_appending_copies_old_tokens_a_logarithmic_number_of_times() -> None:
    cache = KVCache(CONFIG)
    filled(cache, 1)
    buffers = set()
    for step in range(5000):
        cache.update(*token(step), 0)
        buffers.add(cache.layers[0].keys.data_ptr())
    assert len(buffers) <= 6


def test_a_view_stays_what_it_was_while_the_cache_goes_on() -> None:
    cache = KVCache(CONFIG)
    filled(cache, 5)
    view = cache.prefix(3)
    kept = view.layers[0][0].clone()
    assert view.layers[0][0].data_ptr() == cache.layers[0].keys.data_ptr()  # no copy
    filled(cache, 400)
    assert torch.equal(view.layers[0][0], kept)


def test_truncated_it_goes_on_from_there() -> None:
    cache, other = KVCache(CONFIG), KVCache(CONFIG)
    filled(cache, 8)
    cache.truncate(3)
    assert cache.get_seq_length() == 3
    filled(other, 3)
    for one in (cache, other):
        one.update(*token(99), 0)
    assert torch.equal(cache.prefix(4).layers[0][0], other.prefix(4).layers[0][0])


def test_rows_that_begin_alike_are_laid_behind_one_prefix() -> None:
    shared = KVCache(CONFIG)
    filled(shared, 4)
    cache = KVCache.behind(shared.prefix(), 3, CONFIG)
    cache.update(*token(7, rows=3, count=2), 1)
    keys = cache.layers[1].keys[:, :, : cache.layers[1].length]
    assert keys.shape == (3, 2, 6, 8)
    assert all(torch.equal(row, shared.prefix().layers[1][0][0]) for row in keys[:, :, :4])


def test_positions_behind_a_prefix_follow_its_lengths() -> None:
    layers = [token(0, rows=2, count=5)]
    assert Prefix(layers).positions.tolist() == [5, 5]
    assert Prefix(layers, torch.tensor([2, 5])).positions.tolist() == [2, 5]


def test_a_model_that_keeps_something_else_is_refused() -> None:
    config = tiny_model().config
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="layers of kind 'linear_attention'; allowed"):
        KVCache(config)
