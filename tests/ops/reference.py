"""The operations written as their formulas, token by token, in whatever dtype they are given: tests use fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan(x: Tensor, a: Tensor, h0: Tensor) -> Tensor:
    h, states = h0, []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


class BoundedSqrt(torch.autograd.Function):
    """sqrt whose derivative 1 / (2 sqrt(v)) is at most `bound`."""

    @staticmethod
    def forward(ctx, v: Tensor, bound: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(v)
        ctx.bound = bound
        return v.sqrt()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (v,) = ctx.saved_tensors
        return grad * torch.clamp(0.5 / v.sqrt(), max=ctx.bound), None


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    p: Tensor,
    h0: Tensor,
    reset: Tensor,
    bound: float = 1000.0,
    unscaled: bool = True,
) -> Tensor:
    h, states = h0, []
    for t in range(x.shape[1]):
        r = torch.sigmoid(recurrent_gate[:, t])
        i = torch.sigmoid(input_gate[:, t])
        a = torch.exp(-8 * r * torch.log1p(torch.exp(p)))
        scale = BoundedSqrt.apply(1 - a**2, bound)
        first = reset[:, t, None]
        if unscaled:
            scale = torch.where(first, torch.ones_like(scale), scale)
        h = torch.where(first, torch.zeros_like(a), a) * h + scale * i * x[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """The state is given in full; what lies behind a reset is left out, and comes back as zero."""
    B, T, _ = x.shape
    N = weight.shape[1]
    rows, states = [], []
    for b in range(B):
        past = list(state[b])
        outputs = []
        for t in range(T):
            if reset[b, t]:
                past = [torch.zeros_like(entry) for entry in past]
            past.append(x[b, t])
            taps = past[-N:]
            outputs.append(bias + sum(weight[:, k] * taps[k] for k in range(N)))
        rows.append(torch.stack(outputs))
        states.append(torch.stack(past[len(past) - (N - 1) :]) if N > 1 else state[b])
    return torch.stack(rows), torch.stack(states)


def local_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    B, T, H, K = q.shape
    earlier, group = k.shape[1] - T, H // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            seen = int(positions[b, t]) if window is None else min(int(positions[b, t]), window)
            first = max(0, earlier + t - seen)
            for h in range(H):
                keys, values = k[b, first : earlier + t + 1, h // group], v[b, first : earlier + t + 1, h // group]
                out[b, t, h] = torch.softmax(keys @ q[b, t, h] * K**-0.5, dim=0) @ values
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + eps) * (1 + weight)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y, n = x.clone(), cos.shape[-1]
    for i in range(n):
        c, s = cos[:, :, None, i], sin[:, :, None, i]
        y[..., i] = x[..., i] * c - x[..., i + n] * s
        y[..., i + n] = x[..., i + n] * c + x[..., i] * s
    return y
