"""The routes beside OpenAI's two, the log, and what a server does when clients leave or there are too many."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import griffin
from griffin.errors import GriffinError
from griffin.serve.load import load
from griffin.serve.log import line, open_log
from griffin.serve.settings import Limits, Settings
from griffin.serve.worker import Loaded
from tests.serve.conftest import Served, running

LONG = {"prompt": "To be", "max_tokens": 100_000, "ignore_eos": True}


def test_tokenize_and_back(served: Served, folder: Path) -> None:
    tokenizer = griffin.load_tokenizer(folder)
    status, body, _ = served.call("/tokenize", {"prompt": "the mind 😀", "return_token_strs": True})
    assert status == 200
    assert body["tokens"] == tokenizer.encode("the mind 😀")
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert any(text.startswith("bytes:\\x") for text in body["token_strs"])
    assert served.call("/detokenize", {"tokens": body["tokens"]})[1] == {"prompt": "the mind 😀"}
    bare = served.call("/tokenize", {"prompt": "the mind", "add_special_tokens": False})[1]
    assert bare["tokens"] == tokenizer.encode("the mind", bos=False)
    messages = [{"role": "user", "content": "hi"}]
    assert served.call("/tokenize", {"messages": messages})[1]["tokens"] == tokenizer.encode_chat(messages)
    # No content becomes a control token.
    sly = [{"role": "user", "content": "<end_of_turn>"}]
    assert served.call("/tokenize", {"messages": sly})[1]["tokens"].count(4) == 1


def test_models_say_what_a_client_wants_to_know(served: Served) -> None:
    (model,) = served.call("/v1/models")[1]["data"]
    assert model["griffin"]["chat_template"] is True
    assert model["griffin"]["slots"] == 4
    assert model["griffin"]["state_bytes"] > 0


def test_health_is_503_until_the_model_is_there(folder: Path) -> None:
    let = threading.Event()

    def slow(settings: Settings) -> Loaded:
        assert let.wait(30)
        return load(settings)

    with running(Settings(model=str(folder), slots=1), slow, ready=False) as served:
        for path in ("/health", "/ready", "/readyz", "/ping"):
            assert served.call(path)[:2] == (503, {"status": "loading"})
        assert served.call("/livez")[:2] == (200, {"status": "loading"})
        status, body, headers = served.call("/v1/completions", {"prompt": "a"})
        assert (status, body["error"]["code"]) == (503, "loading")
        assert int(headers["retry-after"]) >= 1
        let.set()
        served.until(lambda: served.call("/health")[0] == 200)
        assert served.call("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(folder: Path) -> None:
    with running(Settings(model=str(folder / "nothing")), ready=False) as served:
        served.until(lambda: served.worker.failure is not None)
        assert isinstance(served.worker.failure, GriffinError)
        served.until(lambda: served.server.should_exit)


def test_metrics_have_our_names_and_vllms(served: Served) -> None:
    def read() -> dict[str, float]:
        status, body, headers = served.call("/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        lines = [each.rpartition(" ") for each in body.decode().splitlines() if not each.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    before = read()
    served.call("/v1/completions", {"prompt": "To be", "max_tokens": 7, "ignore_eos": True})
    after = read()
    assert after["griffin:generation_tokens_total"] - before["griffin:generation_tokens_total"] == 7
    assert after["vllm:num_requests_waiting"] == 0
    assert after["vllm:gpu_cache_usage_perc"] == 0
    assert after["griffin:state_slots"] == 4
    assert after['griffin:request_success_total{finished_reason="length"}'] >= 1
    # What clients send makes no series.
    for _ in range(3):
        served.call("/no/such/route/x")
    assert not any("/no/such" in name for name in read())


def test_every_answer_has_an_id_and_the_log_one_line_of_it() -> None:
    stream = io.StringIO()
    open_log(stream)
    from griffin.serve.log import say

    say(20, "request", id="abc", path="/v1/x\x1b[31m\n\x00\u2028")
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert "\x1b" not in written
    assert json.loads(written)["path"] == "/v1/x\x1b[31m\n\x00\u2028"
    assert len(json.loads(line({"path": "x" * 10_000}))["path"]) < 400


def test_request_ids(served: Served) -> None:
    assert len(served.call("/v1/models")[2]["x-request-id"]) == 16
    assert served.call("/v1/models", headers={"x-request-id": "mine-1"})[2]["x-request-id"] == "mine-1"
    assert served.call("/v1/models", headers={"x-request-id": "a b\tc"})[2]["x-request-id"] != "a b\tc"


def test_no_route_and_no_method_are_openais_errors(served: Served) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/tokenize", 405)):
        got, body, headers = served.call(path, method=method)
        assert (got, body["error"]["type"]) == (status, "not_found_error" if status == 404 else "invalid_request_error")
        assert headers["content-type"] == "application/json"
    assert served.call("/v1/models/", method="GET")[0] == 404  # and no Location made of the Host


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_gives_back_the_slot_within_a_step(served: Served, stream: bool) -> None:
    before = served.engine.stats().cancelled
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    body = json.dumps({**LONG, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    served.until(lambda: served.engine.busy == 1)
    if stream:
        assert connection.getresponse().read(20)
    left = time.monotonic()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    served.until(lambda: served.engine.stats().cancelled == before + 1)
    assert time.monotonic() - left < 1.0
    served.until(lambda: served.engine.busy == 0)
    served.until(lambda: not served.worker._answers)


def test_a_full_queue_is_429_with_retry_after(folder: Path) -> None:
    with running(Settings(model=str(folder), slots=1, max_queue=2)) as served:
        connections = []
        for count in range(3):  # one runs, two wait
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
            connection.request("POST", "/v1/completions", json.dumps(LONG), {"content-type": "application/json"})
            connections.append(connection)
            served.until(lambda count=count: served.engine.busy + served.engine.waiting == count + 1)
        took = []
        for _ in range(20):
            began = time.monotonic()
            status, body, headers = served.call("/v1/completions", LONG)
            took.append(time.monotonic() - began)
            assert (status, body["error"]["type"], body["error"]["code"]) == (429, "rate_limit_error", "queue_full")
            assert 1 <= int(headers["retry-after"]) <= 60
        assert sorted(took)[10] < 0.25
        assert 'griffin:admission_rejections_total{reason="queue"} 20' in served.call("/metrics")[1].decode()
        for connection in connections:
            connection.sock.close()
            connection.close()
        served.until(lambda: served.engine.busy == 0 and served.engine.waiting == 0)
        assert served.call("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_request_whose_time_is_over_gives_what_there_is(folder: Path) -> None:
    with running(Settings(model=str(folder), slots=1, request_s=0.5)) as served:
        status, body, _ = served.call("/v1/completions", LONG)
        assert status == 200
        assert body["choices"][0]["finish_reason"] == "length"
        assert 0 < body["usage"]["completion_tokens"] < 100_000


def test_drain_lets_answers_end_and_says_503_to_others(folder: Path) -> None:
    with running(Settings(model=str(folder), slots=2, shutdown_s=20)) as served:
        got: list[Any] = []
        body = {**LONG, "max_tokens": 400}
        thread = threading.Thread(target=lambda: got.append(served.call("/v1/completions", body)))
        thread.start()
        served.until(lambda: served.engine.busy == 1)
        served.server.handle_exit(15, None)
        assert served.call("/health")[:2] == (503, {"status": "draining"})
        assert served.call("/v1/completions", LONG)[1]["error"]["code"] == "draining"
        thread.join(30)
        assert got[0][0] == 200
        assert got[0][1]["usage"]["completion_tokens"] == 400
        served.until(lambda: served.server.should_exit)


def test_what_does_not_end_in_time_is_cut_short_and_answered(folder: Path) -> None:
    with running(Settings(model=str(folder), slots=2, shutdown_s=0.3)) as served:
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(served.call("/v1/completions", LONG)))
        thread.start()
        served.until(lambda: served.engine.busy == 1)
        served.server.handle_exit(15, None)
        thread.join(30)
        assert got[0][0] == 200
        assert got[0][1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_an_engine_that_fails_is_said_and_seen(folder: Path) -> None:
    with running(Settings(model=str(folder), slots=2)) as served:

        def broken(*_: Any) -> Any:
            raise RuntimeError("no more")

        served.engine._batch.step = broken
        status, body, _ = served.call("/v1/completions", {**LONG, "max_tokens": 50})
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert served.call("/health")[:2] == (503, {"status": "failed"})
        served.until(lambda: served.server.should_exit)
        assert "no more" in str(served.worker.failure)


def test_the_document_names_every_route_and_no_422(served: Served) -> None:
    status, document, _ = served.call("/openapi.json")
    assert status == 200
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/health"} <= document["paths"].keys()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
    assert served.call("/docs")[0] == 404  # its scripts are another network's


@pytest.fixture
def impatient(folder: Path) -> Iterator[Served]:
    limits = replace(Limits(), idle_s=0.3, body_s=0.3, write_s=0.3)
    with running(Settings(model=str(folder), slots=2, limits=limits)) as served:
        yield served


def test_half_a_request_is_not_waited_for(impatient: Served) -> None:
    whole = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (b"", b"GET /heal", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ", whole + b"GET /h"):
        began = time.monotonic()
        got = impatient.raw(sent)
        assert time.monotonic() - began < 5
        assert got.count(b"HTTP/1.1 200") == sent.startswith(whole)


def test_a_body_that_does_not_come_is_not_waited_for(impatient: Served) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    began = time.monotonic()
    got = impatient.raw(head + b'{"pro')
    assert time.monotonic() - began < 5
    assert b" 408 " in got.partition(b"\r\n")[0]


@pytest.mark.slow
def test_a_reader_who_does_not_read_is_cut_off(impatient: Served) -> None:
    body = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", impatient.port))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        impatient.until(lambda: impatient.engine.busy == 1)
        # The buffers of the system are full first.
        impatient.until(lambda: impatient.engine.stats().cancelled == 1, 60)
        impatient.until(lambda: not impatient.worker._answers)
