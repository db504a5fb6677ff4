"""Several guards over one chat model: the request's model chooses, and one can be put in another's place at work."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from guards import tiny_guard_folder
from servers import Running, serving, tiny_guard, until

from lora_guard import Conversation, Guard
from lora_guard.errors import InputError
from lora_guard.serving.guards import Guards

pytestmark = pytest.mark.extras

TEXTS = [f"Tell me about number {number}" for number in range(6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Guards on the same tiny chat model: another adapter's kind, or other weights, or other categories."""
    settings: dict[str, dict[str, Any]] = {
        "plain": {"adapter_kind": "lora", "strength": 1.5},
        "other": {"adapter_kind": "alora", "strength": 1.5, "categories": ("x", "y", "z")},
        "heads": {"adapter_kind": "none"},
    }
    return {name: tiny_guard_folder(tmp_path_factory.mktemp(name), **more) for name, more in settings.items()}


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return tiny_guard(tmp_path, threshold=1.0)


@pytest.fixture
def server(guard: Guard, folders: dict[str, Path]) -> Iterator[Running]:
    others = {name: Guard.load(folder, on=guard, precision="fp32") for name, folder in folders.items()}
    with serving(guard, others=others) as running:
        yield running


def chat(model: str, text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0, "moderation": {"model": model}}


def test_the_requests_model_chooses_the_guard_and_unknown_names_mean_the_default(
    server: Running, folders: dict[str, Path]
) -> None:
    alone = {name: Guard.load(folder, precision="fp32") for name, folder in folders.items()}
    alone["tiny"] = alone["gpt-4o"] = server.guard
    assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["tiny", "plain", "other", "heads"]
    with ThreadPoolExecutor(24) as clients:  # of all guards at once
        asked = [(name, text) for text in TEXTS for name in alone]
        scored = [clients.submit(server.post, "/v1/moderations", {"model": n, "input": text}) for n, text in asked]
        chats = [clients.submit(server.post, "/v1/chat/completions", chat(*pair)) for pair in asked]
    for (name, text), score, answer in zip(asked, scored, chats, strict=True):
        found, said = score.result().json(), answer.result().json()
        expected = alone[name].moderate(Conversation.of(text))
        assert found["model"] == said["model"] == ("tiny" if name == "gpt-4o" else name)
        assert found["results"][0]["score"] == pytest.approx(expected.score, abs=1e-5)
        assert set(expected.categories) <= set(found["results"][0]["categories"])
        *_, end = alone[name].chat(Conversation.of(text), max_tokens=12)
        assert said["choices"][0]["message"]["content"] == end.response  # type: ignore[union-attr]
        output = said["moderation"]["output"]["results"][0]
        assert output["score"] == pytest.approx(end.response_verdict.score, abs=1e-5)  # type: ignore[union-attr]
    contents = [answer.result().json()["choices"][0]["message"]["content"] for answer in chats]
    answers = {(text, content) for (_, text), content in zip(asked, contents, strict=True)}
    assert len(answers) == len(TEXTS)  # whichever guard looks on, the chat model's answer is the same


def test_a_chats_moderation_names_its_guard_before_the_chats_own_model(server: Running) -> None:
    """A client keeps the chat model's name as ``model``; a name that no guard has leaves the choice to it."""
    for model, moderation, meant in (
        ("gpt-4o", "other", "other"),
        ("plain", "other", "other"),
        ("plain", "tiny", "tiny"),
        ("plain", "omni-moderation-latest", "plain"),
        ("gpt-4o", "omni-moderation-latest", "tiny"),
    ):
        body = {**chat(model, TEXTS[0]), "moderation": {"model": moderation}}
        assert server.post("/v1/chat/completions", body).json()["moderation"]["output"]["model"] == meant


def test_detectors_choose_by_their_header_and_classifiers_by_their_model(server: Running) -> None:
    scores = {}
    for name in ("tiny", "plain"):
        body = {"contents": [TEXTS[0]], "detector_params": {"threshold": 0.0}}
        ((first, *_),) = server.post("/api/v1/text/contents", body, headers={"detector-id": name}).json()
        classified = server.post("/classify", {"model": name, "input": TEXTS[0]}).json()
        assert classified["model"] == name
        assert classified["data"][0]["probs"][1] == pytest.approx(first["score"], abs=1e-5)
        scores[name] = first["score"]
    assert scores["tiny"] != pytest.approx(scores["plain"], abs=1e-5)


