"""`griffin data`: examples and texts to tokens, before training and apart from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from griffin.errors import GriffinError, printable

MOST_SHOWN = 10  # of examples that cannot be used

app = typer.Typer(no_args_is_help=True, help="Prepare data.")


@app.callback()
def _group() -> None:
    """Prepare data."""


@app.command(no_args_is_help=True)
def prepare(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A file or folder of examples or texts.")],
    model: Annotated[str, typer.Option(help="The model folder whose tokenizer and chat template are used.")],
    output: Annotated[Path, typer.Option(help="Folder to write: train/, validation/, tokenizer/, manifest.json.")],
    loss: Annotated[Literal["answers", "last", "all"], typer.Option(help="What of a chat is learnt.")] = "answers",
    row_tokens: Annotated[int, typer.Option(min=1, help="Tell what rows of so many tokens would lose.")] = 1024,
    validation: Annotated[Path | None, typer.Option(help="Examples to validate on. [default: 5% of DATA]")] = None,
    bad_rows: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do about examples that cannot be used.")
    ] = "stop",
    divider: Annotated[
        str | None, typer.Option(help='Of texts: what ends a document there, "<|endoftext|>" say.')
    ] = None,
    template: Annotated[Path | None, typer.Option(help="A chat template (Jinja) instead of the model's own.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Join prompts and completions without the chat template.")] = False,
) -> None:
    """Encode examples, in parallel and in bounded memory; a killed run goes on where it was.

    Rows that cannot be used are named by file, line and reason: the first stops it, or --bad-rows skip lists them all
    in manifest.json.

    Examples:

        griffin data prepare chats.jsonl --model my-model --output chats-tokens

        griffin data prepare dumps/ --model my-model --output tokens --divider "<|endoftext|>"
    """
    from griffin.checkpoint import resolve  # after --help has been answered
    from griffin.data.examples import find_kind
    from griffin.train.config import TrainConfig
    from griffin.train.display import describe, reporting
    from griffin.train.reading import read_data, rows_of
    from griffin.train.stop import only_process

    if output.name in ("", ".", ".."):
        raise GriffinError(f"--output {output}: give the name of a folder to make")
    kind = find_kind(data)
    folder = resolve(model)
    config = TrainConfig(
        model=None,
        tokenizer=None,
        init_from=str(folder),
        train_data=str(data),
        validation_data=None if validation is None else str(validation),
        objective={"text": "text", "chat": "chat", "pairs": "dpo"}[kind],  # type: ignore[arg-type]
        learnt=loss,
        bad_rows=bad_rows,
        divider=divider,
        chat_template=None if template is None else template.read_text(encoding="utf-8"),
        raw=raw,
        row_tokens=row_tokens,
        steps=1,
    )
    console = Console(highlight=False, soft_wrap=True)
    with only_process(output), reporting(Console(stderr=True)) as report:
        made, bad = read_data(config, output, folder, None, report)
    for text in bad[:MOST_SHOWN]:
        console.print(printable(f"left out: {text}"), markup=False)
    if len(bad) > MOST_SHOWN:
        console.print(f"left out: {len(bad) - MOST_SHOWN:,} more, named in the manifest", markup=False)
    rows, lost = rows_of(config, made.train)
    console.print(describe(made, rows, lost, config))
    console.print(f"written to {output / 'data'}", markup=False)
