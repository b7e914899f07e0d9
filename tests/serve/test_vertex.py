"""Vertex AI's contract, played against the server: its variables, probes, every body of the predict route, drain."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from griffin.errors import GriffinError
from griffin.serve.settings import Settings
from griffin.serve.vertex import Vertex, fetch_model
from tests.serve.conftest import Served, running

ROUTE = "/v1/endpoints/1/deployedModels/2:predict"
MESSAGES = [{"role": "user", "content": "to be?"}]
FAST = {"max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def container(folder: Path) -> Iterator[Served]:
    contract = Vertex.of({"AIP_MODE": "PREDICTION", "AIP_ENDPOINT_ID": "1", "AIP_DEPLOYED_MODEL_ID": "2"})
    assert contract is not None
    assert contract.health_route == contract.predict_route == ROUTE
    assert contract.port == 8080
    with running(Settings(model=str(folder), slots=4, vertex=contract, insecure=True)) as served:
        yield served


def predict(served: Served, body: Any) -> Any:
    status, answer, _ = served.call(ROUTE, body)
    assert status == 200, answer
    return answer


def test_the_variables() -> None:
    assert Vertex.of({}) is None
    both = Vertex.of({"AIP_MODE": "PREDICTION", "AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/generate"})
    assert both is not None
    assert (both.health_route, both.predict_route, both.storage_uri) == ("/health", "/generate", None)
    for wrong in ({"AIP_HTTP_PORT": "x"}, {"AIP_HTTP_PORT": "0"}, {"AIP_HEALTH_ROUTE": "health"}):
        with pytest.raises(GriffinError):
            Vertex.of({"AIP_MODE": "PREDICTION", **wrong})


def test_health_and_predict_on_one_path(container: Served) -> None:
    assert container.call(ROUTE)[:2] == (200, {"status": "ok"})
    assert container.call(ROUTE, method="DELETE")[0] == 405


def test_instances_in_order(container: Served) -> None:
    words = ["To be", "the mind", "or not", "To be"]
    mixed = [words[0], {"prompt": words[1]}, {"messages": MESSAGES}, {"prompt": words[2], "max_tokens": 3}, words[3]]
    predictions = predict(container, {"instances": mixed, "parameters": FAST})["predictions"]
    assert len(predictions) == 5

    def alone(prompt: str, max_tokens: int = 6) -> str:
        body = {"prompt": prompt, **FAST, "max_tokens": max_tokens}
        return str(container.call("/v1/completions", body)[1]["choices"][0]["text"])

    chat = container.call("/v1/chat/completions", {"messages": MESSAGES, **FAST})[1]["choices"][0]["message"]["content"]
    texts = [each["content"] for each in predictions]
    assert texts == [alone(words[0]), alone(words[1]), chat, alone(words[2], 3), alone(words[3])]
    assert predictions[0]["usage"]["completion_tokens"] == 6
    assert predict(container, {"instances": ["a"], "parameters": None})["predictions"][0]["content"]


@pytest.mark.parametrize("top", [False, True])
def test_request_format_at_both_places(container: Served, top: bool) -> None:
    instance = {"messages": MESSAGES, **FAST}
    form = {"@requestFormat": "chatCompletions"}
    body = {"instances": [instance], **form} if top else {"instances": [{**instance, **form}]}
    (prediction,) = predict(container, body)["predictions"]
    bare = container.call("/v1/chat/completions", instance)[1]
    assert prediction["object"] == "chat.completion"
    assert prediction["choices"] == bare["choices"]
    assert predict(container, {**instance, **form})["choices"] == bare["choices"]


def test_bare_bodies_and_streams(container: Served) -> None:
    chat, text = {"messages": MESSAGES, **FAST}, {"prompt": "To be", **FAST}
    whole = container.call("/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"]
    assert predict(container, chat)["choices"][0]["message"]["content"] == whole
    assert predict(container, text)["choices"][0]["text"]
    for body in (
        {**chat, "stream": True},
        {"instances": [{**chat, "stream": True}]},
        {"instances": [chat], "parameters": {"stream": True}},
        {"instances": [{**chat, "stream": True, "@requestFormat": "chatCompletions"}]},
    ):
        status, answer, headers = container.call(ROUTE, body)
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        events = [json.loads(each[6:]) for each in answer.decode().split("\n\n") if each.startswith("data: {")]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole
        assert answer.endswith(b"data: [DONE]\n\n")
    # streamRawPredict may give another content type.
    octets = {"content-type": "application/octet-stream"}
    assert container.call(ROUTE, json.dumps(chat).encode(), headers=octets)[0] == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"instances": []}, "instances"),
        ({"instances": ["a"] * 65}, "instances"),
        ({"instances": "a"}, "instances"),
        ({"instances": ["a", 5]}, "instances[1]"),
        ({"instances": ["a", {"prompt": "b", "temperature": -1}]}, "instances[1].temperature"),
        ({"instances": ["a", {"nothing": 1}]}, "instances[1].nothing"),
        ({"instances": ["a"], "parameters": {"max_tokens": 10**9}}, "instances[0].max_tokens"),
        ({"instances": ["a"], "parameters": []}, "parameters"),
        ({"instances": ["a"], "more": 1}, "more"),
        ({"instances": ["a", {"prompt": "b", "stream": True}]}, None),
        ([], None),
    ],
)
def test_one_wrong_instance_refuses_the_call(container: Served, body: Any, param: str | None) -> None:
    taken = container.engine.stats().requests
    status, answer, _ = container.call(ROUTE, body)
    assert status == 400
    assert param is None or answer["error"]["param"] == param
    assert container.engine.stats().requests == taken


def test_admin_stays_closed_under_arbitrary_routes(container: Served) -> None:
    """invokeRoutePrefix "/*" lets every path through to the container."""
    assert container.call("/admin/anything")[1]["error"]["code"] == "no_admin_key"
    assert container.call("/v1/models")[0] == 200


class _Blob:
    def __init__(self, name: str, file: Path | None, fetched: list[str]) -> None:
        self.name, self._file, self._fetched = name, file, fetched

    def download_to_filename(self, target: str, *, checksum: str) -> None:
        assert checksum == "crc32c"
        assert self._file is not None, f"{self.name} was fetched"
        self._fetched.append(self.name)
        Path(target).write_bytes(self._file.read_bytes())


class _Bucket:
    """What fetch_model uses of google.cloud.storage.Client."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        self._blobs = [_Blob(f"models/m/{file.name}", file, self.fetched) for file in folder.iterdir()]
        sly = ("models/m/x.bin", "models/m/code.py", "models/m/../../x.json", "models/m/sub/a.json", "models/m/")
        self._blobs += [_Blob(name, None, self.fetched) for name in sly]

    def list_blobs(self, bucket: str, prefix: str) -> list[_Blob]:
        assert bucket == "b"
        return [blob for blob in self._blobs if blob.name.startswith(prefix)]


