"""The library of CPU kernels: loaded on first use, called through ctypes, run on PyTorch's own threads."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 6  # griffin_abi_version() of csrc/abi.cpp: add one to both whenever a kernel's signature or meaning changes
PATH = Path(__file__).with_name("_kernels.so")
REBUILD = "build it with: python setup.py build_ext --inplace, or pip install again with a C++ compiler at hand"

INSTRUCTIONS = ("portable", "avx2", "avx512")  # each CPU that has one has those before it

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_VALUES = {"p": "Q", "i": "q", "f": "f4x", "d": "d"}  # how `struct` packs one Value of csrc/abi.h


@dataclass(frozen=True)
class Loaded:
    """What a call needs: the library, which of its instruction sets to use, and where PyTorch's thread pool is."""

    library: ctypes.CDLL | None
    reason: str  # which kernels these are, or why there are none
    instructions: str = "portable"
    pool: int | None = None  # the address of torch_parallel_for; None runs on the calling thread


def status() -> tuple[bool, str]:
    """Whether the kernels serve the CPU here, and which they are or why not."""
    now = _now()
    return now.library is not None, now.reason


def offered(loaded: Loaded | None = None) -> tuple[str, ...]:
    """Which of INSTRUCTIONS this CPU and the build can run; none without a library."""
    loaded = loaded or _now()
    return INSTRUCTIONS[: INSTRUCTIONS.index(loaded.instructions) + 1] if loaded.library is not None else ()


def serves(*tensors: Tensor) -> bool:
    """Whether a kernel may be called with these: plain CPU tensors of one dtype, fp32 or bf16, and a library to call.

    fp64 is never served: there, PyTorch's operations are the reference. Nor are tensors that only stand for others
    (fake ones, distributed ones), nor what torch.compile traces: they take the definition.
    """
    dtype = tensors[0].dtype
    if torch.compiler.is_compiling() or dtype not in _TYPES or _now().library is None:
        return False
    return all(type(t) in _PLAIN and t.dtype == dtype and t.device.type == "cpu" for t in tensors)


def serves_each(*tensors: Tensor | None) -> bool:
    """As `serves`, but each tensor may be of its own dtype, fp32 or bf16; None is no tensor."""
    if torch.compiler.is_compiling() or _now().library is None:
        return False
    given = [t for t in tensors if t is not None]
    return all(type(t) in _PLAIN and t.dtype in _TYPES and t.device.type == "cpu" for t in given)


def direct(*tensors: Tensor | None) -> bool:
    """As `serves_each`, and nothing records a gradient or compiles: the dispatcher, 10 us a call, can be left out."""
    return not torch.is_grad_enabled() and serves_each(*tensors)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Take the pure-torch definitions instead, in every thread, inside the `with`."""
    with _using(Loaded(None, "turned off by without_kernels()")):
        yield


@contextmanager
def using(instructions: str | None = None, path: Path | None = None) -> Iterator[None]:
    """Take the kernels compiled for these instructions (one of INSTRUCTIONS), or another build of the library.

    Raises:
        RuntimeError: there is no such library here, or the CPU lacks the instructions.
    """
    loaded = _now() if path is None else load(path)
    if loaded.library is None:
        raise RuntimeError(f"no CPU kernels: {loaded.reason}")
    if instructions is not None and instructions not in offered(loaded):
        raise RuntimeError(f"instructions={instructions!r}: this CPU and build offer {', '.join(offered(loaded))}")
    with _using(replace(loaded, instructions=instructions or loaded.instructions)):
        yield


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel, its packed values, and the arguments they came from, which keep the memory alive."""

    function: Any
    values: bytes
    arguments: tuple[Tensor | float | None, ...]


class _Kept(threading.local):
    calls: list[Call] | None = None


_kept = _Kept()


@contextmanager
def keeping(calls: list[Call]) -> Iterator[None]:
    """Append every kernel call that this thread makes inside the `with`."""
    before, _kept.calls = _kept.calls, calls
    try:
        yield
    finally:
        _kept.calls = before


