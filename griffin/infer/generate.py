"""Prompts to text: read, choose, read what was chosen, until every row has stopped. One path, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

from griffin.errors import GriffinError
from griffin.infer.generation import Generation, Row, check_ids
from griffin.infer.prefill import Progress
from griffin.infer.request import Completion, Piece, Prompts, as_requests
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
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. Default: plain sampling, temperature 1.
            The penalty counts the tokens of this call, prompt included.
        seed: of every row, so that a prompt gets what it would get alone; one per prompt to get several answers to
            equal prompts; None for new ones each time.
        stop: strings that end a row. The text ends before them.
        stop_ids: ids that end a row, besides the tokenizer's.
        ignore_eos: go on after the tokenizer's stop ids; they are tokens like others then.
        logprobs: how many of the likeliest tokens to report at each step, 0 for the chosen one only; None for nothing.
        prefill_chunk: the most tokens of a prompt read at once: more is faster and takes more memory.
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
    generation = start(model, tokenizer, prompts, state, **options)
    return iter(generation) if stream else generation.completions()


def start(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    state: State | None = None,
    *,
    prefill_chunk: int = 512,
    progress: Progress | None = None,
    **options: Any,
) -> Generation:
    """Check the arguments of `generate`, and give what it iterates over. Nothing has been computed yet."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GriffinError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    requests = as_requests(tokenizer, prompts, bos=state is None, **options)
    check_ids([request.prompt for request in requests], model.config.vocab_size)
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")
    logprobs = options.get("logprobs")
    if logprobs is not None and not 0 <= logprobs <= model.config.vocab_size:
        raise ValueError(f"logprobs={logprobs} must be within 0 .. {model.config.vocab_size}, the vocabulary")
    rows = [Row(index, request, tokenizer) for index, request in enumerate(requests)]
    return Generation(
        model, rows, _rows_of(model, state, len(rows)), num_top=logprobs or 0, chunk=prefill_chunk, progress=progress
    )


def _rows_of(model: Griffin, state: State | None, count: int) -> State:
    """A state of `count` rows that belongs to the call: new, or copied from the caller's."""
    if state is None:
        return model.new_state(count)
    check_origin(state, model)
    if state.batch_size not in (1, count):
        raise GriffinError(f"the state has {state.batch_size} rows for {count} prompts; give one row, or one for each")
    return state.rows([0] * count if state.batch_size == 1 else range(count))
