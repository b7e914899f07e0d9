"""Encoding in windows: the ids of the whole, whatever the vocabulary, the text, and where it is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from griffin.data import encode
from griffin.data.encode import encode_documents
from griffin.data.text import Part
from griffin.tokenizer import Tokenizer, bpe, load_tokenizer
from griffin.tokenizer.token_text import byte_letters
from tests.tokenizer.test_tokenizer import SENTENCES, sentencepiece_model

RUNS = (
    "hello world, it's {}% of 12345 things\n",
    "word ",
    "\n\n",
    "\r\n",
    "  \n \n",
    "don't 'll 've ",
    "1234567890",
    "1",
    "1111111199",
    " ",
    "\t",
    "ab",
    "aaaa",
    "ACGT",
    "=",
    "-- ",
    "\0",
    "é",
    "e\u0301",
    "字",
    "，字字",
    "😀",
    "▁",
    "<bos>",
    "<table>",
)


def awkward_text(seed: int, size: int) -> str:
    """Runs of all lengths, many longer than an overlap or a window."""
    randomly = random.Random(seed)
    text = ""
    while len(text) < size:
        run = randomly.choice(RUNS)
        if randomly.random() < 0.5:
            run = "".join(randomly.choices(RUNS, k=5))
        text += run * int(2 ** randomly.uniform(0, randomly.choice((1, 3, 9))))
    return text[:size]


TEXTS = [*SENTENCES * 3, *(awkward_text(seed, 3000) for seed in range(100, 110))]


def byte_level(pre: pre_tokenizers.PreTokenizer | None, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = letters if pre is None else pre_tokenizers.Sequence([pre, letters])
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=byte_letters(), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend)


def two_nines() -> Tokenizer:
    """Digits by three, of which "99" alone is a token: where a run of them began decides, however far away."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: at for at, letter in enumerate([*byte_letters(), "99"])}, merges=[("9", "9")])
    )
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), letters])
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    folder = tmp_path_factory.mktemp("models")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def piece(name: str, **options: object) -> Tokenizer:
        return load_tokenizer(sentencepiece_model(folder / f"{name}.model", **options))

    made: dict[str, Callable[[], Tokenizer]] = {
        "bytes": Tokenizer.bytes,
        "ours": lambda: Tokenizer.train(TEXTS, 400),
        "gpt2": lambda: byte_level(split(gpt2)),
        "digits by three": two_nines,
        "no words": lambda: byte_level(None),
        "composed": lambda: byte_level(split(gpt2), normalizers.NFC()),
        "sentencepiece": lambda: piece("plain"),
        "sentencepiece, merges over spaces": lambda: piece("over", split_by_whitespace=False),
        "sentencepiece, a space before": lambda: piece("before", add_dummy_prefix=True, user_defined_symbols=[]),
        "sentencepiece, unknown letters": lambda: piece("unknown", byte_fallback=False),
    }
    cache: dict[str, Tokenizer] = {}
    return lambda kind: cache.setdefault(kind, made[kind]()) if kind not in cache else cache[kind]


