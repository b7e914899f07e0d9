"""One answer on its way: ids, text, and what ends it. It knows no tensors but its finished state."""

from __future__ import annotations

from copy import copy

from griffin.infer.request import Completion, FinishReason, Piece, Request, Sampling, TokenLogprob
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
        keep_state: whether its completion is to have the state.
    """

    def __init__(
        self, index: int, request: Request, sampling: Sampling, tokenizer: Tokenizer, *, keep_state: bool = True
    ) -> None:
        self.index, self.request, self.sampling, self.keep_state = index, request, sampling, keep_state
        self.generator = sampling.generator()
        self.gate = StopGate(request.stop)
        self.stream = tokenizer.stream()
        for token in request.prompt[-4:]:  # the text goes on in the middle: of a line, or of a character of 4 bytes
            self.stream.push(token)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.texts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.reason: str | None = None
        self.last_read = True  # whether the model has read the last of `tokens`
        self.position = 0  # tokens that its state has read
        self.place: int | None = None  # in the batch
        self.state: State | None = None  # once it has left the batch, if it is to be kept

    def take(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Piece:
        """Add a chosen token, and say what it adds to the text."""
        if token in self.request.stop_ids:
            return self.piece((), self._end(), "stop")
        self.tokens.append(token)
        self.last_read = False
        if self.request.logprobs is not None:
            self.logprobs.append(TokenLogprob(token, logprob, tuple(top[: self.request.logprobs])))
        text = self.gate.push(self.stream.push(token))
        if self.gate.stopped:
            return self.piece((token,), text, "stop")
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
            unread=() if self.last_read else tuple(self.tokens[-1:]),
            reason=self.reason,
        )

    def _end(self) -> str:
        """The text that waited for more. The end of a character may still complete a stop string."""
        text = self.gate.push(self.stream.finish())
        return text if self.gate.stopped else text + self.gate.finish()

    def _held(self) -> str:
        """What `_end` would give now."""
        gate = copy(self.gate)
        text = gate.push(self.stream.unfinished())
        return text if gate.stopped else text + gate.finish()