def test_a_model_is_fetched_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    client = _Bucket(folder)
    target = fetch_model("gs://b/models/m", tmp_path / "m", client)
    assert sorted(each.name for each in target.iterdir()) == sorted(each.name for each in folder.iterdir())
    count = len(client.fetched)
    fetch_model("gs://b/models/m/", tmp_path / "m", client)  # there already
    assert len(client.fetched) == count
    with pytest.raises(GriffinError, match="no weights in safetensors"):
        fetch_model("gs://b/models/none", tmp_path / "n", client)
    with pytest.raises(GriffinError, match="gs://"):
        fetch_model("https://b/models", tmp_path / "n", client)
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_the_player_against_the_real_entry_point(folder: Path) -> None:
    """What Vertex AI does with a container, in its order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIP_")},
        "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": str(port),
        "AIP_HEALTH_ROUTE": "/health",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_ENDPOINT_ID": "1",
        "AIP_DEPLOYED_MODEL_ID": "2",
    }
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "griffin", "serve", str(folder), "--slots", "2"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )

    def call(path: str, body: Any = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json", "host": "vertex.internal"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    try:
        while True:  # liveness: TCP, 4 tries 10 s apart
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() - began < 30
                time.sleep(0.05)
        time.monotonic() - began
        seen = []
        while not seen or seen[-1] != 200:
            seen.append(call("/health")[0])
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        assert set(seen[:-1]) <= {503}
        assert json.loads(call("/predict", {"instances": ["To be"], "parameters": FAST})[1])["predictions"]
        assert json.loads(call("/predict", {"messages": MESSAGES, **FAST})[1])["object"] == "chat.completion"
        assert call("/predict", {"prompt": "To be", **FAST, "stream": True})[1].endswith(b"data: [DONE]\n\n")
        assert call("/v1/models")[0] == 200  # invoke
        assert call("/predict", {"instances": []})[0] == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr is not None
        events = [json.loads(line)["event"] for line in process.stderr]
        assert {"listening", "ready", "draining", "drained"} <= set(events)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
