"""Streaming moderation by a guard: a real one's scores, one that fails, and answers that a stop sequence ends."""

from collections.abc import Callable
from typing import Any

import pytest
from guards import tiny_guard_folder
from hypothesis import given
from hypothesis import strategies as st
from scripted import (
    CALIBRATION,
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
    words,
)

from lora_guard import ChatEnd, Conversation, Guard, StreamSettings
from lora_guard.engine.session import Session
from lora_guard.engine.stream import Judgement, NextToken, moderation_steps
from lora_guard.verdict import GuardLogits


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
    settings = StreamSettings(mode, check_every, prompt_mode="off", sentence_ends=False)
    plain, with_stop = (answered(script, settings, lambda tokens: False, stop=stop) for stop in ([], ["a?z", ".z"]))
    shown, shown_with_stop = "".join(texts(plain)), "".join(texts(with_stop))
    end = end_of(plain)
    assert end_of(with_stop).finish_reason == end.finish_reason
    if end.finish_reason == "content_filter":  # what waits to become a stop sequence is withheld with the rest
        assert shown.startswith(shown_with_stop)
        assert len(shown) - len(shown_with_stop) < len("a?z")
    else:
        assert shown == shown_with_stop
