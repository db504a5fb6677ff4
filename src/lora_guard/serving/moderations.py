"""``POST /v1/moderations``: OpenAI's moderation endpoint over the guard."""

import uuid

from fastapi import APIRouter, Request

from lora_guard.conversation import Conversation
from lora_guard.errors import InputError
from lora_guard.serving.disconnect import unless_disconnected
from lora_guard.serving.samples import MODERATION, answered
from lora_guard.serving.schemas import ModerationRequest, ModerationResponse
from lora_guard.serving.service import Service
from lora_guard.serving.wire import error_responses


def routes(service: Service) -> APIRouter:
    """The route over a service."""
    router = APIRouter()

    @router.post(
        "/v1/moderations",
        responses={**answered(MODERATION), **error_responses(400, 401, 413, 421, 429, 500, 503, 504)},
    )
    async def moderations(request: Request, body: ModerationRequest) -> ModerationResponse:
        """Judge each text as a prompt. Several texts are judged on their own; text parts are one text."""
        conversations = [Conversation.of(text) for text in bounded(body.texts(), service)]
        served, verdicts = await unless_disconnected(
            request, service.moderate(conversations, request.state.request_id, body.model)
        )
        results = [served.results.item(verdict) for verdict in verdicts]
        return ModerationResponse(id=f"modr-{uuid.uuid4().hex}", model=served.name, results=results)

    return router


def bounded(texts: list[str], service: Service) -> list[str]:
    """The texts, if they are not too many.

    Raises:
        InputError: more than the server takes in one request.
    """
    limit = service.config.max_items
    if len(texts) > limit:
        raise InputError(f"there are {len(texts)} texts; allowed: at most {limit} a request")
    return texts
