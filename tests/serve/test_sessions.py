"""Sessions over HTTP: the same tokens as one long prompt, forks, files, tenants, and an answer taken up elsewhere."""

from __future__ import annotations

import errno
import http.client
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import griffin
from griffin.infer.generate import generate
from griffin.serve.settings import Settings, digests
from tests.serve.conftest import Served, running

KEY, OTHER = "key-of-one-tenant", "key-of-another"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that saves sessions, of two tenants."""
    settings = Settings(
        model=str(folder), slots=4, keys=digests([KEY, OTHER], "test"), state_folder=tmp_path_factory.mktemp("states")
    )
    with running(settings, key=KEY) as served:
        yield served


@pytest.fixture(scope="module")
def direct(folder: Path) -> Any:
    model, tokenizer = griffin.load(folder), griffin.load_tokenizer(folder)
    return lambda prompts, **options: generate(model, tokenizer, prompts, **options)


def ok(answer: tuple[int, Any, dict[str, str]]) -> Any:
    assert answer[0] == 200, answer[1]
    return answer[1]


def new(served: Served, body: Any = None) -> str:
    return str(ok(served.call("/v1/sessions", body or {}))["id"])


def text(served: Served, name: str, prompt: str, max_tokens: int = 8, **more: Any) -> str:
    body = {"prompt": prompt, "session": name, "max_tokens": max_tokens, **GREEDY, **more}
    answer = ok(served.call("/v1/completions", body))
    assert answer["session"] == name
    return str(answer["choices"][0]["text"])


def test_a_text_goes_on_as_if_it_were_one_prompt(kept: Served, folder: Path, direct: Any) -> None:
    tokenizer = griffin.load_tokenizer(folder)
    name = new(kept)
    ids = tokenizer.encode("To be, or not")
    for piece in ("", " the mind", " to suffer"):
        ids += tokenizer.encode(piece, bos=False)
        said = piece if piece else "To be, or not"
        (expected,) = direct([ids], max_tokens=8, temperature=0, ignore_eos=True)
        assert text(kept, name, said) == expected.text
        ids += expected.tokens
    session = ok(kept.call(f"/v1/sessions/{name}"))
    assert session["kind"] == "text"
    assert session["tokens_read"] + session["tokens_unread"] == len(ids)
    bytes_then = session["bytes"]
    text(kept, name, " and more" * 50, 64)
    assert ok(kept.call(f"/v1/sessions/{name}"))["bytes"] <= 2 * bytes_then  # not by what it has read


def test_a_chat_goes_on_as_its_template_writes_it(kept: Served) -> None:
    name = new(kept)
    messages: list[Any] = []
    for said in ("to be?", "or not?", "why?"):
        messages.append({"role": "user", "content": said})
        body = {"messages": [messages[-1]], "session": name, "max_tokens": 6, "temperature": 0}
        answer = ok(kept.call("/v1/chat/completions", body))["choices"][0]["message"]
        whole = {"messages": messages, "max_tokens": 6, "temperature": 0}
        assert answer == ok(kept.call("/v1/chat/completions", whole))["choices"][0]["message"]
        messages.append(answer)
    session = ok(kept.call(f"/v1/sessions/{name}"))
    assert (session["kind"], session["messages"]) == ("chat", 6)
    status, error, _ = kept.call("/v1/completions", {"prompt": "x", "session": name})
    assert (status, error["error"]["param"]) == (400, "session")


def test_append_then_ask(kept: Served) -> None:
    name = new(kept, {"prompt": "To be,"})
    ok(kept.call(f"/v1/sessions/{name}/append", {"prompt": " or not"}))
    assert ok(kept.call(f"/v1/sessions/{name}"))["tokens_read"] == 0
    pieces = new(kept)
    assert text(kept, name, " the mind") == text(kept, pieces, "To be, or not the mind")
    chat = new(kept, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    ok(kept.call(f"/v1/sessions/{chat}/append", {"messages": [{"role": "user", "content": "c"}]}))
    asked = {"messages": [], "session": chat, "max_tokens": 6, "temperature": 0}
    whole = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "max_tokens": 6,
        "temperature": 0,
    }
    one = ok(kept.call("/v1/chat/completions", asked))["choices"]
    assert one == ok(kept.call("/v1/chat/completions", whole))["choices"]


def test_forks_part_and_streams_move_them(kept: Served) -> None:
    name = new(kept)
    text(kept, name, "To be, or not")
    twin = ok(kept.call(f"/v1/sessions/{name}/fork", {}))["id"]
    assert twin != name
    here, there = text(kept, name, " the mind"), text(kept, twin, " the sea")
    again = ok(kept.call(f"/v1/sessions/{name}/fork", {}))["id"]
    body = {"prompt": " to sleep", "session": again, "max_tokens": 8, "stream": True, **GREEDY}
    status, stream, _ = kept.call("/v1/completions", body)
    assert status == 200
    events = [json.loads(each[6:]) for each in stream.decode().split("\n\n") if each.startswith("data: {")]
    streamed = "".join(event["choices"][0]["text"] for event in events)
    assert streamed == text(kept, name, " to sleep")
    assert text(kept, again, " and") == text(kept, name, " and")
    assert here
    assert there


def test_export_import_delete(kept: Served, folder: Path) -> None:
    name = new(kept)
    text(kept, name, "To be, or not")
    status, file, headers = kept.call(f"/v1/sessions/{name}/export")
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    octets = {"content-type": "application/octet-stream"}
    with running(Settings(model=str(folder), slots=1)) as elsewhere:
        there = ok(elsewhere.call("/v1/sessions/import", file, headers=octets))["id"]
        assert there != name
        assert text(elsewhere, there, " the mind") == text(kept, name, " the mind")
        for bad in (b"", b"x" * 100, file[:-1], file[:50], file[:400] + b"\xff" * 8 + file[408:]):
            status, answer, _ = elsewhere.call("/v1/sessions/import", bad, method="POST", headers=octets)
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        ok(elsewhere.call(f"/v1/sessions/{there}", method="DELETE"))
        assert elsewhere.call(f"/v1/sessions/{there}")[1]["error"]["code"] == "session_not_found"
        assert ok(elsewhere.call("/v1/sessions"))["data"] == []


def test_saved_sessions_outlive_the_process(folder: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(folder), slots=2, state_folder=tmp_path)
    with running(settings) as served:
        name = new(served)
        text(served, name, "To be, or not")
        ok(served.call(f"/v1/sessions/{name}/save", {}))
        expected = text(served, name, " the mind")
        ok(served.call(f"/v1/sessions/{name}/restore", {}))
        assert text(served, name, " the mind") == expected
        ok(served.call(f"/v1/sessions/{name}/save", {}))
        lost = new(served)
    with running(settings) as served:  # nothing was drained: only what was saved is there
        assert [each["id"] for each in ok(served.call("/v1/sessions"))["data"]] == [name]
        assert served.call(f"/v1/sessions/{lost}")[0] == 404
        assert text(served, name, " to sleep")
        (file,) = tmp_path.rglob("*.session")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with running(settings) as served:  # a damaged file is said, and the others are served
        status, _answer, _ = served.call("/v1/completions", {"prompt": "x", "session": name})
        assert status in (400, 404)
        assert text(served, new(served), "To be")


def test_a_full_disk_is_said_and_the_session_goes_on(kept: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    name = new(kept)
    text(kept, name, "To be, or not")
    from griffin.infer import session_file

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.session")

    monkeypatch.setattr(session_file, "write", full)
    for path, body in ((f"/v1/sessions/{name}/save", {}), (f"/v1/sessions/{name}/export", None)):
        status, answer, _ = kept.call(path, body)
        assert status == 507
        assert "No space left" in answer["error"]["message"]
    assert text(kept, name, " the mind")


def test_without_a_folder_saving_is_refused(served: Served) -> None:
    name = new(served)
    status, answer, _ = served.call(f"/v1/sessions/{name}/save", {})
    assert (status, answer["error"]["code"]) == (400, "no_state_folder")


def test_names_are_the_servers_and_a_tenants_own(kept: Served) -> None:
    """llama.cpp let clients name files: links and dots led out of the folder."""
    name = new(kept)
    other = {"authorization": f"Bearer {OTHER}"}
    for method, path in (
        ("GET", f"/v1/sessions/{name}"),
        ("DELETE", f"/v1/sessions/{name}"),
        ("POST", f"/v1/sessions/{name}/fork"),
        ("GET", f"/v1/sessions/{name}/export"),
        ("POST", f"/v1/sessions/{name}/save"),
    ):
        assert kept.call(path, method=method, headers=other)[1]["error"]["code"] == "session_not_found"
    body = {"prompt": "x", "session": name}
    assert kept.call("/v1/completions", body, headers=other)[0] == 404
    assert ok(kept.call("/v1/sessions", headers=other))["data"] == []
    for sly in (
        "..",
        "%2e%2e",
        "..%2f..%2fetc%2fpasswd",
        "A" * 26,
        "a" * 25,
        "a" * 27,
        "a" * 25 + "%00",
        "a" * 25 + "1",
    ):
        assert kept.call(f"/v1/sessions/{sly}/save", {})[0] in (400, 404), sly
        assert kept.call("/v1/completions", {"prompt": "x", "session": sly})[0] == 400, sly


def test_one_request_at_a_time(kept: Served) -> None:
    name = new(kept)
    body = {"prompt": "To be", "session": name, "max_tokens": 100_000, **GREEDY}
    connection = http.client.HTTPConnection("127.0.0.1", kept.port, timeout=30)
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    kept.until(lambda: name in kept.worker.sessions_in_use)
    for path, asked in (
        ("/v1/completions", {"prompt": "x", "session": name}),
        (f"/v1/sessions/{name}/append", {"prompt": "x"}),
        (f"/v1/sessions/{name}/continue", {}),
    ):
        assert kept.call(path, asked)[1]["error"]["code"] == "session_busy"
    connection.sock.close()
    connection.close()
    kept.until(lambda: name not in kept.worker.sessions_in_use)
    # Who has left finds the session where its answer was cut, and can let it go on.
    assert ok(kept.call(f"/v1/sessions/{name}"))["can_continue"]


def test_cve_2025_46570_what_one_tenant_sent_is_not_seen_by_another(kept: Served) -> None:
    """vLLM's prefix cache told by its time, and by cached tokens, what others had sent."""
    prompt = "whether 'tis nobler in the mind to suffer " * 30
    body = {"prompt": prompt, "max_tokens": 1, **GREEDY}

    def cached(key: str) -> int:
        answer = ok(kept.call("/v1/completions", body, headers={"authorization": f"Bearer {key}"}))
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEY) == 0
    again = cached(KEY)
    assert again > 100
    assert cached(OTHER) == 0
    assert cached(OTHER) == again


