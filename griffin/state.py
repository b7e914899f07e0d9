"""What carries over between calls: a value the caller owns, written in place only by `update_`.

Its size is fixed, whatever it has read; only global attention (a window of None) keeps a key and value of every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.ops import ring_write_


@dataclass(slots=True, eq=False)
class RecurrentState:
    h: Tensor  # (B, R) fp32, hidden state of the RG-LRU
    conv: Tensor  # (B, conv_width - 1, R) activation dtype, last inputs of the convolution, oldest first

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.h, self.conv

    def update_(self, h: Tensor, conv: Tensor) -> None:
        """Overwrite in place: CUDA graphs need fixed addresses. clone() first to branch."""
        self.h.copy_(h.detach())
        self.conv.copy_(conv.detach())


@dataclass(slots=True, eq=False)
class AttentionState:
    """Keys and values after RoPE; the token at offset p of its document lies in slot p % S.

    S = window + 1, so that one new token fits beside the `window` tokens it sees. Global attention has as many slots as
    the longest document so far needs and grows by doubling.
    """

    keys: Tensor  # (B, S, G, K) activation dtype
    values: Tensor  # (B, S, G, K) activation dtype
    grows: bool  # global attention

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def earlier(self, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Copy the `count` tokens before `position` (B,) in order of time: keys and values (B, count, G, K).

        Where a document has fewer, the first ones are whatever the slots hold; no query sees them.
        """
        B, S, G, K = self.keys.shape
        steps = torch.arange(-count, 0, dtype=torch.int64, device=position.device)
        index = ((position[:, None] + steps) % S)[..., None, None].expand(B, count, G, K)
        recorded = torch.is_grad_enabled()  # then kept for the backward pass, while update_ writes these
        keys, values = (each.clone() if recorded and each.requires_grad else each for each in self.tensors())
        return keys.gather(1, index), values.gather(1, index)

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

    @torch.inference_mode(False)  # what is made here must be writable outside inference mode too
    @torch.no_grad()
    def reserve_(self, slots: int) -> None:
        """Make room for offsets below `slots` (global attention only), at least doubling so that growth is cheap."""
        B, S, G, K = self.keys.shape
        if slots > S:
            room = (B, max(slots, 2 * S) - S, G, K)
            self.keys = torch.cat([self.keys, self.keys.new_zeros(room)], dim=1)
            self.values = torch.cat([self.values, self.values.new_zeros(room)], dim=1)


class Model(Protocol):
    """What a state's file asks of a model; `griffin.model.Griffin` is one."""

    config: GriffinConfig

    @property
    def model_id(self) -> str: ...
    def new_state(self, batch_size: int) -> State: ...
    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(slots=True, eq=False, repr=False)
