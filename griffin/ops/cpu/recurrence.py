"""Calls of the kernels that run over time. Contracts are those of the ops of the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops.cpu.library import Kernel

CHUNK = 64  # tokens between two kept states, as in griffin/ops/scan.py and csrc/rg_lru.cpp

_rg_lru_forward = Kernel("rg_lru_forward", "ppp p p p ppp iii i")
_rg_lru_backward = Kernel("rg_lru_backward", "pp ppp p p p ppp ppp iii fi")


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
    y, h_last = _like(x), _like(h0)
    chunk_states = h0.new_empty(B, (T + CHUNK - 1) // CHUNK, R)
    inputs = (x.contiguous(), input_gate.contiguous(), recurrent_gate.contiguous(), _fp32(recurrent_param))
    outputs = (y, h_last, chunk_states)
    _rg_lru_forward(x.dtype, *inputs, h0.contiguous(), _bytes(reset), *outputs, B, T, R, unscaled_first_token)
    return outputs


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
    p = _fp32(recurrent_param)
    dx, d_input_gate, d_recurrent_gate, dp, dh0 = _like(x), _like(x), _like(x), _like(p), _like(dh_last)
    _rg_lru_backward(
        x.dtype,
        *(dy.contiguous(), dh_last.contiguous()),
        *(x.contiguous(), input_gate.contiguous(), recurrent_gate.contiguous(), p),
        *(chunk_states.contiguous(), _bytes(reset)),
        *(dx, d_input_gate, d_recurrent_gate),
        *(_like(dh_last), dp, dh0),  # the first is scratch: each row's share of dp
        *x.shape,
        max_sqrt_gradient,
        unscaled_first_token,
    )
    return dx, d_input_gate, d_recurrent_gate, dp.to(recurrent_param.dtype), dh0


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fp32(parameter: Tensor) -> Tensor:
    return parameter.to(torch.float32).contiguous()


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous()
