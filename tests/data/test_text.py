"""Text files to documents to shards: what is a document, what is held out, what is refused."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin.data import text as data_text
from griffin.data.prepare import prepare
from griffin.data.shards import Shard, write_shard
from griffin.data.text import Part, divided, read_parts, split_point, text_files, training_part, validation_part
from griffin.errors import GriffinError
from griffin.tokenizer import Tokenizer


def decode(tokenizer: Tokenizer, shard: Shard) -> list[str]:
    starts = shard.starts.tolist()
    return [tokenizer.decode(shard.tokens[a:b].tolist()) for a, b in pairwise(starts)]


def joined(parts: Iterable[Part]) -> list[str]:
    return ["".join(part.text for part in document) for _, document in groupby(parts, key=lambda part: part.document)]


def in_parts(documents: list[str], size: int) -> Iterator[Part]:
    for number, document in enumerate(documents):
        for at in range(0, len(document), size):
            yield Part(number, document[at : at + size])


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone é\r\nmore\r\n\0\r\ntwo\n\0\n\0\nthree\n\0".encode())
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"four\0 is not cut\n\0\nfive"))
    lines = '{"text": "six\\n"}\n\n{"id": 1, "text": "seven"}\n{"text": ""}\n'
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "ignored.md").write_text("no")
    seen: list[tuple[int, int]] = []
    found = joined(read_parts(text_files(tmp_path), lambda what, done, total: seen.append((done, total))))
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
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b \\ud83d"}\n',
            r"a\.jsonl: line 2 has half a surrogate pair.*leave it out",
        ),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, r"a\.jsonl: line 2 .*nested more than 100 deep"),
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


@settings(deadline=None)
@given(st.lists(st.text("ab\n\0\ré\x85\u2028", max_size=12), max_size=12), st.integers(1, 40), st.booleans())
def test_parts_are_the_documents_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block: int, mark: bool
) -> None:
    """Against the definition: lines end with line feeds alone, and a line of one NUL is between two documents."""
    content = "\n".join(lines)
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(("\ufeff" * mark + content).encode())
    documents = [""]
    for line in re.findall(r"[^\n]*\n|[^\n]+", content):
        if line in ("\0", "\0\r", "\0\n", "\0\r\n"):
            documents.append("")
        else:
            documents[-1] += line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_text, "BLOCK_BYTES", block)
        parts = list(read_parts([file]))
    assert joined(parts) == [document for document in documents if document]
    assert max((len(part.text) for part in parts), default=0) <= block + 2
    assert sorted({part.document for part in parts}) == list(range(len(joined(parts))))


def test_a_line_of_jsonl_is_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_text, "MOST_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * 100 + '"}\n')
    with pytest.raises(GriffinError, match=r"a\.jsonl: line 2 has more than 100 bytes; put its text into a \.txt"):
        list(read_parts(text_files(tmp_path)))


def test_a_compressed_line_of_any_length_is_read_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"a" * 20_000_000, preset=0))
    parts = list(read_parts(text_files(tmp_path)))
    assert sum(len(part.text) for part in parts) == 20_000_000
    assert max(len(part.text) for part in parts) <= data_text.BLOCK_BYTES


@pytest.mark.parametrize("run", ["runs/books", "run"])
def test_runs_within_the_data_are_no_data(tmp_path: Path, run: str) -> None:
    """`griffin train .` writes its run into the data: resuming must read what the first session read."""
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 20)
    (tmp_path / "checkpoints").mkdir()  # a name alone makes no run
    (tmp_path / "checkpoints" / "b.txt").write_text("that is the question\n" * 20)
    before = prepare(tmp_path, tmp_path / run / "data", tokenizer="bytes").fingerprint()
    (tmp_path / run / ".lock").touch()
    (tmp_path / run / "config.json").write_text("{}")
    (tmp_path / run / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / run / "notes.txt").write_text("a text of the run")
    assert [file.name for file in text_files(tmp_path)] == ["a.txt", "b.txt"]
    assert prepare(tmp_path, tmp_path / run / "data", tokenizer="bytes").fingerprint() == before
    assert [file.name for file in text_files(tmp_path / run)] == ["notes.txt"]  # asked for by name


@given(st.lists(st.text("ab\n", min_size=1, max_size=40), min_size=1, max_size=50), st.integers(1, 50))
def test_the_split_loses_nothing_and_both_parts_have_text(documents: list[str], size: int) -> None:
    total = "".join(documents)
    if len(total) < 2:
        return
    split = split_point(lambda: in_parts(documents, size), Path("x"))
    assert split == whole_split(documents)
    train = joined(training_part(in_parts(documents, size), split))
    held_out = joined(validation_part(in_parts(documents, size), split))
    assert "".join(train) + "".join(held_out) == total
    assert all(train)
    assert all(held_out)
    assert train
    assert held_out
    if len(documents) >= 20:
        assert held_out == documents[-max(1, round(len(documents) / 20)) :]


def whole_split(documents: list[str]) -> tuple[int, int]:
    """The definition, on whole documents."""
    if len(documents) >= 20:
        return len(documents) - max(1, round(len(documents) / 20)), 0
    left = max(1, round(sum(map(len, documents)) / 20))
    index = len(documents) - 1
    while len(documents[index]) < left:
        left -= len(documents[index])
        index -= 1
    document = documents[index]
    character = len(document) - left
    line = document.find("\n", character) + 1 if character else 0
    return index, line if 0 < line <= (character + len(document)) // 2 else character


def test_few_documents_are_split_at_a_line_near_five_percent() -> None:
    document = "".join(f"line {number:04d}\n" for number in range(1000))
    split = split_point(lambda: in_parts([document], 33), Path("x"))
    [held_out] = joined(validation_part(in_parts([document], 33), split))
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


def test_a_damaged_tokenizer_beside_the_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 20)
    prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer="bpe:265")
    Tokenizer.bytes().save(tmp_path / "cache" / "tokenizer")
    with pytest.raises(GriffinError, match=r"tokenizer is not what made .*train; remove .*cache"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer="bpe:265")


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("to be or not to be\n" * 20)

    def grow(what: str, done: int, total: int) -> None:
        if what == "tokenising":
            with source.open("a") as file:
                file.write("more\n")

    with pytest.raises(GriffinError, match=r"a\.txt has changed while it was read"):
        prepare(source, tmp_path / "cache", tokenizer="bytes", report=grow)
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("size", ["1048577", "99999999999999", "1" + "0" * 29])
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path, size: str) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 20)
    with pytest.raises(GriffinError, match=rf"vocabulary size {size} is too large; ask for 1048576 or fewer"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer=f"bpe:{size}")


@pytest.mark.parametrize("spec", ["bpe:", "bpe:4k", "bpe:-1", "bpe:" + "9" * 5000])
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
        write_shard(tmp_path / name, [(0, [1, 2, 3], 3)], vocab_size=259, tokenizer=made_with)
    data = prepare(tmp_path / "train", tmp_path / "cache", tokenizer="bytes", validation=tmp_path / "train")
    assert data.train.tokens.tolist() == [1, 2, 3]
    with pytest.raises(GriffinError, match="other was made with another tokenizer"):
        prepare(tmp_path / "other", tmp_path / "cache", tokenizer="bytes", validation=tmp_path / "train")
    with pytest.raises(GriffinError, match="name another one for validation"):
        prepare(tmp_path / "train", tmp_path / "cache", tokenizer="bytes")
    with pytest.raises(GriffinError, match="give the path of its tokenizer"):
        prepare(tmp_path / "train", tmp_path / "cache", tokenizer="bpe:300", validation=tmp_path / "train")
    (tmp_path / "train" / "tokens.bin").write_bytes(b"\1\0\2\0\4\0")
    with pytest.raises(GriffinError, match=r"tokens\.bin has changed since it was written"):
        prepare(tmp_path / "train", tmp_path / "cache", tokenizer="bytes", validation=tmp_path / "train")


@given(st.lists(st.text("ab|<>\n", max_size=12), min_size=1, max_size=6), st.integers(1, 5), st.booleans())
def test_dividers_end_documents_wherever_parts_are_cut(texts: list[str], size: int, two: bool) -> None:
    divider = "<|>"
    whole = [divider.join(texts), "b<|"] if two else [divider.join(texts)]
    parts = [
        Part(number, text[at : at + size]) for number, text in enumerate(whole) for at in range(0, len(text), size)
    ]
    found: dict[int, str] = {}
    for part in divided(parts, divider):
        found[part.document] = found.get(part.document, "") + part.text
    assert list(found.values()) == [text for each in whole for text in each.split(divider) if text]
    assert list(found) == list(range(len(found)))
    assert list(divided(parts, None)) == parts
