"""Files of chats or pairs to shards: in parallel, in bounded memory, and gone on with after a kill.

Rows are encoded in parts of PART_ROWS, each written whole under FOLDER.parts with a note of where it ends; a process
that is killed and run again goes on behind the last of them. The parts then become the training and the validation
shard, and `manifest.json` says what was made of what.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from griffin.data.chat import Bad, Encoder, Kind, kind_of, text_bytes
from griffin.data.order import permute
from griffin.data.prepare import Data, checksums, expect, is_cached, stamp, verify
from griffin.data.shards import Shard, open_shard, write_shard
from griffin.data.sources import RawRow, Report, is_dataset, read_rows, row_files, silent, source_files
from griffin.errors import GriffinError
from griffin.files import whole_file, whole_folder
from griffin.reading import read_json
from griffin.tokenizer import Tokenizer, load_tokenizer

PART_ROWS = 20_000  # encoded between two places to go on from
_TASK_ROWS, _TASK_BYTES = 256, 1 << 20  # what a process encodes at a time
_FEW_BYTES = 4 << 20  # of files: processes take longer to start than to encode so little
_VERSION = 1  # of what is below: another one prepares anew
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What came of files."""

    data: Data
    kind: Kind
    bad: list[str]  # "FILE: line N: reason" of each row that was left out


def find_kind(source: str | Path) -> Kind:
    """Say what the rows of a file, folder or dataset are, by the first of them; "text" where they are text files.

    Raises:
        GriffinError: there are no files that are read, or the first row is nothing that is.
    """
    path = Path(source)
    if path.name.endswith((".txt", ".txt.gz", ".txt.zst", ".txt.xz")) or _only_text(path):
        return "text"
    files = row_files(path)
    row = next(read_rows(files), None)
    if row is None:
        raise GriffinError(f"{source} has no rows")
    try:
        return kind_of(row.content)
    except GriffinError as error:
        raise GriffinError(f"{_where(files, row)}: {error}") from error


def _only_text(path: Path) -> bool:
    return path.is_dir() and not is_dataset(path) and any(path.rglob("*.txt*")) and not any(path.rglob("*.jsonl*"))


def prepare_examples(
    source: str | Path,
    cache: str | Path,
    encoder: Encoder,
    *,
    validation: str | Path | None = None,
    fraction: float = 0.05,
    bad: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    expected: str | None = None,
    report: Report = silent,
) -> Prepared:
    """Encode once: what `cache` holds of the same files, tokenizer and choices is used as it stands.

    Args:
        source: a file of rows, a folder of such files, or a folder of `datasets`.
        cache: the folder that keeps the result; it is made, and replaced where what it was made of has changed.
        encoder: what rows mean, and the tokenizer.
        validation: like `source`; None holds out a share of the examples, drawn by their number.
        fraction: that share; at least one example.
        bad: what to do about a row that cannot be used: "stop", or "skip" it and name it in `Prepared.bad` and the
            manifest.
        workers: processes; None: as many as processors, none for a few megabytes. The result is the same.
        expected: the fingerprint that the data must have; None takes any.
        report: told how far it is.

    Raises:
        GriffinError: there are no examples, a row cannot be used (with its file, line and reason), or the data is not
            what is expected.
    """
    cache, sets = Path(cache), {"train": row_files(Path(source))}
    if validation is not None:
        sets["validation"] = row_files(Path(validation))
    every = [part for files in sets.values() for file in files for part in source_files(file)]
    before = [stamp(file) for file in every]
    tokenizer = encoder.tokenizer
    request: dict[str, Any] = {
        "version": _VERSION,
        "files": checksums(every, report),
        "sets": {name: len(files) for name, files in sets.items()},
        "tokenizer": tokenizer.fingerprint(),
        "chat_template": tokenizer.chat_template,
        "kind": encoder.kind,
        "learnt": encoder.learnt,
        "raw": encoder.raw,
        "fraction": fraction if validation is None else None,
        "bad": bad,
    }
    if not is_cached(cache, request):
        work = cache.with_name(f"{cache.name}.parts")
        _begin(work, request, tokenizer)
        done: dict[str, _Set] = {}
        with ExitStack() as stack:
            run = _pool(stack, encoder, work, sum(file.stat().st_size for file in every), workers)
            for name, files in sets.items():
                done[name] = _encode(name, files, work, encoder, run, bad, report)
        for file, was in zip(every, before, strict=True):
            if stamp(file) != was:
                raise GriffinError(f"{file} has changed while it was read; prepare again once it is complete")
        with whole_folder(cache) as folder:
            _join(folder, done, encoder, fraction, request)
            data = Data(
                load_tokenizer(folder / "tokenizer"), open_shard(folder / "train"), open_shard(folder / "validation")
            )
            expect(data, expected, source)
            (folder / "sources.json").write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work)
    data = _opened(cache)
    expect(data, expected, source)
    verify(data, report)
    return Prepared(data=data, kind=encoder.kind, bad=read_json(cache / MANIFEST)["bad"])


