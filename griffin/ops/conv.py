"""causal_conv1d: a short depthwise convolution over time that never mixes two documents."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops import device
from griffin.ops.op import opaque
from griffin.ops.packed import check_offsets, each_alone
from griffin.ops.scan import accumulation_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y_t = bias + sum over s = 0 .. N-1 of weight[:, N-1-s] * x_{t-s}, channel by channel.

    So weight[:, N-1] multiplies the current token. Terms from before the document of token t are left out. Sums are in
    fp32 (fp64 for fp64) and rounded once.

    Args:
        x: (B, T, R) bf16, fp16, fp32 or fp64.
        weight: (R, N) any floating dtype, N taps.
        bias: (R,) as weight.
        state: (B, N-1, R) in x.dtype, the inputs before the first token, oldest first; None means zeros.
        reset: (B, T) bool, True where a document starts. None means nowhere.
        offsets: (B + 1,) int64, rising from 0 to T, of packed rows: x, reset and y are (1, T, ...), and row b is tokens
            offsets[b] .. offsets[b + 1], from state[b] on. None: rows are as long as each other.

    Returns:
        y: (B, T, R) in x.dtype.
        state: (B, N-1, R) in x.dtype, the last N-1 inputs, with zeros for those of earlier documents.

    Gradients for x, weight, bias and state, through both results.

    Raises:
        ValueError: T is 0, shapes or dtypes disagree, or offsets do not cut T (values are checked on a CPU only).

    Source: Griffin, arXiv:2402.19427, section 2.3; the document rule, Google's Conv1D.
    """
    if x.dim() != 3 or x.shape[1] == 0 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be (B, T>0, R) and (R, N>0)"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}; this weight needs {tuple(weight.shape[:1])}")
    if offsets is not None:
        check_offsets(offsets, x)
    before = (x.shape[0] if offsets is None else len(offsets) - 1, weight.shape[1] - 1, x.shape[2])
    if state is None:
        state = x.new_zeros(before)
    elif state.shape != before or state.dtype != x.dtype:
        raise ValueError(f"state is {tuple(state.shape)} {state.dtype}; this x and weight need {before} {x.dtype}")
    if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(f"reset is {tuple(reset.shape)} {reset.dtype}; this x needs {tuple(x.shape[:2])} torch.bool")
    if offsets is not None:
        return _packed(x, weight, bias, state, reset, offsets)
    return _causal_conv1d(x, weight, bias, state, reset)


def _packed(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    if (kernels := device.kernels("packed_causal_conv1d", x, state, offsets, size=weight.shape[1])) is not None:
        return kernels.packed_causal_conv1d(x, weight, bias, state, reset, offsets)

    def alone(tokens: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        return _causal_conv1d(x[:, tokens], weight, bias, state, None if reset is None else reset[:, tokens])

    return each_alone(alone, state, offsets)


def _fake_backward(dy, dlast, x, weight, state, reset):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:1]),
        state.new_empty(state.shape),
    )


@opaque("causal_conv1d_backward", fake=_fake_backward)
def _causal_conv1d_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if (kernels := device.kernels("causal_conv1d", x, state, dy, dlast, size=weight.shape[1])) is not None:
        return kernels.causal_conv1d_backward(dy, dlast, x, weight, state, reset)
    dtype, T, taps = accumulation_dtype(x), x.shape[1], weight.shape[1]
    inputs, w, dy = torch.cat([state, x], dim=1), weight.to(dtype).T, dy.to(dtype)
    dinputs = torch.zeros_like(inputs, dtype=dtype)
    dw = torch.empty_like(w)
    for s in range(taps):
        span = slice(taps - 1 - s, taps - 1 - s + T)
        flow = dy.masked_fill(_across(reset, s), 0) if reset is not None and s else dy
        dinputs[:, span].addcmul_(w[taps - 1 - s], flow)
        dw[taps - 1 - s] = (flow * inputs[:, span]).sum(dim=(0, 1))
    if reset is not None and taps > 1:
        dlast = dlast.masked_fill(_before_last_reset(reset, taps - 1), 0)
    dinputs[:, T:] += dlast
    dstate, dx = dinputs[:, : taps - 1].to(x.dtype), dinputs[:, taps - 1 :].to(x.dtype)
    return dx.contiguous(), dw.T.to(weight.dtype).contiguous(), dy.sum(dim=(0, 1)).to(weight.dtype), dstate.clone()


def _fake(x, weight, bias, state, reset):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, state, reset = inputs
    ctx.save_for_backward(x, weight, state, reset)


def _backward(ctx, dy, dlast):  # type: ignore[no-untyped-def]
    dx, dweight, dbias, dstate = torch.ops.griffin.causal_conv1d_backward(dy, dlast, *ctx.saved_tensors)
    return dx, dweight, dbias, dstate, None


@opaque("causal_conv1d", fake=_fake, backward=_backward, save=_save)
def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    if (kernels := device.kernels("causal_conv1d", x, state, size=weight.shape[1])) is not None:
        return kernels.causal_conv1d(x, weight, bias, state, reset)
    dtype, T, taps = accumulation_dtype(x), x.shape[1], weight.shape[1]
    inputs = torch.cat([state, x], dim=1)
    w = weight.to(dtype).T
    y = torch.addcmul(bias.to(dtype), w[taps - 1], x)
    for s in range(1, taps):
        term = inputs[:, taps - 1 - s : taps - 1 - s + T]
        if reset is not None:
            term = term.masked_fill(_across(reset, s), 0)
        y.addcmul_(w[taps - 1 - s], term)
    last = inputs[:, T:]
    if reset is not None and taps > 1:
        last = last.masked_fill(_before_last_reset(reset, taps - 1), 0)
    return y.to(x.dtype), last.clone()


def _across(reset: Tensor, s: int) -> Tensor:
    """(B, T, 1) bool: the input s tokens earlier belongs to another document."""
    across = reset.clone()
    for j in range(1, s):
        across[:, j:] |= reset[:, :-j]
    return across[..., None]


def _before_last_reset(reset: Tensor, count: int) -> Tensor:
    """(B, count, 1) bool: which of the last `count` inputs, earlier state included, come before the last reset."""
    B = reset.shape[0]
    padded = torch.cat([reset.new_zeros(B, count), reset], dim=1)[:, -count:]
    later = padded.flip(1).cumsum(1).flip(1) - padded.long()  # resets strictly after each
    return (later > 0)[..., None]
