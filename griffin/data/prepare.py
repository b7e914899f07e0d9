"""A text, or a folder of tokens, to what training reads: a tokenizer, a training shard and a validation shard."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from griffin.data.encode import encode_documents
from griffin.data.shards import Shard, is_shard, open_shard, sha256, write_shard
from griffin.data.sources import Report, silent
from griffin.data.text import (
    Part,
    divided,
    read_parts,
    split_point,
    text_files,
    training_part,
    validation_part,
)
from griffin.errors import GriffinError
from griffin.files import whole_folder
from griffin.tokenizer import TRAINED_SPECIALS, Tokenizer, load_tokenizer
from griffin.tokenizer.bpe import check_size, pieces

_VERSION = 1  # of what is below: another one prepares anew


@dataclass(frozen=True, eq=False)
class Data:
    """What training reads."""

    tokenizer: Tokenizer
    train: Shard
    validation: Shard

    def fingerprint(self) -> str:
        """A sha256 of every token: a run goes on only with the data it began with."""
        shards = (self.train.meta, self.validation.meta)
        masks = "".join(f" {meta.counted_sha256}" for meta in shards if meta.counted_sha256 is not None)
        return hashlib.sha256((" ".join(map(str, shards)) + masks).encode()).hexdigest()


def prepare(
    source: str | Path,
    cache: str | Path,
    *,
    tokenizer: str,
    validation: str | Path | None = None,
    divider: str | None = None,
    expected: str | None = None,
    report: Report = silent,
) -> Data:
    """Tokenise once: what `cache` holds of the same files and tokenizer is used as it stands.

    Args:
        source: a text file, a folder of text files, or a shard folder.
        cache: the folder that keeps the result; it is made, and replaced where its sources have changed.
        tokenizer: "bpe:4096" learns one of that size from the training text; "bytes"; or a path to one.
        validation: like `source`; None takes the last 5% of the text.
        divider: a text that ends a document too, and is no part of it; None: there is none.
        expected: the fingerprint that the data must have; None takes any. What the cache holds is kept if not.
        report: told how far it is.

    Raises:
        GriffinError: there is no text, it cannot be read, the tokenizer is not one or does not fit a shard, or the data
            is not what is expected.
    """
    cache = Path(cache)
    if is_shard(source):
        data = _open_shards(Path(source), validation, tokenizer)
    else:
        files = text_files(source)
        held_out = None if validation is None else text_files(validation)
        spec = _named_tokenizer(tokenizer)
        every = [*files, *(held_out or ())]
        before = [stamp(file) for file in every]
        sums = checksums(every, report)
        request = {
            "version": _VERSION,
            "train": sums[: len(files)],
            "validation": None if held_out is None else sums[len(files) :],
            "tokenizer": spec,
            **({} if divider is None else {"divider": divider}),
        }
        if not is_cached(cache, request):
            with whole_folder(cache) as folder:
                _write(folder, files, held_out, tokenizer, divider, report)
                made = folder / "tokenizer", folder / "train", folder / "validation"
                expect(Data(load_tokenizer(made[0]), *map(open_shard, made[1:])), expected, source)
                (folder / "sources.json").write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
                for file, was in zip(every, before, strict=True):
                    if stamp(file) != was:
                        raise GriffinError(f"{file} has changed while it was read; prepare again once it is complete")
        data = Data(load_tokenizer(cache / "tokenizer"), open_shard(cache / "train"), open_shard(cache / "validation"))
        for shard in (data.train, data.validation):
            if shard.meta.tokenizer != data.tokenizer.fingerprint():
                raise GriffinError(
                    f"{cache / 'tokenizer'} is not what made {shard.folder}; remove {cache} to prepare anew"
                )
        expect(data, expected, source)
    verify(data, report)
    return data


def verify(data: Data, report: Report) -> None:
    """Read all of it and compare the checksums: raise GriffinError where a file is not what was written."""
    total, done = data.train.tokens.nbytes + data.validation.tokens.nbytes, 0

    def progress(size: int) -> None:
        nonlocal done
        done = min(total, done + size)
        report("checking", done, total)

    data.train.verify(progress)
    data.validation.verify(progress)


def expect(data: Data, fingerprint: str | None, source: str | Path) -> None:
    """Raise GriffinError unless the data has the fingerprint that it must have."""
    if fingerprint is not None and data.fingerprint() != fingerprint:
        raise GriffinError(
            f"{source}: the run was trained on other data ({fingerprint[:12]}, now {data.fingerprint()[:12]}): "
            "bring the text back as it was, or begin anew in another folder"
        )


def _write(
    folder: Path, files: list[Path], held_out: list[Path] | None, spec: str, divider: str | None, report: Report
) -> None:
    def read(files: list[Path], what: str = "reading") -> Iterator[Part]:
        return divided(read_parts(files, report, what), divider)

    if held_out is None:
        split = split_point(lambda: read(files), where=files[0])

    def train_parts(what: str) -> Iterator[Part]:
        parts = read(files, what)
        return parts if held_out is not None else training_part(parts, split)

    def validation_parts(what: str) -> Iterator[Part]:
        if held_out is not None:
            return read(held_out, what)
        return validation_part(read(files, what), split)

    tokenizer = _make_tokenizer(spec, train_parts)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    parts = {"train": train_parts("tokenising"), "validation": validation_parts("tokenising for validation")}
    for name, texts in parts.items():
        meta = write_shard(
            folder / name,
            encode_documents(tokenizer, texts),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint(),
        )
        if not meta.num_bytes:
            raise GriffinError(f"{files[0] if name == 'train' or not held_out else held_out[0]}: no text for {name}")


def _make_tokenizer(spec: str, parts: Callable[[str], Iterator[Part]]) -> Tokenizer:
    if spec == "bytes":
        return Tokenizer.bytes()
    if spec.startswith("bpe:"):
        return Tokenizer.train(learning_pieces(parts("learning the vocabulary")), parse_bpe(spec))
    return load_tokenizer(spec)


def learning_pieces(parts: Iterable[Part]) -> Iterator[str]:
    """Cut documents into pieces to learn a vocabulary from, none of which is of two documents."""
    for _, document in groupby(parts, key=attrgetter("document")):
        yield from pieces(part.text for part in document)


def parse_bpe(spec: str) -> int:
    """Give the size in "bpe:4096".

    Raises:
        GriffinError: it is not a whole number, or one that no vocabulary can have.
    """
    size = spec.removeprefix("bpe:")
    if re.fullmatch("[0-9]{1,30}", size) is None:
        raise GriffinError(f"tokenizer={spec!r}: write bpe:4096 for a BPE of 4,096 tokens, or bytes, or a path")
    check_size(int(size), len(TRAINED_SPECIALS))
    return int(size)


def _named_tokenizer(spec: str) -> str:
    if spec.startswith("bpe:"):
        parse_bpe(spec)
    if spec == "bytes" or spec.startswith("bpe:"):
        return spec
    if not Path(spec).exists():
        raise GriffinError(f"tokenizer={spec!r} is neither bpe:SIZE nor bytes nor a file or folder that exists")
    return load_tokenizer(spec).fingerprint()


def checksums(files: list[Path], report: Report) -> list[list[str]]:
    """Give [name, sha256] of each file."""
    total, done = sum(file.stat().st_size for file in files), 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        report("looking for changes", done, total)

    return [[file.name, sha256(file, progress)] for file in files]


def stamp(file: Path) -> tuple[int, int]:
    """What changes where somebody writes a file."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def is_cached(cache: Path, request: object) -> bool:
    """Whether a folder was made of what is asked for."""
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
