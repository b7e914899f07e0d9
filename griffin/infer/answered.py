"""An answer that was cut, and what it takes to go on with it as if it had never been left."""

from __future__ import annotations

from dataclasses import dataclass, replace

from griffin.errors import GriffinError
from griffin.infer.handle import Handle
from griffin.infer.request import Request, TokenLogprob
from griffin.infer.row import Row
from griffin.infer.sampling import draws
from griffin.state import State


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """How far an answer came. Everything else that it depends on follows from this by going over its tokens.

    That is: which number is drawn next, what penalties have counted, which text waits for the end of a character or of
    a stop string, and where it can be cut should that be one.

    Raises:
        GriffinError: what is given is not an answer to the request that can go on.
    """

    request: Request
    tokens: tuple[int, ...]  # chosen so far, one at least
    seed: int  # of its draws
    num_read: int  # how many of `tokens` the state has read: those that no stop string can take back any more
    state: State  # one row, which has read the prompt, and these; written no more
    logprobs: tuple[TokenLogprob, ...] | None = None  # of `tokens`, if the request asks for them

    def __post_init__(self) -> None:
        if self.request.n != 1 or self.request.prompt_logprobs is not None:
            raise GriffinError("an answer that goes on is one, and its prompt has been judged before")
        if not 0 <= self.num_read < len(self.tokens) < self.request.max_tokens:
            raise GriffinError(
                f"an answer of {len(self.tokens)} tokens, {self.num_read} of them read, cannot go on to "
                f"{self.request.max_tokens}; the last one chosen is always unread"
            )
        if not 0 <= self.seed < 2**64 or self.state.batch_size != 1:
            raise GriffinError(f"seed {self.seed} or a state of {self.state.batch_size} rows is of no answer")
        if (self.logprobs is None) != (self.request.logprobs is None) or len(self.logprobs or self.tokens) != len(
            self.tokens
        ):
            raise GriffinError("an answer has a log-probability for each of its tokens, if they are asked for")

    @property
    def unread(self) -> tuple[int, ...]:
        return self.tokens[self.num_read :]

    @classmethod
    def of(cls, handle: Handle, answer: int = 0) -> Answered | None:
        """Give what goes on with an answer that was cancelled or past its deadline, once that has ended.

        None: it ended otherwise, or before its first token, or its state was not to be kept.
        """
        row = handle.rows[answer]
        if row.finish_reason not in ("cancelled", "deadline") or row.state is None or not row.tokens:
            return None
        num_read, state = row.num_read, row.state
        if row.tail is not None and row.tail.state is not None:  # text is held back: go on from before it
            num_read, state = row.tail.num_read, row.tail.state
        return cls(
            request=replace(handle.request, sampling=row.sampling, n=1, prompt_logprobs=None, borders=()),
            tokens=tuple(row.tokens),
            seed=row.generator.initial_seed(),
            num_read=num_read,
            state=state,
            logprobs=None if row.request.logprobs is None else tuple(row.logprobs),
        )

    def replay_(self, row: Row) -> None:
        """Let a new row be where this answer was.

        Raises:
            GriffinError: these tokens end the answer: it was not made by this request.
        """
        row.generator.manual_seed(self.seed)
        known = self.logprobs or [TokenLogprob(token, 0.0, ()) for token in self.tokens]
        for each in known:
            row.take(each.token, each.logprob, list(each.top))
            draws([row.sampling], [row.generator])
            if row.finish_reason is not None:
                raise GriffinError(f"the answer ended with its token {len(row.tokens)}; it cannot go on")
        row.num_read = len(row.tokens)  # when it joins the others
