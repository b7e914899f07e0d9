"""What a model is and what it takes, without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from griffin import checkpoint
from griffin.config import PRESETS, GriffinConfig
from griffin.model import Griffin
from griffin.quantize import quantize, read_quantization
from griffin.state import AttentionState

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them


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
        folder = checkpoint.resolve(name)
        config, stored = checkpoint.read_config(folder), _activation_dtype(folder)
        form = read_quantization(checkpoint.read_json(folder / "config.json"), str(folder))
        tokens = checkpoint.load_tokenizer(folder)
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


def _activation_dtype(folder: Path) -> torch.dtype:
    """The embedding's, or the final norm's where the embedding is quantised."""
    for name in (checkpoint.EMBEDDING, "model.final_norm.weight"):
        for path, names in checkpoint.weight_files(folder).items():
            if name in names:
                with safe_open(path, framework="pt") as file:
                    return DTYPES.get(file.get_slice(name).get_dtype(), torch.float32)
    return torch.float32
