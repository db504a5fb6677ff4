"""The figures of the report, as SVG that takes the colour of the page's text and needs nothing from outside."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from lora_guard.evaluation.metrics import Bools, Floats, precision_recall, reliability

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

_INK = "#010203"  # becomes the page's text colour
_HARMFUL, _UNHARMFUL, _OURS, _OTHERS = "#d9722b", "#3f86c6", "#7b5cd6", "#8a8f98"
_MARKERS = "osD^vP"
_STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",  # text stays text: it scales, and can be searched
    "svg.hashsalt": "lora-guard",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}
_POINTS = 400


def curves(scores: Floats, labels: Bools, entry: Mapping[str, Any], prefix: str) -> str:
    """Precision over recall and the ROC curve, with the policies, the controls and what others published.

    A published F1 without its precision and recall is no point of either plane but a curve, on which the point lies.

    Args:
        scores: ``[rows]``.
        labels: ``[rows]``; both classes occur.
        entry: the set's entry in ``results.json``.
        prefix: of the ids within the SVG, its own on the page.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.3), layout="constrained")
        plane, roc = figure.subplots(1, 2, width_ratios=[1.25, 1])
        recall, precision, average = precision_recall(scores, labels)
        plane.plot(*_thinned(recall, precision), color=_OURS, label=f"this guard, AUPRC {average:.3f}")
        plane.axhline(labels.mean(), color=_INK, linestyle=":", linewidth=0.8, label="chance")
        fpr, tpr, _ = roc_curve(labels, scores)
        roc.plot(*_thinned(fpr, tpr), color=_OURS)
        roc.plot([0, 1], [0, 1], color=_INK, linestyle=":", linewidth=0.8)
        for marker, (name, counts) in zip(_MARKERS, entry["confusion"].items(), strict=False):
            rates = _rates(counts)
            style: dict[str, Any] = {"marker": marker, "color": _OURS, "linestyle": "none", "markersize": 7}
            plane.plot(rates["recall"], rates["precision"], label=f"policy {name}", **style)
            roc.plot(rates["fpr"], rates["recall"], **style)
        for marker, control in zip(_MARKERS, entry["controls"], strict=False):
            theirs = {name: control["harmfulness"][name]["value"] for name in ("recall", "precision", "fpr")}
            style = {"marker": marker, "color": _UNHARMFUL, "linestyle": "none", "markersize": 6, "fillstyle": "none"}
            plane.plot(theirs["recall"], theirs["precision"], label=control["title"], **style)
            roc.plot(theirs["fpr"], theirs["recall"], **style)
        _equal_f1(plane, roc, [p for p in entry["published"] if p["metric"] == "f1"], float(labels.mean()))
        plane.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="Precision over recall")
        roc.set(xlabel="false-positive rate", ylabel="recall", xlim=(0, 1), ylim=(0, 1.02), title="ROC")
        figure.legend(loc="outside lower center", ncols=4)
        return _svg(figure, prefix)


