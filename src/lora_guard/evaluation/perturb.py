"""Measures robustness: how far a guard's AUPRC falls when the judged texts are disguised."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_guard.conversation import Conversation
from lora_guard.data.example import Example
from lora_guard.data.perturbation import Perturbation, perturbations
from lora_guard.evaluation.metrics import auprc_drop, shown, with_intervals
from lora_guard.evaluation.scores import Scored, score_set
from lora_guard.evaluation.sets import EvalSet, hash_of
from lora_guard.guard import Guard

GOAL = 0.05
"""AUPRC may fall by at most this under a change of characters. The other changes have no goal."""

SHOWN = {"auprc": "AUPRC", "recall": "recall", "f1": "F1", "fpr": "FPR"}
"""The metrics of a table of perturbations, with their titles."""


def measure(guard: Guard, clean: Scored, folder: Path, *, resamples: int, seed: int) -> dict[str, Any]:
    """What a set's entry in ``results.json`` holds under ``perturbations``.

    The judged message of each row is changed, the response where there is one; the same text is always changed in the
    same way. Logits are kept beside the set's own, so that an evaluation that was stopped goes on where it was.

    Args:
        guard: the one that gave the scores.
        clean: the set as it is.
        folder: where logits are kept.
        resamples: of the bootstrap; the drop's draws the same rows from both scorings.
        seed: of the bootstrap.

    Returns:
        ``{NAME: {"character_level", "auprc", "recall", "f1", "fpr", "drop", "goal", "met"}}``, the metrics as
        ``{"value", "low", "high"}``, of harmfulness at the saved threshold; goal and met are None without a goal. Empty
        without harmful rows.

    Raises:
        ResourceError: the folder cannot be written, or no memory for a batch.
    """
    known = ~np.isnan(clean.labels[:, 0])
    labels = clean.labels[known, 0] == 1
    if not labels.any():
        return {}
    found: dict[str, Any] = {}
    for change in perturbations(_turn(guard)):
        scored, _ = score_set(guard, _changed(clean.data, change), folder)
        scores, thresholds = scored.scores[known, 0], scored.thresholds[known, 0]
        metrics = with_intervals(scores, labels, thresholds, resamples=resamples, seed=seed)
        drop = auprc_drop(clean.scores[known, 0], scores, labels, resamples=resamples, seed=seed)
        found[change.name] = {
            "character_level": change.character_level,
            **{name: metrics[name] for name in SHOWN},
            "drop": drop,
            "goal": GOAL if change.character_level else None,
            "met": drop["value"] <= GOAL if change.character_level and drop["value"] is not None else None,
        }
    return found


def table(dataset: Mapping[str, Any]) -> list[str]:
    """The lines of a Markdown table of a set's perturbations, below the set as it is.

    Args:
        dataset: the set's entry in ``results.json``.
    """
    lines = [
        f"| perturbation | {' | '.join(SHOWN.values())} | drop of AUPRC | goal |",
        "|---|" + "---|" * (len(SHOWN) + 2),
        f"| none | {' | '.join(shown(dataset['harmfulness'][name]) for name in SHOWN)} | – | – |",
    ]
    for name, entry in dataset["perturbations"].items():
        goal = "–" if entry["goal"] is None else f"≤ {entry['goal']}, {'met' if entry['met'] else 'NOT MET'}"
        lines.append(f"| {name} | {' | '.join(shown(entry[key]) for key in (*SHOWN, 'drop'))} | {goal} |")
    return [*lines, ""]


def _changed(data: EvalSet, change: Perturbation) -> EvalSet:
    examples = [_judged_text_changed(example, change) for example in data.examples]
    return EvalSet(f"{data.name}+{change.name}", data.place, hash_of(examples), examples)


def _judged_text_changed(example: Example, change: Perturbation) -> Example:
    if example.response is None:
        return replace(example, prompt=change.fixed(example.prompt))
    return replace(example, response=change.fixed(example.response))


def _turn(guard: Guard) -> str:
    """What the base model's template writes between a user's message and the answer."""
    last = guard.engine.renderer.segments(Conversation.of(""), generation_prompt=True)[-1]
    return last.text if last.is_control else "\n"
