"""Learning a byte-level BPE: where text is cut into words, and which pieces of a text are learnt from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Event, Thread

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from griffin.errors import GriffinError
from griffin.tokenizer.token_text import byte_letters

# Words with the one sign before them, numbers by up to three digits, punctuation, line breaks, other blanks. Whatever
# no branch takes stays as it is, so nothing is lost.
SPLIT = (
    r"['’](?i:[sdmt]|ll|ve|re)(?!\p{L})|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MOST_IDS = 2**20  # four times the largest vocabularies in use; the trainer allocates for all of them at once
# A longer word is learnt from in parts: each merge goes through whole words, so that one word of a million letters
# would take hours.
LONGEST_WORD = 240
PIECE_CHARS = 1 << 14

# Where SPLIT cuts whatever stands around, and both sides are cut as if they stood alone: between a letter or digit and
# an ASCII or CJK sign or blank, which only ever begins a word; after a line break that no blank follows.
_BREAK = re.compile(
    r"(?s).*(?:(?<=[^\W_])(?=[\0-/:-@\[-`{-\x7f\u2010-\u2027\u3001-\u3003\u3008-\u3011\uff01-\uff0f])|(?<=\n)(?=\S))"
)


def learn_bpe(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str], *, show_progress: bool = False
) -> tokenizers.Tokenizer:
    """Return a byte-level BPE: `specials`, the 256 bytes, then merges, the most frequent pair first.

    Each different word of `texts` is kept until the end, once. Ctrl-C is heard at once.

    Args:
        texts: documents, or `pieces` of them; read in another thread.
        vocab_size: ids; fewer come out where too few pairs occur twice.
        specials: control tokens.
        show_progress: show the library's own bars.

    Raises:
        GriffinError: `check_size` refuses vocab_size.
    """
    check_size(vocab_size, len(specials))
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    parts = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, parts, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(specials),
        initial_alphabet=byte_letters(),
        show_progress=show_progress,
    )
    _interruptible(lambda stopped: backend.train_from_iterator(_until(stopped, texts), trainer))
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    return backend


def check_size(vocab_size: int, num_specials: int) -> None:
    """Refuse a size that no vocabulary can have.

    Raises:
        GriffinError: there is no room for the bytes and the special tokens, or more than MOST_IDS are asked for.
    """
    least = 256 + num_specials
    if vocab_size < least:
        raise GriffinError(
            f"vocabulary size {vocab_size} is too small: 256 bytes and {num_specials} special tokens "
            f"need {least}; ask for {least} or more"
        )
    if vocab_size > MOST_IDS:
        raise GriffinError(f"vocabulary size {vocab_size} is too large; ask for {MOST_IDS} or fewer")


def pieces(parts: Iterable[str], size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a document into pieces that have the same words as the whole.

    A piece ends at the last place where SPLIT is sure to cut. Only where `size` characters have none, as in a word that
    is learnt from in parts anyway, it ends wherever it is full.

    Args:
        parts: the document's text, cut anywhere: the pieces are the same.
        size: the most characters of a piece.
    """
    text = ""
    for part in parts:
        text += part
        at = 0
        while len(text) - at > size:  # the character behind a piece decides, too
            end = sure_break(text, at, at + size) or at + size
            yield text[at:end]
            at = end
        text = text[at:]
    if text:
        yield text


def sure_break(text: str, start: int, end: int) -> int | None:
    """Return the last place after `start`, up to `end` < len(text), where SPLIT cuts whatever stands around."""
    found = _BREAK.match(text, start + 1, end + 1)
    return found.end() if found else None


def _until(stopped: Event, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if stopped.is_set():
            raise InterruptedError
        yield text


def _interruptible(work: Callable[[Event], None]) -> None:
    """Run what hears no signals in a thread, and raise here what it raises; its argument is set once it should end."""
    stopped, finished = Event(), Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(stopped)
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    Thread(target=run, daemon=True).start()
    try:
        while not finished.wait(0.2):  # without a time Windows hears nothing meanwhile
            pass
    except BaseException:
        stopped.set()
        finished.wait(1.0)  # it ends soon while it reads; while it merges it is left alone
        raise
    if errors:
        raise errors[0]
