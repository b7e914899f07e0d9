"""Shards, the order of rows, and packing: every token once, resets and targets where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin.data.order import permute, step_rows
from griffin.data.packing import count_rows, pack
from griffin.data.shards import Shard, ShardMeta, open_shard, write_shard
from griffin.errors import GriffinError
from tests.fuzz import attack

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=23), min_size=1, max_size=12)


def write(folder: Path, documents: list[list[int]], vocab_size: int = 100) -> ShardMeta:
    parts = ((number, ids, len(ids)) for number, ids in enumerate(documents))
    return write_shard(folder, parts, vocab_size=vocab_size, tokenizer="abc")


def in_memory(documents: list[list[int]]) -> Shard:
    tokens = np.array([token for document in documents for token in document])
    starts = np.cumsum([0, *map(len, documents)])
    meta = ShardMeta(
        format="",
        dtype="uint16",
        vocab_size=100,
        num_documents=len(documents),
        num_tokens=tokens.size,
        num_bytes=0,
        tokenizer="",
        tokens_sha256="",
        documents_sha256="",
    )
    return Shard(Path(), meta, tokens, starts)


@settings(deadline=None)
@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permutations_of_different_keys_are_different_and_look_random() -> None:
    orders = [[permute(index, 1000, key) for index in range(1000)] for key in range(4)]
    for a in range(4):
        for b in range(a):
            assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 10  # 1 expected
        neighbours = sum(abs(x - y) == 1 for x, y in zip(orders[a], orders[a][1:], strict=False))
        assert neighbours < 12  # 2 expected; the identity has 999
        middle = np.mean(orders[a][:250])
        assert abs(middle - 499.5) < 75  # standard deviation 16


@settings(deadline=None)
@given(num_rows=st.integers(1, 60), batch_rows=st.integers(1, 7), world=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_every_row_once_per_epoch_whatever_the_world(num_rows: int, batch_rows: int, world: int, seed: int) -> None:
    steps = -(-3 * num_rows // (batch_rows * world))
    sequence = [
        row
        for step in range(steps)
        for rank in range(world)
        for row in step_rows(num_rows, batch_rows, step, seed=seed, rank=rank, world=world)
    ]
    alone = [row for step in range(len(sequence)) for row in step_rows(num_rows, 1, step, seed=seed)]
    assert sequence == alone  # the world's size changes who reads a row, not when
    for epoch in range(3):
        assert sorted(sequence[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return [step_rows(100, 1, number * 100 + index, seed=seed)[0] for index in range(100)]

    assert len({tuple(epoch(number, seed)) for number in range(3) for seed in range(3)}) == 9


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} of world=2"):
        step_rows(10, 1, 0, seed=0, rank=rank, world=2)


@settings(deadline=None)
@given(documents=DOCUMENTS, row_tokens=st.integers(1, 30))
def test_packing_against_its_definition(documents: list[list[int]], row_tokens: int) -> None:
    shard = in_memory(documents)
    num_rows = count_rows(shard, row_tokens)
    batch = pack(shard, range(num_rows), row_tokens)
    stream = [
        (token, document[at + 1] if at + 1 < len(document) else -1, at)
        for document in documents
        for at, token in enumerate(document)
    ]
    for place in range(num_rows * row_tokens):
        b, t = divmod(place, row_tokens)
        found = (int(batch.tokens[b, t]), int(batch.targets[b, t]), int(batch.positions[b, t]))
        if place >= len(stream):
            assert found == (0, -1, 0)  # filled up
        else:
            token, target, offset = stream[place]
            assert found == (token, target, min(offset, t))
    assert num_rows * row_tokens - len(stream) < row_tokens  # every token is in a row, and no row is empty


def test_rows_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be in 0 \.\. 1"):
        pack(in_memory([[1, 2, 3]]), [2], 2)


@settings(deadline=None, max_examples=20)
@given(documents=DOCUMENTS)
def test_a_shard_gives_back_its_documents(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("shard") / "s"
    meta = write(folder, [*documents, []])
    shard = open_shard(folder)
    shard.verify()
    assert [shard.tokens[a:b].tolist() for a, b in zip(shard.starts, shard.starts[1:], strict=False)] == documents
    assert shard.meta == meta
    assert meta.num_bytes == meta.num_tokens == sum(map(len, documents))


@pytest.mark.parametrize(("vocab_size", "dtype", "width"), [(65536, "uint16", 2), (65537, "uint32", 4)])
def test_ids_take_two_bytes_where_two_are_enough(tmp_path: Path, vocab_size: int, dtype: str, width: int) -> None:
    write(tmp_path / "s", [[0, vocab_size - 1]], vocab_size)
    assert open_shard(tmp_path / "s").meta.dtype == dtype
    assert (tmp_path / "s" / "tokens.bin").read_bytes() == b"".join(
        id_.to_bytes(width, "little") for id_ in (0, vocab_size - 1)
    )


@pytest.mark.parametrize("bad", [-1, 100])
def test_an_id_outside_the_vocabulary_leaves_no_shard(tmp_path: Path, bad: int) -> None:
    with pytest.raises(GriffinError, match=rf"document 1 has token {bad}, not in 0 \.\. 99"):
        write(tmp_path / "s", [[1], [2, bad]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokens.bin", "documents.idx"])
@pytest.mark.parametrize("change", ["shorter", "longer", "missing"])
def test_a_shard_that_is_not_whole_is_refused(tmp_path: Path, name: str, change: str) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4]])
    file = tmp_path / "s" / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] if change == "shorter" else data + b"\0")
    if change == "missing":
        file.unlink()
    with pytest.raises(GriffinError, match=f"{name}.*(missing|bytes, meta.json says)"):
        open_shard(tmp_path / "s")


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4]])
    file = tmp_path / "s" / "tokens.bin"
    file.write_bytes(b"\7" + file.read_bytes()[1:])
    with pytest.raises(GriffinError, match=r"tokens\.bin has changed since it was written"):
        open_shard(tmp_path / "s").verify()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"format": "other"}', "is of format 'other'"),
        ('{"format": "griffin-shard-1"}', "does not have the keys"),
        ("[]", "holds a list"),
        ("[" * 200_000, "nested more than 100 deep"),
    ],
)
def test_a_foreign_meta_is_refused(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "s", [[1, 2, 3]])
    (tmp_path / "s" / "meta.json").write_text(content)
    with pytest.raises(GriffinError, match=message):
        open_shard(tmp_path / "s")


@pytest.mark.parametrize("key", ["num_bytes", "vocab_size"])
def test_a_changed_meta_is_found_and_one_of_an_earlier_version_is_not_asked(tmp_path: Path, key: str) -> None:
    meta = write(tmp_path / "s", [[1, 2, 3], [4]])
    file = tmp_path / "s" / "meta.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {key: content[key] + 1}))
    with pytest.raises(GriffinError, match=r"meta\.json has changed since it was written"):
        open_shard(tmp_path / "s")
    del content["sha256"]  # shards had none once
    file.write_text(json.dumps(content))
    assert open_shard(tmp_path / "s").meta == meta


@pytest.mark.slow
def test_fuzz_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4], [5] * 50])

    def read() -> tuple[ShardMeta, list[int], list[int]]:
        shard = open_shard(tmp_path / "s")
        shard.verify()
        return shard.meta, shard.tokens.tolist(), shard.starts.tolist()

    expected = read()
    files = [tmp_path / "s" / name for name in ("meta.json", "documents.idx", "tokens.bin")]
    counts = attack(files, read, lambda found: found == expected)
    assert counts["refused"] > 100


def test_a_document_in_parts_is_one(tmp_path: Path) -> None:
    parts = [(0, [1, 2], 2), (0, [], 1), (0, [3], 0), (3, [], 0), (7, [4], 1)]
    meta = write_shard(tmp_path / "s", parts, vocab_size=100, tokenizer="abc")
    shard = open_shard(tmp_path / "s")
    assert (shard.tokens.tolist(), shard.starts.tolist(), meta.num_bytes) == ([1, 2, 3, 4], [0, 3, 4], 4)
    again = write(tmp_path / "again", [[1, 2, 3], [4]])
    assert again == meta


def test_document_starts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4]])
    np.array([0, 4, 4], dtype="<i8").tofile(tmp_path / "s" / "documents.idx")
    with pytest.raises(GriffinError, match=r"documents\.idx does not fit"):
        open_shard(tmp_path / "s")


def test_the_meta_is_readable_json(tmp_path: Path) -> None:
    write(tmp_path / "s", [[1, 2, 3], [4]])
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert (meta["num_documents"], meta["num_tokens"], meta["tokenizer"]) == (2, 4, "abc")
