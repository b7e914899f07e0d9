"""What carries over between calls: a value the caller owns, of fixed size, written in place only by `update_`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from griffin.errors import GriffinError
from griffin.files import save_tensors, whole_file
from griffin.ops import assign_, ring_write_

FORMAT = "griffin-state-1"


@dataclass(slots=True, eq=False)
class RecurrentState:
    h: Tensor  # (B, R) fp32, hidden state of the RG-LRU
    conv: Tensor  # (B, conv_width - 1, R) activation dtype, last inputs of the convolution, oldest first

    def update_(self, h: Tensor, conv: Tensor) -> None:
        """Overwrite in place: CUDA graphs need fixed addresses. clone() first to branch."""
        assign_(self.h, h)
        assign_(self.conv, conv)


@dataclass(slots=True, eq=False)
class AttentionState:
    """Keys and values after RoPE; the token at offset p of its document lies in slot p % S.

    S = window + 1, so that one new token fits beside the `window` tokens it sees. Global attention has as many slots as
    the longest document so far needs and grows by doubling.
    """

    keys: Tensor  # (B, S, G, K) activation dtype
    values: Tensor  # (B, S, G, K) activation dtype
    grows: bool  # global attention

    def earlier(self, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Copy the `count` tokens before `position` (B,) in order of time: keys and values (B, count, G, K).

        Where a document has fewer, the first ones are whatever the slots hold; no query sees them.
        """
        B, S, G, K = self.keys.shape
        steps = torch.arange(-count, 0, dtype=torch.int64, device=position.device)
        index = ((position[:, None] + steps) % S)[..., None, None].expand(B, count, G, K)
        return self.keys.gather(1, index), self.values.gather(1, index)

    def update_(self, keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor | None) -> None:
        """Write the last tokens of each row's last document.

        Args:
            keys, values: (B, T, G, K).
            positions: (B, T) offset of each token in its document.
            lengths: (B,) 0 .. T, how many of a row's tokens count; None means all.
        """
        B, S, G, K = self.keys.shape
        T = keys.shape[1]
        if T == 1 and lengths is None:
            ring_write_(self.keys, self.values, keys, values, positions)
            return
        keys, values = keys.detach(), values.detach()
        if lengths is None:
            lengths = torch.full((B,), T, dtype=torch.int64, device=positions.device)
        # For each slot: the offset of the newest token that belongs there, and that token's index among the T given.
        last = (lengths - 1).clamp(min=0)
        newest = positions.gather(1, last[:, None])  # (B, 1)
        offset = newest - (newest - torch.arange(S, dtype=torch.int64, device=positions.device)) % S
        index = last[:, None] - (newest - offset)
        used = (index >= 0) & (lengths > 0)[:, None]  # slots of offsets below 0 are not seen, whatever they hold
        index = index.clamp(min=0)[..., None, None].expand(B, S, G, K)
        used = used[..., None, None]
        self.keys.copy_(torch.where(used, keys.gather(1, index), self.keys))
        self.values.copy_(torch.where(used, values.gather(1, index), self.values))

    def reserve_(self, slots: int) -> None:
        """Make room for offsets below `slots` (global attention only), at least doubling so that growth is cheap."""
        B, S, G, K = self.keys.shape
        if slots > S:
            room = (B, max(slots, 2 * S) - S, G, K)
            self.keys = torch.cat([self.keys, self.keys.new_zeros(room)], dim=1)
            self.values = torch.cat([self.values, self.values.new_zeros(room)], dim=1)


class _Model(Protocol):
    """What loading a state asks of a model."""

    def new_state(self, batch_size: int) -> State: ...
    def fingerprint(self) -> str: ...


