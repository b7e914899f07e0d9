"""rg_lru: the Real-Gated Linear Recurrent Unit after its gate matmuls, and its gradient, in linear time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops import device
from griffin.ops.chunk import CHUNK
from griffin.ops.op import opaque
from griffin.ops.packed import check_offsets, each_alone
from griffin.ops.scan import forgotten, initial_state, reverse_scan, scan, steps

C = 8.0  # "c is a scalar-valued constant set to 8" (Griffin, after eq. 3)
# The least divisor in the gradient of the square root. Without a bound, where a = 1 (padding), it would be 0, and the 0
# that it divides would make NaN.
LEAST = 1e-18


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    max_sqrt_gradient: float | None = 1000.0,
    unscaled_first_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the gated recurrence, given the gates before their sigmoids.

        r_t = sigmoid(recurrent_gate_t)                               eq. 1
        i_t = sigmoid(input_gate_t)                                   eq. 2
        log a_t = -8 r_t softplus(recurrent_param)                    eq. 3 and 6
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)                 eq. 4
        at a reset: h_t = i_t x_t if unscaled_first_token, else sqrt(1 - a_t^2) (i_t x_t)

    All of it is in fp32 (fp64 for fp64 inputs), whatever the dtype of x: near a = 1, bf16 has too few bits to tell
    decays apart. A recurrent_gate of -inf gives a = 1 and no input: the state passes unchanged (so is padding
    skipped).

    Args:
        x: (B, T, R), output of the convolution; bf16, fp16, fp32 or fp64.
        input_gate: (B, T, R) in x.dtype, W_x x + b_x.
        recurrent_gate: (B, T, R) in x.dtype, W_a x + b_a.
        recurrent_param: (R,) any floating dtype; softplus of it is -log a at r = 1/8. It is -Lambda of the paper.
        h0: (B, R) fp32 (fp64 for fp64), the state before the first token; None means zeros.
        reset: (B, T) bool, True where a document starts: h_{t-1} is forgotten. None means nowhere.
        offsets: (B + 1,) int64, rising from 0 to T, of packed rows: x and all that has its shape, reset and y are
            (1, T, ...), and row b is tokens offsets[b] .. offsets[b + 1], from h0[b] on. A row without tokens keeps
            its state. None: rows are as long as each other.
        max_sqrt_gradient: bound of the derivative of the square root in the backward pass; None means no bound.
        unscaled_first_token: whether the factor of a reset token is 1.

    Returns:
        y: (B, T, R) in x.dtype, y[:, t] = h_t.
        h_last: (B, R) fp32 (fp64 for fp64), h_T before rounding.

    Gradients for x, both gates, recurrent_param and h0, through y and h_last.

    Raises:
        ValueError: T is 0, shapes or dtypes disagree, or offsets do not cut T (values are checked on a CPU only).

    Source: Griffin, arXiv:2402.19427, section 2.4; the bound, RecurrentGemma, arXiv:2404.07839, section 2.
    """
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (B, T>0, R)")
    for name, gate in (("input_gate", input_gate), ("recurrent_gate", recurrent_gate)):
        if gate.shape != x.shape or gate.dtype != x.dtype:
            raise ValueError(f"{name} is {tuple(gate.shape)} {gate.dtype}, but x is {tuple(x.shape)} {x.dtype}")
    if recurrent_param.shape != x.shape[2:]:
        raise ValueError(f"recurrent_param is {tuple(recurrent_param.shape)}; this x needs {tuple(x.shape[2:])}")
    if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(f"reset is {tuple(reset.shape)} {reset.dtype}; this x needs {tuple(x.shape[:2])} torch.bool")
    if offsets is not None:
        check_offsets(offsets, x)
    h0 = initial_state(x, h0, None if offsets is None else len(offsets) - 1)
    bound = float("inf") if max_sqrt_gradient is None else max_sqrt_gradient
    gates = (input_gate, recurrent_gate)
    if offsets is not None:
        return _packed(x, *gates, recurrent_param, h0, reset, offsets, bound, unscaled_first_token)
    y, h_last, _ = _rg_lru(x, *gates, recurrent_param, h0, reset, bound, unscaled_first_token)
    return y, h_last


