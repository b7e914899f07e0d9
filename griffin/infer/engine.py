"""Requests of many, read and answered together by one model: queue, admission, and what a turn may cost.

One thread owns an engine and lets it turn; any thread submits, cancels and reads pieces. It touches no tensor: `Batch`
and `read_chunk` do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from griffin.errors import GriffinError, one_line
from griffin.infer.answered import Answered
from griffin.infer.batch import Batch, Held, place_bytes
from griffin.infer.capacity import capacity, total_bytes
from griffin.infer.grammar import Grammars
from griffin.infer.handle import Handle
from griffin.infer.pace import Pace, share
from griffin.infer.queue import Queue
from griffin.infer.reader import Reader, read
from griffin.infer.request import Completion, FinishReason, Piece, Request, Sampling, check_ids
from griffin.infer.row import Row
from griffin.model import Griffin
from griffin.state import State, check_origin
from griffin.tokenizer import Tokenizer

EVERY = 128  # tokens between states that are kept

_log = logging.getLogger(__name__)


class Refused(GriffinError):  # noqa: N818  (a decision, not a fault)
    """A request was not taken: the engine is full, or closed. The message says which, with the numbers."""


class Snapshots(Protocol):
    """What an engine asks of whoever keeps states of texts that have been read."""

    def find(self, tokens: Sequence[int], tenant: str) -> tuple[int, Held] | None:
        """Give the longest beginning of `tokens` that is kept: how many tokens, and what to go on from.

        It may be all of them if its logits are known. What is returned is the caller's own.
        """

    def keep(self, tokens: Sequence[int], held: Held, tenant: str, *, lasting: bool) -> None:
        """Keep a copy of what has read `tokens`. `lasting`: texts part here; else it is on the way to such a place."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine has done since it was made."""

    requests: int  # that were taken
    refused: int
    completed: int  # that ended by themselves: a stop, or max_tokens
    cancelled: int  # by `cancel`, or by their deadline
    failed: int  # ended with "error"
    tokens_read: int  # of prompts
    tokens_from_snapshots: int  # of prompts, that were not read again
    tokens_generated: int
    tokens_guessed: int  # by speculation
    tokens_accepted: int  # of them
    turns: int


