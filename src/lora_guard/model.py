"""The guard path of training and bulk scoring: token ids and mask -> features of the last token -> logits."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_guard import adapter
from lora_guard.attention import over_prefixes
from lora_guard.errors import out_of_memory
from lora_guard.heads import GuardHeads
from lora_guard.kv_cache import KVCache, Prefix
from lora_guard.render import shared_start

AdapterKind = Literal["lora", "alora", "none"]


class GuardModel(nn.Module):
    """A frozen chat model, whatever adapter is attached to it, and the heads.

    Args:
        base: the chat model; adapters live on its layers.
        heads: maps its features to logits.
        kind: ``lora``: the adapter reads everything; ``alora``: it reads the invocation, behind a conversation whose
            keys and values are the base model's own; ``none``: there is no adapter.
        invocation: token ids that end every judged row.
        attached: this guard's adapter among those on the base; None for the kind ``none``.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        heads: GuardHeads,
        *,
        kind: AdapterKind = "lora",
        invocation: Sequence[int] = (),
        attached: adapter.Adapter | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter = attached
        self.heads = heads
        self.kind = kind
        self.invocation = list(invocation)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        opening: Prefix | None = None,
        prefixes: Sequence[Prefix] = (),
    ) -> Tensor:
        """Logits ``[rows, 1 + K]`` of whole rows (see :meth:`features`), or of an invocation behind prefixes
        (see :meth:`features_behind`)."""
        if prefixes:
            return cast(Tensor, self.heads(self.features_behind(input_ids, prefixes)))
        return cast(Tensor, self.heads(self.features(input_ids, attention_mask, opening)))

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, opening: Prefix | None = None
    ) -> Tensor:
        """The decoder's last hidden state ``[rows, hidden]`` at each row's last attended token.

        The LM head is not run. The last token is found by the mask: pad may equal eos, and eos may stand in the text.
        An activated adapter reads the invocation alone, which ends every row.

        Args:
            input_ids: ``[rows, tokens]``.
            attention_mask: ``[rows, tokens]``, 1 on text and 0 on padding behind it; all text when None.
            opening: one row that stands before each of them.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        with self._activated(rows * mask.shape[1] + last):
            hidden, _ = self._decode(input_ids, opening, keep=False)
        return hidden[rows, last]

    def features_behind(self, input_ids: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
        """The decoder's last hidden state ``[rows, hidden]`` of tokens behind prefixes that nothing of it changes.

        Args:
            input_ids: ``[rows, tokens]``, the invocation of each row.
            prefixes: one for all rows, or one of a single row for each.
        """
        starts = torch.cat([prefix.positions for prefix in prefixes])
        positions = starts[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        with over_prefixes(self.base):
            hidden = self._decoder(input_ids=input_ids, position_ids=positions, use_cache=False, prefixes=prefixes)[0]
        return cast(Tensor, hidden[:, -1])

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor, opening: Prefix | None = None) -> Prefix:
        """Keys and values of conversations as the guard reads them: the frozen base's own, but for a ``lora`` adapter.

        Args:
            input_ids: ``[rows, tokens]``.
            attention_mask: ``[rows, tokens]``, 1 on text and 0 on padding behind it.
            opening: one row that stands before each of them; the result holds it too.
        """
        training = self.base.training
        self.base.train(False)
        try:
            with adapter.switched(self.base, self.adapter if self.kind == "lora" else None):
                _, cache = self._decode(input_ids, opening, keep=True)
        finally:
            self.base.train(training)
        before = 0 if opening is None else opening.tokens
        return cast(KVCache, cache).prefix(lengths=before + attention_mask.sum(1))

    def extend(self, input_ids: Tensor, cache: KVCache) -> None:
        """Append ``[rows, tokens]`` to a cache, read as the adapter's switch stands."""
        self._decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)

    def _activated(self, ends: Tensor) -> AbstractContextManager[None]:
        """The block in which an activated adapter reads the invocation alone, of rows that end at ``ends`` ``[rows]``,
        indices into the flattened pass."""
        if self.kind != "alora":
            return nullcontext()
        back = torch.arange(1 - len(self.invocation), 1, device=ends.device)
        return adapter.reading_only(self.adapter, (ends[:, None] + back).flatten())

    def _decode(self, input_ids: Tensor, opening: Prefix | None, *, keep: bool) -> tuple[Tensor, KVCache | None]:
        """Hidden states ``[rows, tokens, hidden]`` of right-padded rows, and the cache if there is need of one.

        There is no mask of the padding: it stands behind the text, which therefore never sees it, and the product of
        attention without a mask is the faster one.
        """
        cache = None
        if opening is not None:
            cache = KVCache.behind(opening, len(input_ids), self.base.config)
        elif keep:
            cache = KVCache(self.base.config)
        output = self._decoder(input_ids=input_ids, past_key_values=cache, use_cache=keep)
        return cast(Tensor, output[0]), cache

    @property
    def _decoder(self) -> Any:
        return self.base.get_decoder()  # type: ignore[no-untyped-call]

    @property
    def outputs(self) -> int:
        """1 + K: harmfulness and the categories."""
        return int(self.heads.weight.shape[0]) + (not self.heads.harmful)

    @property
    def _no_split_modules(self) -> Any:
        """The base model's decoder layers, by the name under which accelerate looks for what FSDP shards one by one."""
        return self.base._no_split_modules

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained: the adapter and the heads."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def parameter_counts(model: GuardModel) -> dict[str, int]:
    """How many parameters the base, the adapter and the heads have."""
    heads = sum(p.numel() for p in model.heads.parameters())
    adapter = sum(p.numel() for p in model.base.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.base.parameters()) - adapter
    return {"base": base, "adapter": adapter, "heads": heads}


