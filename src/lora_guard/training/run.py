"""A run: the objects it consists of and the folder it writes."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_guard import files
from lora_guard.artifact import GuardSpec
from lora_guard.base_model import BaseModel
from lora_guard.config import TrainConfig
from lora_guard.errors import ConfigError
from lora_guard.model import GuardModel
from lora_guard.taxonomy import Taxonomy
from lora_guard.training.prefix_cache import PrefixCache
from lora_guard.training.rows import RunRows

# What a resumed run may change: nothing of it moves the weights.
_FREE_TO_CHANGE = {
    "processes",
    "prefix_cache",
    "log_with",
    "state_every",
    "eval_rows",
    "name",
    "licence",
    "licence_file",
}


class RunFolder:
    """What a run writes, as it runs:

    ``config.yaml`` (resolved), ``parameters.json`` (counts), ``splits.json`` (row indices and what was dropped),
    ``validation.jsonl`` (the held-out rows, for ``lora-guard calibrate``), ``steps.jsonl`` (a line a step),
    ``metrics.jsonl`` (a line an epoch and set), ``logits/`` (logits and targets, a file an epoch and set),
    ``checkpoints/epoch-N/`` (a complete guard each), ``state/`` (to resume from), ``loss.png``, ``pr.png``, and at the
    end ``guard/``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = path / "steps.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.guard = path / "guard"

    @classmethod
    def open(cls, path: Path, config: TrainConfig, *, resume: bool, main: bool) -> Self:
        """Begin in an empty folder, or resume in one whose config is the same.

        Raises:
            ConfigError: the folder holds something else.
        """
        saved = path / "config.yaml"
        if main and resume and saved.is_file():
            before = TrainConfig.load(saved)
            names = TrainConfig.model_fields.keys() - _FREE_TO_CHANGE
            differing = sorted(name for name in names if getattr(before, name) != getattr(config, name))
            if differing:
                raise ConfigError(f"{path} was begun with another {differing[0]!r}; allowed: its own config.yaml")
        elif main:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(f"{path} is not empty; allowed: a new folder, or --resume for a run begun there")
            with files.writing(path):
                path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    def write_setup(self, config: TrainConfig, rows: RunRows, counts: dict[str, int]) -> None:
        """Write what is known before the first step; until then a mistaken call leaves the folder empty."""
        if not (self.path / "config.yaml").is_file():
            files.write_text(self.path / "config.yaml", config.to_yaml())
        files.write_json(self.path / "parameters.json", counts)
        files.write_json(self.path / "splits.json", {**rows.splits, "used": rows.used, "counts": rows.summary})
        held_out = (json.dumps(example.row(), ensure_ascii=False) for example in rows.held_out)
        files.write_text(self.path / "validation.jsonl", "".join(f"{line}\n" for line in held_out))

    def log_step(self, record: dict[str, float]) -> None:
        """Append a line to ``steps.jsonl``."""
        files.append_text(self.steps, json.dumps(record) + "\n")

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        files.append_text(self.metrics, json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run does again."""
        _keep(self.steps, lambda record: record["step"] <= step)

    def forget_epoch(self, epoch: int) -> None:
        """Drop an epoch's metrics: it is evaluated again."""
        _keep(self.metrics, lambda record: record["epoch"] < epoch)

    def has_epoch(self, epoch: int) -> bool:
        """Whether an epoch's evaluation and checkpoint are complete."""
        return any(record["epoch"] == epoch and record.get("complete") for record in read_records(self.metrics))

    def validation_auprc(self, epoch: int) -> float:
        """Of harmfulness after an epoch; minus infinity where it is undefined."""
        for record in read_records(self.metrics):
            if record["epoch"] == epoch and record.get("set") == "validation":
                return float(record["harmfulness"].get("auprc") or -math.inf)
        return -math.inf

    def checkpoint(self, epoch: int) -> Path:
        """Where an epoch's guard is written."""
        return self.path / "checkpoints" / f"epoch-{epoch}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file, none if there is no file; a last line that a kill cut short is left out."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _keep(path: Path, condition: Callable[[dict[str, Any]], bool]) -> None:
    if path.is_file():
        kept = [record for record in read_records(path) if condition(record)]
        files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


@dataclass(frozen=True)
class Run:
    """What every part of a run needs.

    ``wrapped`` is ``model`` as accelerate distributes it, ``before`` the guard it began with.
    """

    config: TrainConfig
    before: GuardSpec | None
    folder: RunFolder
    accelerator: Accelerator
    base: BaseModel
    taxonomy: Taxonomy
    invocation: str
    rows: RunRows
    model: GuardModel
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    pos_weight: Tensor
    prefixes: PrefixCache | None