class State:
    """All that a batch of conversations is, besides the weights: tensors and plain values. Made by `Griffin.new_state`.

    Forking, prefix sharing, beams and sessions are copies of rows: `clone`, `rows`, `set_rows_`, `save`, `load`.
    """

    layers: list[RecurrentState | AttentionState]
    position: Tensor  # (B,) int64, offset of the next token in its document
    longest: int  # no row's position is above this; kept on the host so that nothing waits for a GPU
    model_id: str  # Griffin.model_id of the model that made it

    @classmethod
    @torch.inference_mode(False)  # it must be writable outside inference mode too
    @torch.no_grad()
    def new(
        cls,
        config: GriffinConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        model_id: str,
    ) -> State:
        """Make the state of `batch_size` rows that have read nothing.

        Args:
            config: of the model.
            batch_size: B, the rows.
            dtype: of the activations; h is in fp32 (fp64 for fp64).
            device: where its tensors live.
            model_id: of the model that makes it.

        Raises:
            ValueError: batch_size < 0.
        """
        if batch_size < 0:
            raise ValueError(f"batch_size={batch_size} must not be negative")
        B, zeros = batch_size, partial(torch.zeros, device=device)
        ring = (B, 0 if config.window is None else config.window + 1, config.num_kv_heads, config.head_width)
        layers: list[RecurrentState | AttentionState] = [
            RecurrentState(
                h=zeros(B, config.lru_width, dtype=torch.promote_types(dtype, torch.float32)),
                conv=zeros(B, config.conv_width - 1, config.lru_width, dtype=dtype),
            )
            if kind == "recurrent"
            else AttentionState(zeros(ring, dtype=dtype), zeros(ring, dtype=dtype), grows=config.window is None)
            for kind in config.block_types
        ]
        return cls(layers, zeros(B, dtype=torch.int64), longest=0, model_id=model_id)

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
            named |= {f"layers.{index}.{name}": tensor for name, tensor in zip(names, layer.tensors(), strict=True)}
        return named

    def growing(self) -> set[str]:
        """Name the tensors (B, S, ...) whose S grows with the text: keys and values of global attention."""
        layers = [i for i, layer in enumerate(self.layers) if isinstance(layer, AttentionState) and layer.grows]
        return {f"layers.{index}.{name}" for index in layers for name in ("keys", "values")}

    def reserve_(self, tokens: int) -> None:
        """Make room for documents of so many tokens: only global attention needs to."""
        for layer in self.layers:
            if isinstance(layer, AttentionState) and layer.grows:
                layer.reserve_(tokens)

    def head(self, count: int) -> State:
        """Give the first `count` rows as a view: what is written there is written here, and the other way round.

        `longest` is a number and each has its own; and where global attention grows, the one that grows has tensors of
        its own from then on: reserve what is needed before taking a view.

        Raises:
            ValueError: there are not so many rows.
        """
        if not 0 <= count <= self.batch_size:
            raise ValueError(f"head({count}) of a state of {self.batch_size} rows")
        layers: list[RecurrentState | AttentionState] = [
            RecurrentState(layer.h[:count], layer.conv[:count])
            if isinstance(layer, RecurrentState)
            else AttentionState(layer.keys[:count], layer.values[:count], layer.grows)
            for layer in self.layers
        ]
        return State(layers, self.position[:count], self.longest, self.model_id)

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
        return State(layers, self.position[rows], self.longest, self.model_id)

    @torch.no_grad()
    def set_rows_(self, index: Sequence[int] | Tensor, source: State) -> None:
        """Overwrite the rows named, in place, with the rows of `source`: row index[i] becomes source's row i.

        Raises:
            ValueError: a row is named twice or not there, or source has another number of rows or another shape.
        """
        rows = self._row_index(index)
        if len(rows) != source.batch_size or len(set(rows.tolist())) != len(rows):
            raise ValueError(f"{rows.tolist()} must name {source.batch_size} different rows, one for each of source's")
        if source is self:
            source = self.clone()  # else a row might be read after it was written
        mine, theirs, growing = self.tensors(), source.tensors(), self.growing()
        if mine.keys() != theirs.keys() or growing != source.growing():
            raise ValueError("source has other layers than this state; both states must come from one model")
        for name, tensor in theirs.items():
            here, free = mine[name], 2 if name in growing else 1
            if tensor.shape[free:] != here.shape[free:] or tensor.dtype != here.dtype:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype} in source and {tuple(here.shape)} {here.dtype} "
                    "here; both states must come from one model"
                )
        for name in growing:
            self.reserve_(theirs[name].shape[1])
        for name, here in self.tensors().items():
            tensor = theirs[name].to(here.device)
            # There may be more slots here than in source: no query of source's rows sees those.
            (here[:, : tensor.shape[1]] if name in growing else here)[rows] = tensor
        self.longest = max(self.longest, source.longest)

    def _row_index(self, index: Sequence[int] | Tensor) -> Tensor:
        # Not as_tensor: it would put them on PyTorch's default device, whatever that is.
        rows = index.long() if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64, device="cpu")
        if rows.dim() != 1 or (rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch_size):
            raise ValueError(f"rows {rows.tolist()} must be a list within 0 .. {self.batch_size - 1}")
        return rows.to(self.position.device)

    def save(self, path: str | Path, model: Model, *, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all: see `griffin.state_file.save`."""
        from griffin import state_file  # which needs State

        state_file.save(self, path, model, metadata=metadata)

    @staticmethod
    def load(path: str | Path, model: Model) -> State:
        """Read a state that `save` wrote for this model, onto its device: see `griffin.state_file.load`."""
        from griffin import state_file  # which needs State

        return state_file.load(path, model)


def check_origin(state: State, model: Model) -> None:
    """Raise GriffinError unless this model, or a copy of it, made the state."""
    if state.model_id != model.model_id:
        raise GriffinError(
            "the state was made by another model; go on with the model that it was made by, or, where the weights are "
            "the same, save it there and load it for this model: State.load compares them"
        )
