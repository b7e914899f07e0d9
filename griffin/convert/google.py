"""Google's RecurrentGemma checkpoints, torch and Flax, turned into a model folder.

Every name is mapped exactly once and every expected name must be there: what is missing, left over or of another shape
is an error that lists it, so a model is converted whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from griffin.checkpoint import check_place, write_folder
from griffin.config import MOST_LAYERS, BlockType, EmbeddingScale, GriffinConfig
from griffin.convert.files import flax_to_google, read_flax_checkpoint, read_google, read_torch_checkpoint
from griffin.convert.names import EMBEDDING, LAYER, entries, google_shape, sizes
from griffin.errors import GriffinError
from griffin.quantize import all_finite
from griffin.tokenizer import load_tokenizer

__all__ = [
    "convert",
    "flax_to_google",
    "google_to_griffin",
    "griffin_to_google",
    "read_flax_checkpoint",
    "read_torch_checkpoint",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what a model folder may hold
GEMMA_VOCABULARY = 256_000
MOST_PADDING_ROWS = 512  # embeddings are padded to a multiple of the hardware's liking; more rows are a vocabulary


def google_to_griffin(
    tensors: Mapping[str, Tensor],
    *,
    window: int | None = 2048,
    logits_soft_cap: float | None = 30.0,
    embedding_scale: EmbeddingScale = "bf16",
    vocab_size: int | None = None,
) -> tuple[GriffinConfig, dict[str, Tensor]]:
    """Rename and reshape Google's torch parameters into ours; the architecture is read off names and shapes.

    Args:
        tensors: Google's flat state_dict, each float32, bfloat16 or float16 and kept so. Not written to; the result
            shares memory with it where nothing but the name changes.
        window, logits_soft_cap, embedding_scale: what shapes cannot say; the defaults are those of the released models.
            A cap of None or 0 is none.
        vocab_size: rows of the embedding to keep. None keeps all, but up to 512 rows above 256,000 are the padding of
            Gemma's vocabulary and are dropped.

    Returns:
        The config and the parameters under their Hugging Face names, contiguous.

    Raises:
        GriffinError: a name is missing or unknown, a shape or a dtype does not fit; the message lists them.
    """
    rows, width = _shape(tensors, EMBEDDING.google, 2)
    block_types = _block_types(tensors)
    gate = next((f"blocks.{i}.recurrent_block.rg_lru.a_gate.w" for i in _where(block_types, "recurrent")), None)
    key = next((f"blocks.{i}.attention_block.proj_k.weight" for i in _where(block_types, "attention")), None)
    # [K, D] in torch, where Google's own from_torch_params reads it as Flax's [D, K].
    num_heads = width // max(1, _shape(tensors, key, 2)[0]) if key else None
    num_gate_blocks, lru_width = num_heads, width  # of no consequence where no layer is recurrent
    if gate:
        num_gate_blocks, block_width, _ = _shape(tensors, gate, 3)
        lru_width = num_gate_blocks * block_width
    if num_heads is not None and num_heads != num_gate_blocks:
        raise GriffinError(
            f"{key} makes {num_heads} heads of width {width} and {gate} has {num_gate_blocks} blocks; "
            "Google's models have one number for both: this checkpoint is of another model"
        )
    if vocab_size is None:
        vocab_size = GEMMA_VOCABULARY if 0 <= rows - GEMMA_VOCABULARY <= MOST_PADDING_ROWS else rows
    if vocab_size > rows:
        raise GriffinError(
            f"vocab_size={vocab_size} is more than the embedding's {rows} rows; leave it out to keep all"
        )
    try:
        config = GriffinConfig(
            vocab_size=vocab_size,
            width=width,
            mlp_width=_shape(tensors, "blocks.0.mlp_block.ffw_up.w", 3)[2],
            lru_width=lru_width,
            num_heads=num_heads or num_gate_blocks or 1,
            num_gate_blocks=num_gate_blocks or 1,
            block_types=block_types,
            window=window,
            embedding_scale=embedding_scale,
            logits_soft_cap=logits_soft_cap or None,
        )
    except ValueError as error:
        raise GriffinError(f"the checkpoint's shapes make no model: {error}") from error

    table = entries(block_types)
    axes = sizes(config) | {"V": rows}
    _check_total({entry.google: google_shape(entry, axes) for entry in table}, tensors, "Google's checkpoint")
    ours: dict[str, Tensor] = {}
    for entry in table:
        ours.update(zip(entry.ours, entry.split(tensors[entry.google]), strict=True))
    (embedding,) = EMBEDDING.ours
    ours[embedding] = ours[embedding][:vocab_size]
    return config, {name: _whole(value) for name, value in ours.items()}


def griffin_to_google(config: GriffinConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `google_to_griffin`, exactly: our parameters under Google's torch names and in its shapes.

    Raises:
        GriffinError: Google's code has no such model, or a name or shape does not fit; the message lists them.
    """
    fixed = {"num_kv_heads": 1, "conv_width": 4, "rms_norm_eps": 1e-6, "rope_base": 10_000.0, "rope_fraction": 0.5}
    fixed |= {"unscaled_first_token": True, "complex_recurrence": False}
    if len(set(config.block_types)) == 2:
        fixed["num_gate_blocks"] = config.num_heads
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise GriffinError(f"{name}={getattr(config, name)} cannot be said in Google's format, where it is {value}")
    table = entries(config.block_types)
    axes = sizes(config)
    expected: dict[str, tuple[int, ...]] = {}
    for entry in table:
        parts = entry.split(torch.empty(google_shape(entry, axes), dtype=torch.float32, device="meta"))
        expected.update({name: tuple(part.shape) for name, part in zip(entry.ours, parts, strict=True)})
    _check_total(expected, tensors, "the model")
    google = {entry.google: entry.join(*(tensors[name] for name in entry.ours)) for entry in table}
    return {name: _whole(value) for name, value in google.items()}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    tokenizer: str | Path | None = None,
    window: int | None = 2048,
    logits_soft_cap: float | None = 30.0,
    embedding_scale: EmbeddingScale = "bf16",
    vocab_size: int | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> GriffinConfig:
    """Turn Google's checkpoint, a torch file or a Flax folder, into a model folder, whole or not at all.

    Args:
        tokenizer: what to put beside the weights: a model folder's, a tokenizer.json or a SentencePiece file.
        window, logits_soft_cap, embedding_scale, vocab_size: as for `google_to_griffin`.
        overwrite: replace what `destination` holds.
        report: called with one line before or after each step.

    Raises:
        GriffinError: the source cannot be read, does not fit or holds a number that is not finite; `destination` is in
            use; or the tokenizer has more ids than the model.
    """
    destination = Path(destination)
    check_place(destination, overwrite=overwrite)
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    report(f"Reading {source}")
    room = next(folder for folder in destination.absolute().parents if folder.is_dir())  # on the disk that it is for
    google = read_google(source, scratch=room)
    config, tensors = google_to_griffin(
        google,
        window=window,
        logits_soft_cap=logits_soft_cap,
        embedding_scale=embedding_scale,
        vocab_size=vocab_size,
    )
    if (rows := len(google[EMBEDDING.google])) > config.vocab_size:
        report(f"Dropped {rows - config.vocab_size} rows of the embedding beyond the vocabulary's {config.vocab_size}")
    if bad := [name for name, value in tensors.items() if not all_finite(value)]:
        raise GriffinError(
            f"{source} holds NaN or infinity, as a damaged file does or a run that diverged: {_some(bad)}; "
            "use another copy"
        )
    if words is not None and words.vocab_size > config.vocab_size:
        raise GriffinError(
            f"{tokenizer} has {words.vocab_size} ids and the model {config.vocab_size}; "
            "give the tokenizer that came with this checkpoint"
        )
    report(f"Writing {destination}")
    write_folder(destination, config, tensors, words, overwrite=overwrite)
    report(_summary(config, tensors))
    if words is None:
        report("No tokenizer was given (--tokenizer): commands that read or write text will ask for one")
    return config


