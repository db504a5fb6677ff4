"""The engine worker: one thread that shares the engine's time among chats and moderation requests, a pass at a time."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_guard.engine.stream import ChatEnd, Judgement, NextToken, moderation_steps
from lora_guard.errors import BusyError, DeadlineError, GuardError, InputError, LoraGuardError
from lora_guard.guard import Guard
from lora_guard.normalise import forms
from lora_guard.serving.config import ServeConfig
from lora_guard.serving.job import ChatJob, Judging, ScoreJob, finite, highest, next_rows
from lora_guard.serving.metrics import Metrics
from lora_guard.verdict import GuardLogits

log = logging.getLogger(__name__)

Job = ChatJob | ScoreJob


@dataclass
class _Shared:
    """What the event loop and the engine thread both touch, under one lock."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    inbox: deque[Job] = field(default_factory=deque)
    jobs: int = 0
    """Those in the inbox and those under way."""
    closing: bool = False
    busy_since: float | None = None
    """When the pass that runs began."""
    retired: list[Guard] = field(default_factory=list)
    """Guards that get no more requests, until the last of theirs is done."""


class Worker:
    """Runs the engines of guards on one chat model for many requests.

    Chats take a token each in turn. A judgement of a chat waits for the end of the round and joins the others' there,
    in one pass a guard. Rows of moderation requests are judged in small batches between any two tokens and, where the
    engine lets them in, within a token's pass; the chats then get as much time as the batch took before the next one. A
    request never waits for another to be done.

    Args:
        config: queue, batches and deadlines.
        metrics: told of batches, passes and failures.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._shared = _Shared()
        self._scores: deque[ScoreJob] = deque()
        self._waiting: deque[ChatJob] = deque()
        self._chats: list[ChatJob] = []
        self._turn: deque[ChatJob] = deque()
        """Chats that have yet to move in this round."""
        self._chats_until = 0.0
        """When chats have had as much time as moderation took before."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.queue_depth.set_function(lambda: self._shared.jobs)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: not while a pass has run longer than the guard's deadline, nor at shutdown."""
        since = self._shared.busy_since
        stuck = since is not None and time.monotonic() - since > self._config.guard_deadline
        return self._thread.is_alive() and not self._shared.closing and not stuck

    def submit(self, job: Job) -> None:
        """Take in a request; its results come through its channel.

        Raises:
            BusyError: the queue is full, the engine is stuck, or the server is shutting down.
        """
        if not self.is_ready:
            raise BusyError("the engine takes no requests now")
        with self._shared.lock:
            if self._shared.jobs >= self._config.queue:
                raise BusyError(f"{self._shared.jobs} requests are waiting; allowed: {self._config.queue}", 1)
            self._shared.jobs += 1
            self._shared.inbox.append(job)
            self._shared.lock.notify()

    def retire(self, guard: Guard) -> None:
        """Have a guard that gets no more requests leave the chat model after the last of those it has."""
        with self._shared.lock:
            self._shared.retired.append(guard)
            self._shared.lock.notify()

    def stop(self) -> None:
        """Take no more requests, finish those under way within the time to drain, and end the others."""
        with self._shared.lock:
            self._shared.closing = True
            self._shared.lock.notify()
        self._thread.join(self._config.drain)
        for job in [*self._held(), *self._shared.inbox]:
            job.channel.end(BusyError("the server is shutting down"))
        self._thread.join(1.0)  # stuck in a pass it ends with the process

    def give_up(self) -> None:
        """Once a judgement took too long: if its pass still runs, end what waits behind it."""
        if not self.is_ready:
            for job in [*self._held(), *self._shared.inbox]:
                if not job.channel.judging:
                    job.channel.end(BusyError("the engine takes no requests now"))

    # All below runs on the engine thread.

    def _run(self) -> None:
        while self._wait():
            self._shared.busy_since = time.monotonic()
            try:
                self._work()
            except Exception as error:  # a fault outside any one request; the thread must outlive it
                self._fault(error)
            self._shared.busy_since = None

    def _wait(self) -> bool:
        """Wait for work and take it in; False at the end."""
        shared = self._shared
        with shared.lock:
            while not (shared.inbox or self._held() or shared.retired):
                if shared.closing:
                    return False
                shared.lock.wait()
        self._take()
        return True

    def _take(self) -> None:
        """Take in what came."""
        with self._shared.lock:
            taken = [self._shared.inbox.popleft() for _ in range(len(self._shared.inbox))]
        for job in taken:
            if isinstance(job, ChatJob):
                self._waiting.append(job)
            else:
                self._scores.append(job)

    def _work(self) -> None:
        """One pass of an engine, or none where requests only have to be dropped."""
        self._drop_dead()
        self._release()
        while self._waiting and len(self._chats) < self._config.chats:
            self._chats.append(self._waiting.popleft())
        if self._scores and (not self._chats or time.monotonic() >= self._chats_until):
            self._score()
        elif self._chats:
            self._chat()

    def _make_way(self) -> None:
        """Within a chat's pass: let moderation requests go first, as between passes."""
        self._shared.busy_since = time.monotonic()  # a long prompt is read layer by layer; none of them hangs
        self._take()
        if self._scores and time.monotonic() >= self._chats_until:
            self._score()
            self._shared.busy_since = time.monotonic()

    def _drop_dead(self) -> None:
        """Forget requests that nobody waits for any more or whose deadline is over."""
        for job in self._held():
            if job.channel.expired:
                job.channel.send(DeadlineError("the request was not done by its deadline"))
            if job.channel.expired or job.channel.cancelled:
                self._remove(job)

    def _release(self) -> None:
        """Let the retired guards leave that no request needs any more."""
        with self._shared.lock:
            needed = {id(job.guard) for job in [*self._held(), *self._shared.inbox]}
            done = [guard for guard in self._shared.retired if id(guard) not in needed]
            self._shared.retired = [guard for guard in self._shared.retired if id(guard) in needed]
        for guard in done:
            guard.engine.leave()

    def _held(self) -> list[Job]:
        held: list[Job] = [*self._scores, *self._waiting, *self._chats]
        return held

    def _remove(self, job: Job) -> None:
        if isinstance(job, ScoreJob):
            self._scores.remove(job)
        else:
            job.steps = None
            for group in (self._waiting, self._chats, self._turn):
                if job in group:
                    group.remove(job)
        with self._shared.lock:
            self._shared.jobs -= 1

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Forget a request that is done, or that failed."""
        if error is not None:
            known = isinstance(error, LoraGuardError)
            if not known:
                log.error("a request failed: %s", type(error).__name__)  # its message could hold the text
            job.channel.send(error if isinstance(error, LoraGuardError) else LoraGuardError("the engine failed"))
        self._remove(job)

    def _fault(self, error: Exception) -> None:
        log.error("the engine failed: %s", type(error).__name__)
        for job in self._held():
            self._end(job, LoraGuardError("the engine failed"))

    # Moderation

    def _score(self) -> None:
        """Judge a batch of rows, one of each request in turn."""
        if not self._chats and self._config.batch_wait and not self._scores[0].found:
            time.sleep(self._config.batch_wait)
            self._take()
        begun = time.monotonic()
        for job in [job for job in self._scores if not job.found]:
            self._open(job)
        batch = next_rows(self._scores, self._config.batch_tokens)
        if not batch:
            return
        for job in {id(job): job for job, _ in batch}.values():
            job.channel.send(Judging(job.targets[0]))
        self._metrics.batch_rows.observe(len(batch))
        rows = [row for _, (_, _, row) in batch]
        judged = self._judged(batch[0][0].guard, rows)
        for (job, (index, form, _)), logits in zip(batch, judged, strict=True):
            if job not in self._scores:
                continue  # another of its rows failed
            job.channel.send(Judging(None))
            if logits is None:
                self._metrics.guard_errors.labels(job.targets[index]).inc()
                self._end(job, GuardError("the guard failed"))
                continue
            job.found[index][form].append(logits)
        for job in [job for job in self._scores if not job.rows]:
            job.channel.send(job.results())
            self._end(job)
        now = time.monotonic()
        self._chats_until = now + (now - begun) if self._chats else now

    def _open(self, job: ScoreJob) -> None:
        """Render a request's conversations to rows."""
        try:
            found: list[list[list[GuardLogits]]] = []
            for index, (conversation, target) in enumerate(zip(job.conversations, job.targets, strict=True)):
                judged = forms(conversation.up_to(target))
                windows = [job.guard.engine.windows(form, target) for form in judged]
                job.tokens += sum(len(row) for rows in windows for row in rows)
                if job.tokens > job.max_tokens:
                    raise InputError(f"the input has over {job.max_tokens} tokens; allowed: at most that")
                job.rows.extend((index, form, row) for form, rows in enumerate(windows) for row in rows)
                found.append([[] for _ in judged])
            job.found = found
        except Exception as error:
            self._end(job, error)

    def _judged(self, guard: Guard, rows: Sequence[list[int]]) -> list[GuardLogits | None]:
        """The logits of each row; None where the guard fails on that row, alone as in the batch."""
        try:
            logits = guard.engine.score_windows(rows)
        except Exception as error:
            log.error("a batch of %d rows failed: %s", len(rows), type(error).__name__)
            if len(rows) == 1:
                return [None]
            return [self._judged(guard, [row])[0] for row in rows]
        return [finite(row) for row in logits]

    # Chats

    def _chat(self) -> None:
        """One pass for the chat whose turn it is, or at the end of a round for the judgements it left."""
        if not self._turn:
            asking = [job for job in self._chats if isinstance(job.wants, Judgement)]
            unread = next((job for job in asking if not job.is_read), None)
            if unread is not None:
                self._read(unread)
                return
            disguised = next((job for job in asking if job.normalised), None)
            if disguised is not None:
                self._judge_normalised(disguised)
                self._turn.extend(job for job in self._chats if not isinstance(job.wants, Judgement))
                return
            if asking:
                self._judge([job for job in asking if job.guard is asking[0].guard])
                return
            self._turn.extend(self._chats)
            if self._config.batch_decode:
                self._read_together()
        job = self._turn.popleft()
        if job.steps is None:
            self._begin(job)
        else:
            self._advance(job)

    def _begin(self, job: ChatJob) -> None:
        """Read the prompt."""
        try:
            session = job.guard.engine.session(seed=job.seed, between=self._make_way)
            ids, prompt_end = job.guard.engine.renderer.chat(job.conversation)
            session.append(ids)
            if job.settings.mode_of("prompt") != "off":
                for form in forms(job.conversation)[1:]:
                    job.normalised = job.guard.engine.windows(form, "prompt")
                if sum(map(len, job.normalised)) > (most := self._config.max_input_tokens):
                    raise InputError(f"without its disguises the prompt has over {most} tokens; allowed: at most that")
        except Exception as error:
            self._end(job, error)
            return
        job.prompt_tokens = session.position
        job.session = session
        job.steps = moderation_steps(
            job.guard.engine,
            session,
            prompt_end,
            job.guard.verdict,
            job.settings,
            max_tokens=job.max_tokens,
            temperature=job.temperature,
            top_p=job.top_p,
            stop=job.stop,
        )
        self._advance(job)

    def _advance(self, job: ChatJob, reply: GuardLogits | None = None) -> None:
        """Go on with a chat until it wants the next pass, and send what comes of it."""
        assert job.steps is not None
        assert job.session is not None
        job.wants, job.is_read = None, False
        try:
            step = job.steps.send(reply)
            while not isinstance(step, Judgement | NextToken):
                if isinstance(step, ChatEnd):
                    job.completion_tokens = job.session.position - job.prompt_tokens
                job.channel.send(step)
                step = job.steps.send(None)
            job.wants = step
        except StopIteration:
            self._end(job)
        except Exception as error:
            self._end(job, error)

    def _read(self, job: ChatJob) -> None:
        """Let the generation path read a chat's last token: a pass of its own, before the judgement's."""
        assert job.session is not None
        job.is_read = True
        try:
            job.guard.engine.decode([job.session])
        except Exception as error:
            self._end(job, error)

    def _read_together(self) -> None:
        """Any engine on the chat model can read for all of them: the guards have no part in it."""
        self._turn[0].guard.engine.decode([job.session for job in self._turn if job.session is not None], batch=True)

    def _judge_normalised(self, job: ChatJob) -> None:
        """Judge the next piece of the normalised form of a chat's prompt, which no chat holds; others go on between."""
        rows = job.next_normalised(self._config.batch_tokens)
        job.channel.send(Judging("prompt"))
        logits = [row for row in self._judged(job.guard, rows) if row is not None]
        whole = len(logits) == len(rows)
        job.channel.send(Judging(None, failed=None if whole else "prompt"))
        if whole:
            job.found = highest(logits if job.found is None else [job.found, *logits])
            return
        job.normalised = []
        self._metrics.guard_errors.labels("prompt").inc()
        self._advance(job, None)

    def _judge(self, asking: Sequence[ChatJob]) -> None:
        """Judge several chats of one guard in one pass and go on with them; each alone where the pass fails."""
        requests = []
        for job in asking:
            assert job.session is not None
            assert isinstance(job.wants, Judgement)
            requests.append((job.session, job.wants.target, job.wants.at))
            job.channel.send(Judging(job.wants.target))
        begun = time.monotonic()
        logits: list[GuardLogits | None]
        try:
            logits = [finite(row) for row in asking[0].guard.engine.judge(requests)]
        except Exception as error:
            log.error("a judgement of %d chats failed: %s", len(asking), type(error).__name__)
            if len(asking) > 1:
                for job in asking:
                    self._judge([job])
                return
            logits = [None]
        self._metrics.judgement_seconds.observe(time.monotonic() - begun)
        for job, request, reply in zip(asking, requests, logits, strict=True):
            if reply is None:
                self._metrics.guard_errors.labels(request[1]).inc()
            else:
                reply = job.decides(reply, request[1])
            job.channel.send(Judging(None, failed=request[1] if reply is None else None))
            self._advance(job, reply)
