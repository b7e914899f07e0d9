"""Rows of data files as people have them: lines of JSON, also compressed, parquet, Hugging Face datasets on disk."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from griffin.errors import GriffinError

COMPRESSED = ("", ".gz", ".zst", ".xz")
ROW_SUFFIXES = (*(f".jsonl{suffix}" for suffix in COMPRESSED), ".parquet")
MOST_ROW_BYTES = 16 << 20  # of one example: longer is not one
_BLOCK_ROWS = 256  # of a parquet file or a dataset, made into Python objects at a time


Report = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all); a total of 0 is unknown


def silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


class RawRow(NamedTuple):
    """A row that nothing has looked at."""

    file: int  # which of the files
    number: int  # its line or row, from 1
    content: bytes | dict[str, Any] | None  # JSON of a line, or columns by name; None: more than MOST_ROW_BYTES


@contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file, and what it holds: the same, unless its name says that it is compressed.

    Raises:
        GriffinError: it is compressed and damaged (also while it is read within the `with`), or .zst and no package
            for it is there.
    """
    errors: tuple[type[Exception], ...] = (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error)
    with ExitStack() as stack:
        raw = stack.enter_context(file.open("rb"))
        content: IO[bytes] = raw
        if file.suffix == ".xz":
            content = cast(IO[bytes], stack.enter_context(lzma.open(raw)))
        elif file.suffix == ".gz":
            content = cast(IO[bytes], stack.enter_context(gzip.open(raw)))
        elif file.suffix == ".zst":
            need("zstandard", file)
            import io

            import zstandard  # an optional dependency

            errors = (*errors, zstandard.ZstdError)
            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            content = cast(IO[bytes], stack.enter_context(io.BufferedReader(reader)))
        try:
            yield raw, content
        except errors as error:
            raise GriffinError(f"{file}: not a whole {file.suffix} file ({error}); download it again") from error


def need(package: str, file: Path) -> None:
    """Raise GriffinError unless a package of the extra `data` is installed."""
    if importlib.util.find_spec(package) is None:
        raise GriffinError(f'{file}: reading it needs {package}: pip install "griffin-lm[data]"')


def row_files(path: Path) -> list[Path]:
    """Give a file of rows, a dataset's folder, or the files in a folder and below it in the order of their paths.

    Raises:
        GriffinError: there is none, or the file has another suffix.
    """
    if is_dataset(path):
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(ROW_SUFFIXES) and file.is_file())
        files = [file for file in files if file.name != "metrics.jsonl"]  # a run's
        if not files:
            raise GriffinError(f"{path}: no {', '.join(ROW_SUFFIXES)} files in this folder")
        return files
    if not path.is_file():
        raise GriffinError(f"{path}: no such file or folder")
    if not path.name.endswith(ROW_SUFFIXES):
        raise GriffinError(f"{path}: no examples by its name; they are in {', '.join(ROW_SUFFIXES)}")
    return [path]


def is_dataset(path: Path) -> bool:
    """Whether a folder is what `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def read_rows(
    files: Sequence[Path], *, after: tuple[int, int] = (0, 0), report: Report = silent, what: str = "reading"
) -> Iterator[RawRow]:
    """Yield the rows of files in order, one block of them in memory at a time. Blank lines are none.

    Args:
        files: from `row_files`.
        after: (file, number) of the last row that is not wanted.
        report: told of the bytes read of the files as they lie on disk.
        what: is being done, for the report.

    Raises:
        GriffinError: a file is damaged, or reading it needs a package that is not there.
    """
    sizes = [_size(file) for file in files]
    for index, file in enumerate(files):
        if index < after[0]:
            continue
        skip = after[1] if index == after[0] else 0
        before = sum(sizes[:index])
        if is_dataset(file):
            rows = _dataset_rows(file, skip)
        elif file.suffix == ".parquet":
            rows = _parquet_rows(file, skip)
        else:
            rows = _lines(file, skip)
        for count, (number, content, done) in enumerate(rows):
            if count % _BLOCK_ROWS == 0:
                report(what, before + int(done * sizes[index]), sum(sizes))
            yield RawRow(index, number, content)
        report(what, before + sizes[index], sum(sizes))


def source_files(file: Path) -> list[Path]:
    """The files that one of `row_files` is: itself, or those of a dataset's folder."""
    return sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]


def _size(file: Path) -> int:
    return sum(path.stat().st_size for path in source_files(file))


_Numbered = Iterator[
    tuple[int, bytes | dict[str, Any] | None, float]
]  # number, content, share of the file that is read


def _lines(file: Path, skip: int) -> _Numbered:
    size = max(1, file.stat().st_size)
    with opened(file) as (raw, content):
        number = 0
        while line := content.readline(MOST_ROW_BYTES + 1):
            number += 1
            whole: bytes | None = line
            while not line.endswith(b"\n") and len(line) > MOST_ROW_BYTES:
                whole = None
                line = content.readline(MOST_ROW_BYTES + 1)
            if number > skip and (whole is None or whole.strip()):
                yield number, whole, raw.tell() / size


def _parquet_rows(file: Path, skip: int) -> _Numbered:
    need("pyarrow", file)
    import pyarrow as arrow  # optional dependencies
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            total, number = max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=_BLOCK_ROWS):
                if number + batch.num_rows <= skip:
                    number += batch.num_rows
                    continue
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield number, _without_none(row), number / total
    except (arrow.ArrowInvalid, OSError) as error:
        raise GriffinError(f"{file}: not a whole parquet file ({error}); download it again") from error


def _dataset_rows(folder: Path, skip: int) -> _Numbered:
    need("datasets", folder)
    import datasets  # an optional dependency

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise GriffinError(f"{folder}: not a whole dataset ({error}); save it again with save_to_disk") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise GriffinError(f"{folder} has {', '.join(loaded)} and no train; name the folder of one of them")
        loaded = loaded["train"]
    total = max(1, len(loaded))
    for first in range(skip - skip % _BLOCK_ROWS, len(loaded), _BLOCK_ROWS):
        block = loaded.select(range(first, min(len(loaded), first + _BLOCK_ROWS)))
        for number, row in enumerate(block, first + 1):
            if number > skip:
                yield number, _without_none(row), number / total


def _without_none(row: dict[str, Any]) -> dict[str, Any]:
    """A column that a row does not have is no key of it."""
    return {name: value for name, value in row.items() if value is not None}
