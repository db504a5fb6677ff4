"""From a guard's verdict to the moderation results of OpenAI's wire."""

from collections.abc import Callable
from typing import Any

from lora_guard.serving.schemas import (
    Moderated,
    ModerationFailure,
    ModerationItem,
    ModerationResult,
    ModerationResults,
)
from lora_guard.taxonomy import Taxonomy, openai_sources
from lora_guard.verdict import Decision, Verdict


class Results:
    """Writes verdicts of one guard.

    Args:
        taxonomy: the guard's categories.
        model: what the server calls its model.
    """

    def __init__(self, taxonomy: Taxonomy, model: str) -> None:
        self.model = model
        self._sources = openai_sources(taxonomy)

    def item(self, verdict: Verdict) -> ModerationItem:
        """One result of ``/v1/moderations``."""
        return ModerationItem(**self._fields(verdict))

    def moderated(self, verdict: Verdict) -> Moderated:
        """``moderation.input`` or ``.output`` of a chat completion."""
        result = ModerationResult(model=self.model, **self._fields(verdict))
        return ModerationResults(model=self.model, results=[result])

    def failure(self) -> Moderated:
        """The same where the guard failed."""
        return ModerationFailure(code="guard_error", message="the guard gave no verdict on this text")

    def _fields(self, verdict: Verdict) -> dict[str, Any]:
        own = dict(verdict.categories)
        keys = {key: [own[name] for name in names] for key, names in self._sources.items()}
        flags = {key: any(decision.flagged for decision in found) for key, found in keys.items()}
        scores = {key: max((decision.score for decision in found), default=0.0) for key, found in keys.items()}
        applied = {key: ["text"] if found else [] for key, found in keys.items()}
        return {
            "flagged": verdict.flagged,
            "categories": flags | _each(own, lambda decision: decision.flagged),
            "category_scores": scores | _each(own, lambda decision: decision.score),
            "category_applied_input_types": applied | _each(own, lambda decision: ["text"]),
            "score": verdict.score,
            "threshold": verdict.threshold,
        }


def _each(own: dict[str, Decision], read: Callable[[Decision], Any]) -> dict[str, Any]:
    return {name: read(decision) for name, decision in own.items()}
