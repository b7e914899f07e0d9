"""One answer on its way: ids, text, and what ends it. It knows no tensors but the states it is given to hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from copy import copy

from griffin.infer.grammar import Matcher
from griffin.infer.request import Completion, FinishReason, Piece, Request, Sampling, TokenLogprob
from griffin.infer.speculate import Drafter
from griffin.infer.stop import StopGate
from griffin.state import State
from griffin.tokenizer import Tokenizer


class Row:
    """What one row of a batch is to the host.

    Args:
        index: what its pieces bear as `row`.
        request: what is asked.
        sampling: how it chooses; the request's, but for the seed of one of several answers.
        tokenizer: turns ids into text.
        matcher: where it stands in its request's grammar; None: there is none.
        keep_state: whether its completion is to have the state.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        sampling: Sampling,
        tokenizer: Tokenizer,
        *,
        matcher: Matcher | None = None,
        keep_state: bool = True,
    ) -> None:
        self.index, self.request, self.sampling, self.keep_state = index, request, sampling, keep_state
        self.matcher = matcher
        self.generator = sampling.generator()
        self.gate = StopGate(request.stop)
        self.stream = tokenizer.stream()
        for token in request.prompt[-4:]:  # the text goes on in the middle: of a line, or of a character of 4 bytes
            self.stream.push(token)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.texts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.reason: str | None = None
        self.place: int | None = None  # in the batch
        self.position = 0  # tokens that its state has read
        self.num_read = 0  # of them, of `tokens`
        self.state: State | None = None  # once it has left the batch, if it is to be kept
        self.drafter = Drafter(request.prompt)
        self.tail = Tail(tokenizer) if request.stop else None
        self._counts = Counter[int]()
        self._penalises = bool(sampling.presence_penalty or sampling.frequency_penalty)

    def take(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Piece:
        """Add a chosen token, and say what it adds to the text."""
        if token in self.request.stop_ids:
            return self.piece((), self._end(), "stop")
        self.tokens.append(token)
        if self._penalises:
            self._counts[token] += 1
        if self.request.logprobs is not None:
            self.logprobs.append(TokenLogprob(token, logprob, tuple(top[: self.request.logprobs])))
        told = self.stream.push(token)
        text = self.gate.push(told)
        if self.tail is not None:
            self.tail.push(len(told), self.gate, finished=not self.stream.unfinished())
        if self.gate.stopped:
            return self.piece((token,), text, "stop")
        if self.matcher is not None:
            self.matcher.take(token)
            self.reason = self.matcher.fault
            if self.matcher.complete or self.reason is not None:
                return self.piece((token,), text + self._end(), "stop" if self.reason is None else "error")
        if len(self.tokens) == self.request.max_tokens:
            return self.piece((token,), text + self._end(), "length")
        return self.piece((token,), text, None)

    def end(self, finish_reason: FinishReason, reason: str | None = None) -> Piece:
        """End it where it is, with the text that waited for more."""
        self.reason = reason
        return self.piece((), self._end(), finish_reason)

    def piece(self, tokens: tuple[int, ...], text: str, finish_reason: FinishReason | None) -> Piece:
        self.texts.append(text)
        self.finish_reason = finish_reason
        logprobs = (
            tuple(self.logprobs[len(self.logprobs) - len(tokens) :]) if self.request.logprobs is not None else None
        )
        return Piece(self.index, text, tokens, logprobs, finish_reason, self.reason)

    def completion(self, state: State | None) -> Completion:
        """Give the completion so far, changing nothing; of an unfinished row, with the text that is still held back."""
        held = "" if self.finish_reason is not None else self._held()
        return Completion(
            text="".join(self.texts) + held,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt),
            state=state,
            unread=self.shown()[1],
            reason=self.reason,
            prompt_logprobs=tuple(self.prompt_logprobs) if self.request.prompt_logprobs is not None else None,
        )

    def shown(self) -> tuple[int, tuple[int, ...]]:
        """How many of `tokens` a state that goes on from what is shown has read, and what it has yet to read."""
        if self.tail is not None and self.gate.stopped and self.finish_reason is not None:
            return self.tail.cut("".join(self.texts))
        return self.num_read, tuple(self.tokens[self.num_read :])

    @property
    def num_unread(self) -> int:
        """How many of `tokens` the state has not read: one, or after guesses that were wrong more."""
        return len(self.tokens) - self.num_read

    @property
    def has_offsets(self) -> bool:
        return self._penalises or bool(self.sampling.logit_bias) or self.request.min_tokens > 0

    def offsets(self) -> Iterator[tuple[int, float]]:
        """What is added to which tokens' logits when it joins: before the first one is chosen, or where it was cut."""
        yield from (self.sampling.logit_bias or {}).items()
        yield from ((token, self._offset(token)) for token in self._counts)
        if self.request.min_tokens > len(self.tokens):
            yield from ((token, -math.inf) for token in self.request.stop_ids)

    def new_offsets(self) -> Iterator[tuple[int, float]]:
        """What the last token chosen has made other."""
        if self._penalises:
            yield self.tokens[-1], self._offset(self.tokens[-1])
        if self.request.min_tokens and len(self.tokens) == self.request.min_tokens:
            yield from ((token, self._offset(token)) for token in self.request.stop_ids)

    def _offset(self, token: int) -> float:
        count = self._counts[token]
        penalty = (self.sampling.presence_penalty or 0) + (self.sampling.frequency_penalty or 0) * count
        return (self.sampling.logit_bias or {}).get(token, 0.0) - (penalty if count else 0.0)

    def _end(self) -> str:
        """The text that waited for more. The end of a character may still complete a stop string."""
        text = self.gate.push(self.stream.finish())
        return text if self.gate.stopped else text + self.gate.finish()

    def _held(self) -> str:
        """What `_end` would give now."""
        gate = copy(self.gate)
        text = gate.push(self.stream.unfinished())
        return text if gate.stopped else text + gate.finish()


class Tail:
    """Where a row can be cut, should what is held back become a stop string: tokens and the text they end.

    Before the first token whose text is held back, a copy of the state is kept (`state`, asked for by `wants_state`):
    from there, what comes before the stop string is read again.

    Args:
        tokenizer: turns a rest of a token's text into ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.state: State | None = None  # which has read the first `num_read` tokens, at most `ends[0][0]`
        self.num_read = 0
        self.wants_state = False  # it is to be set, before the last token is read
        self.ends = [(0, 0)]  # (tokens, characters) where a text of whole characters ends, from where `state` stands
        self._tokenizer = tokenizer
        self._tokens = self._characters = 0

    def push(self, characters: int, gate: StopGate, *, finished: bool) -> None:
        """Add a token that gave so many characters; `finished`: none is begun."""
        before = (self._tokens, self._characters)
        self._tokens += 1
        self._characters += characters
        whole = self.ends[-1] == before
        first_held = self._characters - gate.held
        self.wants_state = False
        if not gate.stopped and whole and first_held >= before[1]:
            # Nothing from before this token is held back: that is where the state stands now.
            self.ends, self.state = [before], None
            self.wants_state = not finished or gate.held > 0
        if finished:
            self.ends.append((self._tokens, self._characters))

    def cut(self, shown: str) -> tuple[int, tuple[int, ...]]:
        """How many tokens lie within `shown`, the text before a stop string, and the ids of what they lack of it."""
        tokens, characters = max(end for end in self.ends if end[1] <= len(shown))
        rest = shown[characters:]
        return tokens, tuple(self._tokenizer.encode(rest, bos=False)) if rest else ()
