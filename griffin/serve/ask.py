"""Bodies to requests: what a client asked for in OpenAI's words, in the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from griffin.infer.request import Request, Sampling
from griffin.serve.errors import ApiError, asked_wrongly
from griffin.serve.schema import CompletionBody, Generation
from griffin.serve.settings import Limits

if TYPE_CHECKING:
    from griffin.serve.worker import Loaded

_AT_ONCE = 20_000  # characters that are tokenised on the event loop: a few milliseconds
LEGACY_MAX_TOKENS = 16  # OpenAI's own default of /v1/completions


def check_model(body_model: str | None, name: str, path: str) -> None:
    """Refuse another model's name.

    Raises:
        ApiError: 404.
    """
    if body_model is not None and body_model not in (name, path):
        raise ApiError(
            404, f"there is no model {body_model[:100]}; there is {name}", param="model", code="model_not_found"
        )


def check_chars(count: int, limits: Limits, param: str) -> None:
    """Refuse more text than is tokenised.

    Raises:
        ApiError: 400.
    """
    if count > limits.prompt_chars:
        raise ApiError(
            400,
            f"{count:,} characters, more than {limits.prompt_chars:,}",
            param=param,
            code="context_length_exceeded",
        )


async def encode(loaded: Loaded, text: str, *, bos: bool) -> list[int]:
    """Tokenise a text, a long one in a thread."""
    with asked_wrongly("prompt"):
        if len(text) <= _AT_ONCE:
            return loaded.tokenizer.encode(text, bos=bos)
        return await asyncio.to_thread(loaded.tokenizer.encode, text, bos=bos)


async def prompts_of(body: CompletionBody, loaded: Loaded, limits: Limits, *, bos: bool) -> list[list[int]]:
    """Give the ids of each prompt. Ids are taken as they are; texts begin with BOS, if `bos`."""
    given: Sequence[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    check_chars(sum(len(each) for each in given), limits, "prompt")
    prompts = []
    for each in given:
        prompts.append(await encode(loaded, each, bos=bos) if isinstance(each, str) else list(each))
    return prompts


def request_of(
    body: Generation,
    loaded: Loaded,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    logprobs: int | None = None,
    grammar: Any = None,
    prompt_logprobs: int | None = None,
) -> Request:
    """Build one request.

    Raises:
        ApiError: 400, with what is wrong, or what this engine has not.
    """
    if len(prompt) > loaded.engine.max_queue_tokens:
        raise ApiError(
            400,
            f"the prompt has {len(prompt):,} tokens, and at most {loaded.engine.max_queue_tokens:,} may wait; "
            "send it in parts to a session",
            param="prompt",
            code="context_length_exceeded",
        )
    wanted: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k if body.top_k is not None and body.top_k > 0 else None,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "seed": None if body.seed is None else body.seed % 2**63,
        "presence_penalty": body.presence_penalty or None,
        "frequency_penalty": body.frequency_penalty or None,
        "logit_bias": _bias(body, loaded),
    }
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    ends = set(body.stop_token_ids or ()) | (set() if body.ignore_eos else set(loaded.tokenizer.stop_ids))
    more: dict[str, Any] = {
        "min_tokens": body.min_tokens or None,
        "grammar": grammar,
        "prompt_logprobs": prompt_logprobs,
    }
    with asked_wrongly():
        return Request(
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            sampling=Sampling(**_known(Sampling, wanted)),
            stop=tuple(stops),
            stop_ids=frozenset(ends),
            logprobs=logprobs,
            n=body.n or 1,
            **_known(Request, more),
        )


def _bias(body: Generation, loaded: Loaded) -> Any:
    if not body.logit_bias:
        return None
    vocab_size = loaded.facts["vocab_size"]
    bias = {int(token): value for token, value in body.logit_bias.items()}
    for token in bias:
        if token >= vocab_size:
            raise ApiError(400, f"token {token} is not of the vocabulary, 0 .. {vocab_size - 1}", param="logit_bias")
    return bias


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what was not asked for, and refuse what this engine has not."""
    there = {each.name for each in fields(kind)}
    asked = {name: value for name, value in values.items() if value is not None}
    for name in asked:
        if name not in there:
            raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    return asked
