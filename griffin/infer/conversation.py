"""A conversation that lives in one row of state: a turn costs its own tokens, never the past's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from griffin.errors import GriffinError
from griffin.infer.generate import Options, Piece, start
from griffin.infer.generation import Generation
from griffin.state import State, load_metadata

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
    """

    def __init__(self, model: Griffin, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.state = model.new_state(1)
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

    def reply(self, text: str, **options: Unpack[Options]) -> Iterator[Piece]:
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
            begin = () if self.tokens_read else self.tokenizer.begin_ids
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
        twin = Conversation(self.model, self.tokenizer)
        twin.state, twin.messages, twin.unread = self.state.clone(), [*self.messages], [*self.unread]
        return twin

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the state and the messages. Its size does not depend on their length."""
        content = {
            "messages": self.messages,
            "unread": self.unread,
            "tokenizer": self.tokenizer.fingerprint(),
        }
        self.state.save(path, metadata={METADATA: json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path, model: Griffin, tokenizer: Tokenizer) -> Conversation:
        """Go on with what `save` wrote. Nothing is read again.

        Raises:
            GriffinError: the file is missing, damaged, not a conversation, or belongs to another model or tokenizer.
        """
        state = State.load(path, model)
        metadata = load_metadata(path)
        if METADATA not in metadata or state.batch_size != 1:
            raise GriffinError(f"{path} holds a state of {state.batch_size} rows and no conversation; use State.load")
        content = json.loads(metadata[METADATA])
        if content["tokenizer"] != tokenizer.fingerprint():
            raise GriffinError(
                f"{path} was saved with another tokenizer (fingerprint {content['tokenizer'][:12]}, this one is "
                f"{tokenizer.fingerprint()[:12]}); load it with the one it was made by"
            )
        conversation = cls(model, tokenizer)
        conversation.state = state
        conversation.messages, conversation.unread = content["messages"], content["unread"]
        return conversation
