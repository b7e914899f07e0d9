"""griffin convert: Google's checkpoint to a model folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from griffin.cli.unwind import unwinding
from griffin.cli.waiting import Waiting
from griffin.config import EmbeddingScale
from griffin.errors import printable


def convert(
    source: Annotated[
        Path, typer.Argument(help="Google's PyTorch file (2b-it.pt), or the folder of a Flax (orbax) checkpoint.")
    ],
    destination: Annotated[Path, typer.Argument(help="The model folder to make.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The tokenizer to put beside the weights, such as the tokenizer.model that comes with them."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Earlier tokens a query sees. The file does not say.")] = 2048,
    soft_cap: Annotated[
        float, typer.Option(min=0.0, help="Soft cap of the logits, 0 for none. Not in the file.")
    ] = 30.0,
    embedding_scale: Annotated[
        EmbeddingScale, typer.Option(help="Factor on the embeddings: sqrt(width) rounded to bf16, exact, or none.")
    ] = "bf16",
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of the embedding to keep. Default: all, less the padding of Gemma's 256000."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in DESTINATION.")] = False,
) -> None:
    """Turn Google's RecurrentGemma checkpoint, PyTorch or Flax, into a Hugging Face folder.

    The architecture is read off the weights, and every one of them must fit. Window, soft cap and embedding scale are
    not in them: the defaults are those of all released models.

    Examples:

        griffin convert 2b-it.pt recurrentgemma-2b-it --tokenizer tokenizer.model

        griffin convert flax/9b recurrentgemma-9b --tokenizer flax/tokenizer.model

        griffin convert mine.pt mine --window 1024 --soft-cap 0 --embedding-scale none
    """
    from griffin.convert import convert as convert_checkpoint  # after --help has been answered

    waiting = Waiting("Converting")
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        waiting.update(line)

    try:
        with unwinding():
            convert_checkpoint(
                source,
                destination,
                tokenizer=tokenizer,
                window=window,
                logits_soft_cap=soft_cap,
                embedding_scale=embedding_scale,
                vocab_size=vocab_size,
                overwrite=force,
                report=report,
            )
    finally:
        waiting.stop()
    for line in lines:
        typer.echo(printable(line))
    typer.echo(f"Next: griffin generate {shlex.quote(str(destination))} 'Once upon a time'")
