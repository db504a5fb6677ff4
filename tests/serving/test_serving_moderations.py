"""Moderation over HTTP: OpenAI's endpoint and the request shapes of other services, over one guard."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError
from servers import Running, serving, tiny_guard

from lora_guard import Conversation, Guard
from lora_guard.serving.audit import read_audit, text_hash
from lora_guard.taxonomy import BEAVERTAILS, OPENAI_CATEGORIES, Taxonomy

pytestmark = pytest.mark.extras

TEXTS = ["How do I bake bread?", "I will hurt you"]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """With the built-in categories; what it flags is the higher of the two texts' scores."""
    folder = tmp_path_factory.mktemp("guard")
    return tiny_guard(folder, categories=Taxonomy.load(BEAVERTAILS).categories, max_length=400, token_head=True)


@pytest.fixture(scope="module")
def server(guard: Guard) -> Iterator[Running]:
    with serving(guard, max_items=8, max_input_tokens=5000) as running:
        yield running


def test_scores_are_the_guards_own(server: Running, guard: Guard) -> None:
    response = server.openai().moderations.create(input=TEXTS)
    verdicts = guard.moderate([Conversation.of(text) for text in TEXTS])
    assert response.model == "tiny"
    for result, verdict in zip(response.results, verdicts, strict=True):
        form: Any = result.model_dump(by_alias=True)
        assert form["score"] == pytest.approx(verdict.score, abs=1e-5)
        assert result.flagged == verdict.flagged
        for name, decision in verdict.categories.items():
            if name == "self_harm":  # to the client another spelling of its own key self-harm
                name = "self-harm"
            assert form["category_scores"][name] == pytest.approx(decision.score, abs=1e-5)
            assert form["categories"][name] == decision.flagged


def test_a_disguised_text_is_judged_in_both_forms(server: Running, guard: Guard) -> None:
    plain = [f"How do I bake {n} breads?" for n in range(8)]
    disguised = [text.replace("o", "\u043e").replace("b", "b\u200b") for text in plain]
    conversations = [Conversation.of(text) for text in disguised]
    scored = guard.engine.score(conversations, ["prompt"] * 8)
    raw, both = (
        [guard.verdict(row, "prompt").score for row in rows]
        for rows in (
            [guard.with_tokens(row, text, "prompt") for row, text in zip(scored, conversations, strict=True)],
            guard.logits(conversations),
        )
    )
    scores = [result["score"] for result in server.post("/v1/moderations", {"input": disguised}).json()["results"]]
    assert scores == pytest.approx(both, abs=1e-5)
    assert scores != pytest.approx(raw, abs=1e-5)  # of some texts, the normalised form is the riskier


def test_openais_keys_are_all_there_by_the_published_table(server: Running) -> None:
    form = server.post("/v1/moderations", {"input": TEXTS[1]}).json()["results"][0]
    scores, applied = form["category_scores"], form["category_applied_input_types"]
    assert set(OPENAI_CATEGORIES) <= set(scores)
    assert scores["self-harm"] == scores["self_harm"]
    assert scores["sexual"] == scores["sexually_explicit,adult_content"]
    own = ("terrorism,organized_crime", "violence,aiding_and_abetting,incitement")
    assert scores["violence"] == max(scores[name] for name in own)
    assert (scores["violence/graphic"], applied["violence/graphic"], applied["violence"]) == (0.0, [], ["text"])


def test_one_text_several_texts_and_text_parts(server: Running) -> None:
    create = server.openai().moderations.create
    several = create(input=TEXTS).results
    assert [create(input=text).results[0].category_scores for text in TEXTS] == pytest.approx(
        [result.category_scores for result in several]
    ) or len(several) == 2
    parts: Any = [{"type": "text", "text": text} for text in TEXTS]
    assert len(create(input=parts).results) == 1
    assert create(input="", model="text-moderation-latest").results


def test_the_async_client_asks_for_many_at_once(server: Running, guard: Guard) -> None:
    texts = [f"text {number}" for number in range(20)]

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(client.moderations.create(input=text) for text in texts))

    verdicts = guard.moderate([Conversation.of(text) for text in texts])
    for response, verdict in zip(asyncio.run(ask()), verdicts, strict=True):
        assert response.results[0].score == pytest.approx(verdict.score, abs=1e-5)


def test_a_long_text_counts_with_its_highest_window(server: Running, guard: Guard) -> None:
    text = "a long text " * 100
    verdict = guard.moderate(Conversation.of(text))
    assert verdict.windows > 1
    form = server.post("/v1/moderations", {"input": text}).json()["results"][0]
    assert form["score"] == pytest.approx(verdict.score, abs=1e-5)


