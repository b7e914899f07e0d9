"""Which kernel serves which op here, and why: the one place that knows devices, dtypes, tracing and kernels' limits.

The ops ask `kernels`; `griffin info` prints `serving`. Both read OPS, and nothing else is kept of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from griffin.ops.cpu import library


@dataclass(frozen=True, slots=True)
class Kernels:
    """What serves an op on one kind of device."""

    file: str  # the module in griffin/ops whose functions bear the op's name
    dtypes: frozenset[torch.dtype]
    recorded: bool = True  # False: they serve only where no gradient is recorded
    most: int | None = None  # the largest size they take; None: any
    multiple: int = 1  # sizes are multiples of it
    limit: str = ""  # `most` and `multiple` in words


@dataclass(frozen=True, slots=True)
class Op:
    """An op, with what computes it where no kernel serves."""

    definition: str
    cpu: Kernels | None = None
    cuda: Kernels | None = None


_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64}
_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, *_WHOLE})
_CUDA_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, *_WHOLE})
_PLAIN = (Tensor, torch.nn.Parameter)


def _cpu(file: str, recorded: bool = True, most: int | None = None, limit: str = "") -> Kernels:
    return Kernels(f"cpu.{file}", _CPU_DTYPES, recorded, most, limit=limit)


def _triton(file: str, recorded: bool = True, most: int | None = None, limit: str = "") -> Kernels:
    return Kernels(f"triton.{file}", _CUDA_DTYPES, recorded, most, limit=limit)


FLASH = Kernels(
    "flash", frozenset({torch.float16, torch.bfloat16}), True, 256, 8, "heads up to 256 wide, a multiple of 8"
)
_TAPS = (True, 8, "at most 8 taps")
_FEW = (False, 16, "at most 16 rows")
_ROWS = "at most 16 rows, 64 with AVX-512; any number of bf16 with AVX512-BF16"

OPS = {
    "linear_scan": Op("a loop over time", _cpu("recurrence"), _triton("linear_scan")),
    "rg_lru": Op("a loop over time", _cpu("recurrence"), _triton("rg_lru")),
    "cg_lru": Op("two linear_scans in a frame that turns"),
    "causal_conv1d": Op("one product per tap", _cpu("recurrence", *_TAPS), _triton("causal_conv1d", *_TAPS)),
    "packed_rg_lru": Op("rg_lru of each row", _cpu("recurrence", False), _triton("rg_lru", False)),
    "packed_causal_conv1d": Op(
        "causal_conv1d of each row",
        _cpu("recurrence", False, 8, "at most 8 taps"),
        _triton("causal_conv1d", False, 8, "at most 8 taps"),
    ),
    "recurrent_step_": Op("the ops it joins", None, _triton("recurrent_step", False)),
    "local_attention": Op("scaled_dot_product_attention, in blocks of queries", _cpu("attention"), FLASH),
    "ring_attention": Op(
        "scaled_dot_product_attention",
        _cpu("attention", False),
        _triton("ring_attention", False, 256, "heads up to 256 wide"),
    ),
    "ring_write_": Op("scatter_", _cpu("attention", False)),
    "rms_norm": Op("elementwise", _cpu("pointwise"), _triton("rms_norm", True, 8192, "at most 8192 wide")),
    "geglu": Op("elementwise", _cpu("pointwise"), _triton("geglu")),
    "rope": Op("elementwise", _cpu("pointwise")),
    "rope_table": Op("elementwise", _cpu("pointwise", False)),
    "next_positions_": Op("elementwise", _cpu("pointwise", False)),
    "embed": Op("indexing", _cpu("pointwise", False)),
    "quantized_embed": Op("indexing", _cpu("pointwise", False)),
    "linear": Op("matmul", _cpu("linears", limit=_ROWS)),
    "output_linear": Op("as linear, with fp32 sums", _cpu("linears", limit=_ROWS)),
    "product": Op("matmul", _cpu("linears", limit="of bf16 with AVX512-BF16, in the loss and linears' gradients")),
    "block_diagonal_linear": Op("baddbmm", _cpu("linears", *_FEW)),
    "quantized_linear": Op(
        "matmul of widened weights",
        _cpu("linears", True, 16, "at most 16 rows"),
        _triton("linears", True, 64, "at most 64 rows"),
    ),
    "quantized_linear_many": Op(
        "matmul of widened weights",
        _cpu("linears", limit="int8 weights, where the CPU multiplies 8-bit numbers exactly"),
    ),
    "quantize_int8": Op("elementwise"),
    "quantize_int4": Op("elementwise", _cpu("linears")),
    "dequantize": Op("elementwise", _cpu("linears")),
    "soft_cap": Op("tanh", _cpu("pointwise", False)),
    "cross_entropy": Op("elementwise", None, _triton("cross_entropy", False)),
}


def kernels(op: str, *tensors: Tensor | None, size: int | None = None, traced: bool = False) -> ModuleType | None:
    """Give the module whose functions serve an op for these tensors, or None: its definition does.

    fp64 is never served: there, PyTorch's operations are the reference. Nor are tensors that only stand for others
    (fake ones, distributed ones), nor what PyTorch watches
    (compiles, traces, vectorises, differentiates forward).

    Args:
        op: a name in OPS.
        tensors: those that reach the kernel; the first says the device. None is no tensor.
        size: what `Kernels.most` limits; None: nothing.
        traced: the kernel is an operation of PyTorch's own and may be asked for while something traces.
    """
    if not traced and _is_traced():
        return None
    first = tensors[0]
    assert first is not None
    on_cpu = first.is_cpu and not _pretends_cuda
    found = OPS[op].cpu if on_cpu else OPS[op].cuda if first.is_cuda or _pretends_cuda else None
    if found is None or (not found.recorded and torch.is_grad_enabled()):
        return None
    if size is not None and (size == 0 or size % found.multiple or (found.most is not None and size > found.most)):
        return None
    for tensor in tensors:
        if tensor is not None and (
            tensor.dtype not in found.dtypes
            or (type(tensor) not in _PLAIN and not traced)
            or (tensor is not first and tensor.device != first.device)
        ):
            return None
    return _module(found.file) if _status(found, first.device)[0] else None


def plain(*values: object) -> bool:
    """Whether nothing records, traces or stands in for these: what is done with them may leave PyTorch's dispatcher."""
    if torch.is_grad_enabled() or _is_traced():
        return False
    return all(type(value) in _PLAIN for value in values if isinstance(value, Tensor))


