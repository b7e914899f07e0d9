"""Bits per byte by position: against a forward over each whole document, and against windows cut by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from griffin import Griffin
from griffin.data.text import Part, read_parts
from griffin.errors import GriffinError
from griffin.eval.bits import Bucket, bits_by_position, total
from griffin.tokenizer import Tokenizer

TEXTS = ["Die Donau so blau, so schön und blau. " * 6, "a", "ein Ende"]
PARTS = [Part(0, TEXTS[0][:70]), Part(0, TEXTS[0][70:]), Part(1, TEXTS[1]), Part(2, TEXTS[2])]


def logprobs(model: Griffin, ids: list[int]) -> list[float]:
    """Of each id but the first."""
    with torch.no_grad():
        rows = model.logits(model(torch.tensor([ids])))[0].double().log_softmax(-1)
    return [float(rows[at, target]) for at, target in enumerate(ids[1:])]


def expected(tokenizer: Tokenizer, values: Callable[[list[int]], list[float]], most: int | None) -> dict[int, Bucket]:
    buckets: dict[int, Bucket] = {}
    for text in TEXTS:
        ids = [*tokenizer.encode(text), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        ids = ids if most is None else ids[: most + 1]
        for position, value in enumerate(values(ids), start=1):
            bucket = buckets.setdefault(first := 2 ** int(math.log2(position)), Bucket(first))
            bucket.num_tokens += 1
            bucket.nats -= value
            bucket.num_bytes += tokenizer.token_bytes([ids[position]])
    return buckets


@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
@pytest.mark.parametrize(("chunk", "most"), [(512, None), (7, None), (1, 40)])
def test_from_the_state(make_model: Callable[..., Griffin], preset: str, chunk: int, most: int | None) -> None:
    model, tokenizer = make_model(preset, dtype=torch.float64), Tokenizer.bytes()
    found = bits_by_position(model, tokenizer, PARTS, chunk=chunk, most_tokens=most)
    _same(found, expected(tokenizer, lambda ids: logprobs(model, ids), most))
    if most is None:
        assert total(found).num_bytes == sum(len(text.encode()) for text in TEXTS)
        assert total(found).num_tokens == total(found).num_bytes + len(TEXTS)  # and the ends of documents


@pytest.mark.parametrize("window", [2, 8, 64])
def test_in_windows(make_model: Callable[..., Griffin], window: int) -> None:
    model, tokenizer = make_model(dtype=torch.float64), Tokenizer.bytes()

    def windows(ids: list[int]) -> list[float]:
        values = logprobs(model, ids[: window + 1])
        for start in range(window // 2, len(ids) - window // 2 - 1, window // 2):
            values += logprobs(model, ids[start : start + window + 1])[window // 2 :]
        return values

    found = bits_by_position(model, tokenizer, PARTS, window=window)
    _same(found, expected(tokenizer, windows, None))


def _same(found: list[Bucket], wanted: dict[int, Bucket]) -> None:
    assert [bucket.first for bucket in found] == sorted(wanted)
    for bucket in found:
        other = wanted[bucket.first]
        assert (bucket.num_tokens, bucket.num_bytes) == (other.num_tokens, other.num_bytes)
        assert bucket.nats == pytest.approx(other.nats, rel=1e-5)


def test_the_first_blank_that_a_vocabulary_adds_is_not_counted() -> None:
    """Bytes of all buckets are the text's, with a vocabulary that writes a blank before a text."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pieces = {"<bos>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4}
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[("▁", "a")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer = Tokenizer(backend, bos="<bos>")
    from griffin import PRESETS

    model = Griffin(PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(0))
    text = "a b ab a" * 20
    assert tokenizer.token_bytes(tokenizer.encode(text)) == len(text)
    for window in (None, 8):
        found = bits_by_position(model, tokenizer, [Part(0, text)], window=window, chunk=5)
        assert total(found).num_bytes == len(text)


def test_what_cannot_be_measured_is_refused(make_model: Callable[..., Griffin], tmp_path: Path) -> None:
    model, tokenizer = make_model(), Tokenizer.bytes()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(GriffinError, match="nothing to predict"):
        bits_by_position(model, tokenizer, read_parts([tmp_path / "empty.txt"]))
    for window in (1, 7):
        with pytest.raises(ValueError, match=f"window={window}"):
            bits_by_position(model, tokenizer, PARTS, window=window)


@pytest.mark.slow
def test_a_long_text_takes_no_more_memory(make_model: Callable[..., Griffin]) -> None:
    """Read as a stream: what is held at the peak is that of a text a tenth as long."""
    import tracemalloc

    model, tokenizer, peaks = make_model("hawk-tiny"), Tokenizer.bytes(), []
    for megabytes in (0.2, 2.0):
        parts = (Part(0, "wieder und wieder dasselbe. " * 1000) for _ in range(int(megabytes * 1e6 / 28_000)))
        tracemalloc.start()
        bits_by_position(model, tokenizer, parts, chunk=2048)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