def _opened(folder: Path) -> Data:
    return Data(load_tokenizer(folder / "tokenizer"), open_shard(folder / "train"), open_shard(folder / "validation"))


class _Set(NamedTuple):
    """What was made of one set of files."""

    parts: list[Shard]
    bad: list[str]


class _Encoded(NamedTuple):
    """A task's documents in few arrays: what a process sends back."""

    ids: npt.NDArray[np.uint32]
    counted: npt.NDArray[np.bool_]
    sizes: list[int]
    num_bytes: list[int]
    bad: list[Bad]


_Run = Callable[[Iterable[list[RawRow]]], Iterator[_Encoded]]


def _begin(work: Path, request: object, tokenizer: Tokenizer) -> None:
    """Make the folder of parts, or keep the one that a killed process of the same request left."""
    if work.exists() and not is_cached(work, request):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(work / "tokenizer")
    with whole_file(work / "sources.json") as file:
        file.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")


def _pool(stack: ExitStack, encoder: Encoder, work: Path, num_bytes: int, workers: int | None) -> _Run:
    """How tasks are run: here, or by processes, a few ahead of what is written."""
    wanted = workers if workers is not None else 0 if num_bytes < _FEW_BYTES else (os.cpu_count() or 1)
    if wanted < 1:
        return lambda tasks: (_task(encoder, task) for task in tasks)
    settings = (str(work / "tokenizer"), encoder.kind, encoder.learnt, encoder.raw)
    pool = stack.enter_context(
        ProcessPoolExecutor(wanted, mp_context=get_context("spawn"), initializer=_start, initargs=settings)
    )

    def run(tasks: Iterable[list[RawRow]]) -> Iterator[_Encoded]:
        ahead: deque[Future[_Encoded]] = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(_work, task))
                if len(ahead) > 2 * wanted:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    return run


_encoders: list[Encoder] = []  # of a process of the pool: made once, when it starts


