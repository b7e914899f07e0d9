"""Turn a file of `torch.save` into safetensors, in a process of its own.

A pickle is a program. `weights_only=True` refuses all but tensors and plain containers, and should it fail to, or the
file crash or exhaust the reader, it is this process that is lost: `griffin.convert` starts it and reads only the
safetensors that it leaves. It imports nothing of griffin. Usage: python child.py SOURCE FOLDER, with a pipe as stdin
that its parent keeps open: when it closes, the parent is gone, however it ended, and so are this process and FOLDER.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MOST_TENSORS = 200_000  # of 10,000 layers
PART_BYTES = 1 << 30  # safetensors holds a file's bytes in memory while it writes it
WRAPPERS = ("model_state_dict", "state_dict", "model", "params")  # what people name the weights beside other things


def weights(loaded: Any, file_bytes: int) -> dict[str, Tensor]:
    """Find the one flat dictionary of tensors in what a file holds; ValueError says why there is none."""
    for name in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"it holds a {type(loaded).__name__}, not names and tensors")
    if len(loaded) > MOST_TENSORS:
        raise ValueError(f"it holds {len(loaded)} tensors, more than {MOST_TENSORS}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its entry {name!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise ValueError(f"its entry {name!r} is not a plain dense tensor")
    # A few bytes can claim to be a tensor of any size (stride 0); tied weights may count a tensor twice.
    if (claimed := sum(value.nbytes for value in loaded.values())) > 2 * file_bytes:
        raise ValueError(f"its tensors claim {claimed} bytes and the file has {file_bytes}")
    return dict(loaded)


def write_parts(tensors: dict[str, Tensor], folder: Path) -> None:
    part: dict[str, Tensor] = {}
    number = part_bytes = 0
    for index, (name, value) in enumerate(tensors.items(), start=1):
        part[name] = value.detach().clone(memory_format=torch.contiguous_format)
        part_bytes += value.nbytes
        if index == len(tensors) or part_bytes >= PART_BYTES:
            save_file(part, folder / f"part-{number:05d}.safetensors")
            part, number, part_bytes = {}, number + 1, 0


def reason(error: Exception) -> str:
    """Say in one line why a file was refused; torch's own message advises to switch the protection off."""
    text = str(error)
    if found := re.search(r"GLOBAL:? (\S+)", text):
        return f"it asks to run {found[1]}, which weights have no need of; save the state_dict alone"
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith("Weights only load failed"):
        return "it is not a file of weights, or it is damaged"
    return lines[0] if lines else type(error).__name__


def end_with_parent(folder: str) -> None:
    """Wait for the end of stdin, then leave nothing behind. It never comes while the parent lives."""
    while os.read(0, 1):  # not sys.stdin, whose lock Python takes when it ends
        pass
    for _ in range(100):  # the other thread may be making a file
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
    os._exit(1)


def main(source: str, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes to both; the parent decides
    threading.Thread(target=end_with_parent, args=(folder,), daemon=True).start()
    try:
        # mmap: the tensors are read while they are written, one by one. Only the zip format, torch's since 1.6, can.
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
        write_parts(weights(loaded, Path(source).stat().st_size), Path(folder))
    except Exception as error:
        sys.exit(reason(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
