"""The loop behind `generate`: rows that read, choose and leave the batch when they are done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

from griffin.errors import GriffinError
from griffin.infer.prefill import Progress, prefill
from griffin.infer.request import Completion, FinishReason, Piece, Request, TokenLogprob
from griffin.infer.sampling import NUCLEUS_FIRST, Choice, Chosen, Filters, choose, draws, read
from griffin.infer.step import DecodeStep
from griffin.infer.stop import StopGate
from griffin.model import Griffin
from griffin.state import State
from griffin.tokenizer import Tokenizer


class Row:
    """One request on its way. It knows ids and text, and no tensors but its finished state.

    Args:
        index: of the prompt.
        request: what is asked.
        tokenizer: turns ids into text.
    """

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index, self.request, self.sampling = index, request, request.sampling
        self.generator = request.sampling.generator()
        self.gate = StopGate(request.stop)
        self.stream = tokenizer.stream()
        for token in request.prompt[-4:]:  # the text goes on in the middle: of a line, or of a character of 4 bytes
            self.stream.push(token)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.texts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.last_read = True  # whether the model has read the last of `tokens`
        self.state: State | None = None  # once it has left the batch

    def take(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Piece:
        """Add a chosen token, and say what it adds to the text."""
        if token in self.request.stop_ids:
            return self.piece((), self._end(), "stop")
        self.tokens.append(token)
        self.last_read = False
        if self.request.logprobs is not None:
            self.logprobs.append(TokenLogprob(token, logprob, tuple(top)))
        text = self.gate.push(self.stream.push(token))
        if self.gate.stopped:
            return self.piece((token,), text, "stop")
        if len(self.tokens) == self.request.max_tokens:
            return self.piece((token,), text + self._end(), "length")
        return self.piece((token,), text, None)

    def piece(self, tokens: tuple[int, ...], text: str, finish_reason: FinishReason | None) -> Piece:
        self.texts.append(text)
        self.finish_reason = finish_reason
        logprobs = (
            tuple(self.logprobs[len(self.logprobs) - len(tokens) :]) if self.request.logprobs is not None else None
        )
        return Piece(self.index, text, tokens, logprobs, finish_reason)

    def completion(self, state: State) -> Completion:
        """Give the completion so far, changing nothing; of an unfinished row, with the text that is still held back."""
        held = "" if self.finish_reason is not None else self._held()
        return Completion(
            text="".join(self.texts) + held,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt),
            state=state,
            unread=() if self.last_read else tuple(self.tokens[-1:]),
        )

    def _end(self) -> str:
        """The text that waited for more. The end of a character may still complete a stop string."""
        text = self.gate.push(self.stream.finish())
        return text if self.gate.stopped else text + self.gate.finish()

    def _held(self) -> str:
        """What `_end` would give now."""
        gate = copy(self.gate)
        text = gate.push(self.stream.unfinished())
        return text if gate.stopped else text + gate.finish()


class Generation:
    """An iterator of pieces over a batch. After it, or between any two pieces, `completion` says where a row stands.

    Args:
        model: the model.
        rows: one for each prompt.
        state: as many rows as there are prompts; it is advanced in place.
        num_top: how many of the likeliest tokens to report.
        chunk, progress: see `prefill`.
    """

    @torch.inference_mode(False)  # here and below: an iterator may be used inside the mode and outside it in turn
    @torch.no_grad()
    def __init__(
        self, model: Griffin, rows: list[Row], state: State, *, num_top: int, chunk: int, progress: Progress | None
    ) -> None:
        self.model, self.rows, self.num_top, self.chunk, self.progress = model, rows, num_top, chunk, progress
        self._places: list[Row | None] = list(rows)  # whose the rows of the state are; None: of one that has left
        self._state, self._keeps_places = state, state.position.is_cuda
        self._seen: Tensor | None = None
        if any(row.sampling.repetition_penalty not in (None, 1.0) for row in rows):
            self._seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=state.position.device)
            for index, row in enumerate(rows):
                self._seen[index, list(row.request.prompt)] = True
        self._gather()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def completions(self) -> list[Completion]:
        """Run to the end."""
        for _ in self._pieces:
            pass
        return [self.completion(row) for row in range(len(self.rows))]

    def completion(self, index: int) -> Completion:
        """Give the completion of a prompt as far as it is. Not before the first piece."""
        row = self.rows[index]
        return row.completion(row.state or self._state.rows([self._places.index(row)]))

    def _run(self) -> Iterator[Piece]:
        # No grad mode may be set here: it would last while the caller has the iterator. What computes sets its own.
        if not self.rows:
            return
        hidden = prefill(
            self.model,
            self._state,
            [list(row.request.prompt) for row in self.rows],
            chunk=self.chunk,
            progress=self.progress,
        )
        pieces = [row.piece((), "", "length") for row in self.rows if row.request.max_tokens == 0]
        choice = self._first(hidden[self._leave()])
        yield from pieces
        while any(self._places):
            pieces = [
                row.take(token, logprob, top)
                for row, token, logprob, top in zip(self._places, choice.ids, choice.logprobs, choice.top, strict=True)
                if row is not None
            ]
            going = self._leave()
            yield from pieces
            if going:
                choice = self._next([choice.ids[index] for index in going])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _first(self, hidden: Tensor) -> Choice:
        """Choose each row's first token."""
        if not len(hidden):
            return Choice([], [], [])
        self._draw()
        return read(self._choose(self.model.logits(hidden)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _next(self, ids: list[int]) -> Choice:
        """Let the model read one token of each row, and choose the next."""
        tokens = torch.tensor(ids, dtype=torch.int64, device=self._state.position.device)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        self._draw()
        choice = read(self._step(tokens))
        for row in self._places:
            if row is not None:
                row.last_read = True
        return choice

    def _draw(self) -> None:
        """Let each row take its uniform number."""
        numbers = [0.0 if row is None else draws([row.sampling], [row.generator])[0] for row in self._places]
        self._uniform.copy_(torch.tensor(numbers, dtype=torch.float64, device=self._uniform.device))

    def _choose(self, logits: Tensor) -> Chosen:
        """Nothing here waits for a GPU: there it is part of the graph of a step."""
        first = None if logits.is_cuda else NUCLEUS_FIRST
        return choose(logits, self._filters, self._uniform, self._seen, num_top=self.num_top, first=first)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _leave(self) -> list[int]:
        """Let finished rows leave the batch, and say which rows of it stay.

        On a GPU a batch of another size is another graph, so there rows that have left are kept, and computed for
        nobody, until they are half of the batch.
        """
        for index, row in enumerate(self._places):
            if row is not None and row.finish_reason is not None:
                row.state = self._state.rows([index])
                self._places[index] = None
        going = [index for index, row in enumerate(self._places) if row is not None]
        if len(going) == len(self._places) or (self._keeps_places and 2 * len(going) > len(self._places)):
            return list(range(len(self._places)))
        self._places = [self._places[index] for index in going]
        self._state = self._state.rows(going)
        self._seen = None if self._seen is None else self._seen[going]
        self._gather()
        return going

    def _gather(self) -> None:
        """Make what belongs to a batch of this composition."""
        rows = [row for row in self._places if row is not None]
        device = self._state.position.device
        self._filters = Filters.of([row.sampling for row in rows], self.model.config.vocab_size, device)
        self._uniform = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self._step = DecodeStep(self.model, self._state, self._choose)


def check_ids(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise GriffinError unless every prompt has tokens, all of them in 0 .. vocab_size - 1."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise GriffinError(f"prompt {index} has no tokens; give at least one (a text, or the tokenizer's BOS)")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                raise GriffinError(
                    f"prompt {index} has token {token}; the model's vocabulary is 0 .. {vocab_size - 1}: "
                    "encode it with the model's own tokenizer"
                )
