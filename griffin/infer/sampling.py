"""Choose the next token of each row; what a row gets depends on nothing but the row.

Nothing in `choose` waits for the device, so that a CUDA graph can hold it; `read` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.errors import GriffinError
from griffin.infer.request import Sampling, TokenLogprob

NUCLEUS_FIRST = 1024  # candidates that top-p looks at before it sorts the whole vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """The samplings of B rows as columns on their logits' device. None: no row has this filter."""

    temperature: Tensor | None  # (B, 1) fp64, 1 where a row is greedy; None: all are
    greedy: Tensor  # (B,) bool
    top_k: Tensor | None  # (B,) int64, V where a row keeps all
    largest_k: int  # the largest of top_k below V
    top_p: Tensor | None  # (B, 1) fp64, 1 where a row keeps all
    min_p: Tensor | None  # (B, 1) fp64
    penalty: Tensor | None  # (B, 1) fp32

    @classmethod
    def of(cls, samplings: Sequence[Sampling], vocab_size: int, device: torch.device) -> Filters:
        columns = Columns(len(samplings), vocab_size, device)
        for row, sampling in enumerate(samplings):
            columns.set_(row, sampling)
        return columns.filters(samplings)


class Columns:
    """What `Filters` shows, for N places that rows come to and leave: written in place, neutral where none is wanted.

    Args:
        places: N.
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, places: int, vocab_size: int, device: torch.device) -> None:
        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((places, 1), value, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.temperature = full(1, torch.float64)
        self.greedy = full(1, torch.bool)
        self.top_k = full(vocab_size, torch.int64)
        self.top_p = full(1, torch.float64)
        self.min_p = full(0, torch.float64)
        self.penalty = full(1, torch.float32)

    def tensors(self) -> list[Tensor]:
        """All columns, each (N, 1)."""
        return [self.temperature, self.greedy, self.top_k, self.top_p, self.min_p, self.penalty]

    def set_(self, place: int, sampling: Sampling) -> None:
        self.temperature[place] = sampling.temperature or 1.0
        self.greedy[place] = sampling.temperature == 0
        self.top_k[place] = min(sampling.top_k or self.vocab_size, self.vocab_size)
        self.top_p[place] = sampling.top_p or 1.0
        self.min_p[place] = sampling.min_p or 0.0
        self.penalty[place] = sampling.repetition_penalty or 1.0

    def filters(self, samplings: Sequence[Sampling], places: slice | None = None) -> Filters:
        """Show the columns of the `places` (None: the first ones) where these samplings lie, without copying.

        A view may be longer than the samplings: rows beyond them are computed for nobody.
        """
        at, V = places or slice(0, len(samplings)), self.vocab_size
        counts = [s.top_k for s in samplings if s.top_k is not None and s.top_k < V]
        return Filters(
            temperature=None if all(s.temperature == 0 for s in samplings) else self.temperature[at],
            greedy=self.greedy[at, 0],
            top_k=self.top_k[at, 0] if counts else None,
            largest_k=max(counts, default=0),
            top_p=self.top_p[at] if any((s.top_p or 1) < 1 for s in samplings) else None,
            min_p=self.min_p[at] if any(s.min_p for s in samplings) else None,
            penalty=self.penalty[at] if any(s.repetition_penalty not in (None, 1.0) for s in samplings) else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """One token of each row; log-probabilities are the model's own, before any filter or temperature."""

    ids: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) fp32
    largest: Tensor  # (B,) fp32, the largest logit there was to choose: NaN or inf if any is, -inf if all are forbidden
    top_ids: Tensor  # (B, num_top) int64, the likeliest, best first
    top_logprobs: Tensor  # (B, num_top) fp32


def choose(
    logits: Tensor,
    filters: Filters,
    uniform: Tensor,
    seen: Tensor | None = None,
    *,
    offset: Tensor | None = None,
    allowed: Tensor | None = None,
    num_top: int = 0,
    first: int | None = None,
) -> Chosen:
    """Choose where the cumulative probability, in the order of ids, passes uniform; in greedy rows, the likeliest.

    Args:
        logits: (B, V) fp32; -inf forbids a token.
        filters: what is left of them, see `Sampling`.
        uniform: (B,) fp64 in [0, 1), one draw for each row.
        seen: (B, V) bool, the tokens that the penalty applies to; None means none.
        offset: (B, V) fp32, added after the penalty; -inf forbids a token. None means nothing.
        allowed: (B, V) bool, the tokens there are to choose from; None means all.
        num_top: how many of the likeliest tokens to report.
        first: candidates that top-p looks at before it sorts the whole vocabulary, which waits for the device to learn
            whether they are enough; None sorts at once.
    """
    scores = logits if seen is None or filters.penalty is None else penalised(logits, filters.penalty, seen)
    scores = scores if offset is None else scores + offset
    scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
    ids = scores.argmax(dim=-1)  # the first of equals
    if filters.temperature is not None:
        drawn = invert(weights_of(scores, filters, first), uniform)
        ids = torch.where(filters.greedy, ids, drawn)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    logprobs = (logits.gather(1, ids[:, None]) - normaliser)[:, 0]
    values, indices = logits.topk(num_top, dim=-1)
    return Chosen(ids, logprobs, scores.amax(dim=-1), indices, values - normaliser)


