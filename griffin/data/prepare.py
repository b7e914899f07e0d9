"""A text, or a folder of tokens, to what training reads: a tokenizer, a training shard and a validation shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from griffin.data.shards import Shard, is_shard, open_shard, write_shard
from griffin.data.text import (
    Report,
    read_documents,
    silent,
    split_point,
    text_files,
    training_part,
    validation_part,
)
from griffin.errors import GriffinError
from griffin.files import whole_folder
from griffin.tokenizer import Tokenizer, load_tokenizer

_PIECE_CHARS = 1 << 16  # encoded in parallel; a piece ends with a line
_VERSION = 1  # of what is below: another one prepares anew


@dataclass(frozen=True, eq=False)
class Data:
    """What training reads."""

    tokenizer: Tokenizer
    train: Shard
    validation: Shard

    def fingerprint(self) -> str:
        """A sha256 of every token: a run goes on only with the data it began with."""
        return hashlib.sha256(f"{self.train.meta} {self.validation.meta}".encode()).hexdigest()


def prepare(
    source: str | Path,
    cache: str | Path,
    *,
    tokenizer: str,
    validation: str | Path | None = None,
    expected: str | None = None,
    report: Report = silent,
) -> Data:
    """Tokenise once: what `cache` holds of the same files and tokenizer is used as it stands.

    Args:
        source: a text file, a folder of text files, or a shard folder.
        cache: the folder that keeps the result; it is made, and replaced where its sources have changed.
        tokenizer: "bpe:4096" learns one of that size from the training text; "bytes"; or a path to one.
        validation: like `source`; None takes the last 5% of the text.
        expected: the fingerprint that the data must have; None takes any. What the cache holds is kept if not.
        report: told how far it is.

    Raises:
        GriffinError: there is no text, it cannot be read, the tokenizer is not one or does not fit a shard, or the data
            is not what is expected.
    """
    cache = Path(cache)
    if is_shard(source):
        return _open_shards(Path(source), validation, tokenizer)
    files = text_files(source)
    held_out = None if validation is None else text_files(validation)
    request = {
        "version": _VERSION,
        "train": _checksums(files, report),
        "validation": None if held_out is None else _checksums(held_out, report),
        "tokenizer": _named_tokenizer(tokenizer),
    }
    if not _is_cached(cache, request):
        with whole_folder(cache) as folder:
            _write(folder, files, held_out, tokenizer, report)
            parts = folder / "tokenizer", folder / "train", folder / "validation"
            _expect(Data(load_tokenizer(parts[0]), *map(open_shard, parts[1:])), expected, source)
            (folder / "sources.json").write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
    data = Data(load_tokenizer(cache / "tokenizer"), open_shard(cache / "train"), open_shard(cache / "validation"))
    _expect(data, expected, source)
    data.train.verify()
    data.validation.verify()
    return data


def _expect(data: Data, fingerprint: str | None, source: str | Path) -> None:
    if fingerprint is not None and data.fingerprint() != fingerprint:
        raise GriffinError(
            f"{source}: the run was trained on other data ({fingerprint[:12]}, now {data.fingerprint()[:12]}): "
            "bring the text back as it was, or begin anew in another folder"
        )


def _write(folder: Path, files: list[Path], held_out: list[Path] | None, spec: str, report: Report) -> None:
    if held_out is None:
        split = split_point(read_documents(files, report), where=files[0])

    def train_documents(what: str) -> Iterator[str]:
        documents = read_documents(files, report, what)
        return documents if held_out is not None else training_part(documents, split)

    def validation_documents(what: str) -> Iterator[str]:
        if held_out is not None:
            return read_documents(held_out, report, what)
        return validation_part(read_documents(files, report, what), split)

    tokenizer = _make_tokenizer(spec, train_documents)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    parts = {"train": train_documents("tokenising"), "validation": validation_documents("tokenising for validation")}
    for name, documents in parts.items():
        meta = write_shard(
            folder / name,
            encode_documents(tokenizer, documents),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint(),
            count_bytes=tokenizer.token_bytes,
        )
        if not meta.num_bytes:
            raise GriffinError(f"{files[0] if name == 'train' or not held_out else held_out[0]}: no text for {name}")


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield BOS + ids + EOS of each document, as far as the tokenizer has the two."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for document in documents:
        pieces = tokenizer.encode_batch(list(_pieces(document)), bos=False)
        yield np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in (begin, *pieces, end)])


def _pieces(document: str) -> Iterator[str]:
    """Cut at lines: a long text is encoded in parallel, and no piece is larger than it needs to be."""
    start = 0
    while start < len(document):
        end = document.find("\n", start + _PIECE_CHARS) + 1
        yield document[start : end or len(document)]
        start = end or len(document)


def _make_tokenizer(spec: str, documents: Callable[[str], Iterator[str]]) -> Tokenizer:
    if spec == "bytes":
        return Tokenizer.bytes()
    if spec.startswith("bpe:"):
        pieces = (piece for document in documents("learning the vocabulary") for piece in _pieces(document))
        return Tokenizer.train(pieces, parse_bpe(spec))
    return load_tokenizer(spec)


def parse_bpe(spec: str) -> int:
    """Give the size in "bpe:4096".

    Raises:
        GriffinError: it is not a whole number.
    """
    size = spec.removeprefix("bpe:")
    if not size.isascii() or not size.isdigit():
        raise GriffinError(f"tokenizer={spec!r}: write bpe:4096 for a BPE of 4,096 tokens, or bytes, or a path")
    return int(size)


def _named_tokenizer(spec: str) -> str:
    if spec == "bytes" or spec.startswith("bpe:"):
        return spec
    if not Path(spec).exists():
        raise GriffinError(f"tokenizer={spec!r} is neither bpe:SIZE nor bytes nor a file or folder that exists")
    return load_tokenizer(spec).fingerprint()


def _checksums(files: list[Path], report: Report) -> list[list[str]]:
    result = []
    for number, file in enumerate(files):
        report("looking for changes", number, len(files))
        with file.open("rb") as opened:
            result.append([file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    return result


def _is_cached(cache: Path, request: object) -> bool:
    try:
        return bool(json.loads((cache / "sources.json").read_text(encoding="utf-8")) == request)
    except (OSError, ValueError):
        return False


def _open_shards(source: Path, validation: str | Path | None, spec: str) -> Data:
    if validation is None or not is_shard(validation):
        raise GriffinError(f"{source} is a folder of tokens: name another one for validation (validation_data=...)")
    if spec == "bytes":
        tokenizer = Tokenizer.bytes()
    elif spec.startswith("bpe:"):
        raise GriffinError(f"{source} is tokenised already: give the path of its tokenizer instead of {spec!r}")
    else:
        tokenizer = load_tokenizer(spec)
    shards = open_shard(source), open_shard(validation)
    for shard in shards:
        if shard.meta.tokenizer != tokenizer.fingerprint():
            raise GriffinError(
                f"{shard.folder} was made with another tokenizer ({shard.meta.tokenizer[:12]}, "
                f"{spec} is {tokenizer.fingerprint()[:12]}); give the one it was made with"
            )
    return Data(tokenizer, *shards)
