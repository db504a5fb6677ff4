"""A real server on a free port of this machine, over a tiny guard in memory, for tests that speak HTTP to it."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from guards import tiny_guard_folder
from openai import OpenAI

from lora_guard import Guard
from lora_guard.serving import app
from lora_guard.serving.config import ServeConfig
from lora_guard.serving.service import Service


@dataclass
class Running:
    """A server that runs, and what is behind it."""

    url: str
    service: Service
    guard: Guard
    loop: asyncio.AbstractEventLoop
    clients: list[OpenAI] = field(default_factory=list)

    def openai(self, key: str = "none") -> OpenAI:
        """OpenAI's own client; it does not try again, so that a test sees each answer."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        self.clients.append(client)
        return client

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=60, **more)

    def metric(self, name: str, **labels: str) -> float:
        """The present value of a sample."""
        return self.service.metrics.registry.get_sample_value(f"lora_guard_{name}", labels) or 0.0


def tiny_guard(folder: Path, **settings: Any) -> Guard:
    """A tiny guard with an activated adapter, fp32."""
    return Guard.load(tiny_guard_folder(folder, adapter_kind="alora", **settings), precision="fp32")


@contextmanager
def serving(
    guard: Guard, *, keys: tuple[str, ...] = (), others: Mapping[str, Guard] | None = None, **config: Any
) -> Iterator[Running]:
    """Serve the guard, and others on its chat model, while the block runs."""
    service = Service(guard, ServeConfig(**{"drain": 5.0, **config}), others or {})
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app.build(service, keys), log_level="error", access_log=False, timeout_graceful_shutdown=5)
    )
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        while True:
            try:
                httpx2.get(f"{url}/health", timeout=60)
                break
            except httpx2.TransportError:
                assert thread.is_alive()
        running = Running(url, service, guard, loops[0])
        yield running
        for client in running.clients:
            client.close()
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; a test that waits in vain is stopped from outside."""
    while not condition():
        time.sleep(0.005)


def asked(text: str, tokens: int = 20, mode: str = "score", **more: Any) -> dict[str, Any]:
    """The body of a chat request whose prompt and answer are moderated."""
    policy = {"input": {"mode": mode}, "output": {"mode": mode}}
    messages = [{"role": "user", "content": text}]
    moderation = {"model": "any", "policy": policy}
    return {
        "model": "any", "messages": messages, "max_tokens": tokens, "temperature": 0, "moderation": moderation, **more
    }  # fmt: skip
