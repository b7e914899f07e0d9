"""A server from its start to its end: the port first, the model behind it, and on SIGTERM nothing lost."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from griffin.errors import GriffinError
from griffin.serve.app import create_app, warn_of
from griffin.serve.log import open_log, say
from griffin.serve.protocol import timed
from griffin.serve.settings import Settings
from griffin.serve.worker import Loaded, Worker

_BACKLOG = 2048
_LAST_TICKS = 20  # for those who wait to be told


class Server(uvicorn.Server):
    """uvicorn's, with another end: the port stays open while what runs ends, and says 503.

    Args:
        config: uvicorn's.
        worker: what is drained.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._failed_at: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.worker.on_failure = self._fail
        self.worker.start()  # after the port answers: importing torch keeps Python busy for a second

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second. An engine that has failed answers nothing more: what runs it starts another process."""
        if self.worker.status == "failed" and self._failed_at is None:
            self._failed_at = counter
        if self._failed_at is not None and (counter - self._failed_at) % 864_000 > _LAST_TICKS:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first signal drain, on the second end."""
        if self.worker.draining or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self.worker.draining = True
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        say(logging.INFO, "draining", within_s=self.worker.settings.shutdown_s)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self.worker.drain(self.worker.settings.shutdown_s)
        self.should_exit = True

    def _fail(self) -> None:
        self.should_exit = True


def make_server(settings: Settings, load: Callable[[Settings], Loaded] | None = None) -> Server:
    """Make what serves, not yet running. Its `run([listener])` returns when it has ended.

    Args:
        settings: its options; the address is the listener's.
        load: see `create_app`.
    """
    app = create_app(settings, load)
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = uvicorn.Config(
        app,
        http=timed(settings.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who a client is, its key says, not a header
        h11_max_incomplete_event_size=settings.limits.header_bytes,
        timeout_keep_alive=int(settings.limits.idle_s),
        timeout_graceful_shutdown=5,
        limit_concurrency=max(64, min(2 * settings.limits.connections, most_files - 64)),
        backlog=_BACKLOG,
    )
    return Server(config, app.state.worker)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        GriffinError: the port is taken, or the model cannot be loaded.
    """
    listener = bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    open_log()
    say(logging.INFO, "listening", url=f"http://{_shown(host)}:{port}", model=settings.model, page=settings.page)
    server = make_server(settings)
    warn_of(settings)
    try:
        server.run([listener])
    finally:
        server.worker.close()
    if (failure := server.worker.failure) is not None:
        raise failure


def bind(host: str, port: int) -> socket.socket:
    """Open the port at once: what asks whether anyone is there gets an answer while the model is loaded.

    Raises:
        GriffinError: it is taken, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        return listener
    except OSError as error:
        raise GriffinError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another --port or --host"
        ) from error


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