def _summary(config: GriffinConfig, tensors: Mapping[str, Tensor]) -> str:
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    kinds = [f"{config.block_types.count(kind)} {kind}" for kind in LAYER if kind in config.block_types]
    return (
        f"Converted {sum(value.numel() for value in tensors.values()):,} parameters in {', '.join(dtypes)}: "
        f"{config.num_layers} layers ({', '.join(kinds)}), width {config.width}, vocabulary {config.vocab_size}; "
        f"taken as given: window {config.window}, soft cap {config.logits_soft_cap}, "
        f"embedding scale {config.embedding_scale}"
    )


def _shape(tensors: Mapping[str, Tensor], name: str, num_axes: int) -> tuple[int, ...]:
    if name not in tensors:
        found = ", ".join(list(tensors)[:3]) or "nothing"
        raise GriffinError(
            f"{name} is missing: this is not a checkpoint of Google's Griffin code; it holds {found} ..."
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != num_axes:
        raise GriffinError(f"{name} is {list(shape)}, expected {num_axes} axes")
    return shape


def _block_types(tensors: Mapping[str, Tensor]) -> tuple[BlockType, ...]:
    kinds: dict[int, set[BlockType]] = {}
    for name in tensors:
        if found := re.match(r"blocks\.(0|[1-9]\d{0,5})\.(?:(recurrent|attention)_block\.)?", name):
            kinds.setdefault(int(found[1]), set()).update([cast(BlockType, found[2])] if found[2] else ())
    if len(kinds) > MOST_LAYERS:
        raise GriffinError(f"the checkpoint has {len(kinds)} blocks, more than {MOST_LAYERS}")
    if missing := sorted(set(range(len(kinds) or 1)) - set(kinds)):
        raise GriffinError(
            f"blocks.{missing[0]} is missing; the checkpoint has blocks {_some(map(str, sorted(kinds)))}"
        )
    block_types: list[BlockType] = []
    for index in range(len(kinds)):
        if len(kinds[index]) != 1:
            raise GriffinError(f"blocks.{index} must have a recurrent_block or an attention_block, and not both")
        block_types.extend(kinds[index])
    return tuple(block_types)


def _where(block_types: tuple[BlockType, ...], kind: BlockType) -> list[int]:
    return [index for index, found in enumerate(block_types) if found == kind]


def _check_total(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], what: str) -> None:
    both = [name for name in expected if name in found]
    wrong = [name for name in both if tuple(found[name].shape) != expected[name]]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [f"{name} {list(found[name].shape)}, expected {list(expected[name])}" for name in wrong],
        "not float32, bfloat16 or float16": [name for name in both if found[name].dtype not in FLOATS],
    }
    if lines := [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]:
        raise GriffinError(f"{what} does not fit the architecture its names and shapes say; {'; '.join(lines)}")


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _whole(tensor: Tensor) -> Tensor:
    """Copy a view: safetensors wants each tensor contiguous and alone in its memory."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
