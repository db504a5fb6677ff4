"""Chat completions over HTTP, judged by OpenAI's own client: answers, streams, moderation, refusals and errors."""

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError
from servers import Running, serving, tiny_guard

from lora_guard import ChatEnd, Conversation, Guard

pytestmark = pytest.mark.extras

ASKED: Any = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"model": "any", "messages": ASKED, "max_tokens": 20, "temperature": 0}


def moderation(input: str = "score", output: str = "score") -> Any:
    return {"model": "any", "policy": {"input": {"mode": input}, "output": {"mode": output}}}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """Flags nothing by itself; requests bring thresholds of their own."""
    return tiny_guard(tmp_path_factory.mktemp("guard"), threshold=1.0)


@pytest.fixture(scope="module")
def server(guard: Guard) -> Iterator[Running]:
    with serving(guard, max_completion_tokens=64, default_completion_tokens=32) as running:
        yield running


def alone(guard: Guard, **how: Any) -> ChatEnd:
    """The answer that the guard gives without a server."""
    *_, end = guard.chat(Conversation.of("Hello"), **{"max_tokens": 20, **how})
    assert isinstance(end, ChatEnd)
    return end


def test_an_answer_is_the_models_own(server: Running, guard: Guard) -> None:
    answer = server.openai().chat.completions.create(**GREEDY)
    end = alone(guard)
    assert answer.choices[0].message.content == end.response
    assert answer.choices[0].finish_reason == end.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(guard.engine.renderer.chat(Conversation.of("Hello"))[0])
    assert answer.usage.completion_tokens == 20
    assert answer.moderation is None


def test_a_seed_draws_the_same_answer_again_and_streamed(server: Running, guard: Guard) -> None:
    asked = {**GREEDY, "temperature": 1.3, "top_p": 0.9, "seed": 7}
    expected = alone(guard, temperature=1.3, top_p=0.9, seed=7).response
    client = server.openai()
    assert client.chat.completions.create(**asked).choices[0].message.content == expected
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected


@pytest.mark.parametrize(("input", "output"), [("score", "score"), ("score", "block"), ("block", "score")])
def test_moderation_of_both_sides_comes_with_the_answer(server: Running, input: str, output: str) -> None:
    answer = server.openai().chat.completions.create(**GREEDY, moderation=moderation(input, output))
    assert answer.moderation is not None
    for side in (answer.moderation.input, answer.moderation.output):
        assert side.type == "moderation_results"
        assert side.results[0].flagged is False
        assert 0 < side.results[0].category_scores["a"] < 1
        assert {"violence", "self-harm", "a", "b"} <= set(side.results[0].categories)


def test_scores_of_the_answer_are_those_of_the_guard(server: Running, guard: Guard) -> None:
    answer = server.openai().chat.completions.create(**GREEDY, moderation=moderation())
    end = alone(guard)
    moderated: Any = answer.moderation
    for side, verdict in ((moderated.input, end.prompt_verdict), (moderated.output, end.response_verdict)):
        assert verdict is not None
        assert side.results[0].score == pytest.approx(verdict.score, abs=1e-5)


@pytest.mark.parametrize("output", ["score", "block"])
def test_a_stream_ends_with_finish_usage_and_moderation(server: Running, guard: Guard, output: str) -> None:
    chunks = list(
        server.openai().chat.completions.create(
            **GREEDY, stream=True, stream_options={"include_usage": True}, moderation=moderation(output=output)
        )
    )
    *text, finish, usage, last = chunks
    assert text[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in text) == alone(guard).response
    assert finish.choices[0].finish_reason == "length"
    assert usage.usage is not None
    assert (usage.choices, usage.usage.completion_tokens) == ([], 20)
    assert last.moderation is not None
    assert (last.choices, last.moderation.output.type) == ([], "moderation_results")
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_async_client_streams_too(server: Running, guard: Guard) -> None:
    async def ask() -> str:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == alone(guard).response


def test_a_blocked_prompt_is_an_error_before_anything_is_generated(server: Running) -> None:
    blocking = {**GREEDY, "moderation": moderation("block"), "extra_body": {"lora_guard": {"prompt_threshold": 0.0}}}
    before = server.metric("blocked_total", stage="prompt")
    for stream in (False, True):
        with pytest.raises(BadRequestError) as error:
            server.openai().chat.completions.create(**blocking, stream=stream)
        body: Any = error.value.body
        assert (error.value.code, error.value.param) == ("content_filter", "messages")
        assert body["moderation"]["input"]["results"][0]["flagged"] is True
    assert server.metric("blocked_total", stage="prompt") == before + 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_answer_ends_with_content_filter(server: Running, stream: bool) -> None:
    asked = {
        **GREEDY,
        "moderation": moderation(output="block"),
        "extra_body": {"lora_guard": {"response_threshold": 0.0}},
    }
    answer: Any = server.openai().chat.completions.create(**asked, stream=stream)
    if stream:
        chunks = list(answer)
        assert all(not (chunk.choices and chunk.choices[0].delta.content) for chunk in chunks)
        assert chunks[-2].choices[0].finish_reason == "content_filter"
        assert chunks[-1].moderation.output.results[0].flagged is True
    else:
        assert answer.choices[0].message.content is None
        assert answer.choices[0].finish_reason == "content_filter"
        assert answer.moderation.output.results[0].flagged is True


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_can_be_answered_with_a_refusal(tmp_path: Any, stream: bool) -> None:
    guard = tiny_guard(tmp_path, threshold=0.0)
    with serving(guard, input_mode="block", blocked_input="refusal", refusal="No.") as server:
        answer: Any = server.openai().chat.completions.create(**GREEDY, stream=stream)
        if stream:
            chunks = list(answer)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "No."
            assert chunks[-2].choices[0].finish_reason == "content_filter"
        else:
            assert answer.choices[0].message.content == "No."
            assert answer.choices[0].finish_reason == "content_filter"


