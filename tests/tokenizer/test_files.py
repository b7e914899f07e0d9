from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from griffin.errors import GriffinError
from griffin.tokenizer import Tokenizer, load_tokenizer
from tests.fuzz import attack
from tests.tokenizer.test_tokenizer import SENTENCES, sentencepiece_model

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "hello"}]


def write_folder(folder: Path, post_processor: Any, **settings: Any) -> Path:
    """A model folder's tokenizer files as others write them: <eos> is 1, <bos> is 2."""
    tokenizer = Tokenizer.train(["hello world " * 50], 300, chat_template=CHATML)
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = post_processor
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("add_")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kept, **settings}))
    return folder


def template_of(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])


# Where texts begin and end


@pytest.mark.parametrize(
    ("post_processor", "begin", "end"),
    [
        (processors.ByteLevel(trim_offsets=False), (), ()),
        (template_of("<bos> $A"), (2,), ()),
        (template_of("$A <eos>"), (), (1,)),
        (template_of("<bos> $A <eos>"), (2,), (1,)),
        (processors.Sequence([processors.ByteLevel(), template_of("<bos> $A")]), (2,), ()),
        (processors.RobertaProcessing(("<eos>", 1), ("<bos>", 2)), (2,), (1,)),
    ],
)
@pytest.mark.parametrize("said", [True, False])
def test_texts_begin_and_end_as_in_transformers(
    tmp_path: Path, post_processor: Any, begin: tuple[int, ...], end: tuple[int, ...], said: bool
) -> None:
    flags = {"add_bos_token": bool(begin), "add_eos_token": bool(end)} if said else {}
    folder = write_folder(tmp_path / "theirs", post_processor, **flags)
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = theirs("hello")["input_ids"]
    assert tokenizer.encode("hello") == tokenizer.encode_batch(["hello"])[0] == ids
    assert ids == [*begin, *tokenizer.encode("hello", bos=False), *end]
    chat = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(MESSAGES) == chat
    tokenizer.save(tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("hello")["input_ids"] == again.encode("hello") == ids
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode_chat(MESSAGES) == chat


def test_what_tokenizer_config_says_counts_more(tmp_path: Path) -> None:
    for flags, ids in (((False, True), (1,)), ((True, False), (2,)), ((True, None), (2, 1)), ((None, False), ())):
        settings = {} if flags[0] is None else {"add_bos_token": flags[0]}
        settings |= {} if flags[1] is None else {"add_eos_token": flags[1]}
        tokenizer = load_tokenizer(write_folder(tmp_path, template_of("$A <eos>"), **settings))
        assert tokenizer.encode("") == list(ids)
        tokenizer.save(tmp_path / "ours")
        assert AutoTokenizer.from_pretrained(tmp_path / "ours")("")["input_ids"] == list(ids)


def test_a_vocabulary_in_other_hands_has_another_fingerprint() -> None:
    backend = Tokenizer.bytes().backend
    made = [Tokenizer(backend, bos="<bos>", eos="<eos>", **flags) for flags in ({}, {"add_bos": False})]
    made += [Tokenizer(backend, bos="<bos>", eos="<eos>", add_eos=True), Tokenizer(backend, eos="<eos>")]
    assert len({tokenizer.fingerprint() for tokenizer in made}) == 4
    assert made[0].encode("a", bos=False) == made[2].encode("a", bos=False) == [97]


def test_a_post_processor_that_says_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, processors.BertProcessing(("<eos>", 1), ("<pad>", 0)))
    with pytest.raises(
        GriffinError, match=r"tokenizer\.json puts \['<pad>'\] before and \['<eos>'\] behind every text"
    ):
        load_tokenizer(folder)
    write_folder(tmp_path, template_of("<bos> $A"), bos_token=None)
    with pytest.raises(GriffinError, match=r"puts \['<bos>'\] before.*bos_token is None"):
        load_tokenizer(folder)
    write_folder(tmp_path, template_of("<bos> $A"), add_bos_token="yes")
    with pytest.raises(GriffinError, match="add_bos_token is 'yes', add_eos_token None"):
        load_tokenizer(folder)


def test_a_sentencepiece_model_begins_with_bos_unless_told(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).encode("") == [2]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    assert load_tokenizer(tmp_path).encode("") == [1]


# Files that do harm


