"""Calls of the attention kernels. Contracts are those of the ops of the same names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from griffin.ops.cpu.library import Kernel, empty_like
from griffin.ops.flash import Sequences

SLOTS = 64  # of csrc/attention.cpp
# 2 MB of scores stay in a core's cache between the product that makes them and the one that uses them; with fewer
# tokens products are slow, and with more, more of what they compute is for keys that a token does not see.
BLOCK_SCORES = 2**19
BLOCK_TOKENS = (16, 64)  # at least and at most

_ring_attention = Kernel("ring_attention", "TTTL TF iiiii")
_ring_write = Kernel("ring_write", "TTL TT iii")
_softmax_forward = Kernel("attention_softmax_forward", "FL f iiiiii")
_softmax_backward = Kernel("attention_softmax_backward", "FFL f iiiiii")


def ring_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    (B, S, G, K), H = keys.shape, queries.shape[2]
    out = empty_like(queries)
    scratch = torch.empty(B * -(-S // SLOTS) * H * (K + 2), dtype=torch.float32, device="cpu")
    inputs = (queries.contiguous(), keys.contiguous(), values.contiguous(), positions.to(torch.int64).contiguous())
    _ring_attention(queries.dtype, *inputs, out, scratch, B, S, H, G, K)
    return out


def ring_write_(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
    B, S, G, K = keys.shape
    inputs = (k.contiguous(), v.contiguous(), positions.to(torch.int64).contiguous())
    _ring_write(keys.dtype, *inputs, keys, values, B, S, G * K)


def local_attention(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None, packed: Sequences | None
) -> tuple[Tensor, tuple[Tensor | int | Sequences | None, ...]]:
    (B, _, H, K), G, out = queries.shape, keys.shape[2], empty_like(queries)
    blocks = _blocks(queries, keys, positions, window, packed)
    scratch = _scratch(blocks, H)
    for b in range(B):
        k, v = _by_head(keys[b]), _by_head(values[b])  # (G, S + T, K)
        for block in blocks[b]:
            scores = block.scores(scratch, H, G)
            torch.bmm(block.rows(queries[b], G), block.seen(k).mT, out=scores)
            _softmax_forward(torch.float32, scores, block.first, K**-0.5, *block.sizes(scores, H))
            block.put(out[b], torch.bmm(scores, block.seen(v)))
    return out, (queries, keys, values, positions, window, packed)


def local_attention_backward(
    needed: tuple[bool, ...],
    dout: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    window: int | None,
    packed: Sequences | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute P = softmax(S) again, S = Q K^T / sqrt(K), and the gradients of the inputs `needed`.

    dV = P^T dO;  dP = dO V^T;  dS = P (dP - sum of P dP over keys);  dQ = dS K / sqrt(K);  dK = dS^T Q / sqrt(K)
    """
    (B, _, H, K), G = queries.shape, keys.shape[2]
    dq = empty_like(queries) if needed[0] else None
    dk, dv = (keys.new_zeros(keys.shape, dtype=torch.float32) if need else None for need in needed[1:3])
    blocks = _blocks(queries, keys, positions, window, packed)
    scratch, other = _scratch(blocks, H), _scratch(blocks, H)
    for b in range(B):
        k, v = _by_head(keys[b]), _by_head(values[b])
        for block in blocks[b]:
            q, do = block.rows(queries[b], G), block.rows(dout[b], G)
            p, ds = block.scores(scratch, H, G), block.scores(other, H, G)
            torch.bmm(q, block.seen(k).mT, out=p)
            torch.bmm(do, block.seen(v).mT, out=ds)
            _softmax_backward(torch.float32, p, ds, block.first, K**-0.5, *block.sizes(p, H))
            if dq is not None:
                block.put(dq[b], torch.bmm(ds, block.seen(k)))
            if dk is not None:
                block.seen(_by_head(dk[b])).baddbmm_(ds.mT, q)
            if dv is not None:
                block.seen(_by_head(dv[b])).baddbmm_(p.mT, do)
    return dq, None if dk is None else dk.to(keys.dtype), None if dv is None else dv.to(values.dtype)


