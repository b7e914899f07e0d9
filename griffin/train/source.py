"""Where a run's batches come from, and what it is measured on. A text is one such source; see `Source` for others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from griffin.config import GriffinConfig
from griffin.data.order import step_rows
from griffin.data.packing import Batch, count_rows, pack
from griffin.data.prepare import Data
from griffin.errors import GriffinError
from griffin.model import Griffin
from griffin.score import Validation
from griffin.tokenizer import Tokenizer
from griffin.train.config import TrainConfig

LOSS, BITS_PER_BYTE = "validation_loss", "validation_bits_per_byte"


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
        """Numbers by name for the metrics: LOSS in nats per predicted token, BITS_PER_BYTE where there is text."""


class TextSource:
    """Rows of packed documents, in an order that is a function of (seed, step); validated on rows that are held out.

    Raises:
        GriffinError: the tokenizer does not fit the model, or there is too little text.
    """

    def __init__(self, config: TrainConfig, model: GriffinConfig, data: Data, device: torch.device) -> None:
        if data.tokenizer.vocab_size > model.vocab_size:
            raise GriffinError(
                f"the tokenizer has {data.tokenizer.vocab_size} ids, the model only model.vocab_size={model.vocab_size}"
            )
        if (num_tokens := data.train.meta.num_tokens) <= config.row_tokens:
            raise GriffinError(
                f"{config.train_data}: {num_tokens} tokens to train on are less than one row and its next token "
                f"(row_tokens={config.row_tokens}); give more text, or set row_tokens lower"
            )
        self._config, self._data, self._device = config, data, device
        self._num_rows = count_rows(data.train, config.row_tokens)
        self._validation = Validation.of(
            data.validation,
            data.tokenizer,
            num_rows=config.validation_rows,
            row_tokens=config.row_tokens,
            batch_rows=config.batch_rows,
            device=device,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._data.tokenizer

    def fingerprint(self) -> str:
        return self._data.fingerprint()

    def describe(self) -> str:
        config, meta = self._config, self._data.train.meta
        epochs = config.steps * config.grad_accumulation * config.batch_rows / self._num_rows
        return (
            f"{meta.num_bytes / 1e6:.2f} MB of text, {meta.num_tokens:,} tokens "
            f"({meta.num_bytes / meta.num_tokens:.2f} bytes each), seen {epochs:.2f} times"
        )

    def batches(self, step: int) -> list[Batch]:
        config = self._config
        first = step * config.grad_accumulation
        return [
            pack(
                self._data.train,
                step_rows(self._num_rows, config.batch_rows, first + part, seed=config.seed),
                config.row_tokens,
            ).to(self._device)
            for part in range(config.grad_accumulation)
        ]

    def measure(self, model: Griffin) -> dict[str, float]:
        loss, bits_per_byte = self._validation.measure(model)
        return {LOSS: loss, BITS_PER_BYTE: bits_per_byte}