def replaced(content: str, pattern: Any = "a") -> normalizers.Replace:
    return normalizers.Replace(pattern, content)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "growth"),
    [
        (normalizers.Sequence([replaced("a" * 1000)] * 3), None, "1,000,000,000"),
        (normalizers.Sequence([normalizers.Sequence([replaced("aa")] * 5)] * 2), None, "1,024"),
        (normalizers.Sequence([replaced("a", Regex("(?=a)"))] * 40), None, "1,099,511,627,776"),
        (normalizers.Sequence([replaced("ab", "")] * 10), None, "1,024"),
        (normalizers.Sequence([normalizers.Prepend("a" * 2000)]), None, "2,000"),
        (normalizers.Sequence([normalizers.ByteLevel()] * 5), None, "1,024"),
        (None, pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 6), "4,096"),
    ],
)
def test_texts_that_grow_without_bound_are_refused(
    tmp_path: Path, normalizer: Any, pre_tokenizer: Any, growth: str
) -> None:
    backend = Tokenizer.bytes().backend
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(GriffinError, match=rf"tokenizer\.json: .* can make a text {growth} times as long"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_an_error(tmp_path: Path) -> None:
    backend = Tokenizer.bytes().backend
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "a" * 40 + "!"
    for encode in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode(text, special=True),
        lambda: tokenizer.encode_batch(["x", text]),
    ):
        with pytest.raises(GriffinError, match=r"this tokenizer fails on .* text \(.*retry-limit"):
            encode()
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    words.decoder = backend.decoder
    with pytest.raises(GriffinError, match=r"fails on the text \(WordLevel error: Missing"):
        Tokenizer(words).encode("b")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.json"]
)
@pytest.mark.parametrize("spoil", ["deep", "pipe", "folder"])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, name: str, spoil: str) -> None:
    Tokenizer.bytes().save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if spoil == "deep":
        (tmp_path / name).write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    elif spoil == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    says = {"deep": "nested more than", "pipe": "is a pipe", "folder": "is a folder"}[spoil]
    with pytest.raises(GriffinError, match=re.escape(name) + ".*" + says):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("named", ["[1]", '"x"', "7"])
def test_token_ids_that_are_no_table_are_named(tmp_path: Path, named: str) -> None:
    Tokenizer.bytes().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"added_tokens_decoder": {named}}}')
    with pytest.raises(GriffinError, match=r"added_tokens_decoder is .*, not an object"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("spoilt", ["tokenizer.json", "tokenizer.model", "settings"])
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path: Path, spoilt: str) -> None:
    if spoilt == "tokenizer.model":
        sentencepiece_model(tmp_path / spoilt)
    else:
        Tokenizer.train(["hello world " * 50], 300, chat_template=CHATML).save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<eos>"}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')

    def read() -> None:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("hello <eos> é"))
        tokenizer.encode_batch(["a", "b"])
        tokenizer.fingerprint()
        if tokenizer.chat_template is not None:
            tokenizer.encode_chat(MESSAGES)

    files = tmp_path.glob("*_*.json") if spoilt == "settings" else [tmp_path / spoilt]
    attack(files, read, lambda _: True, seconds=1.0)  # what another letter in a vocabulary means, nobody can tell


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    size, digits = len(value), []
    while not digits or size:
        digits.append(size & 0x7F | (0x80 if size > 0x7F else 0))
        size >>= 7
    return bytes([number << 3 | 2, *digits]) + value


@pytest.mark.parametrize("lengths", [range(1, 3001), [5_000_000]])
def test_pieces_of_pieces_do_not_take_up_all_memory(tmp_path: Path, lengths: Any) -> None:
    pieces = [field(1, field(1, b"a" * length) + b"\x15" + struct.pack("<f", -length)) for length in lengths]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(pieces) + field(2, field(3, 2)) + field(3, field(4, 0)))
    with pytest.raises(GriffinError, match=r"joining its pieces means to look at [\d,]+ characters"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_model_larger_than_any_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.model", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(GriffinError, match=r"tokenizer\.model is 1,099,511,627,776 bytes"):
        load_tokenizer(tmp_path)


# Text


def test_symbols_defined_with_spaces_are_never_found_as_in_sentencepiece(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "tokenizer.model", user_defined_symbols=["  ", "a b", "▁▁▁▁"])
    reference, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    for text in ("a  b", "a b", "  ", "    ", "a     b", *SENTENCES):
        assert tokenizer.encode(text, bos=False) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("make", [Tokenizer.bytes, lambda: Tokenizer.train(["ab " * 50], 270, chat_template=CHATML)])
def test_a_lone_surrogate_is_one_error_in_every_vocabulary(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for encode in (
        lambda: tokenizer.encode("a\ud83d"),
        lambda: tokenizer.encode("a\ud83d", special=True),
        lambda: tokenizer.encode_batch(["x", "a\ud83d"]),
    ):
        with pytest.raises(GriffinError, match=r"the text has a lone surrogate '\\ud83d' at character 1"):
            encode()
