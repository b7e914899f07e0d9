"""What `generate` and `chat` have in common: their options, and opening a model."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from griffin.cli.waiting import Waiting
from griffin.memory import keep_freed_memory

if TYPE_CHECKING:
    from griffin.model import Griffin
    from griffin.tokenizer import Tokenizer


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
        from griffin.machine import find_device

        place = find_device(device)
        tokenizer = checkpoint.load_tokenizer(name)
        kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype.value)
        model = checkpoint.load(name, device=place, dtype=kind, progress=waiting.progress)
        if model.device.type == "cpu":
            keep_freed_memory()  # after loading, whose buffers are not needed again
        return model, tokenizer
    finally:
        waiting.stop()
