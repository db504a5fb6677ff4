"""Evaluates a guard on sets of labelled rows: scores, metrics with intervals, slices, comparisons, and the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_guard import files
from lora_guard.evaluation import perturb
from lora_guard.evaluation.metrics import evaluate
from lora_guard.evaluation.page import to_html
from lora_guard.evaluation.plots import pr_curves
from lora_guard.evaluation.provenance import provenance
from lora_guard.evaluation.references import Control, control_from_results, measured, published, shipped_controls
from lora_guard.evaluation.report import to_markdown
from lora_guard.evaluation.scores import Scored, score_set
from lora_guard.evaluation.sets import read_sets
from lora_guard.evaluation.slices import slices
from lora_guard.guard import Guard


@dataclass(frozen=True)
class EvalSettings:
    """How an evaluation is done."""

    resamples: int = 1000
    """Of the bootstrap behind each interval."""
    seed: int = 0
    """Of the bootstrap."""
    text: bool = True
    """Put the text of the worst errors into the report."""
    perturb: bool = False
    """Score each set again under each perturbation."""
    controls: Sequence[Path] = ()
    """Folders with results of other guards, shown as controls beside those that ship with the program."""
    command: str = "lora_guard.evaluation.run.evaluate_sets"
    """What began the evaluation, for the record."""


def evaluate_sets(
    guard: Guard, data: Sequence[str], suite: str | None, out: Path, settings: EvalSettings
) -> tuple[str, dict[str, str]]:
    """Evaluate each set and write ``results.json``, ``results.md``, ``report.html`` and ``pr.png``, anew after each.

    A set whose logits are in ``out/scores`` already, of the same guard, base model and data, is not scored again.

    Args:
        guard: its saved thresholds are those of the metrics.
        data: files with labelled rows, or ``hub:NAME``; a file's stem names it in the results.
        suite: a folder of such files, or ``public``.
        out: created if need be.
        settings: how it is done.

    Returns:
        The Markdown, and of each public set of the suite that could not be loaded the reason.

    Raises:
        ConfigError: no set, or two of one name.
        DataError: a missing, empty, unlabelled or bad file, no public set that can be loaded, or results that are none.
        ResourceError: ``out`` cannot be written.
    """
    sets, left_out = read_sets(data, suite, guard.taxonomy)
    controls = [*shipped_controls(guard.spec.name), *(control_from_results(folder) for folder in settings.controls)]
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    read_from = {
        part.name: {"file": part.place, "sha256": part.sha256, **({"note": part.note} if part.note else {})}
        for part in sets
    }
    bootstrap = {"resamples": settings.resamples, "seed": settings.seed, "interval": 0.95}
    results: dict[str, Any] = {
        "datasets": {},
        "provenance": provenance(guard, read_from, settings.command, bootstrap=bootstrap, left_out=left_out),
    }
    done: list[Scored] = []
    for part in sets:
        scored, rate = score_set(guard, part, out / "scores")
        done.append(scored)
        entry = _entry(scored, guard.taxonomy.categories, controls, settings)
        if settings.perturb:
            resampling = {"resamples": settings.resamples, "seed": settings.seed}
            entry["perturbations"] = perturb.measure(guard, scored, out / "scores", **resampling)
        results["datasets"][part.name] = entry
        results["provenance"]["rows_per_second"][part.name] = rate
        _write(results, done, out, settings.text)
    return to_markdown(results), left_out


def _entry(
    scored: Scored, categories: tuple[str, ...], controls: Sequence[Control], settings: EvalSettings
) -> dict[str, Any]:
    """A set's entry in ``results.json``."""
    resampling: dict[str, int] = {"resamples": settings.resamples, "seed": settings.seed}
    entry = evaluate(
        scored.scores, scored.labels, scored.thresholds, categories, uncalibrated=scored.uncalibrated, **resampling
    )
    harmfulness = entry["harmfulness"]
    return {
        **entry,
        "slices": slices(scored, categories, **resampling),
        "confusion": _confusion(scored) if harmfulness else {},
        "controls": measured(controls, scored.data.sha256, harmfulness) if harmfulness else [],
        "published": [figure.model_dump() for figure in published(scored.data.name)],
    }


def _confusion(scored: Scored) -> dict[str, dict[str, int]]:
    """``{policy: counts}`` of harmfulness."""
    harmful, harmless = scored.labels[:, 0] == 1, scored.labels[:, 0] == 0
    return {
        policy: {
            "true_positives": int((flagged & harmful).sum()),
            "false_negatives": int((~flagged & harmful).sum()),
            "false_positives": int((flagged & harmless).sum()),
            "true_negatives": int((~flagged & harmless).sum()),
        }
        for policy, flagged in scored.flagged.items()
    }


def _write(results: dict[str, Any], done: Sequence[Scored], out: Path, text: bool) -> None:
    files.write_json(out / "results.json", results)
    files.write_text(out / "results.md", to_markdown(results))
    files.write_text(out / "report.html", to_html(results, done, text=text))
    curves = {}
    for scored in done:
        known = ~np.isnan(scored.labels[:, 0])
        curves[scored.data.name] = (scored.scores[known, 0], scored.labels[known, 0] == 1)
    pr_curves(curves, out / "pr.png", f"Harmfulness, {results['provenance']['guard']}")
