"""What is asked of a model, and what it gives: how tokens are chosen, a request, its pieces, its completion.

The library, the commands and whatever serves a model build the same `Sampling` and `Request`. An option of sampling is
one field here, its help beside it, and its arithmetic in `griffin.infer.sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from griffin.errors import GriffinError

if TYPE_CHECKING:
    import torch

    from griffin.infer.grammar import Grammar
    from griffin.state import State
    from griffin.tokenizer import Tokenizer

# A stop id or string; max_tokens; `Engine.cancel`; its time was over; the piece and the completion say what was wrong.
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
Prompts = str | Sequence[str | Sequence[int]]


def _option(default: Any, text: str) -> Any:
    """A field with the help that commands show of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Filters act in this order, which is Hugging Face's:

    repetition_penalty -> presence_penalty, frequency_penalty -> logit_bias -> temperature -> top_k -> top_p -> min_p
    -> one draw from what is left, renormalised.

    (Some programs temper last: there the same top_p keeps another set.) Every filter keeps at least one token. Where
    tokens tie at a border, the lower ids stay.

    Raises:
        ValueError: a field is out of range.
    """

    # Logits are divided by it; 0 is greedy: the likeliest token, of equals the lowest id.
    temperature: float = _option(1.0, "0 always takes the likeliest token; higher is more varied.")
    top_k: int | None = _option(None, "Choose among the k likeliest tokens.")
    # The fewest likeliest tokens whose probabilities sum to at least p.
    top_p: float | None = _option(None, "Choose among the likeliest tokens that sum to this probability.")
    min_p: float | None = _option(None, "Drop tokens less likely than this times the likeliest.")
    # Logits of tokens that the text holds already are divided by it if positive, multiplied if negative
    # (CTRL, arXiv:1909.05858).
    repetition_penalty: float | None = _option(None, "Above 1 discourages tokens that are in the text already.")
    # p and f: the logit of a token that was chosen c > 0 times so far becomes logit - p - f c (OpenAI's API).
    presence_penalty: float | None = _option(None, "Above 0 discourages tokens that the answer has.")
    frequency_penalty: float | None = _option(None, "Above 0 discourages tokens by how often the answer has them.")
    # Of some ids: added to their logits; -inf forbids one.
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = _option(None, "The same seed gives the same text. Default: a new one each time.")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be within 0 .. 1")
        if self.repetition_penalty is not None and not (
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        ):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be a positive number (1 is none)")
        for name in ("presence_penalty", "frequency_penalty"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a number (0 is none)")
        for token, value in (self.logit_bias or {}).items():
            if not value < math.inf:
                raise ValueError(f"logit_bias of token {token} is {value}; it must be a number, or -inf to forbid it")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be within 0 .. {2**63 - 1}")

    def generator(self) -> torch.Generator:
        """Make the generator of one row. It is on the CPU wherever the model is, so that devices draw the same."""
        import torch  # --help need not wait for it

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued.

    Raises:
        GriffinError: max_tokens is negative.
    """

    prompt: tuple[int, ...]  # ids
    max_tokens: int = 128  # the most tokens to choose; 0 only reads the prompt
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # strings that end it; the text ends before them
    stop_ids: frozenset[int] = frozenset()  # ids that end it
    logprobs: int | None = None  # how many of the likeliest tokens to report, 0 for the chosen one only; None: nothing
    prompt_logprobs: int | None = None  # the same of the prompt's own tokens
    min_tokens: int = 0  # before so many, stop_ids cannot be chosen
    grammar: Grammar | None = None  # what the answer must match
    borders: tuple[int, ...] = ()  # after how many tokens of the prompt another may part from it: messages' ends
    n: int = 1  # answers to it: the prompt is read once; of a given seed, they have seed, seed + 1 ...

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise GriffinError(f"max_tokens={self.max_tokens} must be 0 (only read the prompt) or more")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise GriffinError(f"min_tokens={self.min_tokens} must be within 0 .. max_tokens={self.max_tokens}")
        if self.n < 1:
            raise GriffinError(f"n={self.n} answers must be at least 1")


def as_requests(
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    bos: bool,
    max_tokens: int | Sequence[int] = 128,
    seed: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    min_tokens: int = 0,
    grammar: Grammar | None = None,
    **sampling: Any,
) -> list[Request]:
    """Build the requests of one call: `griffin.generate` explains the options.

    Args:
        tokenizer: turns texts into ids.
        prompts: a text, or a list of texts and sequences of ids.
        bos: whether texts begin with BOS.
        sampling: fields of `Sampling`.

    Raises:
        GriffinError, ValueError: a prompt or an option is not what it must be.
        TypeError: there is no such option.
    """
    known = {each.name for each in fields(Sampling)}
    if unknown := sorted(sampling.keys() - known):
        others = (
            "max_tokens stop stop_ids ignore_eos logprobs prompt_logprobs min_tokens grammar prefill_chunk progress"
        )
        names = sorted(known | set(others.split()))
        raise TypeError(f"there is no option {', '.join(unknown)}; there are {', '.join(names)}")
    ids = [
        tokenizer.encode(prompt, bos=bos) if isinstance(prompt, str) else _as_ids(index, prompt)
        for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts)
    ]
    limits = _per_prompt("max_tokens", max_tokens, len(ids))
    seeds = [None] * len(ids) if seed is None else _per_prompt("seed", seed, len(ids))
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    ends = frozenset(stop_ids) | (frozenset() if ignore_eos else frozenset(tokenizer.stop_ids))
    return [
        Request(
            prompt=tuple(prompt),
            max_tokens=limit,
            sampling=Sampling(seed=row_seed, **sampling),
            stop=stops,
            stop_ids=ends,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            min_tokens=min_tokens,
            grammar=grammar,
        )
        for prompt, limit, row_seed in zip(ids, limits, seeds, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model itself, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest (token, logprob), best first


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to one row. The texts of a row's pieces, joined, are its completion's text."""

    row: int  # index of the prompt; of an engine's, the handle's `index` and on, for each of `n` answers one
    text: str  # whole characters only; may be "" while a character or a stop string is unfinished
    tokens: tuple[int, ...]  # none if a stop id was chosen
    logprobs: tuple[TokenLogprob, ...] | None  # of `tokens`; None unless asked for
    finish_reason: FinishReason | None  # None: more pieces of this row follow
    reason: str | None = None  # in words, where finish_reason is "error"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for one prompt, and what it takes to go on from there."""

    text: str  # without the stop string, and nothing after it
    tokens: tuple[int, ...]  # all that were chosen, those of a stop string too; a stop id that ended it is not here
    logprobs: tuple[TokenLogprob, ...] | None  # of `tokens`; None unless asked for
    finish_reason: FinishReason | None  # None: interrupted
    prompt_tokens: int
    # One row that has read what is shown, the prompt and `text`, except `unread`: nothing of a stop string. None: it
    # was not to be kept, or the prompt was not read to its end.
    state: State | None = field(repr=False)
    # The end of what is shown: the last of `tokens`, chosen and not read; or ids of the text before a stop string that
    # began within a token. To go on: generate(..., [[*unread, *more]], state=state).
    unread: tuple[int, ...]
    # Of the prompt's tokens, None for one that nothing was known before: the first. None unless asked for.
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    reason: str | None = None  # in words, where finish_reason is "error"


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
