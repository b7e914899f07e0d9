"""SHA256SUMS: what a folder's files were when they were written, in the form of the tool `sha256sum`.

Disks, memory and copies flip bits that leave a file readable. `sha256sum -c SHA256SUMS` checks a folder without us, and
`sha256sum FILES > SHA256SUMS` vouches for it anew; other readers of model folders ignore the file. A file without a
line there is not vouched for, as in every folder that others made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from griffin.errors import GriffinError
from griffin.reading import check_regular, read_text

SUMS = "SHA256SUMS"
_BLOCK_BYTES = 2**20
MEND = f"use another copy, or remove its line from {SUMS} if you changed it"


def write_sums(folder: Path) -> None:
    """Vouch for every file that a folder holds now."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Read the sums by name; {} where the folder has none.

    Raises:
        GriffinError: a line is not a sum and the name of a file of this folder, or one name has two sums.
    """
    if not (folder / SUMS).exists():
        return {}
    sums: dict[str, str] = {}
    for number, line in enumerate(read_text(folder / SUMS).split("\n"), start=1):
        if not line:
            continue
        found = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\0]+)", line)
        if found is None or sums.get(found[2], found[1]) != found[1]:
            raise GriffinError(f"{folder / SUMS}, line {number}, is no sha256 and name; {_anew(folder)}")
        sums[found[2]] = found[1]
    return sums


def verify(folder: Path, names: Iterable[str], *, mend: str = MEND, given_up: Event | None = None) -> None:
    """Compare files with their sums, byte by byte; those that have none are passed over.

    Args:
        folder: of the files.
        names: which.
        mend: what to do about one that differs, the end of the message.
        given_up: ends it early.

    Raises:
        GriffinError: a file is missing or is not what it was.
    """
    sums = read_sums(folder)
    for name in names:
        if name not in sums:
            continue
        check_regular(folder / name, mend=mend)
        found = _sha256(folder / name, given_up)
        if found not in (sums[name], None):
            raise GriffinError(
                f"{folder / name} is damaged or was changed: its sha256 is {found[:12]}, "
                f"{SUMS} says {sums[name][:12]}; {mend}"
            )


@contextmanager
def verifying(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Verify files in a thread while the body reads them: raise as `verify` does when the body is done.

    What the body raises goes before: it says more of what is wrong than that something is.
    """
    given_up = Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(verify, folder, list(names), given_up=given_up)
        try:
            yield
            done.result()
        finally:
            given_up.set()


def _anew(folder: Path) -> str:
    return f"use another copy, or remove {SUMS} if {folder} is as it should be"


def _sha256(file: Path, given_up: Event | None = None) -> str | None:
    """Hash a file; None where that was given up."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(block):
            if given_up is not None and given_up.is_set():
                return None
            digest.update(block[:size])
    return digest.hexdigest()
