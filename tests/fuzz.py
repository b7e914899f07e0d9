"""Damage for the tests of readers: bits flipped, bytes cut, inserted, doubled and put at random.

A reader's test is one call of `attack`. By default it runs for a few seconds; `FUZZ_SECONDS=600 pytest -m slow -k fuzz`
runs each for ten minutes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

INTERESTING = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"[" * 2000,
    b"]",
    b"\\ud800",
    b"-",
    b"9" * 5000,
    b"1e999",
)


def mutations(data: bytes, randomly: random.Random) -> bytes:
    """Give one damaged copy of `data`, mostly near to it: most readers' mistakes are behind their first checks."""
    at = randomly.randrange(len(data)) if data else 0
    length = min(len(data) - at, randomly.choice((1, 2, 8, 64, 4096)))
    match randomly.randrange(8):
        case 0 | 1 | 2 if data:  # what disks and memory do
            return data[:at] + bytes([data[at] ^ (1 << randomly.randrange(8))]) + data[at + 1 :]
        case 3:
            return data[:at]
        case 4:
            return data[:at] + data[at + length :]
        case 5:
            return data[:at] + randomly.choice(INTERESTING) + data[at:]
        case 6:
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        case _:
            return data[:at] + randomly.randbytes(length) + data[at + length :]


def attack(
    files: Iterable[Path],
    read: Callable[[], Any],
    same: Callable[[Any], bool],
    *,
    seconds: float = 4.0,
    seed: int | None = None,
) -> dict[str, int]:
    """Damage one file after the other, read, and demand the identical values or one line that says why not.

    Args:
        files: damaged one at a time, and put back after each reading.
        read: called after each damage; may raise ValueError (GriffinError is one) or OSError, in one line.
        same: whether what it returned is what the whole files give.
        seconds: how long; the environment's FUZZ_SECONDS goes before.
        seed: of the damage; None draws one. A failure's message has it.

    Returns:
        How many readings were refused, and how many gave the same.

    Raises:
        AssertionError: another exception, more than one line, or other values without a word. The message has the file,
            and the damaged bytes are left in FILE.damaged.
    """
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    randomly = random.Random(seed)
    whole = {file: file.read_bytes() for file in files}
    assert same(read()), "the undamaged files are not read as themselves"
    counts = {"refused": 0, "same": 0}
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", seconds))
    while time.monotonic() < end:
        file = randomly.choice(sorted(whole))
        damaged = mutations(whole[file], randomly)
        file.write_bytes(damaged)
        try:
            problem = None if same(read()) else "is read as something else without a word"
            counts["same"] += problem is None
        except (ValueError, OSError) as error:
            line = str(error)
            problem = None if len(line.splitlines()) == 1 and len(line) < 2000 else f"is refused in many words: {line}"
            counts["refused"] += problem is None
        except BaseException as error:  # a PanicException is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            problem = f"raises {type(error).__name__}: {error}"
        finally:
            file.write_bytes(whole[file])
        if problem is not None:
            file.with_name(file.name + ".damaged").write_bytes(damaged)
            raise AssertionError(f"seed {seed}: {file.name}, damaged, {problem}")
    return counts
