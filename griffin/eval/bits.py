"""Bits per byte of texts by position: from the state, however long they are, and in windows that slide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from griffin.data.encode import Ids, encode_documents
from griffin.data.text import Part
from griffin.errors import GriffinError
from griffin.loss import bits_per_byte
from griffin.model import Griffin
from griffin.score import token_logprobs
from griffin.tokenizer import Tokenizer

Progress = Callable[[int], None]  # tokens predicted so far


@dataclass(slots=True)
class Bucket:
    """The tokens at positions first .. 2 * first - 1 of their documents, all documents together."""

    first: int
    num_tokens: int = 0
    num_bytes: int = 0  # of the text that they stand for
    nats: float = 0.0  # sum of -log p

    @property
    def bits_per_byte(self) -> float | None:
        """None: no text here (an end of document is predicted too and has no bytes)."""
        return bits_per_byte(self.nats, self.num_bytes) if self.num_bytes else None


@torch.no_grad()
def bits_by_position(
    model: Griffin,
    tokenizer: Tokenizer,
    parts: Iterable[Part],
    *,
    window: int | None = None,
    most_tokens: int | None = None,
    chunk: int = 512,
    progress: Progress | None = None,
) -> list[Bucket]:
    """Predict every token of every document from what comes before it.

    Documents are tokenised as they come and read in chunks: memory does not depend on their length, except for models
    with global attention, which keep what they have read.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        parts: of documents, from `griffin.data.text.read_parts`.
        window: None: a document is read once, from its beginning, and the state carries all of it. Otherwise what a
            model without a state does: windows of this many tokens, each beginning anew half a window after the one
            before; of each the second half is counted, of the first all.
        most_tokens: the most to predict of a document; None is all.
        chunk: tokens read at once.
        progress: called after each chunk.

    Returns:
        The buckets that hold tokens, first positions 1, 2, 4, 8 ...; positions count from a document's first token, 0,
        which is not predicted: BOS where the tokenizer has one.

    Raises:
        GriffinError: there is nothing to predict.
        ValueError: window is odd or below 2, or chunk is below 1.
    """
    if chunk < 1 or (window is not None and (window < 2 or window % 2)):
        raise ValueError(f"chunk={chunk} must be at least 1, window={window} even and at least 2, or None")
    buckets: dict[int, Bucket] = {}
    done = 0
    for _, pieces in groupby(encode_documents(tokenizer, parts), key=attrgetter("document")):
        ids = _first(pieces, None if most_tokens is None else most_tokens + 1)
        read = _from_state(model, ids, chunk) if window is None else _in_windows(model, ids, window)
        for position, before, targets, logprobs in read:
            _count(buckets, tokenizer, position, before, targets, logprobs)
            done += len(targets)
            if progress is not None:
                progress(done)
    if not any(bucket.num_bytes for bucket in buckets.values()):
        raise GriffinError("these texts have nothing to predict: give longer ones")
    return [buckets[first] for first in sorted(buckets)]


def total(buckets: Iterable[Bucket]) -> Bucket:
    """All buckets as one."""
    whole = Bucket(1)
    for each in buckets:
        whole.num_tokens, whole.num_bytes = whole.num_tokens + each.num_tokens, whole.num_bytes + each.num_bytes
        whole.nats += each.nats
    return whole


_Read = tuple[int, int, list[int], Tensor]  # position of the first target, token before it, targets, their logprobs


def _first(pieces: Iterable[Ids], most: int | None) -> Iterator[list[int]]:
    """The first ids of a document, in pieces; all pieces are taken, so that the next document comes next."""
    left = most
    for piece in pieces:
        ids = piece.ids.tolist() if left is None else piece.ids[:left].tolist()
        left = None if left is None else left - len(ids)
        if ids:
            yield ids


def _chunks(ids: Iterable[list[int]], size: int) -> Iterator[list[int]]:
    """The ids in lists of `size` and a last one, each but the first beginning with the last id of the one before."""
    held: list[int] = []
    for piece in ids:
        held += piece
        while len(held) > size:
            yield held[: size + 1]
            held = held[size:]
    if len(held) > 1:
        yield held


def _from_state(model: Griffin, ids: Iterable[list[int]], chunk: int) -> Iterator[_Read]:
    state, position = model.new_state(1), 1
    for piece in _chunks(ids, chunk):
        tokens = torch.tensor([piece], dtype=torch.int64, device=model.device)
        hidden = model(tokens[:, :-1], state)[0]
        yield position, piece[0], piece[1:], token_logprobs(model, hidden, tokens[0, 1:])[0]
        position += len(piece) - 1


def _in_windows(model: Griffin, ids: Iterable[list[int]], window: int) -> Iterator[_Read]:
    half, position = window // 2, 1
    held: list[int] = []
    for piece in _chunks(ids, half):
        held = [*held[-half - 1 :], *(piece[1:] if held else piece)]  # up to `window` tokens and the one behind them
        tokens = torch.tensor([held], dtype=torch.int64, device=model.device)
        count = len(piece) - 1
        hidden = model(tokens[:, :-1])[0, -count:]
        yield position, piece[0], piece[1:], token_logprobs(model, hidden, tokens[0, -count:])[0]
        position += count


def _count(
    buckets: dict[int, Bucket], tokenizer: Tokenizer, position: int, before: int, targets: list[int], logprobs: Tensor
) -> None:
    nats = (-logprobs.double()).cpu()
    at = 0
    while at < len(targets):
        first = 1 << (position + at).bit_length() >> 1
        end = min(len(targets), 2 * first - position)
        bucket = buckets.setdefault(first, Bucket(first))
        bucket.num_tokens += end - at
        # With the token before them: some tokenizers drop a text's first blank, which these are not.
        bucket.num_bytes += tokenizer.token_bytes([before, *targets[at:end]]) - tokenizer.token_bytes([before])
        bucket.nats += float(nats[at:end].sum())
        before, at = targets[end - 1], end
