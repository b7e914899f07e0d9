"""Ids to text through bytes: what each piece of a vocabulary stands for, and decoding as ids arrive."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tokenizers

from griffin.errors import GriffinError

TextTable = dict[int, bytes]  # what each id stands for


class TextStream:
    """Text of ids that arrive one by one; the pieces, joined, equal `decode` of all ids.

    A piece is final: bytes of an unfinished character wait for the ids that finish it. Each push costs the same.
    """

    def __init__(self, text: TextTable, strip: bool) -> None:
        self._text = text
        self._strip = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that this id completes, "" while a character is unfinished."""
        data = self._text.get(int(token), b"")
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def unfinished(self) -> str:
        """Return what `finish` would, and change nothing."""
        state = self._utf8.getstate()
        text = self._utf8.decode(b"", final=True)
        self._utf8.setstate(state)
        return text

    def finish(self) -> str:
        """Return what is left, with U+FFFD for a character that was never finished."""
        return self._utf8.decode(b"", final=True)


def check_characters(text: str, what: str) -> None:
    """Refuse a lone surrogate, which no UTF-8 has and no vocabulary can write.

    Raises:
        GriffinError: `text` holds one; `what` begins the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GriffinError(
            f"{what} has a lone surrogate {text[error.start]!a} at character {error.start}; "
            "read it with errors='replace'"
        ) from None


@contextmanager
def library_errors(what: str, mend: str = "use another copy of its files") -> Iterator[None]:
    """Turn what `tokenizers` raises into an error that begins with `what` and ends with `mend`.

    It raises no narrower class than Exception, and where its Rust panics, one that is not even an Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300]  # it can repeat a whole file
        raise GriffinError(f"{what} ({said}); {mend}") from error


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's convention)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def piece_decoder(backend: tokenizers.Tokenizer) -> tuple[Callable[[str, bool], bytes], bool]:
    """Give the function (piece, is it an added token) -> bytes, and whether a text's first space is to be dropped."""
    decoder: dict[str, Any] = {"type": "none"}
    if backend.decoder is not None:
        decoder = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}

        def byte_level(piece: str, added: bool) -> bytes:
            if added or any(letter not in byte_of for letter in piece):
                return piece.encode()
            return bytes(byte_of[letter] for letter in piece)

        return byte_level, False

    replaced = [step for step in steps if step["type"] in ("Replace", "Metaspace")]
    space = {"pattern": {"String": "▁"}, "content": " "}
    known = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if (
        len(replaced) != 1
        or not known.issuperset(kinds)
        or not (space.items() <= replaced[0].items() or replaced[0].get("replacement") == "▁")
    ):
        raise GriffinError(
            f"a tokenizer whose decoder is {' + '.join(kinds)} is not supported; "
            "byte-level BPE and SentencePiece vocabularies are"
        )
    fallback = "ByteFallback" in kinds

    def metaspace(piece: str, added: bool) -> bytes:
        if fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    strip = any(step.get("start") == 1 or step.get("prepend_scheme", "never") != "never" for step in steps)
    return metaspace, strip
