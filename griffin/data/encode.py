"""Documents of any length to ids in bounded memory: encoded in windows, in parallel, and joined.

The ids are those of the whole document, wherever the windows are cut. With a vocabulary of ours, a window ends where
its pre-tokenizer is sure to cut. Other windows overlap, and are joined where both, and their overlap encoded on its
own, have the same tokens, at one of two kinds of places:

- Between two words of the pre-tokenizer. It goes from left to right: from a place on where two begin a word, they cut
  alike. The window on the left cannot know what follows it, the one on the right can, and both say the same.
- Within one word that fills the overlap (a long run of letters, or a vocabulary that has no pre-tokenizer, or one that
  looks at single characters), between two tokens that all three have side by side. BPE gives a text the one row of
  tokens in which every two neighbours, encoded alone, stay as they are; of the joined row, too, every two neighbours
  come from one encoding.

Where there is no such place, the window on the right begins anew where the left one has a token's beginning, which
sets both in step; and where that does not help, the two are encoded as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from griffin.data.text import Part
from griffin.errors import GriffinError
from griffin.tokenizer import Tokenizer
from griffin.tokenizer.bpe import SPLIT, sure_break

WINDOW_CHARS = 1 << 15
OVERLAP_CHARS = 1 << 9  # further than any pre-tokenizer in use looks, other than through a run of one kind
BATCH_CHARS = 1 << 19  # encoded in parallel; a token takes some 100 bytes until it is an id


class Ids(NamedTuple):
    """Ids of a document: all, or a piece of them."""

    document: int
    ids: npt.NDArray[np.uint32]
    num_bytes: int  # of UTF-8, of the document's text that is new here


class _Window(NamedTuple):
    document: int
    text: str
    overlap: int  # characters at the beginning that the window before has at its end, too


class _Encoded(NamedTuple):
    window: _Window
    encoding: tokenizers.Encoding
    ids: list[int]
    first: int  # how many ids are those of the window before


def encode_documents(tokenizer: Tokenizer, parts: Iterable[Part]) -> Iterator[Ids]:
    """Yield BOS + ids + EOS of each document, as far as the tokenizer has the two, in pieces.

    The pieces, joined, are `tokenizer.encode` of the whole document.

    Raises:
        GriffinError: a vocabulary cannot write a control token's text as ordinary text, and a document holds it.
    """
    begin = list(tokenizer.begin_ids)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    cuts = _cuts(tokenizer)
    left: _Encoded | None = None  # its end is open: the next window decides where it is cut
    for batch in _batches(_windows(parts, sure=cuts is _Cuts.SURE)):
        overlaps = [window.text[: window.overlap] for window in batch if window.overlap]
        words = bool(overlaps) and cuts is not _Cuts.LOCAL
        if words and left is not None and left.window.document == batch[0].document:
            [encoding] = tokenizer.encodings([left.window.text], offsets=True)
            left = left._replace(encoding=encoding)
        encodings = tokenizer.encodings([*(window.text for window in batch), *overlaps], offsets=words)
        shared = iter(encodings[len(batch) :])
        for window, encoding in zip(batch, encodings, strict=False):
            right = _Encoded(window, encoding, encoding.ids, 0)
            document, num_bytes = window.document, len(window.text[window.overlap :].encode())
            if window.overlap:
                assert left is not None
                cut, right = _join(tokenizer, left, right, next(shared), words)
                yield Ids(document, np.array(left.ids[left.first : cut], np.uint32), num_bytes)
            elif left is not None and left.window.document == document:
                yield Ids(document, np.array(left.ids[left.first :], np.uint32), num_bytes)
            else:
                if left is not None:
                    yield Ids(left.window.document, np.array(left.ids[left.first :] + end, np.uint32), 0)
                yield Ids(document, np.array(begin, np.uint32), num_bytes)
            left = right
    if left is not None:
        yield Ids(left.window.document, np.array(left.ids[left.first :] + end, np.uint32), 0)


class _Cuts(Enum):
    """What is known of where a tokenizer cuts words."""

    SURE = "SPLIT's rules"
    LOCAL = "nowhere, or at single characters: whatever begins two windows, they cut the same words"
    WORDS = "nothing: its words have to be looked at"


def _cuts(tokenizer: Tokenizer) -> _Cuts:
    backend = tokenizer.backend
    state: dict[str, Any] = {"type": "Sequence", "pretokenizers": []}
    if backend.pre_tokenizer is not None:
        state = json.loads(backend.pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    words = [step for step in steps if step["type"] != "ByteLevel" or step["use_regex"]]
    patterns = [next(iter(step["pattern"].values())) if step["type"] == "Split" else None for step in words]
    only_special = all(token.special for token in backend.get_added_tokens_decoder().values())
    if patterns == [SPLIT] and words[0]["behavior"] == "Isolated" and not words[0]["invert"]:
        prefixed = any(step.get("add_prefix_space") for step in steps)
        return _Cuts.SURE if only_special and backend.normalizer is None and not prefixed else _Cuts.WORDS
    one_character = all(pattern in ("▁", " ") for pattern in patterns)
    return _Cuts.LOCAL if one_character else _Cuts.WORDS


def _windows(parts: Iterable[Part], *, sure: bool) -> Iterator[_Window]:
    document, rest, overlap = -1, "", 0
    for part in parts:
        if part.document != document:
            if rest:
                yield _Window(document, rest, overlap)
            document, rest, overlap = part.document, "", 0
        text, at = rest + part.text, 0
        while len(text) - at > WINDOW_CHARS:
            end = at + WINDOW_CHARS
            if sure and (found := sure_break(text, at + overlap, end)):
                yield _Window(document, text[at:found], overlap)
                at, overlap = found, 0
            else:
                yield _Window(document, text[at:end], overlap)
                at, overlap = end - OVERLAP_CHARS, OVERLAP_CHARS
        rest = text[at:]
    if rest:
        yield _Window(document, rest, overlap)


def _batches(windows: Iterable[_Window]) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    size = 0
    for window in windows:
        batch.append(window)
        size += len(window.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _join(
    tokenizer: Tokenizer, left: _Encoded, right: _Encoded, shared: tokenizers.Encoding, words: bool
) -> tuple[int, _Encoded]:
    """Return where left's ids are cut, and what comes behind: right, or another window that ends where right does.

    All encodings have words where `words` says so; without, a text is one word.
    """
    if place := _place(left, right, shared):
        return place[0], right._replace(first=place[1])

    overlap, new = right.window.overlap, right.window.text[right.window.overlap :]
    if start := _beginning(tokenizer, left, len(left.window.text) - overlap):
        again = left.window.text[start:]
        encoding, shared = tokenizer.encodings([again + new, again], offsets=words)
        stepped = _Encoded(_Window(right.window.document, again + new, len(again)), encoding, encoding.ids, 0)
        if place := _place(left, stepped, shared):
            return place[0], stepped._replace(first=place[1])

    whole = left.window._replace(text=left.window.text + new)
    [encoding] = tokenizer.encodings([whole.text], offsets=words)
    if encoding.ids[: left.first] != left.ids[: left.first]:
        raise GriffinError(
            f"this tokenizer looks further than {OVERLAP_CHARS} characters ahead in document {whole.document}; "
            "divide that into shorter documents"
        )
    return left.first, _Encoded(whole, encoding, encoding.ids, left.first)


def _place(left: _Encoded, right: _Encoded, shared: tokenizers.Encoding) -> tuple[int, int] | None:
    """Return how many ids of left come before a place to join at, and how many of right; None where there is none.

    `shared`, the overlap, ends as left does and begins as right does. Token k of it is token k of right as long as all
    before are equal, and the token of left that is as far from the end as long as all behind are.
    """
    ids, shift = shared.ids, len(left.ids) - len(shared.ids)
    size = min(len(ids), len(left.ids) - left.first, len(right.ids))
    high = next((k for k in range(size) if ids[k] != right.ids[k]), size)
    low = next((len(ids) - k for k in range(size) if ids[-1 - k] != left.ids[-1 - k]), len(ids) - size)
    if low > high:
        return None

    # Far from both ends first: next to them is where the windows see less than the document.
    middle = sorted(range(max(1, low, 1 - shift), min(high, size - 1) + 1), key=lambda k: abs(2 * k - low - high))
    last = len(ids) - 1
    one_word = (
        high - low > 1
        and shared.token_to_word(0) == shared.token_to_word(last)
        and right.encoding.token_to_word(0) == right.encoding.token_to_word(high - 1)
        and left.encoding.token_to_word(shift + low) == left.encoding.token_to_word(shift + last)
    )
    if one_word:
        return next(((shift + k, k) for k in middle if low < k < high), None)

    def begins_word(encoding: tokenizers.Encoding, token: int) -> bool:
        return encoding.token_to_word(token - 1) != encoding.token_to_word(token)

    for k in middle:
        if begins_word(left.encoding, shift + k) and begins_word(shared, k) and begins_word(right.encoding, k):
            return shift + k, k
    return None


def _beginning(tokenizer: Tokenizer, left: _Encoded, earliest: int) -> int | None:
    """Return the first character from `earliest` on that begins a word of left, or else a token of it."""
    [exact] = tokenizer.encodings([left.window.text], offsets=True)
    offsets, words = exact.offsets, exact.word_ids
    tokens = [
        k
        for k in range(left.first + 1, len(offsets))
        if offsets[k][0] >= max(1, earliest) and offsets[k - 1][1] <= offsets[k][0] < offsets[k][1]
    ]
    found = next((k for k in tokens if words[k] != words[k - 1]), tokens[0] if tokens else None)
    return None if found is None else offsets[found][0]
