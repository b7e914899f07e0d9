"""Every CPU kernel against its formula in fp64, and the pure-torch path held to the same.

Each operation runs as compiled for each instruction set this CPU has, and without the library ("torch").
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from griffin.ops import causal_conv1d, geglu, linear_scan, rg_lru, rms_norm, rope
from griffin.ops.cpu import library
from tests.ops import reference

SIZES = [(1, 1, 1), (2, 2, 3), (1, 63, 7), (2, 64, 8), (3, 65, 33), (2, 100, 130), (1, 257, 256), (5, 1, 256)]
LAYOUTS = ["plain", "offset", "strided"]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1.2e-2}  # of the largest value; bf16 rounds by up to 2^-9 = 2e-3
# Without a library the tests say so and are skipped. What multiplies matrices has one more (test_cpu_linear.py).
INSTRUCTIONS = tuple(name for name in library.offered() if name != "avx512bf16") or ("portable",)
PATHS = [*INSTRUCTIONS, "torch"]


@contextmanager
def serving(path: str) -> Iterator[None]:
    if path == "torch":
        with library.without_kernels():
            yield
        return
    available, reason = library.status()
    if not available:
        pytest.skip(reason)
    with library.using(None if path == "native" else path):  # native: what is chosen where nobody asks
        yield


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(request.param):
        yield request.param


@dataclass(frozen=True)
class Case:
    """An operation, its formula, and its inputs in fp64; `activations` of them come in the dtype under test."""

    run: Callable[..., object]
    formula: Callable[..., object]
    inputs: tuple[Tensor, ...]
    activations: int


def starts(B: int, T: int) -> Tensor:
    """Documents that begin at the first token, inside a chunk, beside its edge, and at the last token."""
    reset = torch.zeros(B, T, dtype=torch.bool)
    for t in (0, 9, 10, 64, T - 1):
        if t < T:
            reset[t % B, t] = True
    return reset


def case(name: str, B: int, T: int, R: int) -> Case:
    generator = torch.Generator().manual_seed(T * 1000 + R)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    reset, family = starts(B, T), name.split(":")[0]
    if family == "linear_scan":
        return Case(
            linear_scan,
            lambda x, a, h0: (y := reference.linear_scan(x, a, h0), y[:, -1]),
            (randn(B, T, R), torch.sigmoid(randn(B, T, R)), randn(B, R)),
            2,
        )
    if family == "rg_lru":
        unscaled = name != "rg_lru:scaled"
        given = None if name == "rg_lru:no reset" else reset
        return Case(
            lambda *inputs: rg_lru(*inputs, given, unscaled_first_token=unscaled),
            lambda *inputs: (
                y := reference.rg_lru(*inputs, reset if given is not None else reset & False, unscaled=unscaled),
                y[:, -1],
            ),
            (randn(B, T, R), randn(B, T, R), randn(B, T, R), randn(R) - 4, randn(B, R)),
            3,
        )
    if family == "causal_conv1d":
        taps = int(name.split(":")[1])
        return Case(
            lambda x, state, w, b: causal_conv1d(x, w, b, state, reset),
            lambda x, state, w, b: reference.causal_conv1d(x, w, b, state, reset),
            (randn(B, T, R), randn(B, taps - 1, R), randn(R, taps), randn(R)),
            2,
        )
    if family == "rms_norm":
        return Case(
            lambda x, w: rms_norm(x, w, 1e-6),
            lambda x, w: reference.rms_norm(x, w, 1e-6),
            (randn(B, T, R), randn(R) / 4),
            1,
        )
    if family == "geglu":
        return Case(geglu, reference.geglu, (2 * randn(B, T, R), randn(B, T, R)), 2)
    n, heads = (R + 3) // 4, 3
    angle = 10 * randn(B, T, n).float()
    table = angle.cos(), angle.sin()
    return Case(
        lambda x: rope(x, *table),
        lambda x: reference.rope(x, *(t.double() for t in table)),
        (randn(B, T, heads, 2 * n + R % 5),),
        1,
    )


NAMES = ["linear_scan", "rg_lru", "rg_lru:scaled", "rg_lru:no reset", "rms_norm", "geglu", "rope"]
NAMES += [f"causal_conv1d:{taps}" for taps in (1, 2, 4, 8)]


def rounded(made: Case, dtype: torch.dtype) -> list[Tensor]:
    """The inputs in the dtypes the operation gets: activations in `dtype`, parameters and states fp32."""
    return [t.to(dtype if i < made.activations else torch.float32) for i, t in enumerate(made.inputs)]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at an address that is no multiple of 32, or 8, or with other strides."""
    if layout == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "strided" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=1)[:, 0]
    return tensor


