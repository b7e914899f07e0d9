"""A fingerprint of a model: its architecture and every bit of every weight, at memory's speed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from griffin.config import GriffinConfig
from griffin.state import Model

_LATER = {"complex_recurrence": False}
_WORDS = 4096  # of 8 bytes in a row, and as many keys
_ROWS = 8  # at a time: 256 kB stay in a cache, and are too few for PyTorch to wake its threads


def fingerprint(config: GriffinConfig, tensors: Mapping[str, Tensor]) -> str:
    """Give sha256 of the architecture and, of each tensor, of its name, dtype, shape and the sums of its words.

    A tensor's bytes are words x of 64 bits, N = 4096 to a row. Of each row two sums are taken, modulo 2^64, with fixed
    random odd k and l: sum k_j x_j and sum l_j (x_j >> 32). One word that changes always changes them; any other change
    does but for a chance below 2^-32. They are whole numbers: no device, thread count or order makes them others. It
    tells models apart that differ by training, by accident or by damage, not those made by an adversary.

    Args:
        config: the architecture; `init` does not count, it decides no logit of given weights.
        tensors: by name. The order does not count.

    Raises:
        ValueError: a tensor is on the meta device and has no values.

    Source: Carter and Wegman, Universal classes of hash functions, 1979 (multilinear hashing).
    """
    keys = torch.frombuffer(bytearray(hashlib.shake_256(b"griffin").digest(16 * _WORDS)), dtype=torch.int64)
    k, l = (keys | 1).view(2, _WORDS)
    scratch = k.new_empty(_ROWS, _WORDS)
    # What came to the config later counts where it is used: states of before are found again.
    known = {name: value for name, value in asdict(config).items() if name not in _LATER or value != _LATER[name]}
    architecture = {name: value for name, value in known.items() if name != "init"}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to take a fingerprint of; load the model")
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for rows in _rows(tensor.detach()):
            halves = torch.bitwise_right_shift(rows, 32, out=scratch[: len(rows)])
            digest.update(torch.stack([rows @ k, halves @ l]).numpy().data)
    return digest.hexdigest()


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's bytes as (_ROWS or less, _WORDS) int64 on the CPU, the last row filled up with zeros."""
    for slab in tensor.contiguous().flatten().split(2**24):
        values = slab.cpu().view(torch.uint8)
        if short := -len(values) % (8 * _WORDS):
            values = torch.cat([values, values.new_zeros(short)])
        yield from values.view(torch.int64).view(-1, _WORDS).split(_ROWS)


def of(model: Model) -> str:
    """Give the fingerprint of a model: `fingerprint` of its config, parameters and buffers.

    The weights are read once, about a second per 2 GB, and again only after they changed: see `Remembered`.
    """
    remembered: Remembered = model.__dict__.setdefault("_fingerprint", Remembered())
    return remembered(model.config, {**dict(model.named_parameters()), **dict(model.named_buffers())})


class Remembered:
    """The fingerprint of weights that seldom change: computed when asked for, and again once any of them has changed.

    A change is another tensor, other memory, another shape or dtype, or a write that PyTorch counts: every operation
    but fused optimizers' (`make_optimizer` has theirs counted), under no_grad too. Of a parameter that may be trained,
    16 values are looked at as well, for an optimizer's step that was not counted. Other writes that PyTorch does not
    count, through `.data` in place or another library's pointer, are not seen: `torch.autograd.graph.increment_version`
    tells of them.
    """

    def __init__(self) -> None:
        self._of: tuple[Any, ...] | None = None
        self._storages: list[StorageWeakRef] = []  # while one is held, no other storage has its address
        self._value = ""

    def __call__(self, config: GriffinConfig, tensors: Mapping[str, Tensor]) -> str:
        if any(tensor.is_inference() for tensor in tensors.values()):  # PyTorch does not count what is written there
            return fingerprint(config, tensors)
        now = config, *((name, *_seen(tensor)) for name, tensor in tensors.items())
        if now != self._of:
            self._value = fingerprint(config, tensors)
            self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors.values()]
            self._of = now
        return self._value

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()  # a copy's weights lie elsewhere


def _seen(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor does."""
    memory = tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    values = None
    if tensor.requires_grad and tensor.is_contiguous() and not tensor.is_meta:
        flat = tensor.detach().view(-1)
        values = flat[:: max(1, len(flat) // 16)][:16].contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return *memory, tensor._version, values
