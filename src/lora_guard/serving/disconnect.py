"""Work for a client ends when the client leaves: a response that is made as a whole is raced against the disconnect."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request

from lora_guard.serving.wire import RequestError

Result = TypeVar("Result")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; it is cancelled when the client disconnects.

    Raises:
        RequestError: the client has gone, so that nobody reads this error.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestError(499, "client_closed_request", "the client closed the request")
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _left(request: Request) -> None:
    """Return when the client has disconnected; the body has been read, so that nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
