"""The unmodified `openai` client, sync and async, against a real server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest

import griffin
from griffin.infer.generate import generate
from tests.serve.conftest import Served

openai = pytest.importorskip("openai", reason="the conformance tests drive the openai client; pip install openai")

PROMPT = "To be, or not"
MESSAGES: list[Any] = [{"role": "user", "content": "to be?"}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as each:
        yield each


@pytest.fixture(scope="module")
def direct(folder: Any) -> Any:
    """The same model in this process."""
    model, tokenizer = griffin.load(folder), griffin.load_tokenizer(folder)
    return lambda prompts, **options: generate(model, tokenizer, prompts, **options)


@pytest.fixture(scope="module")
def tokenizer(folder: Any) -> Any:
    return griffin.load_tokenizer(folder)


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat_is_what_the_library_gives(client: Any, direct: Any, tokenizer: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    (expected,) = direct([tokenizer.encode_chat(MESSAGES)], max_tokens=20, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"


def test_chat_stream_joins_to_the_whole(client: Any) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_the_clients_own_stream_helper(client: Any) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content
    with client.chat.completions.stream(**options, stop=text[3:5]) as stream:  # it takes "length" for an error
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.find(text[3:5])]
    assert "content.delta" in kinds


def test_completions_of_text_and_ids(client: Any, direct: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    other = tokenizer.encode("the mind")
    expected = direct([ids, other], max_tokens=12, temperature=0)
    asked: list[Any] = [PROMPT, ids, [PROMPT], [ids], [PROMPT, "the mind"], [ids, other]]
    for prompt in asked:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        count = 2 if len(answer.choices) == 2 else 1
        assert [choice.text for choice in answer.choices] == [each.text for each in expected[:count]]
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert answer.usage.completion_tokens == sum(len(each.tokens) for each in expected[:count])
    assert client.completions.create(model="tiny", prompt=PROMPT, temperature=0).usage.completion_tokens == 16


def test_echo(client: Any) -> None:
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, temperature=0)
    echoed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    read = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True)
    assert read.choices[0].text == PROMPT
    assert read.usage.completion_tokens == 0


def test_completion_stream(client: Any) -> None:
    options = {"model": "tiny", "prompt": [PROMPT, "the mind"], "n": 2, "max_tokens": 10, "seed": 3}
    whole = client.completions.create(**options)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [texts[index] for index in range(4)] == [choice.text for choice in whole.choices]


def test_n_answers_differ_and_repeat_with_their_seed(client: Any) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "n": 3, "max_tokens": 16, "seed": 11}
    first = [choice.message.content for choice in client.chat.completions.create(**options).choices]
    again = [choice.message.content for choice in client.chat.completions.create(**options).choices]
    assert first == again
    assert len(set(first)) == 3
    negative = client.completions.create(model="tiny", prompt=PROMPT, seed=-7, max_tokens=8)
    assert (
        negative.choices[0].text
        == client.completions.create(model="tiny", prompt=PROMPT, seed=-7, max_tokens=8).choices[0].text
    )


def test_stop(client: Any) -> None:
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[5:7]
    cut = client.completions.create(**options, stop=stop)
    assert cut.choices[0].text == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    several = client.completions.create(**options, stop=["never in there", stop])
    assert several.choices[0].text == cut.choices[0].text
    streamed = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_chat_logprobs(client: Any, direct: Any, tokenizer: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    (expected,) = direct([tokenizer.encode_chat(MESSAGES)], max_tokens=6, temperature=0, logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == len(expected.tokens)
    for entry, right in zip(content, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(right.logprob, abs=1e-4)
        assert bytes(entry.bytes) == tokenizer.piece(right.token)
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx([v for _, v in right.top], abs=1e-4)
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == answer.choices[0].message.content
    streamed = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    entries = [
        entry
        for chunk in streamed
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in entries] == [entry.token for entry in content]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in content], abs=1e-4)


def test_completion_logprobs(client: Any, direct: Any, tokenizer: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    (expected,) = direct([PROMPT], max_tokens=6, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-4)
    assert [max(top.values()) for top in logprobs.top_logprobs] == pytest.approx(logprobs.token_logprobs, abs=1e-6)
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:at])) for at in range(6)]
    assert all(math.isfinite(value) for value in logprobs.token_logprobs)


def test_echoed_logprobs_are_the_prompts(client: Any, direct: Any, tokenizer: Any) -> None:
    """What lm-eval asks for: ids, echo, logprobs, one token."""
    ids = tokenizer.encode("To be, or not to be, that is")
    answer = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    (expected,) = direct([ids], max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    right = [each.logprob for each in (*expected.prompt_logprobs[1:], *expected.logprobs)]
    assert logprobs.token_logprobs[1:] == pytest.approx(right, abs=1e-4)
    assert len(logprobs.tokens) == len(ids) + 1 == len(logprobs.text_offset)
    assert answer.choices[0].text.startswith("To be, or not to be, that is")
    read = client.completions.create(model="tiny", prompt=[ids], max_tokens=0, logprobs=0, echo=True)
    assert read.choices[0].logprobs.token_logprobs[1:] == pytest.approx(right[:-1], abs=1e-4)
    assert read.choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": {"300": 100}},
        {"extra_body": {"repetition_penalty": 1.5, "top_k": 5, "min_p": 0.01}, "top_p": 0.9},
        {"extra_body": {"min_tokens": 10}, "logit_bias": {"1": 50}},
    ],
)
def test_every_option_reaches_the_library(client: Any, direct: Any, options: dict[str, Any]) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, seed=9, **options)
    own = {**options, **options.get("extra_body", {})}
    own.pop("extra_body", None)
    if "logit_bias" in own:
        own["logit_bias"] = {int(token): value for token, value in own["logit_bias"].items()}
    (expected,) = direct([PROMPT], max_tokens=16, seed=9, **own)
    assert answer.choices[0].text == expected.text
    (plain,) = direct([PROMPT], max_tokens=16, seed=9)
    assert plain.text != expected.text


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "x"}, "temperature"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"9999": 5}}, "logit_bias"),
        ({"logit_bias": {"x": 5}}, "logit_bias"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}] * 2}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"top_logprobs": 3}, None),
        ({"presence_penalty": 3}, "presence_penalty"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(client: Any, options: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **options})
    body = caught.value.body
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert body["message"]
    if param is not None:
        assert body["param"].startswith(param), body


def test_another_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert "tiny" in caught.value.message


def test_ids_that_the_model_has_not(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="tiny", prompt=[5, 10**6])
    with pytest.raises(openai.BadRequestError, match="at least 1"):
        client.completions.create(model="tiny", prompt=[])


def test_content_in_parts_and_a_system_that_the_template_has_not(client: Any) -> None:
    parts = [{"type": "text", "text": "to "}, {"type": "text", "text": "be?"}]
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(messages=MESSAGES, **options)
    assert client.chat.completions.create(messages=[{"role": "user", "content": parts}], **options).choices == (
        whole.choices
    )
    # Gemma's template refuses a system's message: it is said before the first of the user's.
    system = [{"role": "system", "content": "be"}, *MESSAGES]
    folded = client.chat.completions.create(messages=[{"role": "user", "content": "be\n\nto be?"}], **options)
    assert client.chat.completions.create(messages=system, **options).choices == folded.choices
    developer = [{"role": "developer", "content": "be"}, *MESSAGES]
    assert client.chat.completions.create(messages=developer, **options).choices == folded.choices


def test_async_client_many_at_once(served: Served, client: Any) -> None:
    """12 requests over 4 slots: each gets what it gets alone."""
    prompts = [f"To be {word}" for word in "abcdefghijkl"]
    alone = [client.completions.create(model="tiny", prompt=each, max_tokens=12, temperature=0) for each in prompts]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def whole(prompt: str) -> str:
                answer = await client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
                return str(answer.choices[0].text)

            async def streamed(prompt: str) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*[(whole if at % 2 else streamed)(each) for at, each in enumerate(prompts)])

    assert asyncio.run(ask()) == [each.choices[0].text for each in alone]
