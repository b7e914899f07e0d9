"""/v1/sessions: conversations that the server keeps, and how a request goes on from one."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter
from fastapi import Path as InPath
from starlette.background import BackgroundTask
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from griffin.errors import GriffinError, one_line
from griffin.serve import replies
from griffin.serve.ask import check_chars, encode
from griffin.serve.body import JsonRoute
from griffin.serve.chat import messages_of, text_of
from griffin.serve.errors import ApiError
from griffin.serve.log import say
from griffin.serve.schema import SESSION_ID, AppendBody, Message, NewSessionBody
from griffin.serve.worker import Answer, Loaded, Worker

if TYPE_CHECKING:
    from griffin.infer.sessions import Session

Kind = Literal["new", "text", "chat"]
Name = Annotated[str, InPath(pattern=SESSION_ID)]
_SPOOL_BYTES = 2**20
_ENDS_S = 30.0  # a request that was cancelled ends sooner
_T = TypeVar("_T")


@contextmanager
def said_as_http(status: int = 400) -> Iterator[None]:
    """Turn what sessions say into answers: there is none, it has gone on, there is no room, the disk is full."""
    from griffin.infer.sessions import Changed, Full, NoSession  # imports torch, which is there once a model is

    try:
        yield
    except NoSession as error:
        raise ApiError(404, one_line(error), code="session_not_found") from error
    except Changed as error:
        raise ApiError(409, one_line(error), code="session_changed") from error
    except Full as error:
        raise ApiError(429, one_line(error), code="sessions_full", retry_after=60) from error
    except (GriffinError, OSError) as error:
        raise ApiError(status, one_line(error)) from error


class Going:
    """A session while a request goes on from it. Nobody else may meanwhile.

    Args:
        worker: the server's.
        loaded: its model.
        session: as it was.
    """

    def __init__(self, worker: Worker, loaded: Loaded, session: Session) -> None:
        self._worker, self._loaded, self.session = worker, loaded, session
        self._settled = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said and answered, of a chat."""
        return list(json.loads(self.session.note.get("messages", "[]")))

    @property
    def pending(self) -> list[dict[str, str]]:
        """What was appended to a chat, and is rendered with the next request."""
        return list(json.loads(self.session.note.get("pending", "[]")))

    @property
    def has_begun(self) -> bool:
        return bool(self.session.tokens_read or self.session.unread)

    async def settle(self, answer: Answer, kind: Kind, said: Sequence[dict[str, str]] = ()) -> None:
        """Let the session have read the request and its answer, however that ended.

        Args:
            answer: the request's; it has ended, or is about to.
            kind: what the session is from now on.
            said: messages that the request brought.
        """
        if self._settled:
            return
        self._settled = True
        try:
            handle = answer.handles[0]
            completion = await asyncio.to_thread(handle.completion, _ENDS_S)
            note: dict[str, str] = {"kind": kind}
            if kind == "chat":
                past = [*self.messages, *said]
                if past and past[-1]["role"] == "assistant":  # an answer that went on
                    past[-1] = {"role": "assistant", "content": completion.text}
                else:
                    past.append({"role": "assistant", "content": completion.text})
                note["messages"] = json.dumps(past, ensure_ascii=False)
            after = self.session.after(handle, note=note if completion.state is not None else None)
            self._loaded.sessions.put(self.session, after)
        except Exception as error:  # the engine's failure, said to the client already; the session is as it was
            say(logging.WARNING, "a session is as it was", session=self.session.name, error=one_line(error))
        finally:
            self.release()

    def abandon(self, answer: Answer, kind: Kind, said: Sequence[dict[str, str]] = ()) -> None:
        """The client has left: settle when the request has ended."""
        if not self._settled:
            self._worker.later(self.settle(answer, kind, said))

    def release(self) -> None:
        self._settled = True
        self._worker.sessions_in_use.discard(self.session.name)


