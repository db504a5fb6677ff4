"""``lora-guard serve``: load the guard, then serve it until a signal ends the process."""

import logging

import uvicorn

from lora_guard.errors import ResourceError
from lora_guard.guard import EngineName, Guard
from lora_guard.serving import app
from lora_guard.serving.config import ServeConfig
from lora_guard.serving.service import Service

log = logging.getLogger(__name__)


def serve(
    config: ServeConfig,
    guard: str,
    base: str | None,
    *,
    allow_other_base: bool = False,
    engine: EngineName = "torch",
    policy: str | None = None,
) -> None:
    """Serve a guard; returns when the server has been told to stop and has drained.

    Args:
        config: of the server; further guards in it decide by their own default policies.
        guard: a name, a folder or a hub id.
        base: its chat model; where the guard says when None.
        allow_other_base: serve it on weights that it was not made for.
        engine: which runs it.
        policy: whose thresholds decide; the guard's default policy when None.

    Raises:
        ConfigError: no API keys where there must be some, or no such policy.
        ArtifactError, ModelError: the guard or its base cannot be loaded.
        ResourceError: the audit log cannot be written, or the address is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keys = config.keys()
    loaded = Guard.load(guard, base=base, allow_other_base=allow_other_base, engine=engine, policy=policy)
    others = {
        name: Guard.load(folder, on=loaded, allow_other_base=allow_other_base) for name, folder in config.guards.items()
    }
    service = Service(loaded, config, others)
    log.info("%s on http://%s:%d, %d API keys", ", ".join(service.guards.names), config.host, config.port, len(keys))
    server = uvicorn.Server(
        uvicorn.Config(
            app.build(service, keys),
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,  # a path or query could hold what a user wrote
            server_header=False,
            proxy_headers=False,  # anybody may write an address into them, and so escape the rate of their own
            timeout_graceful_shutdown=max(1, round(config.drain)),
        )
    )
    try:
        server.run()
    except SystemExit as error:
        raise ResourceError(f"{config.host}:{config.port} cannot be listened on; is another server there?") from error
