"""json_schema, tools and structured outputs through the openai client, and grammars that mean harm."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import Served

openai = pytest.importorskip("openai", reason="the conformance tests drive the openai client; pip install openai")
pytest.importorskip("llguidance", reason="grammars need the extra serve")

MESSAGES: list[Any] = [{"role": "user", "content": "to be?"}]
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["glad", "sad"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Rome", "Venice"]}},
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "time",
        "parameters": {
            "type": "object",
            "properties": {"hour": {"enum": [1, 2]}},
            "required": ["hour"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as each:
        yield each


def test_json_schema(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format=form, max_tokens=200, seed=seed
        )
        value = json.loads(answer.choices[0].message.content)
        assert value.keys() == {"mood", "age"}
        assert value["mood"] in ("glad", "sad")
        assert 0 <= value["age"] <= 99
        assert answer.choices[0].finish_reason == "stop"


def test_the_clients_parse_helper(client: Any) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Mood(pydantic.BaseModel):
        glad: bool

    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Mood, max_tokens=100, temperature=0
    )
    assert answer.choices[0].message.parsed.glad in (True, False)


def test_a_tool_that_must_be_called(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "tools": [WEATHER, TIME]}
    for choice, names in (
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
    ):
        answer = client.chat.completions.create(**options, tool_choice=choice, seed=1)
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        assert call.id.startswith("call_")
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        assert arguments in ({"city": "Rome"}, {"city": "Venice"}, {"hour": 1}, {"hour": 2})
        chunks = list(client.chat.completions.create(**options, tool_choice=choice, seed=1, stream=True))
        deltas = [each.choices[0].delta for each in chunks]
        (told,) = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
        assert (told.function.name, told.function.arguments) == (call.function.name, call.function.arguments)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        # The result goes back, and the answer to it comes.
        messages = [
            *MESSAGES,
            answer.choices[0].message.to_dict(),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]
        more = client.chat.completions.create(**{**options, "messages": messages, "max_tokens": 8}, tool_choice="none")
        assert more.choices[0].message.tool_calls is None


def test_words_or_a_call(client: Any) -> None:
    """Left to itself a model of random weights speaks; pushed to a brace, it calls, and rightly."""
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER], "max_tokens": 60}
    words = client.chat.completions.create(**options, seed=3)
    message = words.choices[0].message
    assert (message.tool_calls is None) == (not (message.content or "").lstrip().startswith("{"))
    streamed = "".join(
        each.choices[0].delta.content or ""
        for each in client.chat.completions.create(**options, seed=3, stream=True)
        if each.choices
    )
    assert streamed == (message.content or "")


def test_a_brace_is_a_call(client: Any, served: Served) -> None:
    (brace,) = served.call("/tokenize", {"prompt": "{", "add_special_tokens": False})[1]["tokens"]
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[WEATHER], max_tokens=100, seed=5, logit_bias={str(brace): 100}
    )
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) in ({"city": "Rome"}, {"city": "Venice"})


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no, never"]}, "yes|no, never"),
        ({"grammar": 'start: "a" ("b" | "c") "d"'}, "a[bc]d"),
        ({"json": {"type": "boolean"}}, "true|false"),
    ],
)
def test_structured_outputs(client: Any, form: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(
        model="tiny", prompt="To be", max_tokens=40, seed=2, extra_body={"structured_outputs": form}
    )
    assert re.fullmatch(pattern, answer.choices[0].text)


HOSTILE: list[dict[str, Any]] = [
    {"regex": "(a+)+$" * 20},
    {"regex": "(" * 1000},
    {"regex": "((((a{1,1000}){1,1000}){1,1000}){1,1000})"},
    {"regex": "(?=x)y"},
    {"grammar": "start: start start start start"},
    {"grammar": "start: " + " | ".join(f'"{at}"' for at in range(5000))},
    {"grammar": "no rule"},
    {"json": {"type": "nothing"}},
    {"json": {"$ref": "http://192.0.2.1/schema.json"}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"json": {"type": "array", "minItems": 10**7, "maxItems": 10**7}},
    {"json": {"type": "string", "pattern": "(a|b|c){1,100000}"}},
    {"json": {"anyOf": [{"const": at} for at in range(10_000)]}},
    {"json": {"type": "number", "minimum": 1e308, "exclusiveMaximum": -1e308}},
    {"json": {"properties": {f"p{at}": {"type": "string"} for at in range(2000)}, "type": "object"}},
]


@pytest.mark.parametrize("form", HOSTILE, ids=lambda form: str(form)[:50])
def test_cve_2025_48942_48943_48944_a_grammar_can_do_no_harm(served: Served, form: dict[str, Any]) -> None:
    """vLLM died of an invalid schema, an invalid regex, an unknown type."""
    began = time.monotonic()
    body = {"prompt": "a", "max_tokens": 8, "structured_outputs": form, "seed": 1}
    status, answer, _ = served.call("/v1/completions", body)
    assert status in (200, 400), answer
    assert time.monotonic() - began < 10
    assert served.call("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
