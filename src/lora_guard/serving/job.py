"""What the engine worker works on: chats and moderation requests, and how their results reach the event loop."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from typing import Generic, TypeVar

from lora_guard.conversation import Conversation, Target
from lora_guard.engine.session import Session
from lora_guard.engine.stream import ChatEnd, Event, Judgement, NextToken, Steps, StreamSettings
from lora_guard.errors import DeadlineError, GuardError, LoraGuardError
from lora_guard.guard import Guard
from lora_guard.verdict import GuardLogits

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Judging:
    """Sent to a request when the guard begins to judge it, and with None when it is done.

    In between, the guard's own deadline holds. ``failed`` is what a judgement that is done gave no verdict on.
    """

    target: Target | None
    failed: Target | None = None


class Channel(Generic[Result]):
    """Results on their way from the engine thread to one coroutine of the event loop that made the channel.

    Args:
        seconds: what the request may take in all.
        guard_seconds: what one judgement may take.
    """

    def __init__(self, seconds: float, guard_seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.cancelled = False
        """Nobody waits for results any more."""
        self.judging: Target | None = None
        """What the guard judges while a result is awaited."""
        self.failed: set[Target] = set()
        """What the guard failed to judge before the result that was received last."""
        self._guard_seconds = guard_seconds
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Result | Judging | LoraGuardError] = asyncio.Queue()

    @property
    def expired(self) -> bool:
        """Whether the deadline is over."""
        return time.monotonic() >= self.deadline

    def send(self, result: Result | Judging | LoraGuardError) -> None:
        """From the engine thread; what comes after the loop's end is dropped."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)

    def end(self, error: LoraGuardError) -> None:
        """Have nothing but this error come any more."""
        self.send(error)
        self.cancelled = True

    async def receive(self) -> Result:
        """The next result.

        Raises:
            LoraGuardError: what ended the request; DeadlineError or GuardError when it took too long.
        """
        due, self.judging, self.failed = self.deadline, None, set()
        while True:
            try:
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    result = await self._results.get()
            except TimeoutError:
                if self.judging and due < self.deadline:
                    raise GuardError(f"the guard took longer than {self._guard_seconds:g} s") from None
                raise DeadlineError("the request was not done by its deadline") from None
            if isinstance(result, LoraGuardError):
                raise result
            if not isinstance(result, Judging):
                return result
            self.judging = result.target
            if result.failed:
                self.failed.add(result.failed)
            due = self.deadline
            if self.judging:
                due = min(due, time.monotonic() + self._guard_seconds)


def finite(logits: GuardLogits) -> GuardLogits | None:
    """The logits, or None if one of them is not a number that can be compared."""
    return logits if all(map(math.isfinite, (logits.harmful, *logits.categories))) else None


def highest(windows: Iterable[GuardLogits]) -> GuardLogits:
    """Element-wise the highest logits of a text's windows."""
    return GuardLogits.highest([[window.harmful, *window.categories] for window in windows])


Row = tuple[int, int, list[int]]
"""A row of a moderation request: the place of its conversation, that of the form among the conversation's, the ids."""


@dataclass(eq=False)
class ScoreJob:
    """A moderation request: the rows of all its conversations, and the logits that are known."""

    guard: Guard
    conversations: Sequence[Conversation]
    targets: Sequence[Target]
    channel: Channel[list[GuardLogits]]
    max_tokens: int
    rows: deque[Row] = field(default_factory=deque)
    """Not judged yet."""
    found: list[list[list[GuardLogits]]] = field(default_factory=list)
    """Of each conversation, of each of its forms: the logits of its windows."""
    tokens: int = 0
    """Of the conversations in all their forms."""

    def results(self) -> list[GuardLogits]:
        """One for each conversation: the higher of its forms, each the highest of its windows."""
        logits = [reduce(GuardLogits.or_higher, map(highest, forms)) for forms in self.found]
        return [
            self.guard.with_tokens(*judged) for judged in zip(logits, self.conversations, self.targets, strict=True)
        ]


def next_rows(jobs: deque[ScoreJob], most: int) -> list[tuple[ScoreJob, Row]]:
    """Take rows of one guard to judge together: at most ``most`` padded tokens, or one longer row.

    The requests of the first one's guard give a row each in turn; the first moves to the queue's end.
    """
    jobs.rotate(-1)
    order = [jobs[-1], *list(jobs)[:-1]] if jobs else []
    order = [job for job in order if job.rows and job.guard is order[0].guard]
    batch: list[tuple[ScoreJob, Row]] = []
    longest = 0
    while order:
        for job in order:
            longest = max(longest, len(job.rows[0][-1]))
            if batch and longest * (len(batch) + 1) > most:
                return batch
            batch.append((job, job.rows.popleft()))
        order = [job for job in order if job.rows]
    return batch


@dataclass(eq=False)
class ChatJob:
    """A chat completion: what was asked and, once it is its turn, the session and the steps of its answer."""

    guard: Guard
    conversation: Conversation
    settings: StreamSettings
    channel: Channel[Event]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    session: Session | None = None
    steps: Steps | None = None
    wants: Judgement | NextToken | None = None
    normalised: list[list[int]] = field(default_factory=list)
    """Rows of the prompt's normalised form, if it differs, until they are judged."""
    found: GuardLogits | None = None
    """What the guard says of them."""
    is_read: bool = False
    """The generation path has read all tokens, so that a judgement is one pass of the guard path alone."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    end: ChatEnd | None = None

    def decides(self, logits: GuardLogits, target: Target) -> GuardLogits:
        """What decides on a target: what the chat's own judgement gives; of the prompt, its normalised form and its
        words have a part."""
        if target == "prompt" and self.found is not None:
            logits = logits.or_higher(self.found)
        return self.guard.with_tokens(logits, self.conversation, target)

    def next_normalised(self, most: int) -> list[list[int]]:
        """Take the next rows of the normalised form: at most ``most`` padded tokens, or one longer row."""
        count = longest = 0
        for row in self.normalised:
            longest = max(longest, len(row))
            if count and longest * (count + 1) > most:
                break
            count += 1
        taken, self.normalised = self.normalised[:count], self.normalised[count:]
        return taken
