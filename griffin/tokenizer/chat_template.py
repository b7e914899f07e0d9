"""Chat templates: messages to the text a model was trained on, and where in that text the messages' contents lie.

Templates come with models, so they are not trusted: `griffin.template_process` runs them where they can do no harm.
That the contents' places are known is what lets the tokenizer keep control tokens out of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from griffin.errors import GriffinError
from griffin.tokenizer import template_source
from griffin.tokenizer.template_process import TemplateProcess
from griffin.tokenizer.token_text import check_characters

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

MOST_SOURCE = 1_000_000  # characters of a template; released ones have up to 30,000
LEFT, RIGHT = "\ufdd2", "\ufdd3"  # a mark and one of these stand around a content

Message = dict[str, str]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """What a template makes of messages.

    Attributes:
        text: the chat, or its end.
        spans: where in `text` contents lie, each (start, end); None where the template does more than copy them.
        contents: of the messages that `text` is about.
    """

    text: str
    spans: list[Span] | None
    contents: list[str]


class ChatTemplate:
    """A template, and the tokens it may name.

    Args:
        source: the template, in Jinja's language as Hugging Face folders have it.
        specials: bos_token and the like, as the template knows them.

    Raises:
        GriffinError: the template is longer than any is.
    """

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        if len(source) > MOST_SOURCE:
            raise GriffinError(f"the chat template has {len(source):,} characters, more than {MOST_SOURCE:,}; mend it")
        self.source, self._specials = source, dict(specials)
        self._process = TemplateProcess()

    @cached_property
    def _plain(self) -> str:
        return template_source.without_generation(self.source)

    @cached_property
    def _is_local(self) -> bool:
        return template_source.is_local(self.source)

    def whole(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> Rendered:
        """Render a chat.

        A second rendering, with marks around the contents, shows where they lie. Blanks at their ends may lie outside.

        Raises:
            GriffinError: a message is malformed, or the template is broken or refuses the messages.
        """
        taken = checked(messages)
        mark = self._unused_mark(taken)
        text, marked = self._render([], (taken, add_generation_prompt), (_marked(taken, mark), add_generation_prompt))
        return Rendered(text, _spans(text, marked, mark), [message["content"] for message in taken])

    def each(self, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[Rendered]:
        """Render several whole chats in one request, each message's content found at its place.

        `contents` and `spans` are those of the messages that are not blank, one for one and in order.

        Raises:
            GriffinError: as `whole`; or the template does not write each message once, in order and as it is.
        """
        taken = [checked(messages) for messages in chats]
        mark = self._unused_mark([message for messages in taken for message in messages])
        texts = self._render([], *((each, False) for chat in taken for each in (chat, _marked(chat, mark))))
        rendered = []
        for messages, text, marked in zip(taken, texts[::2], texts[1::2], strict=True):
            contents = [core for message in messages if (core := message["content"].strip())]
            spans = _spans(text, marked, mark)
            if spans is None or [text[start:end] for start, end in spans] != contents:
                raise GriffinError(
                    "the chat template does not write each message once, in order and unchanged: where its answers are "
                    "cannot be told; use a template that does"
                )
            rendered.append(Rendered(text, spans, contents))
        return rendered

    def turn(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> Rendered:
        """Render what follows the last answer's content.

        Where the template is local, and a generation prompt is asked for, the cost does not grow with the past.

        Raises:
            GriffinError: as `whole`; or the last message is the assistant's; or the template writes the past
                differently once it is answered, so that what has been read does not hold any more.
        """
        last = _last_answer(messages)
        if last is None:
            return self.whole(messages, add_generation_prompt)
        if last == len(messages) - 1:
            raise GriffinError(f"message {last} of {len(messages)} is the assistant's; end with a user message")
        # A local template writes the rest of the chat the same if messages are left out before the one that was
        # answered: two at a time, and not the first. B(m) and what follows it then stand between the same texts.
        first = last - 1
        kept = first
        if add_generation_prompt and self._is_local and first > 2:
            kept = 2 - first % 2
        taken = [*checked(messages[:kept]), *checked(messages[first:], first)] if kept < first else checked(messages)
        last -= first - kept
        mark = self._unused_mark(taken)
        sentinel = mark + "\ufdd4"
        turn = [{"role": "assistant", "content": sentinel}, *taken[last + 1 :]]
        text, marked, past = self._render(
            taken[:last], (turn, add_generation_prompt), (_marked(turn, mark), add_generation_prompt), ([], True)
        )
        if (count := text.count(sentinel)) != 1:
            raise GriffinError(
                f"the chat template writes the last answer {count} times instead of once; "
                "send the whole conversation with encode_chat"
            )
        before, tail = text.split(sentinel)
        if before != past:
            raise GriffinError(
                "the chat template writes earlier turns differently once they are answered; "
                "send the whole conversation with encode_chat"
            )
        spans = _spans(text, marked, mark)
        cut = len(before) + len(sentinel)
        return Rendered(
            tail,
            None if spans is None else [(start - cut, end - cut) for start, end in spans if start >= cut],
            [message["content"] for message in taken[last + 1 :]],
        )

    def _render(self, past: list[Message], *chats: tuple[list[Message], bool]) -> list[str]:
        """Render each (messages behind the past, whether to end where the answer begins) as Hugging Face does."""
        common = {**self._specials, "tools": None, "documents": None}
        variables = [{**common, "messages": messages, "add_generation_prompt": prompt} for messages, prompt in chats]
        return self._process.render(self._plain, variables, past)

    def _unused_mark(self, messages: Sequence[Message]) -> str:
        """Return a short string that neither the template nor the messages contain."""
        texts = [self.source, *self._specials.values(), *(message["content"] for message in messages)]
        mark = "\ufdd0"  # not a character, by Unicode's own rule
        while any(mark in text for text in texts):
            mark += "\ufdd1"
        return mark


def checked(messages: Sequence[Mapping[str, str]], start: int = 0) -> list[Message]:
    """Role and content of each message, "model" as "assistant"; `start` is the first one's number, for errors."""
    if not messages:
        raise GriffinError("there are no messages; give at least one with a role and a content")
    checked = []
    for index, message in enumerate(messages, start):
        if not isinstance(message, Mapping):
            raise GriffinError(f"message {index} is a {type(message).__name__}, not a role and a content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z_]+", role):
            raise GriffinError(f"message {index}: role {role!r} is not a word such as 'user' or 'assistant'")
        if not isinstance(content, str):
            raise GriffinError(f"message {index}: content is {type(content).__name__}, not a string")
        check_characters(content, f"message {index}: content")
        checked.append({"role": "assistant" if role == "model" else role, "content": content})
    return checked


def _last_answer(messages: Sequence[Mapping[str, str]]) -> int | None:
    for index in reversed(range(len(messages))):
        message = messages[index]
        if isinstance(message, Mapping) and message.get("role") in ("assistant", "model"):
            return index
    return None


def _marked(messages: Sequence[Message], mark: str) -> list[Message]:
    """Put marks around each content, less the blanks at its ends: the template may trim them."""
    marked = []
    for message in messages:
        core = message["content"].strip()
        content = message["content"].replace(core, mark + LEFT + core + mark + RIGHT, 1) if core else message["content"]
        marked.append({**message, "content": content})
    return marked


def _spans(text: str, marked: str, mark: str) -> list[Span] | None:
    """Find the marks; None where the text without them is another than `text`."""
    spans: list[Span] = []
    clean: list[str] = []
    at = 0
    start = None
    for part in re.split(f"({mark + LEFT}|{mark + RIGHT})", marked):
        if part == mark + LEFT:
            start = at
        elif part == mark + RIGHT and start is not None:
            spans.append((start, at))
            start = None
        else:
            clean.append(part)
            at += len(part)
    return spans if "".join(clean) == text else None
