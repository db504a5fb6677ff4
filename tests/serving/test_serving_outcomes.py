"""What ends badly is counted and audited as what it was: failed judgements, broken streams, clients that leave."""

import socket
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from servers import Running, serving, tiny_guard, until

from lora_guard import Conversation, Guard
from lora_guard.serving import completions, run
from lora_guard.serving.audit import read_audit, text_hash
from lora_guard.serving.config import ServeConfig

pytestmark = pytest.mark.extras

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return tiny_guard(tmp_path_factory.mktemp("guard"), threshold=1.0)


def asked(input: str, output: str, **more: Any) -> dict[str, Any]:
    policy = {"input": {"mode": input}, "output": {"mode": output}}
    messages = [{"role": "user", "content": "Hello"}]
    moderation = {"model": "any", "policy": policy}
    return {"model": "any", "messages": messages, "max_tokens": 20, "temperature": 0, "moderation": moderation, **more}


def requests(server: Running, route: str, status: str) -> float:
    return server.metric("requests_total", route=route, status=status)


def fails(*_: Any) -> Any:
    raise RuntimeError("the guard is broken")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/moderations", {"input": ["one", "two"]}),
        ("/classify", {"input": ["one", "two"]}),
        ("/api/v1/text/contents", {"contents": ["one", "two"]}),
        ("/beta/litellm_basic_guardrail_api", {"input_type": "request", "texts": ["one", "two"]}),
    ],
)
def test_a_failed_judgement_of_texts_is_audited_as_unjudged(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    monkeypatch.setattr(guard.engine, "score_windows", fails)
    log = tmp_path / "audit.jsonl"
    with serving(guard, audit=log) as server:
        assert server.post(path, body).status_code == 503
        until(lambda: requests(server, path, "503") == 1)  # counted once the answer has left
    records = list(read_audit(log))
    assert [record["sha256"] for record in records] == [text_hash("one"), text_hash("two")]
    assert {record["action"] for record in records} == {"unjudged"}
    assert "score" not in records[0]


@pytest.mark.parametrize(("limits", "status"), [({"guard_deadline": 0.2}, 503), ({"deadline": 0.2}, 504)])
def test_a_guard_that_hangs_is_audited_in_a_chat_that_would_only_have_been_scored(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], status: int
) -> None:
    over = threading.Event()
    monkeypatch.setattr(guard.engine, "judge", lambda *_: over.wait())
    log = tmp_path / "audit.jsonl"
    with serving(guard, audit=log, **limits) as server:
        assert server.post(CHAT, asked("score", "score")).status_code == status
        assert server.metric("guard_errors_total", stage="prompt") == 1
        over.set()
    assert [(record["stage"], record["action"]) for record in read_audit(log)] == [("prompt", "unjudged")]


def test_what_litellm_blocks_is_audited_and_counted_as_blocked(tmp_path: Path) -> None:
    strict = tiny_guard(tmp_path / "guard", threshold=0.0)
    log = tmp_path / "audit.jsonl"
    with serving(strict, audit=log) as server:
        for kind in ("request", "response"):
            body = {"input_type": kind, "texts": ["one"]}
            assert server.post("/beta/litellm_basic_guardrail_api", body).json()["action"] == "BLOCKED"
        for stage in ("prompt", "response"):
            assert server.metric("blocked_total", stage=stage) == 1
    assert [(r["stage"], r["policy"], r["action"]) for r in read_audit(log)] == [
        ("prompt", "block", "blocked"),
        ("response", "block", "blocked"),
    ]


def test_the_other_texts_of_a_call_that_litellm_blocks_are_audited_as_withheld(guard: Guard, tmp_path: Path) -> None:
    low, high = sorted(verdict.score for verdict in guard.moderate([Conversation.of("one"), Conversation.of("two")]))
    between = tiny_guard(tmp_path / "guard", threshold=(low + high) / 2)
    log = tmp_path / "audit.jsonl"
    with serving(between, audit=log) as server:
        body = {"input_type": "request", "texts": ["one", "two"]}
        assert server.post("/beta/litellm_basic_guardrail_api", body).json()["action"] == "BLOCKED"
    assert sorted(record["action"] for record in read_audit(log)) == ["blocked", "withheld"]


def test_text_let_pass_unjudged_is_counted_before_it_leaves_also_for_a_client_that_does_not_wait(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, log = guard.engine.judge, tmp_path / "audit.jsonl"
    monkeypatch.setattr(guard.engine, "judge", lambda asked: fails() if asked[0][1] == "response" else judge(asked))
    with serving(guard, audit=log, fail_open=True) as server:
        body = asked("block", "block", stream=True, max_tokens=400, lora_guard={"check_every": 2})
        with httpx2.stream("POST", f"{server.url}{CHAT}", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                if '"content": "' in line and '"content": ""' not in line:
                    break
            assert server.metric("fail_open_total", stage="response") == 1
        until(lambda: requests(server, CHAT, "499") == 1)
    actions = [record["action"] for record in read_audit(log) if record["stage"] == "response"]
    assert actions[0] == "fail_open"
    assert set(actions) == {"fail_open"}


def test_a_stream_that_ends_in_an_error_is_counted_as_that_error(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.engine, "decode", fails)
    with serving(guard) as server:
        body = asked("score", "score", stream=True)
        assert '"error"' in server.post(CHAT, body).text
        until(lambda: requests(server, CHAT, "500") == 1)
        assert requests(server, CHAT, "200") == 0


def test_a_stream_that_breaks_unforeseen_is_counted_as_the_servers_fault_not_the_clients(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions._Reply, "_chunks", fails)
    with serving(guard) as server:
        with pytest.raises(httpx2.TransportError):
            server.post(CHAT, asked("score", "score", stream=True))
        until(lambda: requests(server, CHAT, "500") + requests(server, CHAT, "499") == 1)
        assert requests(server, CHAT, "500") == 1


def test_what_is_refused_at_the_door_is_counted_under_its_route(guard: Guard) -> None:
    with serving(guard, keys=("sk-mine",)) as server:
        assert server.post("/v1/moderations", {"input": "a"}).status_code == 401
        assert server.post("/nowhere", {}).status_code == 401
        until(lambda: requests(server, "/v1/moderations", "401") == 1)
        until(lambda: requests(server, "other", "401") == 1)


def test_a_lone_surrogate_is_echoed_replaced(guard: Guard, tmp_path: Path) -> None:
    strict = tiny_guard(tmp_path / "guard", threshold=0.0)
    with serving(strict) as server:
        body = b'{"contents": ["\\ud800 a"]}'
        reply = httpx2.post(
            f"{server.url}/api/v1/text/contents",
            content=body,
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert reply.status_code == 200
        assert reply.json()[0][0]["text"] == "\ufffd a"


def test_nobody_chooses_the_address_that_the_rate_is_of(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server itself: a header that names another address changes nothing."""
    found: list[uvicorn.Config] = []
    monkeypatch.setattr(run.Guard, "load", lambda *_, **__: guard)
    monkeypatch.setattr(run.uvicorn.Server, "run", lambda server: found.append(server.config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run.serve(ServeConfig(port=port), "default", None)
    assert not found[0].proxy_headers
