"""How much arithmetic a token of training is, and how much a device could do: model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch

from griffin.config import GriffinConfig

# Dense bf16 matrix products a second, from the makers' data sheets; the first name found in the device's is taken.
_PEAK = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(config: GriffinConfig, row_tokens: int) -> float:
    """Floating-point operations of one training token, forward and backward.

        6 * (weights of matrices, the output matrix among them) + 12 * K * H * (attention layers) * (mean keys seen)

    A weight is 2 operations forward and 4 backward; so is each pair of a query's and a key's channels, in scores and in
    values. Recomputed activations count for nothing, as usual for MFU; nor do the recurrence, norms and activations.

    Args:
        config: the architecture.
        row_tokens: T, each row taken for one document: token t sees min(t, W) earlier tokens and itself.

    Source: PaLM, arXiv:2204.02311, appendix B.
    """
    D, E, R, T = config.width, config.mlp_width, config.lru_width, row_tokens
    kv_width = config.num_kv_heads * config.head_width
    temporal = {
        "recurrent": 3 * D * R + 2 * R * R // config.num_gate_blocks + config.conv_width * R,
        "attention": 2 * D * D + 2 * D * kv_width,
    }
    weights = config.vocab_size * D + sum(temporal[kind] + 3 * D * E for kind in config.block_types)
    W = T if config.window is None else min(config.window, T)
    keys = (W * (W + 1) / 2 + (T - W) * (W + 1)) / T  # mean over t of min(t, W) + 1; the first sum has W terms
    attention_layers = sum(kind == "attention" for kind in config.block_types)
    return 6 * weights + 12 * D * keys * attention_layers


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second that a device's maker gives for it; None where that is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)
