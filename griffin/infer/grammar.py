"""Answers that follow a form: a JSON schema, a regular expression, one of some texts, a Lark grammar.

llguidance (extra `serve`) says which tokens may come next, within its limits on what a grammar may cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from griffin.errors import GriffinError

if TYPE_CHECKING:
    from griffin.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match, whole. Made by one of the four functions below; checked by `Engine.submit`."""

    kind: Literal["json", "regex", "lark"]
    text: str

    @classmethod
    def json(cls, schema: str | dict[str, Any] | bool) -> Grammar:
        """JSON that a schema describes, as an object or as text; {} is any JSON."""
        return cls("json", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A regular expression in Rust's syntax: no look-around, no back-references."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of some texts.

        Raises:
            GriffinError: there are none, or one is empty.
        """
        if not texts or not all(texts):
            raise GriffinError(f"choice={list(texts)!r:.80} must be texts, at least one, none of them empty")
        return cls("lark", "start: " + " | ".join(json.dumps(text) for text in texts))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """llguidance's dialect of Lark: the rule `start` is the answer."""
        return cls("lark", text)


class Grammars:
    """Makes matchers for one tokenizer, whose tables are built once, with the first of them.

    Args:
        tokenizer: the model's.
        vocab_size: V of the model; ids that the tokenizer has not are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._tables: Any = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """Begin to follow a grammar.

        Raises:
            GriffinError: it is not one, it costs more than there may be, or llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise GriffinError("a grammar needs llguidance: pip install 'griffin-lm[serve]'") from error
        if self._tables is None:
            ends = list(self.tokenizer.stop_ids) or None
            backend = self.tokenizer.backend.to_str()
            self._tables = llguidance.LLTokenizer(backend, n_vocab=self.tokenizer.vocab_size, eos_token=ends)
        make = llguidance.LLMatcher
        try:
            source = {
                "json": make.grammar_from_json_schema,
                "regex": make.grammar_from_regex,
                "lark": make.grammar_from_lark,
            }[grammar.kind](grammar.text)
        except ValueError as error:
            raise GriffinError(f"the grammar cannot be read: {error}") from error
        matcher = Matcher(make(self._tables, source, limits=llguidance.LLParserLimits(), log_level=0), self.vocab_size)
        if matcher.fault is not None:
            raise GriffinError(f"the grammar cannot be followed: {matcher.fault}")
        return matcher


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self.vocab_size = matcher, vocab_size

    def twin(self) -> Matcher:
        """Copy it: the two go on independently."""
        return Matcher(self._matcher.deep_copy(), self.vocab_size)

    @property
    def fault(self) -> str | None:
        """Why nothing can follow: a limit was passed, or a token taken that was not allowed."""
        return " ".join(self._matcher.get_error().split()) if self._matcher.is_error() else None

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow but its end."""
        return self._matcher.is_stopped() and self.fault is None

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    def mask(self) -> Tensor:
        """Which tokens may come next: (V,) bool, on the CPU. The interpreter is free while it is computed."""
        allowed = torch.zeros(self.vocab_size, dtype=torch.bool, device="cpu")
        if self.fault is None:
            packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
            bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
            some = bits.flatten()[: self.vocab_size].bool()
            allowed[: len(some)] = some
        return allowed
