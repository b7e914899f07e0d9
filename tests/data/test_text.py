"""Text files to documents to shards: what is a document, what is held out, what is refused."""

from __future__ import annotations

import json
import lzma
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from griffin.data.prepare import prepare
from griffin.data.shards import Shard, write_shard
from griffin.data.text import read_documents, split_point, text_files, training_part, validation_part
from griffin.errors import GriffinError
from griffin.tokenizer import Tokenizer


def decode(tokenizer: Tokenizer, shard: Shard) -> list[str]:
    starts = shard.starts.tolist()
    return [tokenizer.decode(shard.tokens[a:b].tolist()) for a, b in pairwise(starts)]


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone é\r\nmore\r\n\0\r\ntwo\n\0\n\0\nthree\n\0".encode())
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"four\0 is not cut\n\0\nfive"))
    lines = '{"text": "six\\n"}\n\n{"id": 1, "text": "seven"}\n{"text": ""}\n'
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "ignored.md").write_text("no")
    seen: list[tuple[int, int]] = []
    found = list(read_documents(text_files(tmp_path), lambda what, done, total: seen.append((done, total))))
    assert found == [
        "one é\r\nmore\r\n",
        "two\n",
        "three\n",
        "four\0 is not cut\n",
        "five",
        *(2 * ["six\n", "seven"]),
    ]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"good\n\0\nbad \xff here", r"a\.txt: byte 11 \(0xff\) is not UTF-8"),
        ("a.txt.xz", lzma.compress(b"x" * 1000)[:-20], r"a\.txt\.xz: not a whole \.xz file"),
        ("a.txt.xz", b"plain", r"a\.txt\.xz: not a whole \.xz file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl: line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a\.jsonl: line 1 is not an object with a \"text\""),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl: byte 24 \(0xe9\) is not UTF-8"),
        ("a.pdf", b"text", r"a\.pdf: not text by its name"),
        ("a.txt", b"", r"a\.txt: no text here"),
        ("a.txt", b"\0\n\0\n", r"a\.txt: no text here"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(GriffinError, match=message):
        prepare(tmp_path / name, tmp_path / "cache", tokenizer="bytes")
    assert not (tmp_path / "cache").exists()


def test_paths_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="no such file or folder"):
        text_files(tmp_path / "none")
    with pytest.raises(GriffinError, match=r"no \.txt, .* files in this folder"):
        text_files(tmp_path)


@given(st.lists(st.text("ab\n", min_size=1, max_size=40), min_size=1, max_size=50))
def test_the_split_loses_nothing_and_both_parts_have_text(documents: list[str]) -> None:
    total = "".join(documents)
    if len(total) < 2:
        return
    split = split_point(iter(documents), Path("x"))
    train, held_out = list(training_part(iter(documents), split)), list(validation_part(iter(documents), split))
    assert "".join(train) + "".join(held_out) == total
    assert all(train)
    assert all(held_out)
    assert train
    assert held_out
    if len(documents) >= 20:
        assert held_out == documents[-max(1, round(len(documents) / 20)) :]


def test_few_documents_are_split_at_a_line_near_five_percent() -> None:
    document = "".join(f"line {number:04d}\n" for number in range(1000))
    split = split_point(iter([document]), Path("x"))
    [held_out] = validation_part(iter([document]), split)
    assert held_out.startswith("line 0951\n")
    assert len(held_out) == 490


def test_a_document_is_bos_its_text_and_eos(tmp_path: Path) -> None:
    texts = [f"document {number} with some text\n" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer="bpe:300")
    assert 261 < data.tokenizer.vocab_size <= 300  # fewer, where no more pairs occur twice
    assert decode(data.tokenizer, data.train) == texts[:38]
    assert decode(data.tokenizer, data.validation) == texts[38:]
    for shard in (data.train, data.validation):
        assert (shard.tokens[shard.starts[:-1]] == data.tokenizer.bos_id).all()
        assert (shard.tokens[shard.starts[1:] - 1] == data.tokenizer.eos_id).all()
    assert data.train.meta.num_bytes == sum(map(len, texts[:38]))


def test_a_long_document_is_encoded_in_pieces_that_join(tmp_path: Path) -> None:
    text = "a line of text, \u00e9\n" * 20_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "v.txt").write_text("held out")
    data = prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer="bytes", validation=tmp_path / "v.txt")
    assert decode(data.tokenizer, data.train) == [text]
    assert decode(data.tokenizer, data.validation) == ["held out"]


def test_the_same_text_is_tokenised_once_and_a_changed_one_again(tmp_path: Path) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("to be or not to be\n" * 20)

    def stamp() -> int:
        return (cache / "train" / "tokens.bin").stat().st_ino

    before = prepare(source, cache, tokenizer="bytes").fingerprint()
    first = stamp()
    assert prepare(source, cache, tokenizer="bytes").fingerprint() == before
    assert stamp() == first
    source.write_text("to be or not to be.\n" * 20)
    assert prepare(source, cache, tokenizer="bytes").fingerprint() != before
    assert stamp() != first
    assert prepare(source, cache, tokenizer="bpe:270").tokenizer.vocab_size == 270


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 20)
    prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer="bytes")
    file = tmp_path / "cache" / "train" / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(GriffinError, match="has changed since it was written"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer="bytes")


@pytest.mark.parametrize("spec", ["bpe:", "bpe:4k", "bpe:-1"])
def test_a_bpe_without_a_size_is_refused(tmp_path: Path, spec: str) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 20)
    with pytest.raises(GriffinError, match=r"write bpe:4096"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer=spec)


def test_an_unknown_tokenizer_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be")
    with pytest.raises(GriffinError, match="neither bpe:SIZE nor bytes nor a file"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer="gpt2")


def test_folders_of_tokens_are_used_as_they_are(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    for name, made_with in (("train", tokenizer.fingerprint()), ("other", "0123")):
        write_shard(tmp_path / name, [[1, 2, 3]], vocab_size=259, tokenizer=made_with, count_bytes=len)
    data = prepare(tmp_path / "train", tmp_path / "cache", tokenizer="bytes", validation=tmp_path / "train")
    assert data.train.tokens.tolist() == [1, 2, 3]
    with pytest.raises(GriffinError, match="other was made with another tokenizer"):
        prepare(tmp_path / "other", tmp_path / "cache", tokenizer="bytes", validation=tmp_path / "train")
    with pytest.raises(GriffinError, match="name another one for validation"):
        prepare(tmp_path / "train", tmp_path / "cache", tokenizer="bytes")
    with pytest.raises(GriffinError, match="give the path of its tokenizer"):
        prepare(tmp_path / "train", tmp_path / "cache", tokenizer="bpe:300", validation=tmp_path / "train")
