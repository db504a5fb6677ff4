"""Learns a token head: a logistic regression on the texts of training configs, weighed beside the guard."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from lora_guard.token_head import TokenHead, word_ids
from lora_guard.training.rows import choose

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Texts:
    """What a token head learns from: the token ids of each text, and ``harmful`` ``[texts]``."""

    ids: list[list[int]]
    harmful: Bools


def read_texts(configs: Sequence[TrainConfig], guard: Guard, held_out: Sequence[Example]) -> Texts:
    """The labelled rows of all sources of training configs, also those beyond a source's ``rows``, which bound what an
    adapter's training costs.

    A row with a response is one text with it: harmful prompts ask questions, the well-known harmless ones give
    instructions, and only questions with a harmless answer tell that to ask "How do I" is no harm.

    Args:
        configs: each names sources and, under ``keep_out``, sets whose prompts are left out of these.
        guard: whose tokens they are.
        held_out: rows whose prompts are left out as well.

    Raises:
        DataError: a missing or bad source, or rows of one kind alone.
    """
    chosen: list[Example] = []
    for config in configs:
        whole = [source.model_copy(update={"rows": None}) for source in config.train]
        rows = choose(config.model_copy(update={"train": whole}), guard.taxonomy)
        chosen += [*rows.train, *rows.validation]
    unseen, _ = drop_overlap(chosen, held_out)
    return _texts(guard, unseen, "the sources of --learn-tokens have {} labelled texts")


def learn(texts: Texts, guard: Guard, held_out: Sequence[Example], logits: Floats) -> TokenHead:
    """A token head for a guard. How much it counts beside the guard is decided on prompts that neither has seen.

    Args:
        texts: what it learns from.
        guard: whose tokens they are.
        held_out: labelled rows.
        logits: ``[held_out]``, the harmfulness logits of the guard without a token head.

    Raises:
        DataError: no prompts of both kinds among ``held_out``.
    """
    prompts = [row.target == "prompt" and row.harmful is not None for row in held_out]
    judged = _texts(guard, list(compress(held_out, prompts)), "the rows to calibrate on have {} labelled prompts")
    with progress("learn from texts", 1, unit="fit") as tick:
        words = LogisticRegression(C=_C, class_weight="balanced", max_iter=1000)
        head = TokenHead(words.fit(_shares(texts.ids), texts.harmful).coef_[0].astype(np.float32))
        tick(1)
    both = np.column_stack([logits[prompts], [head.logit(row) for row in judged.ids]])
    of_guard, of_words = LogisticRegression(C=_C).fit(both, judged.harmful).coef_[0]
    share = max(0.0, of_words) / max(_LEAST, of_guard)  # that of the guard's own logits is 1
    return TokenHead(head.weight * np.float32(share))


def _texts(guard: Guard, rows: Sequence[Example], found: str) -> Texts:
    labelled = [row for row in rows if row.harmful is not None]
    harmful = np.array([row.harmful for row in labelled], dtype=bool)
    if len(set(harmful.tolist())) < 2:
        raise DataError(f"{found.format(len(labelled))}; needed to learn from: harmful and other ones")
    words = partial(word_ids, guard.engine.renderer)
    return Texts([words(row.prompt) + words(row.response or "") for row in labelled], harmful)


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
