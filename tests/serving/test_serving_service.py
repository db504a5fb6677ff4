"""What stands in the audit log of a chat, and what leaves when the log's disk is full."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, InternalServerError
from servers import Running, serving, tiny_guard, until

from lora_guard import ChatEnd, Conversation, Guard
from lora_guard.serving.audit import read_audit, text_hash

pytestmark = pytest.mark.extras

FULL = Path("/dev/full")
"""Linux's device for this: it can be opened, and every write to it fails for want of space."""

full_disk = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return tiny_guard(tmp_path_factory.mktemp("guard"), threshold=1.0)


@pytest.fixture(scope="module")
def full(guard: Guard) -> Iterator[Running]:
    with serving(guard, audit=FULL) as running:
        yield running


def asked(input: str, output: str) -> dict[str, Any]:
    """A greedy chat with a policy for each side."""
    policy = {"input": {"mode": input}, "output": {"mode": output}}
    messages = [{"role": "user", "content": "Hello"}]
    return {
        "model": "any", "messages": messages, "max_tokens": 20, "temperature": 0,
        "moderation": {"model": "any", "policy": policy},
    }  # fmt: skip


@pytest.fixture(scope="module")
def answer(guard: Guard) -> str:
    """What the chat says without a server."""
    *_, end = guard.chat(Conversation.of("Hello"), max_tokens=20)
    assert isinstance(end, ChatEnd)
    assert end.response
    return end.response


def test_a_chats_decisions_are_audited_before_they_leave(guard: Guard, answer: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with serving(guard, audit=path) as server:
        text = ""
        for chunk in server.openai().chat.completions.create(**asked("block", "block"), stream=True):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            if text:  # what has arrived has been written before
                assert text_hash(text) in {record["sha256"] for record in read_audit(path)}
    assert text == answer
    prompt, *releases, last = read_audit(path)
    assert (prompt["stage"], prompt["action"], prompt["sha256"]) == ("prompt", "released", text_hash("Hello"))
    assert (last["stage"], last["action"], last["sha256"]) == ("response", "released", text_hash(answer))
    assert releases
    assert "Hello" not in path.read_text("utf-8")


@pytest.mark.parametrize(("stage", "own"), [("prompt", "prompt_threshold"), ("response", "response_threshold")])
def test_a_blocked_text_is_audited_as_blocked(guard: Guard, tmp_path: Path, stage: str, own: str) -> None:
    path = tmp_path / "audit.jsonl"
    with serving(guard, audit=path) as server:
        server.post("/v1/chat/completions", {**asked("block", "block"), "lora_guard": {own: 0.0}})
    records = [(record["stage"], record["action"]) for record in read_audit(path)]
    assert records[-1] == (stage, "blocked")


def test_a_blocked_answer_is_audited_with_what_was_withheld(guard: Guard, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with serving(guard, audit=path, audit_text=True) as server:
        body = {**asked("score", "block"), "lora_guard": {"response_threshold": 0.0}}
        reply = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert reply["finish_reason"] == "content_filter"
    *_, last = read_audit(path)
    assert (last["stage"], last["action"]) == ("response", "blocked")
    assert last["text"]
    assert last["sha256"] == text_hash(last["text"])


@full_disk
@pytest.mark.parametrize(("input", "output"), [("block", "score"), ("score", "block")])
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_full_disk_cannot_record_does_not_leave(full: Running, input: str, output: str, stream: bool) -> None:
    before = full.metric("audit_errors_total")
    left: list[str | None] = []

    def read() -> None:
        chunks: Any = full.openai().chat.completions.create(**asked(input, output), stream=stream)
        left.extend(chunk.choices[0].delta.content for chunk in chunks)

    with pytest.raises(APIError) as error:
        read()
    assert error.value.code == "out_of_resources"
    assert isinstance(error.value, InternalServerError) == (not stream or input == "block")
    assert not any(left)
    assert full.metric("audit_errors_total") > before
    until(lambda: full.metric("queue_depth") == 0)


@full_disk
def test_a_full_disk_leaves_score_mode_its_answer(full: Running, answer: str) -> None:
    before = full.metric("audit_errors_total")
    reply = full.openai().chat.completions.create(**asked("score", "score"))
    assert reply.choices[0].message.content == answer
    assert full.post("/v1/moderations", {"input": "Hello"}).status_code == 200
    assert full.metric("audit_errors_total") == before + 3
    assert full.get("/ready").status_code == 200


@full_disk
def test_a_prompt_that_is_flagged_is_not_answered_on_a_full_disk_either(full: Running) -> None:
    body = {**asked("block", "score"), "lora_guard": {"prompt_threshold": 0.0}}
    reply = full.post("/v1/chat/completions", body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "out_of_resources")
