"""What `generate` and `chat` have in common: their options, and opening a model."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from threading import Timer
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from griffin.errors import GriffinError
from griffin.memory import keep_freed_memory

if TYPE_CHECKING:
    from griffin.model import Griffin
    from griffin.tokenizer import Tokenizer

SLOW_S = 2.0  # what takes longer shows what it is at


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, or a Hugging Face id: google/recurrentgemma-2b-it.")
]
MaxTokens = Annotated[int, typer.Option(help="The most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token; higher is more varied.")]
TopK = Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest tokens that sum to this probability.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
Penalty = Annotated[float | None, typer.Option(help="Above 1 discourages tokens that are in the text already.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text. Default: a new one each time.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string. May be given several times.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of weights and activations. Default: as they are stored.")]
Chunk = Annotated[int, typer.Option(help="Tokens of a prompt read at once: more is faster and takes more memory.")]


class Waiting:
    """Say on stderr, if it is a terminal, what is being waited for, once that has taken two seconds.

    Args:
        what: is being done.
    """

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self._what, self._status = what, console.status(what)
        self._timer = Timer(SLOW_S, self._status.start)
        self._timer.daemon = True
        if console.is_terminal:
            self._timer.start()

    def progress(self, done: int, total: int) -> None:
        self._status.update(f"{self._what}: {done:,} of {total:,}")

    def stop(self) -> None:
        """Take it off the screen. Further calls change nothing."""
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join()
        self._status.stop()


def show(text: str) -> None:
    """Print generated text at once. A terminal gets no control characters but line breaks and tabs."""
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    typer.echo(text, nl=False)
    sys.stdout.flush()


def open_model(name: str, device: str, dtype: Dtype | None) -> tuple[Griffin, Tokenizer]:
    """Load a model and its tokenizer.

    Raises:
        GriffinError: the device is not there, or the folder cannot be loaded.
    """
    waiting = Waiting(f"Loading {name}")
    try:
        import torch

        from griffin import checkpoint

        place = find_device(device)
        tokenizer = checkpoint.load_tokenizer(name)
        kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype.value)
        model = checkpoint.load(name, device=place, dtype=kind, progress=waiting.progress)
        if model.device.type == "cpu":
            keep_freed_memory()  # after loading, whose buffers are not needed again
        return model, tokenizer
    finally:
        waiting.stop()


def find_device(name: str) -> str:
    """Return a device's name, or what "auto" stands for here.

    Raises:
        GriffinError: there is no such device.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise GriffinError(f"--device {name}: there is no such device; cpu, cuda, cuda:1 and auto are") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise GriffinError(f"--device {name}: PyTorch sees {gpus} CUDA devices here; use --device cpu")
    return name
