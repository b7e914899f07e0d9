"""recurrent_step_: one token of the recurrent block between its linears, with the states written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops import device


def recurrent_step_(
    x: Tensor,
    y: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    input_gate_weight: Tensor,
    input_gate_bias: Tensor,
    recurrent_gate_weight: Tensor,
    recurrent_gate_bias: Tensor,
    recurrent_param: Tensor,
    conv: Tensor,
    h: Tensor,
    reset: Tensor,
    *,
    unscaled_first_token: bool = True,
) -> Tensor | None:
    """Compute what `causal_conv1d`, the gates, `rg_lru` and `geglu` give for one token, where one kernel does it all:

        u = conv_bias + sum over s = 0 .. N-1 of conv_weight[:, N-1-s] x_{t-s}
        r = sigmoid(W_a u + b_a),  i = sigmoid(W_x u + b_x),  log a = -8 r softplus(recurrent_param)
        h <- a h + sqrt(1 - a^2) (i u);  at a reset h <- i u if unscaled_first_token, else sqrt(1 - a^2) (i u)
        conv <- the last N-1 of conv and x, zeros for those before a reset
        out = gelu(y) h

    u, the gates before their sigmoids, and h in the last line are rounded to x.dtype, where the separate ops round
    them; all else is in fp32 (fp64 for fp64).

    Args:
        x, y: (B, R) any floating dtype, what linear_x and linear_y give.
        conv_weight: (R, N) any floating dtype, N taps, the last for the current token; conv_bias: (R,).
        input_gate_weight, recurrent_gate_weight: (M, R / M, R / M), input channel first; the biases: (M, R / M). Any
            floating dtype, cast to x.dtype.
        recurrent_param: (R,) any floating dtype.
        conv: (B, N-1, R) in x.dtype, the inputs before this one, oldest first; overwritten.
        h: (B, R) fp32 (fp64 for fp64); overwritten.
        reset: (B,) bool, True where a document starts.
        unscaled_first_token: whether the factor of a reset token is 1.

    Returns:
        (B, R) in x.dtype, the input of linear_out. None: no kernel serves (on a CPU, or where gradients are recorded),
        nothing was written, and the separate ops are to be called.

    Raises:
        ValueError: shapes or dtypes disagree.

    Source: Griffin, arXiv:2402.19427, section 2.
    """
    gates = (input_gate_weight, input_gate_bias, recurrent_gate_weight, recurrent_gate_bias)
    tensors = (x, y, conv_weight, conv_bias, *gates, recurrent_param, conv, h)
    kernels = device.kernels("recurrent_step_", *tensors)
    if kernels is None or not x.shape[0] or not (conv.is_contiguous() and h.is_contiguous()):
        return None
    B, R = x.shape
    M, N = input_gate_bias.shape[0], conv_weight.shape[1]
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    gate = (M, R // M, R // M)
    for name, tensor, shape, dtype in (
        ("y", y, (B, R), x.dtype),
        ("conv", conv, (B, N - 1, R), x.dtype),
        ("h", h, (B, R), state_dtype),
        ("reset", reset, (B,), torch.bool),
        ("conv_weight", conv_weight, (R, N), conv_weight.dtype),
        ("conv_bias", conv_bias, (R,), conv_bias.dtype),
        ("input_gate_weight", input_gate_weight, gate, input_gate_weight.dtype),
        ("input_gate_bias", input_gate_bias, gate[:2], input_gate_bias.dtype),
        ("recurrent_gate_weight", recurrent_gate_weight, gate, recurrent_gate_weight.dtype),
        ("recurrent_gate_bias", recurrent_gate_bias, gate[:2], recurrent_gate_bias.dtype),
        ("recurrent_param", recurrent_param, (R,), recurrent_param.dtype),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; this x needs {shape} {dtype}")
    if R % M:
        raise ValueError(f"x has {R} channels, which {M} gate blocks do not divide")
    return kernels.recurrent_step_(
        *(x, y, conv_weight, conv_bias, gates, recurrent_param, conv, h, reset, unscaled_first_token)
    )
