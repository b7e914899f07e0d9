"""local_attention by the flash attention inside PyTorch, for CUDA: out_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j.

Flash attention takes sequences. Of one with n queries and m keys, query i sees keys up to number m - n + i and from
number m - n + i - W on: the last query sees the last key. So every document is a sequence, and no mask is made.

It is there for fp16 and bf16 on NVIDIA GPUs since Ampere, with heads of up to 256 channels, a multiple of 8. Anything
else (fp32, older GPUs, AMD's, a PyTorch built without it) takes the definition in griffin/ops/attention.py, which goes
through blocks of queries: slower, and still without a T x T mask where there is a window.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops.op import opaque


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the documents of one call lie: the same for all its layers."""

    queries: Tensor  # (N + 1,) int32, the first query of each sequence among all B * T, and B * T
    keys: Tensor  # (N + 1,) int32, the first key of each sequence among all B * (S + T), and B * (S + T)
    longest_queries: int  # no sequence has more queries
    longest_keys: int


def sequences(positions: Tensor, earlier: int, *, inside: bool = True) -> Sequences:
    """Cut B rows of T queries and S + T keys into sequences. A row gives, in this order:

    - the S - min(p_0, S) oldest keys, which no query sees, as a sequence without queries (if S > 0);
    - its first document, with n queries and the min(p_0, S) + n keys that end with theirs;
    - each document that starts after the row's first token, with n queries and n keys.

    Args:
        positions: (B, T) whole numbers, offset of each token in its document; 0 starts one.
        earlier: S, keys before the first token of each row.
        inside: whether documents may start after a row's first token. Their number is then read from the device, which
            waits for it, and empty sequences make up the next power of two, so that few shapes come up. Without, N is
            2B (B if S = 0) and nothing waits. In the backward pass each sequence costs 128 H K fp32, even an empty one.
    """
    (B, T), S = positions.shape, earlier
    row = torch.arange(B, dtype=torch.int64, device=positions.device)[:, None]
    token = torch.arange(1, T if inside else 1, dtype=torch.int64, device=positions.device).expand(B, -1)
    first = row.new_zeros(B, 1)
    queries, keys = torch.cat([first, token], dim=1), torch.cat([S - positions[:, :1].clamp(0, S), S + token], dim=1)
    if S:
        queries, keys = torch.cat([first, queries], dim=1), torch.cat([first, keys], dim=1)
    queries, keys = (queries + row * T).flatten(), (keys + row * (S + T)).flatten()
    longest_queries, longest_keys, end = T, S + T, 1
    if token.shape[1]:
        starts = torch.cat(
            [torch.ones_like(first, dtype=torch.bool).expand(B, 2 if S else 1), positions[:, 1:] == 0], 1
        )
        index = starts.flatten().nonzero()[:, 0]
        queries, keys, end = queries[index], keys[index], 1 + _power_of_two(len(index)) - len(index)
    queries, keys = F.pad(queries, (0, end), value=B * T), F.pad(keys, (0, end), value=B * (S + T))
    if token.shape[1]:
        longest = torch.stack([queries.diff().max(), keys.diff().max()]).tolist()
        longest_queries, longest_keys = min(T, _power_of_two(longest[0])), min(S + T, _power_of_two(longest[1]))
    return Sequences(queries.int(), keys.int(), longest_queries, longest_keys)


