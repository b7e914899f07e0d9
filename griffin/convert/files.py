"""Reading Google's checkpoints, a torch pickle or an orbax folder of Flax parameters, as plain named tensors.

Only safetensors and numbers ever enter this process: a pickle is opened by a child.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from griffin.errors import GriffinError


def read_google(path: str | Path, *, scratch: str | Path | None = None) -> dict[str, Tensor]:
    """Read either kind of Google's checkpoints: a folder is Flax, a file is torch. GriffinError as theirs."""
    path = Path(path)
    if (path / "config.json").is_file():
        raise GriffinError(f"{path} is already a model folder; there is nothing to convert")
    if path.is_dir() and (inside := sorted(path.glob("*.pt"))):
        raise GriffinError(f"{path} is a folder with a PyTorch checkpoint in it; give the file: {inside[0]}")
    if not path.exists():
        raise GriffinError(f"{path} does not exist")
    return read_flax_checkpoint(path) if path.is_dir() else read_torch_checkpoint(path, scratch=scratch)


def read_torch_checkpoint(path: str | Path, *, scratch: str | Path | None = None) -> dict[str, Tensor]:
    """Read the tensors of a `torch.save` file; no pickle is opened in this process.

    A child process reads it with `weights_only=True` and leaves safetensors in a temporary folder in `scratch` (None:
    the system's), which needs as much room as the file. A state_dict inside a dictionary with other entries is found
    under the usual names.

    Raises:
        GriffinError: the file is absent, damaged, asks to run code, or holds no state_dict; one line says which.
    """
    path = Path(path)
    if not path.is_file():
        raise GriffinError(f"{path} is not a file; give the .pt file of Google's PyTorch checkpoint")
    with tempfile.TemporaryDirectory(prefix=".griffin-convert-", dir=scratch, ignore_cleanup_errors=True) as folder:
        # -P: the script's folder is this package, whose module names must not hide installed ones.
        child = [sys.executable, "-P", str(Path(__file__).with_name("child.py")), str(path.resolve()), folder]
        returncode, said = _run_to_its_end(child)
        if returncode < 0:
            name = signal.Signals(-returncode).name
            raise GriffinError(f"{path} cannot be read: its reader was killed by {name}; is there enough memory?")
        if returncode:
            last = (said.strip().splitlines() or ["its reader failed"])[-1]
            raise GriffinError(f"{path} cannot be read: {''.join(c for c in last if c.isprintable())[:300]}")
        tensors: dict[str, Tensor] = {}
        for part in sorted(Path(folder).glob("part-*.safetensors")):
            tensors.update(load_file(part))
    return _without_params_prefix(tensors)


def _run_to_its_end(child: list[str]) -> tuple[int, str]:
    """Run a process that ends when its stdin does: exit status and stderr. Its stdin is open as long as this lives."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(child, text=True, errors="replace", **pipes) as process:  # type: ignore[call-overload]
        try:
            said = process.stderr.read()
            return process.wait(), said
        except BaseException:
            process.kill()
            raise


def read_flax_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read an orbax folder of Flax parameters, as Google's torch names (`flax_to_google`).

    Raises:
        GriffinError: orbax is not installed, or the folder is not one of its checkpoints.
    """
    path = Path(path)
    if not path.is_dir():
        raise GriffinError(f"{path} is not a folder; give the folder of Google's Flax checkpoint")
    if not _is_orbax(path):
        inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _is_orbax(folder)]
        hint = f"give the folder in it that is one: {inside[0]}" if inside else "one has a file named _METADATA in it"
        raise GriffinError(f"{path} is not a Flax (orbax) checkpoint; {hint}")
    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise GriffinError(
            f"{path} is a Flax checkpoint, and reading one needs orbax: pip install griffin-lm[convert]"
        ) from error
    try:
        checkpointer = orbax.PyTreeCheckpointer()
        metadata = checkpointer.metadata(path.resolve())
        tree = getattr(metadata, "item_metadata", metadata)  # orbax 0.11 and later wraps it, twice
        as_numpy = _map_leaves(getattr(tree, "tree", tree), orbax.RestoreArgs(restore_type=np.ndarray))
        restored = checkpointer.restore(path.resolve(), restore_args=as_numpy)
    except Exception as error:  # orbax raises whatever its storage layers raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GriffinError(f"{path} cannot be read as an orbax checkpoint: {line[:300]}") from error
    return flax_to_google(restored)


def flax_to_google(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn Flax parameters into Google's torch names and layout: `kernel` [in, out] becomes `weight` [out, in].

    Args:
        tree: nested dictionaries, or names joined with "/", of NumPy or JAX arrays or tensors; with or without "params"
            on top. Every dtype is kept, bfloat16 bit by bit.

    Raises:
        GriffinError: a leaf is no array, or two leaves have one name.
    """
    out: dict[str, Tensor] = {}
    for path, leaf in _leaves(tree, ""):
        folder, _, last = path.replace("/", ".").rpartition(".")
        value = _tensor(path, leaf)
        if last == "kernel":
            last, value = "weight", value.T.contiguous() if value.ndim == 2 else value
        name = f"{folder}.{last}" if folder else last
        if name in out:
            raise GriffinError(f"{path}: the Flax checkpoint holds {name} twice")
        out[name] = value
    return _without_params_prefix(out)


def _without_params_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith("params.") for name in tensors):
        return {name.removeprefix("params."): value for name, value in tensors.items()}
    return dict(tensors)


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_orbax(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA", "checkpoint"))


def _map_leaves(tree: Mapping[str, Any], leaf: Any) -> dict[str, Any]:
    return {key: _map_leaves(value, leaf) if isinstance(value, Mapping) else leaf for key, value in tree.items()}


def _tensor(name: str, leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    array = np.asarray(leaf)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype.name == "bfloat16":  # NumPy knows it only through ml_dtypes, torch not at all
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise GriffinError(
            f"{name} in the Flax checkpoint is a {type(leaf).__name__}, not an array of numbers"
        ) from error
