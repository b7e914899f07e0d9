"""HTTP/1.1 by h11, with clocks: half a request is not waited for, and a reader who does not read is cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from griffin.serve.settings import Limits


def timed(limits: Limits) -> type[asyncio.Protocol]:
    """Give uvicorn a protocol that keeps to `limits`. The httptools parser takes 50 MB headers and two Hosts."""

    class Timed(H11Protocol):
        _head: asyncio.TimerHandle | None = None  # runs while a request's head is incomplete
        _unread: asyncio.TimerHandle | None = None  # runs while the client reads nothing

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except (UnicodeDecodeError, h11.LocalProtocolError):  # a target that is not ASCII; bytes after an error
                self.transport.abort()
                return
            self._watch_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._unread is None:
                self._unread = self.loop.call_later(limits.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for clock in (self._head, self._unread):
                if clock is not None:
                    clock.cancel()

        def _watch_head(self) -> None:
            """A head has begun, or the connection has, and nobody is being answered: it may take `idle_s`."""
            if self.conn.their_state is not h11.IDLE:
                if self._head is not None:
                    self._head.cancel()
                    self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(limits.idle_s, self._close_idle)

        def _close_idle(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return Timed
