"""Phonebook: one number looked up in a list of them, as tokens for a model trained on it, and as text for any model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from griffin.data.packing import Batch
from griffin.eval.synthetic.task import Ints, distinct, generator, make_batch
from griffin.loss import NOT_COUNTED

NAMES = 64  # first names, and as many last names
DIGIT, COLON, END, QUERY, VOCAB_SIZE = 2 * NAMES, 2 * NAMES + 10, 2 * NAMES + 11, 2 * NAMES + 12, 2 * NAMES + 13
NUM_DIGITS = 4
ENTRY = 8  # tokens: first, last, :, four digits, end of line


@dataclass(frozen=True, kw_only=True)
class Phonebook:
    """A book of n entries, two of them again as examples, a query and its answer, as tokens of their own vocabulary.

    Entry: first last : d d d d END, with tokens 0 .. 63 for first names, 64 .. 127 for last names, 128 .. 137 for
    digits. Names are different pairs, digits drawn evenly, n evenly from least .. most. Then two entries as examples
    (others than the one asked for, and two different ones, as far as there are), QUERY, and the entry asked for without
    its END: 8 n + 16 + 8 tokens, followed by END up to the row's T. Targets: the four digits of the answer, nowhere
    else.

    T is that of the largest book, so that rows of other n fit one batch.

    Raises:
        ValueError: least and most are no range within 1 .. 4096.
    """

    least: int = 1
    most: int = 30

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= NAMES * NAMES:
            raise ValueError(f"least={self.least} and most={self.most} must be 1 <= least <= most <= {NAMES * NAMES}")

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def length(self) -> int:
        """T."""
        return ENTRY * self.most + 2 * ENTRY + ENTRY

    @property
    def chance(self) -> float:
        """Of one digit; of the whole number its fourth power."""
        return 1 / 10

    def batch(self, seed: int, step: int, rows: int) -> Batch:
        draws = generator(seed, step)
        tokens = np.full((rows, self.length), END, dtype=np.int64)
        targets = np.full_like(tokens, NOT_COUNTED)
        for row, n in enumerate(draws.integers(self.least, self.most + 1, rows)):
            book = _book(draws, int(n))
            asked, *examples = [int(index) for index in draws.permutation(n)[:3]]
            examples = examples or [asked]
            shown = book[[examples[0], examples[-1]]]
            text = np.concatenate([book.ravel(), shown.ravel(), [QUERY], book[asked, :-1]])
            tokens[row, : len(text)] = text
            targets[row, len(text) - NUM_DIGITS - 1 : len(text) - 1] = text[-NUM_DIGITS:]
        return make_batch(tokens, targets)


def _book(draws: np.random.Generator, n: int) -> Ints:
    """(n, 8) entries."""
    names = distinct(draws, 1, NAMES * NAMES, n)[0]
    entries = np.empty((n, ENTRY), dtype=np.int64)
    entries[:, 0], entries[:, 1], entries[:, 2], entries[:, -1] = names // NAMES, NAMES + names % NAMES, COLON, END
    entries[:, 3:-1] = DIGIT + draws.integers(0, 10, (n, NUM_DIGITS))
    return entries


# Common in the United States, in no order that matters.
_FIRST = """
James Mary Robert Patricia John Jennifer Michael Linda David Elizabeth William Barbara Richard Susan Joseph Jessica
Thomas Karen Christopher Sarah Charles Lisa Daniel Nancy Matthew Sandra Anthony Betty Mark Ashley Emily
"""
_LAST = """
Smith Johnson Williams Brown Jones Garcia Miller Davis Rodriguez Martinez Hernandez Lopez Gonzalez Wilson Young Anderson
Thomas Taylor Moore Jackson Martin Lee Perez Thompson White Harris Sanchez Clark Ramirez Lewis Robinson
"""
FIRST, LAST = _FIRST.split(), _LAST.split()


def phonebook_text(seed: int, step: int, entries: int) -> tuple[str, str]:
    """Make a pre-trained model's prompt and the answer that is to follow it ("Repeat After Me", arXiv:2402.01032).

    Lines "Name: number" with ten digits, the first in 6 .. 9; an empty line; two of the lines again; an empty line;
    "Query Name:". The answer is right if what a greedy continuation says up to its first line break is this number,
    blanks at both ends aside. Chance is none.

    Raises:
        ValueError: entries is not in 3 .. 961: two examples and another one to ask for, all names different.
    """
    if not 3 <= entries <= len(FIRST) * len(LAST):
        raise ValueError(f"entries={entries} must be in 3 .. {len(FIRST) * len(LAST)}")
    draws = generator(seed, step)
    names = [
        f"{FIRST[each // len(LAST)]} {LAST[each % len(LAST)]}"
        for each in distinct(draws, 1, len(FIRST) * len(LAST), entries)[0]
    ]
    first, rest = draws.integers(6, 10, entries), draws.integers(0, 10, (entries, 9))
    numbers = [f"{a}{''.join(map(str, b))}" for a, b in zip(first, rest, strict=True)]
    lines = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
    asked, one, two = (int(index) for index in draws.permutation(entries)[:3])
    return "\n".join([*lines, "", lines[one], lines[two], "", f"{names[asked]}:"]), numbers[asked]
