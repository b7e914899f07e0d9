"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}, and no other form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from griffin.errors import GriffinError, one_line, printable

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_MOST = 500  # characters of a message: it may repeat what was sent


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    error: ErrorBody


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for a person.
        param: the field of the body that it is about.
        code: for a program.
        retry_after: seconds after which to try again.
        close: whether the connection ends with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        headers = {}
        if retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(retry_after)))
        if close:
            headers["connection"] = "close"
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        message = printable(" ".join(message.split()))
        super().__init__(status, message if len(message) <= _MOST else f"{message[:_MOST]}…", headers)
        self.param, self.code = param, code

    def reply(self) -> ErrorReply:
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.reply(), self.status_code, dict(self.headers or {}))


@contextmanager
def asked_wrongly(param: str | None = None) -> Iterator[None]:
    """Turn what the library says of a caller's mistake into a 400. Only for the building of requests."""
    try:
        yield
    except (GriffinError, ValueError) as error:
        raise ApiError(400, one_line(error), param=param) from error


async def api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """An error of the framework's own: no such route, another method."""
    assert isinstance(error, HTTPException)
    path = printable(str(request.scope["path"]))[:200]
    if error.status_code == 404:
        return ApiError(404, f"there is no route {path}", code="unknown_url").response()
    if error.status_code == 405:
        response = ApiError(405, f"{path} is not for {request.method[:20]}", code="method_not_allowed").response()
        response.headers.update(error.headers or {})
        return response
    return ApiError(error.status_code, str(error.detail)).response()


async def validation_error(request: Request, error: Exception) -> JSONResponse:
    """Say the first thing that is wrong with a body. Pydantic's list repeats what was sent, which may be long."""
    assert isinstance(error, RequestValidationError)
    return invalid([{**each, "loc": each["loc"][1:]} for each in error.errors()]).response()


def invalid(found: Sequence[Any], *, prefix: str = "") -> ApiError:
    """Say the first of pydantic's errors.

    Args:
        found: at least one.
        prefix: of the field's name.
    """
    # Of a union's branches, the one that was nearly right: it is not the type that it misses.
    same = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    first: dict[str, Any] = next((each for each in same if not each["type"].endswith("_type")), found[0])
    # The branches are part of the place: prompt.list[constrained-int].3
    place = [str(part) for part in first["loc"] if str(part) not in ("str", "int", "float")]
    param = ".".join(part[:60] for part in place if re.fullmatch(r"@?[A-Za-z0-9_]+", part))[:200]
    param = ".".join(part for part in (prefix, param) if part)
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing" and not param:
        return ApiError(400, "a JSON object is needed, with content-type: application/json")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {said}" if param else said, param=param or None, code=code)