def _packed(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    offsets: Tensor,
    bound: float,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (x, input_gate, recurrent_gate, recurrent_param, h0)
    if (kernels := device.kernels("packed_rg_lru", *inputs, offsets)) is not None:
        return kernels.packed_rg_lru(*inputs, reset, offsets, unscaled_first_token)

    def alone(tokens: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        row = (x[:, tokens], input_gate[:, tokens], recurrent_gate[:, tokens], recurrent_param, h)
        y, h, _ = _rg_lru(*row, None if reset is None else reset[:, tokens], bound, unscaled_first_token)
        return y, h

    return each_alone(alone, h0, offsets)


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, dh_last, x, input_gate, recurrent_gate, recurrent_param, chunk_states, reset, max_sqrt_gradient, unscaled
):
    like_x = tuple(x.new_empty(x.shape) for _ in range(3))
    return *like_x, torch.empty_like(recurrent_param), torch.empty_like(dh_last)


@opaque("rg_lru_backward", fake=_fake_backward)
def _rg_lru_backward(
    dy: Tensor,
    dh_last: Tensor,
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    chunk_states: Tensor,
    reset: Tensor | None,
    max_sqrt_gradient: float,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With g_t = dy_t + a_{t+1} g_{t+1}, the gradient in h_t, and m_t the factor of the input:

    dx = g m i;  d(input_gate) = g m x i (1 - i);  dlog_a = g h_{t-1} a - 2 a^2 g i x / sqrt(max(4 (1 - a^2), bound^-2))
    (none of the second term where m is 1 by rule);  d(recurrent_gate) = -8 softplus(p) r (1 - r) dlog_a;
    dp = -8 sigmoid(p) sum(r dlog_a);  dh0 = a_1 g_1.
    """
    inputs = (dy, dh_last, x, input_gate, recurrent_gate, recurrent_param, chunk_states)
    if (kernels := device.kernels("rg_lru", *inputs)) is not None:
        return kernels.rg_lru_backward(*inputs, reset, max_sqrt_gradient, unscaled_first_token)
    dtype = chunk_states.dtype
    i, x_ = torch.sigmoid(input_gate.to(dtype)), x.to(dtype)
    r, a, v, scale = _decay(recurrent_gate, recurrent_param, reset, unscaled_first_token, dtype)
    ix = i * x_
    starts = None if reset is None else reset[..., None]
    g = reverse_scan(a, dy.to(dtype), dh_last, starts)
    gx = g * scale
    dx = gx * i
    d_input_gate = gx * ix * (1 - i)
    dlog_a = forgotten(g * a * _earlier_states(a, scale * ix, chunk_states, starts), starts)
    through_scale = g * ix * (1 - v) / (4 * v).clamp_min_(max(max_sqrt_gradient**-2, LEAST**2)).sqrt_()
    if reset is not None and unscaled_first_token:
        through_scale.masked_fill_(reset[..., None], 0.0)
    dlog_a.sub_(through_scale, alpha=2)
    p = recurrent_param.to(dtype)
    d_recurrent_gate = dlog_a * (-C * F.softplus(p)) * (r * (1 - r))
    dp = (dlog_a * r).sum(dim=(0, 1)) * (-C * torch.sigmoid(p))
    return (
        dx.to(x.dtype),
        d_input_gate.to(x.dtype),
        d_recurrent_gate.to(x.dtype),
        dp.to(recurrent_param.dtype),
        forgotten(a[:, 0] * g[:, 0], None if starts is None else starts[:, 0]),
    )


def _fake(  # type: ignore[no-untyped-def]
    x, input_gate, recurrent_gate, recurrent_param, h0, reset, max_sqrt_gradient, unscaled_first_token
):
    B, T, R = x.shape
    return x.new_empty(B, T, R), torch.empty_like(h0), h0.new_empty(B, (T + CHUNK - 1) // CHUNK, R)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, input_gate, recurrent_gate, recurrent_param, _, reset, ctx.bound, ctx.unscaled = inputs
    ctx.save_for_backward(x, input_gate, recurrent_gate, recurrent_param, output[2], reset)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dy, dh_last, _):  # type: ignore[no-untyped-def]
    *saved, reset = ctx.saved_tensors
    dx, di, dr, dp, dh0 = torch.ops.griffin.rg_lru_backward(dy, dh_last, *saved, reset, ctx.bound, ctx.unscaled)
    return dx, di, dr, dp, dh0, None, None, None


@opaque("rg_lru", fake=_fake, backward=_backward, save=_save)
def _rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    max_sqrt_gradient: float,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give y, h_last and the states before tokens 0, CHUNK, 2 CHUNK ...: all that the backward pass keeps of h."""
    inputs = (x, input_gate, recurrent_gate, recurrent_param, h0)
    if (kernels := device.kernels("rg_lru", *inputs)) is not None:
        return kernels.rg_lru(*inputs, reset, unscaled_first_token)
    b = torch.sigmoid(input_gate.to(h0.dtype)).mul_(x)
    _, a, _, scale = _decay(recurrent_gate, recurrent_param, reset, unscaled_first_token, h0.dtype)
    h = scan(a, b.mul_(scale), h0, None if reset is None else reset[..., None])
    chunk_states = torch.cat([h0[:, None], h[:, CHUNK - 1 : -1 : CHUNK]], dim=1)
    return h.to(x.dtype), h[:, -1].clone(), chunk_states


def _decay(
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    reset: Tensor | None,
    unscaled_first_token: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give r, a, v = 1 - a^2 (before resets) and the factor of the input, each (B, T, R) in `dtype`."""
    r = torch.sigmoid(recurrent_gate.to(dtype))
    log_a = r * (-C * F.softplus(recurrent_param.to(dtype)))
    a = log_a.exp()
    v = torch.expm1(log_a.mul_(2)).neg_()  # 1 - a^2 without cancellation as a -> 1
    scale = v.sqrt()
    if reset is not None:
        a.masked_fill_(reset[..., None], 0.0)
        if unscaled_first_token:
            scale.masked_fill_(reset[..., None], 1.0)
    return r, a, v, scale


def _earlier_states(a: Tensor, b: Tensor, chunk_states: Tensor, starts: Tensor | None) -> Tensor:
    """Give h_{t-1} for every t, each chunk from its own first state."""
    T = a.shape[1]
    chunks = T // CHUNK
    whole = chunks * CHUNK
    before = torch.empty_like(b)
    # All whole chunks side by side, (B, chunks, CHUNK, R), then what is left of T.
    for first, last, h in ((0, whole, chunk_states[:, :chunks]), (whole, T, chunk_states[:, -1])):
        if first == last:
            continue
        tensors, some = [t[:, first:last] for t in (a, b, before)], None if starts is None else starts[:, first:last]
        if h.dim() == 3:
            tensors = [t.unflatten(1, (chunks, CHUNK)) for t in tensors]
            some = None if some is None else some.unflatten(1, (chunks, CHUNK))
        each = zip(*(t.unbind(-2) for t in tensors), steps(some, tensors[0].shape[-2]), strict=True)
        for a_t, b_t, before_t, starts_t in each:
            before_t.copy_(h)
            h = torch.addcmul(b_t, a_t, forgotten(h, starts_t))
    return before
