"""Keys and values of tokens already read: a cache that is extended in place and lends views of what it holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from lora_guard.errors import ModelError

_FIRST_ROOM = 256
_CACHED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Prefix:
    """What further tokens attend to: the keys and values of the tokens before them.

    ``layers`` has a pair for each decoder layer, both ``[rows, kv_heads, tokens, head_dim]``; ``lengths`` ``[rows]``
    says how many of a row's tokens count, the rest being padding behind them; all of them when None.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    lengths: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the tensors hold, padding included."""
        return self.layers[0][0].shape[2]

    @property
    def positions(self) -> Tensor:
        """``[rows]``, the position of the first token behind each row."""
        keys = self.layers[0][0]
        return torch.full((keys.shape[0],), keys.shape[2], device=keys.device) if self.lengths is None else self.lengths


class KVCache(Cache):
    """A cache of transformers whose layers keep their tokens in one buffer with room behind them.

    Extending it copies the new tokens only, cutting it changes a number, and a :class:`Prefix` of its first tokens is a
    view. Every layer keeps all tokens: in a model with sliding windows the mask hides those outside the window.

    Raises:
        ModelError: the model keeps something else than keys and values, such as the state of a recurrent layer.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ()) - _CACHED_LAYERS
        if kinds:
            raise ModelError(
                f"{text.model_type!r} has layers of kind {min(kinds)!r}; allowed: {sorted(_CACHED_LAYERS)}"
            )
        super().__init__(layers=[_Layer() for _ in range(text.num_hidden_layers)])

    @classmethod
    def behind(cls, prefix: Prefix, rows: int, config: PreTrainedConfig) -> Self:
        """A cache of ``rows`` rows that all begin with the one row of ``prefix``."""
        cache = cls(config)
        layers: Any = cache.layers
        for layer, (keys, values) in zip(layers, prefix.layers, strict=True):
            layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        return cache

    def prefix(self, tokens: int | None = None, lengths: Tensor | None = None) -> Prefix:
        """The first ``tokens`` of what it holds, all by default, as views."""
        end = self.get_seq_length() if tokens is None else tokens
        layers: Any = self.layers
        return Prefix([(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer in layers], lengths)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first ``tokens``."""
        layers: Any = self.layers
        for layer in layers:
            layer.length = min(layer.length, tokens)


class Together(Cache):
    """The caches of several conversations, each extended by its own row of a batch of one new token each.

    The new keys and values come back as they are: the attention reads the conversations' own through prefixes.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        super().__init__(layers=[])
        self._caches = caches

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append row r to cache r."""
        for row, cache in enumerate(self._caches):
            cache.update(key_states[row : row + 1], value_states[row : row + 1], layer_idx)
        return key_states, value_states


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One decoder layer's keys and values, ``[rows, kv_heads, room, head_dim]``; the first ``length`` are held."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; all that are held then, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.keys = _with_room(self.keys, start, end)
        self.values = _with_room(self.values, start, end)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _with_room(buffer: Tensor | None, held: int, needed: int) -> Tensor:
    """The buffer, or one twice as large with the held tokens in it: appending n tokens one by one costs O(n)."""
    assert buffer is not None
    rows, heads, room, width = buffer.shape
    if needed <= room:
        return buffer
    larger = buffer.new_empty(rows, heads, max(needed + _FIRST_ROOM if rows == 1 else needed, 2 * room), width)
    larger[:, :, :held] = buffer[:, :, :held]
    return larger
