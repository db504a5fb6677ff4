"""Metrics of scores against labels, and their bootstrap intervals."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TPR_AT = {"tpr_at_fpr_1": 0.01, "tpr_at_fpr_5": 0.05}
"""The highest true-positive rate that a threshold reaches with at most this false-positive rate."""

METRICS = ("auprc", "auroc", "precision", "recall", "f1", "fpr", "accuracy", "best_f1", *TPR_AT, "ece")

Interval = dict[str, float | None]
"""A metric's ``value`` with its ``low`` and ``high`` bound."""

_BINS = 15
_COUNTS_AT_ONCE = 4_000_000


def point_metrics(scores: Floats, labels: Bools, threshold: float | Floats) -> dict[str, float | None]:
    """All of :data:`METRICS`; None where one is undefined.

    Flagged means ``score >= threshold``. AUPRC is average precision; ECE compares the score, taken as the probability
    of harm, with the share of harm in 15 equal bins. Without positives there is no AUPRC, AUROC, recall, F1 and best
    F1, without negatives no AUROC and FPR, without either no TPR at an FPR; precision is 0 when nothing is flagged.

    Args:
        scores: ``[rows]`` in [0, 1].
        labels: ``[rows]``, true is harmful.
        threshold: of the flag; one, or one a row ``[rows]``.
    """
    flagged = scores >= threshold
    once = np.ones((1, len(scores)))
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
        **{name: rates[0] for name, rates in _tpr_at(*_above(scores, labels, once)).items()},
        "ece": _ece(scores, labels, once)[0],
    }
    return {name: None if np.isnan(values[name]) else float(values[name]) for name in METRICS}


