"""Reading files that others made: JSON, text and safetensors, bounded, and refused in one line that names the file."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from griffin.errors import GriffinError

MOST_TEXT_BYTES = 64 * 2**20  # of a JSON or text file; an index of 10,000 tensors has 1 MB
MOST_HEADER_BYTES = 8 * 2**20  # of a safetensors file: the names and shapes of 50,000 tensors
MOST_DEPTH = 100  # of JSON: what we read is three or four deep; deeper than Python's stack would end the process' work
ANOTHER_COPY = "it may be cut short, use another copy"


def read_json(file: str | Path, *, mend: str = ANOTHER_COPY) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        file: which; a link to a file is followed.
        mend: what the caller should do about a file that cannot be read, the end of every message.

    Raises:
        GriffinError: the file is missing, not a regular file, larger than 64 MiB, not UTF-8, or `parse_json` refuses
            its text, or what it holds is not an object.
    """
    value = parse_json(read_text(file, mend=mend), str(file), mend=mend)
    if not isinstance(value, dict):
        raise GriffinError(f"{file} holds a {type(value).__name__}, not a JSON object; {mend}")
    return value


def parse_json(text: str, where: str, *, mend: str = ANOTHER_COPY, constants: bool = True) -> Any:
    """Parse a JSON text: a line of a file, or a string within another file's metadata.

    Args:
        text: the text.
        where: the file, and place in it, for messages.
        mend: as for `read_json`.
        constants: whether NaN and Infinity, which are no JSON but in Python's, are numbers.

    Raises:
        GriffinError: it is not JSON, is nested more than 100 deep, has a number of more than 4,300 digits, half a
            surrogate pair, or an object that gives one key two values.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise _too_deep(where, mend) from None
    except ValueError as error:  # JSONDecodeError, an integer of too many digits, or a key given twice
        raise GriffinError(f"{where} is not JSON ({str(error).partition(';')[0]}); {mend}") from error
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            break
    else:
        raise _too_deep(where, mend)
    # Only an escape can bring half a pair into a string, which then can be neither printed nor written.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise GriffinError(f"{where} has half a surrogate pair, which is no character; {mend}") from error
    return value


def read_text(file: str | Path, *, mend: str = ANOTHER_COPY, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Read a text file in UTF-8, less the byte order mark it may begin with.

    Raises:
        GriffinError: the file is missing, not a regular file, larger than `most_bytes`, or not UTF-8.
    """
    check_regular(file, mend=mend)
    with open(file, "rb") as opened:
        data = opened.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise GriffinError(f"{file} is larger than {most_bytes:,} bytes, which no such file is; {mend}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GriffinError(f"{file}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; {mend}") from error


def check_regular(file: str | Path, *, mend: str = ANOTHER_COPY) -> int:
    """Give a file's size in bytes. A pipe would be waited for, and a device read without end.

    Raises:
        GriffinError: it does not exist, or is a folder, pipe, socket or device.
    """
    try:
        found = os.stat(file)
    except FileNotFoundError as error:
        raise GriffinError(f"{file} does not exist; {mend.removeprefix('it may be cut short, ')}") from error
    except OSError as error:  # no permission, a loop of links, too long a name
        raise GriffinError(f"{file} cannot be read ({error.strerror}); {mend}") from error
    except ValueError as error:  # a NUL in its name
        raise GriffinError(f"{str(file)!r} is not the name of a file ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        what = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise GriffinError(f"{file} is {what.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file; {mend}")
    return found.st_size


def open_tensors(file: str | Path, *, mend: str = ANOTHER_COPY, most_header: int = MOST_HEADER_BYTES) -> Any:
    """Open a safetensors file (safe_open) whose header is of a size that can be.

    The library checks that names, shapes and bytes fit; it reads a header of up to 100 MB and a million names first.

    Raises:
        GriffinError: the file is missing, not a regular file, or not whole safetensors.
    """
    from safetensors import SafetensorError, safe_open  # imports torch, which --help need not wait for

    size = check_regular(file, mend=mend)
    try:
        with open(file, "rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if most_header < header <= size:  # a longer one than the file is no header; the library says so
            raise GriffinError(f"{file} has a header of {header:,} bytes, more than {most_header:,}; {mend}")
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise GriffinError(f"{file} cannot be read ({error}); {mend}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if made[key] != value:
                raise ValueError(f"the key {key!r} has two values")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep(where: str, mend: str) -> GriffinError:
    return GriffinError(f"{where} is not JSON that is read here: nested more than {MOST_DEPTH} deep; {mend}")
