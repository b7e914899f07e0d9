"""Which kernel serves which op, and why: what `griffin info` shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import griffin.ops  # registers the ops  # noqa: F401

# What computes an op where no kernel of ours is registered for the device.
DEFINITIONS = {
    "linear_scan": "PyTorch, a loop over chunks of time",
    "rg_lru": "PyTorch, a loop over chunks of time",
    "causal_conv1d": "PyTorch, one product per tap",
    "local_attention": "PyTorch scaled_dot_product_attention, in blocks of queries",
    "ring_attention": "PyTorch scaled_dot_product_attention",
}
COMPOSED = {
    "block_diagonal_linear": "PyTorch matmul",
    "output_linear": "PyTorch matmul",
    "rope": "PyTorch, elementwise",
}


@dataclass(frozen=True, slots=True)
class Serving:
    op: str
    kernel: str
    reason: str


def serving(device: str) -> list[Serving]:
    """List the kernel of every op on a device, as PyTorch's dispatcher has them.

    Args:
        device: as PyTorch names it: "cpu", "cuda", "cuda:1".
    """
    kind = device.partition(":")[0].upper()
    rows = []
    for op, definition in DEFINITIONS.items():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"griffin::{op}", kind):
            rows.append(Serving(op, f"ours for {kind}", f"registered with the dispatcher as griffin::{op}"))
        else:
            rows.append(Serving(op, definition, f"no kernel of ours for {kind}: the definition runs"))
    return rows + [Serving(op, kernel, "made of PyTorch's own operations") for op, kernel in COMPOSED.items()]
