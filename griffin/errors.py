"""The error a person can cause and mend, and how any text is made fit for a message."""

from __future__ import annotations

import re

# What a terminal obeys instead of showing: C0, DEL, C1, and what reverses the direction of the text around it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_MOST = 2000  # characters of a message: it may hold a value that somebody gave


class GriffinError(ValueError):
    """Something the caller can put right: the message names the thing, the numbers and the next step.

    The command line prints the message alone and exits with status 2.
    """


def printable(text: str) -> str:
    """Show control characters escaped (`\\x1b`), but for tabs and line feeds.

    Messages hold names that others chose: of files, keys and tensors. Those must not move the cursor, or set colours
    and titles.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException) -> str:
    """What an error says, printable, without line breaks and cut at 2,000 characters; its name, if it says nothing."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    text = printable(" ".join(text.split()))
    return (text if len(text) <= _MOST else f"{text[:_MOST]}…") or type(error).__name__


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up on its input. It is no Exception, and yet no interrupt."""
    return type(error).__module__ == "pyo3_runtime"
