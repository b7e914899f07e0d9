"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from griffin.serve import answers, replies
from griffin.serve.ask import LEGACY_MAX_TOKENS, check_model, prompts_of, request_of
from griffin.serve.body import JsonRoute
from griffin.serve.chat import is_forced, prompt_of, tools_of
from griffin.serve.errors import ApiError, ErrorReply
from griffin.serve.schema import ChatBody, CompletionBody, Tool
from griffin.serve.streams import PING, EventStream
from griffin.serve.worker import Answer, ClientGoneError, Loaded, Worker, while_connected

if TYPE_CHECKING:
    from griffin.infer.request import Completion

GONE = 499  # nginx's status for a client that left: nobody reads it but the log
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "The request is not what it must be.",
        401: "A key is needed.",
        403: "Not for this client.",
        404: "There is none of that name.",
        405: "Another method.",
        408: "The body took too long.",
        413: "The body is too large.",
        429: "No room now; Retry-After says when.",
        431: "The headers are too large.",
        500: "A mistake of the server.",
        503: "Loading, or stopping.",
    }.items()
}


def routes(worker: Worker) -> APIRouter:
    """Make the two routes."""
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

    return router


STREAMED = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "With stream: events."}


async def complete(worker: Worker, body: CompletionBody, http: HttpRequest) -> Response:
    settings = worker.settings
    check_model(body.model, settings.model_name, settings.model)
    loaded = worker.has_room()
    prompts = await prompts_of(body, loaded, settings.limits)
    limit = LEGACY_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    echoed = bool(body.echo and body.logprobs is not None)
    requests = [
        request_of(
            body,
            loaded,
            prompt,
            max_tokens=limit,
            logprobs=body.logprobs,
            grammar=grammar_of(body, loaded),
            prompt_logprobs=body.logprobs if echoed else None,
        )
        for prompt in prompts
    ]
    answer = worker.submit(
        requests, tenant=http.state.tenant, until=http.state.arrival + settings.request_s, whole=not body.stream
    )
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": settings.model_name,
    }
    if body.stream:
        usage_last = body.stream_options is not None and bool(body.stream_options.include_usage)
        chunks = _completion_chunks(answer, loaded, head, body.logprobs, usage_last, http)
        return EventStream(chunks, answer.close)
    try:
        await while_connected(http.receive, answer.wait())  # type: ignore[arg-type]
        choices: list[replies.CompletionChoice] = []
        for handle, prompt in zip(answer.handles, prompts, strict=True):
            for completion in handle.completions(timeout=5):
                choices.append(_choice(len(choices), completion, prompt, body, loaded))
        counted = answers.usage(sum(map(len, prompts)), answer.tokens)
        note(http, answer, counted)
        return JSONResponse({**head, "choices": choices, "usage": counted})
    except ClientGoneError:
        return Response(status_code=GONE)
    finally:
        answer.close()


def _choice(
    index: int, completion: Completion, prompt: list[int], body: CompletionBody, loaded: Loaded
) -> replies.CompletionChoice:
    tokenizer = loaded.tokenizer
    told = tokenizer.decode(prompt) if body.echo else ""
    logprobs = None
    if body.logprobs is not None:
        entries: list[Any] = [*(completion.prompt_logprobs or ())] if body.echo else []
        entries += completion.logprobs or ()
        tokens = [*(prompt if body.echo else ()), *completion.tokens]
        logprobs = answers.legacy_logprobs(tokenizer, entries, tokens, top=body.logprobs)
    return {
        "index": index,
        "text": told + completion.text,
        "logprobs": logprobs,
        "finish_reason": answers.finish(completion.finish_reason),
    }


async def _completion_chunks(
    answer: Answer, loaded: Loaded, head: dict[str, Any], logprobs: int | None, usage_last: bool, http: HttpRequest
) -> AsyncIterator[bytes]:
    offsets: dict[int, int] = {}
    async for pieces in answer.batches():
        made = [] if pieces else [PING]
        for piece in pieces:
            shown = None
            if logprobs is not None and piece.tokens:
                at = offsets.get(piece.row, 0)
                shown = answers.legacy_logprobs(
                    loaded.tokenizer, piece.logprobs or (), piece.tokens, top=logprobs, offset=at
                )
            offsets[piece.row] = offsets.get(piece.row, 0) + len(piece.text)
            if not (piece.text or piece.finish_reason or shown):
                continue
            choice = {
                "index": piece.row,
                "text": piece.text,
                "logprobs": shown,
                "finish_reason": answers.finish(piece.finish_reason),
            }
            made.append(answers.event({**head, "choices": [choice], **({"usage": None} if usage_last else {})}))
        if made:
            yield b"".join(made)
    counted = answers.usage(sum(len(handle.request.prompt) for handle in answer.handles), answer.tokens)
    note(http, answer, counted)
    if usage_last:
        yield answers.event({**head, "choices": [], "usage": counted})