class Engine:
    """Answer requests with N slots: rows of one state, made at the start and never exceeded.

    A turn reads one chunk of the prompts that have been admitted, then lets every row that has been read take one
    token. A request's tokens depend on nothing but the request: not on its neighbours, on when they come and leave, or
    on the chunks its prompt is read in (up to the rounding of sums).

        engine = griffin.Engine(model, tokenizer, slots=8)
        engine.start()
        handle = engine.submit(Request(prompt=ids, max_tokens=100))
        for piece in handle:
            print(piece, end="", flush=True)
        engine.close()

    Args:
        model: the model.
        tokenizer: its tokenizer.
        slots: N, the rows that decode at once.
        max_bytes: instead of slots: N is what fits, counting the slots and the states of prompts being read, not the
            weights nor what one chunk or one step takes.
        gap: seconds that may pass between two tokens of a row while a prompt is read: the chunk is chosen by what
            chunks and steps have taken. Infinite: prompts are read to their end first.
        chunk: the most tokens of a prompt read at once.
        max_queue: the most requests that wait.
        max_queue_tokens: the most tokens of prompts that wait; None: a million.
        snapshots: keeps states of texts that have been read; None: nothing is kept.
        speculate: let a row that decodes alone guess what comes next from what its text holds already, where that pays.
            The tokens are the same, up to the rounding of sums: several read at once are summed in another order.
        poison: fill freed slots with NaN, for tests.

    Raises:
        GriffinError: the tokenizer is another model's.
        ValueError: an argument is out of range, or max_bytes holds no slot.
    """

    def __init__(
        self,
        model: Griffin,
        tokenizer: Tokenizer,
        *,
        slots: int | None = None,
        max_bytes: int | None = None,
        gap: float = 0.25,
        chunk: int = 512,
        max_queue: int = 64,
        max_queue_tokens: int | None = None,
        snapshots: Snapshots | None = None,
        speculate: bool = False,
        poison: bool = False,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise GriffinError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        if chunk < 1:
            raise ValueError(f"prefill_chunk={chunk} must be at least 1")
        if not gap > 0:
            raise ValueError(f"gap={gap} must be a positive number of seconds")
        self.model, self.tokenizer, self.snapshots = model, tokenizer, snapshots
        self.slots, self.readers = capacity(model, slots, max_bytes)
        keep = None if snapshots is None else self._keep_row
        self._batch = Batch(model, self.slots, keep=keep, every=EVERY, speculate=speculate, poison=poison)
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self._pace = Pace(gap, chunk)
        self._changed = threading.Condition()  # guards what follows
        self._queue: Queue[State | Held | Answered | None] = Queue(
            max_queue, 2**20 if max_queue_tokens is None else max_queue_tokens
        )
        self._closed = False
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None  # what ended it
        self._readers: list[Reader] = []  # the owner's, as are the batch and the counts
        self._handles: dict[Row, Handle] = {}  # of the batch
        self._counts = dict.fromkeys(Stats.__slots__, 0)
        _log.info(self.describe())

    def describe(self) -> str:
        """Say how many slots there are, and what they take."""
        state, columns = place_bytes(self.model)
        return (
            f"{self.slots} slots of {state + columns:,} bytes and {self.readers} prompts of {state:,} read at once: "
            f"{total_bytes(self.model, self.slots, self.readers):,} bytes"
        )

    @property
    def busy(self) -> int:
        """Slots in use, or promised to a prompt that is being read."""
        return len(self._batch.rows) + sum(reader.handle.request.n for reader in self._readers)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.requests

    @property
    def max_queue(self) -> int:
        return self._queue.max_requests

    @property
    def max_queue_tokens(self) -> int:
        return self._queue.max_tokens

    def stats(self) -> Stats:
        guesses = {"tokens_guessed": self._batch.guessed, "tokens_accepted": self._batch.accepted}
        return Stats(**{**self._counts, **guesses})

    def submit(
        self,
        request: Request,
        *,
        tenant: str = "",
        state: Held | State | Answered | None = None,
        deadline: float | None = None,
        keep_state: bool = True,
        index: int = 0,
    ) -> Handle:
        """Queue a request. From any thread.

        Args:
            request: what is asked.
            tenant: who asks: turns are shared among tenants, not among requests, and snapshots are a tenant's own.
            state: what has been read before the prompt, one row; it is copied when the request's turn comes, so leave
                it as it is. With a `Held` that has logits, the prompt may be empty. An `Answered` goes on with its
                answer, and `request` is its own; pieces have what is new, completions the whole answer.
            deadline: seconds from now after which it ends where it is, with finish_reason "deadline".
            keep_state: whether completions are to have their state.
            index: what the pieces bear as `row`.

        Raises:
            Refused: the queue is full, or the engine is closed.
            GriffinError: the prompt has no tokens or ids the model does not have, the state is another model's, or the
                grammar is none.
            ValueError: an option does not fit the model or the engine.
        """
        self._check(request, state)
        matcher = None if request.grammar is None else self._grammars.matcher(request.grammar)
        handle = Handle(request, index, tenant, deadline)
        handle.rows = tuple(
            Row(
                index + answer,
                request,
                _seeded(request, answer),
                self.tokenizer,
                matcher=None if matcher is None else matcher.twin(),
                keep_state=keep_state,
            )
            for answer in range(request.n)
        )
        if isinstance(state, Answered):
            state.replay_(handle.rows[0])
        with self._changed:
            self._admissible(len(request.prompt))
            self._queue.put(handle, state)
            self._counts["requests"] += 1
            self._changed.notify_all()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Let a request end where it is. Its slot is free after the next turn. From any thread."""
        with self._changed:
            handle.cancelled = True
            self._changed.notify_all()

    def turn(self) -> bool:
        """Read one chunk, and let every row take one token. False: there was nothing to do. The owner's thread.

        Raises:
            Exception: what computing it raised. Every request ends with it, and the engine with them.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._turn()
        except BaseException as error:
            self._fail(error)
            raise

    def run(self) -> None:
        """Turn until the engine is closed and everything has been answered; sleep while there is nothing to do."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_work())
                if self._closed and not self._has_work():
                    return
            self.turn()

    def start(self) -> None:
        """Let a thread of its own `run`."""

        def run() -> None:
            try:
                self.run()
            except Exception:  # every handle has it, and `error`
                _log.exception("the engine has ended")

        self._thread = threading.Thread(target=run, name="griffin-engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True) -> None:
        """Take no more requests; answer those there are (or, without `drain`, cancel them), and end."""
        with self._changed:
            self._closed = True
            if not drain:
                for handle in self._all():
                    handle.cancelled = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        elif self.error is None:
            self.run()

    def _check(self, request: Request, state: Held | State | Answered | None) -> None:
        vocab_size = self.model.config.vocab_size
        if request.prompt or state is None or isinstance(state, State | Answered) or state.logits is None:
            check_ids([request.prompt], vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            if (wanted := getattr(request, name)) is not None and not 0 <= wanted <= vocab_size:
                raise ValueError(f"{name}={wanted} must be within 0 .. {vocab_size}, the vocabulary")
        for token in (*(request.sampling.logit_bias or ()), *(request.stop_ids if request.min_tokens else ())):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token {token}, whose logit is to be changed (logit_bias; min_tokens and stop_ids), "
                    f"is not in the vocabulary, 0 .. {vocab_size - 1}"
                )
        if request.n > self.slots:
            raise ValueError(f"n={request.n} answers do not fit {self.slots} slots")
        if isinstance(state, Answered) and state.request is not request:
            raise GriffinError("an answer goes on with the request it was given; submit(answered.request, ...)")
        if state is not None:
            rows = state if isinstance(state, State) else state.state
            check_origin(rows, self.model)
            if rows.batch_size != 1:
                raise GriffinError(f"the state has {rows.batch_size} rows; a request goes on from one")

    def _admissible(self, tokens: int) -> None:
        """Raise Refused unless there is room in the queue."""
        reason = None
        if self.error is not None:
            reason = f"the engine has ended: {one_line(self.error)}"
        elif self._closed:
            reason = "the engine is closed"
        else:
            reason = self._queue.full(tokens)
        if reason is not None:
            self._counts["refused"] += 1
            raise Refused(reason)

    def _all(self) -> list[Handle]:
        """Every request that has not ended."""
        return (
            [*self._queue] + [reader.handle for reader in self._readers] + list(dict.fromkeys(self._handles.values()))
        )

    def _has_work(self) -> bool:
        return bool(self._queue.requests or self._readers or self._batch.rows)

    def _turn(self) -> bool:
        with self._changed:
            ended = self._over()
        for handle, reason in ended:
            self._end(handle, reason)
        with self._changed:
            admitted = self._admit()
        for handle, state in admitted:
            self._begin(handle, state)
        if not (ended or self._readers or self._batch.rows):
            return False
        self._counts["turns"] += 1
        self._read()
        if self._batch.rows and not (self._readers and self._pace.prompts_first):
            began = time.perf_counter()
            self._deliver(self._batch.step())
            self._pace.stepped(time.perf_counter() - began)
        return True

    def _over(self) -> list[tuple[Handle, FinishReason]]:
        """Take those out of the queue that are cancelled or late, and name them and those that have begun."""
        now, ended = time.monotonic(), list[tuple[Handle, FinishReason]]()
        for handle in self._all():
            if handle.cancelled:
                ended.append((handle, "cancelled"))
            elif handle.ends_at is not None and now >= handle.ends_at:
                ended.append((handle, "deadline"))
        self._queue.remove({handle for handle, _ in ended})
        return ended

    def _admit(self) -> list[tuple[Handle, State | Held | Answered | None]]:
        """Take requests from the queue while there are slots for their answers."""
        free, admitted = self.slots - self.busy, list[tuple[Handle, State | Held | Answered | None]]()
        while len(self._readers) + len(admitted) < self.readers and (taken := self._queue.take(free)) is not None:
            free -= taken[0].request.n
            admitted.append(taken)
        return admitted

    def _begin(self, handle: Handle, state: State | Held | Answered | None) -> None:
        """Give a prompt its state: new, the caller's, or one that has read the beginning of it."""
        tokens, logits = handle.request.prompt, None
        handle.resumes = state is not None
        if state is None and self.snapshots is not None and handle.request.prompt_logprobs is None:
            found = self.snapshots.find(tokens, handle.tenant)
            if found is not None:
                count, state = found
                tokens = tokens[count:]
                self._counts["tokens_from_snapshots"] += count
                handle.from_snapshots = count
        if isinstance(state, Answered):
            tokens, state = state.unread, state.state
        elif state is not None and not isinstance(state, State):
            logits, state = None if tokens else state.logits, state.state
        own = self.model.new_state(1) if state is None else state.clone() if handle.resumes else state
        for row in handle.rows:
            row.position = int(own.position[0])
            if row.tail is not None and row.tokens:
                row.tail.state, row.tail.num_read = own.clone(), len(row.tokens) - len(tokens)
        keeps = self.snapshots is not None and not handle.resumes
        edges = self._edges(len(handle.request.prompt), handle.request.borders) if keeps else ()
        self._readers.append(Reader(handle, own, tokens, edges, None if logits is None else logits[None]))

    def _read(self) -> None:
        """Read a chunk, and let the prompts that have been read to their end join the batch."""
        unread = [reader for reader in self._readers if reader.tokens]
        counts = share(
            [reader.handle.tenant for reader in unread],
            [reader.limit() for reader in unread],
            self._pace.tokens(decoding=bool(self._batch.rows)),
            self._pace.chunk,
        )
        if total := sum(counts):
            began = time.perf_counter()
            reading = [(reader, count) for reader, count in zip(unread, counts, strict=True) if count]
            read(self.model, [reader for reader, _ in reading], [count for _, count in reading])
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            self._pace.read(total, time.perf_counter() - began)
            self._counts["tokens_read"] += total
            for reader, _ in reading:
                if reader.at in reader.edges:
                    row, borders = reader.handle.rows[0], reader.handle.request.borders
                    self._keep(reader.handle, row, Held(reader.state, None), lasting=reader.at in borders)
        self._join([reader for reader in self._readers if reader.logits is not None])

    def _edges(self, prompt: int, borders: Sequence[int]) -> tuple[int, ...]:
        """Where in a prompt states are kept: at its borders, and at multiples of EVERY tokens in its last window."""
        first = max(0, prompt - (self.model.config.window or prompt)) // EVERY + 1
        return tuple(sorted({*(at for at in borders if 0 < at < prompt), *range(first * EVERY, prompt, EVERY)}))

    def _join(self, readers: list[Reader]) -> None:
        """Let prompts that have been read to their end have their first tokens."""
        joining: list[tuple[Row, State, torch.Tensor]] = []
        for reader in readers:
            self._readers.remove(reader)
            assert reader.logits is not None
            rows = reader.handle.rows
            self._handles |= dict.fromkeys(rows, reader.handle)
            if self.snapshots is not None:
                self._keep(reader.handle, rows[0], Held(reader.state, reader.logits[0]), lasting=True)
            if reader.handle.request.max_tokens:
                joining += [(row, reader.state, reader.logits) for row in rows]
                continue
            for row in rows:
                row.state = reader.state.clone() if row.keep_state else None
            self._deliver([(row, row.piece((), "", "length")) for row in rows])
        if joining:
            rows, states, logits = zip(*joining, strict=True)
            self._deliver(self._batch.join(rows, states, torch.cat(logits)))

    def _keep_row(self, row: Row, held: Held) -> None:
        self._keep(self._handles[row], row, held, lasting=row.finish_reason is not None)

    def _keep(self, handle: Handle, row: Row, held: Held, *, lasting: bool) -> None:
        """Let the keeper have what a row has read, if that began with its prompt."""
        if self.snapshots is not None and not handle.resumes:
            text = (*row.request.prompt, *row.tokens[: row.shown()[0]])[: row.position]
            self.snapshots.keep(text, held, handle.tenant, lasting=lasting)

    def _deliver(self, pieces: list[tuple[Row, Piece]]) -> None:
        for row, piece in pieces:
            handle = self._handles[row]
            if piece.finish_reason is not None:
                del self._handles[row]
                self._count(piece.finish_reason)
            self._counts["tokens_generated"] += len(piece.tokens)
            handle.deliver(piece)

    def _count(self, finish_reason: FinishReason) -> None:
        name = {"cancelled": "cancelled", "deadline": "cancelled", "error": "failed"}.get(finish_reason, "completed")
        self._counts[name] += 1

    def _end(self, handle: Handle, reason: FinishReason) -> None:
        """End what is left of a request, wherever it stands."""
        self._readers = [reader for reader in self._readers if reader.handle is not handle]
        for row in handle.rows:
            if row.finish_reason is not None:
                continue
            self._handles[row] = handle
            piece = row.end(reason)
            if row.place is not None:
                self._batch.end(row)
            self._deliver([(row, piece)])

    def completion(self, handle: Handle, answer: int = 0) -> Completion:
        """Give an answer as far as it is, changing nothing. The owner's thread, between turns."""
        row = handle.rows[answer]
        return row.completion(row.state if row.place is None else self._batch.state_of(row))

    def _fail(self, error: BaseException) -> None:
        """End everything with an error."""
        with self._changed:
            self.error, handles = error, self._all()
            self._queue.clear()
            self._changed.notify_all()
        self._readers.clear()
        self._handles.clear()
        self._batch.rows.clear()
        for handle in handles:
            handle.fail(error, one_line(error))


def _seeded(request: Request, answer: int) -> Sampling:
    """How the answer-th of `n` answers chooses: with a seed of its own."""
    sampling = request.sampling
    return sampling if sampling.seed is None or not answer else replace(sampling, seed=sampling.seed + answer)
