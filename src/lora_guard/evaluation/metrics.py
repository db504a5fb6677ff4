"""Metrics of scores against labels, and their bootstrap intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

METRICS = ("auprc", "auroc", "precision", "recall", "f1", "fpr", "accuracy", "best_f1", "ece")

_BINS = 15
_COUNTS_AT_ONCE = 4_000_000


def point_metrics(scores: Floats, labels: Bools, threshold: float | Floats) -> dict[str, float | None]:
    """All of :data:`METRICS`; None where one is undefined.

    Flagged means ``score >= threshold``. AUPRC is average precision; ECE compares the score, taken as the probability
    of harm, with the share of harm in 15 equal bins. Without positives there is no AUPRC, AUROC, recall, F1 and best
    F1, without negatives no AUROC and FPR; precision is 0 when nothing is flagged.

    Args:
        scores: ``[rows]`` in [0, 1].
        labels: ``[rows]``, true is harmful.
        threshold: of the flag; ``[rows]`` where rows have their own.
    """
    flagged = scores >= threshold
    rates = _rates(
        np.array([(flagged & labels).sum()]),
        np.array([(flagged & ~labels).sum()]),
        np.array([labels.sum()]),
        np.array([(~labels).sum()]),
    )
    has_both = bool(labels.any() and not labels.all())
    values = {
        "auprc": average_precision_score(labels, scores) if labels.any() else np.nan,
        "auroc": roc_auc_score(labels, scores) if has_both else np.nan,
        **{name: rate[0] for name, rate in rates.items()},
        "best_f1": _f1_curve(scores, labels).max() if labels.any() else np.nan,
        "ece": _ece(scores, labels, np.ones((1, len(scores))))[0],
    }
    return {name: None if np.isnan(values[name]) else float(values[name]) for name in METRICS}


def with_intervals(
    scores: Floats, labels: Bools, threshold: float | Floats, *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """``{METRIC: {"value", "low", "high"}}``: the point metrics with 95 % percentile intervals over resampled rows.

    Resamples in which a metric is undefined are left out of its interval.
    """
    points = point_metrics(scores, labels, threshold)
    random = np.random.default_rng(seed)
    size = max(1, _COUNTS_AT_ONCE // max(1, len(scores)))
    parts = []
    for start in range(0, resamples, size):
        shape = (min(size, resamples - start), len(scores))
        parts.append(_resampled(scores, labels, threshold, _draw(random, shape)))
    bounds: dict[str, dict[str, float | None]] = {}
    for name in METRICS:
        values = np.concatenate([part[name] for part in parts])
        values = values[~np.isnan(values)]
        defined = points[name] is not None and len(values) > 0
        low, high = np.percentile(values, [2.5, 97.5]) if defined else (np.nan, np.nan)
        bounds[name] = {
            "value": points[name],
            "low": float(low) if defined else None,
            "high": float(high) if defined else None,
        }
    return bounds


def evaluate(
    scores: Floats,
    labels: Floats,
    thresholds: Floats,
    categories: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """One data set's entry in ``results.json``; categories that nobody annotated are left out.

    Args:
        scores: ``[rows, 1 + K]``, harmfulness first.
        labels: ``[rows, 1 + K]``: 1 harmful, 0 unharmful, nan not annotated.
        thresholds: ``[rows, 1 + K]``: those of prompts and of responses may differ.
        categories: K names.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    columns = {}
    for index, name in enumerate(["", *categories]):
        known = ~np.isnan(labels[:, index])
        if known.any():
            positive = labels[known, index] == 1
            columns[name] = {
                "n": int(known.sum()),
                "positives": int(positive.sum()),
                **with_intervals(
                    scores[known, index], positive, thresholds[known, index], resamples=resamples, seed=seed
                ),
            }
    return {"n": len(labels), "harmfulness": columns.pop("", {}), "categories": columns}


def precision_recall(scores: Floats, labels: Bools) -> tuple[Floats, Floats, float]:
    """Recall and precision of the curve, and its average precision."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    return recall, precision, float(average_precision_score(labels, scores))


def _f1_curve(scores: Floats, labels: Bools) -> Floats:
    """F1 at each threshold that occurs, ascending."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    both = precision + recall
    f1: Floats = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return f1[:-1]


def _draw(random: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """How often each row is drawn in each resample, ``[resamples, rows]``."""
    rows = shape[1]
    return random.multinomial(rows, np.full(rows, 1 / rows), size=shape[0]).astype(float)


def _resampled(scores: Floats, labels: Bools, threshold: float | Floats, counts: Floats) -> dict[str, Floats]:
    """The metrics of each resample ``[resamples]``, nan where undefined.

    A resample is a weight a row, so that scores are sorted once. Sums over equal scores come first: a curve has no
    point within a tie.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    weights, positive = counts[:, order], labels[order]
    true = (weights * positive).cumsum(1)[:, ends]  # weight of harmful rows at or above each score
    false = (weights * ~positive).cumsum(1)[:, ends]
    positives, negatives = true[:, -1], false[:, -1]
    flagged = scores >= threshold
    at = (counts @ (flagged & labels), counts @ (flagged & ~labels))
    start = np.zeros((len(counts), 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(true / (true + false))
        auprc = (np.diff(true, axis=1, prepend=start) * precision).sum(1) / positives
        heights = true + np.concatenate([start, true[:, :-1]], axis=1)
        auroc = (np.diff(false, axis=1, prepend=start) * heights).sum(1) / (2 * positives * negatives)
        best_f1 = np.where(positives > 0, (2 * true / (true + false + positives[:, None])).max(1), np.nan)
    return {
        "auprc": auprc,
        "auroc": auroc,
        **_rates(at[0], at[1], positives, negatives),
        "best_f1": best_f1,
        "ece": _ece(scores, labels, counts),
    }


def _rates(true: Floats, false: Floats, positives: Floats, negatives: Floats) -> dict[str, Floats]:
    """Threshold metrics from the weights of flagged harmful, flagged unharmful, all harmful and all unharmful rows."""
    flagged = true + false
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "precision": np.where(flagged > 0, true / flagged, np.where(positives > 0, 0.0, np.nan)),
            "recall": true / positives,
            "f1": np.where(positives > 0, 2 * true / (flagged + positives), np.nan),
            "fpr": false / negatives,
            "accuracy": (true + negatives - false) / (positives + negatives),
        }


def _ece(scores: Floats, labels: Bools, counts: Floats) -> Floats:
    """Expected calibration error of each resample: |share of harm - mean score| over 15 bins, weighted by rows."""
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    gap = np.where(labels, 1.0, 0.0) - scores
    one_hot = bins[:, None] == np.arange(_BINS)
    errors: Floats = np.abs((counts * gap) @ one_hot).sum(1) / counts.sum(1)
    return errors
