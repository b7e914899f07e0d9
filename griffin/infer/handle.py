"""What whoever submits a request holds: its pieces as they come, and its completions at the end. Of any thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from griffin.infer.request import Completion, Piece, Request

if TYPE_CHECKING:
    from griffin.infer.row import Row


class Handle:
    """A request on its way. Made by `Engine.submit`.

    Pieces are read either by iterating and `get`, in any thread, or by listeners; once there is a listener, pieces go
    to listeners alone. If computing them fails, all that waits here raises the error.

    Attributes:
        request: what was asked.
        index: what its pieces bear as `row`; the second of `n` answers bears index + 1, and so on.
        tenant: whose it is.
    """

    def __init__(self, request: Request, index: int, tenant: str, deadline: float | None) -> None:
        self.request, self.index, self.tenant = request, index, tenant
        self.ends_at = None if deadline is None else time.monotonic() + deadline
        self.rows: tuple[Row, ...] = ()  # the engine's
        self.cancelled = False  # asked for: the engine sees to it
        self.from_snapshots = 0  # tokens of the prompt that were not read again
        self.resumes = False  # whether it goes on from a state that the caller gave
        self._pieces: deque[Piece] = deque()
        self._listeners: list[Callable[[Piece], None]] = []
        self._left = request.n
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        """Whether no more pieces come: all answers have ended, or computing them failed."""
        return self._error is not None or not self._left

    def __iter__(self) -> Iterator[Piece]:
        """Give the pieces, waiting for each, up to the last."""
        while (piece := self.get()) is not None:
            yield piece

    def get(self, timeout: float | None = None) -> Piece | None:
        """Give the next piece, waiting for it up to `timeout` seconds (None: for ever). None: there is none.

        Raises:
            Exception: the engine's, if it failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._pieces) or self.done, timeout)
            if self._pieces:
                return self._pieces.popleft()
            if self._error is not None:
                raise self._error
            return None

    def add_listener(self, listener: Callable[[Piece], None]) -> None:
        """Call `listener` with every piece from now on, in the engine's thread, and with those that wait, in this one.

        It must return soon: the engine waits for it. If it raises, the request is cancelled, and all that waits here
        raises that. A request has ended with the piece that is the `n`-th to have a finish_reason; if the engine fails,
        those that had none get one, "error".
        """
        with self._changed:
            while self._pieces:
                listener(self._pieces.popleft())
            self._listeners.append(listener)

    def completions(self, timeout: float | None = None) -> tuple[Completion, ...]:
        """Wait for the end, and give the `n` answers.

        Raises:
            TimeoutError: it has not ended in `timeout` seconds.
            Exception: the engine's, if it failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended in {timeout} s")
            if self._error is not None:
                raise self._error
            return tuple(row.completion(row.state) for row in self.rows)

    def completion(self, timeout: float | None = None) -> Completion:
        """As `completions`, the first of them."""
        return self.completions(timeout)[0]

    # What follows is called by the engine.

    def deliver(self, piece: Piece) -> None:
        """Pass on a piece."""
        with self._changed:
            if piece.finish_reason is not None:
                self._left -= 1
            if self._listeners:
                self._tell(piece)
            else:
                self._pieces.append(piece)
            self._changed.notify_all()

    def fail(self, error: BaseException, reason: str) -> None:
        """Let all that waits here raise `error`, unless it has ended."""
        with self._changed:
            if not self.done:
                self._error = error
                for row in self.rows:
                    if row.finish_reason is None:
                        self._tell(Piece(row.index, "", (), None, "error", reason))
            self._changed.notify_all()

    def _tell(self, piece: Piece) -> None:
        try:
            for listener in self._listeners:
                listener(piece)
        except Exception as error:  # of one request: the others go on
            self._listeners.clear()
            self._error, self.cancelled = error, True
