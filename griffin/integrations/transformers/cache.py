"""transformers' cache, which here is a State: what `past_key_values` is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from griffin.infer.step import DecodeStep
from griffin.model import Griffin
from griffin.state import State

_KEPT_TOKENS = 64  # as many at least can be taken back while recording


class GriffinCache(Cache):
    """A State of B rows as a transformers Cache: of fixed size, a value, with nothing hidden on the model.

    Made empty by `GriffinCache()`, or from a state by `GriffinCache(state)`. `copy.deepcopy` forks it, so that one
    prefix serves many continuations.

    Attributes:
        state: what the rows have read; None until the first call.
        columns: how many columns of tokens and padding that were, which transformers counts.
    """

    def __init__(self, state: State | None = None) -> None:
        super().__init__(layers=[])
        self.state, self.columns = state, 0 if state is None else state.longest
        self.last: Tensor | None = None  # (B, D), the final hidden state of each row's latest token, where known
        self._step: tuple[Griffin, DecodeStep] | None = None
        # While recording: states, each with the tokens (1, n) read since, oldest first. None: not recording.
        self._history: list[tuple[State, list[Tensor]]] | None = None
        self._unread: Tensor | None = None  # (B, n), tokens to be read again since the latest crop
        self._gap: str | None = None  # why there is a call that cannot be taken back

    def __repr__(self) -> str:
        return f"GriffinCache(columns={self.columns}, state={self.state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GriffinCache:
        twin = copy.copy(self)
        twin.state, twin._step = None if self.state is None else self.state.clone(), None
        if self._history is not None:
            twin._history = [(state.clone(), list(read)) for state, read in self._history]
        return twin

    # What the model asks.

    def begin(self, griffin: Griffin, batch_size: int) -> State:
        """Give the state of `batch_size` rows to go on from.

        Raises:
            ValueError: the cache has other rows, or was filled in another dtype.
        """
        if self.state is None:
            self.state = griffin.new_state(batch_size)
        if self.state.batch_size != batch_size:
            raise ValueError(
                f"{batch_size} rows go on from a cache of {self.state.batch_size}; "
                "batch_repeat_interleave and batch_select_indices change a cache's rows"
            )
        dtypes = {tensor.dtype for name, tensor in self.state.tensors().items() if name.endswith(("conv", "keys"))}
        if dtypes - {griffin.activation_dtype}:
            raise ValueError(
                f"the cache is in {dtypes.pop()}, the model computes in {griffin.activation_dtype}; "
                "go on under the same autocast, or with a new cache"
            )
        return self.state

    def step(self, griffin: Griffin) -> DecodeStep:
        """Give the step that reads one token of every row."""
        assert self.state is not None
        if self._step is None or self._step[0] is not griffin or self._step[1].state is not self.state:
            self._step = griffin, DecodeStep(griffin, self.state)
        return self._step[1]

    @property
    def unread(self) -> Tensor | None:
        """Tokens (B, n) that `crop` left to be read before any other."""
        return self._unread

    def before(self, tokens: Tensor | None) -> State | None:
        """Give the copy of the state that `after` wants, taken before the call; None where it wants none.

        `tokens` (B, T) are those that `crop` may take back; None: they cannot be.
        """
        if self._history is None or self.state is None or tokens is None or len(tokens) != 1:
            return None
        full = not self._history or sum(read.shape[1] for read in self._history[-1][1]) >= _KEPT_TOKENS
        return self.state.clone() if full else None

    def after(self, columns: int, tokens: Tensor | None, before: State | None, last: Tensor | None) -> None:
        """Note that a call has read `columns` more columns, with `last` (B, D) the hidden states of the last."""
        self.columns, self.last, self._unread = self.columns + columns, last, None
        if self._history is None:
            return
        if tokens is None or len(tokens) != 1:
            self._history, self._gap = [], "the latest call had several rows, padding, packing or embeddings"
            return
        if before is not None:
            self._history = [*self._history[-1:], (before, [])]
        self._history[-1][1].append(tokens)

    # What transformers asks.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the columns read so far: tokens and padding."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it never is full."""
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """Forget everything: the next call starts new rows."""
        self.state = self.last = self._step = self._unread = None
        self.columns = 0
        if self._history is not None:
            self._history, self._gap = [], None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i become what row beam_idx[i] was: what beams need."""
        if self.state is None or len(beam_idx) != self.state.batch_size:
            self.batch_select_indices(beam_idx)
            return
        self.state.set_rows_(range(len(beam_idx)), self.state.rows(beam_idx))  # in place: the step's addresses stay
        self._select_others(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep the rows named, in that order; a row may be named twice."""
        if self.state is None:
            raise ValueError("an empty cache has no rows to choose from")
        self.state = self.state.rows(indices)
        self._select_others(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make each row `repeats` rows."""
        self.batch_select_indices([row for row in range(self.batch_size) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs from now on: a copy of the state now and then, and the tokens since."""
        if self._history is None:
            self._history = []

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens back, exactly: the state of before, and what stays is read again.

        A recurrence cannot be run backwards. What is read again is read together with the next call's tokens.

        Raises:
            ValueError: tokens_to_remove is positive, nothing was recorded, or not so much.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): say how many tokens to remove as a negative number")
        if tokens_to_remove == 0:
            return
        if self._history is None:
            raise ValueError("a recurrent state cannot be run backwards; call activate_past_recording() before reading")
        left = -tokens_to_remove
        while self._history:
            state, pieces = self._history.pop()
            tokens = torch.cat(pieces, dim=1)
            if left <= tokens.shape[1]:
                self.state, self.last = state, None
                kept = tokens[:, : tokens.shape[1] - left]
                self._unread = kept if kept.shape[1] else None
                self.columns += tokens_to_remove
                return
            left -= tokens.shape[1]
        reason = self._gap or f"only some {_KEPT_TOKENS} are kept"
        raise ValueError(f"crop({tokens_to_remove}) asks for more tokens than were recorded: {reason}")

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        raise ValueError("a GriffinCache has no attention masks: pass the (B, columns) attention_mask to the model")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a GriffinCache is the state of a griffin model; other models cannot fill it")

    def _select_others(self, indices: Tensor) -> None:
        """Follow the state's rows in all that belongs to them."""
        if self.last is not None:
            self.last = self.last[indices.to(self.last.device)]
        if self._unread is not None:
            self._unread = self._unread[indices.to(self._unread.device)]
        if self._history is not None:
            self._history, self._gap = [], "the rows were chosen anew"
