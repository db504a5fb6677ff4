"""``POST /v1/chat/completions``: an answer as a whole or as a stream, with the moderation that its request asks for."""

import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from lora_guard.conversation import Conversation, Message
from lora_guard.engine.stream import MODES, ChatEnd, Check, Event, Mode, StreamSettings
from lora_guard.errors import InputError, LoraGuardError
from lora_guard.serving import samples
from lora_guard.serving.config import ServeConfig
from lora_guard.serving.disconnect import unless_disconnected
from lora_guard.serving.guards import Served
from lora_guard.serving.results import Results
from lora_guard.serving.schemas import (
    AssistantMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    Moderation,
    Usage,
    joined,
)
from lora_guard.serving.service import Answer, Sampling, Service
from lora_guard.serving.wire import RequestError, error_responses, request_error


def routes(service: Service) -> APIRouter:
    """The route over a service."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={
            200: {
                "description": "The answer; with `stream` as server-sent events, each a chat.completion.chunk",
                "content": {
                    "application/json": {"example": samples.COMPLETION},
                    "text/event-stream": {"schema": {"type": "string"}, "example": samples.STREAM},
                },
            },
            **error_responses(400, 401, 413, 421, 429, 500, 503, 504),
        },
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer the last user message."""
        answer = _ask(service, body, request.state.request_id)
        reply = _Reply(service, answer.served, body, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), request.state)
        if not body.stream:
            return await unless_disconnected(request, reply.whole(answer))
        events = answer.events()
        head = await unless_disconnected(request, _head(events, answer.settings))
        end = head[-1]
        if isinstance(end, ChatEnd) and end.finish_reason == "content_filter" and not reply.refuses(end):
            raise reply.blocked(end)
        return StreamingResponse(reply.stream(answer, head, events), media_type="text/event-stream")

    return router


def _ask(service: Service, body: ChatRequest, request_id: str) -> Answer:
    config = service.config
    longest = body.max_completion_tokens or body.max_tokens or config.default_completion_tokens
    if longest > config.max_completion_tokens:
        raise InputError(f"max_tokens is {longest}; allowed: at most {config.max_completion_tokens}")
    if len(body.messages) > config.max_messages:
        raise InputError(f"there are {len(body.messages)} messages; allowed: at most {config.max_messages}")
    messages = [
        Message("system" if message.role == "developer" else message.role, joined(message.content or ""))
        for message in body.messages
    ]
    sampling = Sampling(
        max_tokens=longest,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        stop=body.stops,
    )
    asked = body.moderation and body.moderation.model
    model = asked if asked in service.guards.names else body.model
    return service.answer(Conversation(tuple(messages)), policy(body, config), sampling, request_id, model)


def policy(body: ChatRequest, config: ServeConfig) -> StreamSettings:
    """What a flag does in this chat: as the request asks, or as the server is set where it asks for nothing."""
    modes: dict[str, Mode] = {"input": config.input_mode, "output": config.output_mode}
    if body.moderation is not None:
        asked = body.moderation.policy
        for side in modes:
            given = getattr(asked, side) if asked else None
            mode: Mode = given.mode if given else "score"
            floor = modes[side] if config.minimum else "off"
            modes[side] = max(mode, floor, key=MODES.index)
    own = body.lora_guard
    return StreamSettings(
        mode=modes["output"],
        prompt_mode=modes["input"],
        check_every=(own and own.check_every) or config.check_every,
        debounce=config.debounce,
        # A threshold of the request's own could undo a minimum of moderation.
        prompt_threshold=own.prompt_threshold if own and not config.minimum else None,
        response_threshold=own.response_threshold if own and not config.minimum else None,
        fail_open=config.fail_open,
    )


async def _head(events: AsyncGenerator[Event, None], settings: StreamSettings) -> list[Event]:
    """The events that decide whether a stream begins or an error is sent instead."""
    head = [await anext(events)]
    if isinstance(head[0], Check) and head[0].flagged and settings.mode_of("prompt") == "block":
        head.append(await anext(events))
    return head


