"""`griffin tokenizer`: train a vocabulary on your own text."""

from __future__ import annotations

import io
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from griffin.errors import GriffinError

SUFFIXES = (".txt", ".txt.xz")
CHUNK_CHARS = 1 << 18
SAMPLE_TEXTS = 32  # at least, where there are as many: what bytes per token is measured on

app = typer.Typer(no_args_is_help=True, help="Make tokenizers.")


@app.callback()
def _group() -> None:
    """Make tokenizers."""


@app.command(no_args_is_help=True)
def train(
    files: Annotated[list[Path], typer.Argument(help="Text files (.txt, .txt.xz) or folders of them.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, special tokens included.")],
    output: Annotated[Path, typer.Option(help="Folder to write tokenizer.json into.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a tokenizer that is there already.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on text files.

    Any text survives encoding and decoding unchanged. A line that holds one NUL character separates documents and is
    not learnt.

    Examples:

        griffin tokenizer train books/ --vocab-size 16384 --output my-tokenizer

        griffin tokenizer train a.txt b.txt.xz --vocab-size 4096 --output my-tokenizer --force
    """
    from griffin.tokenizer import Tokenizer  # after --help has been answered
    from griffin.tokenizer.files import TOKENIZER_FILES

    for name in () if force else TOKENIZER_FILES:  # models and data made with the old one would no longer fit
        if (output / name).exists():
            raise GriffinError(f"{output / name} exists; choose another folder, or --force to replace it")
    paths = text_files(files)
    sample = Sample()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=sum(path.stat().st_size for path in paths))

        def texts() -> Iterator[str]:
            before = 0
            for path in paths:
                for text, position in read_text(path):
                    progress.update(task, completed=before + position)
                    sample.add(text)
                    yield text
                before += path.stat().st_size
            if not sample.texts:
                raise GriffinError(f"{', '.join(map(str, files))}: no text in {len(paths)} files; give files with text")
            progress.update(task, description="merging", total=None)

        tokenizer = Tokenizer.train(texts(), vocab_size)
        progress.update(task, description="measuring")
        num_tokens = sum(map(len, tokenizer.encode_batch(sample.texts, bos=False)))
        num_bytes = sum(len(text.encode()) for text in sample.texts)
        tokenizer.save(output)
    short = "" if tokenizer.vocab_size == vocab_size else f" ({vocab_size} asked for, but no more pairs occur twice)"
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"vocabulary       {tokenizer.vocab_size} ids{short}")
    console.print(f"bytes per token  {num_bytes / num_tokens:.2f} on {num_bytes:,} bytes of the input")
    console.print(f"written to       {output}", markup=False)
    console.print(f"next             give {output} wherever a command or a recipe asks for a tokenizer", markup=False)


@dataclass
class Sample:
    """Texts spread evenly over a stream whose length is not known: every `stride`-th one."""

    texts: list[str] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, text: str) -> None:
        if self.seen % self.stride == 0:
            self.texts.append(text)
        self.seen += 1
        if len(self.texts) == 2 * SAMPLE_TEXTS:
            self.texts, self.stride = self.texts[::2], 2 * self.stride


def text_files(paths: list[Path]) -> list[Path]:
    """Return the text files named, and those in the folders named, in a fixed order.

    Raises:
        GriffinError: a path does not exist, is no text file, or is a folder without any.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            if not inside:
                raise GriffinError(f"{path}: no {' or '.join(SUFFIXES)} files in this folder")
            files += inside
        elif not path.is_file():
            raise GriffinError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise GriffinError(f"{path}: not a text file by its name; rename it to end in {' or '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def read_text(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (text, bytes of the file read so far): whole lines, documents apart.

    Raises:
        GriffinError: the file is not UTF-8, or a damaged .xz.
    """
    with path.open("rb") as raw:
        binary = lzma.open(raw) if path.name.endswith(".xz") else raw  # noqa: SIM115 (closed with raw)
        lines = io.TextIOWrapper(cast(IO[bytes], binary), encoding="utf-8", newline="")
        try:
            while chunk := lines.read(CHUNK_CHARS) + lines.readline():
                for text in re.split(r"(?m)^\0\r?\n", chunk):
                    if text:
                        yield text, raw.tell()
        except UnicodeDecodeError as error:
            raise GriffinError(f"{path}: not UTF-8 text ({error.reason}); convert it first") from error
        except (lzma.LZMAError, EOFError) as error:
            raise GriffinError(f"{path}: not a whole .xz file ({error}); download it again") from error
