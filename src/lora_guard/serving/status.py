"""What is served, whether it is up, its metrics, and the playground's page."""

from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel

from lora_guard.serving.metrics import CONTENT_TYPE
from lora_guard.serving.schemas import ModelCard, ModelList
from lora_guard.serving.service import Service
from lora_guard.serving.wire import RequestError, error_responses

STATIC = Path(__file__).parent / "static"

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-cache",
}


class Health(BaseModel):
    """A good state."""

    status: Literal["ok", "ready"]


def routes(service: Service) -> APIRouter:
    """The routes over a service."""
    router = APIRouter(responses=error_responses(421, 500))

    @router.get("/v1/models", responses=error_responses(401, 429))
    async def models() -> ModelList:
        """The one model; requests may name any."""
        return ModelList(data=[ModelCard(id=service.model, created=service.created, owned_by="lora-guard")])

    @router.get("/health")
    async def health() -> Health:
        """The process is alive."""
        return Health(status="ok")

    @router.get("/ready", responses=error_responses(503))
    async def ready() -> Health:
        """The model is loaded and the engine takes requests."""
        if not service.worker.is_ready:
            raise RequestError(503, "unavailable", "the engine takes no requests now")
        return Health(status="ready")

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **error_responses(401, 429)},
    )
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text form."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(STATIC / "playground.html", headers=_PAGE_HEADERS)

    @router.get("/playground.css", include_in_schema=False)
    async def style() -> FileResponse:
        return FileResponse(STATIC / "playground.css", headers=_PAGE_HEADERS)

    @router.get("/playground.js", include_in_schema=False)
    async def script() -> FileResponse:
        return FileResponse(STATIC / "playground.js", media_type="text/javascript", headers=_PAGE_HEADERS)

    return router
