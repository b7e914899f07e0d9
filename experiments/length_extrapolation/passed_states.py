"""Rows that begin where earlier rows ended: what teaches a model states that no short row leads to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from griffin.data.packing import Batch
from griffin.loss import NOT_COUNTED, cross_entropy
from griffin.model import Griffin
from griffin.score import Validation
from griffin.state import State
from griffin.train.objective import LanguageModel

ANEW = 4  # one row of so many begins from nothing, another one at each step, so that beginnings are not forgotten


@dataclass
class PassedStates:
    """The loss of text whose rows begin in the states that the step before left, of other rows: a `train.Objective`.

    Source: arXiv:2507.02782, state passing. Documents that begin inside a row are not told from what comes before them;
    no gradient goes through the state.
    """

    state: State | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)

    def count(self, batch: Batch) -> int:
        return int((batch.targets != NOT_COUNTED).sum())

    def loss(self, model: Griffin, batch: Batch) -> Tensor:
        rows = len(batch.tokens)
        if self.state is None or self.state.batch_size != rows:
            self.state = model.new_state(rows)
        anew = range(self.steps % ANEW, rows, ANEW)
        self.state.set_rows_(anew, model.new_state(len(anew)))
        # Another row's state: what is passed on says nothing of what comes.
        self.state = self.state.rows(torch.roll(torch.arange(rows), 1))
        self.steps += 1
        hidden = model(batch.tokens, self.state)
        return cross_entropy(hidden, model.embedding, batch.targets, soft_cap=model.config.logits_soft_cap)[0]

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def measure(self, model: Griffin, validation: Validation) -> dict[str, float]:
        return LanguageModel().measure(model, validation)
