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
        self._gained = 2.0  # tokens of a pass with guesses, on average; to begin with, hope
        self._skipped = self._skip = 0
        self._prompt = tuple(text)

    def draft(self, tokens: Sequence[int], pass_s: float | None, step_s: float | None) -> list[int]:
        """Guess what follows the prompt and `tokens`; nothing where that does not pay.

        Args:
            tokens: all that the row has chosen.
            pass_s, step_s: what a pass with guesses takes, and a step of one token; None: not known yet.
        """
        self._extend(tokens)
        at = self._after.get(tuple(self._text[-_GRAM:]))
        if at is None:
            return []
        if pass_s is not None and step_s is not None and self._gained * step_s <= pass_s and self._skipped < self._skip:
            self._skipped += 1
            return []
        return self._text[at : at + MOST]

    def judge(self, gained: int, pass_s: float | None, step_s: float | None) -> None:
        """Learn how many tokens a pass gave. Where it did not pay, the next tries are ever further apart."""
        self._gained = 0.7 * self._gained + 0.3 * gained
        pays = pass_s is None or step_s is None or self._gained * step_s > pass_s
        self._skipped, self._skip = 0, 0 if pays else min(64, 2 * self._skip + 1)

    def _extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new. The last tokens themselves are noted once something follows them."""
        new = tokens[len(self._text) - len(self._prompt) :] if self._text else (*self._prompt, *tokens)
        for token in new:
            if len(self._text) >= _GRAM:
                self._after[tuple(self._text[-_GRAM:])] = len(self._text)
            self._text.append(token)
