"""Calls of the kernels that run over time. Contracts are those of the ops of the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops.chunk import CHUNK
from griffin.ops.cpu.library import Kernel, empty_like, fp32

_SPAN = 64  # tokens of one task of the convolution, as in csrc/causal_conv1d.cpp

_linear_scan_forward = Kernel("linear_scan_forward", "TTF TF iii i")
_linear_scan_backward = Kernel("linear_scan_backward", "TF TTF F TTF iii i")
_rg_lru_forward = Kernel("rg_lru_forward", "TTT F F B? L? TFF? iii ii")
_rg_lru_backward = Kernel("rg_lru_backward", "TF TTT F F B? TTT FFF iii fii")
_causal_conv1d_forward = Kernel("causal_conv1d_forward", "T FF TB? L? TT iiii")
_causal_conv1d_backward = Kernel("causal_conv1d_backward", "TT T F TB? T F FFT iiii")


def linear_scan(x: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    y, h_last = empty_like(x), empty_like(h0)
    _linear_scan_forward(
        x.dtype, x.contiguous(), a.contiguous(), h0.contiguous(), y, h_last, *x.shape, torch.get_num_threads()
    )
    return y, h_last


def linear_scan_backward(
    dy: Tensor, dh_last: Tensor, x: Tensor, a: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, dh0 = empty_like(x), empty_like(a), empty_like(h0)
    inputs = (dy.contiguous(), dh_last.contiguous(), x.contiguous(), a.contiguous(), h0.contiguous())
    _linear_scan_backward(
        x.dtype, *inputs, _chunk_states(h0, x.shape[1]), dx, da, dh0, *x.shape, torch.get_num_threads()
    )
    return dx, da, dh0


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, R = x.shape
    y, h_last, chunk_states = empty_like(x), empty_like(h0), _chunk_states(h0, T)
    inputs = (x.contiguous(), input_gate.contiguous(), recurrent_gate.contiguous(), fp32(recurrent_param))
    outputs = (y, h_last, chunk_states)
    _rg_lru_forward(
        x.dtype,
        *inputs,
        h0.contiguous(),
        _bytes(reset),
        None,
        *outputs,
        B,
        T,
        R,
        unscaled_first_token,
        torch.get_num_threads(),
    )
    return outputs


def packed_rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    offsets: Tensor,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor]:
    (B, R), T = h0.shape, x.shape[1]
    y, h_last = empty_like(x), empty_like(h0)
    inputs = (x.contiguous(), input_gate.contiguous(), recurrent_gate.contiguous(), fp32(recurrent_param))
    _rg_lru_forward(
        x.dtype,
        *(*inputs, h0.contiguous(), _bytes(reset), offsets.contiguous()),
        *(y, h_last, None),
        *(B, T, R, unscaled_first_token, torch.get_num_threads()),
    )
    return y, h_last


def rg_lru_backward(
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
    p = fp32(recurrent_param)
    dx, d_input_gate, d_recurrent_gate, dp, dh0 = (
        empty_like(x),
        empty_like(x),
        empty_like(x),
        empty_like(p),
        empty_like(dh_last),
    )
    _rg_lru_backward(
        x.dtype,
        *(dy.contiguous(), dh_last.contiguous()),
        *(x.contiguous(), input_gate.contiguous(), recurrent_gate.contiguous(), p),
        *(chunk_states.contiguous(), _bytes(reset)),
        *(dx, d_input_gate, d_recurrent_gate),
        *(empty_like(dh_last), dp, dh0),  # the first is scratch: each row's share of dp
        *x.shape,
        max_sqrt_gradient,
        unscaled_first_token,
        torch.get_num_threads(),
    )
    return dx, d_input_gate, d_recurrent_gate, dp.to(recurrent_param.dtype), dh0


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, last = empty_like(x), empty_like(state)
    inputs = (x.contiguous(), fp32(weight), fp32(bias), state.contiguous(), _bytes(reset))
    _causal_conv1d_forward(x.dtype, *inputs, None, y, last, *x.shape, weight.shape[1])
    return y, last


def packed_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    y, last = empty_like(x), empty_like(state)
    inputs = (x.contiguous(), fp32(weight), fp32(bias), state.contiguous(), _bytes(reset), offsets.contiguous())
    _causal_conv1d_forward(x.dtype, *inputs, y, last, len(state), *x.shape[1:], weight.shape[1])
    return y, last


def causal_conv1d_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, T, R), w = x.shape, fp32(weight)
    dx, dstate, dweight, dbias = empty_like(x), empty_like(state), empty_like(w), w.new_empty(R)
    shares = w.new_empty(B, (T + _SPAN - 1) // _SPAN, w.shape[1] + 1, R)  # scratch: each task's dweight and dbias
    inputs = (dy.contiguous(), dlast.contiguous(), x.contiguous(), w, state.contiguous(), _bytes(reset))
    _causal_conv1d_backward(x.dtype, *inputs, dx, shares, dweight, dbias, dstate, B, T, R, w.shape[1])
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), dstate


def _chunk_states(h0: Tensor, T: int) -> Tensor:
    B, R = h0.shape
    return h0.new_empty(B, (T + CHUNK - 1) // CHUNK, R)


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous()