def takes_bf16(device: torch.device, precision: str) -> bool:
    """Whether the guard path multiplies in bf16: ``auto`` does where that is measured to be faster."""
    return precision == "bf16" or (precision == "auto" and _bf16_is_faster(device))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The guard path's arithmetic: ``bf16`` products over weights as they are, ``fp32``, or ``auto``.

    The generation path never runs under it.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=takes_bf16(device, precision))


@torch.inference_mode()
def batched_logits(
    model: GuardModel,
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    precision: str,
    tokens_per_batch: int,
    done: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """The one scoring path: logits ``[rows, 1 + K]`` of token id rows that end with the invocation, in their order.

    What all rows begin with, such as a system message, is computed once. Rows are sorted by length and padded only to
    the longest of their batch.

    Args:
        model: in evaluation mode, its adapter switched on.
        rows: token ids, each row at least one.
        pad_id: any id; no text sees padding.
        precision: ``auto``, ``fp32`` or ``bf16``.
        tokens_per_batch: the most tokens of a batch, padding included; a longer row makes a batch of its own.
        done: called after each batch with its number of rows.

    Raises:
        ResourceError: no memory for a batch.
    """
    device = model.heads.weight.device
    logits = torch.empty(len(rows), model.outputs)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    with out_of_memory("what all rows begin with"), autocast(device, precision):
        shared, opening = _opening(model, rows)
    start = 0
    while start < len(order):
        width = len(rows[order[start]]) - shared
        batch = order[start : start + max(1, tokens_per_batch // width)]
        with out_of_memory(f"a batch of {len(batch)} rows of {width} tokens"), autocast(device, precision):
            ids, mask = (part.to(device) for part in pad([rows[index][shared:] for index in batch], pad_id))
            logits[batch] = model(ids, mask, opening=opening).cpu()
        start += len(batch)
        done(len(batch))
    return logits


def _opening(model: GuardModel, rows: Sequence[Sequence[int]]) -> tuple[int, Prefix | None]:
    """How many tokens all rows begin with, leaving each something of its own, and the guard path's keys and values."""
    least = 1 + (len(model.invocation) if model.kind == "alora" else 0)
    if len(rows) < 2:
        return 0, None
    shared = shared_start(rows, least)
    if shared == 0:
        return 0, None
    ids = torch.tensor([rows[0][:shared]], device=model.heads.weight.device)
    return shared, model.read(ids, torch.ones_like(ids))


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both ``[rows, longest]``, padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.full_like(mask, pad_id)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return ids, mask


@cache
def _bf16_is_faster(device: torch.device) -> bool:
    """Measured once a process, in milliseconds: products of a small model's size, a clear gain or none."""
    if device.type == "mps":
        return False  # its autocast has no bf16 on older systems, and a wrong guess would be an error
    kinds = (torch.float32, torch.bfloat16)
    pairs = {kind: [torch.ones(size, 576, device=device, dtype=kind) for size in (256, 1536)] for kind in kinds}
    times = dict.fromkeys(kinds, math.inf)
    for _ in range(_TRIALS):  # in turn, so that whatever else the machine does meets both
        for kind, (rows, weight) in pairs.items():
            began = time.perf_counter()
            nn.functional.linear(rows, weight).sum().item()
            times[kind] = min(times[kind], time.perf_counter() - began)
    return times[torch.float32] > _CLEAR_GAIN * times[torch.bfloat16]


_TRIALS = 20
_CLEAR_GAIN = 1.3
