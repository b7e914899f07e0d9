"""Guesses of what comes next, from the text itself, to be read in one pass with what is to be read anyway.

Where the last tokens have stood before, what followed them then may follow again (prompt lookup). Reading eight tokens
takes a CPU little longer than one; each guess that is what would have been chosen is a token for nothing, and the
others are forgotten with the state they led to.
"""

from __future__ import annotations

from collections.abc import Sequence

_GRAM = 3  # tokens that must agree
MOST = 7  # guesses of a pass


class Drafter:
    """The guesses of one row, and whether they pay.

    Args:
        text: what the row begins with: its prompt.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # of _GRAM tokens: where what followed them last begins
        self._gained, self._pass_s = 0.0, 0.0  # tokens of a pass and what it takes, on average
        self._skipped = self._skip = 0
        self._prompt = tuple(text)

    def draft(self, tokens: Sequence[int]) -> list[int]:
        """Guess what follows the prompt and `tokens`, all that the row has chosen; nothing where that does not pay."""
        self._extend(tokens)
        at = self._after.get(tuple(self._text[-_GRAM:]))
        if at is None:
            return []
        if self._skipped < self._skip:
            self._skipped += 1
            return []
        return self._text[at : at + MOST]

    def judge(self, gained: int, pass_s: float, step_s: float | None, *, guessed: bool) -> None:
        """Learn how many tokens a pass gave, and what it took. Where steps give more, tries become ever rarer.

        Args:
            gained: tokens.
            pass_s: seconds.
            step_s: what a step of one token takes; None: not known yet.
            guessed: whether there were guesses in it; else it read what wrong ones had left, and is a part of their
                price.
        """
        self._gained, self._pass_s = 0.7 * self._gained + gained, 0.7 * self._pass_s + pass_s
        if guessed:
            pays = step_s is None or self._gained * step_s > self._pass_s
            self._skipped, self._skip = 0, 0 if pays else min(128, 2 * self._skip + 4)

    def _extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new. The last tokens themselves are noted once something follows them."""
        new = tokens[len(self._text) - len(self._prompt) :] if self._text else (*self._prompt, *tokens)
        for token in new:
            if len(self._text) >= _GRAM:
                self._after[tuple(self._text[-_GRAM:])] = len(self._text)
            self._text.append(token)
