"""/v1/completions, /v1/chat/completions, and going on with an answer of a session that was cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from griffin.serve import replies
from griffin.serve.ask import LEGACY_MAX_TOKENS, check_model, prompts_of, request_of
from griffin.serve.body import JsonRoute
from griffin.serve.chat import is_forced, prompt_of, tools_of
from griffin.serve.errors import ApiError, ErrorReply
from griffin.serve.grammars import grammar_of
from griffin.serve.respond import Asked, respond
from griffin.serve.schema import ChatBody, CompletionBody, ContinueBody, Generation
from griffin.serve.sessions import Going, Name, kind_of, take
from griffin.serve.worker import Answer, Worker

if TYPE_CHECKING:
    from griffin.infer.answered import Answered
    from griffin.infer.batch import Held
    from griffin.infer.request import Request

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "The request is not what it must be.",
        401: "A key is needed.",
        403: "Not for this client.",
        404: "There is none of that name.",
        405: "Another method.",
        408: "The body took too long.",
        409: "The session is answering another request, or has gone on.",
        413: "The body is too large.",
        429: "No room now; Retry-After says when.",
        431: "The headers are too large.",
        500: "A mistake of the server.",
        503: "Loading, or stopping.",
        507: "The disk is full.",
    }.items()
}
STREAMED = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "With stream: events."}


def routes(worker: Worker) -> APIRouter:
    """Make the routes."""
    router = APIRouter(route_class=JsonRoute, responses=ERRORS, tags=["OpenAI"])

    @router.post(
        "/v1/completions", response_model=None, responses={200: {"model": replies.CompletionReply, **STREAMED}}
    )
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        """Continue a text, several texts, or ids."""
        return await complete(worker, body, http)

    @router.post("/v1/chat/completions", response_model=None, responses={200: {"model": replies.ChatReply, **STREAMED}})
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        """Answer in a conversation."""
        return await chat(worker, body, http)

    @router.post(
        "/v1/sessions/{name}/continue",
        response_model=None,
        responses={200: {"model": replies.ChatReply | replies.CompletionReply, **STREAMED}},
        tags=["Sessions"],
    )
    async def go_on(name: Name, body: ContinueBody, http: HttpRequest) -> Response:
        """Go on with an answer that was cut, by the same draws: all of it, or as a stream what is new."""
        return await resume(worker, name, body, http)

    return router


async def complete(worker: Worker, body: CompletionBody, http: HttpRequest) -> Response:
    """Answer a /v1/completions body.

    Raises:
        ApiError: it is not answered.
    """
    settings = worker.settings
    check_model(body.model, settings.model_name, settings.model)
    loaded = worker.has_room()
    going = await take(worker, body.session, http.state.tenant, "text")
    with _released_on_error(going):
        prompts = await prompts_of(body, loaded, settings.limits, bos=going is None or not going.has_begun)
        if going is not None:
            prompts = [[*going.session.unread, *prompts[0]]]
        echoed = body.logprobs if body.echo else None
        requests = [
            request_of(
                body,
                loaded,
                prompt,
                max_tokens=LEGACY_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                logprobs=body.logprobs,
                grammar=grammar_of(body),
                prompt_logprobs=echoed,
            )
            for prompt in prompts
        ]
        answer = await _submit(worker, requests, body, http, None if going is None else going.session.start, going)
    asked = Asked(
        form="text",
        stream=bool(body.stream),
        usage_last=_usage_last(body),
        logprobs=body.logprobs,
        echo=prompts if body.echo else None,
        going=going,
    )
    return await respond(worker, loaded, answer, asked, http)


async def chat(worker: Worker, body: ChatBody, http: HttpRequest) -> Response:
    """Answer a /v1/chat/completions body.

    Raises:
        ApiError: it is not answered.
    """
    settings = worker.settings
    check_model(body.model, settings.model_name, settings.model)
    loaded = worker.has_room()
    going = await take(worker, body.session, http.state.tenant, "chat")
    with _released_on_error(going):
        tools = tools_of(body)
        ids, turns = await prompt_of(
            body.messages,
            loaded,
            settings.limits,
            tools=tools,
            forced=is_forced(body),
            past=None if going is None else going.messages,
            pending=None if going is None else going.pending,
        )
        prompt = ids if going is None else [*going.session.unread, *ids]
        request = request_of(
            body,
            loaded,
            prompt,
            max_tokens=body.max_completion_tokens or body.max_tokens or settings.limits.default_max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar_of(body, tools, forced=is_forced(body)),
        )
        answer = await _submit(worker, [request], body, http, None if going is None else going.session.start, going)
    asked = Asked(
        form="chat",
        stream=bool(body.stream),
        usage_last=_usage_last(body),
        logprobs=request.logprobs,
        tools=tools,
        going=going,
        said=turns,
    )
    return await respond(worker, loaded, answer, asked, http)


async def resume(worker: Worker, name: str, body: ContinueBody, http: HttpRequest) -> Response:
    """Go on with a session's answer.

    Raises:
        ApiError: 400, it was not cut; or it is not answered now.
    """
    loaded = worker.has_room()
    going = await take(worker, name, http.state.tenant)
    assert going is not None
    with _released_on_error(going):
        answered = going.session.answered
        if answered is None:
            raise ApiError(400, f"the last answer of session {name} was not cut; ask for another", code="not_cut")
        answer = await _submit(worker, [answered.request], body, http, answered, going)
    asked = Asked(
        form="chat" if kind_of(going.session) == "chat" else "text",
        stream=bool(body.stream),
        usage_last=_usage_last(body),
        logprobs=answered.request.logprobs,
        going=going,
    )
    return await respond(worker, loaded, answer, asked, http)


def _usage_last(body: Generation | ContinueBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


async def _submit(
    worker: Worker,
    requests: Sequence[Request],
    body: Generation | ContinueBody,
    http: HttpRequest,
    state: Held | Answered | None,
    going: Going | None,
) -> Answer:
    """Hand requests to the engine as the one who sent them; a session's state is kept."""
    return await worker.submit(
        requests,
        tenant=http.state.tenant,
        until=http.state.arrival + worker.settings.request_s,
        state=state,
        keep_state=going is not None,
        whole=not body.stream,
    )


@contextmanager
def _released_on_error(going: Going | None) -> Iterator[None]:
    """Let others have the session again if this request does not get to its answer: refused, faulty, or gone."""
    try:
        yield
    except BaseException:
        if going is not None:
            going.release()
        raise
