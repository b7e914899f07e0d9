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
from functools import cached_property
from itertools import groupby
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from griffin import chat_template
from griffin.bpe import learn_bpe
from griffin.errors import GriffinError
from griffin.files import whole_file
from griffin.token_text import TextStream as TextStream
from griffin.token_text import TextTable, byte_letters, piece_decoder

# Tokens that end a turn without being the vocabulary's eos: Gemma's, ChatML's, Llama 3's.
TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")

TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")  # always control tokens where the vocabulary has them
TRAINED_SPECIALS = ("<pad>", "<eos>", "<bos>", *TURN_TOKENS)


class Tokenizer:
    """A vocabulary, its special tokens and its chat template.

    Args:
        backend: byte-level BPE, or BPE with byte fallback (SentencePiece style). Special tokens named below are made
            special in it. It must not be changed afterwards.
        bos, eos, pad: the tokens' strings; None where there is none.
        chat_template: a Jinja template as Hugging Face folders have them.
        stop_ids: further ids that end generation; eos and the usual ends of a turn are found without being named.

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
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.chat_template = chat_template
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
        if bos is not None and self.bos_id is not None:  # only for those who open the saved file with other software
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, self.bos_id)]
            )
        self._plain = _plain_twin(backend)
        unknown = getattr(backend.model, "unk_token", None)
        self._control = frozenset(index for index, text in self._specials.items() if text != unknown)

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included: the largest id + 1."""
        return max(self._text) + 1

    @cached_property
    def _text(self) -> TextTable:
        added = self.backend.get_added_tokens_decoder()
        text = {index: self._to_bytes(piece, index in added) for piece, index in self.backend.get_vocab().items()}
        return {**text, **dict.fromkeys(self._specials, b"")}  # special tokens stand for no text

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Return the ids of `text`.

        Args:
            bos: begin with `bos_id`, once, where the vocabulary has one.
            special: read "<end_of_turn>" and the like in `text` as control tokens; otherwise they are ordinary text.

        Raises:
            GriffinError: `text` holds a lone surrogate, which no UTF-8 has.
        """
        ids = self._ids(text, special)
        return self._with_bos(ids) if bos else ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = True) -> list[list[int]]:
        """Return `encode` of each text, computed in parallel."""
        try:
            batch = [each.ids for each in self.encodings(texts)]
        except TypeError:
            batch = [self._ids(text, False) for text in texts]  # which says what is wrong with which text
        return [self._with_bos(ids) for ids in batch] if bos else batch

    def encodings(self, texts: Sequence[str], *, offsets: bool = False) -> list[tokenizers.Encoding]:
        """Return the backend's own `Encoding` of each text, without BOS: the ids, and which word each is a part of.

        Args:
            texts: without lone surrogates.
            offsets: also which characters each token stands for; that takes twice as long.
        """
        encode = self._plain.encode_batch if offsets else self._plain.encode_batch_fast
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

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Render the chat template over `messages` and return the ids, with exactly one BOS at the front.

        No content produces a control token: where one holds a special token's text, template and contents are encoded
        apart. Everywhere else the ids are those of Hugging Face's `apply_chat_template`.

        Args:
            messages: {"role": ..., "content": ...}; "model" is taken as "assistant".
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            GriffinError: there is no chat template, it fails or refuses the messages, or a message is malformed.
        """
        return self._with_bos(
            self._encode_rendered(*self._render(chat_template.checked(messages), add_generation_prompt))
        )

    def encode_chat_turn(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids that continue a conversation whose past has been read or generated already.

        They follow the last assistant message's content and begin with what ends it (Gemma: "<end_of_turn>\\n"), so
        the stop token that ended generation must not have been read. Before any answer, equal to `encode_chat`.

        Raises:
            GriffinError: as `encode_chat`; or the last message is the assistant's; or the template does not keep the
                past as it was, so that this cannot work.
        """
        messages = chat_template.checked(messages)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return self.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        last = answers[-1]
        if last == len(messages) - 1:
            raise GriffinError(f"message {last} of {len(messages)} is the assistant's; end with a user message")
        sentinel = (
            chat_template.unused_mark([self.chat_template or "", *(message["content"] for message in messages)])
            + "\ufdd4"
        )
        replaced = [*messages[:last], {"role": "assistant", "content": sentinel}, *messages[last + 1 :]]
        text, spans = self._render(replaced, add_generation_prompt)
        if (count := text.count(sentinel)) != 1:
            raise GriffinError(
                f"the chat template writes the last answer {count} times instead of once; "
                "send the whole conversation with encode_chat"
            )
        before, tail = text.split(sentinel)
        if before != self._render(messages[:last], True)[0]:
            raise GriffinError(
                "the chat template writes earlier turns differently once they are answered; "
                "send the whole conversation with encode_chat"
            )
        cut = len(before) + len(sentinel)
        return self._encode_rendered(tail, [(start - cut, end - cut) for start, end in spans if start >= cut])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers' AutoTokenizer open.

        `stop_ids` that come from elsewhere than eos and the ends of a turn belong to generation_config.json, which
        the model's folder has.
        """
        folder = Path(folder)
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: token for name, token in self._names.items() if token is not None},
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
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
        rules = [{key: content[key] for key in keys}, self.bos_id, self.eos_id, self.pad_id]
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

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None:
            return ids
        first = next((at for at, index in enumerate(ids) if index != self.bos_id), len(ids))
        return [self.bos_id, *ids[first:]]

    def _ids(self, text: str, special: bool) -> list[int]:
        try:
            ids = (self.backend if special else self._plain).encode(text, add_special_tokens=False).ids
        except TypeError:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise GriffinError(
                    f"the text has a lone surrogate {text[error.start]!a} at character {error.start}; "
                    "read it with errors='replace'"
                ) from None
            raise
        if not special:
            self._refuse_control(ids)
        return list(ids)

    def _refuse_control(self, ids: list[int]) -> None:
        # Our vocabularies cannot get here. Some others hold a control token's text as an ordinary piece as well.
        if not self._control.isdisjoint(ids):
            token = next(self._specials[index] for index in ids if index in self._control)
            raise GriffinError(f"this vocabulary cannot write {token!r} as ordinary text; remove it from the text")

    def _render(
        self, messages: Sequence[chat_template.Message], add_generation_prompt: bool
    ) -> tuple[str, list[chat_template.Span]]:
        """Return the rendered chat and where its contents lie; nowhere, where that cannot matter."""
        if self.chat_template is None:
            raise GriffinError(
                "this tokenizer has no chat template: use a model made for chat, put a chat_template.jinja into its "
                "folder, or encode the text yourself"
            )
        specials = {name: token for name, token in self._names.items() if token is not None}
        text, spans = chat_template.render_marked(self.chat_template, messages, add_generation_prompt, specials)
        for token in self._specials.values() if spans is None else ():
            if any(token.lower() in message["content"].lower() for message in messages):
                raise GriffinError(
                    f"a message contains {token!r}, and this chat template rewrites contents, so that it could become "
                    "a control token; remove it from the message"
                )
        return text, spans or []

    def _encode_rendered(self, text: str, spans: list[chat_template.Span]) -> list[int]:
        """Encode a rendered chat: special tokens count in the template's parts, never in the contents."""
        pattern = "|".join(re.escape(token) for token in sorted(self._specials.values(), key=len, reverse=True))
        found = [match.span() for match in re.finditer(pattern, text)] if pattern else []
        if not any(start < high and low < end for low, high in found for start, end in spans):
            return self._ids(text, special=True)
        ids: list[int] = []
        at = 0
        for start, end in spans:
            ids += self._ids(text[at:start], special=True) + self._ids(text[start:end], special=False)
            at = end
        return ids + self._ids(text[at:], special=True)


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
