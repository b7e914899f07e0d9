"""An engine's answer to an HTTP one: whole or as events, of a chat or of a text, with or without a session."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from griffin.serve import answers, replies
from griffin.serve.chat import call_of
from griffin.serve.schema import Tool
from griffin.serve.sessions import Going
from griffin.serve.streams import PING, EventStream
from griffin.serve.worker import Answer, ClientGoneError, Loaded, Worker, while_connected

if TYPE_CHECKING:
    from griffin.infer.request import Completion, Piece

GONE = 499  # nginx's status for a client that left: nobody reads it but the log


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How an answer is to be given.

    Attributes:
        form: of a chat or a text.
        usage_last: a stream ends with its usage.
        logprobs: how many of the likeliest to show; None: no log-probabilities.
        tools: that may be called.
        echo: prompts to be repeated before a text's answers.
        going: the session that goes on.
        said: messages that the session has now been told.
    """

    form: Literal["chat", "text"]
    stream: bool = False
    usage_last: bool = False
    logprobs: int | None = None
    tools: list[Tool] = field(default_factory=list)
    echo: list[list[int]] | None = None
    going: Going | None = None
    said: list[dict[str, str]] = field(default_factory=list)

    def told(self, piece: Piece) -> str:
        """The text of a piece in a stream. What waits for the end of a character, or of what may be a stop string, is
        the engine's to give up when an answer is cut; in a session it goes on, and `continue` says it."""
        is_cut = piece.finish_reason in ("cancelled", "deadline")
        return "" if is_cut and self.going is not None else piece.text

    async def settle(self, answer: Answer) -> None:
        if self.going is not None:
            await self.going.settle(answer, self.form, self.said)

    def abandon(self, answer: Answer) -> None:
        if self.going is not None:
            self.going.abandon(answer, self.form, self.said)


async def respond(worker: Worker, loaded: Loaded, answer: Answer, asked: Asked, http: HttpRequest) -> Response:
    """Give an answer. It is closed, and its session settled, however that ends."""
    is_chat = asked.form == "chat"
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": ("chat.completion.chunk" if asked.stream else "chat.completion") if is_chat else "text_completion",
        "created": int(time.time()),
        "model": worker.settings.model_name,
    }
    if asked.stream:
        chunks = (_chat_chunks if is_chat else _text_chunks)(answer, loaded, asked, head, http)

        def close() -> None:
            answer.close()
            asked.abandon(answer)

        return EventStream(chunks, close)
    try:
        await while_connected(http.receive, answer.wait())  # type: ignore[arg-type]
        await asked.settle(answer)
        choices: list[Any] = []
        for place, handle in enumerate(answer.handles):
            for completion in handle.completions(timeout=5):
                index = len(choices)
                choices.append(choice_of(index, completion, asked, loaded, place))
        more = {} if asked.going is None else {"session": asked.going.session.name}
        return JSONResponse({**head, "choices": choices, "usage": note(http, answer), **more})
    except ClientGoneError:
        return Response(status_code=GONE)
    finally:
        answer.close()
        asked.abandon(answer)


def choice_of(index: int, completion: Completion, asked: Asked, loaded: Loaded, place: int = 0) -> Any:
    """Give one choice.

    Args:
        place: of the prompt among those of the request.
    """
    if asked.form == "chat":
        return _chat_choice(index, completion, asked, loaded)
    prompt = None if asked.echo is None else asked.echo[place]
    return _text_choice(index, completion, prompt, asked, loaded)


def _text_choice(
    index: int, completion: Completion, prompt: list[int] | None, asked: Asked, loaded: Loaded
) -> replies.CompletionChoice:
    tokenizer, told = loaded.tokenizer, prompt or []
    logprobs = None
    if asked.logprobs is not None:
        entries = [*((completion.prompt_logprobs or ()) if told else ()), *(completion.logprobs or ())]
        logprobs = answers.legacy_logprobs(tokenizer, entries, [*told, *completion.tokens], top=asked.logprobs)
    return {
        "index": index,
        "text": tokenizer.decode(told) + completion.text,
        "logprobs": logprobs,
        "finish_reason": answers.finish(completion.finish_reason),
    }


