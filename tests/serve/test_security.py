"""What strangers send. Each class of fault that other servers had has a test with its number in the name."""

from __future__ import annotations

import hmac
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from griffin.errors import GriffinError
from griffin.serve import guard
from griffin.serve.guard import OPEN
from griffin.serve.log import open_log
from griffin.serve.settings import Limits, Settings, digests, is_loopback, read_keys
from tests.serve.conftest import Served, running

KEY, OTHER, ADMIN = "key-of-one-tenant", "key-of-another", "key-of-the-admin"
HEAD = b"Host: localhost\r\n"


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Served]:
    """A server with two keys and an administrator's."""
    settings = Settings(
        model=str(folder), slots=2, keys=digests([KEY, OTHER], "test"), admin_keys=digests([ADMIN], "test")
    )
    with running(settings, key=KEY) as each:
        yield each


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\n".encode()
        + HEAD
        + b"Content-Type: application/json\r\nConnection: close\r\n"
        + b"".join(header + b"\r\n" for header in headers)
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def test_every_route_asks_for_a_key_but_health_and_the_page(locked: Served) -> None:
    """vLLM's key guarded some prefixes only."""
    app = locked.server.config.app
    document = app.openapi()
    paths = [*document["paths"], "/openapi.json", "/nothing", "/v1", "//v1/models", "/V1/models", "/metrics"]
    assert len(paths) > 12
    for path in paths:
        place = path.replace("{", "").replace("}", "")
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            status = locked.call(place, method=method, headers={"authorization": ""})[0]
            assert (status == 401) == (path not in OPEN), (method, path, status)
    for wrong in ("", "Bearer", "Bearer ", "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY):
        status, body, headers = locked.call("/v1/models", headers={"authorization": wrong})
        assert (status, body["error"]["code"]) == (401, "invalid_api_key"), wrong
        assert headers["www-authenticate"] == "Bearer"
    for right in ({"authorization": f"Bearer {OTHER}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}):
        assert locked.call("/v1/models", headers={"authorization": "", **right})[0] == 200


@pytest.mark.parametrize(
    "host",
    [b"localhost/health?", b"localhost/health#", b"x@localhost/ping", b"/health", b"localhost:80/health/..", b"a\\b"],
)
def test_cve_2026_48746_and_48710_a_host_is_no_path(locked: Served, host: bytes) -> None:
    """vLLM asked for a key by a path rebuilt from Host, which Starlette let hold a path."""
    got = locked.raw(b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert status_of(got) in (400, 401)


@pytest.mark.parametrize("target", [b"/health/../v1/models", b"/health%2f..%2fv1/models", b"//health", b"/health;x"])
def test_a_path_that_begins_as_an_open_one_is_not_open(locked: Served, target: bytes) -> None:
    got = locked.raw(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status_of(got) == 401


def test_cve_2025_59425_keys_are_compared_in_constant_time(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, whole, by compare_digest, wherever they differ."""
    seen: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(guard.hmac, "compare_digest", counted)
    for given in (KEY, OTHER, ADMIN, "x", KEY[:-1] + "x", "x" * 500, ""):
        seen.clear()
        locked.call("/v1/models", headers={"authorization": f"Bearer {given}"})
        assert seen == [(32, 32)] * 3


def test_cve_2026_7301_admin_routes_want_the_administrators_key(locked: Served, served: Served) -> None:
    """SGLang's admin routes were open."""
    assert locked.call("/admin/anything")[0] == 401
    assert locked.call("/admin/anything", headers={"authorization": f"Bearer {ADMIN}"})[0] == 404
    assert served.call("/admin/anything")[1]["error"]["code"] == "no_admin_key"


def test_a_public_address_needs_a_key(folder: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(GriffinError, match="--api-key-file"):
            Settings(model=str(folder), host=host)
        Settings(model=str(folder), host=host, insecure=True)
        Settings(model=str(folder), host=host, keys=digests([KEY], "test"))
    assert is_loopback("127.8.9.1")
    assert is_loopback("::1")
    assert not is_loopback("127.0.0.1.nip.io")


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n")
    assert read_keys(file) == digests([KEY, OTHER], "test")
    for content in ("", "# none\n", "short\n", "with blank in it\n", "schlüssel-schlüssel\n"):
        file.write_text(content)
        with pytest.raises(GriffinError, match="openssl rand"):
            read_keys(file)


def test_without_keys_no_page_of_another_site_gets_in(served: Served) -> None:
    """DNS rebinding, and a form of another origin: the browser is on this machine, its page is not."""
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80", ""):
        status, body, _ = served.call("/v1/models", headers={"host": host})
        assert (status, body["error"]["code"]) == (403, "wrong_host"), host
    for host in (f"localhost:{served.port}", f"127.0.0.1:{served.port}", "[::1]:80", "LOCALHOST"):
        assert served.call("/v1/models", headers={"host": host})[0] == 200
    assert served.call("/v1/models", headers={"origin": "https://evil.example"})[1]["error"]["code"] == "wrong_origin"
    own = {"host": f"localhost:{served.port}", "origin": f"http://localhost:{served.port}"}
    assert served.call("/v1/models", headers=own)[0] == 200
    # A form can send text/plain without asking first.
    sent = served.call("/tokenize", b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert sent[0] == 400


def test_hosts_missing_or_double(served: Served) -> None:
    """uvicorn's other parser takes both."""
    assert status_of(served.raw(b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n")) == 400
    two = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert status_of(served.raw(two)) == 400


def test_two_lengths_in_one_request_end_the_connection(served: Served) -> None:
    """A proxy that trusts the other length would take the rest for another client's request."""
    inner = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for first, second in (
        (b"Content-Length: 4", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: chunked", b"Content-Length: 4"),
    ):
        head = b"POST /tokenize HTTP/1.1\r\n" + HEAD + first + b"\r\n" + second + b"\r\n\r\n"
        got = served.raw(head + b"0\r\n\r\n" + inner)
        assert status_of(got) == 400
        assert got.count(b"HTTP/1.1 ") == 1
    for lengths in (
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +4\r\n",
    ):
        assert status_of(served.raw(b"POST /tokenize HTTP/1.1\r\n" + HEAD + lengths + b"\r\nabcd" + inner)) == 400


def test_cve_2025_48956_headers_are_few_and_short(served: Served) -> None:
    """vLLM took headers of any size."""
    many = b"".join(b"X-%d: y\r\n" % number for number in range(10_000))
    for headers in (many, b"X-A: " + b"a" * 40_000 + b"\r\n", b"X-A: " + b"a" * 50_000_000 + b"\r\n", many[:2000]):
        began = time.monotonic()
        try:
            got = served.raw(b"GET /livez HTTP/1.1\r\n" + HEAD + headers + b"Connection: close\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            got = b""  # it closed before all was sent
        assert status_of(got) in (0, 400, 431)
        assert time.monotonic() - began < 5
    assert served.call("/livez")[0] == 200


def test_bodies_are_bounded_while_they_arrive(served: Served) -> None:
    most = Limits().body_bytes
    declared = (
        post("/tokenize", b"")[:-5].replace(b"Content-Length: ", b"Content-Length: %d" % (most + 1)) + b"\r\n\r\n"
    )
    assert status_of(served.raw(declared)) == 413
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    head = (
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(head)
        got = b""
        try:
            for _ in range(64):
                connection.sendall(chunk)
            got = connection.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            connection.settimeout(1)
            try:
                got = connection.recv(65536)
            except OSError:
                got = b""
        assert status_of(got) in (0, 413)
    assert served.call("/livez")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "logit_bias": {"5": NaN}}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "a", "seed": 1' + b"0" * 30 + b"}",
        b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udfff a"}',
        b'{"prompt": "a", "stop": "\\ud800"}',
        b'{"prompt": "a", "user": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a"',
        b'"a"',
        b"[]",
        b"null",
        b"5",
        b"",
        b"\x00",
        b'{"prompt": true}',
        b'{"prompt": {"a": 1}}',
        b'{"prompt": [1.5]}',
        b'{"prompt": [[1], "a"]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [4294967296]}',
        b'{"prompt": [[]]}',
        b'{"prompt": "a", "max_tokens": 2.5}',
        b'{"prompt": "a", "max_tokens": "2"}',
        b'{"prompt": "a", "stream": 1}',
        b'{"prompt": "a", "n": true}',
        b'{"prompt": "a", "stop": [' + b'"a",' * 10_000 + b'"a"]}',
        b'{"prompt": "a", "model": "' + b"x" * 10_000 + b'"}',
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_bodies_that_are_none_are_400_in_openais_form(served: Served, body: bytes) -> None:
    status, answer, headers = served.call("/v1/completions", body, method="POST")
    assert status == 400, answer
    assert headers["content-type"] == "application/json"
    assert answer["error"]["type"] == "invalid_request_error"
    assert len(answer["error"]["message"]) < 600


@pytest.mark.parametrize("field", ["n", "best_of", "max_tokens", "top_k", "min_tokens", "logprobs", "seed"])
def test_cve_2026_34756_and_21869_every_number_is_bounded(served: Served, field: str) -> None:
    """vLLM took any n; llama.cpp wrote out of bounds at a negative n_discard."""
    for value in (-(2**70), -(2**63) - 1, 2**63, 2**70, 10**18):
        if field == "seed" and abs(value) == 10**18:
            continue
        status, answer, _ = served.call("/v1/completions", {"prompt": "a", field: value})
        assert (status, answer["error"]["param"]) == (400, field)


def test_cve_2026_44222_lists_and_texts_are_capped_before_they_are_tokenised(served: Served, folder: Path) -> None:
    for body in (
        {"prompt": ["a"] * 10_000},
        {"prompt": [[5]] * 10_000},
        {"prompt": "a", "logit_bias": {str(token): 1 for token in range(3000)}},
        {"prompt": "a", "stop_token_ids": [5] * 1000},
    ):
        assert served.call("/v1/completions", body)[0] == 400
    messages = [{"role": "user", "content": "a"}] * 10_000
    assert served.call("/v1/chat/completions", {"messages": messages})[0] == 400
    tools = [{"type": "function", "function": {"name": f"f{at}"}} for at in range(1000)]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    assert served.call("/v1/chat/completions", body)[0] == 400
    limits = replace(Limits(), prompt_chars=1000)
    with running(Settings(model=str(folder), slots=1, limits=limits)) as small:
        loaded = small.worker.ready()
        loaded.tokenizer.encode = pytest.fail
        for path, asked in (
            ("/v1/completions", {"prompt": "a" * 1001}),
            ("/v1/completions", {"prompt": ["a" * 501] * 2}),
            ("/tokenize", {"prompt": "a" * 1001}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 1001}]}),
        ):
            status, answer, _ = small.call(path, asked)
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded"), path


def test_an_empty_prompt_is_refused_and_nothing_breaks(served: Served) -> None:
    """Several servers crashed. A text begins with BOS, so an empty one has a token."""
    assert served.call("/v1/completions", {"prompt": "", "max_tokens": 2})[0] == 200
    assert served.call("/v1/completions", {"prompt": [], "max_tokens": 2})[0] == 400
    assert served.call("/v1/completions", {"prompt": [[]], "max_tokens": 2})[0] == 400
    assert served.call("/v1/chat/completions", {"messages": []})[0] == 400


def test_cve_2024_34359_and_2026_5760_no_text_of_a_client_is_a_template(served: Served) -> None:
    """llama-cpp-python and SGLang rendered templates that came with files or requests, with all of Python in reach."""
    sly = "{{ 7 * 191 }}{% for x in ().__class__.__base__.__subclasses__() %}x{% endfor %}"
    messages = [{"role": "user", "content": sly}]
    tokens = served.call("/tokenize", {"messages": messages})[1]["tokens"]
    text = served.call("/detokenize", {"tokens": tokens})[1]["prompt"]
    assert sly in text
    assert "1337" not in text


@pytest.mark.parametrize(
    "field",
    ["chat_template", "chat_template_kwargs", "documents", "prompt_embeds", "mm_processor_kwargs", "add_special"],
)
def test_cve_2025_62426_and_62164_no_template_kwargs_no_embeddings(served: Served, field: str) -> None:
    """vLLM let kwargs stand in for the template's own, and loaded tensors from requests."""
    body = {"messages": [{"role": "user", "content": "a"}], field: {"tokenize": True}}
    status, answer, _ = served.call("/v1/chat/completions", body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unknown_parameter", field)


@pytest.mark.slow
def test_a_template_that_does_not_end_ends(folder: Path) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with running(Settings(model=str(folder), slots=1, chat_template=loop)) as served:
        done: list[float] = []

        def probe() -> None:
            began = time.monotonic()
            served.call("/livez")
            done.append(time.monotonic() - began)

        began = time.monotonic()
        asking = threading.Thread(
            target=served.call, args=("/tokenize", {"messages": [{"role": "user", "content": "a"}]})
        )
        asking.start()
        probe()
        asking.join(60)
        assert time.monotonic() - began < 45
        assert done[0] < 2  # rendered off the event loop
        assert served.call("/tokenize", {"prompt": "a"})[0] == 200


def test_cve_2026_33626_no_url_is_ever_fetched(served: Served) -> None:
    """LMDeploy fetched the images' addresses that clients named."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "file", "file": {"file_id": url}},
        ):
            body = {"messages": [{"role": "user", "content": [part]}]}
            status, answer, _ = served.call("/v1/chat/completions", body)
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert served.call("/v1/completions", {"prompt": url, "max_tokens": 1})[0] == 200
        with pytest.raises(TimeoutError):
            listener.accept()


def test_cve_2026_22807_and_27893_no_code_comes_with_a_model(folder: Path, tmp_path: Path) -> None:
    """vLLM ran auto_map's module although trust_remote_code was false."""
    sly = tmp_path / "sly"
    shutil.copytree(folder, sly)
    (sly / "SHA256SUMS").unlink(missing_ok=True)
    config = json.loads((sly / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_sly.Sly", "AutoConfig": "modeling_sly.Config"}
    (sly / "config.json").write_text(json.dumps(config))
    (sly / "modeling_sly.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with running(Settings(model=str(sly), slots=1), ready=False) as served:
        served.until(lambda: served.worker.status != "loading", 60)
    assert not (tmp_path / "ran").exists()


def test_cve_2025_32434_24357_2026_24747_and_3059_nothing_is_unpickled() -> None:
    """torch.load, of other people's files and on sockets."""
    import griffin.serve

    sources = list(Path(griffin.serve.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for file in sources:
        text = file.read_text()
        for word in ("pickle", "torch.load", "marshal", "shelve", "eval(", "exec(", "trust_remote_code", "subprocess"):
            assert word not in text, (file.name, word)


def test_control_characters_never_reach_the_log(folder: Path) -> None:
    stream = io.StringIO()
    with running(Settings(model=str(folder), slots=1)) as served:
        open_log(stream)
        served.raw(b"GET /%1b[31mred%0a%0d%00%e2%80%a8 HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n")
        served.raw(b"GET /\x1b[31m HTTP/1.1\r\n" + HEAD + b"\r\n", shut=True)
        served.raw(b"GET /\xff\xfe HTTP/1.1\r\n" + HEAD + b"\r\n", shut=True)
        served.raw(b"GET /a HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: \xc2\x9b31m\r\nConnection: close\r\n\r\n")
        served.call("/v1/completions", {"prompt": "secret words", "max_tokens": 1})
        served.call("/v1/completions", {"prompt": "a", "user": "secret words", "temperature": -1})
        served.until(lambda: stream.getvalue().count('"event": "request"') >= 4)
        open_log(io.StringIO())
    written = stream.getvalue()
    assert not [letter for letter in written if (letter < " " and letter != "\n") or letter > "~"]
    for each in written.splitlines():
        json.loads(each)
    assert "secret" not in written


def test_cve_2026_9540_nothing_is_left_of_those_who_leave(served: Served) -> None:
    """vLLM kept what aborted requests held."""

    def files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0

    body = json.dumps({"prompt": "To be", "max_tokens": 100_000, "ignore_eos": True, "stream": True}).encode()

    def round_of(count: int) -> None:
        connections = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", served.port))
            connection.sendall(post("/v1/completions", body))
            connections.append(connection)
        served.until(lambda: served.engine.busy + served.engine.waiting == count)
        for connection in connections:
            connection.close()
        served.until(lambda: served.engine.busy == 0 and served.engine.waiting == 0 and not served.worker._answers)
        served.until(lambda: not served.server.server_state.connections)

    round_of(8)
    before = files(), threading.active_count()
    for _ in range(4):
        round_of(16)
    assert files() <= before[0]
    assert threading.active_count() <= before[1] + 2  # asyncio's own pool
