"""Streaming moderation: what is flagged never leaves in block mode, all else arrives complete, and a flag stays."""

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from guards import plain_calibration, tiny_guard_folder
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from lora_guard import ChatEnd, Check, Conversation, Guard, StreamSettings, Verdict
from lora_guard.engine.session import Session
from lora_guard.engine.stream import Judgement, NextToken, moderated, moderation_steps
from lora_guard.errors import InputError
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


@trials(max_examples=200)
@given(scripts(), SETTINGS)
def test_in_block_mode_no_text_leaves_before_an_unflagged_check_covers_it(
    script: Script, settings: StreamSettings
) -> None:
    """Replays the events: at each text, the last check so far must be unflagged and cover all that has left."""
    session = script.session()
    left, last = "", None
    for event in script.start(settings, session):
        if isinstance(event, Check) and event.verdict.target == "response":
            last = event
        if isinstance(event, str):
            left += event
            if settings.mode == "block":
                assert last is not None
                assert not last.verdict.flagged
                assert not last.flagged
                assert left == script.text(last.tokens)


@trials(max_examples=200)
@given(scripts(), SETTINGS)
def test_no_text_past_the_first_flagged_check_is_ever_shown(script: Script, settings: StreamSettings) -> None:
    events = script.run(settings)
    end = end_of(events)
    shown = "".join(texts(events))
    if settings.mode == "score" or end.finish_reason != "content_filter":
        return
    run = [check for check in checks(events)]
    while run and run[-1].verdict.flagged:
        run.pop()
    assert shown == script.text(run[-1].tokens if run else 0)
    assert end.response == (shown or None)
    assert verdict_of(end).flagged


@trials(max_examples=200)
@given(scripts(), SETTINGS)
def test_an_unflagged_answer_arrives_complete_and_in_order(script: Script, settings: StreamSettings) -> None:
    events = script.run(settings)
    end = end_of(events)
    if settings.mode == "score" or not verdict_of(end).flagged:
        assert "".join(texts(events)) == end.response == script.text(len(script.pieces))
        assert end.finish_reason == ("stop" if script.stop else "length")
    else:
        assert end.finish_reason == "content_filter"
    assert all(texts(events))


@trials(max_examples=200)
@given(scripts(), SETTINGS)
def test_what_is_flagged_is_what_the_checks_say(script: Script, settings: StreamSettings) -> None:
    """The debounce, told from the scores alone: k flags in a row, or one at the last check."""
    events = script.run(settings)
    found = checks(events)
    row, latched = 0, False
    for index, check in enumerate(found):
        row = row + 1 if script.scores(check.tokens) >= 0.5 else 0
        assert check.verdict.flagged == (row > 0)
        latched = latched or row >= settings.debounce
        if index < len(found) - 1:
            assert check.flagged == latched
    assert verdict_of(end_of(events)).flagged == (latched or row > 0)


@given(scripts(), SETTINGS)
def test_checks_are_never_further_apart_than_asked_never_twice_at_a_place_and_reach_the_end(
    script: Script, settings: StreamSettings
) -> None:
    session = script.session()
    events = list(script.start(settings, session))
    places = [check.tokens for check in checks(events)]
    assert session.judged == [("prompt", PROMPT_END), *(("response", PROMPT_LENGTH + place) for place in places)]
    gaps = [place - before for before, place in zip([0, *places], places, strict=False)]
    if script.pieces:
        assert all(1 <= gap <= settings.check_every for gap in gaps)
        if not settings.sentence_ends:
            assert all(gap == settings.check_every for gap in gaps[:-1])
    if end_of(events).finish_reason != "content_filter":
        assert places[-1] == len(script.pieces)


@given(scripts(), SETTINGS)
def test_the_mode_changes_nothing_but_what_is_shown(script: Script, settings: StreamSettings) -> None:
    """Block mode makes the checks of score mode, up to the flag."""
    fields = {name: getattr(settings, name) for name in ("check_every", "sentence_ends", "debounce")}
    scored, blocked = (checks(script.run(StreamSettings(mode, **fields))) for mode in ("score", "block"))
    assert blocked == scored[: len(blocked)]
    assert len(blocked) == len(scored) or blocked[-1].flagged


def test_score_mode_yields_each_text_at_once_and_its_check_behind_it() -> None:
    events = Script(words("a b c"), flagged_at(2)).run(StreamSettings("score", 2))
    kinds = [event if isinstance(event, str) else type(event).__name__ for event in events]
    assert kinds == ["Check", " a", " b", "Check", " c", "Check", "ChatEnd"]


def test_block_mode_yields_the_cleared_text_behind_its_check() -> None:
    events = Script(words("a b c")).run(StreamSettings("block", 2))
    kinds = [event if isinstance(event, str) else type(event).__name__ for event in events]
    assert kinds == ["Check", "Check", " a b", "Check", " c", "ChatEnd"]


