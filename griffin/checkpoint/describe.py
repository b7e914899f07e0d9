"""What a model is and what it takes, without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from griffin.checkpoint.hub import load_tokenizer
from griffin.checkpoint.layout import CONFIG
from griffin.checkpoint.read import inspect
from griffin.checksums import verify
from griffin.config import PRESETS, GriffinConfig
from griffin.model import Griffin
from griffin.quantize import quantize
from griffin.state import AttentionState


@dataclass(frozen=True, kw_only=True)
class Description:
    name: str
    config: GriffinConfig
    dtype: torch.dtype  # of the embedding, and so of activations and state, unless loading says otherwise
    num_parameters: int
    num_embedding_parameters: int
    weight_bytes: int
    state_bytes: int  # of one sequence that has read nothing yet
    state_bytes_per_token: int  # what each token adds; 0 unless attention is global
    tokenizer: str


def describe(name: str, dtype: torch.dtype | None = None) -> Description:
    """Describe a model folder, a Hugging Face id or a preset; a folder goes before a preset of the same name.

    Args:
        name: which.
        dtype: to load it with; None: as stored, and fp32 for a preset.

    Raises:
        GriffinError: there is no such folder or it is no model.
    """
    if name in PRESETS and not Path(name).exists():
        config, stored, tokenizer, form = PRESETS[name], torch.float32, "none: a preset has no weights", None
    else:
        contents = inspect(name)
        config, stored, form = contents.model.config, contents.activation_dtype, contents.form
        tokens = load_tokenizer(contents.folder)
        verify(contents.folder, [CONFIG])
        template = "no chat template" if tokens.chat_template is None else "a chat template"
        tokenizer = f"{tokens.vocab_size:,} ids, {template}, stop ids {', '.join(map(str, tokens.stop_ids)) or 'none'}"
    dtype = dtype or stored
    model = Griffin(config, device="meta", dtype=dtype)
    if form is not None:
        quantize(model, form)
    state = model.new_state(1)
    growing = [layer for layer in state.layers if isinstance(layer, AttentionState) and layer.grows]
    return Description(
        name=name,
        config=config,
        dtype=dtype,
        num_parameters=config.num_parameters(),
        num_embedding_parameters=config.vocab_size * config.width,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        state_bytes=state.nbytes,
        state_bytes_per_token=2 * len(growing) * config.num_kv_heads * config.head_width * dtype.itemsize,
        tokenizer=tokenizer,
    )
