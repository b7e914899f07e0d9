"""Messages to a prompt: roles a template knows, tools described in words, and calls read back from the answer."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from griffin.serve.ask import check_chars
from griffin.serve.errors import ApiError, asked_wrongly
from griffin.serve.schema import ChatBody, Message, NamedTool, Tool
from griffin.serve.settings import Limits

if TYPE_CHECKING:
    from griffin.serve.worker import Loaded

# The family has no tokens of its own for tools: they are described, and a call is an answer that is this object.
_TOOLS = """\
You can call these functions:
{functions}
To call one, answer with nothing but a JSON object of its name and its arguments:
{{"name": "...", "arguments": {{...}}}}"""
_AUTO = " Otherwise answer in words, which do not begin with a brace."


def text_of(message: Message) -> str:
    """Give a message's text: parts joined, a call as the object that the model wrote."""
    if message.content is None:
        calls = message.tool_calls or []
        return "\n".join(_call(call.function.name, call.function.arguments) for call in calls)
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def messages_of(messages: list[Message], tools: list[Tool], forced: bool, folds_system: bool) -> list[dict[str, str]]:
    """Give roles and contents as templates have them.

    A developer is the system; a tool's result is said by the user, results that follow one another in one message.
    Tools are described in the system's message, or, where the template has none (`folds_system`), before the first of
    the user's: so is then what the system says.
    """
    turns: list[dict[str, str]] = []
    head: list[str] = []
    for message in messages:
        role, text = message.role, text_of(message)
        if role in ("system", "developer"):
            if turns and not folds_system:
                turns.append({"role": "system", "content": text})
            else:
                head.append(text)
        elif role == "tool":
            said = f"Result: {text}"
            if turns and turns[-1].get("tool"):
                turns[-1]["content"] += f"\n{said}"
            else:
                turns.append({"role": "user", "content": said, "tool": "yes"})
        else:
            turns.append({"role": role, "content": text})
    if tools:
        functions = "\n".join(
            json.dumps(tool.function.model_dump(exclude_none=True, exclude={"strict"}), ensure_ascii=False)
            for tool in tools
        )
        head.append(_TOOLS.format(functions=functions) + ("" if forced else _AUTO))
    if head:
        text = "\n\n".join(head)
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if not folds_system:
            turns.insert(0, {"role": "system", "content": text})
        elif first is not None:
            first["content"] = f"{text}\n\n{first['content']}"
        else:
            turns.insert(0, {"role": "user", "content": text})
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def tools_of(body: ChatBody) -> list[Tool]:
    """Give the tools that may be called."""
    if body.tool_choice == "none":
        return []
    if isinstance(body.tool_choice, NamedTool):
        return [tool for tool in body.tools or () if tool.function.name == body.tool_choice.function.name]
    return body.tools or []


def is_forced(body: ChatBody) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


async def prompt_of(
    messages: list[Message],
    loaded: Loaded,
    limits: Limits,
    *,
    tools: list[Tool] | None = None,
    forced: bool = False,
    past: list[dict[str, str]] | None = None,
    pending: list[dict[str, str]] | None = None,
    generation: bool = True,
) -> tuple[list[int], list[dict[str, str]]]:
    """Render the template and tokenise.

    Args:
        past: what a session has read already: only what follows it is rendered.
        pending: what it has been told and not read.
        generation: end where the assistant's answer begins.

    Returns:
        The ids, and the messages as the template got them.

    Raises:
        ApiError: 400, the model has no template, or it refuses the messages.
    """
    if not loaded.facts["chat_template"]:
        raise ApiError(
            400,
            "this model has no chat template: it continues text, by /v1/completions (or give griffin serve "
            "--chat-template)",
            param="messages",
            code="no_chat_template",
        )
    check_chars(sum(len(text_of(message)) for message in messages), limits, "messages")
    turns = [*(pending or ()), *messages_of(messages, tools or [], forced, loaded.folds_system)]
    if not turns:
        raise ApiError(400, "there are no messages to answer", param="messages")
    if past and any(turn["role"] == "assistant" for turn in turns):
        raise ApiError(400, "the session has answered already: only what is said to it can follow", param="messages")
    with asked_wrongly("messages"):
        if past:
            ids = await asyncio.to_thread(loaded.tokenizer.encode_chat_turn, [*past, *turns])
        else:
            ids = await asyncio.to_thread(loaded.tokenizer.encode_chat, turns, add_generation_prompt=generation)
    return ids, turns


def call_of(text: str, tools: list[Tool]) -> dict[str, str] | None:
    """Read a call from an answer: its name and its arguments as JSON; None where it is no call of these tools."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        return None
    if value.get("name") not in [tool.function.name for tool in tools]:
        return None
    return {"name": value["name"], "arguments": json.dumps(value["arguments"], ensure_ascii=False)}


def _call(name: str, arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except ValueError:
        value = arguments
    return json.dumps({"name": name, "arguments": value}, ensure_ascii=False)