def test_block_mode_generates_nothing_behind_a_flag() -> None:
    script = Script(words("a b c d e f"), flagged_at(4))
    session = script.session()
    events = list(script.start(StreamSettings("block", 2), session))
    assert session.position == PROMPT_LENGTH + 4
    assert texts(events) == [" a b"]
    assert end_of(events).finish_reason == "content_filter"
    assert end_of(events).response == " a b"


def test_a_flag_stays_whatever_later_checks_say() -> None:
    events = Script(words("a b c d"), {1: 0.1, 2: 0.8, 3: 0.1, 4: 0.2}.__getitem__).run(StreamSettings("score", 1))
    assert [check.flagged for check in checks(events)] == [False, True, True, True]
    assert [check.verdict.flagged for check in checks(events)] == [False, True, False, False]
    assert verdict_of(end_of(events)).score == pytest.approx(0.8)
    assert end_of(events).finish_reason == "stop"


def test_the_verdict_on_a_flagged_answer_is_its_highest_flag() -> None:
    scores = {1: 0.95, 2: 0.1, 3: 0.8, 4: 0.6, 5: 0.1}.__getitem__
    events = Script(words("a b c d e"), scores).run(StreamSettings("score", 1, debounce=2))
    assert verdict_of(end_of(events)).score == pytest.approx(0.8)  # the 0.95 was cleared


def test_the_verdict_on_an_unflagged_answer_is_that_on_all_of_it() -> None:
    events = Script(words("a b"), {1: 0.4, 2: 0.2}.__getitem__).run(StreamSettings("score", 1))
    assert verdict_of(end_of(events)).score == pytest.approx(0.2)


def test_text_of_a_flag_that_is_not_confirmed_waits_for_the_check_that_clears_it() -> None:
    settings = StreamSettings("block", 1, debounce=3)
    events = Script(words("a b c d"), flagged_at(2, 3)).run(settings)
    assert texts(events) == [" a", " b c d"]
    assert end_of(events).finish_reason == "stop"
    assert not verdict_of(end_of(events)).flagged
    events = Script(words("a b c d e"), flagged_at(2, 3, 4)).run(settings)
    assert texts(events) == [" a"]
    assert [check.flagged for check in checks(events)] == [False, False, False, True]


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("check_every", [1, 2, 5])
@pytest.mark.parametrize("mode", ["score", "block"])
def test_a_flag_at_the_last_check_needs_no_second(
    mode: Literal["score", "block"], check_every: int, stop: bool
) -> None:
    events = Script(words("a b"), flagged_at(2), stop=stop).run(StreamSettings(mode, check_every, debounce=3))
    assert verdict_of(end_of(events)).flagged
    if not stop or check_every == 5:  # else the check at the last token is made before it is known to be the last
        assert checks(events)[-1].flagged
    if mode == "block":
        assert texts(events) == ([" a"] if check_every == 1 else [])
        assert end_of(events).finish_reason == "content_filter"


def test_a_flagged_prompt_is_not_answered_in_block_mode_only() -> None:
    script = Script(words("a b"), prompt_score=0.9)
    session = script.session()
    check, end = script.start(EAGER, session)
    assert isinstance(check, Check)
    assert (check.tokens, check.verdict.target, check.flagged) == (0, "prompt", True)
    assert end == ChatEnd(None, check.verdict, None, "content_filter")
    assert session.position == PROMPT_LENGTH
    assert texts(script.run(StreamSettings("score"))) == [" a", " b"]


@pytest.mark.parametrize("mode", ["score", "block"])
def test_the_prompts_verdict_comes_before_the_first_token(mode: Literal["score", "block"]) -> None:
    script = Script(words("a b"))
    session = script.session()
    first = next(script.start(StreamSettings(mode), session))
    assert isinstance(first, Check)
    assert first.verdict.target == "prompt"
    assert session.position == PROMPT_LENGTH


