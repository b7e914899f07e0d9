"""From files to shards: the same whatever the processes, and whenever one was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from griffin.data import examples as module
from griffin.data.chat import Encoder
from griffin.data.examples import find_kind, prepare_examples
from griffin.errors import GriffinError
from griffin.tokenizer import GEMMA, Tokenizer


def write_chats(file: Path, count: int) -> None:
    with file.open("w") as opened:
        for index in range(count):
            messages = [
                {"role": "user", "content": f"What follows {index}?"},
                {"role": "assistant", "content": f"{index + 1} follows it. " * (index % 5 + 1)},
            ]
            opened.write(json.dumps({"messages": messages}) + "\n")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(Tokenizer.train(["What follows it? model user \n" * 20], 300, chat_template=GEMMA), "chat")


def test_parts_and_processes_change_nothing(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chats(tmp_path / "a.jsonl", 900)
    prepared = prepare_examples(tmp_path / "a.jsonl", tmp_path / "one", encoder)
    train, validation = prepared.data.train, prepared.data.validation
    assert (train.meta.num_documents, validation.meta.num_documents) == (855, 45)
    assert train.counted is not None
    learnt = [
        encoder.tokenizer.decode(document[mask])
        for document, mask in zip(
            np.split(train.tokens, train.starts[1:-1]), np.split(train.counted, train.starts[1:-1]), strict=True
        )
    ]
    numbers = [int(text.split()[0]) for text in learnt]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 855
    assert train.meta.num_bytes == sum(len(text.encode()) for text in learnt)
    monkeypatch.setattr(module, "PART_ROWS", 300)
    monkeypatch.setattr(module, "_TASK_ROWS", 7)
    prepare_examples(tmp_path / "a.jsonl", tmp_path / "parts", encoder)
    prepare_examples(tmp_path / "a.jsonl", tmp_path / "processes", encoder, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "parts") == content(tmp_path / "processes")
    assert not list(tmp_path.glob("*.parts"))
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["examples"] == {"train": 855, "validation": 45}
    assert manifest["shards"]["train"]["sha256"] == train.meta.tokens_sha256


def test_bad_rows_stop_or_are_named(tmp_path: Path, encoder: Encoder) -> None:
    write_chats(tmp_path / "a.jsonl", 30)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[4], lines[9] = b'{"messages": []}\n', b"\xff\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    first = r"a\.jsonl: line 5: its messages has no messages \(and 1 more of the rows around it\); mend it, or"
    with pytest.raises(GriffinError, match=first):
        prepare_examples(tmp_path / "a.jsonl", tmp_path / "data", encoder)
    assert not (tmp_path / "data").exists()
    prepared = prepare_examples(tmp_path / "a.jsonl", tmp_path / "data", encoder, bad="skip")
    assert [text.removeprefix(str(tmp_path)) for text in prepared.bad] == [
        "/a.jsonl: line 5: its messages has no messages",
        "/a.jsonl: line 10: its byte 0 (0xff) is not UTF-8; convert it",
    ]
    again = prepare_examples(tmp_path / "a.jsonl", tmp_path / "data", encoder, bad="skip")  # from the cache
    assert again.bad == prepared.bad
    assert prepared.data.train.meta.num_documents + prepared.data.validation.meta.num_documents == 28


def test_validation_may_have_a_file_of_its_own(tmp_path: Path, encoder: Encoder) -> None:
    write_chats(tmp_path / "a.jsonl", 20)
    write_chats(tmp_path / "b.jsonl", 3)
    made = prepare_examples(tmp_path / "a.jsonl", tmp_path / "d", encoder, validation=tmp_path / "b.jsonl").data
    assert (made.train.meta.num_documents, made.validation.meta.num_documents) == (20, 3)
    other = prepare_examples(tmp_path / "a.jsonl", tmp_path / "d", encoder, fraction=0.25).data
    assert (other.train.meta.num_documents, other.validation.meta.num_documents) == (15, 5)
    with pytest.raises(GriffinError, match="the run was trained on other data"):
        prepare_examples(tmp_path / "a.jsonl", tmp_path / "d", encoder, fraction=0.5, expected=other.fingerprint())
    assert (
        prepare_examples(tmp_path / "a.jsonl", tmp_path / "d", encoder, fraction=0.25).data.train.meta
        == other.train.meta
    )


def test_the_kind_is_found(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    write_chats(tmp_path / "c.jsonl", 1)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "x.jsonl").write_text('\n{"question": "a"}\n')
    assert [find_kind(tmp_path / name) for name in ("t.txt", "c.jsonl", "p.jsonl")] == ["text", "chat", "pairs"]
    with pytest.raises(GriffinError, match=r"x\.jsonl: line 2: its keys are question; an example has messages"):
        find_kind(tmp_path / "x.jsonl")


SLOWLY = """
import os, sys, time
from pathlib import Path
from griffin.data import examples
from griffin.data.chat import Encoder
from griffin.tokenizer import load_tokenizer
examples.PART_ROWS = 50
write = examples._write_part
def slowly(*arguments):
    record = write(*arguments)
    time.sleep(0.2)
    return record
examples._write_part = slowly
where = Path(sys.argv[1])
examples.prepare_examples(where / "a.jsonl", where / "killed", Encoder(load_tokenizer(where / "tokenizer"), "chat"))
"""


def test_a_killed_process_goes_on_where_it_was(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 between two parts and within one: the finished parts stay as they are, and the result is the same."""
    write_chats(tmp_path / "a.jsonl", 600)
    encoder.tokenizer.save(tmp_path / "tokenizer")
    work = tmp_path / "killed.parts"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(tmp_path)])
    while not (work / "train-00002.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    stamps = {file: file.stat().st_mtime_ns for file in work.glob("train-*.json")}
    monkeypatch.setattr(module, "PART_ROWS", 50)
    written: list[Path] = []
    write = module._write_part

    def counting(place: Path, *arguments: object) -> object:
        written.append(place)
        return write(place, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write_part", counting)
    prepare_examples(tmp_path / "a.jsonl", tmp_path / "killed", encoder)
    assert len(written) == 13 - len(stamps)  # 12 parts, and the end
    prepare_examples(tmp_path / "a.jsonl", tmp_path / "whole", encoder)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
