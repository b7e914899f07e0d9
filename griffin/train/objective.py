"""What a step makes small: an objective gives the sum of losses of a batch, and how many of them there are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.data.packing import Batch
from griffin.loss import NOT_COUNTED
from griffin.model import Griffin
from griffin.score import Validation, nats, row_nats
from griffin.train.start import Start


class Objective(Protocol):
    """What training asks of an objective."""

    def count(self, batch: Batch) -> int:
        """How many losses a batch has; 0 where there is nothing to learn from it."""

    def loss(self, model: Griffin, batch: Batch) -> Tensor:
        """Their sum: () fp32, with a gradient. Several batches give what one large batch gives."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained that is not the model's."""

    def measure(self, model: Griffin, validation: Validation) -> dict[str, float]:
        """What validation shows: "loss", the mean, and what else it is judged by."""


@dataclass(frozen=True)
class LanguageModel:
    """-log p(token | its document so far), summed over the tokens whose target counts.

    Text counts all of them; of a chat the answers' tokens count, and the other targets are NOT_COUNTED.

    Args:
        start: the state that every row begins in, and that is trained; None: nothing has been read.
    """

    start: Start | None = None

    def count(self, batch: Batch) -> int:
        return int((batch.targets != NOT_COUNTED).sum())

    def loss(self, model: Griffin, batch: Batch) -> Tensor:
        return nats(model, batch, None if self.start is None else self.start.rows(len(batch.tokens)))

    def parameters(self) -> Iterable[nn.Parameter]:
        return () if self.start is None else self.start.parameters()

    def measure(self, model: Griffin, validation: Validation) -> dict[str, float]:
        loss, bits = validation.measure(model, self.loss)
        return {"loss": loss, "bits_per_byte": bits}


@dataclass(frozen=True)
class Preference:
    """That what was chosen is likelier than what was rejected; rows of a batch are chosen and rejected in turn.

    With c and r the log-probabilities of a pair's answers less those by the reference model (`Batch.reference`), n
    their tokens, and p the probability of an answer's mean token:

        dpo:   -log sigmoid(beta (c - r))
        ipo:   (c / n_c - r / n_r - 1 / (2 beta))^2
        orpo:  -log p_c - beta log sigmoid(logit p_c - logit p_r), without a reference

    Sources: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Azar et al. 2023, arXiv:2310.12036, eq. 17, by token as its
    authors advise; Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """

    kind: Literal["dpo", "ipo", "orpo"] = "dpo"
    beta: float = 0.1

    def count(self, batch: Batch) -> int:
        return len(batch.tokens) // 2

    def loss(self, model: Griffin, batch: Batch) -> Tensor:
        return self.of(-row_nats(model, batch), batch).sum()

    def of(self, log_p: Tensor, batch: Batch) -> Tensor:
        """(2 N,) log-probabilities of the rows' counted tokens to (N,) losses."""
        lengths = (batch.targets != NOT_COUNTED).sum(dim=1)
        if self.kind == "orpo":
            chosen, rejected = (log_p / lengths).unflatten(0, (-1, 2)).unbind(1)
            odds = (chosen - rejected) - (_log_one_less(chosen) - _log_one_less(rejected))
            return -chosen - self.beta * F.logsigmoid(odds)
        assert batch.reference is not None
        gained = log_p - batch.reference
        if self.kind == "ipo":
            chosen, rejected = (gained / lengths).unflatten(0, (-1, 2)).unbind(1)
            return (chosen - rejected - 1 / (2 * self.beta)) ** 2
        chosen, rejected = gained.unflatten(0, (-1, 2)).unbind(1)
        return -F.logsigmoid(self.beta * (chosen - rejected))

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    @torch.no_grad()
    def measure(self, model: Griffin, validation: Validation) -> dict[str, float]:
        """Also the share of pairs whose chosen answer gained more, and by how many nats it did on the mean."""
        losses, gains = [], []
        for batch in validation.batches:
            log_p = -row_nats(model, batch)
            losses.append(self.of(log_p, batch))
            gained = log_p if batch.reference is None or self.kind == "orpo" else log_p - batch.reference
            gains.append(gained[::2] - gained[1::2])
        margins = torch.cat(gains)
        accuracy = (margins > 0).double() + 0.5 * (margins == 0).double()  # a model that is its reference knows nothing
        return {
            "loss": math.fsum(torch.cat(losses).tolist()) / len(margins),
            "accuracy": float(accuracy.mean()),
            "margin": float(margins.double().mean()),
        }


def _log_one_less(log_p: Tensor) -> Tensor:
    """log(1 - p), exact where p is near 0 and near 1."""
    return torch.where(log_p > -math.log(2), torch.log(-torch.expm1(log_p)), torch.log1p(-log_p.exp()))
