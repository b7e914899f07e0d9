"""Standard input and output as every command finds them: there, and able to take any text."""

from __future__ import annotations

import os
import re
import sys

from griffin.errors import GriffinError


def prepare() -> None:
    """Make the three standard streams safe to use.

    - A closed one (`>&-`) would give its number to the next file opened, which a stray print would then write into. It
      becomes /dev/null the wrong way round, so that using it is an error, as in the GNU tools. Closed stderr is
      /dev/null the right way: an error has nowhere else to go.
    - A character that the encoding of stdout has not (U+FFFD in cp1252) is written as its escape instead of ending the
      command in mid-text.
    - Bytes of stdin that are no text become lone surrogates, which whoever reads it refuses by name, instead of an
      error that loses what was read with them. A byte order mark is no text.
    - ASCII is a locale that was not set: UTF-8, of which it is a part, is meant.
    """
    for number, name, flags, mode in (
        (0, "stdin", os.O_WRONLY, "r"),
        (1, "stdout", os.O_RDONLY, "w"),
        (2, "stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                opened = os.open(os.devnull, flags)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (lives on)
        _encode(name)


def let_go() -> None:
    """Drop text that stdout does not take, or Python would try again at the end and say so in its own way."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_text(text: str, where: str) -> None:
    """Refuse what came in as bytes that are no text.

    Raises:
        GriffinError: there is a byte that is not UTF-8, or not of the encoding that the locale names.
    """
    if found := re.search("[\udc80-\udcff]", text):
        raise GriffinError(
            f"{where}: character {found.start()} is the byte 0x{ord(found[0]) - 0xDC00:02x}, which is not UTF-8; "
            "convert the text, for example with iconv"
        )


def _encode(name: str) -> None:
    stream = getattr(sys, name)
    if not hasattr(stream, "reconfigure"):  # not of a process of its own
        return
    encoding = stream.encoding.lower().replace("_", "-")
    encoding = "utf-8" if encoding in ("ascii", "us-ascii", "ansi-x3.4-1968", "646") else encoding
    if name == "stdin":
        stream.reconfigure(encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="surrogateescape")
    else:
        stream.reconfigure(encoding=encoding, errors="backslashreplace")
