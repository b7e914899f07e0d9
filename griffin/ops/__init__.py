"""The operations on tensors: a contract, a plain-PyTorch definition and, per device, kernels registered on its name.

They know no module, config or state.
"""

from griffin.ops.attention import local_attention, ring_attention, ring_write_
from griffin.ops.conv import causal_conv1d
from griffin.ops.embedding import embed, quantized_embed
from griffin.ops.gated import geglu
from griffin.ops.linear import block_diagonal_linear, linear, output_linear
from griffin.ops.norm import rms_norm
from griffin.ops.quantized import dequantize, quantize_int4, quantize_int8, quantized_linear
from griffin.ops.recurrent_step import recurrent_step_
from griffin.ops.residual import add, assign_, cast, soft_cap
from griffin.ops.rg_lru import rg_lru
from griffin.ops.rope import next_positions_, rope, rope_table
from griffin.ops.scan import linear_scan

__all__ = [
    "add",
    "assign_",
    "block_diagonal_linear",
    "cast",
    "causal_conv1d",
    "dequantize",
    "embed",
    "geglu",
    "linear",
    "linear_scan",
    "local_attention",
    "next_positions_",
    "output_linear",
    "quantize_int4",
    "quantize_int8",
    "quantized_embed",
    "quantized_linear",
    "recurrent_step_",
    "rg_lru",
    "ring_attention",
    "ring_write_",
    "rms_norm",
    "rope",
    "rope_table",
    "soft_cap",
]
