"""The names of a model folder's files and of the tensors that are asked for by name."""

from __future__ import annotations

import torch

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.final_norm.weight"
TIED = "lm_head.weight"  # some released folders hold the embedding twice
Meta = tuple[torch.Size, torch.dtype]


def some(names: list[str]) -> str:
    """Name the first few, and say how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