@dataclass(frozen=True)
class _Reply:
    """Writes one answer in OpenAI's form."""

    service: Service
    served: Served
    body: ChatRequest
    id: str
    created: int
    state: Any
    """Of the request; ``outcome`` is what a stream that has begun is counted under."""

    @property
    def results(self) -> Results:
        return self.served.results

    async def whole(self, answer: Answer) -> Response:
        """The answer as one JSON body."""
        async with aclosing(answer.events()) as events:
            async for event in events:
                if isinstance(event, ChatEnd):
                    end = event
        blocked = self.is_blocked_prompt(end)
        if blocked and not self.refuses(end):
            raise self.blocked(end)
        text = self.service.config.refusal if blocked else end.response
        message = AssistantMessage(content=text, refusal=text if blocked else None)
        completion = ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.served.name,
            choices=[Choice(message=message, finish_reason=end.finish_reason)],
            usage=self._usage(answer),
            moderation=self._moderation(end, answer.settings),
        )
        form = completion.model_dump(mode="json")
        if completion.moderation is None:
            del form["moderation"]
        return JSONResponse(form)

    async def stream(
        self, answer: Answer, head: list[Event], events: AsyncGenerator[Event, None]
    ) -> AsyncIterator[str]:
        """The answer as server-sent events. An error after the first of them is an event of its own."""
        yield self._delta({"role": "assistant", "content": ""})
        try:
            async with aclosing(_chained(head, events)) as chained:
                async for event in chained:
                    for chunk in self._chunks(event, answer):
                        yield chunk
        except LoraGuardError as error:
            failure = request_error(error)
            self.state.outcome = failure.status
            yield _sse(failure.body)
        yield "data: [DONE]\n\n"

    def _chunks(self, event: Event, answer: Answer) -> list[str]:
        if isinstance(event, str):
            return [self._delta({"content": event})]
        if isinstance(event, Check):
            return [self._check(event)] if self.body.lora_guard and self.body.lora_guard.checks else []
        chunks = []
        if self.is_blocked_prompt(event):
            chunks.append(self._delta({"content": self.service.config.refusal}))
        chunks.append(self._delta({}, event.finish_reason))
        if self.body.stream_options and self.body.stream_options.include_usage:
            chunks.append(self._chunk(choices=[], usage=self._usage(answer).model_dump()))
        moderation = self._moderation(event, answer.settings)
        if moderation is not None:
            chunks.append(self._chunk(choices=[], moderation=moderation.model_dump(mode="json")))
        return chunks

    def is_blocked_prompt(self, end: ChatEnd) -> bool:
        """Whether the prompt, flagged or not judged, got no answer."""
        return end.finish_reason == "content_filter" and end.response_verdict is None and "response" not in end.failed

    def refuses(self, end: ChatEnd) -> bool:
        """Whether a withheld answer is sent as an answer, and not as an error."""
        return not self.is_blocked_prompt(end) or self.service.config.blocked_input == "refusal"

    def blocked(self, end: ChatEnd) -> RequestError:
        """The error of a prompt that was not answered."""
        failed = "prompt" in end.failed
        said = self.results.failure() if failed else end.prompt_verdict and self.results.moderated(end.prompt_verdict)
        moderation = {"input": said.model_dump(mode="json")} if said else {}
        why = "the guard could not judge the prompt" if failed else "the prompt was flagged by the guard"
        return RequestError(400, "content_filter", why, param="messages", moderation=moderation)

    def _moderation(self, end: ChatEnd, settings: StreamSettings) -> Moderation | None:
        if settings.mode == settings.mode_of("prompt") == "off":
            return None
        said = {}
        for side, target, verdict in (
            ("input", "prompt", end.prompt_verdict),
            ("output", "response", end.response_verdict),
        ):
            if target in end.failed:
                said[side] = self.results.failure()
            elif verdict is not None:
                said[side] = self.results.moderated(verdict)
        return Moderation(**said)

    def _usage(self, answer: Answer) -> Usage:
        prompt, completion = answer.usage
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _check(self, check: Check) -> str:
        verdict = check.verdict.to_dict()
        return self._chunk(choices=[], lora_guard={**verdict, "flagged": check.flagged, "tokens": check.tokens})

    def _delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        return self._chunk(choices=[{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def _chunk(self, **fields: Any) -> str:
        form = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.served.name}
        return _sse(form | fields)


async def _chained(head: list[Event], events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event]:
    for event in head:
        yield event
    if not isinstance(head[-1], ChatEnd):
        async for event in events:
            yield event


def _sse(form: dict[str, Any]) -> str:
    return f"data: {json.dumps(form, ensure_ascii=False)}\n\n"
