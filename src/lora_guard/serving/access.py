"""Who may call and how much: host names, API keys, rates and body sizes, decided before a route sees the request."""

import hmac
import logging
import time
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from math import ceil

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_guard.errors import LoraGuardError
from lora_guard.serving import playground
from lora_guard.serving.config import ServeConfig
from lora_guard.serving.metrics import Metrics
from lora_guard.serving.wire import RequestError, request_error

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", *playground.FILES})
"""Served without a key: they tell nothing but that the server is there."""

_CLIENT_LEFT = 499

_CALLERS = 10_000
"""Callers whose rate is remembered."""

_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Access:
    """ASGI middleware around the whole app.

    Args:
        app: what is served.
        config: limits and host names.
        keys: the API keys; none opens the server to all that reach it.
        metrics: counts each request by route and outcome: its status, or the one of what ended a stream.
        paths: the routes' paths, which are counted by name also where a request is refused before it is routed.
    """

    def __init__(
        self, app: ASGIApp, *, config: ServeConfig, keys: Sequence[str], metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self._app = app
        self._config = config
        self._keys = [key.encode() for key in keys]
        self._metrics = metrics
        self._paths = paths
        self._rates = Rates(config.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = request_id = f"req-{uuid.uuid4().hex}"
        status = 500
        begun = ended = False

        async def counted(message: Message) -> None:
            nonlocal status, begun, ended
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            try:
                self._admit(scope)
                await self._app(scope, _bounded(receive, self._config.max_body_bytes), counted)
            except RequestError as error:
                await error.response(scope, receive, counted)
            except Exception as error:
                _report(error, request_id)
                scope["state"]["outcome"] = 500
                if not begun:
                    await request_error(LoraGuardError()).response(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            outcome = scope["state"].get("outcome", status if ended or not begun else _CLIENT_LEFT)
            self._metrics.requests.labels(getattr(scope.get("route"), "path", path), str(outcome)).inc()

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not _is_host(headers.get("host", ""), self._config.hosts):
            raise RequestError(421, "wrong_host", "the Host header names another server; see allowed_hosts")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._config.max_body_bytes:
            raise _too_large(self._config.max_body_bytes)
        # A browser asks with OPTIONS, without the key, whether a page of another origin may call.
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        caller = (scope.get("client") or ("unknown", 0))[0]
        if self._keys:
            caller = self._known(headers)
        wait = self._rates.take(caller)
        if wait:
            raise RequestError(
                429, "rate_limit_exceeded", f"over {self._config.requests_per_minute} requests a minute",
                headers={"Retry-After": str(wait)},
            )  # fmt: skip

    def _known(self, headers: Headers) -> str:
        """The key's place among the keys; every key is compared, each in constant time."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")  # how LiteLLM's generic guardrail sends it
        found = [hmac.compare_digest(given.strip().encode("utf-8", "replace"), key) for key in self._keys]
        if not any(found):
            raise RequestError(
                401, "invalid_api_key", "the API key is missing or unknown; give it as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return f"key {found.index(True)}"


class Rates:
    """A token bucket a caller: a burst of a minute's requests, refilled evenly.

    Args:
        per_minute: requests of one caller; None for no bound.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, now: float | None = None) -> int:
        """Use up one request; 0 if there was one, otherwise the seconds until there is."""
        if self._per_minute is None:
            return 0
        now = time.monotonic() if now is None else now
        left, before = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - before) * self._per_minute / 60)
        allowed = left >= 1
        self._buckets[caller] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _CALLERS:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, ceil((1 - left) * 60 / self._per_minute))


def _bounded(receive: Receive, limit: int) -> Receive:
    """Count a body whose length was not announced."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > limit:
                # Of all that a body's reader may raise, the framework passes on only this.
                raise HTTPException(413, f"the body is too large; allowed: {limit} bytes")
        return message

    return bounded


def _report(error: Exception, request_id: str) -> None:
    """Log an error that nobody foresaw: its type and place, not its message, which could hold the request's text."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    log.error("%s failed: %s at %s:%s", request_id, type(error).__name__, frame.filename, frame.lineno)


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is too large; allowed: {limit} bytes")


def _is_host(host: str, allowed: Sequence[str]) -> bool:
    """Whether a Host header, its port aside, is among the allowed ones; ``*.x`` stands for any name below ``x``."""
    name = host.rsplit(":", 1)[0] if host.rsplit(":", 1)[-1].isdecimal() else host
    return any(
        pattern == "*" or pattern == name or (pattern.startswith("*.") and name.endswith(pattern[1:]))
        for pattern in allowed
    )