def with_intervals(
    scores: Floats, labels: Bools, threshold: float | Floats, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """``{METRIC: {"value", "low", "high"}}``: the point metrics with 95 % percentile intervals over resampled rows.

    Resamples in which a metric is undefined are left out of its interval.
    """
    points = point_metrics(scores, labels, threshold)
    parts = [_resampled(scores, labels, threshold, counts) for counts in _draws(len(scores), resamples, seed)]
    return {name: _interval(points[name], np.concatenate([part[name] for part in parts])) for name in METRICS}


def ece_with_interval(scores: Floats, labels: Bools, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """The calibration error alone, as :func:`with_intervals` has it."""
    value = float(_ece(scores, labels, np.ones((1, len(scores))))[0])
    parts = [_ece(scores, labels, counts) for counts in _draws(len(scores), resamples, seed)]
    return _interval(value, np.concatenate(parts))


def auprc_drop(before: Floats, after: Floats, labels: Bools, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """By how much AUPRC falls from one scoring of some rows to another, with a 95 % percentile interval.

    A resample draws the same rows for both scorings, so that what they have in common does not widen the interval.

    Args:
        before: ``[rows]``.
        after: ``[rows]``, of the same rows.
        labels: ``[rows]``, true is harmful.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    if not labels.any():
        return _interval(None, np.empty(0))
    point = float(average_precision_score(labels, before) - average_precision_score(labels, after))
    parts = [
        _auprc(*_above(before, labels, counts)) - _auprc(*_above(after, labels, counts))
        for counts in _draws(len(labels), resamples, seed)
    ]
    return _interval(point, np.concatenate(parts))


def evaluate(
    scores: Floats,
    labels: Floats,
    thresholds: Sequence[float] | Floats,
    categories: Sequence[str],
    *,
    uncalibrated: Floats | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """One data set's entry in ``results.json``; categories that nobody annotated are left out.

    ``macro_auprc`` is the mean over the categories that have a harmful row, None without any.

    Args:
        scores: ``[rows, 1 + K]``, harmfulness first.
        labels: ``[rows, 1 + K]``: 1 harmful, 0 unharmful, nan not annotated.
        thresholds: ``[1 + K]``, or ``[rows, 1 + K]``.
        categories: K names.
        uncalibrated: ``[rows, 1 + K]``, the scores before calibration; their error is then given beside ``ece``.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    limits = np.broadcast_to(np.asarray(thresholds, dtype=float), scores.shape)
    columns: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(["", *categories]):
        known = ~np.isnan(labels[:, index])
        if known.any():
            positive = labels[known, index] == 1
            columns[name] = {
                "n": int(known.sum()),
                "positives": int(positive.sum()),
                **with_intervals(scores[known, index], positive, limits[known, index], resamples=resamples, seed=seed),
            }
            if uncalibrated is not None:
                raw = uncalibrated[known, index]
                columns[name]["ece_uncalibrated"] = ece_with_interval(raw, positive, resamples=resamples, seed=seed)
    harmfulness = columns.pop("", {})
    found = [column["auprc"]["value"] for column in columns.values() if column["auprc"]["value"] is not None]
    macro = float(np.mean(found)) if found else None
    return {"n": len(labels), "harmfulness": harmfulness, "categories": columns, "macro_auprc": macro}


def precision_recall(scores: Floats, labels: Bools) -> tuple[Floats, Floats, float]:
    """Recall and precision of the curve, and its average precision."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    return recall, precision, float(average_precision_score(labels, scores))


def reliability(scores: Floats, labels: Bools) -> tuple[Floats, Floats, Floats]:
    """The points of a reliability diagram: mean score, share of harm and number of rows of each bin with rows."""
    bins = _bin(scores)
    count = np.bincount(bins, minlength=_BINS).astype(float)
    filled = count > 0
    mean = np.bincount(bins, scores, _BINS)[filled] / count[filled]
    share = np.bincount(bins, labels, _BINS)[filled] / count[filled]
    return mean, share, count[filled]


def _f1_curve(scores: Floats, labels: Bools) -> Floats:
    """F1 at each threshold that occurs, ascending."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    both = precision + recall
    f1: Floats = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return f1[:-1]


def _draws(rows: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each row is drawn in each resample, ``[resamples, rows]`` in parts that memory holds."""
    random = np.random.default_rng(seed)
    size = max(1, _COUNTS_AT_ONCE // max(1, rows))
    for start in range(0, resamples, size):
        yield random.multinomial(rows, np.full(rows, 1 / rows), size=min(size, resamples - start)).astype(float)


def _interval(point: float | None, resampled: Floats) -> Interval:
    """The 95 % percentile interval around a point metric; resamples in which it is undefined are left out."""
    values = resampled[~np.isnan(resampled)]
    if point is None or not len(values):
        return {"value": point, "low": None, "high": None}
    low, high = np.percentile(values, [2.5, 97.5])
    return {"value": point, "low": float(low), "high": float(high)}


def _above(scores: Floats, labels: Bools, counts: Floats) -> tuple[Floats, Floats]:
    """Weight of harmful and of unharmful rows at or above each score, highest first: ``[resamples, different scores]``.

    A resample is a weight a row, so that scores are sorted once. Sums over equal scores come first: a curve has no
    point within a tie.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    weights, positive = counts[:, order], labels[order]
    return (weights * positive).cumsum(1)[:, ends], (weights * ~positive).cumsum(1)[:, ends]


def _auprc(true: Floats, false: Floats) -> Floats:
    """Average precision of each resample, from what :func:`_above` returns; nan without positives."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(true / (true + false))
        gained = np.diff(true, axis=1, prepend=0)
        averages: Floats = (gained * precision).sum(1) / true[:, -1]
    return averages


def _tpr_at(true: Floats, false: Floats) -> dict[str, Floats]:
    """:data:`TPR_AT` of each resample, from what :func:`_above` returns: 0 where the highest score passes the limit."""
    positives, negatives = true[:, -1:], false[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = true / positives
    defined = ((positives > 0) & (negatives > 0))[:, 0]
    best = {name: np.where(false <= limit * negatives, rate, 0).max(1) for name, limit in TPR_AT.items()}
    return {name: np.where(defined, rates, np.nan) for name, rates in best.items()}


def _resampled(scores: Floats, labels: Bools, threshold: float | Floats, counts: Floats) -> dict[str, Floats]:
    """The metrics of each resample ``[resamples]``, nan where undefined."""
    true, false = _above(scores, labels, counts)
    positives, negatives = true[:, -1], false[:, -1]
    flagged = scores >= threshold
    at = (counts[:, flagged & labels].sum(1), counts[:, flagged & ~labels].sum(1))
    start = np.zeros((len(counts), 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        heights = true + np.concatenate([start, true[:, :-1]], axis=1)
        auroc = (np.diff(false, axis=1, prepend=start) * heights).sum(1) / (2 * positives * negatives)
        best_f1 = np.where(positives > 0, (2 * true / (true + false + positives[:, None])).max(1), np.nan)
    return {
        "auprc": _auprc(true, false),
        "auroc": auroc,
        **_rates(at[0], at[1], positives, negatives),
        "best_f1": best_f1,
        **_tpr_at(true, false),
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
    bins = _bin(scores)
    gap = np.where(labels, 1.0, 0.0) - scores
    one_hot = bins[:, None] == np.arange(_BINS)
    errors: Floats = np.abs((counts * gap) @ one_hot).sum(1) / counts.sum(1)
    return errors


def _bin(scores: Floats) -> NDArray[np.int_]:
    """The bin of each score: 15 equal parts of [0, 1]."""
    bins: NDArray[np.int_] = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    return bins


def shown(metric: Interval) -> str:
    """``0.900 [0.880, 0.920]``, without brackets where there is no interval, and a dash without a value."""
    if metric["value"] is None:
        return "–"
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
