"""What the routes share: they give it conversations, and it has them judged or answered, counted and audited."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lora_guard.conversation import Conversation, Target
from lora_guard.engine.stream import ChatEnd, Check, Event, StreamSettings
from lora_guard.errors import BusyError, DeadlineError, GuardError, InputError, LoraGuardError, ResourceError
from lora_guard.guard import Guard
from lora_guard.serving.audit import AuditLog
from lora_guard.serving.config import ServeConfig
from lora_guard.serving.guards import Guards, Served
from lora_guard.serving.job import Channel, ChatJob, ScoreJob
from lora_guard.serving.metrics import Metrics
from lora_guard.serving.worker import Worker
from lora_guard.verdict import Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]


class Service:
    """The guards of one chat model behind their worker.

    Args:
        guard: loaded; the default.
        config: the server's.
        others: more guards by the names that requests give, loaded on the default's chat model.

    Raises:
        InputError: two guards of one name.
        ResourceError: the audit log cannot be written.
    """

    def __init__(self, guard: Guard, config: ServeConfig, others: Mapping[str, Guard] = MappingProxyType({})) -> None:
        self.config = config
        self.metrics = Metrics()
        self.worker = Worker(config, self.metrics)
        self.guards = Guards(config.model_name or guard.spec.name, guard, others)
        self.created = int(time.time())
        self._audit = AuditLog(config.audit, config) if config.audit else None

    def put(self, name: str, guard: Guard | None) -> None:
        """Put a guard under a name while the server runs, or take the one of that name away with None.

        Requests under way end with the guard they began with, which then leaves the chat model. To be called on the
        event loop, so that no request stands between its guard and the worker.

        Raises:
            InputError: the default cannot be taken away.
        """
        former = self.guards.put(name, guard)
        if former is not None:
            self.worker.retire(former)

    def close(self) -> None:
        """Drain the worker and close the audit log."""
        self.worker.stop()
        if self._audit:
            self._audit.close()

    async def moderate(
        self, conversations: Sequence[Conversation], request_id: str, model: str | None = None, *, blocks: bool = False
    ) -> tuple[Served, list[Verdict]]:
        """Have the guard that a request names judge conversations, each on its own.

        Args:
            conversations: what is judged, of each the last message.
            request_id: for the audit log.
            model: the guard's name.
            blocks: whether the client withholds what is flagged; then nothing leaves that is not audited.

        Raises:
            LoraGuardError: busy, too long, out of time, or the guard failed.
        """
        begun, served = time.monotonic(), self.guards[model]
        targets = [conversation.target for conversation in conversations]
        channel = Channel[Any](self.config.deadline, self.config.guard_deadline)
        self.worker.submit(ScoreJob(served.guard, conversations, targets, channel, self.config.max_input_tokens))
        texts = [conversation.messages[-1].content for conversation in conversations]
        mode = "block" if blocks else "score"
        try:
            logits = await channel.receive()
        except (BusyError, InputError):
            raise  # it was not to be judged
        except LoraGuardError:
            if channel.judging:  # it hangs; a failure has been counted by the worker
                self.metrics.guard_errors.labels(channel.judging).inc()
                self.worker.give_up()
            for text, target in zip(texts, targets, strict=True):
                await self.audit(served, text, None, request_id, target, mode, "unjudged", begun)
            raise
        finally:
            self.leave(channel)
        verdicts = [served.guard.verdict(*pair) for pair in zip(logits, targets, strict=True)]
        self.metrics.moderation.observe(time.monotonic() - begun)
        passed = "scored" if not blocks else "withheld" if any(verdict.flagged for verdict in verdicts) else "released"
        for text, verdict in zip(texts, verdicts, strict=True):
            self.metrics.scored(verdict)
            blocked = blocks and verdict.flagged
            if blocked:
                self.metrics.blocked.labels(verdict.target).inc()
            action = "blocked" if blocked else passed
            await self.audit(served, text, verdict, request_id, verdict.target, mode, action, begun)
        return served, verdicts

    def answer(
        self,
        conversation: Conversation,
        settings: StreamSettings,
        sampling: Sampling,
        request_id: str,
        model: str | None = None,
    ) -> "Answer":
        """Have a conversation answered beside the guard that a request names; the answer's events follow as they come.

        Raises:
            BusyError: no more work is taken now.
        """
        served = self.guards[model]
        channel = Channel[Event](self.config.deadline, self.config.guard_deadline)
        job = ChatJob(
            served.guard,
            conversation,
            settings,
            channel,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
        )
        self.worker.submit(job)
        return Answer(self, served, job, request_id)

    def leave(self, channel: Channel[Any]) -> None:
        """Have the worker forget a request. If its judgement still runs, see later whether it hangs."""
        channel.cancelled = True
        if channel.judging:
            asyncio.get_running_loop().call_later(self.config.guard_deadline, self.worker.give_up)

    async def audit(
        self,
        served: Served,
        text: str,
        verdict: Verdict | None,
        request_id: str,
        stage: str,
        mode: str,
        action: str,
        begun: float,
    ) -> None:
        """Write a decision to the audit log, if there is one.

        Raises:
            ResourceError: it cannot be written, and the mode is ``block``: what is not audited must not leave.
        """
        if self._audit is None:
            return
        scores: dict[str, Any] = {}
        if verdict:
            categories = {name: round(decision.score, 6) for name, decision in verdict.categories.items()}
            scores = {"flagged": verdict.flagged, "score": round(verdict.score, 6), "threshold": verdict.threshold}
            scores["categories"] = categories
        fields = {"id": request_id, "stage": stage, "policy": mode, "action": action, **served.audited, **scores}
        fields["latency_ms"] = round(1000 * (time.monotonic() - begun), 1)
        try:
            await asyncio.to_thread(self._audit.write, text, **fields)
        except ResourceError as error:
            self.metrics.audit_errors.inc()
            log.error("%s", error)
            if mode == "block":
                raise


class Answer:
    """A chat's events, each counted and audited before it goes on to the client.

    Leaving :meth:`events` early, as at a client's disconnect, ends the generation at its next token.
    """

    def __init__(self, service: Service, served: Served, job: ChatJob, request_id: str) -> None:
        self.settings = job.settings
        self.served = served
        self._service = service
        self._job = job
        self._id = request_id
        self._begun = time.monotonic()
        self._text = ""
        self._verdict: dict[Target, Verdict] = {}
        self._let_pass: set[Target] = set()
        """What left unjudged, by configuration."""
        self._unjudged = False
        """Whether the check before the next text of the answer failed."""

    @property
    def usage(self) -> tuple[int, int]:
        """Tokens of prompt and answer, known at the answer's end."""
        return self._job.prompt_tokens, self._job.completion_tokens

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer's events; the last is a :class:`ChatEnd`.

        Raises:
            LoraGuardError: what ended the answer early.
        """
        try:
            async with aclosing(self._received()) as received:
                async for event in received:
                    await self._note(event)
                    yield event
        finally:
            self._service.leave(self._job.channel)

    async def _received(self) -> AsyncGenerator[Event, None]:
        """What the worker sends. Where the guard hangs and its target may not leave unjudged, the answer ends."""
        channel = self._job.channel
        event: Event = ""
        while not isinstance(event, ChatEnd):
            try:
                event = await channel.receive()
            except DeadlineError:
                if channel.judging:
                    self._service.metrics.guard_errors.labels(channel.judging).inc()
                    await self._write(channel.judging, None, "unjudged")
                raise
            except GuardError:
                target = channel.judging
                if target is None:
                    raise
                self._service.metrics.guard_errors.labels(target).inc()
                self._service.worker.give_up()
                if not self.settings.withholds(target):
                    await self._write(target, None, "unjudged")
                    raise
                verdicts = self._verdict.get("prompt"), self._verdict.get("response")
                event = ChatEnd(self._text or None, *verdicts, "content_filter", frozenset({target}))
            for target in sorted(channel.failed):
                await self._note_failure(target)
            yield event

    async def _note_failure(self, target: Target) -> None:
        """Count and audit what is let pass unjudged before any of it leaves; other failures are known at the end."""
        if self.settings.mode_of(target) != "block" or not self.settings.fail_open:
            return
        self._unjudged = target == "response"
        if target not in self._let_pass:
            self._let_pass.add(target)
            self._service.metrics.fail_open.labels(target).inc()
            await self._write(target, None, "fail_open")

    async def _note(self, event: Event) -> None:
        metrics = self._service.metrics
        if isinstance(event, Check):
            metrics.scored(event.verdict)
            self._verdict[event.verdict.target] = event.verdict
            self._unjudged = False
            if event.verdict.target == "prompt":
                await self._note_prompt(event.verdict)
        elif isinstance(event, str):
            if not self._text:
                metrics.first_token.observe(time.monotonic() - self._begun)
            self._text += event
            if self.settings.mode == "block":
                verdict = None if self._unjudged else self._verdict.get("response")
                await self._write("response", verdict, "fail_open" if self._unjudged else "released")
        else:
            await self._note_end(event)

    async def _note_prompt(self, verdict: Verdict) -> None:
        mode = self.settings.mode_of("prompt")
        blocked = mode == "block" and verdict.flagged
        await self._write("prompt", verdict, "blocked" if blocked else "released" if mode == "block" else "scored")

    async def _note_end(self, end: ChatEnd) -> None:
        metrics = self._service.metrics
        blocks = end.finish_reason == "content_filter"
        for target in sorted(end.failed - self._let_pass):
            action = "withheld" if self.settings.withholds(target) else "unjudged"
            await self._write(target, None, action, end.withheld)
        verdicts: dict[Target, Verdict | None] = {"prompt": end.prompt_verdict, "response": end.response_verdict}
        flagged = {target for target, verdict in verdicts.items() if verdict is not None and verdict.flagged}
        blocking = {target for target in flagged if blocks and self.settings.mode_of(target) == "block"}
        for target in blocking:
            metrics.blocked.labels(target).inc()
        if end.response_verdict is not None and ("response" not in end.failed or "response" in blocking):
            action = "blocked" if blocks else "released" if self.settings.mode == "block" else "scored"
            await self._write("response", end.response_verdict, action, end.withheld)

    async def _write(self, target: Target, verdict: Verdict | None, action: str, withheld: str = "") -> None:
        """A line of the audit log: on the user's last message, or on the answer with what of it was withheld."""
        text = self._text + withheld if target == "response" else self._job.conversation.messages[-1].content
        mode = self.settings.mode_of(target)
        await self._service.audit(self.served, text, verdict, self._id, target, mode, action, self._begun)
