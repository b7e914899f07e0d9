"""Files and folders that appear whole or not at all, and go whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from griffin.errors import GriffinError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it and rename it over `path`, on failure remove it.

    A reader, or a run killed at any moment, sees the old file or the new one and never a part. Where `path` is a link,
    the file it leads to is replaced; a file that was there keeps its permissions, a new one has those of the umask.

    Raises:
        GriffinError: `path` is a folder, a pipe or a device.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise GriffinError(f"{path} is no file that could be replaced; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        with _named(path, temporary):
            yield temporary
            temporary.chmod(mode)  # whoever wrote it may have made a file of its own: safetensors makes private ones
            _sync(temporary)
            temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success fsync its files and put it in place of `path`.

    Where `path` exists it is replaced, with all that it holds: renamed aside, then removed once the new one stands, or
    renamed back where that fails. A kill between the two renames leaves no `path`, but both whole folders beside it
    (`.NAME.*.old`, `.NAME.*.tmp`). Where `path` is a link, the folder it leads to is replaced. Permissions as for
    `whole_file`.

    Raises:
        GriffinError: `path` is a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise GriffinError(f"{path} is not a folder; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    aside = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        usual = temporary.stat().st_mode & 0o666
        with _named(path, temporary):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(usual)
                _sync(file)
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            _sync(temporary)
            if target.exists():
                target.rename(aside)
            temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder of ours. It loses its name first: a kill in between leaves no half of it under that name."""
    aside = _beside(path).with_suffix(".old")
    path.rename(aside)
    shutil.rmtree(aside)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        GriffinError: it cannot be written; a full disk is said by safetensors' own kind of error, which names no file.
    """
    from safetensors import SafetensorError  # these two import torch, which --help need not wait for
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        reason = re.sub(r' at path ".*"$', "", str(error))  # a temporary file of its own
        raise GriffinError(f"{path} cannot be written: {reason}; make room, or choose another place") from error


def _beside(target: Path) -> Path:
    # A name may have 255 bytes, this one too.
    return target.parent / f".{target.name[:40]}.{secrets.token_hex(4)}.tmp"


@contextmanager
def _named(path: str | Path, temporary: Path) -> Iterator[None]:
    """Let errors name the file that was asked for, not the temporary one."""
    try:
        yield
    except OSError as error:
        for attribute in ("filename", "filename2"):
            if isinstance(name := getattr(error, attribute), str | Path):
                setattr(error, attribute, str(name).replace(str(temporary), str(path)))
        raise
    except GriffinError as error:
        error.args = (str(error).replace(str(temporary), str(path)),)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
