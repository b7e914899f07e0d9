"""Prompts to text: an engine with as many slots as prompts, run until it is empty. One path, streamed or not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from griffin.errors import GriffinError
from griffin.infer.engine import Engine
from griffin.infer.handle import Handle
from griffin.infer.prefill import Progress
from griffin.infer.request import Completion, Piece, Prompts, as_requests, check_ids
from griffin.model import Griffin
from griffin.state import State, check_origin
from griffin.tokenizer import Tokenizer


@overload
def generate(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    stream: Literal[False] = False,
    state: State | None = None,
    **options: Any,
) -> list[Completion]: ...


@overload
def generate(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    stream: Literal[True],
    state: State | None = None,
    **options: Any,
) -> Iterator[Piece]: ...


def generate(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    stream: bool = False,
    state: State | None = None,
    **options: Any,
) -> list[Completion] | Iterator[Piece]:
    """Continue each prompt.

    A row's tokens depend on its prompt, its seed and the options alone: not on the other rows, their order, or
    prefill_chunk (up to the rounding of sums, which may decide between tokens that are all but equally likely).

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: a text, or a list of texts and sequences of ids. A text is encoded with BOS, without if a `state` is
            given: then it goes on from there. Ids are taken as they are.
        stream: give pieces as they come instead of completions at the end.
        state: what has been read before the prompts: one row for each of them, or one for all. It is copied, not
            changed.
        max_tokens: the most tokens to generate, or one number per prompt. 0 only reads the prompt.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias: see
            `Sampling`. Default: plain sampling, temperature 1. The repetition penalty counts the tokens of this call,
            prompt included.
        seed: of every row, so that a prompt gets what it would get alone; one per prompt to get several answers to
            equal prompts; None for new ones each time.
        stop: strings that end a row. The text ends before them.
        stop_ids: ids that end a row, besides the tokenizer's.
        ignore_eos: go on after the tokenizer's stop ids; they are tokens like others then.
        logprobs: how many of the likeliest tokens to report at each step, 0 for the chosen one only; None for nothing.
        prompt_logprobs, min_tokens, grammar: see `Request`.
        prefill_chunk: the most tokens of a prompt read at once: more is faster and takes more memory.
        speculate: guess what comes next from what the text holds already, where that pays (one prompt alone).
        progress: called before the first chunk of the prompts and after each, with tokens read and tokens in all.

    Returns:
        One `Completion` per prompt; with stream=True, an iterator of `Piece`, whose str() is its text:

            for piece in generate(model, tokenizer, "Once", stream=True):
                print(piece, end="", flush=True)

    Raises:
        GriffinError: a prompt has no tokens or ids the model does not have; the tokenizer or the state is another
            model's.
        ValueError: an option is out of range.
        TypeError: there is no such option.
    """
    run = start(model, tokenizer, prompts, state, **options)
    return iter(run) if stream else run.completions()


class Run:
    """Requests on an engine of their own: an iterator of pieces. Between any two, `completion` says where a row stands.

    Args:
        engine: with a slot for each request, and prompts first.
        handles: of the requests, in the order of the prompts.
        progress: see `generate`.
    """

    def __init__(self, engine: Engine, handles: list[Handle], progress: Progress | None) -> None:
        self.engine, self.handles, self.progress = engine, handles, progress
        self._ready: deque[Piece] = deque()
        for handle in handles:
            handle.add_listener(self._ready.append)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def completions(self) -> list[Completion]:
        """Run to the end."""
        for _ in self._pieces:
            pass
        return [handle.completion() for handle in self.handles]

    def completion(self, index: int) -> Completion:
        """Give the completion of a prompt as far as it is."""
        return self.engine.completion(self.handles[index])

    def _run(self) -> Iterator[Piece]:
        # No grad mode may be set here: it would last while the caller has the iterator. A turn sets its own.
        total, read = sum(len(handle.request.prompt) for handle in self.handles), -1
        while True:
            if self.progress is not None and read < (done := self.engine.stats().tokens_read):
                self.progress(done, total)
                read = done
            while self._ready:
                piece = self._ready.popleft()
                if piece.finish_reason == "error":
                    raise GriffinError(f"prompt {piece.row}: {piece.reason}")
                yield piece
            if not self.engine.turn():
                return


def start(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    state: State | None = None,
    *,
    prefill_chunk: int = 512,
    progress: Progress | None = None,
    speculate: bool = False,
    **options: Any,
) -> Run:
    """Check the arguments of `generate`, and give what it iterates over. Nothing has been computed yet."""
    requests = as_requests(tokenizer, prompts, bos=state is None, **options)
    engine = Engine(
        model,
        tokenizer,
        slots=max(1, len(requests)),
        gap=math.inf,
        chunk=prefill_chunk,
        speculate=speculate,
        max_queue=len(requests),
        max_queue_tokens=sum(len(request.prompt) for request in requests),
    )
    check_ids([request.prompt for request in requests], model.config.vocab_size)
    rows = _rows_of(model, state, len(requests))
    handles = [
        engine.submit(request, state=row, index=index)
        for index, (request, row) in enumerate(zip(requests, rows, strict=True))
    ]
    return Run(engine, handles, progress)


def _rows_of(model: Griffin, state: State | None, count: int) -> Sequence[State | None]:
    """For each prompt, what it goes on from: nothing, the caller's one row, or a copy of its own."""
    if state is None:
        return [None] * count
    check_origin(state, model)
    if state.batch_size not in (1, count):
        raise GriffinError(f"the state has {state.batch_size} rows for {count} prompts; give one row, or one for each")
    return [state] * count if state.batch_size == 1 else [state.rows([index]) for index in range(count)]