def test_each_target_has_a_threshold_of_its_own() -> None:
    script = Script(words("a b"), lambda tokens: 0.6, prompt_score=0.6)
    for prompt, response, finish in ((0.7, 0.7, "stop"), (0.6, None, "content_filter"), (0.7, 0.5, "content_filter")):
        settings = StreamSettings("block", prompt_threshold=prompt, response_threshold=response)
        end = end_of(script.run(settings))
        assert end.finish_reason == finish
        assert end.prompt_verdict.threshold == prompt
        assert end.prompt_verdict.flagged == (prompt == 0.6)
        if end.response_verdict is not None:
            assert end.response_verdict.threshold == response
            assert end.response_verdict.categories["a"].threshold == 0.5  # harmfulness alone


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ([b"Mix", b" it", b".", b" Wait", b".", b" Bake"], [3, 5, 6]),
        ([b"So", b".", b".", b".", b"\n", b"\n", b"b"], [2, 7]),
        ([b"So", b"?!", b"b"], [2, 3]),
        ([b'"Yes', b'."', b" b"], [2, 3]),
        ([b" 3.14", b" v2.0", b" b"], [3]),
        (["你好".encode(), "。".encode(), "我".encode()], [2, 3]),
        (["好".encode(), "。"[:1].encode()[:2], "。".encode()[2:], b"b"], [3, 4]),
        ([b"a", b"\n", b"b"], [2, 3]),
        ([b".", b"\n", b"!"], [3]),
    ],
)
def test_a_sentence_is_checked_at_its_end_once(text: list[bytes], places: list[int]) -> None:
    events = Script(text).run(StreamSettings("score", 100))
    assert [check.tokens for check in checks(events)] == places
    events = Script(text).run(StreamSettings("score", 100, sentence_ends=False))
    assert [check.tokens for check in checks(events)] == [len(text)]


def test_a_character_leaves_only_behind_a_check_of_its_last_byte() -> None:
    bread = "🍞".encode()
    script = Script([b"a", bread[:2], bread[2:], b"b"], flagged_at(3))
    assert texts(script.run(EAGER)) == ["a"]
    script = Script([b"a", bread[:2], bread[2:], b"b"], flagged_at(4))
    assert texts(script.run(EAGER)) == ["a", "🍞"]


@pytest.mark.parametrize("mode", ["score", "block"])
def test_bytes_of_a_character_cut_off_by_the_end_are_dropped(mode: Literal["score", "block"]) -> None:
    end = end_of(Script([b"a", "🍞".encode()[:2]]).run(StreamSettings(mode)))
    assert end.response == "a"


@pytest.mark.parametrize("mode", ["score", "block"])
def test_an_empty_answer_is_judged_and_ends(mode: Literal["score", "block"]) -> None:
    events = Script([]).run(StreamSettings(mode))
    assert [check.tokens for check in checks(events)] == [0]
    assert end_of(events).response == ""
    assert end_of(events).finish_reason == "stop"


@pytest.mark.parametrize("settings", [EAGER, StreamSettings("score", 2), StreamSettings("block", 3, debounce=2)])
def test_a_session_is_usable_wherever_its_stream_is_closed(settings: StreamSettings) -> None:
    script = Script(words("a b c d. e f"))
    for events in range(1, len(script.run(settings))):
        session = script.session()
        stream = script.start(settings, session)
        for _ in range(events):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        tokens = session.position - PROMPT_LENGTH
        rest = [session.sample() for _ in range(len(script.pieces) - tokens)]
        assert rest == list(range(tokens, len(script.pieces)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "blok"}, "mode 'blok' is unknown; did you mean 'block'? allowed: off, score, block"),
        ({"check_every": 0}, "check_every is 0; allowed: 1 or more"),
        ({"debounce": -1}, "debounce is -1; allowed: 1 or more"),
        ({"prompt_threshold": 1.5}, "prompt_threshold is 1.5; allowed: 0 to 1"),
        ({"response_threshold": math.nan}, "response_threshold is nan; allowed: 0 to 1"),
    ],
)
def test_settings_outside_what_is_allowed_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        StreamSettings(**settings)
    assert str(error.value) == message


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return Guard.load(tiny_guard_folder(tmp_path_factory.mktemp("guard"), threshold=1.0), precision="fp32")


def drawn_tokens(guard: Guard, monkeypatch: pytest.MonkeyPatch, settings: StreamSettings) -> list[int]:
    """The tokens that a stream draws on the tiny guard at temperature 1."""
    tokens: list[int] = []
    make = guard.engine.session

    def recorded(*, seed: int = 0) -> Session:
        session: Any = make(seed=seed)
        sample = session.sample
        session.sample = lambda **how: tokens.append(sample(**how)) or tokens[-1]
        return session  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(guard.engine, "session", recorded)
        list(guard.stream(Conversation.of("Hello"), settings, max_tokens=24, temperature=1.0, seed=3))
    return tokens


