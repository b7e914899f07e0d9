"""A prompt on its way into a state of its own, a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.infer.handle import Handle
from griffin.infer.pace import passes
from griffin.infer.prefill import read_chunk
from griffin.infer.sampling import logprobs_of
from griffin.model import Griffin
from griffin.state import State

_JUDGED = 64  # tokens of a prompt whose logits are held at once


@dataclass(slots=True, eq=False)
class Reader:
    """What is known of a prompt while it is read."""

    handle: Handle
    state: State  # its own, one row
    tokens: tuple[int, ...]  # still to be read
    edges: tuple[int, ...] = ()  # numbers of the prompt's tokens at which reading is to stop for a moment, in order
    logits: Tensor | None = None  # (1, V) after the last token, once it has been read
    before: Tensor | None = None  # (1, D) of the last token read, where the next one's log-probability is asked for

    @property
    def at(self) -> int:
        """How many of the prompt's tokens have been read."""
        return len(self.handle.request.prompt) - len(self.tokens)

    def limit(self) -> int:
        """How many tokens may be read at once."""
        return min((edge - self.at for edge in self.edges if edge > self.at), default=len(self.tokens))

    def took(self, model: Griffin, hidden: Tensor) -> None:
        """Note that the next T tokens have been read, with (T, D) hidden."""
        self._judge(model, hidden)
        self.tokens = self.tokens[len(hidden) :]
        for row in self.handle.rows:
            row.position += len(hidden)
        if not self.tokens:
            self.logits = model.logits(hidden[-1:])

    def _judge(self, model: Griffin, hidden: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens, if they are asked for."""
        num_top = self.handle.request.prompt_logprobs
        if num_top is None:
            return
        found, ids = self.handle.rows[0].prompt_logprobs, self.tokens[: len(hidden)]
        if self.before is None:
            found.append(None)
            ids, known = ids[1:], hidden[:-1]
        else:
            known = torch.cat([self.before, hidden[:-1]])
        for start in range(0, len(ids), _JUDGED):
            logits = model.logits(known[start : start + _JUDGED])
            found += logprobs_of(logits, ids[start : start + _JUDGED], num_top)
        self.before = hidden[-1:].clone()
        for row in self.handle.rows[1:]:
            row.prompt_logprobs = found


def read(model: Griffin, readers: Sequence[Reader], counts: Sequence[int]) -> None:
    """Read so many tokens of each prompt, several in one pass where that pays."""
    for group in passes(counts):
        some = [readers[index] for index in group]
        pieces = [reader.tokens[: counts[index]] for reader, index in zip(some, group, strict=True)]
        for reader, hidden in zip(some, read_chunk(model, [each.state for each in some], pieces), strict=True):
            reader.took(model, hidden)
