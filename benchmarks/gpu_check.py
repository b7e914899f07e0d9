"""Every op on a device, forward and gradients, against its definition in fp64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu_timing import Part
from griffin.loss import cross_entropy
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

# Largest difference over the reference's largest value: a few roundings of the results' dtype, and fp32 sums.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[..., tuple[Tensor, ...]]  # of tensors in any floating dtype
    inputs: list[Tensor]  # fp64 on a CPU
    differentiable: bool = True


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    for B, T, R in (
        [(2, 70, 33)] if small else [(2, 1, 256), (3, 63, 33), (2, 257, 256), (1, 5000, 96), (8, 2048, 2560)]
    ):
        reset = torch.zeros(B, T, dtype=torch.bool)
        reset[:, 0], reset[0, T // 2], reset[-1, -1] = True, True, True
        reset = reset.to(device)
        for where, mask in (("", None), (" with resets", reset)):
            shape = f"{B}x{T}x{R}{where}"
            yield Case(
                f"rg_lru {shape}",
                lambda x, i, r, p, h, mask=mask: rg_lru(x, i, r, p.to(h.dtype), h, mask),
                [draw(B, T, R), draw(B, T, R), draw(B, T, R), draw(R) - 4, draw(B, R)],
            )
            yield Case(
                f"causal_conv1d {shape}",
                lambda x, w, b, s, mask=mask: causal_conv1d(x, w, b, s, mask),
                [draw(B, T, R), draw(R, 4), draw(R), draw(B, 3, R)],
            )
        yield Case(
            f"linear_scan {B}x{T}x{R}",
            lambda x, a, h: linear_scan(x, a.sigmoid(), h),
            [draw(B, T, R), draw(B, T, R), draw(B, R)],
        )
        yield Case(f"geglu {B}x{T}x{R}", lambda a, b: (geglu(a, b),), [draw(B, T, R), draw(B, T, R)])
        yield Case(f"rms_norm {B}x{T}x{R}", lambda x, w: (rms_norm(x, w, 1e-6),), [draw(B, T, R), draw(R)])
    for B, T, S, H, K, W in (
        [(2, 20, 9, 2, 16, 9)] if small else [(2, 300, 129, 10, 256, 128), (1, 4096, 0, 10, 256, 2048)]
    ):
        positions = torch.arange(T).repeat(B, 1) + torch.tensor([[5], [S]])[:B]
        positions[0, T // 2 :] -= int(positions[0, T // 2])
        where = positions.to(device)
        yield Case(
            f"local_attention {B}x{T} after {S}, window {W}",
            lambda q, k, v, where=where, W=W: (local_attention(q, k, v, where, W),),
            [draw(B, T, H, K), draw(B, S + T, 1, K), draw(B, S + T, 1, K)],
        )
        last = torch.tensor([[W // 2], [5 * W]])[:B].to(device)
        yield Case(
            f"ring_attention {B} rows, {W + 1} slots",
            lambda q, k, v, last=last: (ring_attention(q, k, v, last),),
            [draw(B, 1, H, K), draw(B, W + 1, 1, K), draw(B, W + 1, 1, K)],
            differentiable=False,
        )
    for rows, O, K in [(3, 33, 100)] if small else [(1, 15360, 2560), (16, 2560, 7680), (64, 1000, 2560)]:
        weight = torch.randn(O, K)
        for form, (q, scale), group in (
            ("int8", quantize_int8(weight), None),
            ("int4", quantize_int4(weight, 128), 128),
        ):
            q_, scale_ = q.to(device), scale.to(device)
            yield Case(
                f"{form} linear {rows}x{K}x{O}",
                lambda x, b, q=q, scale=scale, q_=q_, scale_=scale_, group=group: (
                    quantized_linear(x, *((q, scale) if x.dtype == torch.float64 else (q_, scale_)), b, group),
                ),
                [draw(rows, K), draw(O)],
                differentiable=False,
            )
    n, V, D = (9, 300, 16) if small else (4096, 256_000, 256)
    targets = torch.randint(-1, V, (1, n)).to(device)
    yield Case(
        f"cross entropy {n}x{V}",
        lambda h, e: (cross_entropy(h, e, targets.to(h.device), soft_cap=30.0)[0],),
        [draw(1, n, D), draw(V, D) * D**-0.5],
    )


def difference(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference of any result or gradient, over the largest value of that result in the reference."""
    narrow = [tensor.to(dtype) for tensor in case.inputs]
    results = []
    for tensors, place in (([t.double() for t in narrow], None), (narrow, device)):
        given = []
        for index, tensor in enumerate(tensors):
            wide = case.name.startswith(("rg_lru", "linear_scan")) and index == len(tensors) - 1  # h0 is fp32
            tensor = tensor.float() if wide and tensor.dtype != torch.float64 else tensor
            given.append(tensor.to(device if place is None else place).requires_grad_(case.differentiable))
        with torch.set_grad_enabled(case.differentiable):
            out = case.call(*given)
        found = [t.detach().double() for t in out]
        if case.differentiable:
            generator = torch.Generator().manual_seed(1)
            cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in out]
            found += [t.double() for t in torch.autograd.grad(out, given, cotangents)]
        results.append(found)
    return max(
        float((a.to(b.device) - b).abs().max() / b.abs().max().clamp(min=1e-30)) for b, a in zip(*results, strict=True)
    )


def measure(device: torch.device, *, small: bool) -> Part:
    torch.manual_seed(0)
    rows, found, correct = [], [], True
    for case in cases(device, small):
        for dtype in (torch.float32, torch.bfloat16):
            value = difference(case, dtype, device)
            good = value <= TOLERANCE[dtype]  # False for NaN
            correct &= good
            found.append({"case": case.name, "dtype": str(dtype), "difference": value, "correct": good})
            rows.append([case.name, str(dtype).removeprefix("torch."), f"{value:.1e}", "" if good else "WRONG"])
    return found, timing.table(["op", "dtype", "largest difference over largest value", ""], rows), correct
