"""A ``lora-guard serve`` process for the benchmarks here: started, awaited, measured and stopped."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import psutil


@contextmanager
def server(*settings: str) -> Iterator[tuple[str, psutil.Process]]:
    """Serve the default guard on a free port of this machine; yields its address and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lora_guard", "serve", "--port", str(port)]
    process = subprocess.Popen([*command, *(word for setting in settings for word in ("--set", setting))])
    url = f"http://127.0.0.1:{port}"
    try:
        await_ready(url, process)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def await_ready(url: str, process: "subprocess.Popen[bytes]") -> float:
    """Wait until the server takes requests; the seconds that took."""
    begun = time.monotonic()
    while True:
        try:
            if httpx2.get(f"{url}/ready").status_code == 200:
                return time.monotonic() - begun
        except httpx2.TransportError:
            pass
        if process.poll() is not None:
            raise SystemExit(f"the server ended with code {process.returncode}")
        time.sleep(0.1)


def chat(text: str, tokens: int, mode: str | None = "score", **more: object) -> dict[str, object]:
    """The body of a greedy chat completion; no moderation where the mode is None."""
    policy = {"input": {"mode": mode}, "output": {"mode": mode}}
    moderation = {} if mode is None else {"moderation": {"model": "default", "policy": policy}}
    messages = [{"role": "user", "content": text}]
    return {"model": "default", "messages": messages, "max_tokens": tokens, "temperature": 0, **moderation, **more}
