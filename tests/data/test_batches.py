"""Rows of whole examples: each once, alone in the model's eyes, and what is cut or left out is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from griffin import Griffin
from griffin.data.batches import Long, pair_rows, single_rows, whole_rows
from griffin.data.packing import Batch
from griffin.data.shards import Shard, open_shard, write_shard
from griffin.errors import GriffinError
from griffin.loss import NOT_COUNTED
from griffin.score import nats
from tests.data.test_data import in_memory


def examples(lengths: list[int], *, learn_from: int = 1) -> Shard:
    """Documents of tokens that tell which they are of; learnt from a place on."""
    documents = [[number * 37 % 97 + at % 3 for at in range(length)] for number, length in enumerate(lengths)]
    shard = in_memory(documents)
    counted = np.concatenate([np.arange(length) >= learn_from for length in lengths])
    return replace(shard, counted=counted)


def held(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of each example in the rows; filler, a 0 at position 0 that predicts nothing, left out."""
    found: list[tuple[list[int], list[int]]] = []
    for row in range(batch.tokens.shape[0]):
        for token, target, position in zip(
            batch.tokens[row].tolist(), batch.targets[row].tolist(), batch.positions[row].tolist(), strict=True
        ):
            if position == 0:
                found.append(([], []))
            assert position == len(found[-1][0])
            found[-1][0].append(token)
            found[-1][1].append(target)
    return [(tuple(a), tuple(b)) for a, b in found if a != [0] or b != [NOT_COUNTED]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 24))
def test_every_example_is_in_one_row_whole(lengths: list[int], row_tokens: int) -> None:
    shard = examples(lengths)
    fitting = [number for number, length in enumerate(lengths) if 2 <= length <= row_tokens + 1]
    if not fitting:
        with pytest.raises(GriffinError, match=f"no example fits into row_tokens={row_tokens}"):
            whole_rows(shard, row_tokens, "drop")
        return
    rows, lost = whole_rows(shard, row_tokens, "drop")
    found = held(rows.batch(range(rows.count)))
    wanted = []
    for number in fitting:
        ids = shard.tokens[shard.starts[number] : shard.starts[number + 1]].tolist()
        wanted.append((tuple(ids[:-1]), tuple(ids[1:])))
    assert sorted(found) == sorted(wanted)
    assert lost.dropped == len(lengths) - len(fitting)
    assert lost.tokens == sum(length for number, length in enumerate(lengths) if number not in fitting)
    assert lost.filler == rows.count * row_tokens - sum(lengths[number] - 1 for number in fitting)


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(2, 200, 500).tolist()
    rows, lost = whole_rows(examples(lengths), 256, "error")
    assert lost.filler / (rows.count * 256) < 0.02


@pytest.mark.parametrize(
    ("long", "truncated", "dropped", "tokens"),
    [("truncate", 1, 1, 3 + 21), ("drop", 0, 2, 12 + 21), ("split", 0, 2, 0)],
)
def test_what_is_too_long(long: Long, truncated: int, dropped: int, tokens: int) -> None:
    """Two examples are longer than a row of 8; the answer of the second begins behind its first row."""
    shard = examples([5, 12, 21], learn_from=2)
    counted = np.array(shard.counted)
    counted[5 + 12 : 5 + 12 + 18] = False
    shard = replace(shard, counted=counted)
    rows, lost = whole_rows(shard, 8, long)
    found = held(rows.batch(range(rows.count)))
    if long == "truncate":
        assert (lost.truncated, lost.dropped, lost.tokens) == (truncated, dropped, tokens)
        assert len(found) == 2
    elif long == "drop":
        assert (lost.truncated, lost.dropped, lost.tokens) == (truncated, dropped, tokens)
        assert len(found) == 1
    else:  # of the last, only its third piece has something to learn
        assert (lost.truncated, lost.dropped) == (truncated, dropped)
        assert sorted(len(a) for a, _ in found) == [3, 4, 4, 8]
    with pytest.raises(GriffinError, match="example 1 has 12 tokens, more than row_tokens \\+ 1 = 9"):
        whole_rows(shard, 8, "error")


def test_pairs_keep_their_order_and_lose_both(tmp_path: Path) -> None:
    shard = examples([5, 9, 30, 4, 3, 6])
    reference = np.arange(6, dtype=np.float32)
    rows, lost = pair_rows(shard, 10, "drop", reference)
    assert (rows.count, lost.dropped) == (2, 2)
    batch = rows.batch([1, 0])
    assert batch.reference is not None
    assert batch.reference.tolist() == [4, 5, 0, 1]
    assert batch.tokens.shape == (4, 8)
    lengths = [int((batch.targets[row] != NOT_COUNTED).sum()) + 1 for row in range(4)]
    assert lengths == [3, 6, 5, 9]
    with pytest.raises(GriffinError, match="half an answer cannot be preferred"):
        pair_rows(shard, 10, "split")


def test_packed_examples_are_bit_for_bit_what_they_are_alone_with_slow_decay(
    tmp_path: Path, make_model: Callable[..., Griffin]
) -> None:
    """a near 0.999, as trained layers have: fresh weights forget so fast that a leak would not be seen.

    A token of one example changes no bit of the next one's result; and all of them give what each gives alone.
    """
    model = make_model(dtype=torch.float64, vocab_size=100)
    with torch.no_grad():
        for block in model.blocks:
            gates = getattr(block.temporal_block, "rg_lru", None)
            if gates is not None:
                gates.recurrent_param.fill_(-8.5)  # softplus 2.0e-4: a = exp(-8 r softplus) = 0.9992 at r = 1/2
    shard = examples([9, 14, 7, 11], learn_from=3)
    rows, _ = whole_rows(shard, 40, "error")
    assert rows.count == 1
    batch = rows.batch([0])
    hidden = model(batch.tokens, positions=batch.positions)
    starts = (batch.positions[0] == 0).nonzero()[:, 0].tolist()[:4]
    for start, following in pairwise(starts):
        changed = batch.tokens.clone()
        changed[0, following - 1] = (changed[0, following - 1] + 50) % 100
        other = model(changed, positions=batch.positions)
        assert not torch.equal(other[0, start:following], hidden[0, start:following])
        assert torch.equal(other[0, following:], hidden[0, following:])
    alone, _ = single_rows(shard, 40, "error")
    total = sum(float(nats(model, alone.batch([number])).detach()) for number in range(alone.count))
    assert_close(float(nats(model, batch).detach()), total, rtol=1e-12, atol=0)


def test_a_shard_with_a_mask_is_checked(tmp_path: Path) -> None:
    parts = [(0, [1, 2, 3], 3, np.array([False, True, True])), (1, [4, 5], 2, np.array([False, True]))]
    meta = write_shard(tmp_path / "s", parts, vocab_size=10, tokenizer="t", masked=True)
    shard = open_shard(tmp_path / "s")
    assert shard.meta == meta
    assert shard.counted is not None
    assert shard.counted.tolist() == [False, True, True, False, True]
    shard.verify()
    (tmp_path / "s" / "counted.bin").write_bytes(b"\0\1\1\1\1")
    with pytest.raises(GriffinError, match=r"counted\.bin has changed since it was written"):
        open_shard(tmp_path / "s").verify()
    (tmp_path / "s" / "counted.bin").write_bytes(b"\0\1\1")
    with pytest.raises(GriffinError, match=r"counted\.bin has 3 bytes, meta\.json says 5"):
        open_shard(tmp_path / "s")
