"""Chats, prompts with completions, and preference pairs: from a row as people have it to ids and what is learnt.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    {"prompt": "Hi", "completion": "Hello."}
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}

A prompt, completion, chosen or rejected may be a text or a list of messages, and the prompt's place may be taken by
"messages". The model's chat template decides the tokens; where it has none, a prompt and what follows it are joined as
they are. Blanks around an answer are left out. A row that is none of these is refused with its file, its line and the
reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from griffin.data.sources import MOST_ROW_BYTES, RawRow
from griffin.errors import GriffinError, one_line
from griffin.reading import parse_json
from griffin.tokenizer import Tokenizer

Learnt = Literal["answers", "all", "last"]
Kind = Literal["chat", "pairs", "text"]
ROLES = ("system", "user", "assistant", "model")
_ANSWERS = ("assistant", "model")
_AT_ONCE = 64  # chats rendered in one request to the template's process

Messages = list[dict[str, str]]


class Document(NamedTuple):
    """One text for the model to read."""

    ids: npt.NDArray[np.uint32]
    counted: npt.NDArray[np.bool_]  # of each id, whether it is to be learnt
    num_bytes: int  # of the text that the counted ids stand for


class Bad(NamedTuple):
    """A row that cannot be used."""

    file: int
    number: int
    reason: str


@dataclass(frozen=True)
class Encoder:
    """Rows to documents: what each process of `prepare_examples` holds.

    Args:
        tokenizer: with a chat template, or without.
        kind: "chat", or "pairs": then each row gives two documents, chosen and rejected.
        learnt: of a chat: "answers" (each up to and with the token that ends it), "last" (the last of them), or "all"
            but the first token. Of a pair always the last answer.
        raw: join prompts and completions that are texts as they are, though there is a template.
    """

    tokenizer: Tokenizer
    kind: Kind
    learnt: Learnt = "answers"
    raw: bool = False

    def encode(self, rows: Sequence[RawRow]) -> tuple[list[Document], list[Bad]]:
        """Give the documents of rows, in order, and the rows that have none."""
        documents: list[Document] = []
        bad: list[Bad] = []
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            parsed: list[list[_Text] | str] = [self._parsed(row) for row in some]
            good = [texts for texts in parsed if not isinstance(texts, str)]
            try:
                encoded = iter(self._encode([text for texts in good for text in texts]))
                made: list[list[Document] | str] = [
                    texts if isinstance(texts, str) else [next(encoded) for _ in texts] for texts in parsed
                ]
            except GriffinError:  # of one of them: which one?
                made = [texts if isinstance(texts, str) else self._alone(texts) for texts in parsed]
            for row, result in zip(some, made, strict=True):
                if isinstance(result, str):
                    bad.append(Bad(row.file, row.number, result))
                else:
                    documents += result
        return documents, bad

    def _parsed(self, row: RawRow) -> list[_Text] | str:
        """What a row says, or why it says nothing."""
        try:
            return read_example(row.content, self.kind, raw=self.raw or self.tokenizer.chat_template is None)
        except GriffinError as error:
            return one_line(error)

    def _alone(self, texts: list[_Text]) -> list[Document] | str:
        try:
            return self._encode(texts)
        except GriffinError as error:
            return one_line(error)

    def _encode(self, texts: Sequence[_Text]) -> list[Document]:
        chats = [text for text in texts if isinstance(text, list)]
        held = iter(self.tokenizer.encode_dialogues(chats) if chats else ())
        return [
            self._document(*self._joined(text)) if isinstance(text, tuple) else self._chat_document(next(held))
            for text in texts
        ]

    def _chat_document(self, dialogue: Any) -> Document:
        learnt = "last" if self.kind == "pairs" else self.learnt
        if learnt == "all":
            return self._document(dialogue.ids, [(1, len(dialogue.ids))])
        answers = dialogue.answers[-1:] if learnt == "last" else dialogue.answers
        return self._document(dialogue.ids, answers)

    def _joined(self, text: tuple[str, str]) -> tuple[list[int], list[tuple[int, int]]]:
        tokenizer = self.tokenizer
        prompt, completion = (tokenizer.encode(part, bos=False) for part in text)
        begin = [*tokenizer.begin_ids, *prompt]
        ids = [*begin, *completion, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        return ids, [(1 if self.learnt == "all" else max(1, len(begin)), len(ids))]

    def _document(self, ids: list[int], learnt: Sequence[tuple[int, int]]) -> Document:
        counted = np.zeros(len(ids), dtype=np.bool_)
        for first, end in learnt:
            counted[first:end] = True
        if not counted.any():
            raise GriffinError("no token of it is to be learnt")
        array = np.array(ids, dtype=np.uint32)
        return Document(array, counted, text_bytes(self.tokenizer, array[counted]))


def text_bytes(tokenizer: Tokenizer, ids: npt.NDArray[Any]) -> int:
    """`tokenizer.token_bytes`, of many ids at once."""
    lengths = tokenizer.byte_lengths
    return tokenizer.token_bytes(ids.tolist()) if lengths is None else sum(map(lengths.__getitem__, ids.tolist()))


_Text = Messages | tuple[str, str]  # a chat, or a prompt and what follows it as they are


def kind_of(content: bytes | Mapping[str, Any] | None) -> Kind:
    """What a file's first row says that its rows are.

    Raises:
        GriffinError: it has none of the keys that are read.
    """
    row = _fields(content)
    if "chosen" in row or "rejected" in row:
        return "pairs"
    if "messages" in row or "prompt" in row or "completion" in row:
        return "chat"
    if "text" in row:
        return "text"
    raise GriffinError(
        f"its keys are {', '.join(sorted(map(str, row)))[:200] or 'none'}; an example has messages, or prompt and "
        "completion, or prompt, chosen and rejected, or text"
    )


def read_example(content: bytes | Mapping[str, Any] | None, kind: Kind, *, raw: bool) -> list[_Text]:
    """Read a row: one text of a chat, two of a pair.

    Raises:
        GriffinError: it is not what its kind needs; the message is the reason alone.
    """
    row = _fields(content)
    if kind_of(row) != kind:
        raise GriffinError(f"it has the keys of {kind_of(row)}, and the rows before it are {kind}")
    if kind == "pairs":
        return [_answered(row, name, raw=raw) for name in ("chosen", "rejected")]
    if "messages" in row:
        return [_finished(_messages(row["messages"], "messages"))]
    return [_answered(row, "completion", raw=raw)]


def _fields(content: bytes | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if content is None:
        raise GriffinError(f"it has more than {MOST_ROW_BYTES:,} bytes, which no example has; cut it")
    if isinstance(content, bytes):
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            byte = f"0x{content[error.start]:02x}"
            raise GriffinError(f"its byte {error.start} ({byte}) is not UTF-8; convert it") from None
        content = parse_json(text, "it", mend="write it again, or leave it out")
    if not isinstance(content, Mapping):
        raise GriffinError(f"it is a {type(content).__name__}, not an object with keys")
    return content


def _answered(row: Mapping[str, Any], name: str, *, raw: bool) -> _Text:
    """The prompt with what `name` has for it."""
    if name not in row:
        raise GriffinError(f"it has no {name!r}")
    answer = row[name]
    source = "prompt" if "prompt" in row else "messages"
    if source not in row:  # the whole conversation is in each of chosen and rejected
        if isinstance(answer, str):
            raise GriffinError(f"it has {name!r} and neither 'prompt' nor 'messages' before it")
        return _finished(_messages(answer, name))
    prompt = row[source]
    if isinstance(answer, str) and not answer.strip():
        raise GriffinError(f"its {name} is empty")
    if isinstance(prompt, str) and isinstance(answer, str) and raw:
        return prompt, answer
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, source)
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _messages(answer, name)
    return _finished([*before, *after])


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list):
        raise GriffinError(f"its {name} is a {type(value).__name__}, not a list of messages")
    if not value:
        raise GriffinError(f"its {name} has no messages")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise GriffinError(f"message {number} is a {type(message).__name__}, not a role and a content")
        if missing := [key for key in ("role", "content") if key not in message]:
            raise GriffinError(f"message {number} has no {missing[0]!r}; its keys are {', '.join(map(str, message))}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise GriffinError(f"message {number} has role {role!r:.60}, none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise GriffinError(f"message {number} has a {type(content).__name__} as content, not a text")
        if role in _ANSWERS and not content.strip():
            raise GriffinError(f"message {number}, an answer, is empty")
    # Blanks around an answer would be learnt by one template and dropped by another.
    return [
        {"role": role, "content": content.strip() if role in _ANSWERS else content}
        for role, content in ((message["role"], message["content"]) for message in value)
    ]


def _finished(messages: Messages) -> Messages:
    if messages[-1]["role"] not in _ANSWERS:
        raise GriffinError(f"it ends with a message of {messages[-1]['role']}: there is no answer to learn")
    return messages
