"""What the server answers, as its document says it. Plain dictionaries: pydantic would take longer than a token."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

Finish = Literal["stop", "length", "tool_calls"]


class PromptDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptDetails]


class LegacyLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Finish | None


class CompletionReply(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    session: NotRequired[str]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobReply(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprobReply] | None
    refusal: None


class FunctionReply(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallReply(TypedDict):
    index: NotRequired[int]  # in streams
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionReply


class MessageReply(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallReply]]


class ChatChoice(TypedDict):
    index: int
    message: MessageReply
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatReply(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    session: NotRequired[str]


class ModelFacts(TypedDict):
    """Ours."""

    chat_template: bool
    vocab_size: int
    window: int | None
    state_bytes: int | None
    slots: int
    embedding_width: int


class ModelReply(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    griffin: ModelFacts


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelReply]


class TokenizeReply(TypedDict):
    count: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class DetokenizeReply(TypedDict):
    prompt: str


class SessionReply(TypedDict):
    """Ours. A conversation that the server keeps: its state has a fixed size, whatever it has read."""

    id: str
    object: Literal["session"]
    created: int
    used: int
    kind: Literal["new", "text", "chat"]
    messages: int  # that were said, of a chat
    tokens_read: int
    tokens_unread: int  # said, and read with the next request
    bytes: int
    can_continue: bool  # its last answer was cut, and /continue goes on with it


class SessionList(TypedDict):
    object: Literal["list"]
    data: list[SessionReply]


class DeletedReply(TypedDict):
    id: str
    object: Literal["session.deleted"]
    deleted: bool


class HealthReply(TypedDict):
    status: Literal["ok", "loading", "draining", "failed"]
    detail: NotRequired[dict[str, Any]]
