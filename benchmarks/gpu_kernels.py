"""Kernels over the copy bandwidth: bytes that must move, at the rate that a copy moves them, over the time taken."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu_timing import Part, seconds
from griffin.ops import (
    causal_conv1d,
    geglu,
    linear_scan,
    local_attention,
    quantize_int4,
    quantize_int8,
    quantized_linear,
    rg_lru,
    ring_attention,
    rms_norm,
)

Task = Callable[[], object]


def measure(device: torch.device, *, small: bool) -> Part:
    B, T, R = (2, 128, 64) if small else (8, 2048, 2560)
    dtype = torch.bfloat16
    rounds, warmup = (1, 1) if small else (30, 5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    tensor = 2 * B * T * R  # bytes of one bf16 tensor
    source, copy = draw(8, B, T, R), torch.empty(8, B, T, R, device=device, dtype=dtype)
    tasks: dict[str, tuple[Task, float | None]] = {"copy": (lambda: copy.copy_(source), 16 * tensor)}
    with torch.no_grad():
        tasks |= recurrence(draw, B, T, R, device)
        tasks |= others(draw, B, T, R)
        tasks |= decode(draw, device, small)
    tasks |= peers(draw, B, T, R)
    with torch.no_grad():
        times = seconds({name: task for name, (task, _) in tasks.items()}, device, rounds=rounds, warmup=warmup)
    bandwidth = 16 * tensor / times["copy"]
    rows, found = [], []
    for name, time in times.items():
        size = tasks[name][1]
        share = None if size is None else size / time / bandwidth
        found.append({"kernel": name, "s": time, "bytes": size, "of_copy": share})
        rows.append([name, f"{1e6 * time:.1f}", "" if share is None else f"{share:.2f}"])
    text = f"B={B}, T={T}, R={R}, bf16. A copy moves {bandwidth / 1e9:.0f} GB/s, read and written.\n\n"
    text += timing.table(["kernel", "microseconds", "of the copy bandwidth"], rows)
    return {"shape": [B, T, R], "copy_bytes_per_s": bandwidth, "kernels": found}, text, True


def recurrence(draw: Any, B: int, T: int, R: int, device: torch.device) -> dict[str, tuple[Task, float]]:
    """RG-LRU: 4 tensors forward, 7 backward; the scan alone: 3 and 5."""
    tensor = 2 * B * T * R
    x, i, r, dy = draw(B, T, R), draw(B, T, R), draw(B, T, R), draw(B, T, R)
    a, p = torch.sigmoid(r), torch.randn(R, device=device) - 4
    h0, dh = torch.zeros(B, R, device=device), torch.zeros(B, R, device=device)
    reset = torch.zeros(B, T, dtype=torch.bool, device=device)
    reset[:, 0] = True
    states = torch.ops.griffin.rg_lru(x, i, r, p, h0, reset, 1000.0, True)[2]
    backward = torch.ops.griffin.rg_lru_backward
    # One row, and as long as all of them: what time splits are for.
    x1, i1, r1 = (t.reshape(1, B * T, R) for t in (x, i, r))
    short = [t[:1].contiguous() for t in (x, i, r)]
    return {
        "rg_lru": (lambda: rg_lru(x, i, r, p, h0, reset), 4 * tensor),
        "rg_lru backward": (lambda: backward(dy, dh, x, i, r, p, states, reset, 1000.0, True), 7 * tensor),
        "linear_scan": (lambda: linear_scan(x, a, h0), 3 * tensor),
        "linear_scan backward": (lambda: torch.ops.griffin.linear_scan_backward(dy, dh, x, a, h0), 5 * tensor),
        f"rg_lru, one row of {B * T}": (lambda: rg_lru(x1, i1, r1, p), 4 * tensor),
        f"rg_lru, one row of {T}": (lambda: rg_lru(*short, p), 4 * tensor / B),
    }


def others(draw: Any, B: int, T: int, R: int) -> dict[str, tuple[Task, float]]:
    tensor = 2 * B * T * R
    x, y, dy, weight = draw(B, T, R), draw(B, T, R), draw(B, T, R), draw(R, 4).float()
    bias, scale, state = draw(R).float(), draw(R).float(), draw(B, 3, R)
    conv_backward = torch.ops.griffin.causal_conv1d_backward
    return {
        "causal_conv1d": (lambda: causal_conv1d(x, weight, bias, state), 2 * tensor),
        "causal_conv1d backward": (lambda: conv_backward(dy, state, x, weight, state, None), 3 * tensor),
        "geglu": (lambda: geglu(x, y), 3 * tensor),
        "rms_norm": (lambda: rms_norm(x, scale, 1e-6), 2 * tensor),
    }


def decode(draw: Any, device: torch.device, small: bool) -> dict[str, tuple[Task, float | None]]:
    """What a decoded token of the 2B shape calls, by the weights or the window it reads; attention of a long prompt."""
    O, K, S = (64, 64, 33) if small else (15_360, 2560, 2049)
    x, heads = draw(1, K), 10
    wide = draw(O, K)
    weight = wide.float()
    q8, s8 = quantize_int8(weight)
    q4, s4 = quantize_int4(weight, 128)
    keys, values, query = draw(1, S, 1, 256), draw(1, S, 1, 256), draw(1, 1, heads, 256)
    position = torch.full((1, 1), S - 1, device=device)
    T = 64 if small else 8192
    q, k, v = draw(1, T, heads, 256), draw(1, T, 1, 256), draw(1, T, 1, 256)
    positions = torch.arange(T, device=device)[None]
    return {
        f"bf16 linear 1x{K}x{O}": (lambda: torch.nn.functional.linear(x, wide), wide.nbytes),
        f"int8 linear 1x{K}x{O}": (lambda: quantized_linear(x, q8, s8, None, None), q8.nbytes + s8.nbytes),
        f"int4 linear 1x{K}x{O}": (lambda: quantized_linear(x, q4, s4, None, 128), q4.nbytes + s4.nbytes),
        f"ring_attention, {S} slots": (lambda: ring_attention(query, keys, values, position), 2 * keys.nbytes),
        f"local_attention, {T} tokens, window {S - 1}": (lambda: local_attention(q, k, v, positions, S - 1), None),
    }


def peers(draw: Any, B: int, T: int, R: int) -> dict[str, tuple[Task, float]]:
    """The same recurrence by others, where they are installed: 3 tensors each."""
    tensor, found = 2 * B * T * R, {}
    if find_spec("fla") is None:
        print("fla (flash-linear-attention) is not installed: left out")
    else:
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

        x, g = draw(B, T, R), -torch.rand(B, T, R, device=draw(1).device).to(torch.bfloat16)
        found["fla fused_recurrent_hgrn"] = (lambda: fused_recurrent_hgrn(x, g), 3 * tensor)
        found["fla chunk_hgrn"] = (lambda: chunk_hgrn(x, g), 3 * tensor)
    if find_spec("accelerated_scan") is None:
        print("accelerated-scan is not installed: left out")
    else:
        from accelerated_scan.warp import scan

        gates, tokens = torch.sigmoid(draw(B, R, T)), draw(B, R, T)  # its own layout, without what transposing costs
        found["accelerated-scan warp"] = (lambda: scan(gates, tokens), 3 * tensor)
    return found