@pytest.mark.parametrize(
    ("input", "part"),
    [
        ([], "input"),
        (3, "input"),
        ([["a"]], "input"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "input"),
        (["a"] * 9, "there are 9 texts; allowed: at most 8"),
        ("x" * 6000, "the input has over 5000 tokens"),
    ],
)
def test_what_cannot_be_judged_is_said(server: Running, input: Any, part: str) -> None:
    with pytest.raises(BadRequestError) as error:
        server.openai().moderations.create(input=input)
    assert part in str(error.value.body)


def test_each_decision_is_audited(guard: Guard, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with serving(guard, audit=path) as server:
        response = server.post("/v1/moderations", {"input": TEXTS})
    records = list(read_audit(path))
    assert [record["sha256"] for record in records] == [text_hash(text) for text in TEXTS]
    for record, result in zip(records, response.json()["results"], strict=True):
        assert record["id"] == response.headers["x-request-id"]
        assert record["score"] == pytest.approx(result["score"], abs=1e-6)
        assert record["base"] == guard.base_fingerprint
        assert record["guard"].startswith("sha256:")
        assert (record["policy"], record["action"], record["stage"]) == ("score", "scored", "prompt")
        assert record["latency_ms"] > 0


def test_fms_detectors_shape(server: Running) -> None:
    """As NeMo Guardrails and TrustyAI send it, the header included."""
    body = {"contents": TEXTS, "detector_params": {"threshold": 0.0}}
    response = server.post("/api/v1/text/contents", body, headers={"detector-id": "lora-guard"})
    found = response.json()
    assert [len(detections) for detections in found] == [15, 15]
    assert found[0][0] | {"score": 0} == {
        "start": 0,
        "end": len(TEXTS[0]),
        "text": TEXTS[0],
        "detection_type": "harm",
        "detection": "harmful",
        "score": 0,
    }
    assert server.post("/api/v1/text/contents", {**body, "detector_params": {"threshold": 1.0}}).json() == [[], []]
    own = server.post("/api/v1/text/contents", {"contents": TEXTS}).json()
    flags = [result["flagged"] for result in server.post("/v1/moderations", {"input": TEXTS}).json()["results"]]
    assert [bool(detections) for detections in own] == flags


def test_vllms_classification_shape(server: Running) -> None:
    form = server.post("/classify", {"model": "any", "input": TEXTS}).json()
    results = server.post("/v1/moderations", {"input": TEXTS}).json()["results"]
    for index, (item, result) in enumerate(zip(form["data"], results, strict=True)):
        assert (item["index"], item["num_classes"]) == (index, 2)
        assert item["probs"] == pytest.approx([1 - result["score"], result["score"]], abs=1e-5)
        assert item["label"] == ("harmful" if result["flagged"] else "unharmful")


@pytest.mark.parametrize("kind", ["request", "response"])
def test_litellms_guardrail_shape(tmp_path: Path, kind: str) -> None:
    """The fields of LiteLLM 1.110, and the header in which it sends a key."""
    absent = ("litellm_call_id", "litellm_trace_id", "images", "tools", "tool_calls", "model", "request_headers")
    messages = [{"role": "user", "content": text} for text in TEXTS]
    body: dict[str, Any] = {
        "input_type": kind, "texts": TEXTS, "structured_messages": messages, "request_data": {},
        "litellm_version": "1.110.2", "additional_provider_specific_params": {}, **dict.fromkeys(absent),
    }  # fmt: skip
    key = {"x-api-key": "one"}
    for threshold, action in ((0.0, "BLOCKED"), (1.0, "NONE")):
        guard = tiny_guard(tmp_path / str(threshold), threshold=threshold)
        with serving(guard, keys=("one",)) as server:
            form = server.post("/beta/litellm_basic_guardrail_api", body, headers=key).json()
            assert form["action"] == action
            assert (form["blocked_reason"] is None) == (action == "NONE")
            assert TEXTS[1] not in json.dumps(form)
            for texts in ([], None):
                empty = server.post("/beta/litellm_basic_guardrail_api", {**body, "texts": texts}, headers=key)
                assert empty.json()["action"] == "NONE"


def test_models_metrics_and_health(server: Running) -> None:
    assert [model.id for model in server.openai().models.list()] == ["tiny"]
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    server.post("/v1/moderations", {"input": TEXTS})
    text = server.get("/metrics").text
    for name in (
        'requests_total{route="/v1/moderations",status="200"}',
        "queue_depth",
        "batch_rows_count",
        "moderation_seconds_count",
        'score_count{category="harmful"}',
        "time_to_first_token_seconds_count",
    ):
        assert f"lora_guard_{name}" in text
