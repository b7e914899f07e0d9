"""A model folder read: what it says it holds, checked, then its weights straight into their places."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from griffin import lora
from griffin.checkpoint.config_json import config_from_json
from griffin.checkpoint.hub import resolve
from griffin.checkpoint.layout import CONFIG, EMBEDDING, FINAL_NORM, INDEX, TIED, WEIGHTS, Meta, some
from griffin.checksums import verifying
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.memory import use_large_pages
from griffin.model import Griffin
from griffin.quantize import Quantization, quantized_names, read_quantization
from griffin.quantize import quantize as quantize_model
from griffin.reading import open_tensors, read_json

_SLAB_BYTES = 64 * 2**20  # read and converted at a time
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Contents:
    """What config.json and the weights' headers say, which fit each other. No weight has been read."""

    folder: Path
    model: Griffin  # on the meta device: shapes without memory, quantised as the weights are
    form: Quantization | None  # of the stored weights
    files: Mapping[Path, Mapping[str, Meta]]  # name -> shape and dtype, by file

    @property
    def stored(self) -> dict[str, Meta]:
        return {name: meta for metas in self.files.values() for name, meta in metas.items()}

    @property
    def activation_dtype(self) -> torch.dtype:
        """The embedding's, or the final norm's where the embedding is quantised."""
        return self.stored[EMBEDDING if self.form is None else FINAL_NORM][1]


