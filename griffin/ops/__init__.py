"""The operations on tensors: a contract, a plain-PyTorch definition and, per device, kernels registered on its name.

They know no module, config or state.
"""

from griffin.ops.attention import local_attention, ring_attention
from griffin.ops.conv import causal_conv1d
from griffin.ops.gated import geglu
from griffin.ops.linear import block_diagonal_linear, linear, output_linear
from griffin.ops.norm import rms_norm
from griffin.ops.quantized import dequantize, quantize_int4, quantize_int8, quantized_linear
from griffin.ops.rg_lru import rg_lru
from griffin.ops.rope import rope, rope_table
from griffin.ops.scan import linear_scan

__all__ = [
    "block_diagonal_linear",
    "causal_conv1d",
    "dequantize",
    "geglu",
    "linear",
    "linear_scan",
    "local_attention",
    "output_linear",
    "quantize_int4",
    "quantize_int8",
    "quantized_linear",
    "rg_lru",
    "ring_attention",
    "rms_norm",
    "rope",
    "rope_table",
]