def _start(folder: str, kind: Kind, learnt: Any, raw: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each processor
    _encoders.append(Encoder(load_tokenizer(folder), kind, learnt, raw))


def _work(task: list[RawRow]) -> _Encoded:
    return _task(_encoders[0], task)


def _task(encoder: Encoder, rows: list[RawRow]) -> _Encoded:
    documents, bad = encoder.encode(rows)
    ids = [document.ids for document in documents] or [np.zeros(0, np.uint32)]
    counted = [document.counted for document in documents] or [np.zeros(0, np.bool_)]
    sizes, num_bytes = [len(document.ids) for document in documents], [document.num_bytes for document in documents]
    return _Encoded(np.concatenate(ids), np.concatenate(counted), sizes, num_bytes, bad)


def _encode(name: str, files: list[Path], work: Path, encoder: Encoder, run: _Run, bad: str, report: Report) -> _Set:
    """Encode the rows of files part by part; those that are there already are kept."""
    done = _Set([], [])
    after: list[int] | None = [0, 0]
    rows: Iterator[RawRow] | None = None
    for number in count():
        place, note = work / f"{name}-{number:05d}", work / f"{name}-{number:05d}.json"
        if note.exists():
            record = read_json(note)
        else:
            if rows is None:
                assert after is not None
                rows = read_rows(files, after=(after[0], after[1]), report=report, what="encoding")
            record = _write_part(place, islice(rows, PART_ROWS), files, encoder, run, bad)
            with whole_file(note) as file:
                file.write_text(json.dumps(record) + "\n", encoding="utf-8")
        done.parts.append(open_shard(place))
        done.bad.extend(record["bad"])
        after = record["after"]
        if after is None:
            return done
    raise AssertionError("unreachable: the last part says that it is")


def _write_part(
    place: Path, rows: Iterator[RawRow], files: list[Path], encoder: Encoder, run: _Run, bad: str
) -> dict[str, Any]:
    record: dict[str, Any] = {"after": None, "bad": []}
    seen = 0

    def tasks() -> Iterator[list[RawRow]]:
        nonlocal seen
        task: list[RawRow] = []
        size = 0
        for row in rows:
            seen += 1
            record["after"] = [row.file, row.number]
            task.append(row)
            size += len(row.content) if isinstance(row.content, bytes) else 1024
            if len(task) >= _TASK_ROWS or size >= _TASK_BYTES:
                yield task
                task, size = [], 0
        if task:
            yield task

    def documents() -> Iterator[tuple[int, npt.NDArray[np.uint32], int, npt.NDArray[np.bool_]]]:
        document = 0
        for encoded in run(tasks()):
            texts = [f"{_where(files, each)}: {each.reason}" for each in encoded.bad]
            if texts and bad == "stop":
                more = f" (and {len(texts) - 1} more of the rows around it)" if len(texts) > 1 else ""
                raise GriffinError(f"{texts[0]}{more}; mend it, or leave bad rows out (--bad-rows skip)")
            record["bad"] += texts
            at = 0
            for size, num_bytes in zip(encoded.sizes, encoded.num_bytes, strict=True):
                yield document, encoded.ids[at : at + size], num_bytes, encoded.counted[at : at + size]
                at += size
                document += 1

    tokenizer = encoder.tokenizer
    write_shard(place, documents(), vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint(), masked=True)
    if seen < PART_ROWS:
        record["after"] = None
    return record


def _where(files: Sequence[Path], row: RawRow | Bad) -> str:
    file = files[row.file]
    return f"{file}: {'line' if '.jsonl' in file.name else 'row'} {row.number}"


def _join(folder: Path, done: dict[str, _Set], encoder: Encoder, fraction: float, request: dict[str, Any]) -> None:
    """Write the tokenizer, the two shards and the manifest."""
    unit = 2 if encoder.kind == "pairs" else 1
    totals = {name: sum(part.meta.num_documents for part in made.parts) // unit for name, made in done.items()}
    for name, total in totals.items():
        if total < (1 if "validation" in totals else 2):
            raise GriffinError(f"{total} examples for {name} are not enough; give more, or mend the bad rows")
    tokenizer = encoder.tokenizer
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    train = done["train"].parts
    chosen: dict[str, tuple[list[Shard], npt.NDArray[np.bool_] | None]]
    if "validation" in done:
        chosen = {"train": (train, None), "validation": (done["validation"].parts, None)}
    else:
        total = totals["train"]
        held_out = np.zeros(total, dtype=np.bool_)
        number = min(total - 1, max(1, round(fraction * total)))
        held_out[[index for index in range(total) if permute(index, total, total) < number]] = True
        by_document = np.repeat(held_out, unit)
        chosen = {"train": (train, ~by_document), "validation": (train, by_document)}
    metas = {}
    for name, (parts, wanted) in chosen.items():
        metas[name] = write_shard(
            folder / name,
            _documents_of(parts, wanted, tokenizer),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint(),
            masked=True,
        )
    manifest = {
        **request,
        "bad": [text for made in done.values() for text in made.bad],
        "examples": {name: meta.num_documents // unit for name, meta in metas.items()},
        "shards": {name: {"tokens": meta.num_tokens, "sha256": meta.tokens_sha256} for name, meta in metas.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _documents_of(
    parts: list[Shard], wanted: npt.NDArray[np.bool_] | None, tokenizer: Tokenizer
) -> Iterator[tuple[int, npt.NDArray[Any], int, npt.NDArray[np.bool_]]]:
    """The documents of parts, all or those that are wanted. A byte of text counts where its token does."""
    number = 0
    for part in parts:
        assert part.counted is not None
        for first, end in zip(part.starts, part.starts[1:], strict=False):
            if wanted is None or wanted[number]:
                ids, counted = part.tokens[first:end], part.counted[first:end]
                yield number, ids, text_bytes(tokenizer, ids[counted]), counted
            number += 1
