"""States on disk: one safetensors file, believed only after all of it was checked, its values against the model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from griffin import fingerprint
from griffin.errors import GriffinError
from griffin.files import save_tensors, whole_file
from griffin.reading import MOST_TEXT_BYTES, open_tensors, parse_json
from griffin.state import Model, State, check_origin

FORMAT = "griffin-state-2"
CHAT_TEMPLATE = "chat_template"  # metadata of a state to begin in: what it was trained with
_FIELDS = {"format", "fingerprint", "longest", "sha256"}
_METADATA = "metadata"  # a tensor of bytes, JSON in UTF-8: a long conversation must not make a long header
_MOST_HEADER_BYTES = 2**20  # 80 layers have 20 kB
_MOST_TOKENS = 2**48  # in one document: offsets, and sums of them, are far from the end of int64
_MEND = "give a state saved with State.save or /save, or another copy"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_Kind = tuple[tuple[int, ...], torch.dtype]  # shape, dtype


def save(state: State, path: str | Path, model: Model, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, with the model's fingerprint and a checksum of everything in it.

    Its size is `state.nbytes`, the metadata, and a header of some 100 bytes per tensor.

    Args:
        state: of any number of rows.
        path: the file. A leading ~ is the home folder.
        model: the model that made the state. Its weights are read for the fingerprint, once: about a second per 2 GB.
        metadata: strings to keep with it (a conversation's text, say).

    Raises:
        GriffinError: the state is another model's, or holds NaN, infinity or offsets that cannot be; or the file
            cannot be written.
    """
    check_origin(state, model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors().items()}
    _check_values("the state", tensors, state.longest, state.growing())
    text = json.dumps(dict(metadata or {})).encode()
    if len(text) > MOST_TEXT_BYTES:
        raise GriffinError(f"metadata of {len(text):,} bytes is more than the {MOST_TEXT_BYTES:,} that are read again")
    tensors[_METADATA] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    fields = {"format": FORMAT, "fingerprint": fingerprint.of(model), "longest": str(state.longest)}
    with whole_file(_place(path)) as temporary:
        save_tensors(tensors, temporary, {**fields, "sha256": _digest(fields, tensors)})


def load(path: str | Path, model: Model) -> State:
    """Read a state that `save` wrote for this model, onto the model's device.

    Names, shapes and dtypes are compared with the model's before anything of their size is made; then the checksum,
    the fingerprint of the model's weights, and the values.

    Raises:
        GriffinError: the file is missing, damaged, not a state, or belongs to another model.
    """
    return load_both(path, model)[0]


