"""Learns a token head: a logistic regression on the texts of a training config, weighed beside the guard."""

from collections.abc import Sequence
from itertools import chain, compress

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from lora_guard.config import TrainConfig
from lora_guard.data.example import Example
from lora_guard.data.split import drop_overlap
from lora_guard.errors import DataError
from lora_guard.guard import Guard
from lora_guard.progress import progress
from lora_guard.token_head import TokenHead
from lora_guard.training.rows import choose

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def learn(config: TrainConfig, guard: Guard, held_out: Sequence[Example], logits: Floats) -> tuple[TokenHead, int]:
    """A token head for a guard, and the number of texts that it learned from.

    These are the labelled rows of all the config's sources, also those beyond a source's ``rows``, which bound what an
    adapter's training costs. A row with a response is one text with it: harmful prompts ask questions, the well-known
    harmless ones give instructions, and only questions with a harmless answer tell that to ask "How do I" is no harm.
    How much the head counts beside the guard is decided on prompts that neither has seen.

    Args:
        config: names the sources and, under ``keep_out``, sets whose prompts are left out.
        guard: whose tokens they are.
        held_out: labelled rows; what has one of their prompts is left out as well.
        logits: ``[held_out]``, the harmfulness logits of the guard without a token head.

    Raises:
        DataError: a missing or bad source, or no texts of both kinds in it, or no such prompts among ``held_out``.
    """
    whole = config.model_copy(update={"train": [source.model_copy(update={"rows": None}) for source in config.train]})
    chosen = choose(whole, guard.taxonomy)
    rows, _ = drop_overlap([*chosen.train, *chosen.validation], held_out)
    ids, harmful = _texts(guard, rows, "the config's sources have {} labelled texts")
    with progress("learn from texts", 1, unit="fit") as tick:
        words = LogisticRegression(C=_C, class_weight="balanced", max_iter=1000).fit(_shares(ids), harmful)
        tick(1)
    head = TokenHead(words.coef_[0].astype(np.float32))
    prompts = [row.target == "prompt" and row.harmful is not None for row in held_out]
    held_ids, held_harmful = _texts(
        guard, list(compress(held_out, prompts)), "the rows to calibrate on have {} labelled prompts"
    )
    own = logits[prompts]
    both = np.column_stack([own, [head.logit(row) for row in held_ids]])
    of_guard, of_words = LogisticRegression(C=_C).fit(both, held_harmful).coef_[0]
    share = max(0.0, of_words) / max(_LEAST, of_guard)  # that of the guard's own logits is 1
    return TokenHead(head.weight * np.float32(share)), len(ids)


def _texts(guard: Guard, rows: Sequence[Example], found: str) -> tuple[list[list[int]], Bools]:
    """The token ids and labels of the labelled rows."""
    labelled = [row for row in rows if row.harmful is not None]
    harmful = np.array([row.harmful for row in labelled], dtype=bool)
    if len(set(harmful.tolist())) < 2:
        raise DataError(f"{found.format(len(labelled))}; needed to learn from: harmful and other ones")
    encode = guard.engine.renderer.content_ids
    return [encode(row.prompt) + encode(row.response or "") for row in labelled], harmful


def _shares(rows: Sequence[Sequence[int]]) -> csr_matrix:
    """``[rows, vocabulary]``: what a weight of 1 for a token adds to a row's logit (see :class:`TokenHead`)."""
    different = [np.unique(np.asarray(row, dtype=np.int64)) for row in rows]
    counts = np.array([len(row) for row in different])
    values = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts)
    columns = np.fromiter(chain.from_iterable(different), dtype=np.int64, count=int(counts.sum()))
    return csr_matrix((values, columns, np.append(0, counts.cumsum())), shape=(len(rows), int(columns.max()) + 1))


_LEAST = 0.1
"""What the guard's own logits weigh at least, so that no head drowns them where they say nothing of the rows."""

_C = 3.0
"""The inverse of the weights' prior. With 10 held-out prompts gain little more, and harmless words for groups of people
lose much (docs/lab-log.md)."""
