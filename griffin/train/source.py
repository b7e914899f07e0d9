"""Where a run's batches come from, and what it is measured on: prepared data, or any other `Source`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from griffin.config import GriffinConfig
from griffin.data.batches import Lost, Rows
from griffin.data.order import step_rows
from griffin.data.packing import Batch
from griffin.data.prepare import Data
from griffin.errors import GriffinError
from griffin.model import Griffin
from griffin.score import Validation
from griffin.tokenizer import Tokenizer
from griffin.train.config import TrainConfig
from griffin.train.objective import Objective
from griffin.train.reading import reference_of, rows_of


class Source(Protocol):
    """What the loop asks of its data. A batch is a function of the step alone: a run resumes from one number."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Written beside the model; None: there is no text."""

    def fingerprint(self) -> str:
        """A text that is another one wherever a batch would be: a run goes on only with the data it began with."""

    def describe(self) -> str:
        """One line for a person, at the beginning."""

    def batches(self, step: int) -> list[Batch]:
        """The batches whose gradients make step `step` (from 0), on the model's device."""

    def measure(self, model: Griffin) -> Mapping[str, float]:
        """Numbers by name for the metrics: "loss", the mean, and what else the model is judged by."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows of prepared data, in an order that is a function of (seed, step), and rows that are held out."""

    config: TrainConfig
    data: Data
    rows: Rows
    lost: Lost | None  # of the examples; None: nothing
    validation: Validation
    objective: Objective
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def describe(self) -> str:
        config, meta = self.config, self.data.train.meta
        epochs = config.steps * config.grad_accumulation * config.batch_rows / self.rows.count
        return (
            f"{meta.num_bytes / 1e6:.2f} MB of text, {meta.num_tokens:,} tokens "
            f"({meta.num_bytes / meta.num_tokens:.2f} bytes each), seen {epochs:.2f} times"
        )

    def batches(self, step: int) -> list[Batch]:
        config, count = self.config, self.rows.count
        parts = range(step * config.grad_accumulation, (step + 1) * config.grad_accumulation)
        return [
            self.rows.batch(step_rows(count, config.batch_rows, part, seed=config.seed)).to(self.device)
            for part in parts
        ]

    def measure(self, model: Griffin) -> dict[str, float]:
        return self.objective.measure(model, self.validation)


def prepared(
    config: TrainConfig, run: Path, data: Data, objective: Objective, before: Griffin | None, device: torch.device
) -> Prepared:
    """The rows that an objective reads of prepared data.

    Args:
        config: of the run.
        run: its folder, which keeps what the model before training says of preference pairs.
        data: of the run.
        objective: measures the rows held out.
        before: the model before training; None where it is not there any more.
        device: the model's.
    """
    known = reference_of(config, run, data, before) or {}
    rows, lost = rows_of(config, data.train, known.get("train"))
    held_out, _ = rows_of(config, data.validation, known.get("validation"))
    validation = Validation.over(
        held_out,
        data.tokenizer,
        num_rows=config.validation_rows,
        batch_rows=config.batch_rows,
        device=device,
        where=data.validation.folder,
    )
    return Prepared(config, data, rows, lost, validation, objective, device)


def check_data(config: TrainConfig, model: GriffinConfig, data: Data) -> None:
    if data.tokenizer.vocab_size > model.vocab_size:
        raise GriffinError(
            f"the tokenizer has {data.tokenizer.vocab_size} ids, the model only model.vocab_size={model.vocab_size}"
        )
    if config.objective == "text" and (num_tokens := data.train.meta.num_tokens) <= config.row_tokens:
        raise GriffinError(
            f"{config.train_data}: {num_tokens} tokens to train on are less than one row and its next token "
            f"(row_tokens={config.row_tokens}); give more text, or set row_tokens lower"
        )
