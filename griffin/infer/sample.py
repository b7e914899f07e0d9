"""Choose the next token of each row; what a row gets depends on nothing but the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.errors import GriffinError

NUCLEUS_FIRST = 1024  # candidates that top-p looks at before it sorts the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Filters act in this order, which is Hugging Face's:

    repetition_penalty -> temperature -> top_k -> top_p -> min_p -> one draw from what is left, renormalised.

    (Some programs temper last: there the same top_p keeps another set.) Every filter keeps at least one token. Where
    tokens tie at a border, the lower ids stay.

    Raises:
        ValueError: a field is out of range.
    """

    temperature: float = 1.0  # logits are divided by it; 0 is greedy: the likeliest token, of equals the lowest id
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the fewest likeliest tokens whose probabilities sum to at least p
    min_p: float | None = None  # keep the tokens at least min_p times as likely as the likeliest
    # Logits of tokens that the text holds already are divided by it if positive, multiplied if negative
    # (CTRL, arXiv:1909.05858); above 1 discourages repetition.
    repetition_penalty: float | None = None
    seed: int | None = None  # None: a new one every time

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
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be within 0 .. {2**63 - 1}")

    def generator(self) -> torch.Generator:
        """Make the generator of one row. It is on the CPU wherever the model is, so that devices draw the same."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


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
    B, V = logits.shape
    if not 0 <= num_top <= V:
        raise ValueError(f"logprobs={num_top} alternatives asked for; the vocabulary has {V} tokens")
    logits = logits.float()
    for row, peak in enumerate(logits.amax(dim=-1).tolist() if B else []):
        if not math.isfinite(peak):  # NaN passes through amax
            raise GriffinError(
                f"row {row}: the largest logit is {peak}; the weights or the state hold NaN or infinity "
                "(fp16 overflows: load the model in bfloat16 or float32), or every token is forbidden"
            )
    scores = logits if seen is None else _penalise(logits, samplings, seen)
    ids = scores.argmax(dim=-1)  # the first of equals
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        some = scores if len(drawn) == B else scores[drawn]
        weights = _filtered(some, [samplings[row] for row in drawn])
        uniform = [torch.rand((), generator=generators[row], dtype=torch.float64).item() for row in drawn]
        ids[drawn] = _invert(weights, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    logprobs = (logits.gather(1, ids[:, None]) - normaliser)[:, 0]
    top: list[list[tuple[int, float]]] = [[] for _ in range(B)]
    if num_top:
        values, indices = logits.topk(num_top, dim=-1)
        pairs = zip(indices.tolist(), (values - normaliser).tolist(), strict=True)
        top = [list(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
    return Choice(ids.tolist(), logprobs.tolist(), top)


def _penalise(logits: Tensor, samplings: Sequence[Sampling], seen: Tensor) -> Tensor:
    penalty = _column([sampling.repetition_penalty or 1.0 for sampling in samplings], logits)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Unnormalised probabilities (B, V) fp64 after all filters; what they drop is 0, the likeliest is 1."""
    V = scores.shape[1]
    scores = scores.double()
    temperature = _column([sampling.temperature for sampling in samplings], scores)
    weights = torch.exp((scores - scores.amax(dim=-1, keepdim=True)) / temperature)
    if any(sampling.top_k is not None and sampling.top_k < V for sampling in samplings):
        counts = [min(sampling.top_k or V, V) for sampling in samplings]
        largest = weights.topk(max(count for count in counts if count < V), dim=-1).values
        weights = _keep_first(weights, largest, torch.tensor(counts, device=weights.device))
    if any(sampling.top_p is not None and sampling.top_p < 1 for sampling in samplings):
        weights = _nucleus(weights, _column([sampling.top_p or 1.0 for sampling in samplings], weights))
    if any(sampling.min_p for sampling in samplings):
        weights = weights.masked_fill(weights < _column([sampling.min_p or 0.0 for sampling in samplings], weights), 0)
    return weights


def _nucleus(weights: Tensor, p: Tensor) -> Tensor:
    """Keep the fewest largest weights whose sum is at least p (B, 1) of the whole; p = 1 keeps all."""
    V = weights.shape[1]
    wanted = p * weights.sum(dim=-1, keepdim=True)
    limited = p < 1
    for size in dict.fromkeys((min(NUCLEUS_FIRST, V), V)):
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


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first id whose cumulative weight is above uniform * total; its own weight is never 0."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    ids = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # rounding up to the total would leave the vocabulary
    return torch.minimum(ids, last)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
