"""Which kernel serves which op, and why: what `griffin info` shows."""

from __future__ import annotations

from dataclasses import dataclass

from griffin.ops.cpu import library
from griffin.ops.triton import serve

# What computes each op where no kernel of ours does.
DEFINITIONS = {
    "linear_scan": "PyTorch, a loop over time",
    "rg_lru": "PyTorch, a loop over time",
    "causal_conv1d": "PyTorch, one product per tap",
    "local_attention": "PyTorch scaled_dot_product_attention, in blocks of queries",
    "ring_attention": "PyTorch scaled_dot_product_attention",
    "rms_norm": "PyTorch, elementwise",
    "geglu": "PyTorch, elementwise",
    "rope": "PyTorch, elementwise",
    "linear": "PyTorch matmul",
    "block_diagonal_linear": "PyTorch matmul",
    "embed": "PyTorch indexing",
    "soft_cap": "PyTorch tanh",
    "output_linear": "PyTorch matmul",
    "quantized_linear": "PyTorch matmul of widened weights",
}
# In ops/cpu/csrc. Of the linears, those with up to 16 rows: PyTorch multiplies more, as fp32 or (int8 weights) int8.
# embed, soft_cap and block_diagonal_linear where no gradient is recorded.
CPU_KERNELS = (
    *("linear_scan", "rg_lru", "causal_conv1d", "local_attention", "ring_attention", "rms_norm", "geglu", "rope"),
    *("linear", "output_linear", "quantized_linear", "block_diagonal_linear", "embed", "soft_cap"),
)
# In ops/triton. ring_attention, and quantized_linear with up to 64 rows, where no gradient is recorded.
TRITON_KERNELS = (
    *("linear_scan", "rg_lru", "causal_conv1d", "ring_attention", "rms_norm", "geglu", "quantized_linear"),
)
FLASH = "PyTorch's flash attention, fp16 and bf16"


@dataclass(frozen=True, slots=True)
class Serving:
    op: str
    kernel: str
    reason: str


def serving(device: str) -> list[Serving]:
    """List what computes every op on a device, for fp32 and bf16 (fp64 always takes the definition).

    Args:
        device: as PyTorch names it: "cpu", "cuda", "cuda:1".
    """
    kind = device.partition(":")[0]
    if kind == "cuda":
        available, reason = serve.status()
        names = dict.fromkeys(TRITON_KERNELS, "ours") | {"local_attention": FLASH}
    elif kind == "cpu":
        available, reason = library.status()
        names = dict.fromkeys(CPU_KERNELS, "ours")
    else:
        available, reason, names = False, f"there are no kernels for {kind}", {}
    rows = []
    for op, definition in DEFINITIONS.items():
        if available and op not in names:
            rows.append(Serving(op, definition, "the definition is what there is for it"))
        else:
            rows.append(Serving(op, names[op] if available else definition, reason))
    return rows
