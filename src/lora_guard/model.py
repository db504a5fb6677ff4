"""The guard path of training and bulk scoring: token ids and mask -> features of the last token -> logits."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_guard.errors import out_of_memory
from lora_guard.heads import GuardHeads


class GuardModel(nn.Module):
    """A frozen chat model, whatever adapter is attached to it, and the heads.

    Args:
        base: the chat model; an adapter lives inside its layers.
        heads: maps its features to logits.
    """

    def __init__(self, base: PreTrainedModel, heads: GuardHeads) -> None:
        super().__init__()
        self.base = base
        self.heads = heads

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[rows, 1 + K]`` of token ids ``[rows, tokens]``; the mask is 1 on text and 0 on padding."""
        return cast(Tensor, self.heads(self.features(input_ids, attention_mask)))

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The decoder's last hidden state ``[rows, hidden]`` at each row's last attended token.

        The LM head is not run. The last token is found by the mask: pad may equal eos, and eos may stand in the text.
        """
        decoder: nn.Module = self.base.get_decoder()  # type: ignore[no-untyped-call]
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * positions).argmax(dim=1)
        return cast(Tensor, hidden[torch.arange(len(last), device=last.device), last])

    @property
    def outputs(self) -> int:
        """1 + K: harmfulness and the categories."""
        return int(self.heads.weight.shape[0]) + (not self.heads.harmful)

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
    """Whether the guard path multiplies in bf16: ``auto`` does where the device has it natively."""
    return precision == "bf16" or (precision == "auto" and _has_native_bf16(device))


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
    """The one scoring path: logits ``[rows, 1 + K]`` of token id rows, in their order.

    Rows are sorted by length and padded only to the longest of their batch.

    Args:
        model: in evaluation mode, its adapter switched on.
        rows: token ids, each row at least one.
        pad_id: any id; padding is masked.
        precision: ``auto``, ``fp32`` or ``bf16``.
        tokens_per_batch: the most tokens of a batch, padding included; a longer row makes a batch of its own.
        done: called after each batch with its number of rows.

    Raises:
        ResourceError: no memory for a batch.
    """
    device = model.heads.weight.device
    logits = torch.empty(len(rows), model.outputs)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    start = 0
    while start < len(order):
        width = len(rows[order[start]])
        batch = order[start : start + max(1, tokens_per_batch // width)]
        ids, mask = pad([rows[index] for index in batch], pad_id)
        with out_of_memory(f"a batch of {len(batch)} rows of {width} tokens"), autocast(device, precision):
            logits[batch] = model(ids.to(device), mask.to(device)).cpu()
        start += len(batch)
        done(len(batch))
    return logits


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both ``[rows, longest]``, padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.full_like(mask, pad_id)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return ids, mask


@cache
def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    except OSError:
        return False
    return device.type == "cpu" and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
