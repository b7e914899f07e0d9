"""What clients may send: every number bounded, every list and text capped, no field ignored.

Fields are OpenAI's; those that are not are said to be ours. A field that is not here is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_TOKENS = 131_072  # of an answer
MOST_CHOICES = 8
MOST_PROMPTS = 64
MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_IDS = 4_000_000  # of a prompt, as ids
MOST_GRAMMAR_CHARS = 65_536

SESSION_ID = r"^[a-z2-7]{26}$"  # made by the server: no name that a client chose is a file's


class Body(BaseModel):
    """What every body keeps to."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Label = Annotated[str, StringConstraints(max_length=512)]
Text = Annotated[str, StringConstraints(max_length=8 * 2**20)]
SessionId = Annotated[str, StringConstraints(pattern=SESSION_ID)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=MOST_IDS, fail_fast=True)]
MaxTokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    name: Word
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """Ours (vLLM's spelling): exactly one of them."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, StringConstraints(min_length=1, max_length=MOST_GRAMMAR_CHARS)] | None = None
    choice: Annotated[list[Label], Field(min_length=1, max_length=1024)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=MOST_GRAMMAR_CHARS)] | None = None  # Lark

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar")
        return self


class Generation(Body):
    """What every request that generates may say."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasId, Bias], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    user: Label | None = None  # taken and not used
    # Ours:
    top_k: Annotated[int, Field(ge=-1, le=2**24)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    session: SessionId | None = None  # go on from it, and let it read this request and its answer

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        return value or None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        most = getattr(self, "max_completion_tokens", None) or getattr(self, "max_tokens", None)
        if self.min_tokens and most is not None and self.min_tokens > most:
            raise ValueError("min_tokens is more than max_tokens")
        if self.session is not None and (self.n or 1) > 1:
            raise ValueError("a session goes on with one answer: n must be 1; fork the session for more")
        return self


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    ) = ""
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = None  # no model here fills in the middle

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n, or left out: all answers are given")
        if self.session is not None and not (isinstance(self.prompt, str) or isinstance(self.prompt[0], int)):
            raise ValueError("a session goes on with one prompt")
        if self.echo and self.stream:
            raise ValueError("echo is for stream: false")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(max_length=256)]


class CalledFunction(Body):
    name: Word
    arguments: Text


class ToolCall(Body):
    id: Label
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Label | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Label | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's")
        return self


class Function(Body):
    name: Word
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Word


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES)]  # empty: what the session was told
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None  # an answer here calls one tool at a time
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None  # taken and not used
    store: Literal[False] | None = None
    safety_identifier: Label | None = None  # taken and not used
    prompt_cache_key: Label | None = None  # taken and not used: what was read before is found by its tokens
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is not in tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required and there are no tools")
        formats = (self.response_format is not None and self.response_format.type != "text", self.structured_outputs)
        if sum(map(bool, formats)) + (bool(names) and self.tool_choice != "none") > 1:
            raise ValueError("give one of response_format, structured_outputs and tools")
        return self


class NewSessionBody(Body):
    """POST /v1/sessions: what it begins with, if anything."""

    prompt: Text | Ids | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("give prompt or messages, not both")
        return self


class AppendBody(NewSessionBody):
    """POST /v1/sessions/ID/append."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise ValueError("give prompt or messages")
        return self


class ContinueBody(Body):
    """POST /v1/sessions/ID/continue: go on with an answer that was cut."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Id], Field(max_length=MOST_IDS, fail_fast=True)]
