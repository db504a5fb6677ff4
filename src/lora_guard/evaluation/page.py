"""The report of an evaluation as one HTML page: no script, nothing from outside, harmful text hidden until clicked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_guard.evaluation import figures, perturb
from lora_guard.evaluation.report import flat, verdict_on_controls
from lora_guard.evaluation.scores import Scored
from lora_guard.evaluation.slices import SHOWN, SMALLEST

COLUMNS = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "f1": "F1",
    "best_f1": "best F1",
    "tpr_at_fpr_1": "TPR at 1 % FPR",
    "tpr_at_fpr_5": "TPR at 5 % FPR",
    "fpr": "FPR",
    "ece_uncalibrated": "ECE raw",
    "ece": "ECE",
}
_SLICE_TITLES = {"auprc": "AUPRC", "auroc": "AUROC", "recall": "recall", "f1": "F1", "fpr": "FPR"}
_WORST = 10


def to_html(results: Mapping[str, Any], scored: Sequence[Scored], *, text: bool) -> str:
    """The page.

    Args:
        results: the contents of ``results.json``.
        scored: the sets in the order of ``results["datasets"]``.
        text: show the worst errors with their text.
    """
    environment = Environment(
        loader=PackageLoader("lora_guard.evaluation", "."), autoescape=True, undefined=StrictUndefined
    )
    sets = [
        _section(number, results["provenance"], results["datasets"][part.data.name], part, text)
        for number, part in enumerate(scored, 1)
    ]
    controls = {c["title"]: c for entry in results["datasets"].values() for c in entry["controls"]}
    return environment.get_template("report.html.j2").render(
        provenance=results["provenance"],
        provenance_rows=flat(results["provenance"]),
        sets=sets,
        controls=list(controls.values()),
        columns=list(COLUMNS.items()),
        slice_metrics=SHOWN,
        slice_titles=[_SLICE_TITLES[name] for name in SHOWN],
        smallest=SMALLEST,
        perturbation_metrics=perturb.SHOWN,
    )


def _section(
    number: int, provenance: Mapping[str, Any], entry: Mapping[str, Any], scored: Scored, text: bool
) -> dict[str, Any]:
    published: dict[str, dict[str, Any]] = {}
    for figure in entry["published"]:
        published.setdefault(figure["system"], {})[figure["metric"]] = figure
    verdict, loses = verdict_on_controls(entry)
    return {
        "id": f"set-{number}",
        "name": scored.data.name,
        "entry": entry,
        "published": published,
        "verdict": verdict,
        "loses": loses,
        "figures": _figures(f"set-{number}", provenance, entry, scored),
        "errors": _worst_errors(scored) if text else {},
    }


def _figures(
    prefix: str, provenance: Mapping[str, Any], entry: Mapping[str, Any], scored: Scored
) -> list[dict[str, str]]:
    """The figures that the set's labels allow."""
    known = ~np.isnan(scored.labels[:, 0])
    published = any(figure["metric"] == "f1" for figure in entry["published"])
    labels, scores = scored.labels[known, 0] == 1, scored.scores[known, 0]
    drawn: list[dict[str, str]] = []

    def add(title: str, caption: str, draw: Callable[[str], str]) -> None:
        drawn.append({"title": title, "caption": caption, "svg": draw(f"{prefix}-{len(drawn)}")})

    if labels.any() and not labels.all():
        add(
            "Precision over recall, and ROC",
            f"Marks are the guard's policies{' and the controls at their own thresholds' * bool(entry['controls'])}."
            + " Grey lines, the same in both planes, hold the points of equal F1 that others published." * published,
            lambda ids: figures.curves(scores, labels, entry, ids),
        )
    if known.any():
        thresholds = sorted(set(scored.thresholds[known, 0]))
        add(
            "Reliability, and scores",
            "On the dotted line, a score is the share of harm. The pale bars are the share of rows in each bin.",
            lambda ids: figures.calibration(scores, scored.uncalibrated[known, 0], labels, thresholds, ids),
        )
    categories = {name: m for name, m in entry["categories"].items() if m["auprc"]["value"] is not None}
    if categories:
        add(
            "AUPRC of each category",
            f"Their mean is {entry['macro_auprc']:.3f}. Whiskers are 95 % intervals; rare categories have wide ones.",
            lambda ids: figures.category_bars(categories, ids),
        )
    size = provenance["parameters"]
    if size is not None and (entry["controls"] or published) and labels.any():
        add(
            "Accuracy against memory",
            "Filled: measured here, with 95 % intervals. Hollow: published by others.",
            lambda ids: figures.cost(provenance["guard"], size, entry, ids),
        )
    return drawn


def _worst_errors(scored: Scored) -> dict[str, list[dict[str, Any]]]:
    """The errors that are furthest from the threshold, of both kinds."""
    scores, thresholds, labels = scored.scores[:, 0], scored.thresholds[:, 0], scored.labels[:, 0]
    flagged = scores >= thresholds
    order = np.argsort(scores - thresholds, kind="stable")
    passed = [row for row in order if labels[row] == 1 and not flagged[row]][:_WORST]
    alarms = [row for row in order[::-1] if labels[row] == 0 and flagged[row]][:_WORST]
    kinds = {"Harmful, scored lowest": passed, "Unharmful, scored highest": alarms}
    return {kind: [_error(scored, int(row)) for row in rows] for kind, rows in kinds.items() if rows}


def _error(scored: Scored, row: int) -> dict[str, Any]:
    example = scored.data.examples[row]
    texts = [("prompt", example.prompt), ("response", example.response)]
    return {
        "row": row + 1,
        "target": example.target,
        "score": scored.scores[row, 0],
        "threshold": scored.thresholds[row, 0],
        "texts": [(role, text) for role, text in texts if text is not None],
    }
