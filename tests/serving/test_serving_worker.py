"""The engine worker: nothing lost or crossed, and nobody starved."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from openai import RateLimitError
from servers import Running, asked, serving, tiny_guard, until

from lora_guard import ChatEnd, Conversation, Guard
from lora_guard.verdict import GuardLogits

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return tiny_guard(tmp_path_factory.mktemp("guard"), threshold=1.0, token_head=True)


@pytest.fixture(scope="module")
def server(guard: Guard) -> Iterator[Running]:
    with serving(guard) as running:
        yield running


def test_answers_and_scores_of_many_clients_are_those_computed_alone(server: Running, guard: Guard) -> None:
    texts = [f"{'Tell me about ' * (i % 4)}number {i}" for i in range(24)]
    ends = []
    for text in texts:
        *_, end = guard.chat(Conversation.of(text), max_tokens=20)
        assert isinstance(end, ChatEnd)
        ends.append(end)
    verdicts = guard.moderate([Conversation.of(text) for text in texts])
    with ThreadPoolExecutor(24) as clients:
        chats = [clients.submit(server.post, "/v1/chat/completions", asked(text)) for text in texts]
        scored = [clients.submit(server.post, "/v1/moderations", {"input": [text, text[::-1]]}) for text in texts]
    for end, chat in zip(ends, chats, strict=True):
        answer = chat.result().json()
        assert answer["choices"][0]["message"]["content"] == end.response
        score = answer["moderation"]["output"]["results"][0]["score"]
        assert end.response_verdict is not None
        assert score == pytest.approx(end.response_verdict.score, abs=1e-5)
    for verdict, future in zip(verdicts, scored, strict=True):
        first, second = future.result().json()["results"]
        assert first["score"] == pytest.approx(verdict.score, abs=1e-5)
        assert first["score"] != second["score"]


@pytest.mark.parametrize("batch_decode", [False, True])
def test_chats_are_decoded_in_turn_or_together(guard: Guard, batch_decode: bool, monkeypatch: Any) -> None:
    together: list[int] = []
    decode = guard.engine.decode

    def counted(sessions: Any, *, batch: bool = False) -> None:
        together.append(len(sessions) if batch else 1)
        decode(sessions, batch=batch)

    monkeypatch.setattr(guard.engine, "decode", counted)
    with serving(guard, batch_decode=batch_decode) as server, ThreadPoolExecutor(4) as clients:
        bodies = [asked(f"Number {i}", 40) for i in range(4)]
        answers = [
            future.json() for future in clients.map(lambda body: server.post("/v1/chat/completions", body), bodies)
        ]
    assert all(len(answer["choices"][0]["message"]["content"]) > 0 for answer in answers)
    assert (max(together) > 1) == batch_decode


def test_judgements_of_several_chats_share_a_pass(guard: Guard, monkeypatch: Any) -> None:
    rows: list[int] = []
    judge = guard.engine.judge
    monkeypatch.setattr(guard.engine, "judge", lambda requests: rows.append(len(requests)) or judge(requests))
    with serving(guard) as server, ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda i: server.post("/v1/chat/completions", asked(f"Number {i}", 64)), range(4)))
    assert max(rows) > 1


def test_a_chats_prompt_is_judged_in_both_forms(server: Running, guard: Guard) -> None:
    texts = [f"b\u200bake {n} br\u0435ads" for n in range(8)]
    raw: list[float] = []
    both: list[float] = []
    for text in texts:
        session = guard.session()
        ids, end = guard.engine.renderer.chat(Conversation.of(text))
        session.append(ids)
        judged = guard.with_tokens(session.judge("prompt", end), Conversation.of(text), "prompt")
        raw.append(guard.verdict(judged, "prompt").score)
        both.append(guard.moderate(Conversation.of(text)).score)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda text: server.post("/v1/chat/completions", asked(text)).json(), texts))
    scores = [answer["moderation"]["input"]["results"][0]["score"] for answer in answers]
    assert scores == pytest.approx(both, abs=1e-5)
    assert scores != pytest.approx(raw, abs=1e-5)  # of some prompts, the normalised form is the riskier


def test_a_short_request_does_not_wait_for_a_long_one(server: Running, guard: Guard, monkeypatch: Any) -> None:
    """Passes are counted, not seconds: between the arrival of the short request and its answer."""
    sizes: list[int] = []
    score = guard.engine.score_windows
    begun = threading.Event()

    def counted(rows: Any) -> list[GuardLogits]:
        begun.set()
        sizes.append(len(rows))
        time.sleep(0.002)
        return score(rows)

    monkeypatch.setattr(guard.engine, "score_windows", counted)
    with ThreadPoolExecutor(2) as clients:
        long = clients.submit(server.post, "/v1/moderations", {"input": [f"text {i} " * 30 for i in range(60)]})
        begun.wait()
        before = len(sizes)
        short = server.post("/v1/moderations", {"input": "Hello"})
        passes = len(sizes) - before
        assert short.status_code == 200
        assert not long.done()
        assert passes <= 20
        assert long.result().status_code == 200


def test_moderation_does_not_wait_for_a_chat_nor_stop_it(server: Running, guard: Guard) -> None:
    with ThreadPoolExecutor(2) as clients:
        chat = clients.submit(server.post, "/v1/chat/completions", asked("Hello", 400))
        until(lambda: server.metric("queue_depth") > 0)
        for _ in range(3):
            assert server.post("/v1/moderations", {"input": "Hello"}).status_code == 200
        assert not chat.done()
        *_, end = guard.chat(Conversation.of("Hello"), max_tokens=400)
        assert isinstance(end, ChatEnd)
        assert chat.result().json()["choices"][0]["message"]["content"] == end.response


def test_moderation_does_not_wait_while_a_prompt_is_read(guard: Guard, monkeypatch: Any) -> None:
    reading, arrived = threading.Event(), threading.Event()
    done: list[str] = []
    read, score = guard.engine.next_logits, guard.engine.score_windows  # type: ignore[attr-defined]

    def next_logits(ids: Any, cache: Any, between: Any = None) -> Any:
        if between:
            reading.set()
            arrived.wait(60)
        logits = read(ids, cache, between)
        done.append("read")
        return logits

    monkeypatch.setattr(guard.engine, "next_logits", next_logits)
    monkeypatch.setattr(guard.engine, "score_windows", lambda rows: done.append("judged") or score(rows))
    *_, end = guard.chat(Conversation.of("Hello"), max_tokens=20)
    assert isinstance(end, ChatEnd)
    done.clear()
    with serving(guard) as server, ThreadPoolExecutor(2) as clients:
        chat = clients.submit(server.post, "/v1/chat/completions", asked("Hello"))
        assert reading.wait(60)
        moderation = clients.submit(server.post, "/v1/moderations", {"input": "Hello"})
        until(lambda: server.metric("queue_depth") == 2)
        arrived.set()
        score_then = moderation.result().json()["results"][0]["score"]
        assert chat.result().json()["choices"][0]["message"]["content"] == end.response
    assert done[:2] == ["judged", "read"]
    assert score_then == pytest.approx(guard.moderate(Conversation.of("Hello")).score, abs=1e-5)


def test_a_full_queue_says_when_to_try_again(guard: Guard, monkeypatch: Any) -> None:
    held = threading.Event()
    score = guard.engine.score_windows
    monkeypatch.setattr(guard.engine, "score_windows", lambda rows: held.wait(60) and score(rows))
    with serving(guard, queue=2) as server, ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(server.post, "/v1/moderations", {"input": "Hello"}) for _ in range(2)]
        until(lambda: server.metric("queue_depth") == 2)
        with pytest.raises(RateLimitError) as error:
            server.openai().moderations.create(input="Hello")
        assert error.value.code == "queue_full"
        assert int(error.value.response.headers["retry-after"]) >= 1
        held.set()
        assert [future.result().status_code for future in waiting] == [200, 200]
        assert server.post("/v1/moderations", {"input": "Hello"}).status_code == 200


def test_a_request_ends_at_its_deadline(guard: Guard, monkeypatch: Any) -> None:
    with serving(guard, deadline=0.2) as server:
        sample = guard.engine.next_logits  # type: ignore[attr-defined]
        monkeypatch.setattr(guard.engine, "next_logits", lambda *how: time.sleep(0.05) or sample(*how))
        response = server.post("/v1/chat/completions", asked("Hello", 400))
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        until(lambda: server.metric("queue_depth") == 0)
        streamed = server.post("/v1/chat/completions", asked("Hello", 400, stream=True)).text
        assert '"code": "deadline_exceeded"' in streamed
        until(lambda: server.metric("queue_depth") == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_ends_the_generation(guard: Guard, monkeypatch: Any, stream: bool) -> None:
    steps = []
    sample = guard.engine.next_logits  # type: ignore[attr-defined]
    monkeypatch.setattr(guard.engine, "next_logits", lambda *how: steps.append(time.sleep(0.01)) or sample(*how))
    with serving(guard) as server:
        body = json.dumps(asked("Hello", 400, stream=stream)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: len(steps) > 10)
        until(lambda: server.metric("queue_depth") == 0)
        assert len(steps) < 400
        assert server.post("/v1/moderations", {"input": "Hello"}).status_code == 200


def test_a_disguised_prompt_is_judged_in_pieces_while_other_chats_go_on(guard: Guard, monkeypatch: Any) -> None:
    score, sizes = guard.engine.score_windows, list[int]()
    plain = Conversation.of("good " * 60)

    def counted(rows: Any) -> list[GuardLogits]:
        sizes.append(len(rows))
        return score(rows)

    monkeypatch.setattr(guard.engine, "score_windows", counted)
    disguised = "go\u200bod " * 60
    pieces = len(guard.engine.windows(plain, "prompt"))
    assert pieces > 1
    with serving(guard, batch_tokens=32) as server, ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda text: server.post("/v1/chat/completions", asked(text)), [disguised, "Hello"]))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert sizes == [1] * pieces
    score_of = answers[0].json()["moderation"]["input"]["results"][0]["score"]
    assert score_of >= guard.moderate(plain).score - 1e-5


def test_what_a_prompt_becomes_without_its_disguises_is_bounded(guard: Guard) -> None:
    with serving(guard, max_input_tokens=1000) as server:
        response = server.post("/v1/chat/completions", asked("\ufdfa" * 60))
        assert response.status_code == 400
        assert "without its disguises the prompt has over 1000 tokens" in response.json()["error"]["message"]
        assert server.post("/v1/moderations", {"input": "\ufdfa" * 60}).status_code == 400


def test_an_answer_ends_with_the_context(server: Running) -> None:
    used = server.post("/v1/chat/completions", asked("x" * 400, 1)).json()["usage"]["prompt_tokens"]
    body = asked("x" * (400 + 512 - used - 10), 60)
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 0 < answer["usage"]["completion_tokens"] <= 10
    assert answer["moderation"]["output"]["type"] == "moderation_results"


def test_shutdown_finishes_what_is_under_way(guard: Guard) -> None:
    with ThreadPoolExecutor(1) as clients:
        with serving(guard) as server:
            chat = clients.submit(server.post, "/v1/chat/completions", asked("Hello", 200))
            until(lambda: server.metric("queue_depth") > 0)
        assert chat.result().status_code == 200
    with pytest.raises(httpx2.TransportError):
        server.get("/health")
