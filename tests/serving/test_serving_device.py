"""The server on llama.cpp answers as the engine alone does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from guards import tiny_guard_folder
from openai import BadRequestError
from servers import Running, serving
from tiny_gguf import tiny_gguf

from lora_guard import ChatEnd, Conversation, Guard, base_model

pytest.importorskip("llama_cpp", reason="needs the extra 'device'; make test-extras builds it")
pytestmark = pytest.mark.extras

SPREAD = 1e-5
"""Between a text alone and the same one read in a pass with others."""


@pytest.fixture(scope="module", params=["alora", "lora"])
def guard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """A guard on llama.cpp from a guard folder that flags nothing by itself."""
    folder = tmp_path_factory.mktemp("guard")
    made = tiny_guard_folder(folder, adapter_kind=request.param, threshold=1.0)
    file = tiny_gguf(folder / "base.gguf", base_model.load(str(folder / "base")).model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_GUARD_CACHE", str(folder / "cache"))
        return Guard.load(made, engine="llama-cpp", base=str(file))


@pytest.fixture(scope="module")
def server(guard: Guard) -> Iterator[Running]:
    with serving(guard, max_completion_tokens=64, default_completion_tokens=32) as running:
        yield running


def chat(server: Running, text: str = "Hello", **more: Any) -> Any:
    """A greedy answer of twenty tokens in block mode, by OpenAI's client."""
    asked: dict[str, Any] = {"model": "any", "max_tokens": 20, "temperature": 0}
    blocking: Any = {"model": "any", "policy": {"input": {"mode": "block"}, "output": {"mode": "block"}}}
    messages: Any = [{"role": "user", "content": text}]
    return server.openai().chat.completions.create(messages=messages, moderation=blocking, **asked, **more)


def alone(guard: Guard, text: str = "Hello") -> ChatEnd:
    """The same without a server."""
    *_, end = guard.chat(Conversation.of(text), max_tokens=20, block=True)
    assert isinstance(end, ChatEnd)
    return end


def test_moderations_are_the_engines(server: Running, guard: Guard) -> None:
    texts = ["How do I bake bread?", "Why? " * 60, "Hello"]
    found = server.openai().moderations.create(input=texts).results
    expected = guard.moderate([Conversation.of(text) for text in texts])
    assert len({verdict.score for verdict in expected}) == 3
    for result, verdict in zip(found, expected, strict=True):
        assert result.flagged is verdict.flagged
        for name, decision in verdict.categories.items():
            assert getattr(result.category_scores, name) == pytest.approx(decision.score, abs=SPREAD)


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocking_chat_is_the_engines(server: Running, guard: Guard, stream: bool) -> None:
    end, answer = alone(guard), chat(server, stream=stream)
    if stream:
        chunks = list(answer)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        moderation = chunks[-1].moderation
    else:
        said, moderation = answer.choices[0].message.content, answer.moderation
    assert said == end.response != ""
    for side, verdict in ((moderation.input, end.prompt_verdict), (moderation.output, end.response_verdict)):
        assert verdict is not None
        assert side.results[0].score == pytest.approx(verdict.score, abs=SPREAD)


def test_what_is_flagged_is_withheld(server: Running) -> None:
    withheld = chat(server, extra_body={"lora_guard": {"response_threshold": 0.0}})
    assert withheld.choices[0].message.content is None
    assert withheld.choices[0].finish_reason == "content_filter"
    with pytest.raises(BadRequestError, match="the prompt was flagged by the guard"):
        chat(server, extra_body={"lora_guard": {"prompt_threshold": 0.0}})


def test_chats_at_once_are_each_what_they_are_alone(server: Running, guard: Guard) -> None:
    texts = ("Hello", "Why is the sky blue?", "Bread")
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: chat(server, text).choices[0].message.content, texts))
    assert answers == [alone(guard, text).response for text in texts]
