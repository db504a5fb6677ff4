"""What the server counts and times, in Prometheus' form; labels never hold anything of a request's text."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from lora_guard.verdict import Verdict

CONTENT_TYPE = CONTENT_TYPE_LATEST

_NAMESPACE = "lora_guard"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_SCORES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and outcome", "route", "status")
        self.first_token = self._histogram("time_to_first_token_seconds", "From a chat's arrival to its first text")
        self.moderation = self._histogram("moderation_seconds", "Moderation requests, waiting included")
        self.judgement_seconds = self._histogram("chat_judgement_seconds", "One pass of the guard over running chats")
        self.queue_depth = Gauge(
            "queue_depth", "Requests that are worked on or wait", namespace=_NAMESPACE, registry=self.registry
        )
        self.batch_rows = self._histogram("batch_rows", "Rows of one moderation batch", _ROWS)
        self.scores = self._histogram("score", "Scores by category", _SCORES, "category")
        self.blocked = self._counter("blocked", "Prompts and answers withheld because flagged", "stage")
        self.guard_errors = self._counter("guard_errors", "Judgements that failed", "stage")
        self.fail_open = self._counter("fail_open", "Unjudged text let pass by configuration", "stage")
        self.audit_errors = self._counter("audit_errors", "Audit lines that could not be written")

    def scored(self, verdict: Verdict) -> None:
        """Count a verdict's scores."""
        self.scores.labels("harmful").observe(verdict.score)
        for category, decision in verdict.categories.items():
            self.scores.labels(category).observe(decision.score)

    def text(self) -> bytes:
        """All of them in the exposition format."""
        text: bytes = generate_latest(self.registry)
        return text

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, namespace=_NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float] = _SECONDS, *labels: str) -> Histogram:
        return Histogram(name, meaning, labels, buckets=buckets, namespace=_NAMESPACE, registry=self.registry)
