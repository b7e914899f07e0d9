"""Whose mistake an error is: what a file, a flag or the machine caused takes one line, ours keeps its traceback."""

from __future__ import annotations

import errno
import re

from griffin.errors import is_panic, one_line, printable

# PyTorch says these with a bare RuntimeError, as it says our mistakes: known by what its allocators write, only.
_ALLOCATION = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed|"
    r"numel: integer multiplication overflow|Trying to create tensor with negative dimension|invalid array size"
)
_BYTES = re.compile(r"tried to allocate (\d+) bytes")


def explain(error: BaseException) -> str | None:
    """Say in one line what went wrong and what to do; None for a mistake of ours, whose traceback is what we need.

    - ValueError (GriffinError is one), OSError, ImportError and a wrong use of the command line say it themselves.
    - MemoryError, and the RuntimeErrors of PyTorch's allocators: something was asked for that does not fit here.
    - RecursionError raised outside of this package: a parser was given a text nested too deeply. Within it: ours.
    - A panic of a library written in Rust (it is no Exception): it met an input that its authors did not think of.

    KeyError, TypeError, AttributeError, IndexError, AssertionError and all other RuntimeErrors are ours.
    """
    if hasattr(error, "format_message"):  # of the command line's library
        return printable(" ".join(error.format_message().split()))
    if is_panic(error):
        return f"a library gave up on this input: {one_line(error)}; use another copy, or a simpler one"
    if isinstance(error, MemoryError):
        return _memory("" if not str(error) else one_line(error))
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError | RecursionError):
        text = str(error)
        if not _ALLOCATION.search(text):
            return None
        asked = _BYTES.search(text)
        return _memory(f"{int(asked[1]) / 1e9:,.1f} GB were asked for at once" if asked else one_line(error)[:200])
    if isinstance(error, RecursionError):
        return None if _raised_in(error).partition(".")[0] == "griffin" else "the input is nested too deeply to be read"
    if isinstance(error, OSError) and error.errno == errno.EBADF and error.filename is None:
        return "standard input or output is closed; give it a file, or /dev/null"
    if isinstance(error, ValueError | OSError | ImportError):
        return one_line(error)
    return None


def _memory(what: str) -> str:
    return f"not enough memory{': ' if what else ''}{what}; ask for less: a smaller model, batch, chunk or dtype"


def _raised_in(error: BaseException) -> str:
    """The module whose code was running."""
    trace, name = error.__traceback__, ""
    while trace is not None:
        name, trace = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_next
    return name
