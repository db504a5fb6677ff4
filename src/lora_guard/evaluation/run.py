"""Evaluates a guard on files of labelled rows: scores, metrics with intervals, and where they come from."""

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lora_guard import files
from lora_guard.data.sources import read_file
from lora_guard.errors import ConfigError
from lora_guard.evaluation.metrics import evaluate
from lora_guard.evaluation.plots import pr_curves
from lora_guard.evaluation.report import to_markdown
from lora_guard.guard import Guard
from lora_guard.progress import progress


def evaluate_files(guard: Guard, paths: Sequence[Path], out: Path, *, resamples: int = 1000, seed: int = 0) -> str:
    """Evaluate each file and write ``results.json``, ``results.md`` and ``pr.png`` to ``out``, anew after each file.

    Args:
        guard: the saved thresholds of its policy are those of the metrics.
        paths: labelled rows; a file's stem names it in the results.
        out: created if need be.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The Markdown.

    Raises:
        ConfigError: two files of one name.
        DataError: a missing, empty or bad file.
        ResourceError: ``out`` cannot be written.
    """
    names = [path.stem for path in paths]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ConfigError(f"two files are called {sorted(repeated)[0]!r}; allowed: different names")
    examples = [read_file(path, guard.taxonomy) for path in paths]  # every file is checked before the first is scored
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"datasets": {}, "provenance": _provenance(guard, paths, resamples, seed)}
    curves = {}
    for name, rows in zip(names, examples, strict=True):
        began = time.monotonic()
        with progress(f"score {name}", len(rows)) as tick:
            verdicts = guard.moderate([row.conversation() for row in rows], done=tick)
        seconds = time.monotonic() - began
        scores = np.array([[v.score, *(c.score for c in v.categories.values())] for v in verdicts])
        thresholds = np.array([[v.threshold, *(c.threshold for c in v.categories.values())] for v in verdicts])
        labels = np.array([row.labels(guard.taxonomy) for row in rows])
        results["datasets"][name] = evaluate(
            scores, labels, thresholds, guard.taxonomy.categories, resamples=resamples, seed=seed
        )
        results["provenance"]["rows_per_second"][name] = round(len(rows) / seconds, 2)
        known = ~np.isnan(labels[:, 0])
        curves[name] = (scores[known, 0], labels[known, 0] == 1)
        files.write_json(out / "results.json", results)
        files.write_text(out / "results.md", to_markdown(results))
        pr_curves(curves, out / "pr.png", f"Harmfulness, {guard.spec.name}")
    return to_markdown(results)


def _provenance(guard: Guard, paths: Sequence[Path], resamples: int, seed: int) -> dict[str, Any]:
    return {
        "guard": guard.spec.name,
        "policy": guard.policy,
        "guard_files": dict(guard.spec.files),
        "base": guard.spec.base.model_dump(mode="json"),
        "data": {path.stem: {"file": path.name, "sha256": files.sha256(path)} for path in paths},
        "bootstrap": {"resamples": resamples, "seed": seed, "interval": 0.95},
        "rows_per_second": {},
        "python": platform.python_version(),
        **{name: version(name) for name in ("lora-guard", "torch", "transformers")},
    }
