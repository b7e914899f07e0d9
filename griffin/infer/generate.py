"""Prompts to text: read, choose, read what was chosen, until every row has stopped. One path, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict, Unpack, overload

from griffin.errors import GriffinError
from griffin.infer.generation import Completion as Completion
from griffin.infer.generation import Generation, Row, check_ids
from griffin.infer.generation import Piece as Piece
from griffin.infer.generation import TokenLogprob as TokenLogprob
from griffin.infer.prefill import Progress
from griffin.infer.sample import Sampling
from griffin.model import Griffin
from griffin.state import State, check_origin
from griffin.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """The keyword arguments of `generate`, which explains them, for those who pass them on."""

    max_tokens: int | Sequence[int]
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prefill_chunk: int
    progress: Progress | None


Prompts = str | Sequence[str | Sequence[int]]


@overload
def generate(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    stream: Literal[False] = False,
    state: State | None = None,
    **options: Unpack[Options],
) -> list[Completion]: ...


@overload
def generate(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    stream: Literal[True],
    state: State | None = None,
    **options: Unpack[Options],
) -> Iterator[Piece]: ...


def generate(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    stream: bool = False,
    state: State | None = None,
    **options: Unpack[Options],
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
    """
    generation = start(model, tokenizer, prompts, state, **options)
    return iter(generation) if stream else generation.completions()


def start(
    model: Griffin,
    tokenizer: Tokenizer,
    prompts: Prompts,
    state: State | None = None,
    *,
    max_tokens: int | Sequence[int] = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prefill_chunk: int = 512,
    progress: Progress | None = None,
) -> Generation:
    """Check the arguments of `generate`, and give what it iterates over. Nothing has been computed yet."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GriffinError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    ids = [
        tokenizer.encode(prompt, bos=state is None) if isinstance(prompt, str) else _as_ids(index, prompt)
        for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts)
    ]
    check_ids(ids, model.config.vocab_size)
    limits = _per_prompt("max_tokens", max_tokens, len(ids))
    for limit in limits:
        if limit < 0:
            raise GriffinError(f"max_tokens={limit} must be 0 (only read the prompt) or more")
    seeds = [None] * len(ids) if seed is None else _per_prompt("seed", seed, len(ids))
    samplings = [
        Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=row_seed,
        )
        for row_seed in seeds
    ]
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    ends = frozenset(stop_ids) | (frozenset() if ignore_eos else frozenset(tokenizer.stop_ids))
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")
    if logprobs is not None and not 0 <= logprobs <= model.config.vocab_size:
        raise ValueError(f"logprobs={logprobs} must be within 0 .. {model.config.vocab_size}, the vocabulary")
    rows = [
        Row(index, prompt, limit, sampling, tokenizer, stops, ends, logprobs is not None)
        for index, (prompt, limit, sampling) in enumerate(zip(ids, limits, samplings, strict=True))
    ]
    return Generation(
        model, rows, _rows_of(model, state, len(ids)), num_top=logprobs or 0, chunk=prefill_chunk, progress=progress
    )


def _as_ids(index: int, prompt: object) -> list[int]:
    if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
        raise ValueError(
            f"prompts[{index}] is {prompt!r:.60}; give texts or sequences of ids: prompts=[[2, 45, 17]] is one of ids"
        )
    return list(prompt)


def _per_prompt(name: str, value: int | Sequence[int], count: int) -> list[int]:
    if isinstance(value, int):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} numbers for {count} prompts; give one number, or one per prompt")
    return list(value)


def _rows_of(model: Griffin, state: State | None, count: int) -> State:
    """A state of `count` rows that belongs to the call: new, or copied from the caller's."""
    if state is None:
        return model.new_state(count)
    check_origin(state, model)
    if state.batch_size not in (1, count):
        raise GriffinError(f"the state has {state.batch_size} rows for {count} prompts; give one row, or one for each")
    return state.rows([0] * count if state.batch_size == 1 else range(count))
