"""Requests that wait: bounded in number and in tokens, taken of each tenant one in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from typing import Generic, TypeVar

from griffin.infer.handle import Handle

T = TypeVar("T")


class Queue(Generic[T]):
    """Handles, each with something that goes with it. Whoever has one guards it against other threads.

    Args:
        max_requests: the most that wait.
        max_tokens: the most tokens of prompts that wait.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self._tenants: OrderedDict[str, deque[tuple[Handle, T]]] = OrderedDict()  # whose turn it is first

    def __iter__(self) -> Iterator[Handle]:
        return (handle for waiting in self._tenants.values() for handle, _ in waiting)

    def full(self, tokens: int) -> str | None:
        """Why a prompt of so many tokens cannot wait; None: it can."""
        if self.requests >= self.max_requests:
            return f"{self.requests} requests wait, the most there may; try again later"
        if self.tokens + tokens > self.max_tokens:
            return (
                f"{self.tokens:,} tokens of prompts wait and this one has {tokens:,}; there may be {self.max_tokens:,}"
            )
        return None

    def put(self, handle: Handle, with_it: T) -> None:
        self._tenants.setdefault(handle.tenant, deque()).append((handle, with_it))
        self.requests += 1
        self.tokens += len(handle.request.prompt)

    def take(self, slots: int) -> tuple[Handle, T] | None:
        """Take the next tenant's oldest, if its answers fit so many slots.

        Nobody overtakes one that does not, or it would never find room.
        """
        if not self._tenants:
            return None
        tenant, waiting = next(iter(self._tenants.items()))
        if waiting[0][0].request.n > slots:
            return None
        taken = waiting.popleft()
        self._taken(tenant, taken[0])
        if waiting:
            self._tenants.move_to_end(tenant)
        return taken

    def remove(self, gone: Collection[Handle]) -> None:
        """Take out those of these that wait."""
        for tenant, waiting in list(self._tenants.items()):
            for entry in [entry for entry in waiting if entry[0] in gone]:
                waiting.remove(entry)
                self._taken(tenant, entry[0])

    def clear(self) -> None:
        self._tenants.clear()
        self.requests = self.tokens = 0

    def _taken(self, tenant: str, handle: Handle) -> None:
        self.requests -= 1
        self.tokens -= len(handle.request.prompt)
        if not self._tenants[tenant]:
            del self._tenants[tenant]
