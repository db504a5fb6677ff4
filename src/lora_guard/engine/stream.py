"""Streaming moderation: an answer is checked while it is generated and, in ``block`` mode, held back until clear."""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

from lora_guard.conversation import Target
from lora_guard.engine.session import Engine, Session
from lora_guard.engine.stop import StopText
from lora_guard.errors import InputError, allowed
from lora_guard.verdict import GuardLogits, Verdict

Mode = Literal["off", "score", "block"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """When an answer is checked while it is generated, and what a flag does.

    Args:
        mode: ``score`` yields text at once and only annotates it. ``block`` answers no flagged prompt, yields text only
            once an unflagged check covers it, and ends the answer at a flag. ``off`` checks nothing.
        check_every: a check at the latest so many tokens after the one before. The end is always checked.
        sentence_ends: check at the end of each sentence and line too.
        debounce: so many flagged checks in a row flag the answer. In ``block`` mode the text of a shorter run waits
            until an unflagged check clears it. The last check has none after it: flagged, it flags the answer alone.
        prompt_threshold: of harmfulness, in place of the guard's own; in [0, 1].
        response_threshold: likewise.
        prompt_mode: of the prompt; as ``mode`` when absent.
        fail_open: in ``block`` mode, whether text that the guard failed to judge may leave.

    Raises:
        InputError: a value outside what is allowed.
    """

    mode: Mode = "score"
    check_every: int = 16
    sentence_ends: bool = True
    debounce: int = 1
    prompt_threshold: float | None = None
    response_threshold: float | None = None
    prompt_mode: Mode | None = None
    fail_open: bool = False

    def __post_init__(self) -> None:
        for name, mode in (("mode", self.mode), ("prompt_mode", self.mode_of("prompt"))):
            if mode not in MODES:
                raise InputError(f"{name} {mode!r} is unknown; {allowed(mode, MODES)}")
        for name, count in (("check_every", self.check_every), ("debounce", self.debounce)):
            if count < 1:
                raise InputError(f"{name} is {count}; allowed: 1 or more")
        for target, threshold in (("prompt", self.prompt_threshold), ("response", self.response_threshold)):
            if threshold is not None and not 0 <= threshold <= 1:
                raise InputError(f"{target}_threshold is {threshold}; allowed: 0 to 1")

    def mode_of(self, target: Target) -> Mode:
        """What a flag of the target does."""
        return self.prompt_mode or self.mode if target == "prompt" else self.mode

    def withholds(self, target: Target) -> bool:
        """Whether the target is withheld when the guard fails to judge it."""
        return self.mode_of(target) == "block" and not self.fail_open

    def decided(self, verdict: Verdict) -> Verdict:
        """The verdict, decided by the target's own threshold if these settings have one."""
        threshold = self.prompt_threshold if verdict.target == "prompt" else self.response_threshold
        if threshold is None:
            return verdict
        return replace(verdict, flagged=verdict.score >= threshold, threshold=threshold)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: the prompt's, at 0 tokens, or one of the answer's first ``tokens`` tokens.

    ``verdict`` is what the guard says of them. ``flagged`` is what counts: it waits for the debounce, and once true it
    stays true, whatever the verdicts of later checks.
    """

    tokens: int
    verdict: Verdict
    flagged: bool


@dataclass(frozen=True, slots=True)
class ChatEnd:
    """The last thing a chat yields: the whole answer and the verdicts.

    Attributes:
        response: all the text that was yielded; None when a flag withheld the answer before any of it.
        prompt_verdict: the guard's verdict on the prompt; None when it was not checked, or the guard failed.
        response_verdict: that on the whole answer or, once the answer is flagged, the flagged one of the highest
            score. None when a flagged prompt was not answered or the answer was not checked.
        finish_reason: as in OpenAI's chat completions; ``content_filter`` says that a flag, or a guard that failed,
            withheld the answer or the rest of it.
        failed: the targets of which a check failed, so that their verdict, if there is one, is not on all of the text.
        withheld: what was generated and never yielded, for a record of what was blocked.
    """

    response: str | None
    prompt_verdict: Verdict | None
    response_verdict: Verdict | None
    finish_reason: Literal["stop", "length", "content_filter"]
    failed: frozenset[Target] = frozenset()
    withheld: str = field(default="", repr=False)


class Judgement(NamedTuple):
    """What :func:`moderation_steps` asks for: the guard's logits at a position, the present one if None."""

    target: Target
    at: int | None = None


class NextToken(NamedTuple):
    """What :func:`moderation_steps` announces: when it goes on, it samples one token."""


Event = str | Check | ChatEnd
Steps = Generator[Event | Judgement | NextToken, GuardLogits | None, None]


def moderated(
    engine: Engine,
    session: Session,
    prompt_end: int,
    verdict: Callable[[GuardLogits, Target], Verdict],
    settings: StreamSettings,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
) -> Iterator[Event]:
    """Generate an answer and check it meanwhile: yield text, checks, and a :class:`ChatEnd`.

    In ``score`` mode a check follows the text it covers; in ``block`` mode text follows the unflagged check that clears
    it. Characters are yielded whole, and one that takes several tokens is covered only by a check at the last of them
    or later; bytes of a character that the answer's end cuts off are dropped. Checks change no token of the answer. The
    session can be used further when the generator is closed early. An exception of the guard ends the answer.

    Args:
        engine: made the session.
        session: holds the prompt and the opening of the answer.
        prompt_end: where the prompt is judged: the position after its last content token.
        verdict: decides on the guard's logits.
        settings: when to check, and what a flag does.
        max_tokens: the longest answer, in tokens.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        stop: texts that end the answer and are not part of it.

    Raises:
        InputError: the context is full, or ``temperature`` or ``top_p`` is outside its range.
    """
    steps = moderation_steps(
        engine,
        session,
        prompt_end,
        verdict,
        settings,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
    )
    reply: GuardLogits | None = None
    while True:
        try:
            step = steps.send(reply)
        except StopIteration:
            return
        reply = session.judge(step.target, step.at) if isinstance(step, Judgement) else None
        if not isinstance(step, Judgement | NextToken):
            yield step


def moderation_steps(
    engine: Engine,
    session: Session,
    prompt_end: int,
    verdict: Callable[[GuardLogits, Target], Verdict],
    settings: StreamSettings,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
) -> Steps:
    """:func:`moderated`, one pass of the model at a time, for a caller that runs several conversations in turn.

    Beside the events it yields a :class:`Judgement`, to be answered by ``send`` with the guard's logits, or with None
    when the guard failed; and a :class:`NextToken` before each token, so that the caller chooses when to go on. A
    check that failed ends the answer in ``block`` mode; in ``score`` mode, and with ``fail_open``, the answer goes on.
    """

    def judged(target: Target, at: int | None = None) -> Generator[Judgement, GuardLogits | None, Verdict | None]:
        logits = yield Judgement(target, at)
        return None if logits is None else settings.decided(verdict(logits, target))

    prompt_verdict: Verdict | None = None
    failed: set[Target] = set()
    if settings.mode_of("prompt") != "off":
        prompt_verdict = yield from judged("prompt", prompt_end)
        if prompt_verdict is None:
            failed.add("prompt")
        else:
            yield Check(0, prompt_verdict, prompt_verdict.flagged)
        flagged = prompt_verdict.flagged if prompt_verdict else settings.withholds("prompt")
        if settings.mode_of("prompt") == "block" and flagged:
            yield ChatEnd(None, prompt_verdict, None, "content_filter", frozenset(failed))
            return
    answer = _Answer(settings)
    decode = engine.decoder()
    stops = StopText(stop)
    finish: Literal["stop", "length"] = "length"
    while answer.tokens < max_tokens and session.room and not answer.withheld and finish == "length":
        yield NextToken()
        token = session.sample(temperature=temperature, top_p=top_p)
        if token in engine.stop_tokens:
            session.rewind(session.position - 1)
            finish = "stop"
            break
        answer.add(stops.push(decode(token)))
        if stops.reached:
            finish = "stop"
        yield from answer.released()
        # The last token is left to the last check.
        if answer.tokens < max_tokens and finish == "length" and answer.check_is_due():
            yield from answer.checked((yield from judged("response")))
            yield from answer.released()
    answer.waiting.append(stops.rest())
    if answer.needs_last_check():
        yield from answer.checked((yield from judged("response")), last=True)
    yield from answer.released()
    if answer.failed:
        failed.add("response")
    yield answer.end(prompt_verdict, finish, frozenset(failed))


@dataclass(slots=True)
class _Answer:
    """An answer in the making: the text that has left, the text that waits, and what the checks found."""

    settings: StreamSettings
    tokens: int = 0
    left: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """The text of each token since the last check, "" where none became complete."""
    verdict: Verdict | None = None
    """Of the last check."""
    flags: list[Verdict] = field(default_factory=list)
    """The flagged verdicts that end the row of checks; once the answer is flagged, all since that run began."""
    flagged: bool = False
    failed: bool = False
    """The guard failed at one of the checks."""

    @property
    def withheld(self) -> bool:
        return self.settings.mode == "block" and (self.flagged or (self.failed and not self.settings.fail_open))

    def add(self, text: str) -> None:
        """One more token, and the text that became complete with it."""
        self.tokens += 1
        self.unchecked.append(text)
        self.waiting.append(text)

    def released(self) -> Iterator[str]:
        """The text that may leave now, if there is any: in ``block`` mode only what an unflagged check covers."""
        if self.settings.mode == "block" and (self.unchecked or self.flags or self.withheld):
            return
        text = "".join(self.waiting)
        self.waiting.clear()
        if text:
            self.left.append(text)
            yield text

    def check_is_due(self) -> bool:
        if self.settings.mode == "off":
            return False
        if len(self.unchecked) >= self.settings.check_every:
            return True
        # Of several sentence ends in a row the first is enough: something must have been said since the last check.
        return (
            self.settings.sentence_ends
            and _SENTENCE_END.search(self.unchecked[-1]) is not None
            and any(map(str.isalnum, "".join(self.unchecked)))
        )

    def checked(self, verdict: Verdict | None, *, last: bool = False) -> Iterator[Check]:
        """Take in the verdict on all tokens so far, None if the guard failed."""
        self.unchecked.clear()
        if verdict is None:
            self.failed = True
            return
        self.verdict = verdict
        if verdict.flagged:
            self.flags.append(verdict)
        elif not self.flagged:
            self.flags.clear()
        self.flagged = len(self.flags) >= (1 if last else self.settings.debounce)
        yield Check(self.tokens, verdict, self.flagged)

    def needs_last_check(self) -> bool:
        """Whether the whole answer is not judged yet; an empty answer is judged as well."""
        return self.settings.mode != "off" and (self.tokens == 0 or bool(self.unchecked))

    def end(
        self, prompt_verdict: Verdict | None, finish: Literal["stop", "length"], failed: frozenset[Target]
    ) -> ChatEnd:
        """What the chat ends with. No check can clear the flags that are left now."""
        self.flagged = bool(self.flags)
        verdict = max(self.flags, key=lambda flag: flag.score) if self.flagged else self.verdict
        response = "".join(self.left)
        if self.withheld:
            kept = "".join(self.waiting)
            return ChatEnd(response or None, prompt_verdict, verdict, "content_filter", failed, kept)
        return ChatEnd(response, prompt_verdict, verdict, finish, failed)


# A full stop counts before a blank and at the end of a token's text, not inside it ("3.14"). The escapes are the
# ideographic full stop and the full-width and half-width forms.
_SENTENCE_END = re.compile(r"""[.!?…]["'”’)\]»*_]*(?:\s|\Z)|[\u3002\uff01\uff1f\uff0e\uff61\n]""")
