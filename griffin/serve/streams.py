"""Answers while they come: server-sent events, ended when the client leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from griffin.serve.answers import event
from griffin.serve.errors import ApiError
from griffin.serve.log import say
from griffin.serve.worker import ClientGoneError, while_connected

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class EventStream(Response):
    """A response that is a stream of events.

    Args:
        chunks: the events; an ApiError that it raises becomes the last of them.
        close: called when the stream has ended, however it did.
        last: what ends a stream.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None], *, last: bytes = DONE) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._close, self._last = chunks, close, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                last = self._last
            except ApiError as error:
                last = event(error.reply()) + self._last
            except Exception:  # the status has been sent: the stream must say it
                say(logging.ERROR, "stream failed", id=scope["state"]["id"])
                logging.getLogger("griffin.serve").exception("stream failed")
                last = event(ApiError(500, "the answer failed").reply()) + self._last
            await send({"type": "http.response.body", "body": last, "more_body": False})

        try:
            await while_connected(receive, write())  # type: ignore[arg-type]
        except ClientGoneError:
            pass
        finally:
            self._close()
