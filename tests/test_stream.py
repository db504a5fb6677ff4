"""Streaming moderation: what is flagged never leaves in block mode, all else arrives complete, and a flag stays."""

import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as trials
from scripted import (
    EAGER,
    PROMPT_END,
    PROMPT_LENGTH,
    SETTINGS,
    Script,
    checks,
    end_of,
    flagged_at,
    scripts,
    texts,
    verdict_of,
    words,
)

from lora_guard import ChatEnd, Check, StreamSettings
from lora_guard.errors import InputError


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
