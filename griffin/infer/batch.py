"""Rows that come and go, over one state made at the start: the one place of the engine that knows tensors.

Busy rows are the first n of N places. A row joins at place n and leaves by the last one moving into its place, so a
step for b rows, recorded once, is a step of the state's first b places for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from griffin.infer.pace import mean
from griffin.infer.prefill import read_chunk
from griffin.infer.request import Piece
from griffin.infer.row import Row
from griffin.infer.sampling import NUCLEUS_FIRST, Choice, Chosen, Columns, Filters, choose, draws, read_each
from griffin.infer.step import DecodeStep
from griffin.model import Griffin
from griffin.state import State

_RECORDED = 16  # rows of a step that a CPU records: products of more are PyTorch's
_STEPS = 8  # kept on a CPU, for so many numbers of rows: another costs one step's Python, each keeps its logits


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
        speculate: let a row that decodes alone guess what comes next: see `griffin.infer.speculate`.
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
        every: int = 1,
        speculate: bool = False,
        poison: bool = False,
    ) -> None:
        self.model, self.places, self.keep, self.every, self.poison = model, places, keep, every, poison
        self._step_s: float | None = None  # of a row alone
        self.rows: list[Row] = []
        self._state = model.new_state(places)
        device, V = self._state.position.device, model.config.vocab_size
        self._columns = Columns(places, V, device)
        self._uniform = torch.zeros(places, dtype=torch.float64, device=device)
        # (N, V), from the first row on that needs them:
        self._seen: Tensor | None = None  # bool, which tokens the text holds, for the repetition penalty
        self._offset: Tensor | None = None  # fp32, what is added to logits
        self._allowed: Tensor | None = None  # bool, what grammars allow
        self._masks = ThreadPoolExecutor(1, "griffin-grammar")  # its thread begins with the first mask
        self._steps: dict[Any, DecodeStep] = {}  # the least recently used first
        self._grows = bool(self._state.growing())
        self._lies: list[int] = []  # where the state lay when the steps were made, if it grows
        self._speculates = speculate and not self._grows
        self.guessed = self.accepted = 0  # tokens
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
            self._forget_beyond(place, state)
            self._columns.set_(place, row.sampling)
            self._enter(place, row)
            self.rows.append(row)
        self._write_masks([(row, self._masks.submit(row.matcher.mask)) for row in rows if row.matcher is not None])
        self._filters.clear()
        at = slice(len(self.rows) - len(rows), len(self.rows))
        self._draw(at)
        chosen = self._choose_at(at, logits, self._columns.filters([row.sampling for row in rows], at), rows)
        return self._take(rows, *read_each(chosen))

    def step(self) -> list[tuple[Row, Piece]]:
        """Let the model read the last token of every row, and choose the next. Rows that end have left."""
        began, n = time.perf_counter(), len(self.rows)
        if n == 1 and self._speculates:
            (row,) = self.rows
            guesses = row.drafter.draft(row.tokens)
            if guesses or row.num_unread > 1:
                return self._verify(row, guesses)
        for row in self.rows:
            self._catch_up(row, len(row.tokens) - 1)
        places = self.bucket(n)
        ids = [row.tokens[-1] for row in self.rows] + [0] * (places - n)
        tokens = torch.tensor(ids, dtype=torch.int64, device=self._uniform.device)
        if self._seen is not None:
            self._seen[:places].scatter_(1, tokens[:, None], True)
        self._write_offsets([(row, *each) for row in self.rows if row.has_offsets for each in row.new_offsets()])
        self._draw(slice(0, n))
        step, whole = self._step_for(places)
        masks = [(row, self._masks.submit(row.matcher.mask)) for row in self.rows if row.matcher is not None]
        if whole:  # the graph chooses as well
            self._write_masks(masks)
        result = step(tokens)
        if not whole:
            self._write_masks(masks)
        if places > n:
            self._state.position[n:places] = 0
        chosen, logits = result if whole else self._choose(result[:n], n)
        for row in self.rows:
            row.num_read += 1
            row.position += 1
        choice, faults = read_each(chosen)
        taken = self._take(list(self.rows), choice, faults, logits)
        if n == 1:
            self._step_s = mean(self._step_s, time.perf_counter() - began)
        return taken

    def _verify(self, row: Row, guesses: list[int]) -> list[tuple[Row, Piece]]:
        """Read what is unread and some guesses in one pass, and take tokens for as long as the guesses are right.

        After a wrong one the state is the one from before the pass: what was right is read with the next pass.
        """
        began, before, pieces = time.perf_counter(), self.state_of(row), list[tuple[Row, Piece]]()
        unread = row.tokens[row.num_read :]
        head = self._state.head(1)
        head.longest = row.position
        tokens = torch.tensor([[*unread, *guesses]], dtype=torch.int64, device=self._uniform.device)
        logits = self.model.logits(self.model(tokens, head)[0, len(unread) - 1 :])  # (1 + guesses, V)
        for index in range(len(guesses) + 1):
            choice, faults = read_each(self._choose_next(row, logits[index : index + 1]))
            chosen = len(row.tokens)  # before this one
            if faults[0] is None:
                piece = row.take(choice.ids[0], choice.logprobs[0], choice.top[0])
            else:
                piece = row.end("error", faults[0])
            pieces.append((row, piece))
            if row.tail is not None and row.tail.wants_state:
                row.tail.state, row.tail.num_read = before, row.num_read
            if piece.finish_reason is not None or index == len(guesses) or choice.ids[0] != guesses[index]:
                break
        if index == len(guesses):
            row.num_read += tokens.shape[1]
            row.position += tokens.shape[1]
        else:
            self._state.set_rows_([0], before)
        self.guessed += len(guesses)
        self.accepted += index
        row.drafter.judge(index + 1, time.perf_counter() - began, self._step_s, guessed=bool(guesses))
        if row.finish_reason is not None:
            self._catch_up(row, chosen)
            if self.keep is not None and row.finish_reason != "error":
                self._keep(row, logits[index])
            self.end(row)
        return pieces

    def _choose_next(self, row: Row, logits: Tensor) -> Chosen:
        """Choose one token of the only row, after what it has taken so far."""
        if self._seen is not None:
            self._seen[0, row.tokens[-1]] = True
        self._write_offsets([(row, *each) for each in row.new_offsets()] if row.has_offsets else [])
        if row.matcher is not None:
            self._write_masks([(row, self._masks.submit(row.matcher.mask))])
        self._draw(slice(0, 1))
        return self._choose_at(slice(0, 1), logits, self._shown(1), [row])

    def _catch_up(self, row: Row, count: int) -> None:
        """Read what the row has chosen up to `count` tokens, if guesses have left more than that unread."""
        if (some := row.tokens[row.num_read : count]) and row.place is not None:
            state = self.state_of(row)
            read_chunk(self.model, [state], [some])
            self._state.set_rows_([row.place], state)
            row.num_read += len(some)
            row.position += len(some)

    def state_of(self, row: Row) -> State:
        """Copy the state of a busy row."""
        assert row.place is not None
        state = self._state.rows([row.place])
        state.longest = row.position
        return state

    def end(self, row: Row) -> None:
        """Let a row go, with the state that its completion is to have."""
        row.state = self._state_shown(row) if row.keep_state else None
        if row.tail is not None and (row.finish_reason in ("stop", "length", "error") or not row.keep_state):
            row.tail.state = None  # else the answer may go on, see `Answered`
        self._leave(row)

    def _leave(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        place, last = row.place, len(self.rows) - 1
        assert place is not None
        if place < last:
            self._state.set_rows_([place], self._state.rows([last]))
            for column in self._columns.tensors():
                column[place] = column[last]
            for wide in (self._seen, self._offset, self._allowed):
                if wide is not None:
                    wide[place] = wide[last]
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
        if not self._uniform.is_cuda:
            return rows  # recording a step costs little, and beyond some 8 rows it takes as long as it has rows
        return min(_bucket(rows), self.places)

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
            if row.tail is not None and row.tail.wants_state and piece.finish_reason is None:
                row.tail.state, row.tail.num_read = self.state_of(row), row.num_read
            if self.keep is not None and logits is not None and not fault:
                self._keep(row, logits[index])
            if piece.finish_reason is not None:
                self.end(row)
            pieces.append((row, piece))
        return pieces

    def _keep(self, row: Row, logits: Tensor) -> None:
        """Let the keeper have what a row has read, if it ends or stands where states are kept."""
        assert self.keep is not None
        if row.finish_reason is None and row.position % self.every:
            return
        whole = row.shown()[0] == row.num_read
        self.keep(row, Held(self._state_shown(row), logits.clone() if whole else None))

    def _state_shown(self, row: Row) -> State:
        """Copy a busy row's state as it was after what is shown of the row: before a stop string."""
        count = row.shown()[0]
        if count == row.num_read:
            return self.state_of(row)
        assert row.tail is not None
        assert row.tail.state is not None
        state, read = row.tail.state.clone(), row.tail.num_read
        if read < count:
            read_chunk(self.model, [state], [row.tokens[read:count]])
        return state

    def _forget_beyond(self, place: int, state: State) -> None:
        """Empty slots of global attention that a row has not: no query sees them, yet 0 times NaN is NaN."""
        mine, theirs = self._state.tensors(), state.tensors()
        for name in self._state.growing() if self._grows else ():
            mine[name][place, theirs[name].shape[1] :] = 0

    def _enter(self, place: int, row: Row) -> None:
        """Fill the columns of (N, V) for a row that comes in."""
        V, device = self.model.config.vocab_size, self._uniform.device
        if row.sampling.repetition_penalty not in (None, 1.0):
            if self._seen is None:
                self._seen = torch.zeros(self.places, V, dtype=torch.bool, device=device)
            self._seen[place] = False
            self._seen[place, [*row.request.prompt, *row.tokens]] = True
        if row.has_offsets and self._offset is None:
            self._offset = torch.zeros(self.places, V, dtype=torch.float32, device=device)
        if row.matcher is not None and self._allowed is None:
            self._allowed = torch.ones(self.places, V, dtype=torch.bool, device=device)
        if self._allowed is not None:
            self._allowed[place] = True
        row.place = place
        if self._offset is not None:
            self._offset[place] = 0
            self._write_offsets([(row, *each) for each in row.offsets()])

    def _write_masks(self, masks: list[tuple[Row, Future[Tensor]]]) -> None:
        """Wait for what grammars allow, and note it."""
        for row, mask in masks:
            assert self._allowed is not None
            self._allowed[row.place] = mask.result().to(self._allowed.device)

    def _write_offsets(self, offsets: list[tuple[Row, int, float]]) -> None:
        if offsets:
            assert self._offset is not None
            rows, tokens, values = zip(*offsets, strict=True)
            places = torch.tensor([row.place for row in rows], dtype=torch.int64, device=self._offset.device)
            ids = torch.tensor(tokens, dtype=torch.int64, device=self._offset.device)
            self._offset[places, ids] = torch.tensor(values, dtype=torch.float32, device=self._offset.device)

    def _draw(self, at: slice) -> None:
        """Let the rows of these places take their uniform numbers."""
        rows = self.rows[at]
        numbers = draws([row.sampling for row in rows], [row.generator for row in rows])
        self._uniform[at] = torch.tensor(numbers, dtype=torch.float64, device=self._uniform.device)

    def _step_for(self, places: int) -> tuple[DecodeStep, bool]:
        """The step of so many places, and whether it chooses as well, as part of a CUDA graph."""
        if self._grows:  # before a view is taken: one that grows would have tensors of its own
            self._state.reserve_(max(row.position for row in self.rows) + 1)
            lies = [tensor.data_ptr() for tensor in self._state.tensors().values()]
            if lies != self._lies:  # it has grown, here or for a row that came in
                self._steps.clear()
                self._lies = lies
        whole = self._uniform.is_cuda
        key = (places, self._kind()) if whole else places
        step = self._steps.pop(key, None)
        if step is None:
            then = partial(self._choose, places=places) if whole else None
            step = DecodeStep(self.model, self._state.head(places), then)
            if not whole and places > _RECORDED:
                step.kept = None
        self._steps[key] = step
        if not whole and len(self._steps) > _STEPS:
            del self._steps[next(iter(self._steps))]
        step.state.longest = max(row.position for row in self.rows)
        return step, whole

    def _kind(self) -> tuple[object, ...]:
        """What a graph that chooses has been made for: which filters there are, and how many tokens are reported."""
        filters = self._shown(len(self.rows))
        given = [getattr(filters, name) is not None for name in ("temperature", "top_k", "top_p", "min_p", "penalty")]
        return *given, filters.largest_k, _num_top(self.rows), _have_offsets(self.rows), _have_grammars(self.rows)

    def _shown(self, places: int) -> Filters:
        if places not in self._filters:
            self._filters[places] = self._columns.filters([row.sampling for row in self.rows], slice(0, places))
        return self._filters[places]

    def _choose(self, logits: Tensor, places: int) -> tuple[Chosen, Tensor]:
        """Nothing here waits for a GPU: there it is part of the graph of a step."""
        return self._choose_at(slice(0, places), logits, self._shown(places), self.rows), logits

    def _choose_at(self, at: slice, logits: Tensor, filters: Filters, rows: Sequence[Row]) -> Chosen:
        return choose(
            logits,
            filters,
            self._uniform[at],
            None if self._seen is None else self._seen[at],
            offset=self._offset[at] if self._offset is not None and _have_offsets(rows) else None,
            allowed=self._allowed[at] if self._allowed is not None and _have_grammars(rows) else None,
            num_top=_num_top(rows),
            first=None if logits.is_cuda else NUCLEUS_FIRST,
        )


def place_bytes(model: Griffin) -> tuple[int, int]:
    """What one place takes: its row of the state; and its columns, those of (N, V) too."""
    state = State.new(model.config, 1, model.activation_dtype, torch.device("meta"), "")
    columns = Columns(1, 1, torch.device("meta"))
    return state.nbytes, sum(column.nbytes for column in columns.tensors()) + 8 + 6 * model.config.vocab_size


def _bucket(rows: int) -> int:
    """Up to 8 the powers of 2, then four steps to the next, 10, 12, 14, 16, 20, 24 ...: a GPU's graph is dear."""
    power = 2 ** (rows - 1).bit_length()
    step = power if power <= 8 else power // 8
    return -(-rows // step) * step


def _num_top(rows: Sequence[Row]) -> int:
    return max((row.request.logprobs or 0 for row in rows), default=0)


def _have_offsets(rows: Sequence[Row]) -> bool:
    return any(row.has_offsets for row in rows)


def _have_grammars(rows: Sequence[Row]) -> bool:
    return any(row.matcher is not None for row in rows)
