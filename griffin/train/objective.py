"""What a step makes small: an objective gives the sum of losses of a batch, and how many of them there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from griffin.data.packing import Batch
from griffin.loss import NOT_COUNTED
from griffin.model import Griffin
from griffin.score import nats


class Objective(Protocol):
    """What `take_step` asks of an objective."""

    def count(self, batch: Batch) -> int:
        """How many losses a batch has; 0 where there is nothing to learn from it."""

    def loss(self, model: Griffin, batch: Batch) -> Tensor:
        """Their sum: () fp32, with a gradient. Several batches give what one large batch gives."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained that is not the model's."""


@dataclass(frozen=True)
class LanguageModel:
    """-log p(token | its document so far), summed over the tokens whose target counts.

    Text counts all of them; of a chat the answers' tokens count, and the other targets are NOT_COUNTED.
    """

    def count(self, batch: Batch) -> int:
        return int((batch.targets != NOT_COUNTED).sum())

    def loss(self, model: Griffin, batch: Batch) -> Tensor:
        return nats(model, batch)

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()
