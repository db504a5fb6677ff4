"""What is served, whether it is up, and its metrics."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from lora_guard.serving.metrics import CONTENT_TYPE
from lora_guard.serving.samples import MODELS, answered
from lora_guard.serving.schemas import ModelCard, ModelList
from lora_guard.serving.service import Service
from lora_guard.serving.wire import RequestError, error_responses


class Health(BaseModel):
    """A good state."""

    status: Literal["ok", "ready"]


def routes(service: Service) -> APIRouter:
    """The routes over a service."""
    router = APIRouter(responses=error_responses(421, 500))

    @router.get("/v1/models", responses={**answered(MODELS), **error_responses(401, 429)})
    async def models() -> ModelList:
        """The chat model, once with each guard on it. Requests may name any: the first answers for unknown names."""
        cards = [ModelCard(id=name, created=service.created, owned_by="lora-guard") for name in service.guards.names]
        return ModelList(data=cards)

    @router.get("/health", responses=answered({"status": "ok"}))
    async def health() -> Health:
        """The process is alive."""
        return Health(status="ok")

    @router.get("/ready", responses={**answered({"status": "ready"}), **error_responses(503)})
    async def ready() -> Health:
        """The model is loaded and the engine takes requests."""
        if not service.worker.is_ready:
            raise RequestError(503, "unavailable", "the engine takes no requests now")
        return Health(status="ready")

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": "lora_guard_queue_depth 0.0\n"}}},
            **error_responses(401, 429),
        },
    )
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text form."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return router
