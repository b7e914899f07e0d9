"""Text files to documents: what a document is, how it is read, and which part is kept for validation."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

from griffin.errors import GriffinError

TEXT_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")
VALIDATION_FRACTION = 0.05
FEW_DOCUMENTS = 20  # with fewer, 5% of the documents is none: the last 5% of the text is taken instead

Report = Callable[[str, int, int], None]  # (what is being done, done, total); a total of 0 is unknown


def silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


def text_files(path: str | Path) -> list[Path]:
    """Give a text file, or those in a folder and below it in the order of their paths.

    Raises:
        GriffinError: there is none, or the file has another suffix.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(TEXT_SUFFIXES) and file.is_file())
        if not files:
            raise GriffinError(f"{path}: no {', '.join(TEXT_SUFFIXES)} files in this folder")
        return files
    if not path.is_file():
        raise GriffinError(f"{path}: no such file or folder")
    if not path.name.endswith(TEXT_SUFFIXES):
        raise GriffinError(f"{path}: not text by its name; training data ends in {', '.join(TEXT_SUFFIXES)}")
    return [path]


def read_documents(files: Sequence[Path], report: Report = silent, what: str = "reading") -> Iterator[str]:
    """Yield the documents of files in order, one in memory at a time; empty ones are left out.

    A .txt file is one document, or several with a line that holds one NUL between them; every line of a .jsonl file is
    an object with a "text". Text is UTF-8; a byte order mark is dropped.

    Raises:
        GriffinError: a file is not UTF-8 (with the byte's offset), not JSON lines (with the line), or a damaged .xz.
    """
    total = sum(file.stat().st_size for file in files)
    before = 0
    for file in files:
        with ExitStack() as stack:
            raw = stack.enter_context(file.open("rb"))
            binary = cast(IO[bytes], stack.enter_context(lzma.open(raw))) if file.name.endswith(".xz") else raw
            documents = _json_lines if ".jsonl" in file.suffixes[-2:] else _nul_separated
            try:
                for document in documents(file, binary):
                    report(what, before + raw.tell(), total)
                    if document:
                        yield document
            except (lzma.LZMAError, EOFError) as error:
                raise GriffinError(f"{file}: not a whole .xz file ({error}); download it again") from error
        before += file.stat().st_size
        report(what, before, total)


def _nul_separated(file: Path, binary: IO[bytes]) -> Iterator[str]:
    lines: list[bytes] = []
    start = offset = 0
    for line in binary:
        offset += len(line)
        if line.rstrip(b"\r\n") == b"\0":
            yield _decode(file, b"".join(lines), start)
            lines, start = [], offset
        else:
            lines.append(line)
    yield _decode(file, b"".join(lines), start)


def _json_lines(file: Path, binary: IO[bytes]) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(binary, start=1):
        text = _decode(file, line, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise GriffinError(f"{file}: line {number} is not JSON ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise GriffinError(f'{file}: line {number} is not an object with a "text"')
        yield value["text"]


def _decode(file: Path, data: bytes, start: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise GriffinError(
            f"{file}: byte {at} (0x{data[error.start]:02x}) is not UTF-8; convert the file, for example with iconv"
        ) from None
    return text.removeprefix("\ufeff") if start == 0 else text


def split_point(documents: Iterator[str], where: Path) -> tuple[int, int]:
    """Find where validation begins, as (document, character of it): about the last 5%, and at least something.

    With FEW_DOCUMENTS or more, whole documents; with fewer, the last part of the text, which `training_part` and
    `validation_part` cut at the next line where one begins soon enough.

    Raises:
        GriffinError: there is no text, or a single character of it.
    """
    lengths = [len(document) for document in documents]
    if sum(lengths) < 2:
        raise GriffinError(f"{where}: no text here; training needs some, and some more to validate on")
    if len(lengths) >= FEW_DOCUMENTS:
        return len(lengths) - max(1, round(len(lengths) * VALIDATION_FRACTION)), 0
    left = max(1, round(sum(lengths) * VALIDATION_FRACTION))
    for index in reversed(range(len(lengths))):
        if lengths[index] >= left:
            return index, lengths[index] - left
        left -= lengths[index]
    raise AssertionError("unreachable: the part is not larger than the whole")


def training_part(documents: Iterator[str], split: tuple[int, int]) -> Iterator[str]:
    """Yield what comes before `split`."""
    for index, document in enumerate(documents):
        if index >= split[0]:
            if part := document[: _at_line(document, split[1])]:
                yield part
            return
        yield document


def validation_part(documents: Iterator[str], split: tuple[int, int]) -> Iterator[str]:
    """Yield what comes from `split` on."""
    for index, document in enumerate(documents):
        if index == split[0]:
            document = document[_at_line(document, split[1]) :]
        if index >= split[0] and document:
            yield document


def _at_line(document: str, character: int) -> int:
    """Move to the next beginning of a line, unless less than half of the rest would be left."""
    line = document.find("\n", character) + 1 if character else 0
    return line if 0 < line <= (character + len(document)) // 2 else character
