"""local_attention: each token attends to the W tokens before it and to itself, within its document."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops import device, flash, packed
from griffin.ops.op import differentiable

# Queries that share one slab of keys: T * (W + QUERY_CHUNK) scores are computed, never T * T.
QUERY_CHUNK = 256

Plan = flash.Sequences  # of one call, for all its layers
Rows = flash.Sequences  # packed rows: where the queries and the keys of each lie


def plan(positions: Tensor, earlier: int, *, packed: bool) -> Plan | None:
    """Say where the documents of one call lie, once for all its layers; None where attention does not ask.

    Args:
        positions: (B, T) as `local_attention` takes them.
        earlier: S, keys before the first token of each row.
        packed: whether documents may start after a row's first token. Counting them waits for the device, and so cannot
            be compiled.
    """
    if not by_sequences(positions.device) or (packed and torch.compiler.is_compiling()):
        return None
    return flash.sequences(positions, earlier, inside=packed)


def packed_rows(counts: Sequence[int], earlier: Sequence[int], device: torch.device) -> Rows:
    """Say where packed rows lie, once for all layers: row b has counts[b] queries and earlier[b] + counts[b] keys."""
    keys = [own + before for own, before in zip(counts, earlier, strict=True)]
    ends = [[0, *accumulate(sizes)] for sizes in (counts, keys)]
    queries_at, keys_at = torch.tensor(ends, dtype=torch.int32, device="cpu").to(device)
    return Rows(queries_at, keys_at, max(counts, default=0), max(keys, default=0))


def by_sequences(device: torch.device) -> bool:
    """Whether attention goes by sequences (flash attention's) and not by positions."""
    return device.type == "cuda"


def local_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    window: int | None,
    documents: Plan | None = None,
    rows: Rows | None = None,
) -> Tensor:
    """Compute softmax(q_t . k_j / sqrt(K)) v_j over the keys j that token t sees.

    Token t, at offset p_t in its document, sees the min(p_t, W) tokens before it and itself: W + 1 keys at most, the
    token itself not counted in W. Documents and windows need no other mask than `positions`.

    Args:
        queries: (B, T, H, K) any floating dtype, after RoPE.
        keys: (B, S + T, G, K) in the same dtype, after RoPE; S earlier tokens of each row come first, in order of time.
            H is a multiple of G; query head h uses key head h // (H / G).
        values: as keys.
        positions: (B, T) whole numbers; below 0 counts as 0. Where p_t > S + t the tokens not given count as absent. On
            CUDA, p_t must be p_{t-1} + 1, or 0 where a document starts.
        window: W, or None to see the whole document.
        documents: what `plan` gave for these positions and S. None: made here where it is needed, which may wait for
            the device.
        rows: what `packed_rows` gave, of packed rows: queries and positions are (1, T, ...), keys and values those of
            one row after another, its earlier tokens before its own. No document may start after a row's first token.
            None: rows are as long as each other.

    Returns:
        (B, T, H, K) in queries.dtype. The softmax is in fp32 (fp64 for fp64).

    Keys and values that a token does not see, of its own row, must be finite: they get weight 0, and 0 * NaN is NaN. A
    gradient for queries, keys and values. Time O(T * (W + 256)); memory for scores never grows with T when W is given.

    Raises:
        ValueError: shapes or dtypes disagree.

    Source: Griffin, arXiv:2402.19427, section 2.3 (local MQA); the window rule, Google's LocalAttentionBlock.
    """
    B, T, H, K = queries.shape
    if keys.shape != values.shape or keys.shape[0] != B or keys.shape[3] != K or keys.shape[1] < T or H % keys.shape[2]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} must be "
            "(B, T, H, K) and twice (B, S+T, G, K) with H a multiple of G"
        )
    if positions.shape != (B, T):
        raise ValueError(f"positions is {tuple(positions.shape)}; these queries need {(B, T)}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for global attention")
    if rows is not None:
        return _packed(queries, keys, values, positions, window, rows)
    if by_sequences(queries.device):
        cut = flash.unpacked(documents)
        return torch.ops.griffin.local_attention_cuda(queries, keys, values, positions, window, *cut)
    kernels = device.kernels("local_attention", queries, keys, values, positions)
    if kernels is None:
        return _local_attention(queries, keys, values, positions, window)
    inputs = (queries, keys, values, positions, window, None)
    return differentiable(kernels.local_attention, kernels.local_attention_backward, *inputs)


def _packed(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None, rows: Rows) -> Tensor:
    if by_sequences(q.device):
        if q.numel() and (kernels := device.kernels("local_attention", q, k, v, size=q.shape[3])) is not None:
            out: Tensor = kernels.flash_attention(q, k, v, positions, window, *flash.unpacked(rows))[0]
            return out
    elif (kernels := device.kernels("local_attention", q, k, v, positions)) is not None:
        inputs = (q, k, v, positions, window, rows)
        return differentiable(kernels.local_attention, kernels.local_attention_backward, *inputs)
    outputs = []
    keys_of = list(pairwise(rows.keys.tolist()))
    for b, own in packed.rows(rows.queries):
        seen = slice(*keys_of[b])
        outputs.append(_local_attention(q[:, own], k[:, seen], v[:, seen], positions[:, own], window))
    return torch.cat(outputs, dim=1)