def load(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | Quantization | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Griffin:
    """Load a model folder, in eval mode.

    Each tensor is read straight into its place, a slab at a time: the peak of memory is the model and one slab.

    Args:
        path_or_hub_id: a folder, or a Hugging Face id such as "google/recurrentgemma-2b-it".
        device: where the weights go.
        dtype: of the weights and activations; None keeps every tensor's own, and the embedding's for activations (the
            final norm's, where the folder holds a quantised embedding).
        quantize: "int8", "int4" or a Quantization: each weight is quantised while it is read, so that the peak of
            memory is the quantised model's; adapters alone can be trained over it. None: as stored.
        adapter: a folder with a LoRA adapter, PEFT's or ours, for this model: merged into its weights, or standing
            beside those that are quantised.
        progress: called with (bytes read, bytes in all).

    Raises:
        GriffinError: the folder is not there or not a model, the adapter is none or another model's, or a file is
            missing, damaged or does not fit the config.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise GriffinError(f"dtype={dtype} is not one of {', '.join(str(known) for known in _FLOATS)}")
    contents = inspect(path_or_hub_id)
    if contents.form is not None and quantize is not None:
        raise GriffinError(f"{contents.folder} is {contents.form.name} already; quantise the original")
    form = Quantization.named(quantize) if isinstance(quantize, str) else quantize
    names = [CONFIG, INDEX, *(file.name for file in contents.files)]
    read = (
        None if adapter is None else lora.read_adapter(adapter)
    )  # what is wrong with it is said before hours of reading
    with verifying(contents.folder, names):
        model = _read(contents, device, dtype, form, progress)
    if read is not None:
        lora.attach(model, read)
        lora.merge(model, keep_quantized=True)
    return model.requires_grad_(form is None and contents.form is None) if read is not None else model


def inspect(path_or_hub_id: str | Path) -> Contents:
    """Read what a model folder says it holds: enough to refuse, before any weight is read, what `load` would refuse.

    Raises:
        GriffinError: as `load`, but for damage within the weights.
    """
    folder = resolve(path_or_hub_id)
    file = folder / CONFIG
    data = read_json(file)
    config, form = config_from_json(data, str(file)), read_quantization(data, str(file))
    files = {file: _describe(file, names) for file, names in weight_files(folder).items()}
    shapes = {name: shape for metas in files.values() for name, (shape, _) in metas.items()}
    _check_depth(folder, config, shapes)
    model = Griffin(config, device="meta")
    if form is not None:
        quantize_model(model, form)
    parameters = dict(model.named_parameters())
    tied = shapes.pop(TIED, None)
    _check_names(folder, {name: parameter.shape for name, parameter in parameters.items()}, shapes)
    _check_kinds({name: (file, kind) for file, metas in files.items() for name, (_, kind) in metas.items()}, parameters)
    if tied is not None and tied != shapes.get(EMBEDDING):
        raise GriffinError(f"{folder}: {TIED} is {tuple(tied)}, which the embedding is not")
    return Contents(folder, model, form, files)


def _read(
    contents: Contents,
    device: torch.device | str,
    dtype: torch.dtype | None,
    form: Quantization | None,
    progress: Callable[[int, int], None] | None,
) -> Griffin:
    """Read the weights into the model, quantised to `form` on the way."""
    model, files, stored = contents.model, contents.files, contents.stored
    on_the_way = quantized_names(model) if form is not None else {}
    if form is not None:
        quantize_model(model, form)
    total = sum(shape.numel() * kind.itemsize for shape, kind in stored.values())
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind) in stored.items():
        if name in on_the_way and form is not None:
            tensors[f"{name}_q"], tensors[f"{name}_scale"] = form.empty(shape, device)
        elif name != TIED:
            own = _original(name) != name  # a format's numbers and scales are of its own dtypes
            tensors[name] = torch.empty(shape, dtype=kind if own else dtype or kind, device=device)
    use_large_pages(tensors.values())
    done = 0
    for file, metas in files.items():
        for name, rows, slab in _slabs(file, {name: meta for name, meta in metas.items() if name != TIED}):
            if name in on_the_way and form is not None:
                slab_as_loaded = slab.to(dtype or slab.dtype)
                try:
                    form.fill(tensors[f"{name}_q"], tensors[f"{name}_scale"], slab_as_loaded, rows.start)
                except ValueError as error:
                    raise GriffinError(f"{file}: {name}: {error}") from error
            else:
                tensors[name][rows] = slab.to(tensors[name].dtype)
            done += slab.nbytes
            if progress is not None:
                progress(done, total)
    for file, metas in files.items():
        if TIED in metas:
            _check_tied(file, metas[TIED], stored[EMBEDDING], next(f for f, m in files.items() if EMBEDDING in m))
    for name, parameter in dict(model.named_parameters()).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensors.pop(name), parameter.requires_grad))
    kind = dtype or contents.activation_dtype
    if model.activation_dtype != kind:  # else it stays None, and follows the parameters
        model.activation_dtype = kind
    return model.eval()


def read_config(folder: Path) -> GriffinConfig:
    """Read config.json of a model folder."""
    return config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """Give the tensor names in each weight file of a folder, checked against the index where there is one.

    Raises:
        GriffinError: no weights, a file of the index is missing or damaged, or the index and a file disagree.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists():
        return {single: _names(single)}
    if not index.exists():
        others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"; {others[0]} is not read, use safetensors (griffin convert reads Google's .pt)" if others else ""
        raise GriffinError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GriffinError(f"{index} has no weight_map; use another copy")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise GriffinError(f"{index} names {file!r} for {name}; a file of the same folder is needed")
        files.setdefault(folder / file, []).append(name)
    for path, names in files.items():
        held = _names(path)
        if set(held) != set(names):
            odd = sorted(set(held) ^ set(names))
            raise GriffinError(f"{path} and {index.name} disagree about {some(odd)}; use another copy")
    return files


def _names(file: Path) -> list[str]:
    with open_tensors(file) as handle:
        return list(handle.keys())


def _describe(file: Path, names: list[str]) -> dict[str, Meta]:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    kinds |= {"I8": torch.int8, "U8": torch.uint8}  # of quantised weights; _check_kinds sees where they stand
    metas: dict[str, Meta] = {}
    with open_tensors(file) as handle:
        for name in names:
            view = handle.get_slice(name)
            if view.get_dtype() not in kinds:
                raise GriffinError(f"{file}: {name} is {view.get_dtype()}; weights must be one of F32, BF16, F16")
            metas[name] = torch.Size(view.get_shape()), kinds[view.get_dtype()]
    return metas


def _slabs(file: Path, metas: Mapping[str, Meta]) -> Iterator[tuple[str, slice, Tensor]]:
    """Yield (name, rows, tensor) of at most _SLAB_BYTES each.

    The file is mapped anew after every few slabs: pages that were read count as this process's memory while mapped.
    """
    handle, mapped = open_tensors(file), 0
    for name, (shape, kind) in metas.items():
        row_bytes = max(1, shape[1:].numel() * kind.itemsize)
        step = max(1, _SLAB_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            yield name, rows, handle.get_slice(name)[rows]
            mapped += (rows.stop - rows.start) * row_bytes
            if mapped >= 2 * _SLAB_BYTES:
                handle, mapped = open_tensors(file), 0


def _check_depth(folder: Path, config: GriffinConfig, names: Mapping[str, object]) -> None:
    """Before a model is made, which takes a millisecond a layer."""
    last = f"model.layers.{config.num_layers - 1}."
    if not any(name.startswith(last) for name in names):
        raise GriffinError(
            f"{folder} lacks {last[:-1]}, the last of {config.num_layers}; config.json is of another model"
        )


def _check_names(folder: Path, expected: Mapping[str, torch.Size], stored: Mapping[str, torch.Size]) -> None:
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unknown:
        lacks = f" lacks {some(missing)}" if missing else ""
        extra = f" has {some(unknown)}, which the model does not" if unknown else ""
        raise GriffinError(
            f"{folder}{lacks}{' and' if missing and unknown else ''}{extra}; config.json is of another model"
        )
    for name, shape in expected.items():
        if stored[name] != shape:
            raise GriffinError(f"{folder}: {name} is {tuple(stored[name])}, but config.json says {tuple(shape)}")


def _check_kinds(kinds: Mapping[str, tuple[Path, torch.dtype]], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    for name, (file, kind) in kinds.items():
        own = name in parameters and _original(name) != name
        if kind != parameters[name].dtype if own else kind not in _FLOATS:
            needed = str(parameters[name].dtype) if own else "one of F32, BF16, F16"
            raise GriffinError(f"{file}: {name} is {kind}; it must be {needed}".replace("torch.", ""))


def _original(name: str) -> str:
    """X.weight for X.weight_q and X.weight_scale; any other name as it is."""
    return re.sub(r"\.weight_(q|scale)$", ".weight", name)


def _check_tied(file: Path, meta: Meta, embedding: Meta, embedding_file: Path) -> None:
    """lm_head.weight is read only to see that it is the embedding."""
    same = meta == embedding and all(
        torch.equal(head, row)
        for (_, _, head), (_, _, row) in zip(
            _slabs(file, {TIED: meta}), _slabs(embedding_file, {EMBEDDING: embedding}), strict=True
        )
    )
    if not same:
        raise GriffinError(f"{file}: lm_head.weight differs from the embedding; untied models are not supported")
