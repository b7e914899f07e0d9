"""Token shards: documents of ids on disk, memory-mapped, written whole or not at all.

A shard is a folder: `tokens.bin` (ids, uint16 or uint32 little endian, documents one after another), `documents.idx`
(int64 little endian: where each document starts, and the end) and `meta.json` (sizes, checksums, the tokenizer). Where
only a part of the tokens is to be learnt, as of chats the answers, `counted.bin` has a byte for each, 1 or 0.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from griffin.errors import GriffinError
from griffin.files import whole_folder
from griffin.reading import read_json

FORMAT = "griffin-shard-1"
SHA256 = "sha256"  # of the rest of meta.json
AGAIN = "remove the folder and prepare the data again"
TOKENS, DOCUMENTS, META, COUNTED = "tokens.bin", "documents.idx", "meta.json", "counted.bin"
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Ids = Sequence[int] | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """What meta.json says."""

    format: str
    dtype: str  # of tokens.bin
    vocab_size: int  # every id is below it
    num_documents: int
    num_tokens: int
    num_bytes: int  # UTF-8 bytes of the text that the tokens stand for
    tokenizer: str  # its fingerprint
    tokens_sha256: str
    documents_sha256: str
    # None: every token is learnt, and meta.json has no such key. It is no part of what older runs' fingerprints name.
    counted_sha256: str | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard; the arrays are views of the files."""

    folder: Path
    meta: ShardMeta
    tokens: npt.NDArray[Any]  # (num_tokens,)
    starts: npt.NDArray[np.int64]  # (num_documents + 1,) first token of each document, then num_tokens
    counted: npt.NDArray[np.bool_] | None = None  # (num_tokens,) whether a token is to be learnt; None: all are

    def verify(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Read everything and compare the checksums.

        Args:
            progress: told of bytes read, again and again.

        Raises:
            GriffinError: a file is not what was written.
        """
        sums = {TOKENS: self.meta.tokens_sha256, DOCUMENTS: self.meta.documents_sha256}
        if self.meta.counted_sha256 is not None:
            sums[COUNTED] = self.meta.counted_sha256
        for name, expected in sums.items():
            found = sha256(self.folder / name, progress)
            if found != expected:
                raise GriffinError(
                    f"{self.folder / name} has changed since it was written (sha256 {found[:12]}, {META} says "
                    f"{expected[:12]}); remove {self.folder} and prepare the data again"
                )


def write_shard(
    folder: str | Path,
    parts: Iterable[tuple[int, Ids, int] | tuple[int, Ids, int, npt.NDArray[np.bool_]]],
    *,
    vocab_size: int,
    tokenizer: str,
    masked: bool = False,
) -> ShardMeta:
    """Write documents as they come, a part in memory at a time; the folder appears when all of them are written.

    Args:
        folder: is made, or replaced where it is there.
        parts: (document, ids, UTF-8 bytes they stand for); the ids as the model shall see them, BOS and EOS included.
            The next document begins where the number changes; one without ids is left out.
        vocab_size: decides the dtype: uint16 up to 65,536 ids.
        tokenizer: the fingerprint of the tokenizer that made the ids.
        masked: each part also says of each id whether it is to be learnt.

    Raises:
        GriffinError: an id is not in 0 .. vocab_size - 1.
    """
    name = "uint16" if vocab_size <= 2**16 else "uint32"
    starts, num_tokens, num_bytes, digest = array("q"), 0, 0, hashlib.sha256()
    current: int | None = None
    masks = hashlib.sha256()
    with whole_folder(folder) as temporary:
        with ExitStack() as stack:
            file = stack.enter_context((temporary / TOKENS).open("wb"))
            mask_file = stack.enter_context((temporary / COUNTED).open("wb")) if masked else None
            for document, part, size, *counted in parts:
                ids = np.asarray(part)
                num_bytes += size
                if not ids.size:
                    continue
                if document != current:
                    current = document
                    starts.append(num_tokens)
                if (low := int(ids.min())) < 0 or int(ids.max()) >= vocab_size:
                    bad = low if low < 0 else int(ids.max())
                    raise GriffinError(f"document {document} has token {bad}, not in 0 .. {vocab_size - 1}")
                data = ids.astype(_DTYPES[name]).tobytes()
                file.write(data)
                digest.update(data)
                num_tokens += ids.size
                if mask_file is not None:
                    mask = np.asarray(counted[0], dtype=np.bool_).tobytes()
                    assert len(mask) == ids.size
                    mask_file.write(mask)
                    masks.update(mask)
        starts.append(num_tokens)
        index = np.array(starts, dtype="<i8").tobytes()
        (temporary / DOCUMENTS).write_bytes(index)
        meta = ShardMeta(
            format=FORMAT,
            dtype=name,
            vocab_size=vocab_size,
            num_documents=len(starts) - 1,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            tokenizer=tokenizer,
            tokens_sha256=digest.hexdigest(),
            documents_sha256=hashlib.sha256(index).hexdigest(),
            counted_sha256=masks.hexdigest() if masked else None,
        )
        content = {**_content(meta), SHA256: _digest(meta)}
        (temporary / META).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return meta


def _content(meta: ShardMeta) -> dict[str, object]:
    return {name: value for name, value in asdict(meta).items() if value is not None}


def _digest(meta: ShardMeta) -> str:
    return hashlib.sha256(json.dumps(_content(meta), sort_keys=True).encode()).hexdigest()


def sha256(file: Path, progress: Callable[[int], None]) -> str:
    """Return the checksum of a file; `progress` is told of the bytes read since it was told last."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def is_shard(folder: str | Path) -> bool:
    """Whether a folder looks like a shard, whole or damaged."""
    return (Path(folder) / TOKENS).exists()


def open_shard(folder: str | Path) -> Shard:
    """Open a shard. Sizes and document starts are checked; `Shard.verify` checks every byte.

    Raises:
        GriffinError: a file is missing, truncated, too long or contradicts another, or this is no shard.
    """
    folder = Path(folder)
    meta = _read_meta(folder / META)
    dtype = _DTYPES[meta.dtype]
    sizes = {TOKENS: meta.num_tokens * dtype.itemsize, DOCUMENTS: (meta.num_documents + 1) * 8}
    if meta.counted_sha256 is not None:
        sizes[COUNTED] = meta.num_tokens
    for name, expected in sizes.items():
        file = folder / name
        if not file.is_file():
            raise GriffinError(f"{file} is missing; prepare the data again")
        if (size := file.stat().st_size) != expected:
            raise GriffinError(f"{file} has {size} bytes, {META} says {expected}: not a whole copy; copy it again")
    starts = np.fromfile(folder / DOCUMENTS, dtype="<i8")
    if starts[0] != 0 or starts[-1] != meta.num_tokens or (np.diff(starts) <= 0).any():
        raise GriffinError(f"{folder / DOCUMENTS} does not fit {TOKENS}; prepare the data again")
    tokens: npt.NDArray[Any] = np.empty(0, dtype)  # an empty file cannot be mapped
    if meta.num_tokens:
        tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r")
    counted = None
    if meta.counted_sha256 is not None:
        counted = np.zeros(0, np.bool_)
        if meta.num_tokens:
            counted = np.memmap(folder / COUNTED, dtype=np.bool_, mode="r")
    return Shard(folder, meta, tokens, starts, counted)


def _read_meta(file: Path) -> ShardMeta:
    if not file.is_file():
        raise GriffinError(f"{file} is missing: {file.parent} is not a folder of tokens")
    data = read_json(file, mend=AGAIN)
    if data.get("format") != FORMAT:
        raise GriffinError(f"{file} is of format {str(data.get('format'))[:40]!r}; this version reads {FORMAT!r}")
    expected = data.pop(SHA256, None)  # shards of earlier versions have none
    data.setdefault("counted_sha256", None)
    if data.keys() != (keys := {each.name for each in fields(ShardMeta)}):
        lacking, more = ", ".join(sorted(keys - data.keys())), len(data.keys() - keys)
        raise GriffinError(
            f"{file} does not have the keys of {FORMAT} (it lacks {lacking or 'none'}, and has {more} others); {AGAIN}"
        )
    meta = ShardMeta(**data)
    counts = (meta.num_documents, meta.num_tokens, meta.num_bytes, meta.vocab_size)
    texts = (meta.dtype, meta.tokenizer, meta.tokens_sha256, meta.documents_sha256)
    if (
        not all(type(count) is int and 0 <= count < 2**62 for count in counts)
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(meta.counted_sha256, str | None)
        or meta.dtype not in _DTYPES
    ):
        raise GriffinError(f"{file} has values that make no sense; {AGAIN}")
    if expected not in (None, _digest(meta)):
        raise GriffinError(f"{file} has changed since it was written; {AGAIN}")
    return meta
