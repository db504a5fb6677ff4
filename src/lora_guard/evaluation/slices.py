"""Harmfulness on parts of a set: by source, target, length and category."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lora_guard.data.example import Example
from lora_guard.evaluation.metrics import Bools, with_intervals
from lora_guard.evaluation.scores import Scored

SMALLEST = 20
"""Fewer rows than this, or rows of one class alone, show how many they are and nothing else."""

SHOWN = ("auprc", "auroc", "recall", "f1", "fpr")

LENGTHS = (64, 256, 1024)
"""Upper bounds of the length buckets, in characters of the judged text."""


def slices(scored: Scored, categories: tuple[str, ...], *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """``{dimension: {value: {"n", "positives", METRIC: {"value", "low", "high"}}}}`` of harmfulness.

    The slice of a category holds its harmful rows and all unharmful rows of the set: its recall is that of the
    category, its false-positive rate that of the set. A dimension with one value is left out.

    Args:
        scored: the set; rows whose harmfulness is unknown are left out.
        categories: K names.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    found: dict[str, dict[str, Any]] = {}
    for dimension, values in _parts(scored, categories).items():
        if len(values) > 1 or dimension == "category":
            parts = {value: _slice(scored, rows, resamples, seed) for value, rows in values.items()}
            if parts:
                found[dimension] = parts
    return found


def _parts(scored: Scored, categories: tuple[str, ...]) -> dict[str, dict[str, Bools]]:
    """``{dimension: {value: which rows}}``."""
    examples, harmful = scored.data.examples, scored.labels[:, 0]
    known = ~np.isnan(harmful)
    parts: dict[str, dict[str, Bools]] = {
        "source": dict(_values([example.source for example in examples], known)),
        "target": dict(_values([example.target for example in examples], known)),
        "length": dict(_values([_length(example) for example in examples], known, _buckets())),
        "category": {},
    }
    for column, category in enumerate(categories, 1):
        labelled = (scored.labels[:, column] == 1) & (harmful == 1)
        if labelled.any():
            parts["category"][category] = labelled | (harmful == 0)
    return parts


def _values(values: list[str], known: Bools, order: list[str] | None = None) -> Iterator[tuple[str, Bools]]:
    array = np.array(values)
    for value in order or sorted(set(values)):
        rows = (array == value) & known
        if rows.any():
            yield value, rows


def _buckets() -> list[str]:
    return [*(f"≤ {bound:,} characters" for bound in LENGTHS), f"> {LENGTHS[-1]:,} characters"]


def _length(example: Example) -> str:
    """The bucket of the judged text: the response where there is one, else the prompt."""
    length = len(example.prompt if example.response is None else example.response)
    return _buckets()[sum(length > bound for bound in LENGTHS)]


def _slice(scored: Scored, rows: Bools, resamples: int, seed: int) -> dict[str, Any]:
    labels = scored.labels[rows, 0] == 1
    counts = {"n": int(rows.sum()), "positives": int(labels.sum())}
    if counts["n"] < SMALLEST or counts["positives"] in (0, counts["n"]):
        return counts
    found = with_intervals(scored.scores[rows, 0], labels, scored.thresholds[rows, 0], resamples=resamples, seed=seed)
    return {**counts, **{name: found[name] for name in SHOWN}}