def test_checks_change_no_token_of_an_answer(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    session = guard.session(seed=3)
    session.append(guard.engine.renderer.chat(Conversation.of("Hello"))[0])
    expected = [session.sample(temperature=1.0) for _ in range(24)]
    assert not guard.engine.stop_tokens & set(expected)
    for settings in (EAGER, StreamSettings("score", 1), StreamSettings("block", 7), StreamSettings("score", 1000)):
        assert drawn_tokens(guard, monkeypatch, settings) == expected


def test_a_real_guards_scores_block_what_they_flag(guard: Guard) -> None:
    """Score mode gives the score at each token; the same run with the highest as threshold ends there."""
    asked, how = Conversation.of("Hello"), {"max_tokens": 24, "seed": 3}
    scored = list(guard.stream(asked, StreamSettings("score", 1), temperature=1.0, **how))  # type: ignore[arg-type]
    highest = max(checks(scored)[1:], key=lambda check: check.verdict.score)
    settings = StreamSettings("block", 1, response_threshold=highest.verdict.score - 1e-4)
    first = next(c for c in checks(scored) if c.verdict.score >= highest.verdict.score - 1e-4)
    blocked = list(guard.stream(asked, settings, temperature=1.0, **how))  # type: ignore[arg-type]
    assert checks(blocked)[-1].tokens == first.tokens
    covered = scored[: scored.index(checks(scored)[first.tokens - 2])] if first.tokens > 1 else []
    assert "".join(texts(blocked)) == "".join(texts(covered))
    assert end_of(blocked).finish_reason == "content_filter"


def answered(script: Script, settings: StreamSettings, failing: Callable[[int], bool], **more: Any) -> list[Any]:
    """Drive the steps as a server does; the guard fails at the checks that ``failing`` names by their tokens."""
    session: Any = script.session()
    engine: Any = script
    steps = moderation_steps(
        engine, session, PROMPT_END, CALIBRATION.verdict, settings, max_tokens=len(script.pieces) + script.stop, **more
    )
    events: list[Any] = []
    reply: GuardLogits | None = None
    while True:
        try:
            step = steps.send(reply)
        except StopIteration:
            return events
        reply = None
        if isinstance(step, Judgement):
            at = 0 if step.target == "prompt" else session.position - PROMPT_LENGTH
            reply = None if failing(at) else session.judge(step.target, step.at)
        elif not isinstance(step, NextToken):
            events.append(step)


FIVE = Script(words("one two three four five"))


@pytest.mark.parametrize("at", range(6))
def test_a_guard_that_fails_withholds_what_it_did_not_judge(at: int) -> None:
    events = answered(FIVE, EAGER, lambda tokens: tokens == at)
    end = end_of(events)
    assert end.finish_reason == "content_filter"
    assert end.failed == {"prompt" if at == 0 else "response"}
    assert "".join(texts(events)) == FIVE.text(max(0, at - 1))


@pytest.mark.parametrize("settings", [StreamSettings("score", 1), StreamSettings("block", 1, fail_open=True)])
def test_a_failed_check_lets_text_pass_only_where_that_was_chosen(settings: StreamSettings) -> None:
    events = answered(FIVE, settings, lambda tokens: tokens in (0, 2))
    end = end_of(events)
    assert "".join(texts(events)) == FIVE.text(5)
    assert end.finish_reason == "stop"
    assert end.failed == {"prompt", "response"}
    assert end.prompt_verdict is None
    assert [check.tokens for check in checks(events)] == [1, 3, 4, 5]


@given(scripts(), SETTINGS)
def test_one_pass_at_a_time_gives_the_events_of_the_whole(script: Script, settings: StreamSettings) -> None:
    assert answered(script, settings, lambda tokens: False) == script.run(settings)


def test_prompt_and_answer_have_modes_of_their_own() -> None:
    harmful = Script(words("one two"), flagged_at(1, 2), prompt_score=0.9)
    session = harmful.session()
    events = list(harmful.start(StreamSettings("off", prompt_mode="score"), session))
    assert [target for target, _ in session.judged] == ["prompt"]
    assert end_of(events) == ChatEnd(harmful.text(2), end_of(events).prompt_verdict, None, "stop")
    session = harmful.session()
    end = end_of(list(harmful.start(StreamSettings("block", 1, prompt_mode="off"), session)))
    assert [target for target, _ in session.judged] == ["response"]
    assert (end.finish_reason, end.prompt_verdict) == ("content_filter", None)


@pytest.mark.parametrize("mode", ["off", "score", "block"])
def test_an_answer_ends_before_a_stop_sequence(mode: Any) -> None:
    events = answered(FIVE, StreamSettings(mode, 1, prompt_mode="off"), lambda tokens: False, stop=["e fo", "six"])
    assert "".join(texts(events)) == " one two thre"
    assert end_of(events).finish_reason == "stop"


@given(scripts(), st.sampled_from(["off", "score", "block"]), st.integers(1, 4))
def test_a_stop_sequence_that_never_comes_changes_no_text(script: Script, mode: Any, check_every: int) -> None:
    settings = StreamSettings(mode, check_every, prompt_mode="off")
    plain, with_stop = (answered(script, settings, lambda tokens: False, stop=stop) for stop in ([], ["a?z", ".z"]))
    assert "".join(texts(plain)) == "".join(texts(with_stop))