def penalised(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def weights_of(scores: Tensor, filters: Filters, first: int | None) -> Tensor:
    """Unnormalised probabilities (B, V) fp64 after all filters; what they drop is 0, the likeliest is 1."""
    assert filters.temperature is not None
    scores = scores.double()
    weights = torch.exp((scores - scores.amax(dim=-1, keepdim=True)) / filters.temperature)
    if filters.top_k is not None:
        weights = _keep_first(weights, weights.topk(filters.largest_k, dim=-1).values, filters.top_k)
    if filters.top_p is not None:
        weights = _nucleus(weights, filters.top_p, first)
    if filters.min_p is not None:
        weights = weights.masked_fill(weights < filters.min_p, 0)
    return weights


def _nucleus(weights: Tensor, p: Tensor, first: int | None) -> Tensor:
    """Keep the fewest largest weights whose sum is at least p (B, 1) of the whole; p = 1 keeps all."""
    V = weights.shape[1]
    wanted = p * weights.sum(dim=-1, keepdim=True)
    limited = p < 1
    for size in dict.fromkeys((V if first is None else min(first, V), V)):
        largest = weights.topk(size, dim=-1).values if size < V else weights.sort(dim=-1, descending=True).values
        below = largest.cumsum(dim=-1) < wanted
        if size == V or not bool((below[:, -1:] & limited).any()):
            break
    counts = (below.sum(dim=-1) + 1).clamp(max=size)
    return _keep_first(weights, largest, torch.where(limited[:, 0], counts, V))


def _keep_first(weights: Tensor, largest: Tensor, counts: Tensor) -> Tensor:
    """Keep the first counts (B,) of each row by (weight descending, id ascending), and set the others to 0.

    Args:
        weights: (B, V).
        largest: (B, N) the N largest weights in descending order; N >= counts, except where counts = V keeps all.
    """
    border = largest.gather(1, (counts - 1).clamp(max=largest.shape[1] - 1)[:, None])
    above, equal = weights > border, weights == border
    room = counts[:, None] - above.sum(dim=-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=-1) <= room)) | (counts == weights.shape[1])[:, None]
    return weights.masked_fill(~keep, 0)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first id whose cumulative weight is above uniform * total; its own weight is never 0."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    ids = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # rounding up to the total would leave the vocabulary
    return torch.minimum(ids, last).clamp(max=weights.shape[1] - 1)[:, 0]  # of NaN weights too


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens chosen; log-probabilities are the model's own, before any filter or temperature."""

    ids: list[int]  # (B,)
    logprobs: list[float]  # (B,) of `ids`
    top: list[list[tuple[int, float]]]  # (B, num_top) the likeliest (id, logprob), best first


@torch.no_grad()
def sample(
    logits: Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator],
    seen: Tensor | None = None,
    *,
    num_top: int = 0,
) -> Choice:
    """Choose one token per row.

    A row takes one uniform number from its generator (none if greedy) and finds the token where the cumulative
    probability, in the order of ids, passes it. So neither the other rows nor the device change its choice.

    Args:
        logits: (B, V) fp32; -inf forbids a token.
        samplings: (B,) one for each row.
        generators: (B,) CPU generators, advanced.
        seen: (B, V) bool, the tokens that repetition_penalty applies to; None means none.
        num_top: how many of the likeliest tokens to report.

    Raises:
        GriffinError: a row's logits hold NaN or inf, or forbid every token; the row is named.
        ValueError: num_top is not within 0 .. V.
    """
    V = logits.shape[1]
    if not 0 <= num_top <= V:
        raise ValueError(f"logprobs={num_top} alternatives asked for; the vocabulary has {V} tokens")
    filters = Filters.of(samplings, V, logits.device)
    uniform = torch.tensor(draws(samplings, generators), dtype=torch.float64, device=logits.device)
    return read(choose(logits.float(), filters, uniform, seen, num_top=num_top, first=NUCLEUS_FIRST))


def draws(samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> list[float]:
    """Take the uniform number of each row from its generator; greedy rows take none and get 0."""
    return [
        0.0
        if sampling.temperature == 0
        else torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
        for sampling, generator in zip(samplings, generators, strict=True)
    ]


def read(chosen: Chosen) -> Choice:
    """Bring a choice to the host, which waits for the device.

    Raises:
        GriffinError: a row's logits hold NaN or inf, or forbid every token; the row is named.
    """
    choice, faults = read_each(chosen)
    for row, fault in enumerate(faults):
        if fault is not None:
            raise GriffinError(f"row {row}: {fault}")
    return choice


def read_each(chosen: Chosen) -> tuple[Choice, list[str | None]]:
    """As `read`, and say what is wrong with each row; None: nothing. What was chosen for a wrong row means nothing."""
    faults = [_fault(largest) for largest in chosen.largest.tolist()]
    pairs = zip(chosen.top_ids.tolist(), chosen.top_logprobs.tolist(), strict=True)
    top = [list(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
    return Choice(chosen.ids.tolist(), chosen.logprobs.tolist(), top), faults


def _fault(largest: float) -> str | None:
    if math.isfinite(largest):  # NaN passes through amax
        return None
    if largest == -math.inf:
        return "every token is forbidden"
    return (
        f"the largest logit is {largest}; the weights or the state hold NaN or infinity "
        "(fp16 overflows: load the model in bfloat16 or float32)"
    )


def logprobs_of(logits: Tensor, ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """What logits (T, V) gave to T ids, and to the likeliest."""
    index = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    values = (logits.gather(1, index[:, None]) - normaliser)[:, 0].tolist()
    best, indices = logits.topk(num_top, dim=-1)
    tops = zip(indices.tolist(), (best - normaliser).tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(*top, strict=True)))
        for token, value, top in zip(ids, values, tops, strict=True)
    ]