def test_the_servers_policy_holds_for_requests_that_ask_for_none(tmp_path: Any) -> None:
    guard = tiny_guard(tmp_path, threshold=0.0)
    with serving(guard, output_mode="block") as server:
        create = server.openai().chat.completions.create
        assert create(**GREEDY).choices[0].finish_reason == "content_filter"
        assert create(**GREEDY, moderation=moderation("score", "score")).choices[0].finish_reason == "length"
    with serving(guard, output_mode="block", minimum=True) as server:
        create = server.openai().chat.completions.create
        lax: Any = {"lora_guard": {"response_threshold": 1.0}}
        answer = create(**GREEDY, moderation=moderation("score", "score"), extra_body=lax)
        assert answer.choices[0].finish_reason == "content_filter"


def test_a_stream_shows_its_checks_when_asked(server: Running) -> None:
    chunks: Any = server.openai().chat.completions.create(
        **GREEDY, stream=True, moderation=moderation(), extra_body={"lora_guard": {"checks": True, "check_every": 5}}
    )
    checks = [chunk.lora_guard for chunk in chunks if getattr(chunk, "lora_guard", None)]
    assert checks[0]["target"] == "prompt"
    assert checks[-1]["tokens"] == 20
    assert all(later["tokens"] - check["tokens"] <= 5 for check, later in pairwise(checks[1:]))
    assert set(checks[0]["categories"]) == {"a", "b"}


def test_a_stop_sequence_ends_the_answer(server: Running, guard: Guard) -> None:
    whole = alone(guard).response
    assert whole
    stop = whole[6:8]
    answer = server.openai().chat.completions.create(**GREEDY, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_content_in_parts_and_system_messages_are_read(server: Running, guard: Guard) -> None:
    conversation = Conversation.of("Hello\nagain", system="Be brief.")
    *_, end = guard.chat(conversation, max_tokens=20)
    parts: Any = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "again"}]
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    answer = server.openai().chat.completions.create(**{**GREEDY, "messages": messages})
    assert isinstance(end, ChatEnd)
    assert answer.choices[0].message.content == end.response


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"lora_guard": {"check": 1}}, "lora_guard.check"),
    ],
)
def test_a_bad_field_is_named(server: Running, change: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", {**GREEDY, **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"


def test_a_number_that_is_none_is_refused(server: Running) -> None:
    body = json.dumps({**GREEDY, "temperature": 0.5}).replace("0.5", "NaN")
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")


def test_the_coldest_temperature_draws_the_likeliest_tokens(server: Running) -> None:
    def said(temperature: float) -> str:
        reply = server.post("/v1/chat/completions", {**GREEDY, "temperature": temperature})
        assert reply.status_code == 200
        return str(reply.json()["choices"][0]["message"]["content"])

    assert said(1e-40) == said(0)


def test_a_withheld_answer_may_stand_in_the_history(server: Running) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}, *GREEDY["messages"]]
    assert server.post("/v1/chat/completions", {**GREEDY, "messages": history}).status_code == 200


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"logprobs": True}, "'logprobs' is not served"),
        ({"tools": [{"type": "function"}]}, "'tools' is not served"),
        ({"responce_format": {}}, "'responce_format' is not served"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "last message must be the user's"),
        ({"max_tokens": 65}, "allowed: at most 64"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "allowed: 512"),
    ],
)
def test_what_is_not_served_is_refused(server: Running, change: dict[str, Any], part: str) -> None:
    for stream in (False, True):
        response = server.post("/v1/chat/completions", {**GREEDY, **change, "stream": stream})
        assert response.status_code == 400
        assert part in response.json()["error"]["message"]


def test_fields_without_effect_are_passed_over(server: Running, guard: Guard) -> None:
    answer = server.openai().chat.completions.create(
        **GREEDY,
        user="someone",
        metadata={"a": "b"},
        frequency_penalty=0,
        response_format={"type": "text"},
        store=False,
    )
    assert answer.choices[0].message.content == alone(guard).response


@pytest.mark.parametrize(
    "body",
    [
        {"model": "default", "stream": False, "messages": ASKED, "max_completion_tokens": 20, "temperature": 0.0},
        {"model": "default", "messages": ASKED, "temperature": 0, "max_tokens": 20},
    ],
    ids=["langchain-openai 1.7", "litellm 1.110"],
)
def test_the_requests_of_langchain_and_litellm_are_answered(server: Running, guard: Guard, body: Any) -> None:
    """As recorded from ``examples/``; both moderate through OpenAI's own client's form of ``/v1/moderations``."""
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == alone(guard).response
    judged = server.post("/v1/moderations", {"model": "omni-moderation-latest", "input": "Hello"}).json()
    assert set(judged) == {"id", "model", "results"}
    assert judged["results"][0]["flagged"] is False


def test_error_messages_hold_nothing_of_the_text(server: Running) -> None:
    bad = [
        {**GREEDY, "messages": [{"role": "user", "content": ["secret words"]}]},
        {**GREEDY, "messages": [{"role": "user", "content": "secret words" * 100}]},
        {**GREEDY, "temperature": "secret words"},
        {**GREEDY, "moderation": {"model": "x", "policy": {"input": {"mode": "secret words"}}}},
    ]
    for body in bad:
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 400
        assert "secret words" not in response.text


def test_errors_have_openais_types(server: Running) -> None:
    with pytest.raises(APIStatusError) as error:
        server.openai().chat.completions.create(**{**GREEDY, "n": 3})
    assert isinstance(error.value, BadRequestError)