def unpacked(cut: Sequences | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """As arguments of an op, which takes no classes."""
    return (None, None, 0, 0) if cut is None else (cut.queries, cut.keys, cut.longest_queries, cut.longest_keys)


def _fake_backward(dout, q, k, v, out, log_sums, positions, window, *cut):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@opaque("flash_attention_backward", fake=_fake_backward)
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    positions: Tensor,
    window: int | None,
    first_query: Tensor | None,
    first_key: Tensor | None,
    longest_queries: int,
    longest_keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(S - log_sums), S = Q K^T / sqrt(K):

    dV = P^T dO;  dS = P (dO V^T - sum over channels of dO O);  dQ = dS K / sqrt(K);  dK = dS^T Q / sqrt(K)
    """
    cut = _cut(q, k, positions, first_query, first_key, longest_queries, longest_keys)
    flat_q, flat_k, flat_v = _end_to_end(q), _end_to_end(k), _end_to_end(v)
    grads = _backward(_end_to_end(dout), flat_q, flat_k, flat_v, _end_to_end(out), log_sums, cut, window)
    dq, dk, dv = (grad.reshape(t.shape) for grad, t in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _fake(q, k, v, positions, window, first_query, first_key, longest_queries, longest_keys):  # type: ignore[no-untyped-def]
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(H, B * T, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, positions, ctx.window, first_query, first_key, *ctx.longest = inputs
    ctx.save_for_backward(q, k, v, *output, positions, first_query, first_key)


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, log_sums, positions, first_query, first_key = ctx.saved_tensors
    grads = torch.ops.griffin.flash_attention_backward(
        dout, q, k, v, out, log_sums, positions, ctx.window, first_query, first_key, *ctx.longest
    )
    return *grads, *[None] * 6


@opaque("flash_attention", fake=_fake, backward=_gradients, save=_save)
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window: int | None,
    first_query: Tensor | None,
    first_key: Tensor | None,
    longest_queries: int,
    longest_keys: int,
) -> tuple[Tensor, Tensor]:
    """Give `local_attention` and, for its backward pass, log(sum_j exp(q_t . k_j / sqrt(K))), (H, B * T) fp32.

    The last four arguments are a `Sequences`, unpacked; without its tensors it is made here, waiting for the device.
    """
    cut = _cut(q, k, positions, first_query, first_key, longest_queries, longest_keys)
    out, log_sums = _forward(_end_to_end(q), _end_to_end(k), _end_to_end(v), cut, window)
    return out.reshape(q.shape), log_sums


def _forward(q: Tensor, k: Tensor, v: Tensor, cut: Sequences, window: int | None) -> tuple[Tensor, Tensor]:
    """(B * T, H, K), (B * (S + T), G, K) twice -> (B * T, H, K), (H, B * T). PyTorch's kernels."""
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, cut.queries, cut.keys, cut.longest_queries, cut.longest_keys),
        *(0.0, True, False),  # no dropout; causal; no debug mask
        window_size_left=-1 if window is None else window,
        window_size_right=0,
    )
    return out, log_sums


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    cut: Sequences,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(dout, q, k, v, out, log_sums, cut.queries, cut.keys, cut.longest_queries, cut.longest_keys),
        *(0.0, True),
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # the dropout's random state: there is none
        torch.empty(0, dtype=q.dtype, device=q.device),
        window_size_left=-1 if window is None else window,
        window_size_right=0,
    )
    return dq, dk, dv


# What both ops above must have: the last two came last.
ARGUMENTS = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
    *("window_size_left", "window_size_right"),
)


@functools.cache
def status(device: torch.device) -> tuple[bool, str]:
    """Whether PyTorch's flash attention is there for a CUDA device, and why (not)."""
    ops = (torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)
    if not all({argument.name for argument in op.default._schema.arguments}.issuperset(ARGUMENTS) for op in ops):
        return False, f"PyTorch {torch.__version__} names its arguments otherwise"
    if torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
        return False, "this PyTorch was built without flash attention for CUDA"
    if not torch.cuda.is_available():
        return False, "there is no CUDA device here"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "the device is older than NVIDIA's Ampere"
    return True, "sequences of documents, made once a call"


def _cut(
    q: Tensor, k: Tensor, positions: Tensor, first_query: Tensor | None, first_key: Tensor | None, *longest: int
) -> Sequences:
    if first_query is None or first_key is None:
        return sequences(positions, k.shape[1] - q.shape[1])
    return Sequences(first_query, first_key, *longest)


def _end_to_end(t: Tensor) -> Tensor:
    """(B, n, H, K) -> (B * n, H, K), with the channels of a head side by side in memory."""
    t = t.flatten(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()


def _power_of_two(n: int) -> int:
    """The least that is n or more."""
    return 1 << max(n - 1, 0).bit_length()
