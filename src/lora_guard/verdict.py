"""From a guard's logits to what a user gets: scores, thresholds, flags."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from lora_guard.conversation import Target


class GuardLogits(NamedTuple):
    """One judged target: the harmfulness logit, a logit a category, and how many windows the text was judged in."""

    harmful: float
    categories: tuple[float, ...]
    windows: int = 1

    @classmethod
    def highest(cls, rows: Sequence[Sequence[float]]) -> Self:
        """The element-wise highest of the windows' logits, each row ``[1 + K]`` with harmfulness first."""
        harmful, *categories = (max(column) for column in zip(*rows, strict=True))
        return cls(harmful, tuple(categories), len(rows))

    def or_higher(self, other: "GuardLogits") -> "GuardLogits":
        """Element-wise the higher of two judgements of one text; ``windows`` stay those of this one."""
        categories = tuple(map(max, self.categories, other.categories))
        return self._replace(harmful=max(self.harmful, other.harmful), categories=categories)


class Decision(NamedTuple):
    """A score in [0, 1], the threshold it is held against, and whether it reaches it."""

    flagged: bool
    score: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a guard says of one target. ``flagged`` is harmfulness alone; each category has a flag of its own."""

    flagged: bool
    score: float
    threshold: float
    target: Target
    categories: Mapping[str, Decision]
    windows: int = 1
    """Over 1: the text was longer than the guard's window and was judged in this many, the highest scores counting."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``windows`` is present only when there were several."""
        form: dict[str, Any] = {
            "flagged": self.flagged,
            "score": self.score,
            "threshold": self.threshold,
            "target": self.target,
            "categories": {name: decision._asdict() for name, decision in self.categories.items()},
        }
        return form if self.windows == 1 else {**form, "windows": self.windows}


class Calibrator(BaseModel):
    """Turns one logit into a decision: ``sigmoid(logit / temperature) >= threshold``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    threshold: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)

    def decide(self, logit: float) -> Decision:
        """The decision on one logit."""
        score = sigmoid(logit / self.temperature)
        return Decision(score >= self.threshold, score, self.threshold)


class Calibration(BaseModel):
    """The temperatures and thresholds saved with a guard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    harmful: Calibrator
    categories: dict[str, Calibrator]

    def verdict(self, logits: GuardLogits, target: Target) -> Verdict:
        """Decide on harmfulness and on each category."""
        pairs = zip(self.categories.items(), logits.categories, strict=True)
        return Verdict(
            *self.harmful.decide(logits.harmful),
            target=target,
            categories={name: calibrator.decide(logit) for (name, calibrator), logit in pairs},
            windows=logits.windows,
        )


def sigmoid(logit: float) -> float:
    """The logistic function, without overflow for large negative logits."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1 + power)