def has_tangent(*values: object) -> bool:
    """Whether PyTorch differentiates these forward: an operation with a gradient of its own would lose that."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        stack = torch._C._functorch.get_interpreter_stack() or []
        return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
    dual = forward_ad._current_level >= 0
    return dual and any(forward_ad.unpack_dual(v).tangent is not None for v in values if isinstance(v, Tensor))


def stands_for_others(tensor: Tensor) -> bool:
    """Whether it is a fake or distributed one: PyTorch's own operations know what to do with it."""
    return type(tensor) not in _PLAIN


def _is_traced() -> bool:
    """Whether PyTorch watches its operations to compile, trace, vectorise or differentiate them forward.

    Of a kernel it would see nothing.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY):
        return True  # make_fx
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def own_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Turn torch.autocast off for `device` within a with statement, where it is on.

    It would round what is documented to be in fp32, the logits and the loss, and cast some inputs of an op but not
    others. `Griffin(..., activation_dtype=torch.bfloat16)` is the same wish, kept exactly.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True, slots=True)
class Serving:
    """What computes an op."""

    op: str
    kernel: str
    reason: str


def serving(device: str) -> list[Serving]:
    """List what computes every op on a device, and why, for fp32 and bf16 (fp64 always takes the definition).

    Args:
        device: as PyTorch names it: "cpu", "cuda", "cuda:1".
    """
    place = torch.device(device)
    rows = []
    for name, op in OPS.items():
        found = op.cpu if place.type == "cpu" else op.cuda if place.type == "cuda" else None
        definition = f"PyTorch: {op.definition}"
        if place.type not in ("cpu", "cuda"):
            rows.append(Serving(name, definition, f"there are no kernels for {place.type}"))
        elif found is None:
            rows.append(Serving(name, definition, "the definition is what there is for it"))
        else:
            available, reason = _status(found, place)
            ours = "PyTorch's flash attention, fp16 and bf16" if found is FLASH else "ours"
            limits = [found.limit] * bool(found.limit) + ["where no gradient is recorded"] * (not found.recorded)
            reason = "; ".join([reason, *limits]) if available else reason
            rows.append(Serving(name, ours if available else definition, reason))
    return rows


def status(device: torch.device) -> tuple[bool, str]:
    """Whether kernels of ours serve a device, and which they are or why not."""
    if device.type == "cpu" and not _pretends_cuda:
        return library.status()
    if device.type == "cuda" or _pretends_cuda:
        return _triton_status()
    return False, f"there are no kernels for {device.type}"


def _status(found: Kernels, device: torch.device) -> tuple[bool, str]:
    if found.file == "flash":
        return _flash_status(device)
    return library.status() if found.file.startswith("cpu.") else _triton_status()


def _triton_status() -> tuple[bool, str]:
    if importable("triton"):
        if torch.cuda.is_available() or _pretends_cuda:
            return True, "Triton, compiled on first use"
        return False, "there is no CUDA device here"
    return False, "triton is not installed; pip install triton (PyTorch for CUDA brings it)"


def _flash_status(device: torch.device) -> tuple[bool, str]:
    from griffin.ops import flash

    return flash.status(device)


@functools.cache
def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@functools.cache
def _module(file: str) -> ModuleType:
    """Kernels are imported when they are first called: most machines have no triton."""
    return importlib.import_module(f"griffin.ops.{file}")


_pretends_cuda = False


@contextmanager
def pretending_cuda() -> Iterator[None]:
    """Call Triton's kernels for CPU tensors inside the `with`: for tests, under Triton's interpreter."""
    global _pretends_cuda
    before, _pretends_cuda = _pretends_cuda, True
    try:
        with library.without_kernels():
            yield
    finally:
        _pretends_cuda = before