@pytest.mark.slow
def test_a_cut_answer_is_taken_up_by_another_process_with_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    """SIGTERM in mid-answer: the session is saved, and another server goes on with it."""
    settings = Settings(model=str(folder), slots=2, state_folder=tmp_path, shutdown_s=0.1)
    body = {"max_tokens": 1200, "seed": 7, "temperature": 1.0, "ignore_eos": True, "stop": ["never in there"]}
    with running(settings) as other, running(settings) as served:
        whole = ok(served.call("/v1/completions", {**body, "prompt": "To be"}))["choices"][0]["text"]
        name = new(served)
        got: list[Any] = []

        def ask() -> None:
            data = json.dumps({**body, "prompt": "To be", "session": name, "stream": True}).encode()
            request = urllib.request.Request(f"{served.url}/v1/completions", data, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        got.append(json.loads(line[6:])["choices"][0])

        thread = threading.Thread(target=ask)
        thread.start()
        served.until(lambda: len(got) > 20)
        served.server.handle_exit(15, None)
        thread.join(30)
        served.until(lambda: served.server.should_exit)
        first = "".join(choice["text"] for choice in got)
        assert got[-1]["finish_reason"] == "length"
        assert 0 < len(first) < len(whole)
        # By one that is started later, and by one that runs beside it on the same folder.
        with running(settings) as later:
            for taker in (later, other):
                assert ok(taker.call(f"/v1/sessions/{name}"))["can_continue"]
                status, stream, _ = taker.call(f"/v1/sessions/{name}/continue", {"stream": True})
                assert status == 200
                lines = [each for each in stream.decode().split("\n\n") if each.startswith("data: {")]
                more = "".join(json.loads(each[6:])["choices"][0]["text"] for each in lines)
                assert first + more == whole
                assert not ok(taker.call(f"/v1/sessions/{name}"))["can_continue"]
                assert taker.call(f"/v1/sessions/{name}/continue", {})[1]["error"]["code"] == "not_cut"
