"""Google's parameter names beside ours: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin.config import BlockType, GriffinConfig


@dataclass(frozen=True)
class Entry:
    """One of Google's parameters: its axes, our parameters made of it, and how, both ways."""

    google: str
    axes: str  # of Google's tensor, in the letters of `sizes`
    ours: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)
    join: Callable[..., Tensor] = lambda tensor: tensor


EMBEDDING = Entry("embedder.input_embedding", "V D", ("model.embed_tokens.weight",))
FINAL_NORM = Entry("final_norm.scale", "D", ("model.final_norm.weight",))
EVERY_LAYER = (
    Entry("temporal_pre_norm.scale", "D", ("temporal_pre_norm.weight",)),
    Entry("channel_pre_norm.scale", "D", ("channel_pre_norm.weight",)),
    Entry(
        "mlp_block.ffw_up.w",
        "2 D E",
        ("mlp_block.gate_proj.weight", "mlp_block.up_proj.weight"),
        split=lambda w: (w[0].T, w[1].T),
        join=lambda gate, up: torch.stack((gate.T, up.T)),
    ),
    Entry(
        "mlp_block.ffw_up.b",
        "2 1 1 E",
        ("mlp_block.gate_proj.bias", "mlp_block.up_proj.bias"),
        split=lambda b: (b[0, 0, 0], b[1, 0, 0]),
        join=lambda gate, up: torch.stack((gate, up))[:, None, None],
    ),
    Entry("mlp_block.ffw_down.weight", "D E", ("mlp_block.down_proj.weight",)),
    Entry("mlp_block.ffw_down.bias", "D", ("mlp_block.down_proj.bias",)),
)
LAYER: dict[BlockType, tuple[Entry, ...]] = {
    "recurrent": (
        Entry("recurrent_block.linear_x.weight", "R D", ("temporal_block.linear_x.weight",)),
        Entry("recurrent_block.linear_x.bias", "R", ("temporal_block.linear_x.bias",)),
        Entry("recurrent_block.linear_y.weight", "R D", ("temporal_block.linear_y.weight",)),
        Entry("recurrent_block.linear_y.bias", "R", ("temporal_block.linear_y.bias",)),
        Entry("recurrent_block.linear_out.weight", "D R", ("temporal_block.linear_out.weight",)),
        Entry("recurrent_block.linear_out.bias", "D", ("temporal_block.linear_out.bias",)),
        Entry(
            "recurrent_block.conv_1d.w",
            "4 R",
            ("temporal_block.conv_1d.weight",),
            split=lambda w: (w.T[:, None],),
            join=lambda w: w[:, 0].T,
        ),
        Entry("recurrent_block.conv_1d.b", "R", ("temporal_block.conv_1d.bias",)),
        Entry("recurrent_block.rg_lru.a_param", "R", ("temporal_block.rg_lru.recurrent_param",)),
        Entry("recurrent_block.rg_lru.a_gate.w", "G P P", ("temporal_block.rg_lru.recurrent_gate_weight",)),
        Entry("recurrent_block.rg_lru.a_gate.b", "G P", ("temporal_block.rg_lru.recurrent_gate_bias",)),
        Entry("recurrent_block.rg_lru.input_gate.w", "G P P", ("temporal_block.rg_lru.input_gate_weight",)),
        Entry("recurrent_block.rg_lru.input_gate.b", "G P", ("temporal_block.rg_lru.input_gate_bias",)),
    ),
    "attention": (
        Entry("attention_block.proj_q.weight", "D D", ("temporal_block.q_proj.weight",)),
        Entry("attention_block.proj_k.weight", "K D", ("temporal_block.k_proj.weight",)),
        Entry("attention_block.proj_v.weight", "K D", ("temporal_block.v_proj.weight",)),
        Entry("attention_block.proj_final.weight", "D D", ("temporal_block.o_proj.weight",)),
        Entry("attention_block.proj_final.bias", "D", ("temporal_block.o_proj.bias",)),
    ),
}


def entries(block_types: tuple[BlockType, ...]) -> list[Entry]:
    """Write the table out for a model with these layers, whole names on both sides."""
    table = [EMBEDDING, FINAL_NORM]
    for index, kind in enumerate(block_types):
        for entry in EVERY_LAYER + LAYER[kind]:
            ours = tuple(f"model.layers.{index}.{name}" for name in entry.ours)
            table.append(replace(entry, google=f"blocks.{index}.{entry.google}", ours=ours))
    return table


def sizes(config: GriffinConfig) -> dict[str, int]:
    """Give every letter of `Entry.axes` its number; P is the width of a gate's block."""
    return {
        "V": config.vocab_size,
        "D": config.width,
        "E": config.mlp_width,
        "R": config.lru_width,
        "G": config.num_gate_blocks,
        "P": config.lru_width // config.num_gate_blocks,
        "K": config.head_width,
    }


def google_shape(entry: Entry, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in entry.axes.split())