def replay() -> tuple[Any, int | None]:
    """Give griffin_replay of csrc/abi.cpp, and the thread pool that is its first argument."""
    now = _now()
    assert now.library is not None
    function = now.library.griffin_replay
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function, now.pool


class Kernel:
    """One kernel of the library, callable with tensors and numbers.

    Args:
        name: as in KERNEL(name, ...) of its C++ file.
        signature: one letter per argument after the thread pool: p for a tensor or None, i for a whole number or a
            truth value, f for fp32, d for fp64. Spaces are for the reader.
    """

    def __init__(self, name: str, signature: str) -> None:
        self.name = name
        self.pack = struct.Struct("=" + "".join(_VALUES[letter] for letter in signature if letter != " ")).pack
        self.functions: dict[tuple[int, str, torch.dtype], Callable[[int | None, bytes], None]] = {}

    def __call__(self, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
        """Run the variant for `dtype`. Tensors are passed by address: all of them must be contiguous."""
        now = _now()
        function = self.functions.get((id(now.library), now.instructions, dtype)) or self._find(now, dtype)
        values = self.pack(*[_address(a) if isinstance(a, Tensor) else (0 if a is None else a) for a in arguments])
        function(now.pool, values)
        if _kept.calls is not None:
            _kept.calls.append(Call(function, values, arguments))

    def _find(self, now: Loaded, dtype: torch.dtype) -> Callable[[int | None, bytes], None]:
        assert now.library is not None
        function: Any = getattr(now.library, f"griffin_{self.name}_{_TYPES[dtype]}_{now.instructions}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p]  # c_char_p: the address of what a bytes holds
        function.restype = None
        self.functions[id(now.library), now.instructions, dtype] = function
        return function


def empty_like(tensor: Tensor) -> Tensor:
    """Memory for a kernel's result: contiguous, whatever the strides of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def fp32(parameter: Tensor) -> Tensor:
    """Give a parameter as kernels take them: they are small, and fp32 whatever the dtype of the activations."""
    return converted(parameter, torch.float32)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the values in another dtype, contiguous."""
    tensor = tensor.contiguous()
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype not in _TYPES or dtype not in _TYPES:
        return tensor.to(dtype)
    out = torch.empty(tensor.shape, dtype=dtype)
    _convert(dtype, tensor, out, tensor.numel())
    return out


def _address(tensor: Tensor) -> int:
    assert type(tensor) in _PLAIN
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@functools.cache
def load(path: Path = PATH) -> Loaded:
    """Load a library, or say why it cannot be used."""
    if not path.exists():
        return Loaded(None, f"{path.name} was not built; {REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.griffin_abi_version()
    except (OSError, AttributeError) as error:
        return Loaded(None, f"{path.name} does not load: {error}; {REBUILD}")
    if version != ABI:
        return Loaded(None, f"{path.name} is of version {version}, this code needs {ABI}; {REBUILD}")
    name: Any = library.griffin_instructions
    name.restype = ctypes.c_char_p
    instructions = name().decode()
    pool = _torch_parallel_for()
    threads = "PyTorch's threads" if pool else "one thread: this PyTorch does not export torch_parallel_for"
    return Loaded(library, f"C++ for {instructions}, on {threads}", instructions, pool)


def _torch_parallel_for() -> int | None:
    """Address of the C function of PyTorch's stable ABI (torch/csrc/stable/c/shim.h, since 2.10), if it has it.

    int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*)
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
            return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return None


_convert = Kernel("convert", "pp i")
_PLAIN = (Tensor, torch.nn.Parameter)
_chosen: Loaded | None = None  # what a `with` of this file asks for; None: the library beside it


def _now() -> Loaded:
    return _chosen or load()


@contextmanager
def _using(loaded: Loaded) -> Iterator[None]:
    global _chosen
    before, _chosen = _chosen, loaded
    try:
        yield
    finally:
        _chosen = before