def _chat_choice(index: int, completion: Completion, asked: Asked, loaded: Loaded) -> replies.ChatChoice:
    called = call_of(completion.text, asked.tools) if asked.tools else None
    message: replies.MessageReply = {"role": "assistant", "content": completion.text, "refusal": None}
    reason = answers.finish(completion.finish_reason)
    if called is not None:
        message["content"] = None
        function: replies.FunctionReply = {"name": called["name"], "arguments": called["arguments"]}
        message["tool_calls"] = [{"id": _call_id(), "type": "function", "function": function}]
        reason = "tool_calls" if reason == "stop" else reason
    shown = None
    if asked.logprobs is not None:
        shown = answers.chat_logprobs(loaded.tokenizer, completion.logprobs or ())
    return {"index": index, "message": message, "logprobs": shown, "finish_reason": reason}


async def _text_chunks(
    answer: Answer, loaded: Loaded, asked: Asked, head: dict[str, Any], http: HttpRequest
) -> AsyncIterator[bytes]:
    extra = {"usage": None} if asked.usage_last else {}
    offsets: dict[int, int] = {}
    async for pieces in answer.batches():
        made = [] if pieces else [PING]
        for piece in pieces:
            at, shown = offsets.get(piece.row, 0), None
            if asked.logprobs is not None and piece.tokens:
                shown = answers.legacy_logprobs(
                    loaded.tokenizer, piece.logprobs or (), piece.tokens, top=asked.logprobs, offset=at
                )
            text, reason = asked.told(piece), answers.finish(piece.finish_reason)
            offsets[piece.row] = at + len(text)
            if not (text or reason or shown):
                continue
            choice = {"index": piece.row, "text": text, "logprobs": shown, "finish_reason": reason}
            made.append(answers.event({**head, "choices": [choice], **extra}))
        if made:
            yield b"".join(made)
    await asked.settle(answer)
    counted = note(http, answer)
    if asked.usage_last:
        yield answers.event({**head, "choices": [], "usage": counted})


async def _chat_chunks(
    answer: Answer, loaded: Loaded, asked: Asked, head: dict[str, Any], http: HttpRequest
) -> AsyncIterator[bytes]:
    """The chunks of a chat. What begins with a brace may be a call: it is held back until it is whole."""
    extra = {"usage": None} if asked.usage_last else {}

    def chunk(index: int, delta: dict[str, Any], shown: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return answers.event({**head, "choices": [choice], **extra})

    yield b"".join(chunk(row, {"role": "assistant", "content": ""}) for row in range(answer.handles[0].request.n))
    held: dict[int, str] = {}
    spoken: set[int] = set()  # choices that are words
    async for pieces in answer.batches():
        made = [] if pieces else [PING]
        for piece in pieces:
            row, text, reason = piece.row, asked.told(piece), answers.finish(piece.finish_reason)
            shown = None
            if asked.logprobs is not None and piece.tokens:
                shown = answers.chat_logprobs(loaded.tokenizer, piece.logprobs or ())
            if asked.tools and row not in spoken:
                held[row] = text = held.get(row, "") + text
                if reason is None and (not text.strip() or text.lstrip().startswith("{")):
                    if shown is not None:
                        made.append(chunk(row, {}, shown))
                    continue
                called = call_of(text, asked.tools) if reason is not None else None
                if called is not None:
                    call = {"index": 0, "id": _call_id(), "type": "function", "function": called}
                    made.append(chunk(row, {"tool_calls": [call]}, shown))
                    made.append(chunk(row, {}, None, "tool_calls" if reason == "stop" else reason))
                    continue
                spoken.add(row)
            if text or shown is not None:
                made.append(chunk(row, {"content": text}, shown))
            if reason is not None:
                made.append(chunk(row, {}, None, reason))
        if made:
            yield b"".join(made)
    await asked.settle(answer)
    counted = note(http, answer)
    if asked.usage_last:
        yield answers.event({**head, "choices": [], "usage": counted})


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def note(http: HttpRequest, answer: Answer) -> replies.Usage:
    """Count an answer, for the client and for the log's line."""
    prompt_tokens = sum(len(handle.request.prompt) for handle in answer.handles)
    counted = answers.usage(prompt_tokens, answer.tokens, answer.cached_tokens)
    http.state.noted = {
        "prompt_tokens": prompt_tokens,
        "cached_tokens": answer.cached_tokens or None,
        "completion_tokens": answer.tokens,
        "first_ms": None if answer.first_s is None else round(answer.first_s * 1000, 1),
        "late": answer.late or None,
    }
    return counted
