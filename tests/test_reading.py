"""Files that others made: what is read, and that every other is refused in one line and in no time."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from griffin import GriffinError
from griffin.reading import open_tensors, parse_json, read_json, read_text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": ', r"x\.json is not JSON \(Expecting value: line 1 column 7 .*use another copy"),
        (b"", "is not JSON"),
        (b"[1]", r"x\.json holds a list, not a JSON object"),
        (b'{"a": ' + b"[" * 200_000, "nested more than 100 deep"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "nested more than 100 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"is not JSON \(Exceeds the limit \(4300 digits\)"),
        (b'{"a": "\xff"}', r"x\.json: byte 7 \(0xff\) is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), r"byte 0 \(0xff\) is not UTF-8"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' has two values"),
        (b'{"a": "' + b"x" * 2**26 + b'"}', "is larger than 67,108,864 bytes"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(GriffinError, match=message) as caught:
        read_json(tmp_path / "x.json")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeff{}", {}),  # a byte order mark
        ('{"a": "\\ud83d\\ude00 é"}', {"a": "\U0001f600 é"}),
        ('{"a": 1, "a": 1}', {"a": 1}),
        ('{"a": ' + "[" * 99 + "]" * 99 + "}", json.loads('{"a": ' + "[" * 99 + "]" * 99 + "}")),
        ('{"model_max_length": 1000000000000000019884624838656}', {"model_max_length": 10**30 + 19884624838656}),
    ],
)
def test_json_of_every_usual_kind_is_read(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "x.json") == value


def test_any_value_may_stand_in_a_line() -> None:
    assert parse_json("[1, null]", "lines.jsonl, line 3") == [1, None]
    with pytest.raises(GriffinError, match=r"^lines\.jsonl, line 3 is not JSON .*; bring it back$"):
        parse_json("{", "lines.jsonl, line 3", mend="bring it back")


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("pipe", "is a pipe"), ("zeros", "is a device"), ("loop", "cannot be read"), (".", "folder")):
        for read in (read_json, read_text, open_tensors):
            with pytest.raises(GriffinError, match=message):
                read(tmp_path / name)
    with pytest.raises(GriffinError, match=r"none does not exist; use another copy"):
        read_json(tmp_path / "none")


def test_safetensors_with_a_header_that_cannot_be(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "good")
    assert torch.equal(open_tensors(tmp_path / "good").get_tensor("a"), torch.ones(3))
    names = {f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    header = json.dumps(names).encode()
    (tmp_path / "many").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(GriffinError, match=r"many has a header of \d\d,\d+,\d+ bytes, more than 8,388,608"):
        open_tensors(tmp_path / "many")
    for name, data in (("short", b"\x01"), ("empty", b""), ("text", b"hello world")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(GriffinError, match=rf"{name} (cannot be read \(|has a header)"):
            open_tensors(tmp_path / name)
