"""Cross entropy from hidden states, without ever holding (B, T, V) logits; bits per byte."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from griffin import ops
from griffin.ops import products
from griffin.ops.cross_entropy import NOT_COUNTED as NOT_COUNTED
from griffin.ops.device import own_dtypes


def cross_entropy(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute sum over counted tokens of logsumexp(c) - c[target], c = cap tanh(hidden embedding^T / cap).

    Logits live for one chunk of tokens at a time; where a gradient is wanted it is formed in the same pass, so nothing
    of size V is kept per token. Logits, softmax and sums are in fp32 (fp64 for fp64), under torch.autocast too. There
    is no second derivative: a backward pass with create_graph=True raises RuntimeError.

    Args:
        hidden: (B, T, D) from `Griffin.forward`.
        embedding: (V, D), `Griffin.embedding`.
        targets: (B, T) int64 in [0, V), or NOT_COUNTED (-1).
        soft_cap: the cap of the logits, `config.logits_soft_cap`; None means none.
        chunk_tokens: tokens per chunk; None keeps a chunk's logits at 32 MB on a CPU and 1 GB on a GPU.

    Returns:
        nats: () fp32 (fp64 for fp64), the sum; its gradient reaches hidden and embedding.
        count: () int64, how many tokens were counted. nats / count is the mean.

    Raises:
        ValueError: shapes or dtypes disagree, or (on a CPU) a target is out of range.
    """
    if hidden.dim() != 3 or embedding.dim() != 2 or hidden.shape[2] != embedding.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, embedding {tuple(embedding.shape)}: must be (B, T, D), (V, D)")
    if targets.shape != hidden.shape[:2] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype}; it must be {tuple(hidden.shape[:2])} int64"
        )
    V = embedding.shape[0]
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in torch.aminmax(targets))
        if low < NOT_COUNTED or high >= V:
            raise ValueError(
                f"target {low if low < NOT_COUNTED else high} is neither in 0 .. {V - 1} nor {NOT_COUNTED}"
            )
    if chunk_tokens is None:
        chunk_tokens = max(64, (2**28 if hidden.is_cuda else 2**23) // V)
    with own_dtypes(hidden.device):
        nats = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), embedding, targets.flatten(), soft_cap, chunk_tokens
        )
    return nats, (targets != NOT_COUNTED).sum()


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """nats / (ln 2 * bytes of UTF-8 text predicted): comparable across tokenizers, which nats per token is not.

    Raises:
        ValueError: num_bytes < 1.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes={num_bytes}: bits per byte needs text")
    return nats / (math.log(2) * num_bytes)


class _CrossEntropy(torch.autograd.Function):
    """(N, D), (V, D), (N,) -> (); the gradient is computed with the value and kept until asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, cap: float | None, chunk_tokens: int
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        narrow = products.narrowest(hidden)
        weight = embedding.to(narrow)
        with_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if with_gradient else None
        # Of a frozen embedding it would be as large as that, and a product of the size of the logits'.
        d_weight = torch.zeros_like(embedding, dtype=wide) if ctx.needs_input_grad[1] else None
        across = products.transposed(weight) if with_gradient else None
        nats = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            span = slice(start, start + chunk_tokens)
            h = hidden[span].to(narrow)
            logits = products.product(h, weight)
            row_nats, d_logits = ops.cross_entropy(logits, targets[span], cap, narrow if with_gradient else None)
            nats += row_nats.sum()
            if d_hidden is None or d_logits is None or across is None:
                continue
            d_hidden[span] = products.product(d_logits, across)
            if d_weight is not None:
                products.add_product_(d_weight, products.transposed(d_logits), products.transposed(h))
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(embedding.dtype))
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The gradient was computed without a graph. `once_differentiable` would not say so: it raises only where
            # the incoming gradient has one, and a loss stands last.
            raise RuntimeError("cross_entropy has no second derivative: take its gradient without create_graph=True")
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], None if d_weight is None else d_weight * grads[0], None, None, None
