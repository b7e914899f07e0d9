"""What a run leaves: a model folder, PEFT's adapter folder, a state file; and the best that it has had so far."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from griffin import checkpoint
from griffin.checksums import write_sums
from griffin.errors import GriffinError
from griffin.files import whole_folder
from griffin.model import Griffin
from griffin.reading import read_json
from griffin.state_file import CHAT_TEMPLATE
from griffin.tokenizer import Tokenizer
from griffin.train.config import TrainConfig
from griffin.train.start import Start
from griffin.train.trained import Trained

BEST, MODEL, ADAPTER, STATE = "best", "model", "adapter", "state.safetensors"
_NOTE = "best.json"


@dataclass(frozen=True)
class Written:
    model: Path | None = None
    adapter: Path | None = None
    state: Path | None = None
    notes: list[str] = field(default_factory=list)  # for a person


def best_of(run: Path) -> float:
    """The validation loss of the best that was kept; infinity where nothing was."""
    note = run / BEST / _NOTE
    return float(read_json(note)["loss"]) if note.exists() else math.inf


def save_best(run: Path, trained: Trained, step: int, loss: float) -> None:
    """Keep what is trained as the best so far."""
    with whole_folder(run / BEST) as folder:
        trained.write(folder)
        (folder / _NOTE).write_text(json.dumps({"step": step, "loss": loss}) + "\n", encoding="utf-8")
        write_sums(folder)


def take_best(run: Path, trained: Trained) -> int:
    """Put the best into what is trained, and say which step it was.

    Raises:
        GriffinError: it cannot be read.
    """
    note = run / BEST / _NOTE
    if not note.exists():
        raise GriffinError(f"{run} has no {BEST}: no validation loss of it was a number; lower learning_rate")
    trained.read(run / BEST)
    return int(read_json(note)["step"])


def write_results(
    config: TrainConfig, run: Path, model: Griffin, trained: Trained, start: Start | None, tokenizer: Tokenizer | None
) -> Written:
    """Write what a finished run gives.

    Of all weights: run/model. Of LoRA: run/adapter in PEFT's form, and run/model with it merged into the model that it
    was trained over, in that one's dtype, unless that is quantised. Of a state: run/state.safetensors.
    """
    if start is not None:
        file = run / STATE
        metadata = (
            {} if tokenizer is None or tokenizer.chat_template is None else {CHAT_TEMPLATE: tokenizer.chat_template}
        )
        start.state().save(file, model, metadata=metadata)
        return Written(state=file)
    folder = run / MODEL
    if config.lora is None:
        checkpoint.save(model, folder, tokenizer, overwrite=True)
        return Written(model=folder)
    with whole_folder(run / ADAPTER) as temporary:
        trained.write(temporary)
        write_sums(temporary)
    assert config.init_from is not None
    if (form := checkpoint.inspect(config.init_from).form) is not None:
        return Written(adapter=run / ADAPTER, notes=[f"{config.init_from} is {form.name}: nothing is merged into it"])
    checkpoint.save(checkpoint.load(config.init_from, adapter=run / ADAPTER), folder, tokenizer, overwrite=True)
    return Written(model=folder, adapter=run / ADAPTER)
