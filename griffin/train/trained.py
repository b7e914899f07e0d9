"""What of a model is trained, and its files: all weights, an adapter over them, or the state that it begins in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from griffin import checkpoint, lora
from griffin.checkpoint.layout import CONFIG
from griffin.errors import GriffinError
from griffin.files import save_tensors
from griffin.model import Griffin
from griffin.tokenizer import Tokenizer
from griffin.train.config import TrainConfig
from griffin.train.start import Start

START = "start.safetensors"


class Trained(Protocol):
    """What a checkpoint holds."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name."""

    def write(self, folder: Path) -> None:
        """Write it into a folder that exists."""

    def read(self, folder: Path) -> None:
        """Put what `write` wrote into the parameters.

        Raises:
            GriffinError: it cannot be read or is another model's.
        """


def needed_files(config: TrainConfig) -> tuple[str, ...]:
    """The files, of `Trained.write`, that vouch for the rest."""
    if config.lora is not None:
        return (lora.CONFIG, lora.WEIGHTS)
    return (START,) if config.state_tokens else (CONFIG,)


@dataclass(frozen=True)
class AllWeights:
    model: Griffin
    tokenizer: Tokenizer | None

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def write(self, folder: Path) -> None:
        checkpoint.write_files(folder, self.model.config, self.model.state_dict(), self.tokenizer)

    def read(self, folder: Path) -> None:
        model = self.model
        stored = checkpoint.load(folder, device=model.embedding.device)
        if stored.config != model.config:
            raise GriffinError(f"{folder} holds a model of another config: {_differences(stored.config, model.config)}")
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), stored.parameters(), strict=True):
                parameter.copy_(other)


@dataclass(frozen=True)
class AdapterOnly:
    model: Griffin
    tokenizer: Tokenizer
    base: str  # where the model below is

    def parameters(self) -> dict[str, nn.Parameter]:
        return lora.adapters(self.model)

    def write(self, folder: Path) -> None:
        lora.write_adapter(self.model, folder, self.base)
        self.tokenizer.save(folder)  # it may have got a chat template

    def read(self, folder: Path) -> None:
        tensors = lora.read_adapter(folder).tensors
        _copy(tensors, self.parameters(), folder / lora.WEIGHTS)


@dataclass(frozen=True)
class StartOnly:
    start: Start

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.start.named()

    def write(self, folder: Path) -> None:
        save_tensors(
            {name: each.detach().cpu().contiguous() for name, each in self.parameters().items()}, folder / START, {}
        )

    def read(self, folder: Path) -> None:
        try:
            tensors = load_file(folder / START)
        except (OSError, SafetensorError) as error:
            raise GriffinError(f"{folder / START} cannot be read ({error})") from error
        _copy(tensors, self.parameters(), folder / START)


@torch.no_grad()
def _copy(tensors: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter], where: Path) -> None:
    if tensors.keys() != parameters.keys():
        raise GriffinError(f"{where}: {min(tensors.keys() ^ parameters.keys())!r} is in it or in the model only")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise GriffinError(f"{where}: {name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])


def _differences(a: Any, b: Any) -> str:
    pairs = ((field.name, getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return "; ".join(f"{name} was {x!r}, is {y!r}" for name, x, y in pairs if x != y)