def results(run: Callable[..., object], inputs: list[Tensor], layout: str = "plain") -> list[Tensor]:
    """Outputs, then the gradients of all inputs for cotangents that depend on the outputs' shapes only."""
    leaves = [laid_out(t, layout).detach().requires_grad_() for t in inputs]
    outputs = run(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    flows = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in outputs]
    grads = torch.autograd.grad(
        outputs, leaves, [laid_out(flow, layout) for flow in flows], allow_unused=True, materialize_grads=True
    )
    return [t.detach() for t in (*outputs, *grads)]


@functools.cache
def expected(name: str, B: int, T: int, R: int, dtype: torch.dtype) -> list[Tensor]:
    made = case(name, B, T, R)
    return results(made.formula, [t.double() for t in rounded(made, dtype)])


@pytest.mark.parametrize(("B", "T", "R"), SIZES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_its_formula_with_gradients(path: str, name: str, dtype: torch.dtype, B: int, T: int, R: int) -> None:
    made = case(name, B, T, R)
    wanted = expected(name, B, T, R, dtype)
    plain = results(made.run, rounded(made, dtype))
    assert len(plain) == len(wanted)
    for k, (found, want) in enumerate(zip(plain, wanted, strict=True)):
        assert found.shape == want.shape
        if found.numel():
            error = (found.double() - want).abs().max() / want.abs().max().clamp(min=1e-2)
            assert error < TOLERANCE[dtype], f"result {k}: {error:.1e}"
    # Neither the address nor the strides change a bit of what a kernel gives.
    for layout in ("offset", "strided"):
        for k, (found, same) in enumerate(zip(results(made.run, rounded(made, dtype), layout), plain, strict=True)):
            if path == "torch":
                torch.testing.assert_close(found, same, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            else:
                assert torch.equal(found, same), f"result {k}, {layout}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(name: str, dtype: torch.dtype) -> None:
    made = case(name, 3, 300, 200)  # enough to be shared among four
    inputs, before, found = rounded(made, dtype), torch.get_num_threads(), []
    with serving("native"):
        try:
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                found.append(results(made.run, inputs))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_reaches_its_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = library.Kernel.__call__

    def spy(kernel: library.Kernel, *arguments: object) -> None:
        called.append(kernel.name)
        original(kernel, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(library.Kernel, "__call__", spy)
    made, family = case(name, 2, 5, 6), name.split(":")[0]
    forward, backward = (family, family) if family == "rope" else (f"{family}_forward", f"{family}_backward")
    with serving("native"):
        results(made.run, rounded(made, torch.float32))
        assert called == [forward, backward]
        with torch.inference_mode():
            made.run(*rounded(made, torch.bfloat16))
        assert called == [forward, backward, forward]
        made.run(*made.inputs)  # fp64 is the reference: never a kernel
        made.run(*rounded(made, torch.float16))
    with serving("torch"):
        made.run(*rounded(made, torch.float32))
    assert called == [forward, backward, forward]


def test_more_taps_than_the_kernel_has() -> None:
    x, w = torch.randn(1, 20, 3), torch.randn(3, 9)
    y, _ = causal_conv1d(x, w, torch.zeros(3))
    with serving("torch"):
        assert torch.equal(y, causal_conv1d(x, w, torch.zeros(3))[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_closed_recurrent_gate_passes_the_state_exactly(path: str, dtype: torch.dtype) -> None:
    x, gx, h0 = torch.randn(2, 70, 11).to(dtype), torch.randn(2, 70, 11).to(dtype), torch.randn(2, 11)
    closed = torch.full_like(x, -torch.inf)
    for p in (-30.0, -4.0, 5.0):
        y, last = rg_lru(x, gx, closed, torch.full((11,), p), h0)
        assert torch.equal(last, h0)
        assert torch.equal(y, h0[:, None].to(dtype).expand_as(y))


def test_nan_stays_in_its_channel_and_is_never_lost(path: str) -> None:
    for place in range(3):
        inputs = [torch.randn(1, 70, 11) for _ in range(3)]
        inputs[place][0, 40, 3] = torch.nan
        y, last = rg_lru(*inputs, torch.zeros(11) - 4)
        bad = torch.isnan(y)
        assert bad[0, 40:, 3].all()
        assert bad.sum() == 30
        assert torch.isnan(last).sum() == 1
    x = torch.randn(2, 9, 11)
    x[1, 4, 5] = torch.nan
    assert torch.isnan(rms_norm(x, torch.zeros(11), 1e-6))[1, 4].all()
    assert torch.isnan(geglu(x, torch.ones_like(x))).sum() == 1
    assert torch.isnan(x.bfloat16() * 1).sum() == torch.isnan(geglu(x.bfloat16(), x.bfloat16())).sum()


def test_extreme_gates_are_finite(path: str) -> None:
    gates = torch.tensor([-torch.inf, -1e30, -200.0, -89.0, -88.0, -20.0, 0.0, 20.0, 88.0, 89.0, 1e30, torch.inf])
    x = torch.ones(1, 12, 12, requires_grad=True)
    p = torch.linspace(-30, 30, 12, requires_grad=True)
    gx, ga = (g.expand(1, 12, 12).clone().requires_grad_() for g in (gates, gates[:, None]))
    y, _ = rg_lru(x, gx, ga, p)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(y.sum(), (x, gx, ga, p)))


def test_gates_of_any_size_are_the_formula(path: str) -> None:
    """Every 0.02 from -200 to 200: between 88.4 and 88.7, e^x is on its way to infinity, and was once NaN there."""
    gates = torch.linspace(-200, 200, 20_001).view(1, -1, 1)
    inputs = (torch.ones_like(gates), gates, gates.flip(1), torch.zeros(1))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    for op in (lambda x, i, r, p: rg_lru(x, i, r, p)[0], lambda x, i, r, p: geglu(i, x)):
        found, wanted = op(*leaves), op(*exact)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
        theirs = torch.autograd.grad(wanted.sum(), exact, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


# name, range, the largest relative error allowed, the formula in fp64
FUNCTIONS = [
    ("exp", (-87.3, 88.3), 1.5e-7, torch.exp),
    ("one_minus_exp", (-20.0, -1e-30), 2e-7, lambda x: -torch.expm1(x)),
    ("log1p", (0.0, 1.0), 2e-7, torch.log1p),
    ("sigmoid", (-87.0, 30.0), 3e-7, torch.sigmoid),
    ("softplus", (-80.0, 80.0), 3e-7, lambda x: torch.where(x > 30, x, torch.log1p(x.exp()))),
    ("gelu", (-3.0, 10.0), 2e-6, lambda x: reference.geglu(x, torch.ones_like(x))),
]


@pytest.mark.parametrize(("name", "bounds", "limit", "formula"), FUNCTIONS)
@pytest.mark.parametrize("path", INSTRUCTIONS)
def test_functions_are_accurate(
    path: str, name: str, bounds: tuple[float, float], limit: float, formula: Callable[[Tensor], Tensor]
) -> None:
    kernel, (low, high) = library.Kernel(name, "FFi"), bounds
    x = torch.linspace(low, high, 2_000_003, dtype=torch.float64).float()
    near_zero = torch.logspace(-37, 0, 20_001) * (1 if high > 0 else -1)
    x = torch.cat([x, near_zero[(near_zero >= low) & (near_zero <= high)]])
    y = torch.empty_like(x)
    with serving(path):
        kernel(torch.float32, x, y, x.numel())
        wanted = formula(x.double())
        error = ((y.double() - wanted).abs() / wanted.abs().clamp(min=1e-37)).max().item()
        assert error <= limit, f"{error:.2e}"
        special = torch.tensor([torch.nan, -torch.inf, torch.inf])
        kernel(torch.float32, special, out := torch.empty(3), 3)
    assert torch.isnan(out[0])
    if name in ("exp", "sigmoid"):
        assert out[1] == 0
        assert out[2] == (torch.inf if name == "exp" else 1)


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "old.cpp"
    source.write_text('extern "C" int griffin_abi_version() { return 0; }')
    path = tmp_path / "old.so"
    try:
        subprocess.run(["c++", "-shared", "-fPIC", "-o", path, source], check=True)
    except FileNotFoundError:
        pytest.skip("no C++ compiler here")
    assert "version 0" in library.load(path).reason
    (tmp_path / "text.so").write_text("not a library")
    assert "does not load" in library.load(tmp_path / "text.so").reason
    assert "not built" in library.load(tmp_path / "none.so").reason
    with pytest.raises(RuntimeError, match="version 0"), library.using(path=path):
        pass


def test_status_and_versions_agree() -> None:
    header = Path(library.__file__).with_name("csrc") / "abi.cpp"
    match = re.search(r"griffin_abi_version\(\) \{ return (\d+); \}", header.read_text())
    assert match is not None
    assert int(match[1]) == library.ABI
    with library.without_kernels():
        assert library.status() == (False, "turned off by without_kernels()")
    with serving("native"):
        assert library.status()[0]
        assert "PyTorch's threads" in library.status()[1]
        with pytest.raises(RuntimeError, match="avx1024"), library.using("avx1024"):
            pass


def test_two_threads_leave_in_the_order_they_came() -> None:
    """Each `with` takes away its own: the last to leave does not put back what the first had asked for."""
    before = library.status()
    with serving("native"):
        inside = library.status()
        first, second = library.using("portable"), library.without_kernels()
        first.__enter__()
        second.__enter__()
        assert not library.status()[0]
        first.__exit__(None, None, None)
        assert not library.status()[0]
        second.__exit__(None, None, None)
        assert library.status() == inside
    assert library.status() == before


def test_importing_loads_no_library() -> None:
    code = (
        "import griffin, griffin.ops.cpu.library as l; assert l.load.cache_info().currsize == 0;"
        "assert '_kernels' not in open('/proc/self/maps').read()"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    subprocess.run([sys.executable, "-c", code], check=True)