async def take(worker: Worker, name: str | None, tenant: str, kind: Kind | None = None) -> Going | None:
    """Take a session for a request; None for None. Whoever takes one settles or releases it.

    Raises:
        ApiError: 404; 409, another request has it; 400, it is of the other kind.
    """
    if name is None:
        return None
    loaded = worker.ready()
    if name in worker.sessions_in_use:
        raise ApiError(409, f"session {name} is answering another request", code="session_busy")
    worker.sessions_in_use.add(name)
    try:
        with said_as_http():
            session = await asyncio.to_thread(loaded.sessions.get, name, tenant)
        if kind is not None and kind_of(session) not in ("new", kind):
            raise ApiError(400, f"session {name} is one of {kind_of(session)}, not of {kind}", param="session")
        return Going(worker, loaded, session)
    except BaseException:
        worker.sessions_in_use.discard(name)
        raise


def kind_of(session: Session) -> Kind:
    kind = session.note.get("kind", "new")
    return "chat" if kind == "chat" else "text" if kind == "text" else "new"


def reply_of(session: Session) -> replies.SessionReply:
    note = session.note
    return {
        "id": session.name,
        "object": "session",
        "created": int(session.created_s),
        "used": int(session.used_s),
        "kind": kind_of(session),
        "messages": len(json.loads(note.get("messages", "[]"))) + len(json.loads(note.get("pending", "[]"))),
        "tokens_read": session.tokens_read,
        "tokens_unread": len(session.unread),
        "bytes": session.nbytes,
        "can_continue": session.answered is not None,
    }


