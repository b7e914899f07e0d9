"""One token of the recurrent block between its linears, in one kernel: convolution, gates, RG-LRU, gelu(y) h.

A program makes a slice of one gate block's channels. The gates of a slice need u of the whole block, so every program
of the block computes that again from the convolution's state, which none of them may therefore write: a second kernel
moves it on when all are done. h is read and written by the one program that makes its channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin.ops.rg_lru import C

_C = tl.constexpr(C)


@triton.jit
def _softplus(p):
    """log(1 + e^p). With w = 1 + e rounded, log(w) e / (w - 1) is log(1 + e) to the last bits (Kahan)."""
    e = tl.exp(tl.minimum(p, 20.0))
    w = 1.0 + e
    some = tl.where(w == 1.0, 2.0, w)
    return tl.where(p > 20.0, p, tl.where(w == 1.0, e, tl.log(some) * (e / (some - 1.0))))


@triton.jit
def _decay(log_a):
    """a = e^log_a and 1 - a^2, for log_a <= 0, without cancellation as a -> 1.

    With u = e^log_a as a GPU computes it, off by some last bits, (u - 1) log_a / log(u) is e^log_a - 1 to the last bits
    (Kahan), so that m below is 1 - a, and 1 - a^2 = m (1 + a).
    """
    u = tl.exp(log_a)
    near = u > 0.5
    some = tl.where(near & (u < 1.0), u, 0.5)
    m = tl.where(near, tl.where(u >= 1.0, -log_a, (1.0 - some) * (log_a / tl.log(some))), 1.0 - u)
    a = tl.where(near, 1.0 - m, u)
    return a, m * (1.0 + a)


@triton.jit
def _convolved(x, conv, weight, bias, n, c, here, starts, R, TAPS: tl.constexpr):
    """u of rows n and channels c, rounded to the dtype of x: the state's terms are left out where a document starts."""
    exists = c < R
    at = tl.load(weight + c * TAPS + TAPS - 1, mask=exists, other=0).to(tl.float32)
    u = tl.load(bias + c, mask=exists, other=0).to(tl.float32)[None, :]
    u += at[None, :] * tl.load(x + n[:, None] * R + c[None, :], mask=here, other=0).to(tl.float32)
    for s in tl.static_range(1, TAPS):
        at = tl.load(weight + c * TAPS + (TAPS - 1 - s), mask=exists, other=0).to(tl.float32)
        earlier = conv + (n[:, None] * (TAPS - 1) + (TAPS - 1 - s)) * R + c[None, :]
        u += at[None, :] * tl.load(earlier, mask=here & ~starts[:, None], other=0).to(tl.float32)
    return u.to(x.dtype.element_ty)


@triton.jit
def _gate(sums, bias, c, inside, dtype: tl.constexpr):
    """sigmoid(sums + bias), both rounded to dtype as the separate ops round them."""
    b = tl.load(bias + c, mask=inside, other=0).to(dtype).to(tl.float32)
    return tl.sigmoid((sums + b[None, :]).to(dtype).to(tl.float32))


