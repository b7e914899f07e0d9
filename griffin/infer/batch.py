"""Rows that come and go, over one state made at the start: the one place of the engine that knows tensors.

Busy rows are the first n of N places. A row joins at place n and leaves by the last one moving into its place, so a
step for b rows, recorded once, is a step of the state's first b places for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from griffin.infer.request import Piece
from griffin.infer.row import Row
from griffin.infer.sampling import NUCLEUS_FIRST, Choice, Chosen, Columns, Filters, choose, draws, read_each
from griffin.infer.step import DecodeStep
from griffin.model import Griffin
from griffin.ops.cpu.record import available
from griffin.state import State


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What it takes to go on from where a text ends, as exactly as if it had never been left."""

    state: State  # one row
    logits: Tensor | None  # (V,) fp32, what the last token read gave: the next may be chosen at once. None: not known


class Batch:
    """N places for rows that decode together.

    Args:
        model: the model.
        places: N.
        keep: called with a row and what it holds, before it leaves and whenever it has read a multiple of `every`
            tokens; None keeps nothing.
        every: see `keep`.
        poison: fill the state of a place that becomes free with NaN, so that a test sees whoever reads it.

    Attributes:
        rows: the busy ones, in the order of their places.
    """

    @torch.inference_mode(False)  # what is made here is written inside the mode and outside it
    def __init__(
        self,
        model: Griffin,
        places: int,
        *,
        keep: Callable[[Row, Held], None] | None = None,
        every: int = 128,
        poison: bool = False,
    ) -> None:
        self.model, self.places, self.keep, self.every, self.poison = model, places, keep, every, poison
        self.rows: list[Row] = []
        self._state = model.new_state(places)
        device, V = self._state.position.device, model.config.vocab_size
        self._columns = Columns(places, V, device)
        self._uniform = torch.zeros(places, dtype=torch.float64, device=device)
        self._seen: Tensor | None = None  # (N, V) bool, from the first row on that has a penalty
        self._steps: dict[Any, DecodeStep] = {}
        self._grows = bool(self._state.growing())
        self._filters: dict[int, Filters] = {}  # of the rows as they are now, by the number of places shown

    def join(self, rows: Sequence[Row], states: Sequence[State], logits: Tensor) -> list[tuple[Row, Piece]]:
        """Let rows come in, and choose the first token of each.

        Args:
            rows: as many as there are free places, or fewer.
            states: one for each, one row each, which has read the row's prompt; copied.
            logits: (len(rows), V) fp32, what the prompts end with.

        Returns:
            Each with its piece. A row that ends with it has left again.
        """
        for row, state in zip(rows, states, strict=True):
            place = len(self.rows)
            self._state.set_rows_([place], state)
            self._columns.set_(place, row.sampling)
            if row.sampling.repetition_penalty not in (None, 1.0):
                self._see(place, row)
            row.place = place
            self.rows.append(row)
        self._filters.clear()
        at = slice(len(self.rows) - len(rows), len(self.rows))
        self._draw(at)
        seen = None if self._seen is None else self._seen[at]
        chosen = choose(
            logits,
            self._columns.filters([row.sampling for row in rows], at),
            self._uniform[at],
            seen,
            num_top=_num_top(rows),
            first=None if logits.is_cuda else NUCLEUS_FIRST,
        )
        return self._take(rows, *read_each(chosen))

    def step(self) -> list[tuple[Row, Piece]]:
        """Let the model read the last token of every row, and choose the next. Rows that end have left."""
        n = len(self.rows)
        places = self.bucket(n)
        ids = [row.tokens[-1] for row in self.rows] + [0] * (places - n)
        tokens = torch.tensor(ids, dtype=torch.int64, device=self._uniform.device)
        if self._seen is not None:
            self._seen[:places].scatter_(1, tokens[:, None], True)
        self._draw(slice(0, n))
        step, whole = self._step_for(places)
        result = step(tokens)
        if places > n:
            self._state.position[n:places] = 0
        chosen, logits = result if whole else self._choose(result[:n], n)
        for row in self.rows:
            row.last_read = True
            row.position += 1
        choice, faults = read_each(chosen)
        return self._take(list(self.rows), choice, faults, logits)

    def state_of(self, row: Row) -> State:
        """Copy the state of a busy row."""
        assert row.place is not None
        state = self._state.rows([row.place])
        state.longest = row.position
        return state

    def leave(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        place, last = row.place, len(self.rows) - 1
        assert place is not None
        if place < last:
            self._state.set_rows_([place], self._state.rows([last]))
            for column in self._columns.tensors():
                column[place] = column[last]
            if self._seen is not None:
                self._seen[place] = self._seen[last]
            self.rows[place] = self.rows[last]
            self.rows[place].place = place
        self.rows.pop()
        row.place = None
        self._filters.clear()
        if self.poison:
            for tensor in self._state.tensors().values():
                tensor[last] = float("nan") if tensor.is_floating_point() else 0

    def bucket(self, rows: int) -> int:
        """How many places a step for so many rows computes."""
        if not self._uniform.is_cuda and not available():
            return rows  # no step is kept, so none has to serve for several numbers
        return min(_bucket(rows, exact=1 if self._uniform.is_cuda else 8), self.places)

    def _take(
        self, rows: Sequence[Row], choice: Choice, faults: list[str | None], logits: Tensor | None = None
    ) -> list[tuple[Row, Piece]]:
        """Let rows take what was chosen. `logits`: what each has just read a token for; None: nothing is kept."""
        pieces = []
        for index, row in enumerate(rows):
            fault = faults[index]
            if fault is None:
                piece = row.take(choice.ids[index], choice.logprobs[index], choice.top[index])
            else:
                piece = row.end("error", fault)
            ended = piece.finish_reason is not None
            if self.keep is not None and logits is not None and not fault and (ended or not row.position % self.every):
                self.keep(row, Held(self.state_of(row), logits[index].clone()))
            if ended:
                if row.keep_state:
                    row.state = self.state_of(row)
                self.leave(row)
            pieces.append((row, piece))
        return pieces

    def _see(self, place: int, row: Row) -> None:
        if self._seen is None:
            self._seen = torch.zeros(
                self.places, self.model.config.vocab_size, dtype=torch.bool, device=self._uniform.device
            )
        self._seen[place] = False
        self._seen[place, list(row.request.prompt)] = True

    def _draw(self, at: slice) -> None:
        """Let the rows of these places take their uniform numbers."""
        rows = self.rows[at]
        numbers = draws([row.sampling for row in rows], [row.generator for row in rows])
        self._uniform[at] = torch.tensor(numbers, dtype=torch.float64, device=self._uniform.device)

    def _step_for(self, places: int) -> tuple[DecodeStep, bool]:
        """The step of so many places, and whether it chooses as well, as part of a CUDA graph."""
        if self._grows:  # before a view is taken: one that grows would have tensors of its own
            longest = max(row.position for row in self.rows) + 1
            before = self._state.tensors()
            self._state.reserve_(longest)
            if any(before[name] is not tensor for name, tensor in self._state.tensors().items()):
                self._steps.clear()
        whole = self._uniform.is_cuda
        key = (places, self._kind()) if whole else places
        if key not in self._steps:
            then = partial(self._choose, places=places) if whole else None
            self._steps[key] = DecodeStep(self.model, self._state.head(places), then)
        step = self._steps[key]
        step.state.longest = max(row.position for row in self.rows)
        return step, whole

    def _kind(self) -> tuple[object, ...]:
        """What a graph that chooses has been made for: which filters there are, and how many tokens are reported."""
        filters = self._shown(len(self.rows))
        given = [getattr(filters, name) is not None for name in ("temperature", "top_k", "top_p", "min_p", "penalty")]
        return *given, filters.largest_k, _num_top(self.rows)

    def _shown(self, places: int) -> Filters:
        if places not in self._filters:
            self._filters[places] = self._columns.filters([row.sampling for row in self.rows], slice(0, places))
        return self._filters[places]

    def _choose(self, logits: Tensor, places: int) -> tuple[Chosen, Tensor]:
        """Nothing here waits for a GPU: there it is part of the graph of a step."""
        first = None if logits.is_cuda else NUCLEUS_FIRST
        seen = None if self._seen is None else self._seen[:places]
        chosen = choose(
            logits, self._shown(places), self._uniform[:places], seen, num_top=_num_top(self.rows), first=first
        )
        return chosen, logits


def place_bytes(model: Griffin) -> tuple[int, int]:
    """What one place takes: its row of the state; and its filters, its draw and what it has seen."""
    state = State.new(model.config, 1, model.activation_dtype, torch.device("meta"), "")
    columns = Columns(1, 1, torch.device("meta"))
    return state.nbytes, sum(column.nbytes for column in columns.tensors()) + 8 + model.config.vocab_size


def _bucket(rows: int, exact: int) -> int:
    """Up to `exact` each number, up to 8 powers of 2, then steps of a quarter: 10, 12, 14, 16, 20, 24, 28, 32 ..."""
    if rows <= exact:
        return rows
    power = 2 ** (rows - 1).bit_length()
    step = power if power <= 8 else power // 8
    return -(-rows // step) * step


def _num_top(rows: Sequence[Row]) -> int:
    return max((row.request.logprobs or 0 for row in rows), default=0)
