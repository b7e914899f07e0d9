"""The real command in a process of its own: start, SIGTERM, kill -9, and what is said when it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


class Process:
    """`griffin serve` on a free port."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.began = time.monotonic()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AIP_", "GRIFFIN_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "griffin", "serve", str(folder), "--port", "0", *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.events = [json.loads(self.process.stderr.readline())]
        self.url = self.events[0]["url"]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.events += [json.loads(line) for line in self.process.stderr]

    def call(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def until_ready(self) -> None:
        while self.call("/health")[0] != 200:
            assert time.monotonic() - self.began < 90
            time.sleep(0.05)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        return status


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Process]:
    process = Process(folder, *arguments)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        process._reader.join(10)
        if process.process.stderr is not None:
            process.process.stderr.close()


def test_health_answers_while_the_model_is_loaded_and_sigterm_ends_with_0(folder: Path) -> None:
    with started(folder, "--shutdown-timeout", "80") as process:
        assert process.call("/health") == (503, {"status": "loading"})
        time.monotonic() - process.began
        process.until_ready()
        time.monotonic() - process.began
        assert process.call("/v1/completions", {"prompt": "To be", "max_tokens": 1})[0] == 200
        got: list[Any] = []
        body = {"prompt": "To be", "max_tokens": 500, "ignore_eos": True}
        asking = threading.Thread(target=lambda: got.append(process.call("/v1/completions", body)))
        asking.start()
        time.sleep(0.3)
        assert process.end(signal.SIGTERM) == 0
        asking.join(30)
        assert got[0][0] == 200
        assert got[0][1]["usage"]["completion_tokens"] == 500
        assert [each["event"] for each in process.events if each["event"] in ("draining", "drained")] == [
            "draining",
            "drained",
        ]


def test_kill_9_keeps_what_was_saved(folder: Path, tmp_path: Path) -> None:
    body = {"prompt": "To be", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with started(folder, "--state-folder", str(tmp_path)) as process:
        process.until_ready()
        name = process.call("/v1/sessions", {})[1]["id"]
        process.call("/v1/completions", {**body, "session": name})
        assert process.call(f"/v1/sessions/{name}/save", {})[0] == 200
        expected = process.call("/v1/completions", {**body, "prompt": " or not", "session": name})[1]["choices"]
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
    with started(folder, "--state-folder", str(tmp_path)) as process:
        process.until_ready()
        again = process.call("/v1/completions", {**body, "prompt": " or not", "session": name})
        assert again[0] == 200
        assert again[1]["choices"] == expected


def test_what_cannot_start_says_so_in_one_line(folder: Path, tmp_path: Path) -> None:
    def fails(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "griffin", "serve", *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("griffin: error: ")
        assert "Traceback" not in done.stderr
        return last

    assert "none" in fails(str(tmp_path / "none"), "--port", "0")
    assert "--api-key-file" in fails(str(folder), "--host", "0.0.0.0")
    assert "which model?" in fails()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in fails(str(folder), "--port", str(taken.getsockname()[1]))
    (tmp_path / "keys").write_text("short\n")
    assert "openssl rand" in fails(str(folder), "--api-key-file", str(tmp_path / "keys"))
