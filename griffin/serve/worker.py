"""The engine behind the door: loaded in a thread while the port answers already, asked from the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from griffin.errors import GriffinError, one_line
from griffin.serve.errors import ApiError
from griffin.serve.log import say
from griffin.serve.metrics import Metrics
from griffin.serve.replies import ModelFacts
from griffin.serve.settings import Settings

if TYPE_CHECKING:
    from griffin.infer.engine import Engine
    from griffin.infer.handle import Handle
    from griffin.infer.request import Piece, Request
    from griffin.infer.sessions import Sessions
    from griffin.infer.snapshots import Snapshots
    from griffin.tokenizer import Tokenizer

Status = Literal["ok", "loading", "draining", "failed"]
STALLED_S = 120.0  # a turn of the engine takes less
PING_S = 15.0  # between comments in a stream that says nothing, so that nobody in between closes it
MOST_WAITING = 20_000  # pieces that a client has not read: one that does not read is cut off before
_T = TypeVar("_T")


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked."""

    engine: Engine
    tokenizer: Tokenizer
    facts: ModelFacts
    snapshots: Snapshots | None
    sessions: Sessions
    folds_system: bool  # the template refuses a system's message: it is put before the first of the user's


class Worker:
    """What the routes ask.

    Args:
        settings: the server's.
        load: makes the model ready; takes seconds to minutes, and is called in a thread of its own.
    """

    def __init__(self, settings: Settings, load: Callable[[Settings], Loaded]) -> None:
        self.settings, self._load = settings, load
        self.metrics = Metrics(self._gauges)
        self.created = int(time.time())
        self.draining = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._loaded: Loaded | None = None
        self._thread: threading.Thread | None = None
        self._answers: set[Answer] = set()
        self.sessions_in_use: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mean_s = 1.0  # of a request, from its admission to its end
        self._turns, self._turned = -1, time.monotonic()

    def start(self) -> None:
        """Begin to load. `status` tells how far it is."""
        self._thread = threading.Thread(target=self._run, name="griffin-load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._loaded = self._load(self.settings)
        except BaseException as error:  # the process ends with it, in the main thread
            self.failure = error
            self.on_failure()
            return
        say(logging.INFO, "ready", model=self.settings.model_name, load_s=round(time.monotonic() - began, 2))

    @property
    def status(self) -> Status:
        if self.failure is None and self._loaded is not None:
            self.failure = self._loaded.engine.error
        if self.failure is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self._loaded is None else "ok"

    @property
    def stalled(self) -> bool:
        """Whether there is work and the engine has not turned for two minutes."""
        if self._loaded is None:
            return False
        engine, now = self._loaded.engine, time.monotonic()
        turns = engine.stats().turns
        if turns != self._turns or not (engine.busy or engine.waiting):
            self._turns, self._turned = turns, now
        return now - self._turned > STALLED_S

    def ready(self) -> Loaded:
        """Give the model.

        Raises:
            ApiError: 503, it cannot be asked now.
        """
        status = self.status
        if status == "loading":
            raise ApiError(503, "the model is being loaded", code="loading", retry_after=5)
        if status == "draining":
            raise ApiError(503, "this server is stopping", code="draining", retry_after=5)
        if status == "failed" or self._loaded is None:
            raise ApiError(503, "the model has failed; this server is ending", code="failed", retry_after=30)
        return self._loaded

    def has_room(self) -> Loaded:
        """Give the model, if a request can wait for it: asked before anything of the request is computed.

        Raises:
            ApiError: 429, or 503.
        """
        loaded = self.ready()
        if loaded.engine.waiting >= loaded.engine.max_queue:
            raise self._full(f"{loaded.engine.waiting} requests wait already")
        return loaded

    async def submit(
        self,
        requests: Iterable[Request],
        *,
        tenant: str,
        until: float,
        state: Any = None,
        keep_state: bool = False,
        whole: bool = False,
    ) -> Answer:
        """Queue the requests of one call.

        Args:
            requests: each with its n answers.
            tenant: whose they are.
            until: the moment (time.monotonic) at which they end as they are.
            state: what has been read before the first of them, or an answer that goes on.
            keep_state: whether completions are to have their state.
            whole: nobody looks at pieces before the end.

        Raises:
            ApiError: 429, the queue is full; 400, a request is not what the model can do.
        """
        from griffin.infer.engine import Refused  # imports torch, which is there once a model is

        loaded = self.ready()
        answer = Answer(self, loaded.engine, asyncio.get_running_loop(), whole=whole)
        self._answers.add(answer)
        index = 0
        try:
            for request in requests:
                queue = partial(
                    loaded.engine.submit,
                    request,
                    tenant=tenant,
                    state=state,
                    deadline=max(0.001, until - time.monotonic()),
                    keep_state=keep_state,
                    index=index,
                )
                # A grammar is compiled, and a cut answer gone over, before they are queued: not on the event loop.
                answer.add(queue() if request.grammar is None and not keep_state else await asyncio.to_thread(queue))
                index += request.n
        except Refused as error:
            answer.close()
            raise self._full(one_line(error)) from error
        except ValueError as error:
            answer.close()
            raise ApiError(400, one_line(error)) from error
        except BaseException:  # the client left meanwhile
            answer.close()
            raise
        return answer

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what a client that has left does not wait for. A drain does."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, answer: Answer) -> None:
        self._answers.discard(answer)

    def note_end(self, took_s: float) -> None:
        self._mean_s += 0.1 * (took_s - self._mean_s)

    async def drain(self, within_s: float) -> None:
        """Take nothing new, and let what runs end, or cut it short."""
        self.draining = True
        until = time.monotonic() + within_s
        while self._answers and time.monotonic() < until:
            await asyncio.sleep(0.02)
        cut = list(self._answers)
        for answer in cut:
            answer.cancel()
        while (self._answers or self._tasks) and time.monotonic() < until + 5:
            await asyncio.sleep(0.02)
        if self._loaded is not None and self.settings.state_folder is not None:
            await asyncio.to_thread(self._save_all, self._loaded.sessions)
        say(logging.INFO, "drained", cut_short=len(cut))

    def _save_all(self, sessions: Sessions) -> None:
        try:
            sessions.save_all()
        except (GriffinError, OSError) as error:
            say(logging.ERROR, "sessions are not saved", error=one_line(error))

    def close(self) -> None:
        """End the engine. Not before `drain`, or what runs is cut short."""
        if self._loaded is not None and self._loaded.engine.error is None:
            self._loaded.engine.close(drain=False)

    def _full(self, message: str) -> ApiError:
        engine = self.ready().engine
        self.metrics.refusals.labels("queue").inc()
        wait_s = (engine.waiting + 1) * self._mean_s / engine.slots
        return ApiError(429, message, code="queue_full", retry_after=min(60.0, max(1.0, wait_s)))

    def _gauges(self) -> Iterable[tuple[str, str, float]]:
        if self._loaded is None:
            return
        engine = self._loaded.engine
        used = engine.busy / engine.slots
        stats = engine.stats()
        yield "griffin:num_requests_running", "Slots in use.", engine.busy
        yield "griffin:num_requests_waiting", "Requests in the queue.", engine.waiting
        yield "griffin:state_slots", "Slots there are.", engine.slots
        yield "griffin:state_slots_used_ratio", "Of the slots, those in use.", used
        yield "griffin:sessions_bytes", "Bytes of sessions in memory.", self._loaded.sessions.nbytes
        if self._loaded.snapshots is not None:
            kept = self._loaded.snapshots.stats
            yield "griffin:prefix_cache_queries", "Tokens of prompts that were looked for.", kept.tokens_asked
            yield "griffin:prefix_cache_hits", "Tokens of prompts that were not read again.", kept.tokens_saved
            yield "griffin:prefix_cache_bytes", "Bytes of snapshots in memory.", kept.nbytes
        yield "griffin:engine_turns", "Turns of the engine.", stats.turns
        yield "griffin:engine_failed_requests", "Requests that ended with an error.", stats.failed
        # What Vertex AI can scale on has these names.
        yield "vllm:num_requests_waiting", "Requests in the queue.", engine.waiting
        yield "vllm:gpu_cache_usage_perc", "Of the slots, those in use.", used


class Answer:
    """The pieces of one call, as they come out of the engine's thread.

    Made by `Worker.submit`. Whoever has it closes it: what has not ended then is cancelled.
    """

    def __init__(self, worker: Worker, engine: Engine, loop: asyncio.AbstractEventLoop, *, whole: bool) -> None:
        self._worker, self._engine, self._loop, self._whole = worker, engine, loop, whole
        self.handles: list[Handle] = []
        self.begun = time.monotonic()
        self.first_s: float | None = None
        self.tokens = 0
        self.late = False  # some of it ended because its time was over
        self._pieces: deque[Piece] = deque()
        self._wake = asyncio.Event()
        self._woken = False
        self._expected = 0
        self._ended = 0

    def add(self, handle: Handle) -> None:
        self.handles.append(handle)
        self._expected += handle.request.n
        handle.add_listener(self._take)

    def _take(self, piece: Piece) -> None:
        """In the engine's thread. The loop is woken once for all pieces that come before it looks."""
        self._pieces.append(piece)
        if (piece.finish_reason is not None or not self._whole) and not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake.set)

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """Give all pieces there are, again and again, up to the last; none of them every 15 s if none comes.

        Raises:
            ApiError: computing them failed.
        """
        while self._ended < self._expected:
            try:
                async with asyncio.timeout(PING_S):
                    await self._wake.wait()
            except TimeoutError:
                yield []
                continue
            self._wake.clear()
            self._woken = False
            if pieces := self._drain():
                yield pieces

    def _drain(self) -> list[Piece]:
        pieces = []
        now = time.monotonic()
        if len(self._pieces) > MOST_WAITING:
            self.cancel()
        while self._pieces:
            piece = self._pieces.popleft()
            pieces.append(piece)
            self.tokens += len(piece.tokens)
            if piece.finish_reason is not None:
                self._ended += 1
                self.late = self.late or piece.finish_reason == "deadline"
                self._worker.metrics.finished.labels(piece.finish_reason).inc()
                if piece.finish_reason == "error":
                    if self._engine.error is None:  # of this request alone: its grammar costs more than there may be
                        raise ApiError(400, piece.reason or "the answer cannot be made", code="grammar_failed")
                    raise ApiError(500, "computing the answer failed; the server is ending", code="engine")
        if pieces and self.first_s is None:
            self.first_s = now - self.begun
            if not self._whole:
                self._worker.metrics.first_token_s.observe(self.first_s)
        return pieces

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, tokens that were not read again."""
        return sum(handle.from_snapshots for handle in self.handles)

    async def wait(self) -> None:
        """Wait for the last piece.

        Raises:
            ApiError: computing them failed.
        """
        async for _ in self.batches():
            pass

    def cancel(self) -> None:
        """Let what has not ended end where it is."""
        for handle in self.handles:
            if not handle.done:
                self._engine.cancel(handle)

    def close(self) -> None:
        """Nobody looks any more."""
        self.cancel()
        self._worker.forget(self)
        took_s = time.monotonic() - self.begun
        metrics = self._worker.metrics
        metrics.generation_tokens.inc(self.tokens)
        metrics.prompt_tokens.inc(sum(len(handle.request.prompt) for handle in self.handles))
        if self._expected and self._ended == self._expected:
            metrics.request_s.observe(took_s)
            if self.tokens:
                metrics.token_s.observe(took_s / self.tokens)
            self._worker.note_end(took_s)


class ClientGoneError(Exception):
    """The client left before its answer."""


async def while_connected(receive: Callable[[], Coroutine[Any, Any, Any]], work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, and cancel it if the client leaves.

    Raises:
        ClientGoneError: it has left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
