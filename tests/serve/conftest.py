"""A real server on a loopback port, over a tiny model with random weights."""

from __future__ import annotations

import faulthandler
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import griffin
from griffin.tokenizer import Tokenizer
from griffin.tokenizer.chat_template import GEMMA

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")
pytest.importorskip("uvicorn", reason="the server's tests need the extra serve")

from griffin.serve.load import load
from griffin.serve.run import Server, bind, make_server
from griffin.serve.settings import Settings
from griffin.serve.worker import Loaded

TEXTS = ["To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. "] * 20


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights that prefer some tokens, a vocabulary of its own, Gemma's template."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer.train(TEXTS, 320, chat_template=GEMMA)
    config = replace(griffin.PRESETS["griffin-tiny"], vocab_size=tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(0)
    model = griffin.Griffin(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    griffin.save(model.eval(), path, tokenizer)
    return path


@dataclass
class Served:
    """A server that runs in a thread of this process."""

    url: str
    port: int
    server: Server
    key: str | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def worker(self) -> Any:
        return self.server.worker

    @property
    def engine(self) -> Any:
        return self.worker.ready().engine

    def call(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Give status, parsed answer and headers."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        if self.key is not None:
            sent.setdefault("authorization", f"Bearer {self.key}")
        request = urllib.request.Request(self.url + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content, status, got = answer.read(), answer.status, dict(answer.headers)
        except urllib.error.HTTPError as error:
            content, status, got = error.read(), error.code, dict(error.headers)
            error.close()
        got = {name.lower(): value for name, value in got.items()}
        is_json = content and got.get("content-type", "").startswith("application/json")
        parsed = json.loads(content) if is_json else content
        return status, parsed, got

    def raw(self, data: bytes, *, timeout: float = 20.0, shut: bool = False) -> bytes:
        """Send bytes, and read to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            got = b""
            try:
                while part := connection.recv(65536):
                    got += part
            except ConnectionResetError:
                pass
            return got

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.01)


@contextmanager
def running(
    settings: Settings, loader: Callable[[Settings], Loaded] = load, *, key: str | None = None, ready: bool = True
) -> Iterator[Served]:
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # a client that does not read is seen soon
    port = listener.getsockname()[1]
    server = make_server(settings, loader)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    served = Served(f"http://127.0.0.1:{port}", port, server, key)
    try:
        served.until(lambda: server.started)
        if ready:
            served.until(lambda: server.worker.status != "loading", 60)
            assert server.worker.failure is None, server.worker.failure
        yield served
    finally:
        server.should_exit = True
        thread.join(60)
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
        server.worker.close()
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Served]:
    """The server that most tests share: no key, 4 slots."""
    with running(Settings(model=str(folder), slots=4, chunk=64)) as each:
        yield each
