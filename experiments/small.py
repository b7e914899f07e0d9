"""Size S: what a CPU decodes and trains at a speed worth timing, wide enough that the cache is not all of it."""

from __future__ import annotations

from experiments.families import paper_config
from griffin.config import GriffinConfig, griffin_pattern

WINDOW = 512


def size_s(family: str, *, smoke: bool = False) -> GriffinConfig:
    """Six layers, 256 wide, recurrences 352 wide, four heads of 64, bytes; about 5M parameters."""
    return paper_config(
        family,
        pattern=griffin_pattern(6),
        vocab_size=256,
        width=64 if smoke else 256,
        lru_width=96 if smoke else 352,
        num_heads=4,
        num_gate_blocks=16,
        window=32 if smoke else WINDOW,
    )
