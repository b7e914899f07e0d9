"""JSON of strangers: one parser for every route."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from griffin.errors import GriffinError, one_line
from griffin.reading import parse_json
from griffin.serve.errors import ApiError


def parse(body: bytes) -> Any:
    """Parse a body: UTF-8, at most 100 deep, no NaN, no lone surrogate, no key twice, no endless number.

    Raises:
        ApiError: 400, it is not that.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start}", code="invalid_json") from None
    try:
        return parse_json(text, "the body", mend="send one JSON object", constants=False)
    except GriffinError as error:
        raise ApiError(400, one_line(error), code="invalid_json") from error


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse(await self.body())


class JsonRoute(APIRoute):
    """A route whose JSON is parsed by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json
