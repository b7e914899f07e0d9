"""griffin eval: how well a model predicts texts, answers questions, does the harness's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from griffin.cli import options
from griffin.cli.waiting import Waiting
from griffin.errors import GriffinError
from griffin.files import whole_file

if TYPE_CHECKING:
    from griffin.eval.bits import Bucket
    from griffin.eval.choices import Answers
    from griffin.model import Griffin
    from griffin.tokenizer import Tokenizer


def evaluate(
    model: options.Model,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Texts (.txt, .jsonl), or questions (.jsonl); each may be an .xz. Folders: their texts."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Of texts, also what windows of so many tokens give, begun anew every half.")
    ] = None,
    most_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of a text. Default: all.")] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, commas between them.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="A folder of the harness's tasks of your own.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question of the harness.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions of each file or task.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the harness's questions into the chat template.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Answers read at once.")] = 32,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    chunk: options.Chunk = 512,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Measure a model on files of yours, or on tasks of lm-evaluation-harness.

    Of a text: bits per byte by position, read once through the state; memory stays what it is, up to millions of
    tokens. Of a .jsonl file of questions, {"ctx", "choices", "label"} or {"good", "bad"}: how many are right, by
    log-likelihood; a question is read once, and each answer goes on from its state. The harness needs
    pip install "griffin-lm[eval]"; its tasks come from the network unless they are your own.

    Examples:

        griffin eval my-model book.txt --window 1024

        griffin eval my-model hellaswag.jsonl piqa.jsonl.xz --limit 1000

        griffin eval my-model --harness arc_easy,hellaswag --shots 0
    """
    if not files and harness is None:
        raise GriffinError("nothing to measure: give files, or --harness TASKS")
    console, found = Console(highlight=False), {}
    loaded, tokenizer = options.open_model(model, device, dtype)

    from griffin.eval.choices import read_questions

    for file in files or []:
        questions = read_questions(file) if file.is_file() else None
        waiting = Waiting(f"{file.name}")
        try:
            if questions is None:
                columns: dict[str, int | None] = {"from the state": None}
                columns |= {} if window is None else {f"windows of {window}": window}
                read = {
                    name: _bits(loaded, tokenizer, file, size, most_tokens, chunk, waiting)
                    for name, size in columns.items()
                }
                waiting.stop()
                show_bits(console, file, read)
                found[str(file)] = {name: _bits_json(buckets) for name, buckets in read.items()}
            else:
                from griffin.eval.choices import answer

                answers = answer(loaded, tokenizer, questions[:limit], batch_rows=batch, progress=waiting.progress)
                waiting.stop()
                show_answers(console, file, answers)
                found[str(file)] = {
                    group: {n: getattr(each, n) for n in each.__slots__} for group, each in answers.items()
                }
        finally:
            waiting.stop()
    if harness is not None:
        from griffin.eval.harness import run_tasks, table

        tasks = [task for task in harness.split(",") if task]
        results = run_tasks(
            loaded, tokenizer, tasks, include=include, shots=shots, limit=limit, chat=chat, batch_rows=batch
        )
        console.print(table(results), markup=False, soft_wrap=True)
        found["harness"] = results["results"]
    if to is not None:
        with whole_file(to) as temporary:
            temporary.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


def _bits(
    model: Griffin, tokenizer: Tokenizer, file: Path, window: int | None, most: int | None, chunk: int, waiting: Waiting
) -> list[Bucket]:
    from griffin.data.text import read_parts, text_files
    from griffin.eval.bits import bits_by_position

    return bits_by_position(
        model,
        tokenizer,
        read_parts(text_files(file)),
        window=window,
        most_tokens=most,
        chunk=chunk,
        progress=lambda tokens: waiting.update(f"{file.name}: {tokens:,} tokens"),
    )


def show_bits(console: Console, file: Path, read: dict[str, list[Bucket]]) -> None:
    from griffin.eval.bits import total

    shown = Table("positions", "tokens", *(f"bits/byte, {name}" for name in read), title=str(file), title_style="")
    columns = [{bucket.first: bucket for bucket in buckets} for buckets in read.values()]
    for first, bucket in columns[0].items():
        shown.add_row(
            f"{first:,} .. {2 * first - 1:,}", f"{bucket.num_tokens:,}", *(_bits_text(c[first]) for c in columns)
        )
    wholes = [total(buckets) for buckets in read.values()]
    shown.add_row("all", f"{wholes[0].num_tokens:,}", *map(_bits_text, wholes))
    console.print(shown)


def _bits_text(bucket: Bucket) -> str:
    return "" if bucket.bits_per_byte is None else f"{bucket.bits_per_byte:.4f}"


def _bits_json(buckets: list[Bucket]) -> dict[str, Any]:
    from griffin.eval.bits import total

    names = ("first", "num_tokens", "num_bytes", "nats", "bits_per_byte")
    rows = [{name: getattr(bucket, name) for name in names} for bucket in buckets]
    return {"bits_per_byte": total(buckets).bits_per_byte, "positions": rows}


def show_answers(console: Console, file: Path, answers: dict[str, Answers]) -> None:
    shown = Table("", "questions", "right", "right per character", "chance", title=str(file), title_style="")
    for group, each in answers.items():
        shares = (each.sum, each.per_character, each.chance)
        shown.add_row(group or "all", f"{each.num_questions:,}", *(f"{share:.1%}" for share in shares))
    console.print(shown)
