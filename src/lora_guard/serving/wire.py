"""Errors on the wire: OpenAI's envelope, the HTTP status of each of our errors, and nothing of the request's text."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from lora_guard.errors import BusyError, DeadlineError, GuardError, InputError, LoraGuardError, ResourceError
from lora_guard.serving.samples import ERROR

_PAUSE = "5"
"""Seconds after which a server that takes no requests may take some again, or another one stands in its place."""


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's API says it."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    model_config = ConfigDict(json_schema_extra={"examples": [ERROR]})

    error: ErrorDetail


class RequestError(Exception):
    """Ends a request with an HTTP status and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(code)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}

    @property
    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def request_error(error: LoraGuardError) -> RequestError:
    """What the client is told of one of our errors."""
    if isinstance(error, BusyError):
        if error.retry_after is None:
            return RequestError(503, "unavailable", str(error), headers={"Retry-After": _PAUSE})
        return RequestError(429, "queue_full", str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, DeadlineError):
        return RequestError(504, "deadline_exceeded", str(error))
    if isinstance(error, GuardError):
        return RequestError(503, "guard_error", str(error))
    if isinstance(error, InputError):
        return RequestError(400, "invalid_value", str(error))
    if isinstance(error, ResourceError):
        return RequestError(503, "out_of_resources", "the server lacks memory or disk space for this request")
    return RequestError(500, "internal_error", "the server failed on this request")


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route in OpenAPI: each status with the error body."""
    meaning = {
        400: "The request is not valid, or its prompt was blocked",
        401: "The API key is missing or unknown",
        413: "The body is too large",
        421: "The host name is not this server's",
        429: "Too many requests; try again after Retry-After seconds",
        500: "The server failed",
        503: "The engine or its guard gives no answer now",
        504: "The request was not done by its deadline",
    }
    return {status: {"model": ErrorBody, "description": meaning[status]} for status in statuses}


def install(app: FastAPI) -> None:
    """Let every error of the app leave in the envelope."""

    @app.exception_handler(RequestError)
    async def known(request: Request, error: RequestError) -> JSONResponse:
        return error.response

    @app.exception_handler(LoraGuardError)
    async def ours(request: Request, error: LoraGuardError) -> JSONResponse:
        return request_error(error).response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
        code = codes.get(error.status_code, "invalid_request")
        headers = dict(error.headers or {})
        return RequestError(error.status_code, code, f"{error.detail}", headers=headers).response


def _invalid(error: RequestValidationError) -> RequestError:
    """The first finding: field and rule, without the value, which is the user's text."""
    problem = error.errors()[0]
    place = [str(part)[:60] for part in problem["loc"] if part != "body"]
    param = ".".join(place) or None
    if problem["type"] == "json_invalid":
        return RequestError(400, "invalid_json", "the body is not JSON")
    rule = problem["msg"].removeprefix("Value error, ")
    return RequestError(400, "invalid_value", f"{param or 'body'}: {rule}", param=param)
