"""The paper's procedure (arXiv 2407.02987), written from its text: the side that benches compare with.

Text without chat template, LoRA r 8 on q and v of every layer, one pass over a whole text for each judgement, every
row of a data set padded to its longest. Where the text leaves it open, the faster way is taken: the LM head is not run,
and products are in bf16 over the weights as they are, as on our side.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad as fill

from lora_guard import adapter, base_model
from lora_guard.base_model import BaseModel
from lora_guard.data.example import Example
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel, autocast, pad, takes_bf16
from lora_guard.training.loss import label_counts, loss_terms, pos_weights

SHAPE = adapter.LoraShape(8, 16, 0.05, ("q_proj", "v_proj"))
BATCH = 2
EVALUATION_BATCH = 50
LEARNING_RATE = 3e-4


class PaperGuard:
    """A fresh guard of the paper on a copy of the chat model.

    Args:
        base: gets the adapter; its weights stay as they are.
        categories: K, outputs beside harmfulness.
        seed: of adapter and heads.
    """

    def __init__(self, base: BaseModel, categories: int, seed: int) -> None:
        torch.manual_seed(seed)
        attached = adapter.attach(base.model, SHAPE)
        device = next(base.model.parameters()).device
        heads = GuardHeads(base.model.config.get_text_config().hidden_size, categories)
        self.model = GuardModel(base.model, heads, attached=attached).to(device).eval()
        self._base, self._device, self._precision = base, device, "auto"

    def ids(self, example: Example) -> list[int]:
        """Token ids of a row's text, at most the model's context."""
        return self._encode(text(example))[: self._base.context]

    def wrapped(self, prompt: Sequence[int], response: Sequence[int]) -> list[int]:
        """The text form around a prompt and response that are token ids already."""
        return [*self._encode("user: "), *prompt, *self._encode("\n\nagent: "), *response]

    def judge(self, ids: Sequence[int]) -> Tensor:
        """One judgement: logits ``[1, 1 + K]`` by a full pass over one text."""
        return self.score([ids], len(ids))

    def hold_in_bf16(self) -> None:
        """Hold the weights in bf16 where that is faster, as the guard's bulk scoring does."""
        if takes_bf16(self._device, "auto"):
            base_model.convert(self._base.model, torch.bfloat16)
            self._precision = "fp32"

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        """Logits of a batch of rows, each padded to ``width`` tokens."""
        ids, mask = padded(rows, width, self._base.pad_id)
        with autocast(self._device, self._precision):
            logits: Tensor = self.model(ids.to(self._device), mask.to(self._device))
        return logits

    def bucketed(self, rows: Sequence[Sequence[int]], tokens_per_batch: int) -> Tensor:
        """Logits of rows, sorted by length and padded per batch: not the paper's way, but what a good loop does."""
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
        logits = torch.empty(len(rows), self.model.outputs)
        start = 0
        while start < len(order):
            width = len(rows[order[start]])
            batch = order[start : start + max(1, tokens_per_batch // width)]
            logits[batch] = self.score([rows[row] for row in batch], width).float().cpu()
            start += len(batch)
        return logits

    def train(self, rows: Sequence[Sequence[int]], labels: Tensor, width: int, seed: int) -> Iterator[int]:
        """Train without end, an optimizer step at a time; yields the number of rows of each."""
        optimizer = torch.optim.AdamW(self.model.trainable().values(), lr=LEARNING_RATE)
        weight = pos_weights(labels, None).to(self._device)
        chance = random.Random(seed)
        while True:
            order = chance.sample(range(len(rows)), len(rows))
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                self.model.train()
                ids, mask = padded([rows[row] for row in chosen], width, self._base.pad_id)
                with autocast(self._device, self._precision):
                    logits = self.model(ids.to(self._device), mask.to(self._device))
                known = labels[chosen].to(self._device)
                loss = 0.5 * loss_terms(logits.float(), known, weight, label_counts(known)).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                yield len(chosen)

    def _encode(self, words: str) -> list[int]:
        ids: list[int] = self._base.tokenizer.encode(words, add_special_tokens=False)
        return ids


def text(example: Example) -> str:
    """What the paper's guard reads of a row."""
    return f"user: {example.prompt}\n\nagent: {example.response or ''}"


def padded(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both ``[rows, width]``, padded on the right."""
    ids, mask = pad(rows, pad_id)
    missing = (0, width - ids.shape[1])
    return fill(ids, missing, value=pad_id), fill(mask, missing)