NINES = "1" * 998 + "99"
KINDS = [
    "bytes",
    "ours",
    "gpt2",
    "digits by three",
    "no words",
    "composed",
    "sentencepiece",
    "sentencepiece, merges over spaces",
    "sentencepiece, a space before",
    "sentencepiece, unknown letters",
]


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """The definition: BOS, the ids of the whole text, EOS."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return begin + tokenizer.encode(text, bos=False) + end


def cut_anywhere(document: int, text: str, randomly: random.Random) -> Iterator[Part]:
    while text:
        size = randomly.choice((1, 7, 100, 1000, 5000))
        yield Part(document, text[:size])
        text = text[size:]


def encoded(tokenizer: Tokenizer, parts: Iterable[Part]) -> tuple[dict[int, list[int]], dict[int, int]]:
    ids: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for document, piece, num_bytes in encode_documents(tokenizer, parts):
        ids.setdefault(document, []).extend(piece.tolist())
        sizes[document] = sizes.get(document, 0) + num_bytes
    return ids, sizes


@pytest.mark.parametrize("kind", KINDS)
def test_windows_give_the_ids_of_the_whole(
    kind: str, tokenizer_of: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "WINDOW_CHARS", 512)
    monkeypatch.setattr(encode, "OVERLAP_CHARS", 128)
    monkeypatch.setattr(encode, "BATCH_CHARS", 2000)
    tokenizer = tokenizer_of(kind)
    randomly = random.Random(1)
    texts = [awkward_text(seed, randomly.choice((1, 300, 512, 513, 900, 6000))) for seed in range(60)]
    parts = (part for number, text in enumerate(texts) for part in cut_anywhere(number, text, randomly))
    ids, sizes = encoded(tokenizer, parts)
    for number, text in enumerate(texts):
        assert ids[number] == whole(tokenizer, text), (number, text)
        assert sizes[number] == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["a", "1", NINES, " ", "\n", "\0", "ab", "ACGT", "12 ", "=", "é", "字", "word ", "x\n\n"]
)
def test_one_run_of_many_windows(kind: str, text: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    """As windows are in use: no line, no word to cut at."""
    tokenizer = tokenizer_of(kind)
    text = "so: " + text * (100_001 // len(text))
    assert encoded(tokenizer, [Part(0, text)])[0][0] == whole(tokenizer, text)


def test_a_long_run_keeps_no_more_than_its_windows(
    tokenizer_of: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where windows are joined as one, memory grows: not for the vocabularies and the runs that people have."""
    for kind in set(KINDS) - {"sentencepiece, a space before"}:
        tokenizer = tokenizer_of(kind)
        lengths: list[int] = []
        encodings = tokenizer.encodings

        def spy(texts: list[str], *, offsets: bool = False, encodings=encodings, lengths=lengths):  # type: ignore[no-untyped-def]
            lengths.extend(map(len, texts))
            return encodings(texts, offsets=offsets)

        monkeypatch.setattr(tokenizer, "encodings", spy)
        for run in ("a", "1", " ", "\n", "ab", "ACGT", "=", "word "):
            list(encode_documents(tokenizer, [Part(0, "so: " + run * (200_000 // len(run)))]))
        assert max(lengths) <= encode.WINDOW_CHARS + encode.OVERLAP_CHARS, kind
        monkeypatch.undo()


def capped_words(texts: Iterable[str]) -> list[str]:
    """What a vocabulary is learnt from: the words of SPLIT, long ones in parts."""
    cap = split(rf"[\s\S]{{1,{bpe.LONGEST_WORD}}}")
    splitter = pre_tokenizers.Sequence([split(bpe.SPLIT), cap])
    return [word for text in texts for word, _ in splitter.pre_tokenize_str(text)]


@settings(deadline=None, max_examples=300)
@given(st.text("ab1 ,.'’s-\n\r\té字，\u0301\0_", max_size=120), st.integers(1, 30))
def test_pieces_have_the_words_of_the_whole(text: str, size: int) -> None:
    """Two hypotheses in one: pieces join to the text, and where a piece ends by the rule, it ends between words."""
    found = list(bpe.pieces([text], size))
    assert "".join(found) == text
    assert list(bpe.pieces(list(text), size)) == found
    assert max(map(len, found), default=0) <= size
    start = 0
    for piece in found:
        end = start + len(piece)
        rest = text[start : start + size + 1]
        if end < len(text) and bpe.sure_break(rest, 0, size):  # not one that is cut because it is full
            assert capped_words([text[:end]]) + capped_words([text[end:]]) == capped_words([text])
        start = end


def test_learning_in_pieces_is_learning_from_the_whole() -> None:
    text = "\n\n".join(awkward_text(seed, 400) + " and, then\n\n" for seed in range(200))
    in_pieces = Tokenizer.train(bpe.pieces([text], 2000), 400)
    assert capped_words(bpe.pieces([text], 2000)) == capped_words([text])
    assert in_pieces.fingerprint() == Tokenizer.train([text], 400).fingerprint()


def test_batches_are_small_whatever_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory: no call of the backend sees more than a batch and its overlaps, and no piece of ids is longer."""
    tokenizer = Tokenizer.bytes()
    seen: list[int] = []
    encodings = tokenizer.encodings

    def spy(texts: list[str], *, offsets: bool = False) -> list[tokenizers.Encoding]:
        seen.append(sum(map(len, texts)))
        return encodings(texts, offsets=offsets)

    monkeypatch.setattr(tokenizer, "encodings", spy)
    pieces = list(encode_documents(tokenizer, [Part(0, "to be or not to be " * 300_000)]))
    assert max(seen) <= 1.1 * (encode.BATCH_CHARS + encode.WINDOW_CHARS)
    assert max(piece.ids.size for piece in pieces) <= encode.WINDOW_CHARS + 2
    assert np.concatenate([piece.ids for piece in pieces]).size == 2 + 19 * 300_000