async def chat(worker: Worker, body: ChatBody, http: HttpRequest) -> Response:
    settings = worker.settings
    check_model(body.model, settings.model_name, settings.model)
    loaded = worker.has_room()
    tools = tools_of(body)
    ids, _ = await prompt_of(body.messages, loaded, settings.limits, tools=tools, forced=is_forced(body))
    limit = body.max_completion_tokens or body.max_tokens or settings.limits.default_max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    request = request_of(
        body, loaded, ids, max_tokens=limit, logprobs=logprobs, grammar=grammar_of(body, loaded, tools)
    )
    answer = worker.submit(
        [request], tenant=http.state.tenant, until=http.state.arrival + settings.request_s, whole=not body.stream
    )
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": settings.model_name,
    }
    if body.stream:
        usage_last = body.stream_options is not None and bool(body.stream_options.include_usage)
        chunks = chat_chunks(answer, loaded, head, tools, logprobs is not None, usage_last, http)
        return EventStream(chunks, answer.close)
    try:
        await while_connected(http.receive, answer.wait())  # type: ignore[arg-type]
        choices = [
            answers.chat_choice(index, completion, loaded.tokenizer, tools, logprobs is not None, call_id())
            for index, completion in enumerate(answer.handles[0].completions(timeout=5))
        ]
        counted = answers.usage(len(ids), answer.tokens)
        note(http, answer, counted)
        return JSONResponse({**head, "choices": choices, "usage": counted})
    except ClientGoneError:
        return Response(status_code=GONE)
    finally:
        answer.close()


async def chat_chunks(
    answer: Answer,
    loaded: Loaded,
    head: dict[str, Any],
    tools: list[Tool],
    logprobs: bool,
    usage_last: bool,
    http: HttpRequest,
) -> AsyncIterator[bytes]:
    """The chunks of a chat. What begins with a brace may be a call: it is held back until it is whole."""
    extra = {"usage": None} if usage_last else {}

    def chunk(index: int, delta: dict[str, Any], shown: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return answers.event({**head, "choices": [choice], **extra})

    yield b"".join(chunk(row, {"role": "assistant", "content": ""}) for row in range(answer.handles[0].request.n))
    held: dict[int, str] = {}
    spoken: set[int] = set()  # choices that are words
    async for pieces in answer.batches():
        made = [] if pieces else [PING]
        for piece in pieces:
            row, text, reason = piece.row, piece.text, answers.finish(piece.finish_reason)
            shown = answers.chat_logprobs(loaded.tokenizer, piece.logprobs or ()) if logprobs else None
            if tools and row not in spoken:
                held[row] = text = held.get(row, "") + text
                if reason is None and (not text.strip() or text.lstrip().startswith("{")):
                    if shown is not None and piece.tokens:
                        made.append(chunk(row, {}, shown))
                    continue
                from griffin.serve.chat import call_of

                called = call_of(text, tools) if reason is not None else None
                if called is not None:
                    call = {"index": 0, "id": call_id(), "type": "function", "function": called}
                    made.append(chunk(row, {"tool_calls": [call]}, shown))
                    made.append(chunk(row, {}, None, "tool_calls" if reason == "stop" else reason))
                    continue
                spoken.add(row)
            if text or (shown is not None and piece.tokens):
                made.append(chunk(row, {"content": text}, shown))
            if reason is not None:
                made.append(chunk(row, {}, None, reason))
        if made:
            yield b"".join(made)
    counted = answers.usage(sum(len(handle.request.prompt) for handle in answer.handles), answer.tokens)
    note(http, answer, counted)
    if usage_last:
        yield answers.event({**head, "choices": [], "usage": counted})


def grammar_of(body: Any, loaded: Loaded, tools: list[Tool] | None = None) -> Any:
    """What the answer must match, for the engine; None: anything."""
    form = getattr(body, "response_format", None)
    if body.structured_outputs is None and (form is None or form.type == "text") and not tools:
        return None
    raise ApiError(400, "this server cannot hold an answer to a form", param="response_format")


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def note(http: HttpRequest, answer: Answer, counted: replies.Usage) -> None:
    """What the log's line says of an answer."""
    http.state.noted = {
        "prompt_tokens": counted["prompt_tokens"],
        "completion_tokens": counted["completion_tokens"],
        "first_ms": None if answer.first_s is None else round(answer.first_s * 1000, 1),
        "late": answer.late or None,
    }
