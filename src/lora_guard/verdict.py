"""From a guard's logits to what a user gets: scores, thresholds, flags."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_guard.conversation import Target
from lora_guard.errors import ConfigError, GuardError, allowed

_HIGHEST = math.nextafter(1.0, 0.0)
"""The highest score, so that threshold 1 flags nothing."""


class GuardLogits(NamedTuple):
    """One judged target: the harmfulness logit, a logit a category, and how many windows the text was judged in."""

    harmful: float
    categories: tuple[float, ...]
    windows: int = 1

    @classmethod
    def highest(cls, rows: Sequence[Sequence[float]]) -> Self:
        """The element-wise highest of the windows' logits, each row ``[1 + K]`` with harmfulness first.

        Raises:
            GuardError: one of them is not finite; the highest could hide it.
        """
        for row in rows:
            _check_finite(row)
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


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Policy(_Saved):
    """How a policy's thresholds are chosen: by best F1, or by a bound on a rate of the calibration rows."""

    rule: Literal["best_f1", "target_recall", "target_fpr"]
    value: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """The least recall or the highest false positive rate; None for best F1."""

    @model_validator(mode="after")
    def _a_rate_has_a_value(self) -> Self:
        if (self.value is None) != (self.rule == "best_f1"):
            raise ValueError(
                f"rule {self.rule} with value {self.value}; allowed: a rate with its value, best_f1 without"
            )
        return self

    def __str__(self) -> str:
        return {
            "best_f1": "best F1",
            "target_recall": f"recall of at least {self.value}",
            "target_fpr": f"false positive rate of at most {self.value}",
        }[self.rule]


class Calibrator(_Saved):
    """One head on one target: ``score = sigmoid(logit / temperature + bias)``, flagged from a policy's threshold on.

    ``rows`` and ``positives`` count the labelled rows that it stands on, and ``fitted_on`` says whose they are.
    """

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    bias: float = Field(default=0.0, allow_inf_nan=False)
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]]
    fitted_on: Literal["prompt", "response", "both", "nothing"] = "nothing"
    rows: int = Field(default=0, ge=0)
    positives: int = Field(default=0, ge=0)

    def score(self, logit: float) -> float:
        """The probability of harm, in [0, 1)."""
        return min(sigmoid(logit / self.temperature + self.bias), _HIGHEST)

    def decide(self, logit: float, policy: str) -> Decision:
        """The decision on one logit under a policy."""
        score, threshold = self.score(logit), self.thresholds[policy]
        return Decision(score >= threshold, score, threshold)


class TargetCalibration(_Saved):
    """The calibrators of all heads on one target."""

    harmful: Calibrator
    categories: dict[str, Calibrator]
    harmful_share: float | None = Field(default=None, gt=0, lt=1)
    """The share of harmful texts that thresholds of best F1 are chosen for; None is that of the calibration rows."""

    @property
    def heads(self) -> list[Calibrator]:
        """1 + K calibrators, harmfulness first."""
        return [self.harmful, *self.categories.values()]


class Calibration(_Saved):
    """What is saved with a guard to make verdicts of logits, a part a target, under named policies."""

    default_policy: str
    policies: dict[str, Policy]
    prompt: TargetCalibration
    response: TargetCalibration

    @model_validator(mode="after")
    def _heads_and_policies_are_the_same_everywhere(self) -> Self:
        if self.default_policy not in self.policies:
            raise ValueError(f"default_policy {self.default_policy!r}; {allowed(self.default_policy, self.policies)}")
        if list(self.prompt.categories) != list(self.response.categories):
            raise ValueError("prompt and response have other categories")
        for head in [*self.prompt.heads, *self.response.heads]:
            if head.thresholds.keys() != self.policies.keys():
                raise ValueError(f"thresholds for {sorted(head.thresholds)}; allowed: one for each of 'policies'")
        return self

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories' names, in the order of their logits."""
        return tuple(self.prompt.categories)

    def of(self, target: Target) -> TargetCalibration:
        """The part of a target."""
        return self.prompt if target == "prompt" else self.response

    def policy(self, name: str | None) -> str:
        """A policy's name, checked; the default policy's when None.

        Raises:
            ConfigError: there is no such policy.
        """
        if name is not None and name not in self.policies:
            raise ConfigError(f"policy {name!r} is unknown to this guard; {allowed(name, self.policies)}")
        return self.default_policy if name is None else name

    def verdict(self, logits: GuardLogits, target: Target, policy: str | None = None) -> Verdict:
        """Decide on harmfulness and on each category.

        Raises:
            ConfigError: there is no such policy.
            GuardError: a logit is not finite; no threshold would ever flag it.
        """
        _check_finite((logits.harmful, *logits.categories))
        name, heads = self.policy(policy), self.of(target)
        pairs = zip(heads.categories.items(), logits.categories, strict=True)
        return Verdict(
            *heads.harmful.decide(logits.harmful, name),
            target=target,
            categories={category: head.decide(logit, name) for (category, head), logit in pairs},
            windows=logits.windows,
        )


def _check_finite(logits: Sequence[float]) -> None:
    if not all(map(math.isfinite, logits)):
        raise GuardError("the guard gave a logit that is NaN or infinite; allowed: finite ones")


def sigmoid(logit: float) -> float:
    """The logistic function, without overflow for large negative logits."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1 + power)
