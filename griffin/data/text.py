"""Text files to documents: what a document is, how it is read, and which part is kept for validation."""

from __future__ import annotations

import codecs
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from griffin.data.sources import COMPRESSED, Report, opened, silent
from griffin.errors import GriffinError
from griffin.reading import parse_json

TEXT_SUFFIXES = tuple(f"{kind}{suffix}" for kind in (".txt", ".jsonl") for suffix in COMPRESSED)
BLOCK_BYTES = 1 << 20  # read at once
MOST_LINE_BYTES = 1 << 27  # of a .jsonl file, whose lines are read whole
_BETWEEN = re.compile(r"(?m)^\0\r?\n")  # a line of one NUL
VALIDATION_FRACTION = 0.05
FEW_DOCUMENTS = 20  # with fewer, 5% of the documents is none: the last 5% of the text is taken instead


class Part(NamedTuple):
    """A piece of a document: a long one comes in several, one after another, cut anywhere."""

    document: int  # counted from 0 over all files
    text: str  # not empty


def text_files(path: str | Path) -> list[Path]:
    """Give a text file, or those in a folder and below it in the order of their paths.

    What training wrote is not training data: folders of runs below `path` are left out, and where `path` is the folder
    of a run itself, its metrics.

    Raises:
        GriffinError: there is none, or the file has another suffix.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(TEXT_SUFFIXES) and file.is_file())
        runs = {folder for folder in {parent for file in found for parent in file.parents} if _is_run(folder)}
        inside = runs - {path, *path.parents}
        files = [
            file
            for file in found
            if inside.isdisjoint(file.parents) and not (file.parent in runs and file.name == "metrics.jsonl")
        ]
        if not files:
            raise GriffinError(f"{path}: no {', '.join(TEXT_SUFFIXES)} files in this folder")
        return files
    if not path.is_file():
        raise GriffinError(f"{path}: no such file or folder")
    if not path.name.endswith(TEXT_SUFFIXES):
        raise GriffinError(f"{path}: not text by its name; training data ends in {', '.join(TEXT_SUFFIXES)}")
    return [path]


def _is_run(folder: Path) -> bool:
    # config.json is what a run writes first, after its .lock, which not every system has.
    return (folder / "config.json").is_file() and any(
        (folder / name).exists() for name in (".lock", "checkpoints", "metrics.jsonl")
    )


def read_parts(files: Sequence[Path], report: Report = silent, what: str = "reading") -> Iterator[Part]:
    """Yield the documents of files in order, in parts of about a megabyte at most; empty documents are left out.

    A .txt file is one document, or several with a line that holds one NUL between them; every line of a .jsonl file is
    an object with a "text", and is read whole. Only line feeds end lines. Text is UTF-8; a byte order mark is dropped.

    Raises:
        GriffinError: a file is not UTF-8 (with the byte's offset), not JSON lines (with the line), has a line of more
            than MOST_LINE_BYTES there, or is compressed and damaged.
    """
    total = sum(file.stat().st_size for file in files)
    before, document, filled, untold = 0, 0, False, 0
    for file in files:
        with opened(file) as (raw, binary):
            texts = _json_lines(file, binary) if ".jsonl" in file.suffixes[-2:] else _plain_text(file, binary)
            for text in texts:
                untold += len(text or "")
                if untold >= BLOCK_BYTES // 4:
                    report(what, before + raw.tell(), total)
                    untold = 0
                if text is None:
                    document, filled = document + filled, False
                elif text:
                    yield Part(document, text)
                    filled = True
        before += file.stat().st_size
        report(what, before, total)


def divided(parts: Iterable[Part], divider: str | None) -> Iterator[Part]:
    """Let documents end also where other programs' mark for that stands in the text, "<|endoftext|>" say; it goes.

    Raises:
        GriffinError: the divider is empty.
    """
    if divider is None:
        yield from parts
        return
    if not divider:
        raise GriffinError("the divider of documents is empty; give the text that stands between them")
    source, number, filled, rest = -1, 0, False, ""
    for part in parts:
        if part.document != source:
            if rest:
                yield Part(number, rest)
                filled = True
            source, number, filled, rest = part.document, number + filled, False, ""
        *ended, text = (rest + part.text).split(divider)
        for document in ended:
            if document:
                yield Part(number, document)
            number, filled = number + (filled or bool(document)), False
        # The end may be the beginning of a divider.
        keep = next((size for size in range(len(divider) - 1, 0, -1) if text.endswith(divider[:size])), 0)
        text, rest = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            yield Part(number, text)
            filled = True
    if rest:
        yield Part(number, rest)


def _plain_text(file: Path, binary: IO[bytes]) -> Iterator[str | None]:
    """Yield a file's text in parts, and None behind each document."""
    rest, at_line = "", True  # what may yet become a line of one NUL; whether what comes begins a line
    for block in _decoded(file, binary):
        text = rest + block
        start = 0
        for found in _BETWEEN.finditer(text) if "\0" in text else ():
            if found.start() or at_line:
                yield text[start : found.start()]
                yield None
                start = found.end()
        line = text.rfind("\n") + 1
        end = line if text[line:] in ("\0", "\0\r") and (line or at_line) else len(text)
        yield text[start:end]
        at_line = text[end - 1] == "\n" if end else at_line
        rest = text[end:]
    yield None  # the last line need not end with a line feed: rest is "" or one NUL


def _json_lines(file: Path, binary: IO[bytes]) -> Iterator[str | None]:
    """Yield each line's text, and None behind it."""
    offset = number = 0
    while line := binary.readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(line) > MOST_LINE_BYTES:
            raise GriffinError(
                f"{file}: line {number} has more than {MOST_LINE_BYTES:,} bytes; put its text into a .txt file, which "
                "is not read whole"
            )
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(file, offset + error.start, error) from None
        text = text if offset else text.removeprefix("\ufeff")
        offset += len(line)
        if not text.strip():
            continue
        value = parse_json(text, f"{file}: line {number}", mend="write this line again, or leave it out")
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise GriffinError(f'{file}: line {number} is not an object with a "text"')
        yield value["text"]
        yield None


def _decoded(file: Path, binary: IO[bytes]) -> Iterator[str]:
    """Yield a file's text in blocks, less the byte order mark it may begin with."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, begins = 0, True
    while True:
        block = binary.read(BLOCK_BYTES)
        unfinished, _ = decoder.getstate()
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, offset - len(unfinished) + error.start, error) from None
        offset += len(block)
        if text:
            yield text.removeprefix("\ufeff") if begins else text
            begins = False
        if not block:
            return


def _not_utf8(file: Path, at: int, error: UnicodeDecodeError) -> GriffinError:
    byte = error.object[error.start]
    return GriffinError(f"{file}: byte {at} (0x{byte:02x}) is not UTF-8; convert the file, for example with iconv")


def split_point(parts: Callable[[], Iterable[Part]], where: Path) -> tuple[int, int]:
    """Find where validation begins, as (document, character of it): about the last 5%, and at least something.

    With FEW_DOCUMENTS or more, whole documents; with fewer, the last part of the text, from the next line on where one
    begins before half of that part is over.

    Args:
        parts: begins to read, from the beginning; it is called up to two times.
        where: for the message.

    Raises:
        GriffinError: there is no text, or a single character of it.
    """
    lengths = array("q")
    for part in parts():
        if part.document == len(lengths):
            lengths.append(0)
        lengths[part.document] += len(part.text)
    if sum(lengths) < 2:
        raise GriffinError(f"{where}: no text here; training needs some, and some more to validate on")
    if len(lengths) >= FEW_DOCUMENTS:
        return len(lengths) - max(1, round(len(lengths) * VALIDATION_FRACTION)), 0
    left = max(1, round(sum(lengths) * VALIDATION_FRACTION))
    for document in reversed(range(len(lengths))):
        if lengths[document] >= left:
            character = lengths[document] - left
            return document, _next_line(parts(), document, character, (character + lengths[document]) // 2)
        left -= lengths[document]
    raise AssertionError("unreachable: the part is not larger than the whole")


def _next_line(parts: Iterable[Part], document: int, character: int, last: int) -> int:
    """Move from a character to the next beginning of a line up to `last`, if there is one."""
    seen = 0
    for part in parts if character else ():
        if part.document < document:
            continue
        if part.document > document or seen > last:
            break
        line = seen + part.text.find("\n", max(0, character - seen)) + 1
        if line > seen:
            return line if line <= last else character
        seen += len(part.text)
    return character


def training_part(parts: Iterable[Part], split: tuple[int, int]) -> Iterator[Part]:
    """Yield what comes before `split`."""
    return (before for before, _ in _cut(parts, split) if before.text)


def validation_part(parts: Iterable[Part], split: tuple[int, int]) -> Iterator[Part]:
    """Yield what comes from `split` on."""
    return (after for _, after in _cut(parts, split) if after.text)


def _cut(parts: Iterable[Part], split: tuple[int, int]) -> Iterator[tuple[Part, Part]]:
    seen = 0  # characters of the document that `split` is in
    for document, text in parts:
        cut = len(text) if document < split[0] else 0
        if document == split[0]:
            cut = max(0, split[1] - seen)
            seen += len(text)
        yield Part(document, text[:cut]), Part(document, text[cut:])
