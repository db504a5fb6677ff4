"""What every bench is given: the guard's name, where rows come from, and until when it may run."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from lora_guard import artifact, base_model
from lora_guard.artifact import GuardSpec
from lora_guard.base_model import BaseModel
from lora_guard.bench.rows import BenchRows, read_rows
from lora_guard.guard import Guard, find

SECONDS = 540.0
"""What a bench plans to take, so that it ends within ten minutes on two cores."""


@dataclass(frozen=True)
class Setup:
    """``rows`` is the number of rows, each bench's own when None; ``deadline`` is on the monotonic clock."""

    guard: str = "default"
    data: Path | None = None
    rows: int | None = None
    seed: int = 0
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    @property
    def folder(self) -> Path:
        """The guard's folder.

        Raises:
            ArtifactError: there is none.
        """
        return find(self.guard)

    @property
    def spec(self) -> GuardSpec:
        return artifact.read_spec(self.folder)

    def load_guard(self, *, bulk: bool = False) -> Guard:
        return Guard.load(self.guard, bulk=bulk)

    def load_base(self) -> BaseModel:
        """Another copy of the guard's chat model, untouched, of the same dtype and on the same device."""
        reference = self.spec.base
        base = base_model.load(reference.name, revision=reference.revision)
        base.model.to(base_model.device())  # type: ignore[arg-type]
        return base

    def read_rows(self, file: str, count: int) -> BenchRows:
        """The rows of one of the data folder's files, ``count`` of them unless the caller asked for another number."""
        return read_rows(self.data, file, self.rows or count, self.seed)


def dtype_of(base: BaseModel) -> str:
    """The dtype of a model's weights by torch's name for it."""
    return str(next(base.model.parameters()).dtype).removeprefix("torch.")