def load_both(path: str | Path, model: Model) -> tuple[State, dict[str, str]]:
    """Read a state as `load` does, and the strings that were saved with it, in one reading of the file."""
    path = _place(path)
    file, fields, kinds = _open(path)
    new = model.new_state(0)
    longest = _check_kinds(path, fields, kinds, new)
    tensors = _read(path, file, fields, kinds)
    if fields["fingerprint"] != (own := fingerprint.of(model)):
        raise GriffinError(
            f"{path} was saved with another model (fingerprint {fields['fingerprint'][:12]}, this model is "
            f"{own[:12]}); load it with the model it was made by"
        )
    metadata = _metadata(path, tensors.pop(_METADATA))
    _check_values(str(path), tensors, longest, new.growing())
    state = model.new_state(len(tensors["position"]))
    state.longest = longest
    for name in state.growing():
        state.reserve_(tensors[name].shape[1])
    with torch.no_grad():
        for name, tensor in state.tensors().items():
            tensor.copy_(tensors[name])
    return state, metadata


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read the strings that were given to `save`; no model is needed.

    Raises:
        GriffinError: the file is missing, damaged or not a state.
    """
    path = _place(path)
    file, fields, kinds = _open(path)
    return _metadata(path, _read(path, file, fields, kinds)[_METADATA])


def _place(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such home


def _open(path: Path) -> tuple[Any, dict[str, str], dict[str, _Kind]]:
    """Read the header: its fields, and the shape and dtype of each tensor."""
    file = open_tensors(path, mend=_MEND, most_header=_MOST_HEADER_BYTES)
    fields = file.metadata() or {}
    found = fields.get("format")
    if found != FORMAT:
        if found == "griffin-state-1":
            raise GriffinError(
                f"{path} is of an older version ({found}), which did not tell models apart by all of their weights; "
                "read its text again with this version, and save that"
            )
        raise GriffinError(f"{path} is not a state: its format is {found!r:.60}, not {FORMAT!r}; {_MEND}")
    kinds: dict[str, _Kind] = {}
    for name in file.keys():  # noqa: SIM118  (not a dict)
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise GriffinError(f"{path} is damaged: {name!r:.60} is {part.get_dtype()}; {_MEND}")
        kinds[name] = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
    shape, dtype = kinds.get(_METADATA, ((), None))
    if fields.keys() != _FIELDS or dtype != torch.uint8 or len(shape) != 1 or shape[0] > MOST_TEXT_BYTES:
        raise GriffinError(f"{path} is damaged: its header is not one of {FORMAT}; {_MEND}")
    return file, fields, kinds


def _check_kinds(path: Path, fields: dict[str, str], kinds: Mapping[str, _Kind], new: State) -> int:
    """Compare names, shapes and dtypes with those of a state of no rows; give `longest`."""
    needed, growing = new.tensors(), new.growing()
    if kinds.keys() != needed.keys() | {_METADATA}:
        odd = sorted(kinds.keys() ^ (needed.keys() | {_METADATA}))
        raise GriffinError(f"{path} was saved with another model: {odd[0]!r:.60} is in one of them only; {_MEND}")
    longest = fields["longest"]
    if not (longest.isascii() and longest.isdigit() and len(longest) <= 15 and int(longest) < _MOST_TOKENS):
        raise GriffinError(f"{path} is damaged: {longest!r:.60} tokens read; {_MEND}")
    rows = (kinds["position"][0] or (0,))[:1]
    slots = {kinds[name][0][1:2] for name in growing}
    if len(slots) > 1:
        raise GriffinError(f"{path} is damaged: its layers have different numbers of slots; {_MEND}")
    for name, tensor in needed.items():
        shape, dtype = kinds[name]
        wanted = (*rows, *(shape[1:2] if name in growing else ()), *tensor.shape[2 if name in growing else 1 :])
        if shape != wanted:
            raise GriffinError(
                f"{path} was saved with another model, or is damaged: {name} is {shape}, and this model needs {wanted}"
            )
        if dtype != tensor.dtype:
            raise GriffinError(
                f"{path}: {name} is {dtype}, and this model needs {tensor.dtype}; "
                "load the model with the dtype it had when the state was saved"
            )
    return int(longest)


def _read(path: Path, file: Any, fields: dict[str, str], kinds: Mapping[str, _Kind]) -> dict[str, Tensor]:
    tensors = {name: file.get_tensor(name) for name in kinds}
    if _digest(fields, tensors) != fields["sha256"]:
        raise GriffinError(f"{path} is damaged: its contents do not match its checksum; use another copy")
    return tensors


def _metadata(path: Path, tensor: Tensor) -> dict[str, str]:
    where = f"{path}, metadata"
    try:
        text = bytes(tensor.numpy()).decode()
    except UnicodeDecodeError as error:
        raise GriffinError(f"{where} is not UTF-8 ({error.reason}); {_MEND}") from error
    value = parse_json(text, where, mend=_MEND)
    if not isinstance(value, dict) or not all(isinstance(string, str) for string in value.values()):
        raise GriffinError(f"{where} is not an object of strings; {_MEND}")
    return value


def _check_values(what: str, tensors: Mapping[str, Tensor], longest: int, growing: set[str]) -> None:
    """Refuse what no reading of tokens gives: kernels index memory by these offsets."""
    position = tensors["position"]
    low, high = (int(value) for value in torch.aminmax(position)) if len(position) else (0, 0)
    if low < 0 or high > longest:
        raise GriffinError(f"{what} is damaged: a row stands at {low if low < 0 else high}, not in 0 .. {longest}")
    for name, tensor in tensors.items():
        if name in growing and tensor.shape[1] < longest:
            raise GriffinError(f"{what} is damaged: {name} has {tensor.shape[1]} slots for {longest} tokens")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise GriffinError(f"{what} holds NaN or infinity ({name}): damage, or an overflow; begin anew")


def _digest(fields: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all that a file holds, but for itself."""
    told = {name: value for name, value in fields.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
