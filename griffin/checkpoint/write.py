"""A model folder written, whole or not at all, in place of nothing but a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from griffin import lora
from griffin.checkpoint.config_json import config_to_json
from griffin.checkpoint.layout import CONFIG, EMBEDDING, FINAL_NORM, GENERATION, INDEX, WEIGHTS, some
from griffin.checksums import SUMS, write_sums
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.files import save_tensors, whole_folder
from griffin.model import Griffin
from griffin.quantize import Quantization, quantization
from griffin.tokenizer import Tokenizer

_SHARD_BYTES = 4 * 2**30
# All that `save` writes: what may be replaced when a model is.
_OURS = re.compile(
    rf"{CONFIG}|{GENERATION}|{SUMS}|model(-\d{{5}}-of-\d{{5}})?\.safetensors|{INDEX}|tokenizer(_config)?\.json"
)


def save(model: Griffin, path: str | Path, tokenizer: Tokenizer | None = None, *, overwrite: bool = False) -> None:
    """Write a model folder, whole or not at all. `transformers` opens it where it knows the architecture.

    Args:
        model: the model.
        path: the folder; it is made.
        tokenizer: written beside it; None writes none.
        overwrite: replace a model folder that is already there.

    Raises:
        GriffinError: the folder exists and overwrite is False, or holds something that is not a model's; or the model
            has an adapter that is not merged.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps, and names after itself
    if lora.adapted(model):
        raise GriffinError("the model has an adapter: lora.merge it first, or write the adapter alone (griffin.lora)")
    form = quantization(model)
    write_folder(Path(path), model.config, model.state_dict(), tokenizer, overwrite=overwrite, form=form)


def write_folder(
    path: Path,
    config: GriffinConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    *,
    overwrite: bool = False,
    form: Quantization | None = None,
) -> None:
    """Write config, tensors (by their names in the file) and tokenizer as a model folder, whole or not at all."""
    check_place(path, overwrite=overwrite)
    with whole_folder(path) as folder:
        write_files(folder, config, tensors, tokenizer, form)
        write_sums(folder)


def check_place(path: Path, *, overwrite: bool) -> None:
    """Raise GriffinError unless a model folder may be written at `path`: worth asking before hours of work."""
    if not path.exists():
        return
    if Path.cwd().is_relative_to(path.resolve()):
        raise GriffinError(
            f"{path} is the current folder, which cannot be replaced; go elsewhere and name it from there"
        )
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else None
    if names == []:
        return
    if names is None or CONFIG not in names or not {WEIGHTS, INDEX}.intersection(names):
        raise GriffinError(f"{path} exists and is not a model folder; choose another place")
    if not overwrite:
        raise GriffinError(f"{path} already holds a model; choose another place, or say to overwrite it")
    if others := [name for name in names if not _OURS.fullmatch(name) or not (path / name).is_file()]:
        raise GriffinError(
            f"{path} also holds {some(others)}, which replacing the model would delete; "
            "move that away, or choose another place"
        )


def write_files(
    folder: Path,
    config: GriffinConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    form: Quantization | None = None,
) -> None:
    """Write a model's files into a folder that exists (inside `whole_folder`, so that no one sees a part)."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    stored = tensors[EMBEDDING if form is None else FINAL_NORM].dtype
    data = config_to_json(
        config,
        dtype=str(stored).removeprefix("torch."),
        special_ids=special,
        quantization=None if form is None else form.to_json(),
    )
    _write_json(folder / CONFIG, data)
    if tokenizer is not None:
        tokenizer.save(folder)
        stops = {"eos_token_id": list(tokenizer.stop_ids) or None}
        _write_json(folder / GENERATION, special | stops)
    shards = _shards(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_tensors(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