def routes(worker: Worker, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/v1/sessions", route_class=JsonRoute, responses=errors, tags=["Sessions"])
    one: dict[int | str, dict[str, Any]] = {200: {"model": replies.SessionReply}}

    async def call(function: Callable[..., _T], *arguments: Any, status: int = 400) -> _T:
        with said_as_http(status):
            return await asyncio.to_thread(function, *arguments)

    async def held(name: str, http: HttpRequest, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do something with a session that no request has meanwhile."""
        going = await take(worker, name, http.state.tenant)
        assert going is not None
        try:
            return await work()
        finally:
            going.release()

    async def append_to(session: Session, body: NewSessionBody, http: HttpRequest) -> Session:
        loaded, limits = worker.ready(), worker.settings.limits
        kind: Kind = "text" if body.prompt is not None else "chat"
        if kind_of(session) not in ("new", kind):
            raise ApiError(400, f"session {session.name} is one of {kind_of(session)}, not of {kind}")
        note = {**session.note, "kind": kind}
        ids: list[int] = []
        if isinstance(body.prompt, str):
            check_chars(len(body.prompt), limits, "prompt")
            ids = await encode(loaded, body.prompt, bos=not (session.tokens_read or session.unread))
        elif body.prompt is not None:
            ids = body.prompt
        else:
            messages: list[Message] = body.messages or []
            check_chars(sum(len(text_of(message)) for message in messages), limits, "messages")
            begun = session.tokens_read or session.note.get("pending")
            turns = messages_of(messages, [], False, loaded.folds_system and not begun)
            pending = [*json.loads(session.note.get("pending", "[]")), *turns]
            note["pending"] = json.dumps(pending, ensure_ascii=False)
        from dataclasses import replace

        said = await call(loaded.sessions.append, session.name, ids, http.state.tenant)
        return await call(loaded.sessions.put, said, replace(said, note=note))

    @router.post("", response_model=None, responses=one)
    async def create(body: NewSessionBody, http: HttpRequest) -> replies.SessionReply:
        """Begin a session, with a text, ids or messages, or with nothing."""
        session = await call(worker.ready().sessions.create, http.state.tenant)
        if body.prompt is not None or body.messages is not None:
            try:
                session = await append_to(session, body, http)
            except ApiError:
                await call(worker.ready().sessions.delete, session.name, http.state.tenant)
                raise
        return reply_of(session)

    @router.get("", response_model=None, responses={200: {"model": replies.SessionList}})
    async def every(http: HttpRequest) -> replies.SessionList:
        """List one's sessions, a thousand at most."""
        sessions = worker.ready().sessions
        names = sessions.names(http.state.tenant)[:1000]
        found = [reply_of(await call(sessions.get, name, http.state.tenant)) for name in names]
        return {"object": "list", "data": found}

    @router.post("/import", response_model=None, responses=one, openapi_extra=_FILE)
    async def import_(http: HttpRequest) -> replies.SessionReply:
        """Make a session of a file that /export gave, on this server or another of the same model."""
        sessions = worker.ready().sessions
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as file:
            async for chunk in http.stream():
                await asyncio.to_thread(file.write, chunk)
            file.seek(0)
            return reply_of(await call(sessions.import_, file, http.state.tenant))

    @router.get("/{name}", response_model=None, responses=one)
    async def get(name: Name, http: HttpRequest) -> replies.SessionReply:
        """Say where a session is."""
        return reply_of(await call(worker.ready().sessions.get, name, http.state.tenant))

    @router.delete("/{name}", response_model=None, responses={200: {"model": replies.DeletedReply}})
    async def delete(name: Name, http: HttpRequest) -> replies.DeletedReply:
        """Forget a session, in memory and on disk."""

        async def work() -> replies.DeletedReply:
            await call(worker.ready().sessions.delete, name, http.state.tenant)
            return {"id": name, "object": "session.deleted", "deleted": True}

        return await held(name, http, work)

    @router.post("/{name}/append", response_model=None, responses=one)
    async def append(name: Name, body: AppendBody, http: HttpRequest) -> replies.SessionReply:
        """Say more, to be read with the next request."""

        async def work() -> replies.SessionReply:
            session = await call(worker.ready().sessions.get, name, http.state.tenant)
            return reply_of(await append_to(session, body, http))

        return await held(name, http, work)

    @router.post("/{name}/fork", response_model=None, responses=one)
    async def fork(name: Name, http: HttpRequest) -> replies.SessionReply:
        """Make another session that is where this one is. Nothing is copied until they part."""
        return reply_of(await call(worker.ready().sessions.fork, name, http.state.tenant))

    @router.post("/{name}/save", response_model=None, responses=one)
    async def save(name: Name, http: HttpRequest) -> replies.SessionReply:
        """Write a session to the server's folder: it is there after a restart."""
        sessions = worker.ready().sessions
        await call(sessions.get, name, http.state.tenant)
        if worker.settings.state_folder is None:
            raise ApiError(400, "this server saves no sessions; griffin serve --state-folder", code="no_state_folder")
        await call(sessions.save, name, http.state.tenant, status=507)
        return reply_of(await call(sessions.get, name, http.state.tenant))

    @router.post("/{name}/restore", response_model=None, responses=one)
    async def restore(name: Name, http: HttpRequest) -> replies.SessionReply:
        """Go back to what was saved last."""

        async def work() -> replies.SessionReply:
            return reply_of(await call(worker.ready().sessions.restore, name, http.state.tenant))

        return await held(name, http, work)

    @router.get("/{name}/export", response_class=Response, responses={200: {"content": {_BYTES: {}}}})
    async def export(name: Name, http: HttpRequest) -> Response:
        """Give a session as a file, for /import."""
        handle, place = tempfile.mkstemp(prefix="griffin-session-")
        os.close(handle)
        path = Path(place)
        try:
            await call(worker.ready().sessions.export, name, path, http.state.tenant, status=507)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return FileResponse(path, media_type=_BYTES, background=BackgroundTask(path.unlink, missing_ok=True))

    return router


_BYTES = "application/octet-stream"
_FILE: dict[str, Any] = {
    "requestBody": {"required": True, "content": {_BYTES: {"schema": {"type": "string", "format": "binary"}}}}
}
