"""Chat templates: messages to the text a model was trained on, and where in that text the messages' contents lie.

Templates come with models, so they are not trusted: minijinja runs them without files, modules or Python objects, and
with a bound on their work. That the contents' places are known is what lets the tokenizer keep control tokens out of
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import minijinja

from griffin.errors import GriffinError

# Gemma's dialogue: no system role, user and model in turns, contents trimmed.
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'"
    " + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

FUEL = 10_000_000  # template instructions, about a second: a template that loops forever is an error, not a hang


Message = dict[str, str]
Span = tuple[int, int]


def checked(messages: Sequence[Mapping[str, str]]) -> list[Message]:
    """Role and content of each message, "model" as "assistant"."""
    if not messages:
        raise GriffinError("there are no messages; give at least one with a role and a content")
    checked = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z_]+", role):
            raise GriffinError(f"message {index}: role {role!r} is not a word such as 'user' or 'assistant'")
        if not isinstance(content, str):
            raise GriffinError(f"message {index}: content is {type(content).__name__}, not a string")
        checked.append({"role": "assistant" if role == "model" else role, "content": content})
    return checked


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool, specials: Mapping[str, str]) -> str:
    """Render `template` as Hugging Face does; `specials` holds bos_token and the like.

    Raises:
        GriffinError: the template is broken, refuses the messages or never ends.
    """
    environment = minijinja.Environment()
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.fuel = FUEL
    environment.add_global("raise_exception", _raise_exception)
    environment.add_filter("trim", lambda text, chars=None: str(text).strip(chars))  # Python's idea of a blank
    environment.add_filter("tojson", lambda value, **_: json.dumps(value, ensure_ascii=False))
    try:
        return environment.render_str(
            template,
            **specials,
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        )
    except minijinja.TemplateError as error:
        line = str(error).splitlines()[0]
        raise GriffinError(f"the chat template failed: {line}; mend the template or the messages") from error


def render_marked(
    template: str, messages: Sequence[Message], add_generation_prompt: bool, specials: Mapping[str, str]
) -> tuple[str, list[Span] | None]:
    """Render, and find where in the text the contents lie; None where the template does more than copy them.

    A second rendering, with marks around the contents, shows it. Blanks at a content's ends may lie outside.
    """
    text = render(template, messages, add_generation_prompt, specials)
    mark = unused_mark([template, *(message["content"] for message in messages)])
    left, right = mark + "\ufdd2", mark + "\ufdd3"
    marked = []
    for message in messages:
        core = message["content"].strip()  # the blanks stay outside, where the template may trim them
        content = message["content"].replace(core, left + core + right, 1) if core else message["content"]
        marked.append({**message, "content": content})
    spans: list[Span] = []
    clean, start = "", None
    for part in re.split(f"({left}|{right})", render(template, marked, add_generation_prompt, specials)):
        if part == left:
            start = len(clean)
        elif part == right and start is not None:
            spans.append((start, len(clean)))
            start = None
        else:
            clean += part
    return text, spans if clean == text else None


def unused_mark(texts: Sequence[str]) -> str:
    """Return a short string that none of `texts` contains."""
    mark = "\ufdd0"  # not a character, by Unicode's own rule
    while any(mark in text for text in texts):
        mark += "\ufdd1"
    return mark


def _raise_exception(message: str) -> None:
    raise GriffinError(f"the chat template refuses the messages: {message}")
