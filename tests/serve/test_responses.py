"""/v1/responses by the openai client: what goes on from an answer is what one conversation would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import Served

openai = pytest.importorskip("openai", reason="the conformance tests drive the openai client; pip install openai")

OPTIONS: dict[str, Any] = {"model": "tiny", "max_output_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as each:
        yield each


def chat(client: Any, *messages: tuple[str, str]) -> str:
    told = [{"role": role, "content": content} for role, content in messages]
    answer = client.chat.completions.create(model="tiny", messages=told, max_tokens=8, temperature=0)
    return str(answer.choices[0].message.content)


def test_answers_go_on_and_part(client: Any) -> None:
    first = client.responses.create(input="to be?", **OPTIONS)
    assert first.output_text == chat(client, ("user", "to be?"))
    assert first.usage.output_tokens <= 8
    one = client.responses.create(input="or not?", previous_response_id=first.id, **OPTIONS)
    past = (("user", "to be?"), ("assistant", first.output_text))
    assert one.output_text == chat(client, *past, ("user", "or not?"))
    assert one.usage.input_tokens < first.usage.input_tokens + 30  # the past is not sent, nor read
    # Another goes on from the same answer, and from the other's.
    two = client.responses.create(input="why?", previous_response_id=first.id, **OPTIONS)
    assert two.output_text == chat(client, *past, ("user", "why?"))
    more = (("user", "or not?"), ("assistant", one.output_text))
    three = client.responses.create(input="why?", previous_response_id=one.id, **OPTIONS)
    assert three.output_text == chat(client, *past, *more, ("user", "why?"))


def test_streams_and_instructions(client: Any) -> None:
    told: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "to be?"}]}]
    whole = client.responses.create(input=told, instructions="be", **OPTIONS)
    assert whole.output_text == chat(client, ("system", "be"), ("user", "to be?"))
    with client.responses.stream(input=told, instructions="be", **OPTIONS) as stream:
        events = list(stream)
    kinds, final = [event.type for event in events], events[-1].response
    assert final.output_text == whole.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    again = client.responses.create(input="or not?", previous_response_id=final.id, **OPTIONS)
    assert (
        again.output_text
        == client.responses.create(input="or not?", previous_response_id=whole.id, **OPTIONS).output_text
    )


def test_what_is_not_kept_is_not_found(client: Any, served: Served) -> None:
    before = len(served.call("/v1/sessions")[1]["data"])
    gone = client.responses.create(input="to be?", store=False, **OPTIONS)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="x", previous_response_id=gone.id, **OPTIONS)
    with pytest.raises(openai.BadRequestError):
        client.responses.create(input="x", previous_response_id="resp_../../etc", **OPTIONS)
    with pytest.raises(openai.BadRequestError):
        client.responses.create(input=[], **OPTIONS)
    assert len(served.call("/v1/sessions")[1]["data"]) == before
