"""griffin quantize: a model folder in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from griffin.cli.unwind import unwinding


def quantize(
    source: Annotated[str, typer.Argument(help="A model folder or a Hugging Face id.")],
    destination: Annotated[Path, typer.Argument(help="The model folder to make.")],
    to: Annotated[Literal["int8", "int4"], typer.Option(help="8 bits per weight, or about 4.")],
    group: Annotated[
        int | None,
        typer.Option(help="int4: inputs to a scale, 32, 64 or 128 (default). Fewer: closer, larger."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in DESTINATION.")] = False,
) -> None:
    """Write a model with its linears and embedding in 8 or 4 bits; it loads like any other.

    Recurrence, gates, convolutions, norms and biases keep their precision. The model can no longer be trained.

    Examples:

        griffin quantize recurrentgemma-2b-it 2b-int8 --to int8

        griffin quantize runs/mine mine-int4 --to int4 --group 64
    """
    from griffin import checkpoint  # after --help has been answered
    from griffin.quantize import Quantization

    checkpoint.check_place(destination, overwrite=force)
    folder = checkpoint.resolve(source)
    model = checkpoint.load(folder, quantize=Quantization.named(to, group))
    tokenizer = checkpoint.load_tokenizer(folder) if any(folder.glob("tokenizer.*")) else None
    before = folder_bytes(folder)
    with unwinding():
        checkpoint.save(model, destination, tokenizer, overwrite=force)
    after = folder_bytes(destination)
    typer.echo(f"{destination}: {to}, {after / 1e6:,.0f} MB of weights, {after / before:.0%} of {before / 1e6:,.0f} MB")


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