def ring_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attend from one token per row to a ring of slots that already holds that token.

    The token at offset p of its document was written to slot p % S, so slots 0 .. min(p, S-1) hold what it sees.

    Args:
        queries: (B, 1, H, K) any floating dtype, after RoPE.
        keys: (B, S, G, K) in the same dtype, after RoPE; S = W + 1 slots in any rotation.
        values: as keys.
        positions: (B, 1) whole numbers p, each row's own; below 0 counts as 0.

    Returns:
        (B, 1, H, K) in queries.dtype.

    Raises:
        ValueError: shapes disagree.
    """
    B, T, H, K = queries.shape
    if T != 1 or keys.shape != values.shape or keys.shape[0] != B or keys.shape[3] != K or H % keys.shape[2]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} must be "
            "(B, 1, H, K) and twice (B, S, G, K) with H a multiple of G"
        )
    if positions.shape != (B, 1):
        raise ValueError(f"positions is {tuple(positions.shape)}; these queries need {(B, 1)}")
    kernels = device.kernels("ring_attention", queries, keys, values, positions, size=K)
    if kernels is None or not min(queries.numel(), keys.shape[1]):
        slots = torch.arange(keys.shape[1], dtype=torch.int64, device=queries.device)
        return _attend(queries, keys, values, slots <= positions[:, :, None].clamp(min=0))
    return kernels.ring_attention(queries, keys, values, positions)


def ring_write_(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Write one token of each row into its slot, in place: keys[b, positions[b] % S] = k[b], values likewise.

    Args:
        keys, values: (B, S, G, K).
        k, v: (B, 1, G, K) in the same dtype. No gradient flows through what is written.
        positions: (B, 1) whole numbers p.

    Raises:
        ValueError: shapes disagree, or there are no slots.
    """
    B, S, G, K = keys.shape
    if values.shape != keys.shape or k.shape != (B, 1, G, K) or v.shape != k.shape or positions.shape != (B, 1):
        raise ValueError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and "
            f"positions {tuple(positions.shape)} must be twice (B, S, G, K), twice (B, 1, G, K) and (B, 1)"
        )
    if S == 0:
        raise ValueError(f"keys is {tuple(keys.shape)}: there is no slot to write to; reserve_ makes some")
    k, v = k.detach(), v.detach()
    whole = keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype == k.dtype == v.dtype
    if whole and (kernels := device.kernels("ring_write_", keys, values, k, v, positions)) is not None:
        kernels.ring_write_(keys, values, k, v, positions)
        return
    slot = (positions % S)[..., None, None].expand(B, 1, G, K)
    keys.scatter_(1, slot, k)
    values.scatter_(1, slot, v)


def _local_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    T, earlier = q.shape[1], k.shape[1] - q.shape[1]
    seen = positions.clamp(min=0, max=window)  # earlier tokens each query sees
    outputs = []
    for start in range(0, T, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, T)
        left = 0 if window is None else max(0, earlier + start - window)
        right = earlier + stop
        index = torch.arange(left, right, dtype=torch.int64, device=q.device)
        query_index = torch.arange(earlier + start, right, dtype=torch.int64, device=q.device)[:, None]
        # (B, stop - start, right - left): key j is not after the query and not more than `seen` before it.
        mask = (index <= query_index) & (index >= query_index - seen[:, start:stop, None])
        outputs.append(_attend(q[:, start:stop], k[:, left:right], v[:, left:right], mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


# An op of PyTorch's, made of others, so that TorchDynamo need not trace the question whether there is flash attention.
_library = torch.library.Library("griffin", "FRAGMENT")
_library.define(
    "local_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor positions, int? window, "
    "Tensor? first_query, Tensor? first_key, SymInt longest_queries, SymInt longest_keys) -> Tensor"
)


@torch.library.impl(_library, "local_attention_cuda", "CompositeImplicitAutograd")
def _local_cuda(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None, *cut: Any) -> Tensor:
    kernels = device.kernels("local_attention", q, k, v, size=q.shape[3], traced=True)
    if kernels is None or not q.numel():
        return _local_attention(q, k, v, positions, window)
    return kernels.flash_attention(q, k, v, positions, window, *cut)[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(B, t, H, K), (B, s, G, K) twice, (B, t, s) bool -> (B, t, H, K)."""
    H, G = q.shape[2], k.shape[2]
    # Query heads that share keys read the same memory: expand copies nothing when G is 1.
    k, v = (t[:, :, :, None].expand(-1, -1, -1, H // G, -1).flatten(2, 3).transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None]).transpose(1, 2)
