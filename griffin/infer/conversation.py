"""A conversation that lives in one row of state: a turn costs its own tokens, never the past's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.errors import GriffinError
from griffin.infer.generate import start
from griffin.infer.generation import Generation
from griffin.infer.request import Piece
from griffin.reading import parse_json
from griffin.state import State, check_origin
from griffin.state_file import load_both

if TYPE_CHECKING:
    from griffin.model import Griffin
    from griffin.tokenizer import Tokenizer

METADATA = "conversation"


class Conversation:
    """A model, and what it has read of one conversation.

    With a chat template, turns follow it. Without one (`has_template` is false), the model continues the text: what
    the person says is appended as it is.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        start: the state of one row that it begins in, tuned or saved; it is copied. None: nothing has been read.
    """

    def __init__(self, model: Griffin, tokenizer: Tokenizer, start: State | None = None) -> None:
        self.model, self.tokenizer, self.start = model, tokenizer, start
        if start is not None:
            check_origin(start, model)
            if start.batch_size != 1:
                raise GriffinError(f"a conversation begins in a state of one row, not {start.batch_size}; use rows()")
        self.state = model.new_state(1) if start is None else start.clone()
        self.messages: list[dict[str, str]] = []  # {"role": "user" or "assistant", "content": ...}
        # The last token of the last answer, if it was cut short: chosen, not read, and so the first of the next turn.
        # An answer that ended by itself leaves none: its stop token is the beginning of the template's next turn.
        self.unread: list[int] = []

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    @property
    def tokens_read(self) -> int:
        return int(self.state.position[0])

    def reply(self, text: str, **options: Any) -> Iterator[Piece]:
        """Say `text`, and give the answer as it comes.

        The turn counts from its first piece on, whether the answer ends by itself or the iterator is closed: what was
        generated until then is the answer. If computing it fails or is interrupted by an exception, the conversation
        is as it was before the turn.

        Args:
            text: what the person says. Without a template it may be empty, to let the model go on.
            options: those of `generate`; max_tokens and seed are one number.

        Raises:
            GriffinError: there is nothing to read, or the template refuses the messages.
            ValueError: an option is out of range.
        """
        message = {"role": "user", "content": text}
        if self.has_template:
            turn = self.tokenizer.encode_chat_turn([*self.messages, message])
        else:
            begin = self.tokenizer.begin_ids if not self.messages and not self.unread else ()
            turn = [*begin, *self.tokenizer.encode(text, bos=False)]  # it is to go on, so no EOS
        if not (prompt := [*self.unread, *turn]):
            raise GriffinError("the text is empty and the last answer is complete; say something")
        return self._reply(message, start(self.model, self.tokenizer, [prompt], self.state, **options))

    def _reply(self, message: dict[str, str], generation: Generation) -> Iterator[Piece]:
        begun = False
        try:
            for piece in generation:
                begun = True
                yield piece
        except GeneratorExit:
            if begun:
                self._keep(message, generation)
            raise
        self._keep(message, generation)

    def _keep(self, message: dict[str, str], generation: Generation) -> None:
        completion = generation.completion(0)
        self.state, self.unread = completion.state, list(completion.unread)
        self.messages += [message, {"role": "assistant", "content": completion.text}]

    def fork(self) -> Conversation:
        """Copy it: the two go on independently."""
        twin = Conversation(self.model, self.tokenizer, self.start)
        twin.state, twin.messages, twin.unread = self.state.clone(), [*self.messages], [*self.unread]
        return twin

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all: the state and the messages, whose text makes it grow.

        Raises:
            GriffinError: the state holds NaN or infinity, or the file cannot be written.
        """
        content = {
            "messages": self.messages,
            "unread": self.unread,
            "tokenizer": self.tokenizer.fingerprint(),
        }
        self.state.save(path, self.model, metadata={METADATA: json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path, model: Griffin, tokenizer: Tokenizer, start: State | None = None) -> Conversation:
        """Go on with what `save` wrote. Nothing is read again; `start` is where a new one would begin.

        Raises:
            GriffinError: the file is missing, damaged, not a conversation, or belongs to another model or tokenizer.
        """
        state, metadata = load_both(path, model)
        if METADATA not in metadata or state.batch_size != 1:
            raise GriffinError(f"{path} holds a state of {state.batch_size} rows and no conversation; use State.load")
        content = _read(metadata[METADATA], f"{path}, {METADATA}", model.config.vocab_size)
        if content["tokenizer"] != tokenizer.fingerprint():
            raise GriffinError(
                f"{path} was saved with another tokenizer (fingerprint {content['tokenizer']:.12}, this one is "
                f"{tokenizer.fingerprint()[:12]}); load it with the one it was made by"
            )
        conversation = cls(model, tokenizer, start)
        conversation.state = state
        conversation.messages, conversation.unread = content["messages"], content["unread"]
        return conversation


def _read(text: str, where: str, vocab_size: int) -> dict[str, Any]:
    """Parse what `Conversation.save` wrote, and refuse all else."""
    content = parse_json(text, where, mend="use another copy")
    if not isinstance(content, dict) or content.keys() != {"messages", "unread", "tokenizer"}:
        raise GriffinError(f"{where} is not an object of messages, unread and tokenizer; use another copy")
    messages, unread = content["messages"], content["unread"]
    if not isinstance(content["tokenizer"], str):
        raise GriffinError(f"{where}: tokenizer={content['tokenizer']!r:.60} must be a fingerprint; use another copy")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise GriffinError(f'{where}: messages must be objects of a "role" and a "content", texts; use another copy')
    # type() is int: True is an int as well.
    if not isinstance(unread, list) or not all(type(token) is int and 0 <= token < vocab_size for token in unread):
        raise GriffinError(
            f"{where}: unread={unread!r:.60} must be ids of the vocabulary, 0 .. {vocab_size - 1}; use another copy"
        )
    return content


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
    )
