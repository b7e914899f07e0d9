"""The operations on tensors: each a contract, a plain-PyTorch definition, and one question to `device.kernels`.

They know no module, config or state.
"""

from griffin.ops.attention import local_attention, ring_attention, ring_write_
from griffin.ops.cg_lru import cg_lru
from griffin.ops.conv import causal_conv1d
from griffin.ops.cross_entropy import cross_entropy
from griffin.ops.embedding import embed, quantized_embed
from griffin.ops.gated import geglu
from griffin.ops.linear import block_diagonal_linear, linear, output_linear
from griffin.ops.norm import rms_norm
from griffin.ops.quantized import dequantize, quantize_int4, quantize_int8, quantized_linear
from griffin.ops.recurrent_step import recurrent_step_
from griffin.ops.rg_lru import rg_lru
from griffin.ops.rope import next_positions_, rope, rope_table
from griffin.ops.scan import linear_scan
from griffin.ops.soft_cap import soft_cap

__all__ = [
    "block_diagonal_linear",
    "causal_conv1d",
    "cg_lru",
    "cross_entropy",
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
