"""The Markdown of an evaluation."""

from collections.abc import Mapping
from typing import Any

from lora_guard.evaluation.metrics import METRICS

_TITLES = {"auprc": "AUPRC", "auroc": "AUROC", "f1": "F1", "fpr": "FPR", "best_f1": "best F1", "ece": "ECE"}


def to_markdown(results: Mapping[str, Any]) -> str:
    """A table a data set, with 95 % intervals, and where the figures come from.

    Args:
        results: the contents of ``results.json``.
    """
    provenance = results["provenance"]
    lines = [f"# Evaluation of {provenance['guard']}", ""]
    lines += ["Thresholds are those saved with the guard; intervals are 95 %, by bootstrap over rows.", ""]
    for name, dataset in results["datasets"].items():
        titles = " | ".join(_TITLES.get(metric, metric) for metric in METRICS)
        lines += [f"## {name}", "", f"{dataset['n']:,} rows.", ""]
        lines += [f"| | n | positives | {titles} |", "|---|---|---|" + "---|" * len(METRICS)]
        if dataset["harmfulness"]:
            lines.append(_row("**harmfulness**", dataset["harmfulness"]))
        lines += [_row(category, metrics) for category, metrics in dataset["categories"].items()]
        lines.append("")
    lines += ["## Provenance", ""]
    lines += [f"- {name}: {value}" for name, value in _flat(provenance)]
    return "\n".join(lines) + "\n"


def _row(title: str, metrics: Mapping[str, Any]) -> str:
    cells = [title, f"{metrics['n']:,}", f"{metrics['positives']:,}", *(_figure(metrics[name]) for name in METRICS)]
    return f"| {' | '.join(cells)} |"


def _figure(metric: Mapping[str, float | None]) -> str:
    if metric["value"] is None:
        return "–"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return pairs
