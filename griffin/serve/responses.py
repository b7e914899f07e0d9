"""/v1/responses: an answer that the next request goes on from. Each is a session: going on costs its new tokens."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field, StringConstraints
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from griffin.serve import openai
from griffin.serve.ask import check_model, request_of
from griffin.serve.body import JsonRoute
from griffin.serve.chat import prompt_of
from griffin.serve.errors import ApiError
from griffin.serve.respond import GONE, note
from griffin.serve.schema import MOST_MESSAGES, Body, Generation, Label, MaxTokens, Message, Name, Text
from griffin.serve.sessions import Going, said_as_http, take
from griffin.serve.streams import PING, EventStream
from griffin.serve.worker import Answer, ClientGoneError, Loaded, Worker, while_connected

_PREFIX = "resp_"


class InputPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(Body):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], Field(max_length=256)]


class ResponsesBody(Body):
    """POST /v1/responses."""

    model: Name | None = None
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = None
    previous_response_id: Annotated[str, StringConstraints(pattern=r"^resp_[a-z2-7]{26}$")] | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    store: bool | None = None  # false: nothing goes on from it
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    user: Label | None = None  # taken and not used


class ResponseReply(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


def routes(worker: Worker) -> APIRouter:
    """Make the route."""
    router = APIRouter(route_class=JsonRoute, responses=openai.ERRORS, tags=["OpenAI"])

    @router.post("/v1/responses", response_model=None, responses={200: {"model": ResponseReply, **openai.STREAMED}})
    async def create(body: ResponsesBody, http: HttpRequest) -> Response:
        """Answer, and keep the conversation for the request that names this answer."""
        return await answer_to(worker, body, http)

    return router


async def answer_to(worker: Worker, body: ResponsesBody, http: HttpRequest) -> Response:
    """Answer a body.

    Raises:
        ApiError: it is not answered.
    """
    settings, tenant = worker.settings, http.state.tenant
    check_model(body.model, settings.model_name, settings.model)
    loaded = worker.has_room()
    sessions = loaded.sessions
    with said_as_http():
        if body.previous_response_id is None:
            session = await asyncio.to_thread(sessions.create, tenant)
        else:
            before = body.previous_response_id.removeprefix(_PREFIX)
            session = await asyncio.to_thread(sessions.fork, before, tenant)
    name = session.name
    going = await take(worker, name, tenant, "chat")
    assert going is not None
    try:
        ids, said = await prompt_of(_messages(body), loaded, settings.limits, past=going.messages)
        wanted = Generation(temperature=body.temperature, top_p=body.top_p)
        request = request_of(
            wanted,
            loaded,
            [*going.session.unread, *ids],
            max_tokens=body.max_output_tokens or settings.limits.default_max_tokens,
        )
        answer = await worker.submit(
            [request],
            tenant=tenant,
            until=http.state.arrival + settings.request_s,
            state=going.session.start,
            keep_state=True,
            whole=not body.stream,
        )
    except BaseException:
        going.release()
        await _forget(loaded, name, tenant)
        raise
    made = _Making(worker, loaded, body, going, answer, said, http)
    return await made.respond()


class _Making:
    """One response on its way.

    Args:
        worker, loaded, body, going, answer, said, http: of `answer_to`.
    """

    def __init__(
        self,
        worker: Worker,
        loaded: Loaded,
        body: ResponsesBody,
        going: Going,
        answer: Answer,
        said: list[dict[str, str]],
        http: HttpRequest,
    ) -> None:
        self.worker, self.loaded, self.body, self.going = worker, loaded, body, going
        self.answer, self.said, self.http = answer, said, http
        self.created, self.item_id = int(time.time()), f"msg_{secrets.token_hex(12)}"

    async def respond(self) -> Response:
        if self.body.stream:
            return EventStream(self._events(), self._close, last=b"")
        try:
            await while_connected(self.http.receive, self.answer.wait())  # type: ignore[arg-type]
            await self._settle()
            return JSONResponse(self._whole())
        except ClientGoneError:
            return Response(status_code=GONE)
        finally:
            self._close()

    async def _settle(self) -> None:
        await self.going.settle(self.answer, "chat", self.said)
        if self.body.store is False:
            await _forget(self.loaded, self.going.session.name, self.http.state.tenant)

    def _close(self) -> None:
        self.answer.close()
        self.going.abandon(self.answer, "chat", self.said)

    async def _events(self) -> AsyncIterator[bytes]:
        number = 0

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            value = {"type": kind, "sequence_number": number, **fields}
            number += 1
            return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        empty = self._reply("in_progress", [], None)
        yield (
            event("response.created", response=empty)
            + event("response.in_progress", response=empty)
            + event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
            + event("response.content_part.added", **place, part=_part(""))
        )
        text = ""
        async for pieces in self.answer.batches():
            made = [] if pieces else [PING]
            for piece in pieces:
                text += piece.text
                if piece.text:
                    made.append(event("response.output_text.delta", **place, delta=piece.text, logprobs=[]))
            if made:
                yield b"".join(made)
        await self._settle()
        whole = self._whole()
        kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        yield (
            event("response.output_text.done", **place, text=text, logprobs=[])
            + event("response.content_part.done", **place, part=_part(text))
            + event("response.output_item.done", output_index=0, item=whole["output"][0])
            + event(kind, response=whole)
        )

    def _whole(self) -> dict[str, Any]:
        completion = self.answer.handles[0].completion(timeout=5)
        counted = note(self.http, self.answer)
        status = "completed" if completion.finish_reason == "stop" else "incomplete"
        usage = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": self.answer.cached_tokens},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted["total_tokens"],
        }
        return self._reply(status, [self._item(status, completion.text)], usage)

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}

    def _reply(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self.body
        return {
            "id": _PREFIX + self.going.session.name,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.worker.settings.model_name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "temperature": body.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "usage": usage,
        }


def _messages(body: ResponsesBody) -> list[Message]:
    made = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*made, Message(role="user", content=body.input)]
    for each in body.input:
        text = each.content if isinstance(each.content, str) else "".join(part.text for part in each.content)
        made.append(Message(role=each.role, content=text))
    return made


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _forget(loaded: Loaded, name: str, tenant: str) -> None:
    try:
        with said_as_http():
            await asyncio.to_thread(loaded.sessions.delete, name, tenant)
    except ApiError as error:
        if error.status_code != 404:  # it is gone already
            raise
