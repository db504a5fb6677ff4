"""The plots of a run and of an evaluation, as PNG files."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lora_guard import files
from lora_guard.evaluation.metrics import Bools, Floats, precision_recall


def loss_curves(steps: Sequence[Mapping[str, float]], path: Path) -> None:
    """The losses of a run, each step thin and smoothed thick, above the learning rate.

    Args:
        steps: the records of ``steps.jsonl``.
        path: of the PNG.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x = [record["step"] for record in steps]
    for name, label in (("loss", "total"), ("harmful_loss", "harmfulness"), ("category_loss", "categories")):
        y = np.array([record[name] for record in steps])
        (line,) = losses.plot(x, _smooth(y), linewidth=1.8, label=label)
        losses.plot(x, y, linewidth=0.5, alpha=0.3, color=line.get_color())
    losses.set_ylabel("loss")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False)
    rates.plot(x, [record["learning_rate"] for record in steps], color="black", linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    _save(figure, path)


def pr_curves(curves: Mapping[str, tuple[Floats, Bools]], path: Path, title: str) -> None:
    """A precision-recall curve a data set; the dashed line is what chance gives, the share of harm.

    Args:
        curves: name -> scores and labels; a set without both harmful and unharmful rows is left out.
        path: of the PNG.
        title: of the plot.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, (scores, labels) in curves.items():
        if labels.any() and not labels.all():
            recall, precision, average = precision_recall(scores, labels)
            (line,) = axes.plot(recall, precision, linewidth=1.5, label=f"{name}: AUPRC {average:.3f}")
            axes.axhline(labels.mean(), color=line.get_color(), linestyle="--", linewidth=0.7)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    if axes.lines:
        axes.legend(frameon=False, loc="lower left")
    _save(figure, path)


def _smooth(values: Floats) -> Floats:
    """A running mean over a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    smoothed: Floats = np.convolve(padded, np.ones(width) / width, mode="valid")
    return smoothed


def _save(figure: Figure, path: Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    files.write_bytes(path, buffer.getvalue())
