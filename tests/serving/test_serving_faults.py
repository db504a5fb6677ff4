"""Faults of the guard: each has a defined end, for the request that met it alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, InternalServerError
from servers import asked, serving, tiny_guard, until

from lora_guard import ChatEnd, Conversation, Guard
from lora_guard.serving.audit import read_audit
from lora_guard.verdict import GuardLogits

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return tiny_guard(tmp_path_factory.mktemp("guard"), threshold=1.0, token_head=True)


def raising(*_: Any) -> Any:
    raise RuntimeError("secret words")


def not_a_number(requests: Any) -> list[GuardLogits]:
    return [GuardLogits(float("nan"), (0.0, 0.0)) for _ in requests]


@pytest.mark.parametrize("fault", [raising, not_a_number])
def test_a_guard_that_fails_withholds_in_block_mode(guard: Guard, monkeypatch: Any, fault: Any, caplog: Any) -> None:
    monkeypatch.setattr(guard.engine, "judge", fault)
    with serving(guard) as server:
        blocked = server.post("/v1/chat/completions", asked("Hello", mode="block"))
        assert (blocked.status_code, blocked.json()["error"]["code"]) == (400, "content_filter")
        assert blocked.json()["error"]["moderation"]["input"]["type"] == "error"
        output = asked("Hello")
        output["moderation"]["policy"]["output"]["mode"] = "block"
        for stream in (False, True):
            answer = server.openai().chat.completions.create(**output, stream=stream)
            last = list(answer)[-1] if stream else answer
            assert last.moderation.output.type == "error"
            assert last.moderation.input.type == "error"
            if not stream:
                assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("content_filter", None)
        assert server.metric("guard_errors_total", stage="response") == 2
        assert server.metric("guard_errors_total", stage="prompt") == 3
    assert "secret words" not in caplog.text


def test_a_guard_that_fails_on_the_normalised_prompt_withholds_too(guard: Guard, monkeypatch: Any) -> None:
    monkeypatch.setattr(guard.engine, "score_windows", raising)
    with serving(guard) as server:
        blocked = server.post("/v1/chat/completions", asked("b\u200bake bread", mode="block"))
        assert (blocked.status_code, blocked.json()["error"]["code"]) == (400, "content_filter")
        assert blocked.json()["error"]["moderation"]["input"]["type"] == "error"
        assert server.metric("guard_errors_total", stage="prompt") == 1
        assert server.post("/v1/chat/completions", asked("bake bread", mode="block")).status_code == 200


def test_a_guard_that_fails_leaves_score_mode_its_answer(guard: Guard, monkeypatch: Any) -> None:
    *_, end = guard.chat(Conversation.of("Hello"), max_tokens=20)
    assert isinstance(end, ChatEnd)
    monkeypatch.setattr(guard.engine, "judge", raising)
    with serving(guard) as server:
        answer = server.openai().chat.completions.create(**asked("Hello"))
        assert answer.choices[0].message.content == end.response
        assert answer.moderation is not None
        assert answer.moderation.output.type == "error"


def test_only_by_configuration_does_unjudged_text_pass(guard: Guard, monkeypatch: Any) -> None:
    *_, end = guard.chat(Conversation.of("Hello"), max_tokens=20)
    assert isinstance(end, ChatEnd)
    monkeypatch.setattr(guard.engine, "judge", raising)
    with serving(guard, fail_open=True) as server:
        answer = server.openai().chat.completions.create(**asked("Hello", mode="block"))
        assert answer.choices[0].message.content == end.response
        assert answer.moderation is not None
        assert answer.moderation.output.type == "error"
        assert server.metric("fail_open_total", stage="prompt") == 1
        assert server.metric("fail_open_total", stage="response") == 1


def test_one_chats_fault_is_not_anothers(guard: Guard, monkeypatch: Any) -> None:
    judge = guard.engine.judge

    marked = guard.engine.renderer.chat(Conversation.of("bad text"))[0]

    def fails_on_marked(requests: Any) -> list[GuardLogits]:
        if any(session._ids[: len(marked)] == marked for session, *_ in requests):
            raise RuntimeError
        return judge(requests)

    monkeypatch.setattr(guard.engine, "judge", fails_on_marked)
    with serving(guard) as server, ThreadPoolExecutor(4) as clients:
        texts = ["bad text", "good one", "good two", "good three"]
        answers = list(clients.map(lambda text: server.post("/v1/chat/completions", asked(text, mode="block")), texts))
    assert [answer.status_code for answer in answers] == [400, 200, 200, 200]


def test_a_flag_behind_a_check_that_failed_counts_as_a_block(guard: Guard, tmp_path: Path, monkeypatch: Any) -> None:
    judge, failed = guard.engine.judge, threading.Event()

    def faulty(requests: Any) -> list[GuardLogits]:
        if requests[0][1] == "response" and not failed.is_set():
            failed.set()
            raise RuntimeError
        return judge(requests)

    monkeypatch.setattr(guard.engine, "judge", faulty)
    path = tmp_path / "audit.jsonl"
    with serving(guard, fail_open=True, audit=path) as server:
        body = asked("Hello", mode="block", lora_guard={"check_every": 4, "response_threshold": 0.0})
        choice = server.post("/v1/chat/completions", body).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert server.metric("blocked_total", stage="response") == 1
        assert server.metric("fail_open_total", stage="response") == 1
    assert [record["action"] for record in read_audit(path)][-2:] == ["fail_open", "blocked"]


@pytest.mark.parametrize("stage", ["prompt", "response"])
def test_a_guard_that_hangs_withholds_at_its_deadline(guard: Guard, monkeypatch: Any, stage: str) -> None:
    held = threading.Event()
    judge = guard.engine.judge

    def hanging(requests: Any) -> list[GuardLogits]:
        if requests[0][1] == stage:
            held.wait(60)
        return judge(requests)

    monkeypatch.setattr(guard.engine, "judge", hanging)
    with serving(guard, guard_deadline=0.2) as server:
        response = server.post("/v1/chat/completions", asked("Hello", mode="block"))
        if stage == "prompt":
            assert (response.status_code, response.json()["error"]["code"]) == (400, "content_filter")
        else:
            answer = response.json()
            assert answer["choices"][0]["finish_reason"] == "content_filter"
            assert answer["moderation"]["output"]["type"] == "error"
            assert answer["moderation"]["input"]["type"] == "moderation_results"
        assert server.metric("guard_errors_total", stage=stage) == 1
        assert server.metric("blocked_total", stage="prompt") == server.metric("blocked_total", stage="response") == 0
        # While it hangs, the server is alive but not ready, and says so at once.
        until(lambda: server.get("/ready").status_code == 503)
        assert server.get("/health").status_code == 200
        with pytest.raises(InternalServerError) as error:
            server.openai().moderations.create(input="Hello")
        assert (error.value.status_code, error.value.code) == (503, "unavailable")
        assert int(error.value.response.headers["retry-after"]) > 0
        held.set()
        until(lambda: server.get("/ready").status_code == 200)
        assert server.post("/v1/moderations", {"input": "Hello"}).status_code == 200


def test_requests_behind_a_guard_that_hangs_fail_with_it_not_at_their_own_deadline(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, held = threading.Event(), threading.Event()

    def hanging(requests: Any) -> list[GuardLogits]:
        began.set()
        held.wait()
        raise RuntimeError

    monkeypatch.setattr(guard.engine, "judge", hanging)
    with serving(guard, guard_deadline=1.0, deadline=3600.0) as server, ThreadPoolExecutor(3) as clients:
        first = clients.submit(server.post, "/v1/chat/completions", asked("Hello", mode="block"))
        assert began.wait(60)
        chat = clients.submit(server.post, "/v1/chat/completions", asked("Hello", mode="block"))
        texts = clients.submit(server.post, "/v1/moderations", {"input": "Hello"})
        assert first.result().json()["error"]["code"] == "content_filter"
        for reply in (chat.result(), texts.result()):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
        held.set()
        until(lambda: server.metric("queue_depth") == 0)  # the worker forgets them when the pass ends
        assert server.post("/v1/moderations", {"input": "Hello"}).status_code == 200


def test_requests_behind_a_guard_that_hangs_fail_even_if_the_one_it_judged_for_has_left(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, held = threading.Event(), threading.Event()
    score = guard.engine.score_windows

    def hanging(rows: Any) -> list[GuardLogits]:
        began.set()
        held.wait()
        return score(rows)

    monkeypatch.setattr(guard.engine, "score_windows", hanging)
    with serving(guard, guard_deadline=1.0, deadline=3600.0) as server, ThreadPoolExecutor(1) as clients:
        leaving = HTTPConnection(server.url.removeprefix("http://"))
        leaving.request("POST", "/v1/moderations", '{"input": "Hello"}', {"content-type": "application/json"})
        assert began.wait(60)
        behind = clients.submit(server.post, "/v1/moderations", {"input": "Hello"})
        until(lambda: server.metric("queue_depth") == 2)
        leaving.close()
        reply = behind.result()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
        held.set()
        until(lambda: server.metric("queue_depth") == 0)


def test_a_failed_moderation_is_an_error_for_it_alone(guard: Guard, monkeypatch: Any) -> None:
    score = guard.engine.score_windows
    marked = guard.engine.windows(Conversation.of("bad text"), "prompt")[0]

    def faulty(rows: Any) -> list[GuardLogits]:
        if marked in rows:
            raise RuntimeError
        return score(rows)

    monkeypatch.setattr(guard.engine, "score_windows", faulty)
    with serving(guard) as server, ThreadPoolExecutor(4) as clients:
        inputs = ["good one", ["good", "bad text"], "good two", "bad text"]
        answers = list(clients.map(lambda text: server.post("/v1/moderations", {"input": text}), inputs))
        assert [answer.status_code for answer in answers] == [200, 503, 200, 503]
        assert answers[1].json()["error"]["code"] == "guard_error"
        assert server.metric("guard_errors_total", stage="prompt") == 2


def test_an_engine_fault_outside_any_request_does_not_stop_the_thread(guard: Guard, monkeypatch: Any) -> None:
    with serving(guard, batch_decode=True) as server:
        with monkeypatch.context() as patch:
            patch.setattr(guard.engine, "decode", raising)
            with pytest.raises(APIStatusError) as error:
                server.openai().chat.completions.create(**asked("Hello"))
            assert error.value.status_code == 500
        assert server.post("/v1/chat/completions", asked("Hello")).status_code == 200
