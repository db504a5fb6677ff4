"""The web application: routes over a service, within access control, with the worker's life bound to its own."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from lora_guard.serving import completions, detectors, moderations, playground, status, wire
from lora_guard.serving.access import OPEN_PATHS, Access
from lora_guard.serving.service import Service


def build(service: Service, keys: Sequence[str]) -> FastAPI:
    """The application. Its start starts the worker, its end drains it.

    Args:
        service: the guard to serve.
        keys: the API keys; none opens it to all that reach it.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.close)

    app = FastAPI(
        title="LoRA-Guard",
        version=version("lora-guard"),
        description="Moderation and moderated chat completions from one copy of a chat model's weights.",
        lifespan=life,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    for routes in (completions.routes, moderations.routes, detectors.routes, status.routes):
        app.include_router(routes(service))
    paths = frozenset(app.openapi()["paths"])
    app.include_router(playground.routes())
    wire.install(app)
    if keys:
        _describe_keys(app)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_middleware(Access, config=service.config, keys=keys, metrics=service.metrics, paths=paths)
    return app


def _describe_keys(app: FastAPI) -> None:
    """Let the API's description name the keys, which are checked before any route sees a request."""
    description = app.openapi()
    description["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operations in description["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {"header": []}]