def test_a_guard_that_is_replaced_finishes_its_requests_and_then_leaves_the_chat_model(
    server: Running, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    former = server.service.guards["other"].guard
    judging, go_on = threading.Event(), threading.Event()
    judge = former.engine.judge

    def slow(requests: Any) -> Any:
        judging.set()
        assert go_on.wait(60)
        return judge(requests)

    monkeypatch.setattr(former.engine, "judge", slow)
    replacement = Guard.load(folders["plain"], on=server.guard, precision="fp32")
    before = former.moderate(Conversation.of(TEXTS[0]))
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(server.post, "/v1/chat/completions", chat("other", TEXTS[0]))
        assert judging.wait(60)
        on_loop(server, "other", replacement)
        assert former.moderate(Conversation.of(TEXTS[0])) == before  # still there for the request under way
        go_on.set()
        said = answer.result().json()
    assert set(said["moderation"]["output"]["results"][0]["categories"]) >= {"x", "y", "z"}
    until(lambda: not held(former))
    after = server.post("/v1/moderations", {"model": "other", "input": TEXTS[0]}).json()
    assert after["results"][0]["score"] == pytest.approx(replacement.moderate(Conversation.of(TEXTS[0])).score)
    assert server.service.worker.is_ready


def test_a_guard_can_be_added_and_taken_away_but_for_the_default(server: Running, folders: dict[str, Path]) -> None:
    new = Guard.load(folders["other"], on=server.guard, precision="fp32")
    on_loop(server, "new", new)
    assert server.post("/v1/moderations", {"model": "new", "input": "x"}).json()["model"] == "new"
    on_loop(server, "new", None)
    assert server.post("/v1/moderations", {"model": "new", "input": "x"}).json()["model"] == "tiny"
    until(lambda: not held(new))
    with pytest.raises(InputError, match="'tiny' is the default guard; allowed: to put another in its place"):
        server.service.guards.put("tiny", None)


def test_a_guard_stays_while_any_name_has_it(server: Running) -> None:
    other = server.service.guards["other"].guard
    for name, guard in (("again", other), ("other", other), ("again", None)):
        on_loop(server, name, guard)
        assert server.post("/v1/moderations", {"model": "other", "input": "x"}).status_code == 200
    on_loop(server, "other", None)
    until(lambda: not held(other))


def test_the_audit_log_says_which_guard_decided(guard: Guard, folders: dict[str, Path], tmp_path: Path) -> None:
    plain = Guard.load(folders["plain"], on=guard, precision="fp32")
    log = tmp_path / "audit.jsonl"
    with serving(guard, others={"plain": plain}, audit=log) as server:
        for name in ("tiny", "plain"):
            server.post("/v1/moderations", {"model": name, "input": "x"})
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [line["model"] for line in lines] == ["tiny", "plain"]
    assert lines[0]["guard"] != lines[1]["guard"]
    assert lines[0]["base"] == lines[1]["base"]


def test_two_guards_of_one_name_are_refused(guard: Guard) -> None:
    with pytest.raises(InputError, match="two guards are called 'tiny'; allowed: a name for each"):
        Guards("tiny", guard, {"tiny": guard})


def held(guard: Guard) -> list[Any]:
    """The modules of a guard's adapter that are on the chat model's layers."""
    attached = guard.engine.model.adapter  # type: ignore[attr-defined]
    return [layer for layer in attached.layers.values() if hasattr(layer, attached.down)]


def on_loop(server: Running, name: str, guard: Guard | None) -> None:
    """Put a guard in its place on the server's event loop, as its callers do."""
    done = threading.Event()

    async def put() -> None:
        server.service.put(name, guard)
        done.set()

    asyncio.run_coroutine_threadsafe(put(), server.loop)
    assert done.wait(60)
