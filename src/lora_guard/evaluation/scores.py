"""A guard's logits on a set, kept beside the results: an evaluation that was stopped does not score a row twice."""

import hashlib
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lora_guard import files
from lora_guard.evaluation.metrics import Bools, Floats
from lora_guard.evaluation.sets import EvalSet
from lora_guard.guard import Guard
from lora_guard.normalise import NORMALISE_VERSION
from lora_guard.progress import progress
from lora_guard.verdict import GuardLogits, sigmoid

# What decides a decision but not a logit: a guard may be calibrated anew, renamed or described without being rescored.
_WITHOUT_EFFECT_ON_LOGITS = {"format_version", "name", "calibration", "data", "licence", "metrics", "provenance"}

_ROWS_KEPT_AT_ONCE = 256
"""What is lost by a kill at most: minutes, of disguised rows up to twenty on a slow core. Batches are made within."""


@dataclass(frozen=True)
class Scored:
    """A set with what the guard made of it; all arrays are ``[rows, 1 + K]``, harmfulness first.

    ``uncalibrated`` is the sigmoid of the logits, ``scores`` what the guard reports; ``labels`` are nan where unknown.
    ``flagged`` is ``{policy: [rows]}``, of harmfulness.
    """

    data: EvalSet
    logits: Floats
    uncalibrated: Floats
    scores: Floats
    thresholds: Floats
    labels: Floats
    flagged: dict[str, Bools]


def score_set(guard: Guard, data: EvalSet, folder: Path) -> tuple[Scored, float | None]:
    """The guard's scores on a set, from ``folder`` if it holds them, else computed and kept there.

    Kept are logits and labels, never text, as far as the scoring has come. They are used again if the guard's weights,
    the base model and the set are the same by hash, and the program has the same version.

    Returns:
        The scores, and the rows a second; None where nothing was scored.

    Raises:
        ResourceError: the folder cannot be written, or no memory for a batch.
    """
    path = folder / f"{data.name.replace('/', '_')}.safetensors"
    metadata = {"key": _key(guard, data), "set": data.sha256}
    labels = np.array([example.labels(guard.taxonomy) for example in data.examples])
    logits = _kept(path, metadata["key"], labels.shape[1])
    before, began = len(logits), time.monotonic()
    if before < len(data.examples):
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with progress(f"score {data.name}", len(data.examples), done=before) as tick:
            for start in range(before, len(data.examples), _ROWS_KEPT_AT_ONCE):
                part = data.examples[start : start + _ROWS_KEPT_AT_ONCE]
                rows = guard.logits([example.conversation() for example in part], done=tick)
                logits = np.concatenate([logits, [[row.harmful, *row.categories] for row in rows]])
                files.write_bytes(path, save({"logits": logits, "labels": labels}, metadata))
    scored = len(logits) - before
    rate = round(scored / (time.monotonic() - began), 2) if scored else None
    return _decided(guard, data, logits, labels), rate


def _decided(guard: Guard, data: EvalSet, logits: Floats, labels: Floats) -> Scored:
    scores, thresholds = np.empty_like(logits), np.empty_like(logits)
    for row, example in enumerate(data.examples):
        verdict = guard.verdict(GuardLogits(logits[row, 0], tuple(logits[row, 1:])), example.target)
        scores[row] = [verdict.score, *(decision.score for decision in verdict.categories.values())]
        thresholds[row] = [verdict.threshold, *(decision.threshold for decision in verdict.categories.values())]
    heads = [guard.spec.calibration.of(example.target).harmful for example in data.examples]
    flagged = {
        policy: scores[:, 0] >= np.array([head.thresholds[policy] for head in heads])
        for policy in guard.spec.calibration.policies
    }
    return Scored(data, logits, np.vectorize(sigmoid)(logits), scores, thresholds, labels, flagged)


def _key(guard: Guard, data: EvalSet) -> str:
    """A hash of all that decides the logits of a set."""
    spec = guard.spec.model_dump(mode="json", exclude=_WITHOUT_EFFECT_ON_LOGITS)
    program = [version("lora-guard"), NORMALISE_VERSION]
    deciding = [spec, guard.base_fingerprint, data.sha256, len(data.examples), *program]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _kept(path: Path, key: str, heads: int) -> Floats:
    """The logits of a former evaluation, of its first rows if it was stopped; none of another guard or other data."""
    nothing: Floats = np.empty((0, heads))
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("key") != key:
                return nothing
            logits: Floats = file.get_tensor("logits")
            return logits
    except (FileNotFoundError, SafetensorError):  # none yet, or not whole: it is scored
        return nothing
