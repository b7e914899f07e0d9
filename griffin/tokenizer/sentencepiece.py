"""Google's `tokenizer.model` (a SentencePiece protobuf) as a `tokenizers.Tokenizer`, which saves as tokenizer.json.

The file is read directly: its wire format needs forty lines, and no package has to be installed. The ids are those
that SentencePiece gives, with these exceptions:

- `<start_of_turn>` and `<end_of_turn>`, user-defined symbols in Gemma's file, are made control tokens by `Tokenizer`,
  so that text cannot produce them.
- Where one piece can be made from two pairs of shorter ones at overlapping places, SentencePiece takes the leftmost
  and `tokenizers` the pair that comes first in its list. Comparing 470 million characters of books and
  made-up text under Gemma's vocabulary showed no such place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from griffin.errors import GriffinError
from griffin.reading import check_regular

MOST_BYTES = 64 << 20  # of a file: a million pieces take 20 MB
MOST_WORK = 100_000_000  # characters looked at while joining pieces: Gemma's 256,000 take 10 million

# The protobuf's own numbers: SentencePiece.Type and TrainerSpec.ModelType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

Field = tuple[int, int | bytes]


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


def convert(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """Read a SentencePiece BPE model; return the backend and its bos_token, eos_token and pad_token.

    Raises:
        GriffinError: the file is truncated or is no SentencePiece model, or it needs what is not supported here:
            another algorithm than BPE, a normaliser that changes text, unused pieces.
    """
    if (size := check_regular(path, mend="download it again")) > MOST_BYTES:
        raise GriffinError(f"{path} is {size:,} bytes, more than {MOST_BYTES:,}; download it again")
    try:
        pieces, trainer, normalizer = _read_model(path.read_bytes())
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise GriffinError(
            f"{path}: not a whole SentencePiece model ({error or type(error).__name__}); download it again"
        ) from error
    _refuse(path, pieces, trainer, normalizer)

    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise GriffinError(f"{path}: {len(pieces)} pieces, but only {len(vocabulary)} different ones; repair the file")
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(trainer.get(35, 0)),
        )
    )
    dummy_prefix = bool(normalizer.get(3, 1))
    escape = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape]) if dummy_prefix else escape
    if not any(piece.kind == NORMAL and "▁" in piece.text[1:] for piece in pieces):
        # No merge reaches over a space, so words can be cut before it: the same ids, several times faster.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), behavior="merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps)
    backend.add_special_tokens(
        [AddedToken(piece.text, special=True, normalized=False) for piece in pieces if piece.kind in (CONTROL, UNKNOWN)]
    )
    backend.add_tokens(
        [
            AddedToken(piece.text, special=False, normalized=True)  # matched after " " has become "▁"
            for piece in pieces
            # SentencePiece, too, looks when " " has become "▁": what was defined with a " " is never found.
            if piece.kind == USER_DEFINED and " " not in piece.text
        ]
    )

    def special(field: int, default: int) -> str | None:
        value = trainer.get(field, default)
        return pieces[value].text if isinstance(value, int) and value < len(pieces) else None

    none = 2**64 - 1  # -1 as protobuf writes it
    return backend, {"bos_token": special(41, 1), "eos_token": special(42, 2), "pad_token": special(43, none)}


def _refuse(
    path: Path, pieces: list[Piece], trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]
) -> None:
    kind = trainer.get(3, 1)
    name = MODEL_TYPES.get(kind, str(kind)) if isinstance(kind, int) else "unreadable"
    dummy_prefix = bool(normalizer.get(3, 1))
    defined = sum(piece.kind == USER_DEFINED for piece in pieces)
    work = sum(len(piece.text) ** 2 for piece in pieces if piece.kind == NORMAL)
    reasons = {
        f"its algorithm is {name}, and only bpe is supported": name != "bpe",
        "its normaliser changes characters, and only identity is supported": bool(normalizer.get(2, b"")),
        "it removes repeated spaces (remove_extra_whitespaces)": bool(normalizer.get(4, 1)),
        "it does not escape spaces (escape_whitespaces)": not normalizer.get(5, 1),
        "it ends words with a space (treat_whitespace_as_suffix)": bool(trainer.get(24, 0)),
        "it has unused pieces": any(piece.kind == UNUSED for piece in pieces),
        f"joining its pieces means to look at {work:,} characters, more than {MOST_WORK:,}": work > MOST_WORK,
        f"it has both add_dummy_prefix and {defined} user-defined symbols": dummy_prefix and defined > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise GriffinError(
                f"{path}: this SentencePiece model cannot be read exactly: {reason}; "
                "use a folder with a tokenizer.json instead"
            )


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """List every way to join two pieces to a third, the best-scored third first, as SentencePiece joins them."""
    normal = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = []
    for text in sorted(normal, key=lambda text: -normal[text]):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                merges.append((left, right))
    return merges


def _read_model(data: bytes) -> tuple[list[Piece], dict[int, int | bytes], dict[int, int | bytes]]:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(_bytes(value)))
            kind, score = fields.get(3, NORMAL), fields.get(2, b"\0\0\0\0")
            if not isinstance(kind, int):
                raise ValueError(f"piece {len(pieces)} has no valid type")
            pieces.append(Piece(_bytes(fields.get(1, b"")).decode(), struct.unpack("<f", _bytes(score))[0], kind))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces or not trainer:
        raise ValueError(f"{len(pieces)} pieces and {len(trainer)} training fields")
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[Field]:
    """Yield (field number, value) of one protobuf message: an int for a varint, else the raw bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"{size} bytes expected at byte {at} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"number too long at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value