def calibration(scores: Floats, uncalibrated: Floats, labels: Bools, thresholds: Sequence[float], prefix: str) -> str:
    """How often each score is right, before and after calibration, and how scores are distributed.

    Args:
        scores: ``[rows]``, what the guard reports.
        uncalibrated: ``[rows]``, before calibration.
        labels: ``[rows]``.
        thresholds: lines of the histogram.
        prefix: of the ids within the SVG.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        diagram, histogram = figure.subplots(1, 2)
        diagram.plot([0, 1], [0, 1], color=_INK, linestyle=":", linewidth=0.8)
        for values, name, style in ((uncalibrated, "before calibration", "--s"), (scores, "as reported", "-o")):
            mean, share, weight = reliability(values, labels)
            diagram.plot(mean, share, style, color=_OTHERS if style == "--s" else _OURS, label=name, markersize=3.5)
            if style == "-o":
                diagram.bar(mean, weight / weight.sum(), width=0.02, color=_OURS, alpha=0.25)
        diagram.set(xlabel="score", ylabel="share of harm", xlim=(0, 1), ylim=(0, 1.02), title="Reliability")
        diagram.legend(loc="upper left")
        bins = np.linspace(0, 1, 41)
        for value, name, colour in ((False, "unharmful", _UNHARMFUL), (True, "harmful", _HARMFUL)):
            histogram.hist(scores[labels == value], bins, color=colour, alpha=0.6, label=name)
        for threshold in thresholds:
            histogram.axvline(threshold, ymax=0.88, color=_INK, linewidth=1, linestyle="--")
        histogram.set(xlabel="score (dashed: thresholds)", ylabel="rows", xlim=(0, 1), title="Scores")
        histogram.set_ylim(top=1.15 * histogram.get_ylim()[1])  # room for the legend, above the lines
        histogram.legend(loc="upper right", ncols=2)
        return _svg(figure, prefix)


def category_bars(categories: Mapping[str, Mapping[str, Any]], prefix: str) -> str:
    """AUPRC of each category with its interval, over a mark at what chance gives.

    Args:
        categories: the set's ``categories`` in ``results.json``, those without AUPRC left out.
        prefix: of the ids within the SVG.
    """
    with rc_context(_STYLE):
        ordered = sorted(categories.items(), key=lambda item: item[1]["auprc"]["value"])
        figure = Figure(figsize=(9.6, 0.9 + 0.3 * len(ordered)), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(ordered))
        values = np.array([metrics["auprc"]["value"] for _, metrics in ordered])
        axes.barh(places, values, color=_OURS, alpha=0.75, xerr=_errors([m["auprc"] for _, m in ordered]), ecolor=_INK)
        chance = [metrics["positives"] / metrics["n"] for _, metrics in ordered]
        axes.plot(chance, places, "|", color=_HARMFUL, markersize=12, markeredgewidth=2, label="chance")
        axes.set_yticks(places, [f"{name} ({metrics['positives']:,})" for name, metrics in ordered])
        axes.set(xlabel="AUPRC (in brackets: positive rows)", xlim=(0, 1))
        axes.legend(loc="lower right")
        return _svg(figure, prefix)


def cost(guard: str, parameters: int, entry: Mapping[str, Any], prefix: str) -> str:
    """F1 over the parameters that are held in memory beside the chat model: measured filled, published hollow.

    Args:
        guard: the guard's name.
        parameters: its own.
        entry: the set's entry in ``results.json``.
        prefix: of the ids within the SVG.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        axes = figure.subplots()
        measured = [(guard, parameters, entry["harmfulness"]["f1"], _OURS)]
        sized = [control for control in entry["controls"] if control["parameters"]]
        measured += [(c["title"], c["parameters"], c["harmfulness"]["f1"], _UNHARMFUL) for c in sized]
        labels = []
        for name, size, f1, colour in measured:
            axes.errorbar(size, f1["value"], _errors([f1]), fmt="o", color=colour, capsize=3)
            labels.append((size, f1["value"], f"{name} (measured)"))
        for other in [p for p in entry["published"] if p["metric"] == "f1"]:
            axes.plot(other["parameters"], other["value"], "o", color=_OTHERS, fillstyle="none")
            labels.append((other["parameters"], other["value"], other["system"]))
        axes.set_xscale("log")
        low, high = min(size for size, _, _ in labels), max(size for size, _, _ in labels)
        axes.set(xlim=(low / 2, high * 40), xlabel="parameters beside the chat model", ylabel="F1")
        axes.margins(y=0.15)
        spots = _spread([value for _, value, _ in labels], 0.055 * float(np.ptp(axes.get_ylim())))
        for (size, value, name), spot in zip(labels, spots, strict=True):
            axes.annotate(name, (size, value), (size * 1.25, spot), va="center", fontsize=8)
        return _svg(figure, prefix)


def _equal_f1(plane: Axes, roc: Axes, figures: Sequence[Mapping[str, Any]], harmful: float) -> None:
    """The points of equal F1 of each published figure: a curve over recall, named beside the right edge, and a straight
    line over the false-positive rate, at a share ``harmful`` of the rows."""
    ends = [figure["value"] / (2 - figure["value"]) for figure in figures]
    for figure, end, spot in zip(figures, ends, _spread(ends, 0.05), strict=True):
        recall = np.linspace(end, 1, 100)
        value = figure["value"]
        plane.plot(recall, value * recall / (2 * recall - value), color=_OTHERS, linewidth=0.8)
        name = f"{figure['system']}, F1 {value:.3f}"
        plane.annotate(name, (1, end), (1.03, spot), va="center", fontsize=7, annotation_clip=False)
        # F1 = 2 TP / (2 TP + FP + FN), solved for the false-positive rate at each recall.
        rate = recall * (2 - value) / value - 1
        roc.plot(rate * harmful / (1 - harmful), recall, color=_OTHERS, linewidth=0.8)


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels at these values, moved upwards until no two are nearer than ``gap``."""
    places: dict[int, float] = {}
    last = -np.inf
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        last = places[index] = max(values[index], last + gap)
    return [places[index] for index in range(len(values))]


def _rates(counts: Mapping[str, int]) -> dict[str, float]:
    true, false = counts["true_positives"], counts["false_positives"]
    return {
        "recall": true / max(1, true + counts["false_negatives"]),
        "precision": true / max(1, true + false),
        "fpr": false / max(1, false + counts["true_negatives"]),
    }


def _errors(metrics: Sequence[Mapping[str, float | None]]) -> Floats:
    """The arms of error bars ``[2, metrics]``: none where no interval is, or where it misses the value."""
    values, lows, highs = (np.array([m[name] for m in metrics], dtype=float) for name in ("value", "low", "high"))
    return np.nan_to_num(np.maximum([values - lows, highs - values], 0))


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """A curve by at most so many of its points, its ends among them."""
    if len(x) <= _POINTS:
        return x, y
    chosen = np.unique(np.linspace(0, len(x) - 1, _POINTS).astype(int))
    return x[chosen], y[chosen]


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an ``svg`` element, its ids made the figure's own and its ink the page's."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
