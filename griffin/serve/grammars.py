"""What an answer must match: response_format, structured_outputs, and calls of tools, as the engine's grammars."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from griffin.serve.errors import ApiError, asked_wrongly
from griffin.serve.schema import MOST_GRAMMAR_CHARS, ChatBody, Generation, SchemaFormat, StructuredOutputs, Tool

if TYPE_CHECKING:
    from griffin.infer.grammar import Grammar

_OBJECT = {"type": "object"}
# Words, which do not begin with a brace; or a call.
_WORDS_OR_CALL = "start: words | call\nwords: /(?s:\\s*[^\\s{].*)/\ncall: %json "


def grammar_of(body: Generation, tools: list[Tool] | None = None, *, forced: bool = False) -> Grammar | None:
    """Give what the answer must match; None: anything.

    Args:
        body: the request.
        tools: that may be called.
        forced: whether one must be.

    Raises:
        ApiError: 400, a schema is longer than is compiled.
    """
    from griffin.infer.grammar import Grammar  # imports torch, which is there once a model is

    if body.structured_outputs is not None:
        with asked_wrongly("structured_outputs"):
            return _structured(body.structured_outputs)
    form = body.response_format if isinstance(body, ChatBody) else None
    if isinstance(form, SchemaFormat):
        return Grammar.json(_written(form.json_schema.schema_ or _OBJECT, "response_format"))
    if form is not None and form.type == "json_object":
        return Grammar.json(_written(_OBJECT, "response_format"))
    if not tools:
        return None
    calls = _written(_calls(tools), "tools")
    return Grammar.json(calls) if forced else Grammar.lark(_WORDS_OR_CALL + json.dumps(calls))


def _structured(asked: StructuredOutputs) -> Grammar:
    from griffin.infer.grammar import Grammar

    if asked.json_ is not None:
        return Grammar.json(_written(asked.json_, "structured_outputs"))
    if asked.regex is not None:
        return Grammar.regex(asked.regex)
    if asked.choice is not None:
        return Grammar.choice(asked.choice)
    return Grammar.lark(asked.grammar or "")


def _calls(tools: list[Tool]) -> dict[str, Any]:
    """The schema of a call of one of some tools. What a tool's own schema refers to is where it now stands."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/tool{place}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, tool in enumerate(tools)
    ]
    schemas = {
        f"tool{place}": _moved(tool.function.parameters or _OBJECT, f"#/$defs/tool{place}")
        for place, tool in enumerate(tools)
    }
    return {"anyOf": calls, "$defs": schemas}


def _moved(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {
            key: root + inner[1:]
            if key == "$ref" and isinstance(inner, str) and inner.startswith("#")
            else _moved(inner, root)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_moved(inner, root) for inner in value]
    return value


def _written(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """Let JSON be written one way, and refuse what is longer than is compiled, before it is."""
    # Blanks wherever JSON allows them are where a model can lose itself until its tokens are spent.
    schema = {**schema, "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
    if (length := len(json.dumps(schema))) > MOST_GRAMMAR_CHARS:
        raise ApiError(400, f"a schema of {length:,} characters, more than {MOST_GRAMMAR_CHARS:,}", param=param)
    return schema
