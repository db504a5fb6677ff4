"""The server as a Ray Serve application: replicas by load, each one copy of the weights; guards put in while it runs.

::

    serve run lora_guard.scale.deployment:application guard=default most_replicas=8

or, with a YAML file for ``serve deploy``, ``import_path: lora_guard.scale.deployment:application``, the fields of
:class:`Settings` as ``args``, and the guards to have beside the default as the deployment's ``user_config``, which can
be deployed anew while the replicas run.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application

from lora_guard import artifact
from lora_guard.errors import LoraGuardError, ResourceError
from lora_guard.guard import EngineName, Guard, find
from lora_guard.process_memory import suit_torch
from lora_guard.serving import app
from lora_guard.serving.config import ServeConfig
from lora_guard.serving.service import Service

log = logging.getLogger(__name__)


class Settings(BaseModel):
    """What the application is started with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guard: str = "default"
    """The default guard: it names the chat model, and answers where a request names no other."""
    base: str | None = None
    """As in :meth:`lora_guard.guard.Guard.load`."""
    allow_other_base: bool = False
    engine: EngineName = "torch"
    server: ServeConfig = Field(default_factory=lambda: ServeConfig.model_validate({}))
    """Each replica's; ``host`` is the address that Ray's proxy listens on, and decides whether there must be keys."""
    least_replicas: int = Field(1, ge=1)
    most_replicas: int = Field(1, ge=1)
    requests_per_replica: float = Field(4.0, gt=0)
    """Requests under way in a replica, on average, beyond which there is one more."""
    cpus: float = Field(1.0, gt=0)
    """Of a replica, which runs as many threads."""
    gpus: float = Field(0.0, ge=0)


class Extra(BaseModel):
    """The deployment's ``user_config``: what can change while the replicas run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guards: dict[str, str] = {}
    """Guards by the name that requests give as their ``model``: folders or hub ids. The default's name puts another in
    its place."""


@serve.ingress()
class Replica:
    """One process: a chat model, its guards, one engine thread, and the routes over them.

    Args:
        settings: the application's.
    """

    def __init__(self, settings: Settings) -> None:
        config = settings.server
        if config.audit is not None:  # replicas of one machine would rotate each other's file away
            name = serve.get_replica_context().replica_id.unique_id
            config = config.model_copy(update={"audit": config.audit.with_suffix(f".{name}{config.audit.suffix}")})
        if settings.engine == "torch":
            suit_torch(os.environ)
        self._guard = Guard.load(
            settings.guard, base=settings.base, allow_other_base=settings.allow_other_base, engine=settings.engine
        )
        self._is_up = False
        self._allow_other_base = settings.allow_other_base
        self._config = config
        self._service = Service(self._guard, config)
        (self._default,) = self._service.guards.names
        self._startup = {self._default: settings.guard, **config.guards}
        self._loaded = {self._default: _fingerprint(find(settings.guard))}

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve's place for the web application."""
        return app.build(self._service, self._config.keys())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Have exactly the guards that the application and the ``user_config`` name.

        A guard whose folder or contents differ from what is loaded is put in the place of the one that is; requests
        under way end with the one they began with. All new guards are loaded before the first is put in.

        Ray ends a replica whose reconfiguration fails. So one that serves logs the error and goes on with what it has:
        a mistyped folder must not leave chats without a guard.

        Raises:
            LoraGuardError, ValidationError: a replica that does not serve yet cannot have these guards.
        """
        try:
            await self._have(user_config)
        except (LoraGuardError, ValidationError) as error:
            if not self._is_up:
                raise
            log.error("the guards stay as they were: %s", " ".join(str(error).split()))
        self._is_up = True

    async def _have(self, user_config: dict[str, Any]) -> None:
        """:meth:`reconfigure`, or an error and all as it was."""
        wanted = self._startup | Extra.model_validate(user_config).guards
        prints = await asyncio.to_thread(lambda: {name: _fingerprint(find(guard)) for name, guard in wanted.items()})
        new = {name: found for name, found in prints.items() if self._loaded.get(name) != found}
        for name, guard in (await asyncio.to_thread(self._load, {name: wanted[name] for name in new})).items():
            self._service.put(name, guard)
        for name in self._loaded.keys() - prints.keys():
            self._service.put(name, None)
        self._loaded = prints

    def _load(self, wanted: Mapping[str, str]) -> dict[str, Guard]:
        """Load guards on the chat model: all of them, or none."""
        loaded: dict[str, Guard] = {}
        try:
            for name, guard in wanted.items():
                loaded[name] = Guard.load(guard, on=self._guard, allow_other_base=self._allow_other_base)
        except LoraGuardError:
            for guard_on_model in loaded.values():
                guard_on_model.engine.leave()
            raise
        return loaded

    async def check_health(self) -> None:
        """Ray Serve's probe: a replica whose engine is stuck is put away, and another begun.

        Raises:
            ResourceError: the engine takes no requests.
        """
        if not self._service.worker.is_ready:
            raise ResourceError("the engine takes no requests")


def application(settings: Settings) -> Application:
    """The application for ``serve.run``, ``serve run`` and ``serve deploy``.

    Raises:
        ConfigError: no API keys where there must be some.
    """
    settings.server.keys()  # missing ones are found here, not on each replica
    deployment = serve.deployment(
        Replica,
        name="lora-guard",
        user_config=Extra().model_dump(),
        max_ongoing_requests=settings.server.queue,
        autoscaling_config={
            "min_replicas": settings.least_replicas,
            "max_replicas": settings.most_replicas,
            "target_ongoing_requests": settings.requests_per_replica,
        },
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.server.drain,
    )
    return deployment.bind(settings)


def _fingerprint(folder: Path) -> tuple[str, str]:
    """What tells a guard from another: its folder, and its spec, which names the hash of all that decides a score."""
    return str(folder), artifact.read_spec(folder).model_dump_json()
