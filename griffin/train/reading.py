"""What a run reads: its data prepared, and the rows that its objective wants of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from griffin.data.batches import Lost, Rows, pair_rows, single_rows, stream_rows, whole_rows
from griffin.data.chat import Encoder
from griffin.data.examples import prepare_examples
from griffin.data.prepare import Data, prepare
from griffin.data.shards import Shard
from griffin.data.sources import Report
from griffin.errors import GriffinError
from griffin.files import save_tensors, whole_file
from griffin.lora import off
from griffin.model import Griffin
from griffin.score import row_nats
from griffin.tokenizer import GEMMA, Tokenizer, load_tokenizer
from griffin.train.config import PAIRS, TrainConfig
from griffin.train.objective import LanguageModel, Objective, Preference
from griffin.train.start import Start

REFERENCE = "reference.safetensors"


def read_data(
    config: TrainConfig, run: Path, start: Path | None, expected: str | None, report: Report
) -> tuple[Data, list[str]]:
    """Prepare the data of a run in its folder, or take what is there.

    Args:
        config: of the run.
        run: its folder; the data is in run/data.
        start: the model folder whose tokenizer is taken where config.tokenizer is None.
        expected: the fingerprint that the data must have; None takes any.
        report: told how far it is.

    Returns:
        The data, and each example that was left out because it cannot be used.

    Raises:
        GriffinError: it cannot be read or used.
    """
    spec = config.tokenizer or str(start)
    if config.objective == "text":
        made = prepare(
            config.train_data,
            run / "data",
            tokenizer=spec,
            validation=config.validation_data,
            divider=config.divider,
            expected=expected,
            report=report,
        )
        return made, []
    prepared = prepare_examples(
        config.train_data,
        run / "data",
        encoder_of(config, chat_tokenizer(spec, config.chat_template)),
        validation=config.validation_data,
        fraction=config.validation_fraction,
        bad=config.bad_rows,
        expected=expected,
        report=report,
    )
    return prepared.data, prepared.bad


def chat_tokenizer(path: str, template: str | None = None) -> Tokenizer:
    """The tokenizer of a folder; without a chat template of its own it gets the one given, or Gemma's.

    Gemma's only where the vocabulary has the tokens of it. Without any, prompts and completions are joined as they are.
    """
    tokenizer = load_tokenizer(path)
    if template is not None:
        return tokenizer.with_chat_template(template)
    if tokenizer.chat_template is None and tokenizer.speaks_gemma:
        return tokenizer.with_chat_template(GEMMA)
    return tokenizer


def encoder_of(config: TrainConfig, tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer, "pairs" if config.objective in PAIRS else "chat", config.learnt, config.raw)


def objective_of(config: TrainConfig, start: Start | None) -> Objective:
    if config.objective in ("dpo", "ipo", "orpo"):
        return Preference(config.objective, config.beta)
    return LanguageModel(start)


def rows_of(
    config: TrainConfig, shard: Shard, reference: npt.NDArray[np.float32] | None = None
) -> tuple[Rows, Lost | None]:
    """The rows of a shard that an objective reads, and what they do not hold; None where they hold all."""
    T, long = config.row_tokens, config.long
    if config.objective in PAIRS:
        return pair_rows(shard, T, long, reference)
    if config.state_tokens:  # a row begins in the state: each has one document
        return single_rows(shard, T, "split" if config.objective == "text" else long)
    if config.objective == "text":
        return stream_rows(shard, T), None
    return whole_rows(shard, T, long)


def reference_of(
    config: TrainConfig, run: Path, data: Data, model: Griffin | None
) -> dict[str, npt.NDArray[np.float32]] | None:
    """log p of every document of a run's pairs by the model before training, or without its adapter: once.

    Args:
        config: of the run.
        run: keeps them in reference.safetensors.
        data: of the run.
        model: the reference; None where it is not there any more, and what was kept must do.

    Raises:
        GriffinError: it is not there, and nothing of this data was kept.
    """
    if config.objective not in PAIRS or config.objective == "orpo":
        return None
    file, fingerprint = run / REFERENCE, data.fingerprint()
    try:
        kept = load_file(file)
        if bytes(kept.pop("data").numpy()).decode() == fingerprint:
            return {name: tensor.numpy() for name, tensor in kept.items()}
    except (OSError, SafetensorError, KeyError):
        pass  # it is computed, if there still is what computes it
    if model is None:
        raise GriffinError(
            f"{file} is gone, and the model before training too; begin anew in another folder (--run DIR)"
        )
    shards = {"train": data.train, "validation": data.validation}
    with off(model):
        found = {name: _log_p(config, shard, model) for name, shard in shards.items()}
    tensors = {name: torch.from_numpy(array) for name, array in found.items()}
    tensors["data"] = torch.frombuffer(bytearray(fingerprint.encode()), dtype=torch.uint8)
    with whole_file(file) as temporary:
        save_tensors(tensors, temporary, {})
    return found


@torch.no_grad()
def _log_p(config: TrainConfig, shard: Shard, model: Griffin) -> npt.NDArray[np.float32]:
    rows, _ = pair_rows(shard, config.row_tokens, config.long, np.arange(shard.meta.num_documents, dtype=np.float32))
    found = np.zeros(shard.meta.num_documents, dtype=np.float32)
    for first in range(0, rows.count, config.batch_rows):
        batch = rows.batch(range(first, min(rows.count, first + config.batch_rows))).to(model.device)
        assert batch.reference is not None  # their numbers, here
        found[batch.reference.long().cpu().numpy()] = -row_nats(model, batch).cpu().numpy()
    return found


def with_epochs(config: TrainConfig, rows: Rows, epochs: float) -> TrainConfig:
    """The config with as many steps as read all rows so often."""
    per_step = config.batch_rows * config.grad_accumulation
    return replace(config, steps=max(1, round(epochs * rows.count / per_step)))
