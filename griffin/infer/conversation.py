"""A conversation that lives in one row of state: a turn costs its own tokens, never the past's."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin.errors import GriffinError
from griffin.infer.generate import Run, start
from griffin.infer.request import Piece
from griffin.reading import parse_json
from griffin.state import State, check_origin
from griffin.state_file import load_both

if TYPE_CHECKING:
    from griffin.model import Griffin
    from griffin.state import State
    from griffin.tokenizer import Tokenizer

METADATA = "conversation"
KEPT_TURNS = 16  # whose beginnings are kept to go back to; 17 MB each for RecurrentGemma 2B


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A conversation between two turns."""

    state: State  # written no more
    unread: tuple[int, ...]
    num_messages: int


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
        self.messages: list[dict[str, str]] = []  # {"role": "user", "assistant" or "system", "content": ...}
        # What has been said and not been read, the first of the next turn: the end of an answer that was cut short, or
        # all that was said before, where it is to be read again. An answer that ended by itself leaves nothing: its
        # stop token is the beginning of the template's next turn.
        self.unread: list[int] = []
        self._past: deque[_Place] = deque(maxlen=KEPT_TURNS)  # before each of the last turns

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

    def _reply(self, message: dict[str, str], generation: Run) -> Iterator[Piece]:
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

    def _keep(self, message: dict[str, str], generation: Run) -> None:
        self._past.append(_Place(self.state, tuple(self.unread), len(self.messages)))
        completion = generation.completion(0)
        assert completion.state is not None  # it has been read: there was a piece
        self.state, self.unread = completion.state, list(completion.unread)
        self.messages += [message, {"role": "assistant", "content": completion.text}]

    def undo(self) -> str:
        """Take the last turn back, and give what the person said in it.

        The conversation is where it was before that turn, bit for bit, for the last 16 turns since it was made or
        loaded. Further back, what was said before is read again with the next turn: from its text, whose ids may be
        others than those that were once chosen.

        Raises:
            GriffinError: there is no turn to take back.
        """
        said = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not said:
            raise GriffinError("there is no turn to take back")
        text, messages = self.messages[said[-1]]["content"], self.messages[: said[-1]]
        if self._past and self._past[-1].num_messages == len(messages):
            place = self._past.pop()
            self.state, self.unread, self.messages = place.state, list(place.unread), messages
        else:
            self._read_again(messages)
        return text

    def set_system(self, text: str) -> None:
        """Put a system message in front of what was said, in place of the one there is; an empty text takes it away.

        All that was said is read again with the next turn, since it was read without that message.

        Raises:
            GriffinError: there is no chat template, or it takes no system message.
        """
        if not self.has_template:
            raise GriffinError("this model has no chat template, and so no system message; say it in the text itself")
        message = [{"role": "system", "content": text}] if text else []
        self.tokenizer.encode_chat([*message, {"role": "user", "content": "?"}])  # refuses, if the template does
        self._read_again([*message, *(each for each in self.messages if each["role"] != "system")])

    def _read_again(self, messages: list[dict[str, str]]) -> None:
        """Be a conversation of these messages of which nothing has been read."""
        last = max((index for index, each in enumerate(messages) if each["role"] == "assistant"), default=None)
        if last is None:
            unread: list[int] = []  # the next turn is all of it
        elif self.has_template:
            answer = self.tokenizer.encode(messages[last]["content"], bos=False)
            unread = [*self.tokenizer.encode_chat(messages[:last]), *answer]
        else:
            text = "".join(message["content"] for message in messages)
            unread = [*self.tokenizer.begin_ids, *self.tokenizer.encode(text, bos=False)]
        self.state = self.model.new_state(1) if self.start is None else self.start.clone()
        self.messages, self.unread = messages, unread
        self._past.clear()

    def fork(self) -> Conversation:
        """Copy it: the two go on independently."""
        twin = Conversation(self.model, self.tokenizer, self.start)
        twin.state, twin.messages, twin.unread = self.state.clone(), [*self.messages], [*self.unread]
        twin._past.extend(self._past)
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
