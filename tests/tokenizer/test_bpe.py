"""Learning a vocabulary: any text in time that grows with it, sizes that can be, and Ctrl-C at any moment."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from threading import Event, Thread

import pytest

from griffin.errors import GriffinError
from griffin.tokenizer import Tokenizer
from griffin.tokenizer.bpe import LONGEST_WORD, MOST_IDS, _interruptible


@pytest.mark.parametrize("run", ["\0", " ", "ab", "the", "\n"])
def test_one_long_word_is_learnt_from_in_parts(run: str) -> None:
    """Merges went through the whole word, once each: minutes for 300,000 NULs."""
    tokenizer = Tokenizer.train([run * (300_000 // len(run))], 1000)
    longest = max(len(tokenizer.decode([index])) for index in range(tokenizer.vocab_size))
    assert LONGEST_WORD // 2 <= longest <= LONGEST_WORD
    text = "so " + run * 1000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_letters_without_a_word_are_learnt_from_in_time() -> None:
    text = "".join(random.Random(0).choices("ACGT", k=200_000))
    tokenizer = Tokenizer.train([text], 600)
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.encode(text)) < len(text) / 3


@pytest.mark.parametrize("size", [MOST_IDS + 1, 1099511627776, 2**70])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(GriffinError, match=f"vocabulary size {size} is too large; ask for 1048576 or fewer"):
        Tokenizer.train(["some text"], size)


def interrupted(work: Callable[[], object]) -> float:
    """Press Ctrl-C half a second after the beginning; return the seconds until it was heard."""
    pressed = 0.0

    def press() -> None:
        nonlocal pressed
        time.sleep(0.5)
        pressed = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        work()
    return time.monotonic() - pressed


def test_ctrl_c_is_heard_while_text_is_read() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "to be or not to be, that is the question\n" * 300

    assert interrupted(lambda: Tokenizer.train(endless(), 300)) < 2.5


def test_ctrl_c_is_heard_while_the_library_hears_nothing() -> None:
    done = Event()
    assert interrupted(lambda: _interruptible(lambda stopped: done.wait(10))) < 2.5
    done.set()


def test_errors_of_the_texts_arrive() -> None:
    def broken() -> Iterator[str]:
        yield "some text"
        raise GriffinError("no more")

    with pytest.raises(GriffinError, match="no more"):
        Tokenizer.train(broken(), 300)
