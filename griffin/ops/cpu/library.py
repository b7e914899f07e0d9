"""The library of CPU kernels: loaded on first use, called through ctypes, run on PyTorch's own threads."""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 8  # griffin_abi_version() of csrc/abi.cpp: add one to both whenever a kernel's signature or meaning changes
PATH = Path(__file__).with_name("_kernels.so")
REBUILD = "build it with: python setup.py build_ext --inplace, or pip install again with a C++ compiler at hand"

# Each CPU that has one has those before it. A kernel not compiled for one serves as compiled for the one before.
INSTRUCTIONS = ("portable", "avx2", "avx512", "avx512bf16")

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_NUMBERS = {"i": "q", "f": "f4x", "d": "d"}  # how `struct` packs one Value of csrc/abi.h; an address is "Q"
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "F": (torch.float32,),
    "H": (torch.bfloat16,),
    "E": (torch.float32, torch.bfloat16),
    "L": (torch.int64,),
    "I": (torch.int32,),
    "C": (torch.int8,),
    "U": (torch.uint8,),
    "B": (torch.bool,),
    "A": (),
}


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


def instructions() -> str:
    """Which of INSTRUCTIONS the kernels use; "" without a library."""
    now = _now()
    return now.instructions if now.library is not None else ""


@contextmanager
def without_kernels() -> Iterator[None]:
    """Take the pure-torch definitions instead, in every thread, inside the `with`."""
    with _chosen.using(Loaded(None, "turned off by without_kernels()")):
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
    with _chosen.using(replace(loaded, instructions=instructions or loaded.instructions)):
        yield


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel, its packed values, and the arguments they came from, which keep the memory alive."""

    name: str
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
    function.restype = ctypes.c_int64
    return function, now.pool


class Kernel:
    """One kernel of the library, callable with tensors and numbers.

    Args:
        name: as in KERNEL(name, ...) of its C++ file.
        signature: one letter per argument after the thread pool. Numbers: i is a whole number or a truth value, f is
            fp32, d fp64. Tensors: T has the dtype of the call, F is fp32, H bf16, E either of these, L int64, I int32,
            C int8, U uint8, B bool, A anything; with a ? behind it may be None. Spaces are for the reader.
    """

    def __init__(self, name: str, signature: str) -> None:
        self.name = name
        self.letters = re.findall(r"\S\??", signature)
        self.pack = struct.Struct("=" + "".join(_NUMBERS.get(letter, "Q") for letter in self.letters)).pack
        self.variants: dict[tuple[int, str, torch.dtype], _Variant] = {}

    def __call__(self, dtype: torch.dtype, *arguments: Tensor | float | None) -> int:
        """Run the variant for `dtype`.

        Returns:
            0, or of a kernel that checks the whole numbers in a tensor, 1 + the index of the first that is out of
            range: then it has written nothing.

        Raises:
            ValueError: a tensor is not what the kernel reads and writes: contiguous, in a CPU's memory, of its dtype.
        """
        now = _now()
        variant = self.variants.get((id(now.library), now.instructions, dtype)) or self._find(now, dtype)
        pairs = zip(arguments, variant.pointers, strict=True)
        values = self.pack(*[a if pointer is None else _address(self.name, a, pointer) for a, pointer in pairs])
        wrong = variant.function(now.pool, values)
        if _kept.calls is not None:
            _kept.calls.append(Call(self.name, variant.function, values, arguments))
        return wrong

    def _find(self, now: Loaded, dtype: torch.dtype) -> _Variant:
        assert now.library is not None
        names = [f"griffin_{self.name}_{_TYPES[dtype]}_{instructions}" for instructions in reversed(offered(now))]
        function: Any = getattr(now.library, next(name for name in names if hasattr(now.library, name)))
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p]  # c_char_p: the address of what a bytes holds
        function.restype = ctypes.c_int64
        dtypes = _DTYPES | {"T": (dtype,)}
        pointers = [None if n in _NUMBERS else _Pointer(dtypes[n[0]], n.endswith("?")) for n in self.letters]
        found = self.variants[id(now.library), now.instructions, dtype] = _Variant(function, tuple(pointers))
        return found


@dataclass(frozen=True, slots=True)
class _Pointer:
    """What a kernel expects where an address is passed."""

    dtypes: tuple[torch.dtype, ...]  # one of these; none: any
    optional: bool


@dataclass(frozen=True, slots=True)
class _Variant:
    function: Callable[[int | None, bytes], int]
    pointers: tuple[_Pointer | None, ...]  # None for numbers


def _address(name: str, tensor: Any, pointer: _Pointer) -> int:
    """Where the values of a tensor lie: C trusts it, so whatever is not as expected ends here."""
    if tensor is None and pointer.optional:
        return 0
    if type(tensor) not in _PLAIN:
        raise ValueError(f"{name} was given a {type(tensor).__name__} where it takes a plain tensor")
    known = tensor.is_cpu and (not pointer.dtypes or tensor.dtype in pointer.dtypes)
    if not (known and tensor.is_contiguous() and not tensor.is_neg()):
        wanted = " or ".join(str(dtype) for dtype in pointer.dtypes) or "any dtype"
        raise ValueError(
            f"{name} was given {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; "
            f"it takes contiguous tensors of {wanted} on the CPU"
        )
    address: int = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ValueError(f"{name} was given {tuple(tensor.shape)} {tensor.dtype} whose memory was freed")
    return address


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
    out = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    _CONVERT[dtype](dtype, tensor, out, tensor.numel())
    return out


def whole_numbers(tensor: Tensor) -> Tensor:
    """Give them as kernels take them, int64 and contiguous.

    Raises:
        ValueError: they are not whole numbers.
    """
    check_whole(tensor)
    return tensor.to(torch.int64).contiguous()


def check_whole(tensor: Tensor) -> None:
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} must be whole numbers")


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


_CONVERT = {torch.float32: Kernel("convert", "HT i"), torch.bfloat16: Kernel("convert", "FT i")}
_PLAIN = (Tensor, torch.nn.Parameter)


class _Chosen:
    """What every `with` of this file that has been entered and not left asks for; the last one counts.

    Each takes away its own, so that two threads may leave in the order they came, and all is then as before.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entered: list[tuple[object, Loaded]] = []
        self.last: Loaded | None = None  # None: the library beside this file

    @contextmanager
    def using(self, loaded: Loaded) -> Iterator[None]:
        mine = (object(), loaded)
        with self.lock:
            self.entered.append(mine)
            self.last = loaded
        try:
            yield
        finally:
            with self.lock:
                self.entered.remove(mine)
                self.last = self.entered[-1][1] if self.entered else None


_chosen = _Chosen()


def _now() -> Loaded:
    return _chosen.last or load()
