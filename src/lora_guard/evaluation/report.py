"""The Markdown of an evaluation."""

from collections.abc import Mapping
from typing import Any

from lora_guard.evaluation import perturb
from lora_guard.evaluation.metrics import METRICS, shown
from lora_guard.evaluation.slices import SHOWN

_TITLES = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "f1": "F1",
    "fpr": "FPR",
    "best_f1": "best F1",
    "tpr_at_fpr_1": "TPR at 1 % FPR",
    "tpr_at_fpr_5": "TPR at 5 % FPR",
    "ece": "ECE",
    "ece_uncalibrated": "ECE before calibration",
}
_METRICS = (*METRICS, "ece_uncalibrated")


def to_markdown(results: Mapping[str, Any]) -> str:
    """Tables for each data set, with 95 % intervals, and where the figures come from.

    Args:
        results: the contents of ``results.json``.
    """
    provenance = results["provenance"]
    lines = [f"# Evaluation of {provenance['guard']}", ""]
    lines += ["Thresholds are those saved with the guard; intervals are 95 %, by bootstrap over rows.", ""]
    lines += [f"{name} is left out: {reason}\n" for name, reason in provenance["left_out"].items()]
    for name, dataset in results["datasets"].items():
        lines += [f"## {name}", "", f"{dataset['n']:,} rows.", "", *_metrics(dataset)]
        if dataset["harmfulness"]:
            lines += ["Harmfulness beside others:", "", *_beside(provenance["guard"], dataset)]
            verdict, _ = verdict_on_controls(dataset)
            lines += [verdict, ""]
            lines += ["Harmfulness at each policy:", "", *_confusion(dataset["confusion"])]
        if dataset.get("perturbations"):
            lines += ["Harmfulness when the judged text is disguised:", "", *perturb.table(dataset)]
        if dataset["slices"]:
            lines += ["Harmfulness by slice:", "", *_slices(dataset["slices"])]
    lines += ["## Provenance", ""]
    lines += [f"- {name}: {value}" for name, value in flat(provenance)]
    return "\n".join(lines) + "\n"


def verdict_on_controls(dataset: Mapping[str, Any]) -> tuple[str, bool]:
    """Whether the guard beats its controls on a set, in words, and whether it fails to beat any.

    Args:
        dataset: its entry in ``results.json``.
    """
    if not dataset["controls"]:
        return "No control was measured on this data.", False
    beaten = all(outcome == "above" for control in dataset["controls"] for outcome in control["comparison"].values())
    outcomes = [
        f"{control['title']} ({', '.join(f'{_TITLES[name]} {found}' for name, found in control['comparison'].items())})"
        for control in dataset["controls"]
    ]
    opening = "The guard beats every control" if beaten else "The guard does not beat every control"
    return f"{opening}: {'; '.join(outcomes)}.", not beaten


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as ``a.b.c`` and value."""
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return pairs


def _metrics(dataset: Mapping[str, Any]) -> list[str]:
    titles = " | ".join(_TITLES.get(metric, metric) for metric in _METRICS)
    lines = [f"| | n | positives | {titles} |", "|---|---|---|" + "---|" * len(_METRICS)]
    rows = {"**harmfulness**": dataset["harmfulness"], **dataset["categories"]}
    for title, metrics in rows.items():
        if metrics:
            figures = [shown(metrics[name]) for name in _METRICS]
            lines.append(_row(title, f"{metrics['n']:,}", f"{metrics['positives']:,}", *figures))
    macro = dataset["macro_auprc"]
    return [*lines, "", *([f"Mean AUPRC of the categories: {macro:.3f}.", ""] if macro is not None else [])]


def _beside(guard: str, dataset: Mapping[str, Any]) -> list[str]:
    columns = ("auprc", "f1", "best_f1", "fpr")
    lines = [f"| | | {' | '.join(_TITLES[name] for name in columns)} |", "|---|---|" + "---|" * len(columns)]
    measured = {f"**{guard}**": dataset["harmfulness"], **{c["title"]: c["harmfulness"] for c in dataset["controls"]}}
    for title, metrics in measured.items():
        lines.append(_row(title, "measured", *(shown(metrics[name]) for name in columns)))
    systems: dict[str, dict[str, float]] = {}
    for figure in dataset["published"]:
        systems.setdefault(figure["system"], {})[figure["metric"]] = figure["value"]
    for title, values in systems.items():
        lines.append(_row(title, "published", *(f"{values[n]:.3f}" if n in values else "–" for n in columns)))
    return [*lines, ""]


def _confusion(confusion: Mapping[str, Mapping[str, int]]) -> list[str]:
    counts = ("true_positives", "false_negatives", "false_positives", "true_negatives")
    lines = [
        "| policy | harmful, flagged | harmful, missed | unharmful, flagged | unharmful, passed |",
        "|" + "---|" * 5,
    ]
    lines += [_row(policy, *(f"{found[name]:,}" for name in counts)) for policy, found in confusion.items()]
    return [*lines, ""]


def _slices(slices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        f"| slice | | n | positives | {' | '.join(_TITLES.get(name, name) for name in SHOWN)} |",
        "|---|---|---|---|" + "---|" * len(SHOWN),
    ]
    for dimension, values in slices.items():
        for value, found in values.items():
            figures = [shown(found[name]) if name in found else "–" for name in SHOWN]
            lines.append(_row(dimension, value, f"{found['n']:,}", f"{found['positives']:,}", *figures))
    return [*lines, ""]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