@dataclass(slots=True, eq=False, repr=False)
class State:
    """All that a batch of conversations is, besides the weights. Made by `Griffin.new_state`.

    Forking, prefix sharing, beams and sessions are copies of rows: `clone`, `rows`, `set_rows_`, `save`, `load`.
    """

    layers: list[RecurrentState | AttentionState]
    position: Tensor  # (B,) int64, offset of the next token in its document
    longest: int  # no row's position is above this; kept on the host so that nothing waits for a GPU
    fingerprint: Callable[[], str]  # of the model it belongs to; called only by save and load

    def __repr__(self) -> str:
        return f"State(batch_size={self.batch_size}, layers={len(self.layers)}, nbytes={self.nbytes})"

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors. Constant for ever unless attention is global."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor, without copying: `position`, `layers.{i}.h`, `.conv`, `.keys`, `.values`."""
        named = {"position": self.position}
        for index, layer in enumerate(self.layers):
            names = ("h", "conv") if isinstance(layer, RecurrentState) else ("keys", "values")
            named |= {f"layers.{index}.{name}": getattr(layer, name) for name in names}
        return named

    def reserve_(self, tokens: int) -> None:
        """Make room for documents of so many tokens: only global attention needs to."""
        for layer in self.layers:
            if isinstance(layer, AttentionState) and layer.grows:
                layer.reserve_(tokens)

    def clone(self) -> State:
        """Copy every tensor: the two go on independently."""
        return self.rows(range(self.batch_size))

    @torch.inference_mode(False)  # the copy must be writable outside inference mode too
    @torch.no_grad()
    def rows(self, index: Sequence[int] | Tensor) -> State:
        """Copy the rows named, in that order; a row may be named twice.

        Raises:
            ValueError: a row is not in 0 .. batch_size - 1.
        """
        rows = self._row_index(index)
        layers: list[RecurrentState | AttentionState] = [
            RecurrentState(layer.h[rows], layer.conv[rows])
            if isinstance(layer, RecurrentState)
            else AttentionState(layer.keys[rows], layer.values[rows], layer.grows)
            for layer in self.layers
        ]
        return State(layers, self.position[rows], self.longest, self.fingerprint)

    @torch.no_grad()
    def set_rows_(self, index: Sequence[int] | Tensor, source: State) -> None:
        """Overwrite the rows named, in place, with the rows of `source`: row index[i] becomes source's row i.

        Raises:
            ValueError: a row is named twice or not there, or source has another number of rows or another shape.
        """
        rows = self._row_index(index)
        if len(rows) != source.batch_size or len(set(rows.tolist())) != len(rows):
            raise ValueError(f"{rows.tolist()} must name {source.batch_size} different rows, one for each of source's")
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            if isinstance(mine, AttentionState) and isinstance(theirs, AttentionState) and mine.grows:
                mine.reserve_(theirs.keys.shape[1])
        pairs = []
        for (name, tensor), theirs_tensor in zip(self.tensors().items(), source.tensors().values(), strict=True):
            # Global attention may have more slots here than in source: no query of source's rows sees those.
            target = tensor[:, : theirs_tensor.shape[1]] if tensor.dim() == 4 and theirs_tensor.dim() == 4 else tensor
            if target.shape[1:] != theirs_tensor.shape[1:] or target.dtype != theirs_tensor.dtype:
                raise ValueError(
                    f"{name} is {tuple(theirs_tensor.shape)} {theirs_tensor.dtype} in source and "
                    f"{tuple(tensor.shape)} {tensor.dtype} here; both states must come from one model"
                )
            pairs.append((target, theirs_tensor))
        for target, theirs_tensor in pairs:
            target[rows] = theirs_tensor.to(target.device)
        self.longest = max(self.longest, source.longest)

    def _row_index(self, index: Sequence[int] | Tensor) -> Tensor:
        rows = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64, device="cpu")
        rows = rows.to(torch.int64)
        if rows.dim() != 1 or (rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch_size):
            raise ValueError(f"rows {rows.tolist()} must be a list within 0 .. {self.batch_size - 1}")
        return rows.to(self.position.device)

    def save(self, path: str | Path, *, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all, with the model's fingerprint and a checksum.

        Args:
            path: the file.
            metadata: strings to keep with it (a conversation's text, say); `load_metadata` reads them back.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint(),
            "longest": str(self.longest),
            "sha256": _digest(tensors, self.longest),
            "metadata": json.dumps(metadata or {}),
        }
        with whole_file(path) as temporary:
            save_tensors(tensors, temporary, header)

    @staticmethod
    def load(path: str | Path, model: _Model) -> State:
        """Read a state that `save` wrote for this model, onto the model's device.

        Raises:
            GriffinError: the file is missing, damaged, not a state, or belongs to another model.
        """
        header, tensors = _read(path)
        if _digest(tensors, int(header["longest"])) != header["sha256"]:
            raise GriffinError(f"{path} is damaged: its contents do not match its checksum; use another copy")
        if header["fingerprint"] != model.fingerprint():
            raise GriffinError(
                f"{path} was saved with another model (fingerprint {header['fingerprint'][:12]}, this model is "
                f"{model.fingerprint()[:12]}); load it with the model it was made by"
            )
        state = model.new_state(tensors["position"].shape[0])
        state.longest = int(header["longest"])
        for index, layer in enumerate(state.layers):
            stored = tensors.get(f"layers.{index}.keys")
            if isinstance(layer, AttentionState) and stored is not None and stored.dim() == 4 and layer.grows:
                layer.reserve_(stored.shape[1])
        for name, tensor in state.tensors().items():
            stored = tensors.get(name)
            if stored is None or stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                found = "is missing" if stored is None else f"is {tuple(stored.shape)} {stored.dtype}"
                raise GriffinError(
                    f"{path}: {name} {found}, and this model needs {tuple(tensor.shape)} {tensor.dtype}; "
                    "load the model with the dtype it had when the state was saved"
                )
            with torch.no_grad():
                tensor.copy_(stored)
        return state


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read the strings that were given to `State.save`.

    Raises:
        GriffinError: the file is missing, damaged or not a state.
    """
    header, _ = _read(path)
    metadata = json.loads(header["metadata"])
    return {str(key): str(value) for key, value in metadata.items()}


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError as error:
        raise GriffinError(f"{path} does not exist; give a state saved with State.save or /save") from error
    except (SafetensorError, OSError) as error:
        raise GriffinError(f"{path} cannot be read as a state ({error}); use another copy") from error
    wanted = {"fingerprint", "longest", "sha256", "metadata"}
    if header.get("format") != FORMAT or "position" not in tensors or wanted - header.keys():
        raise GriffinError(f"{path} is not a state: its format is {header.get('format')!r}, not {FORMAT!r}")
    return header, tensors


def _digest(tensors: dict[str, Tensor], longest: int) -> str:
    digest = hashlib.sha256(f"longest {longest}\n".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