@dataclass(frozen=True, slots=True)
class _Block:
    """Tokens of a row of the batch, and the keys that any of them sees."""

    start: int  # tokens
    stop: int
    left: int  # keys
    right: int
    first: Tensor  # (stop - start,) int64, the first key each of the tokens sees

    def of(self, row: Tensor) -> Tensor:
        """(T, ...) -> those of its tokens."""
        return row[self.start : self.stop]

    def seen(self, row: Tensor) -> Tensor:
        """(G, S + T, K) -> (G, m, K), its keys."""
        return row[:, self.left : self.right]

    def rows(self, row: Tensor, G: int) -> Tensor:
        """(T, H, K) -> (G, n * H / G, K) fp32: the queries that meet the same keys."""
        _, H, K = row.shape
        return self.of(row).view(-1, G, H // G, K).transpose(0, 1).reshape(G, -1, K).float()

    def put(self, row: Tensor, result: Tensor) -> None:
        """Write what `rows` would give into row, (T, H, K)."""
        (_, H, K), G = row.shape, len(result)
        target = self.of(row).view(-1, G, H // G, K).transpose(0, 1)
        target.copy_(result.view(target.shape))

    def scores(self, scratch: Tensor, H: int, G: int) -> Tensor:
        """(G, n * H / G, m), contiguous, of memory that is used again."""
        rows, m = (self.stop - self.start) * H // G, self.right - self.left
        return scratch[: G * rows * m].view(G, rows, m)

    def sizes(self, scores: Tensor, H: int) -> tuple[int, ...]:
        """left, own, G, n, r, m of csrc/attention_softmax.cpp."""
        (G, _, m), n = scores.shape, self.stop - self.start
        return self.left, self.right - self.left - n, G, n, H // G, m


def _blocks(
    queries: Tensor, keys: Tensor, positions: Tensor, window: int | None, packed: Sequences | None
) -> list[list[_Block]]:
    """Cut each row of the batch, and of packed rows each."""
    B, T, H, _ = queries.shape
    seen = positions.to(torch.int64).contiguous().clamp(min=0, max=window)
    pieces = [((0, T), (0, keys.shape[1]))]
    if packed is not None:
        pieces = list(zip(*(pairwise(cut.tolist()) for cut in (packed.queries, packed.keys)), strict=True))
    return [
        [block for own, seen_keys in pieces for block in _blocks_of(seen[b], own, seen_keys, H, window)]
        for b in range(B)
    ]


def _blocks_of(
    seen: Tensor, own: tuple[int, int], keys: tuple[int, int], H: int, window: int | None
) -> Iterator[_Block]:
    """Cut a row: its tokens own[0] .. own[1] have the last of its keys, keys[0] .. keys[1]; `seen` (T,) is of all."""
    earlier, length = keys[1] - own[1], keys[1] - keys[0]  # what to add to a token for its key; the row's keys
    itself = torch.arange(earlier + own[0], keys[1], dtype=torch.int64, device="cpu")
    first = (itself - seen[slice(*own)]).clamp_(min=keys[0])
    width = length if window is None else min(length, window + 1)
    n = min(max(BLOCK_TOKENS[0], BLOCK_SCORES // (H * max(1, width))), BLOCK_TOKENS[1])
    for start in range(0, len(first), n):
        yield _block(first[start : start + n], own[0] + start, earlier)


def _block(first: Tensor, start: int, earlier: int) -> _Block:
    stop = start + len(first)
    return _Block(start, stop, int(first.min()), earlier + stop, first)


def _scratch(blocks: list[list[_Block]], H: int) -> Tensor:
    """Memory for the scores of the largest block."""
    sizes = (H * (block.stop - block.start) * (block.right - block.left) for row in blocks for block in row)
    return torch.empty(max(sizes, default=0), dtype=torch.float32, device="cpu")


def _by_head(row: Tensor) -> Tensor:
    """(S + T, G, K) -> (G, S + T, K) fp32; fp32 is not copied."""
    return row.transpose(0, 1).float()
