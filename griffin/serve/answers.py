"""Completions to OpenAI's objects: choices, log-probabilities, usage, and the chunks of streams."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from griffin.serve import replies

if TYPE_CHECKING:
    from griffin.infer.request import TokenLogprob
    from griffin.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> replies.Usage:
    made: replies.Usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        made["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return made


def finish(reason: str | None) -> replies.Finish | None:
    """The engine's reason in OpenAI's words: what was cut short by a clock or a stopping server has its length."""
    return None if reason is None else "stop" if reason == "stop" else "length"


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; bytes that are no text of themselves as OpenAI writes them."""
    data = tokenizer.piece(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def legacy_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], tokens: Sequence[int], *, top: int, offset: int = 0
) -> replies.LegacyLogprobs:
    """The form of /v1/completions.

    Args:
        entries: one for each of `tokens`; None: it has none (the first of a prompt).
        top: how many of the likeliest were asked for; 0: none are shown.
        offset: of the first token in the text.
    """
    stream, at, offsets = tokenizer.stream(), offset, []
    for token in tokens:
        offsets.append(at)
        at += len(stream.push(token))
    return {
        "tokens": [token_name(tokenizer, token) for token in tokens],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top(tokenizer, entry) for entry in entries] if top else None,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> replies.ChatLogprobs:
    content: list[replies.TokenLogprobReply] = [
        {
            **_one(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_one(tokenizer, token, value) for token, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _top(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    return {token_name(tokenizer, token): _finite(value) for token, value in entry.top}


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> replies.TopLogprob:
    return {
        "token": token_name(tokenizer, token),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.piece(token)),
    }


def _finite(value: float) -> float:
    return max(value, LOWEST)
