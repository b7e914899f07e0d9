"""Text to ids and back: a Hugging Face `tokenizers` backend with rules that hold for every vocabulary.

Ordinary text never produces a control token; a sequence begins with at most one BOS; decoding in pieces gives what
decoding at once gives. For that, ids become text through their bytes, here and not in the backend: bytes join, one
UTF-8 decoder reads them, and what is not UTF-8 becomes U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from griffin.errors import GriffinError
from griffin.files import whole_file
from griffin.tokenizer.bpe import learn_bpe
from griffin.tokenizer.chat_template import ChatTemplate, Rendered
from griffin.tokenizer.token_text import TextStream as TextStream
from griffin.tokenizer.token_text import TextTable, byte_letters, check_characters, library_errors, piece_decoder

# Tokens that end a turn without being the vocabulary's eos: Gemma's, ChatML's, Llama 3's.
TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")

TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")  # always control tokens where the vocabulary has them
TRAINED_SPECIALS = ("<pad>", "<eos>", "<bos>", *TURN_TOKENS)


@dataclass(frozen=True)
class Dialogue:
    """The ids of a chat that has been held, and which of them the model said.

    Attributes:
        ids: all.
        answers: of each answer, (first, end) in `ids`: its content and the token that ends the turn.
    """

    ids: list[int]
    answers: list[tuple[int, int]]


class Tokenizer:
    """A vocabulary, its special tokens and its chat template.

    Args:
        backend: byte-level BPE, or BPE with byte fallback (SentencePiece style). Special tokens named below are made
            special in it. It must not be changed afterwards.
        bos, eos, pad: the tokens' strings; None where there is none.
        chat_template: a Jinja template as Hugging Face folders have them.
        stop_ids: further ids that end generation; eos and the usual ends of a turn are found without being named.
        add_bos: whether a text begins with `bos`, where there is one.
        add_eos: whether a text ends with `eos`, where there is one. Few models were made so.

    Raises:
        GriffinError: a special token is not in the vocabulary, or the backend's decoder is of a kind not supported.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        stop_ids: Sequence[int] = (),
        add_bos: bool = True,
        add_eos: bool = False,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        for name, token in self._names.items():
            if token is not None and backend.token_to_id(token) is None:
                raise GriffinError(f"{name} {token!r} is not in the vocabulary; name a token that it has")
        named = [token for token in self._names.values() if token is not None]
        _make_special(backend, named + [token for token in TURN_TOKENS if backend.token_to_id(token) is not None])
        self.bos_id, self.eos_id, self.pad_id = (
            None if token is None else backend.token_to_id(token) for token in self._names.values()
        )
        added = backend.get_added_tokens_decoder()
        self._specials = {index: token.content for index, token in added.items() if token.special}
        ends = [index for index, text in self._specials.items() if text in TURN_ENDS]
        first = [] if self.eos_id is None else [self.eos_id]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*first, *ends, *stop_ids]))
        self._to_bytes, self._strip = piece_decoder(backend)
        begin = [bos] if add_bos and bos is not None else []
        end = [eos] if add_eos and eos is not None else []
        ids = {token: index for token in (*begin, *end) if (index := backend.token_to_id(token)) is not None}
        self.begin_ids = tuple(ids[token] for token in begin)
        self.end_ids = tuple(ids[token] for token in end)
        backend.post_processor = processors.TemplateProcessing(  # only for those who open the file with other software
            single=[*begin, "$A", *end], pair=[*begin, "$A", *end, "$B:1", *end], special_tokens=list(ids.items())
        )
        specials = {name: token for name, token in self._names.items() if token is not None}
        self._chat = None if chat_template is None else ChatTemplate(chat_template, specials)
        self._plain = _plain_twin(backend)
        unknown = getattr(backend.model, "unk_token", None)
        self._control = frozenset(index for index, text in self._specials.items() if text != unknown)

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        return None if self._chat is None else self._chat.source

    def with_chat_template(self, source: str) -> Tokenizer:
        """Give a tokenizer that is this one with another template.

        Raises:
            GriffinError: the template is longer than any is.
        """
        twin = copy(self)
        twin._chat = ChatTemplate(source, {name: token for name, token in self._names.items() if token is not None})
        return twin

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included: the largest id + 1."""
        return max(self._text) + 1

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._specials.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches

    @cached_property
    def _text(self) -> TextTable:
        added = self.backend.get_added_tokens_decoder()
        text = {index: self._to_bytes(piece, index in added) for piece, index in self.backend.get_vocab().items()}
        return {**text, **dict.fromkeys(self._specials, b"")}  # special tokens stand for no text

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Return the ids of `text`.

        Args:
            bos: `text` is whole: begin with `begin_ids`, which is BOS for most vocabularies and nothing for others, and
                end with `end_ids`, which is nothing for most. False for a piece of a text, which gets neither.
            special: read "<end_of_turn>" and the like in `text` as control tokens; otherwise they are ordinary text.

        Raises:
            GriffinError: `text` holds a lone surrogate, which no UTF-8 has, or the vocabulary fails on it.
        """
        ids = self._ids(text, special)
        return self._whole(ids) if bos else ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = True) -> list[list[int]]:
        """Return `encode` of each text, computed in parallel."""
        try:
            batch = [each.ids for each in self.encodings(texts)]
        except TypeError:
            batch = [self._ids(text, False) for text in texts]  # which says what is wrong with which text
        return [self._whole(ids) for ids in batch] if bos else batch

    def encodings(self, texts: Sequence[str], *, offsets: bool = False) -> list[tokenizers.Encoding]:
        """Return the backend's own `Encoding` of each text, without BOS: the ids, and which word each is a part of.

        Args:
            texts: without lone surrogates.
            offsets: also which characters each token stands for; that takes twice as long.
        """
        encode = self._plain.encode_batch if offsets else self._plain.encode_batch_fast
        with library_errors("this tokenizer fails on a text"):
            encodings = encode(list(texts), add_special_tokens=False)
        for encoding in encodings:
            self._refuse_control(encoding.ids)
        return encodings

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Ids the vocabulary does not have stand for no text: embeddings often have more rows than there are tokens.
        """
        get = self._text.get
        if skip_special:
            data = b"".join(get(index, b"") for index in map(int, ids))
        else:
            specials = {index: text.encode() for index, text in self._specials.items()}
            data = b"".join(specials.get(index) or get(index, b"") for index in map(int, ids))
        return (data.removeprefix(b" ") if self._strip else data).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """Return the bytes an id stands for in the middle of a text; of a special token, those of its name."""
        special = self._specials.get(token)
        return self._text.get(token, b"") if special is None else special.encode()

    def stream(self) -> TextStream:
        """Start decoding ids one by one, special tokens skipped."""
        return TextStream(self._text, self._strip)

    def token_bytes(self, ids: Sequence[int]) -> int:
        """Count the UTF-8 bytes of the text that `ids` stand for, special tokens 0, for bits per byte.

        token_bytes(encode(text, bos=False)) == len(text.encode()), with one exception: SentencePiece vocabularies
        cannot tell "▁" (U+2581) from a space, and its 3 bytes count as 1.
        """
        pieces = [self._text.get(index, b"") for index in map(int, ids)]  # tensors hash by identity
        prefixed = self._strip and next((piece for piece in pieces if piece), b"").startswith(b" ")
        return sum(map(len, pieces)) - prefixed

    @cached_property
    def byte_lengths(self) -> list[int] | None:
        """How many bytes of text each id stands for, special tokens 0: their sum is `token_bytes`.

        None where a text's first blank is none of it, as in some SentencePiece vocabularies: no table knows that.
        """
        return None if self._strip else [len(self._text.get(index, b"")) for index in range(self.vocab_size)]

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Render the chat template over `messages` and return the ids: BOS is there where the template writes it.

        No content produces a control token: where one holds a special token's text, template and contents are encoded
        apart. Everywhere else the ids are those of Hugging Face's `apply_chat_template`.

        Args:
            messages: {"role": ..., "content": ...}; "model" is taken as "assistant".
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            GriffinError: there is no chat template, it fails, refuses the messages, crashes or does not end, or a
                message is malformed.
        """
        return self._encode_rendered(self._chat_or_error().whole(messages, add_generation_prompt))

    def chat_text(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Render the chat template over `messages`, for those who encode texts: special tokens are text in it.

        Raises:
            GriffinError: as `encode_chat`.
        """
        return self._chat_or_error().whole(messages, add_generation_prompt).text

    def encode_chat_turn(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids that continue a conversation whose past has been read or generated already.

        They follow the last assistant message's content and begin with what ends it (Gemma: "<end_of_turn>\\n"), so
        the stop token that ended generation must not have been read. Before any answer, equal to `encode_chat`.

        Where the template's form shows that a turn does not depend on the past's messages (Gemma's, ChatML's), they
        are neither rendered nor looked at; other templates render all of them.

        Raises:
            GriffinError: as `encode_chat`; or the last message is the assistant's; or the template does not keep the
                past as it was, so that this cannot work.
        """
        return self._encode_rendered(self._chat_or_error().turn(messages, add_generation_prompt))

    def encode_dialogues(self, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[Dialogue]:
        """Encode chats as they will be when they are held: what a model is trained on.

        The prompt before an answer, and the answer, have the ids that they get when a model generates it; those are
        `encode_chat`'s wherever no token of the vocabulary reaches over the border of the two.

        Args:
            chats: each a list of messages, as for `encode_chat`. All are rendered in one request.

        Raises:
            GriffinError: as `encode_chat`, for any of them; or the template does not write each message once, in order
                and as it is, so that the answers cannot be told from the rest.
        """
        rendered = self._chat_or_error().each(chats)
        pieces = [
            _pieces(chat, text, self._special_pattern, self._stops) for chat, text in zip(chats, rendered, strict=True)
        ]
        plain = [piece.text for chat in pieces for piece in chat if not piece.special]
        special = [piece.text for chat in pieces for piece in chat if piece.special]
        with library_errors("this tokenizer fails on a text"):
            control = iter(self.backend.encode_batch_fast(special, add_special_tokens=False))
        ordinary = iter(self.encodings(plain))
        dialogues = []
        for chat in pieces:
            ids: list[int] = []
            answers: list[tuple[int, int]] = []
            for piece in chat:
                first = len(ids)
                ids += next(control if piece.special else ordinary).ids
                if piece.answers and not piece.special:
                    answers.append((first, len(ids)))
                elif piece.answers:  # the token that ends the answer before
                    answers[-1] = answers[-1][0], len(ids)
            dialogues.append(Dialogue(ids, answers))
        return dialogues

    @cached_property
    def speaks_gemma(self) -> bool:
        """Whether the vocabulary has the tokens that Gemma's dialogue is written with."""
        return all(self.backend.token_to_id(token) is not None for token in TURN_TOKENS)

    @cached_property
    def _stops(self) -> re.Pattern[str]:
        texts = sorted((self._specials[index] for index in self.stop_ids if index in self._specials), key=len)
        return re.compile("|".join(map(re.escape, reversed(texts))) or "(?!)")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers' AutoTokenizer open.

        `stop_ids` that come from elsewhere than eos and the ends of a turn belong to generation_config.json, which
        the model's folder has.
        """
        folder = Path(folder)
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: token for name, token in self._names.items() if token is not None},
            "add_bos_token": bool(self.begin_ids),
            "add_eos_token": bool(self.end_ids),
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        settings = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        for name, content in (("tokenizer.json", self.backend.to_str()), ("tokenizer_config.json", settings)):
            with whole_file(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8", newline="\n")

    def fingerprint(self) -> str:
        """Return a sha256 over everything that decides ids: equal fingerprints, equal ids for every text."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = json.loads(self.backend.to_str())
        keys = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        rules: list[object] = [{key: content[key] for key in keys}, self.bos_id, self.eos_id, self.pad_id]
        if len(self.begin_ids) != (self.bos_id is not None) or self.end_ids:  # else as fingerprints have always been
            rules += [self.begin_ids, self.end_ids]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Return the tokenizer of plain bytes: ids 0-255 are the bytes, then <bos> 256, <eos> 257, <pad> 258."""
        alphabet = {letter: byte for byte, letter in enumerate(byte_letters())}
        backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", "<eos>", "<pad>")])
        return cls(backend, bos="<bos>", eos="<eos>", pad="<pad>")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, chat_template: str | None = None, show_progress: bool = False
    ) -> Tokenizer:
        """Train a byte-level BPE, lossless for any text.

        Ids: <pad> 0, <eos> 1, <bos> 2, <start_of_turn> 3, <end_of_turn> 4 (so that a model can learn
        dialogue later; the template comes with that), the 256 bytes, the merges. Fewer than `vocab_size` ids come out
        where `texts` has too few pairs that occur twice.

        Raises:
            GriffinError: `vocab_size` has no room for the bytes and the special tokens, or is above a million.
        """
        backend = learn_bpe(texts, vocab_size, TRAINED_SPECIALS, show_progress=show_progress)
        return cls(backend, bos="<bos>", eos="<eos>", pad="<pad>", chat_template=chat_template)

    def _whole(self, ids: list[int]) -> list[int]:
        if self.begin_ids:  # once, should `special` have read it in the text as well
            ids = ids[next((at for at, index in enumerate(ids) if index != self.bos_id), len(ids)) :]
        return [*self.begin_ids, *ids, *self.end_ids]

    def _ids(self, text: str, special: bool) -> list[int]:
        try:
            with library_errors("this tokenizer fails on the text"):
                ids = (self.backend if special else self._plain).encode(text, add_special_tokens=False).ids
        except TypeError:
            check_characters(text, "the text")
            raise
        if not special:
            self._refuse_control(ids)
        return list(ids)

    def _refuse_control(self, ids: list[int]) -> None:
        # Our vocabularies cannot get here. Some others hold a control token's text as an ordinary piece as well.
        if not self._control.isdisjoint(ids):
            token = next(self._specials[index] for index in ids if index in self._control)
            raise GriffinError(f"this vocabulary cannot write {token!r} as ordinary text; remove it from the text")

    def _chat_or_error(self) -> ChatTemplate:
        if self._chat is None:
            raise GriffinError(
                "this tokenizer has no chat template: use a model made for chat, put a chat_template.jinja into its "
                "folder, or encode the text yourself"
            )
        return self._chat

    def _encode_rendered(self, chat: Rendered) -> list[int]:
        """Encode a rendered chat: special tokens count in the template's parts, never in the contents."""
        text, spans = chat.text, chat.spans or []
        for token in self._specials.values() if chat.spans is None else ():
            if any(token.lower() in content.lower() for content in chat.contents):
                raise GriffinError(
                    f"a message contains {token!r}, and this chat template rewrites contents, so that it could become "
                    "a control token; remove it from the message"
                )
        found = [match.span() for match in self._special_pattern.finditer(text)]
        if not any(start < high and low < end for low, high in found for start, end in spans):
            return self._ids(text, special=True)
        ids: list[int] = []
        at = 0
        for start, end in spans:
            ids += self._ids(text[at:start], special=True) + self._ids(text[start:end], special=False)
            at = end
        return ids + self._ids(text[at:], special=True)


@dataclass(frozen=True)
class _Piece:
    text: str
    special: bool  # control tokens count in it
    answers: bool  # it is an answer, or the token that ends one


def _pieces(
    chat: Sequence[Mapping[str, str]], rendered: Rendered, special: re.Pattern[str], stops: re.Pattern[str]
) -> list[_Piece]:
    """Cut a rendered chat at its answers, and around contents that hold the text of a control token."""
    text, spans = rendered.text, rendered.spans or []
    roles = [message["role"] for message in chat if message["content"].strip()]
    pieces: list[_Piece] = []
    at = 0
    for number, ((start, end), role) in enumerate(zip(spans, roles, strict=True)):
        answers = role in ("assistant", "model")
        if not answers and special.search(text, start, end) is None:
            continue
        pieces += [_Piece(text[at:start], True, False), _Piece(text[start:end], False, answers)]
        at = end
        following = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        if answers and (found := stops.search(text, end, following)):
            pieces.append(_Piece(text[end : found.end()], True, True))
            at = found.end()
    return [*pieces, _Piece(text[at:], True, False)]


def _make_special(backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    added = backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    missing = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in special]
    if missing:
        backend.add_special_tokens(missing)


def _plain_twin(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer for the same vocabulary that reads special tokens as text.

    `encode_special_tokens` is a switch on the whole object: two objects are safe where threads share a tokenizer.
    """
    twin = tokenizers.Tokenizer(backend.model)  # shared, not copied
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(twin, part, value)
    added = backend.get_added_tokens_decoder()
    for special, group in groupby((added[index] for index in sorted(added)), key=lambda token: token.special):
        (twin.add_special_tokens if special else twin.add_tokens)(list(group))
    if twin.get_added_tokens_decoder().keys() != added.keys():  # ids with gaps: only the whole file says where
        twin = tokenizers.Tokenizer.from_str(backend.to_str())
    twin.encode_special_tokens = True
    return twin
