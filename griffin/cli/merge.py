"""griffin merge: a model with an adapter to a model without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from griffin.cli.unwind import unwinding
from griffin.errors import GriffinError


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model folder or Hugging Face id below.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder with a LoRA adapter, PEFT's or ours.")],
    destination: Annotated[Path, typer.Argument(help="The model folder to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the model in DESTINATION.")] = False,
) -> None:
    """Add an adapter's change to the weights: W + s B A, rounded once. The result loads and runs like any other.

    Examples:

        griffin merge google/recurrentgemma-2b-it runs/chats-tuned/adapter my-model
    """
    from griffin import checkpoint  # after --help has been answered

    checkpoint.check_place(destination, overwrite=force)
    folder = checkpoint.resolve(model)
    if (form := checkpoint.inspect(folder).form) is not None:
        raise GriffinError(
            f"{model} is {form.name}, and an adapter cannot be merged into that; merge it into the original, then "
            "griffin quantize"
        )
    merged = checkpoint.load(folder, adapter=adapter)
    own = any(adapter.glob("tokenizer.json"))  # it may have a chat template that the model has not
    tokenizer = (
        checkpoint.load_tokenizer(adapter if own else folder) if own or any(folder.glob("tokenizer.*")) else None
    )
    with unwinding():
        checkpoint.save(merged, destination, tokenizer, overwrite=force)
    typer.echo(f"{destination}: {model} with {adapter} merged")
