"""Choose the next token of each row; what a row gets depends on nothing but the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.errors import GriffinError
from griffin.infer.filters import Chosen, Filters, choose

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
    for row, largest in enumerate(chosen.largest.tolist()):
        if not math.isfinite(largest):  # NaN passes through amax
            raise GriffinError(
                f"row {row}: the largest logit is {largest}; the weights or the state hold NaN or infinity "
                "(fp16 overflows: load the model in bfloat16 or float32), or every token is forbidden"
            )
    pairs = zip(chosen.top_ids.tolist(), chosen.top_logprobs.tolist(), strict=True)
    top = [list(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
    return Choice(chosen.ids.tolist(), chosen.logprobs.tolist(), top)
