"""Every launch of the recurrences' kernels, for tests.ops.triton.compiled."""

from __future__ import annotations

import torch

from griffin.ops import rg_lru

ALIGNED, ODD, SPLIT = (2, 128, 64), (3, 100, 33), (1, 1024, 64)  # B, T, R; the last in several spans of time


def launch_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        launch_rg_lru(*ALIGNED, dtype, resets=True)
        launch_rg_lru(*ALIGNED, dtype, resets=False)
        launch_rg_lru(*SPLIT, dtype, resets=True)
        launch_linear_scan(*SPLIT, dtype)
        launch_packed_rg_lru(128, 64, dtype)
        launch_packed_rg_lru(1, 1, dtype)
    launch_rg_lru(*ODD, torch.bfloat16, resets=True)
    launch_linear_scan(*ODD, torch.bfloat16)


def launch_rg_lru(B: int, T: int, R: int, dtype: torch.dtype, *, resets: bool) -> None:
    x, p, h0 = torch.zeros(B, T, R, dtype=dtype), torch.zeros(R), torch.zeros(B, R)
    reset = torch.zeros(B, T, dtype=torch.bool) if resets else None
    _, _, chunk_states = torch.ops.griffin.rg_lru(x, x, x, p, h0, reset, 1000.0, True)
    torch.ops.griffin.rg_lru_backward(x, h0, x, x, x, p, chunk_states, reset, 1000.0, True)


def launch_linear_scan(B: int, T: int, R: int, dtype: torch.dtype) -> None:
    x, h0 = torch.zeros(B, T, R, dtype=dtype), torch.zeros(B, R)
    torch.ops.griffin.linear_scan(x, x, h0)
    torch.ops.griffin.linear_scan_backward(x, h0, x, x, h0)


def launch_packed_rg_lru(T: int, R: int, dtype: torch.dtype) -> None:
    x, p, h0 = torch.zeros(1, T, R, dtype=dtype), torch.zeros(R), torch.zeros(3, R)
    with torch.no_grad():
        rg_lru(x, x, x, p, h0, torch.zeros(1, T, dtype=torch.bool), offsets=torch.tensor([0, 1, 1, T]))
