"""An engine whose tokens and scores a test writes down, and what it finds in the events of a stream."""

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from guards import plain_calibration
from hypothesis import strategies as st

from lora_guard import ChatEnd, Check, StreamSettings, Verdict
from lora_guard.engine.stream import moderated
from lora_guard.verdict import GuardLogits

PROMPT_LENGTH = 5
PROMPT_END = 3
STOP = -1
CALIBRATION = plain_calibration(["a"])
EAGER = StreamSettings("block", check_every=1, sentence_ends=False)


@dataclass
class ScriptedSession:
    """Its tokens and the scores of each number of answer tokens are given; it records what was asked of it."""

    tokens: Sequence[int]
    scores: Callable[[int], float]
    prompt_score: float = 0.1
    position: int = PROMPT_LENGTH
    context: int = 10_000
    judged: list[tuple[str, int]] = field(default_factory=list)

    @property
    def room(self) -> int:
        return self.context - self.position

    def sample(self, *, temperature: float = 0.0, top_p: float = 1.0) -> int:
        self.position += 1
        return self.tokens[self.position - PROMPT_LENGTH - 1]

    def judge(self, target: str, at: int | None = None) -> GuardLogits:
        at = self.position if at is None else at
        assert at <= self.position
        self.judged.append((target, at))
        score = self.prompt_score if target == "prompt" else self.scores(at - PROMPT_LENGTH)
        return GuardLogits(math.log(score / (1 - score)), (0.0,))

    def rewind(self, position: int) -> None:
        assert position <= self.position
        self.position = position


@dataclass
class Script:
    """Stands in for an engine: token ``i`` is the ``i``-th piece of bytes, which may cut a character."""

    pieces: Sequence[bytes]
    scores: Callable[[int], float] = lambda tokens: 0.1
    prompt_score: float = 0.1
    stop: bool = True
    stop_tokens: frozenset[int] = frozenset({STOP})

    def decoder(self) -> Callable[[int], str]:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        return lambda token: decode(self.pieces[token])

    def session(self) -> ScriptedSession:
        tokens = [*range(len(self.pieces)), STOP]
        return ScriptedSession(tokens, self.scores, self.prompt_score)

    def start(self, settings: StreamSettings, session: ScriptedSession) -> Iterator[str | Check | ChatEnd]:
        longest = len(self.pieces) + self.stop
        engine: Any = self
        held: Any = session
        return moderated(engine, held, PROMPT_END, CALIBRATION.verdict, settings, max_tokens=longest)

    def run(self, settings: StreamSettings) -> list[str | Check | ChatEnd]:
        return list(self.start(settings, self.session()))

    def text(self, tokens: int) -> str:
        """The text that is complete after so many tokens."""
        return b"".join(self.pieces[:tokens]).decode("utf-8", "ignore")


def words(text: str) -> list[bytes]:
    """One token a word, its blank before it."""
    return [f" {word}".encode() for word in text.split(" ")]


def flagged_at(*positions: int) -> Callable[[int], float]:
    return lambda tokens: 0.9 if tokens in positions else 0.1


def texts(events: Sequence[object]) -> list[str]:
    return [event for event in events if isinstance(event, str)]


def checks(events: Sequence[object]) -> list[Check]:
    """Those of the answer."""
    return [event for event in events if isinstance(event, Check) and event.verdict.target == "response"]


def end_of(events: Sequence[object]) -> ChatEnd:
    end = events[-1]
    assert isinstance(end, ChatEnd)
    assert not any(isinstance(event, ChatEnd) for event in events[:-1])
    return end


def verdict_of(end: ChatEnd) -> Verdict:
    assert end.response_verdict is not None
    return end.response_verdict


# Letters, sentence ends, blanks and characters of two to four bytes.
ANSWERS = st.text(st.sampled_from("ab.!? \n。é🍞"), max_size=40)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Any text in tokens of any bytes, with any scores."""
    data = draw(ANSWERS).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)))))
    pieces = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    pieces = [piece for piece in pieces if piece]
    scores = draw(st.lists(st.sampled_from([0.1, 0.1, 0.7, 0.9]), min_size=len(pieces) + 1, max_size=len(pieces) + 1))
    return Script(pieces, scores.__getitem__, stop=draw(st.booleans()))


SETTINGS = st.builds(
    StreamSettings,
    mode=st.sampled_from(["score", "block"]),
    check_every=st.integers(1, 12),
    sentence_ends=st.booleans(),
    debounce=st.integers(1, 3),
)
