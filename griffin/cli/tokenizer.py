"""`griffin tokenizer`: train a vocabulary on your own text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from griffin.errors import GriffinError
from griffin.train.display import reporting

SAMPLE_TEXTS = 32  # at least, where there are as many: what bytes per token is measured on

app = typer.Typer(no_args_is_help=True, help="Make tokenizers.")


@app.callback()
def _group() -> None:
    """Make tokenizers."""


@app.command(no_args_is_help=True)
def train(
    files: Annotated[list[Path], typer.Argument(help="Text files (.txt, .jsonl, also .xz) or folders of them.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, special tokens included.")],
    output: Annotated[Path, typer.Option(help="Folder to write tokenizer.json into.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a tokenizer that is there already.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on text files.

    Any text survives encoding and decoding unchanged. The files are read as `griffin train` reads them: a line of a
    .txt that holds one NUL character separates documents, a line of a .jsonl is an object with a "text".

    Examples:

        griffin tokenizer train books/ --vocab-size 16384 --output my-tokenizer

        griffin tokenizer train a.txt b.txt.xz --vocab-size 4096 --output my-tokenizer --force
    """
    from griffin.data.prepare import learning_pieces  # after --help has been answered
    from griffin.data.text import read_parts, text_files
    from griffin.tokenizer import Tokenizer
    from griffin.tokenizer.files import TOKENIZER_FILES

    for name in () if force else TOKENIZER_FILES:  # models and data made with the old one would no longer fit
        if (output / name).exists():
            raise GriffinError(f"{output / name} exists; choose another folder, or --force to replace it")
    paths = [file for path in files for file in text_files(path)]
    sample = Sample()
    with reporting(Console(stderr=True)) as report:

        def texts() -> Iterator[str]:
            for text in learning_pieces(read_parts(paths, report)):
                sample.add(text)
                yield text
            if not sample.texts:
                raise GriffinError(f"{', '.join(map(str, files))}: no text in {len(paths)} files; give files with text")
            report("merging", 0, 0)

        tokenizer = Tokenizer.train(texts(), vocab_size)
        report("measuring", 0, 0)
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