@triton.jit
def _step_kernel(
    x,
    y,
    conv,
    h,
    reset,
    conv_weight,
    conv_bias,
    input_weight,
    input_bias,
    recurrent_weight,
    recurrent_bias,
    recurrent_param,
    out,
    B,
    R,
    width,
    TAPS: tl.constexpr,
    UNSCALED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    first = tl.program_id(0) * width  # channel of the gate block
    j = tl.program_id(1) * BN + tl.arange(0, BN)  # the slice, within the block
    n = tl.program_id(2) * BM + tl.arange(0, BM)
    dtype: tl.constexpr = x.dtype.element_ty
    row, inside = n < B, j < width
    starts = tl.load(reset + n, mask=row, other=0) != 0
    input_sums = tl.zeros((BM, BN), tl.float32)
    recurrent_sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        some = row[:, None] & (k < width)[None, :]
        u = _convolved(x, conv, conv_weight, conv_bias, n, first + k, some, starts, R, TAPS)
        at = (first + k)[:, None] * width + j[None, :]
        both = (k < width)[:, None] & inside[None, :]
        w = tl.load(input_weight + at, mask=both, other=0).to(dtype)
        input_sums = tl.dot(u, w, input_sums, input_precision="ieee")
        w = tl.load(recurrent_weight + at, mask=both, other=0).to(dtype)
        recurrent_sums = tl.dot(u, w, recurrent_sums, input_precision="ieee")

    c = first + j
    here = row[:, None] & inside[None, :]
    u = _convolved(x, conv, conv_weight, conv_bias, n, c, here, starts, R, TAPS).to(tl.float32)
    i = _gate(input_sums, input_bias, c, inside, dtype)
    r = _gate(recurrent_sums, recurrent_bias, c, inside, dtype)
    p = tl.load(recurrent_param + c, mask=inside, other=0).to(tl.float32)
    a, v = _decay(r * -_C * _softplus(p)[None, :])
    scale = tl.sqrt(v)
    if UNSCALED:
        scale = tl.where(starts[:, None], 1.0, scale)
    at = n[:, None] * R + c[None, :]
    before = tl.load(h + at, mask=here & ~starts[:, None], other=0)
    now = a * before + scale * (i * u)
    tl.store(h + at, now, mask=here)
    gate = tl.load(y + at, mask=here, other=0).to(tl.float32)
    # gelu: x / 2 (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    gelu = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + at, (gelu * now.to(dtype).to(tl.float32)).to(dtype), mask=here)


@triton.jit
def _shift_kernel(x, conv, reset, R, TAPS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """conv = the last TAPS - 1 of conv and x, zeros for the earlier ones where a document starts."""
    b = tl.program_id(1)
    s = tl.arange(0, BS)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    target = conv + (b * (TAPS - 1) + s)[:, None] * R + c[None, :]
    going_on = tl.load(reset + b) == 0
    moved = tl.load(target + R, mask=(s < TAPS - 2)[:, None] & (c < R)[None, :] & going_on, other=0)
    newest = tl.load(x + b * R + c, mask=c < R, other=0)
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(target, tl.where((s == TAPS - 2)[:, None], newest[None, :], moved), mask=(s < TAPS - 1)[:, None] & (c < R))


def recurrent_step_(
    x: Tensor,
    y: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gates: tuple[Tensor, Tensor, Tensor, Tensor],
    recurrent_param: Tensor,
    conv: Tensor,
    h: Tensor,
    reset: Tensor,
    unscaled_first_token: bool,
) -> Tensor:
    """As the op; conv and h contiguous, gates its four parameters in their order."""
    (B, R), (blocks, width), taps = x.shape, gates[1].shape, conv_weight.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, reset = x.contiguous(), reset.contiguous().view(torch.uint8)
    BM = min(64, max(16, triton.next_power_of_2(B)))
    BK, BN = (min(most, max(16, triton.next_power_of_2(width))) for most in (64, 32))
    with torch.cuda.device_of(x):
        _step_kernel[(blocks, triton.cdiv(width, BN), triton.cdiv(B, BM))](
            *(x, y.contiguous(), conv, h, reset, conv_weight.contiguous(), conv_bias.contiguous()),
            *(parameter.contiguous() for parameter in gates),
            *(recurrent_param.contiguous(), out, B, R, width),
            TAPS=taps,
            UNSCALED=unscaled_first_token,
            BM=BM,
            BK=BK,
            BN=BN,
            num_stages=3 if x.dtype.itemsize == 2 else 2,
        )
        if taps > 1:
            BS = triton.next_power_of_2(taps - 1)
            _shift_kernel[(triton.cdiv(R, 256), B)](x, conv, reset, R, TAPS=taps, BS=BS, BC=256)
    return out
