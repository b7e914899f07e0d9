"""What a claim came to, computed from results and thresholds that were written down before there were any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["reproduced", "not reproduced", "not testable at this scale", "not run yet"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    text: str  # what the paper says
    threshold: str  # what would show it
    measured: str  # what came out
    outcome: Outcome
    variation: bool = False  # not the paper's: shown beside its claims, and no part of their verdict


def judge(text: str, threshold: str, measured: str, holds: bool | None, *, variation: bool = False) -> Claim:
    """A claim with a verdict; holds=None: there are not results enough to say."""
    outcome: Outcome = "not run yet" if holds is None else "reproduced" if holds else "not reproduced"
    return Claim(text=text, threshold=threshold, measured=measured, outcome=outcome, variation=variation)


def overall(claims: Sequence[Claim]) -> Outcome:
    """Reproduced if every part is; not reproduced if one that was tested is not; else what the parts lack."""
    outcomes = [claim.outcome for claim in claims if not claim.variation]
    for outcome in ("not reproduced", "not run yet", "not testable at this scale"):
        if outcome in outcomes:
            return outcome  # type: ignore[return-value]
    return "reproduced"
