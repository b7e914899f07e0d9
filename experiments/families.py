"""The architectures that are compared: one width, one depth, one vocabulary, three ways to mix over time."""

from __future__ import annotations

from dataclasses import replace

from griffin.config import BlockType, GriffinConfig

FAMILIES = ("griffin", "hawk", "transformer")
NAMES = {"griffin": "Griffin", "hawk": "Hawk", "transformer": "Transformer (MQA)"}


def paper_config(
    family: str,
    *,
    pattern: tuple[BlockType, ...],
    vocab_size: int,
    width: int,
    lru_width: int,
    num_heads: int,
    num_gate_blocks: int,
    window: int,
    **changes: object,
) -> GriffinConfig:
    """The paper's block at one size: M = 3, no embedding scale, no soft cap, the paper's initialisation.

    Args:
        family: "griffin" (pattern as given), "hawk" or "transformer", as deep.
        changes: of other fields.
    """
    depth = len(pattern)
    kinds: dict[str, tuple[BlockType, ...]] = {
        "griffin": pattern,
        "hawk": depth * ("recurrent",),
        "transformer": depth * ("attention",),
    }
    return GriffinConfig(
        **{  # type: ignore[arg-type]
            "vocab_size": vocab_size,
            "width": width,
            "mlp_width": 3 * width,
            "lru_width": lru_width,
            "num_heads": num_heads,
            "num_gate_blocks": num_gate_blocks,
            "block_types": kinds[family],
            "window": None if family == "transformer" else window,
            "embedding_scale": "none",
            "logits_soft_cap": None,
            "init": "paper",
            **changes,
        }
    )


def matched(config: GriffinConfig, parameters: int) -> GriffinConfig:
    """The same architecture with its MLP widened so that it has as many parameters, to within half a channel."""
    per_channel = replace(config, mlp_width=config.mlp_width + 1).num_parameters() - config.num_parameters()
    more = round((parameters - config.num_parameters()) / per_channel)
    return replace(config, mlp_width=config.mlp_width + more)
