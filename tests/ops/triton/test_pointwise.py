"""The Triton kernels of GeGLU and RMSNorm against their definitions in fp64; and what all of them compile to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from griffin.ops import geglu, rms_norm
from tests.ops.triton.compiled import launched
from tests.ops.triton.running import DEVICE, TOLERANCE, assert_near, launches, results, strided

pytest.importorskip("triton", reason="the kernels' language is not installed")
DTYPES = [torch.float32, torch.bfloat16]
GEGLU, NORM = ["_geglu_forward", "_geglu_backward"], ["_norm_forward", "_norm_backward"]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-3)


@pytest.mark.parametrize("shape", [(1,), (0, 3), (3, 341), (2, 5, 103)])  # 1023 elements; 1030, more than one block
@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu_is_its_definition_with_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = [2 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)]
    with launches() as names:
        found = results(geglu, inputs)
        assert names == GEGLU
        wanted = results(geglu, [t.double() for t in inputs])
        with torch.inference_mode():
            assert torch.equal(geglu(*inputs), found[0])
        assert names == [*GEGLU, GEGLU[0]]
    assert_near(found, wanted, TOLERANCE[dtype])
    for again in (results(geglu, inputs), results(geglu, [strided(t) for t in inputs])):
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_gates_of_any_size_are_the_formula() -> None:
    gate = torch.linspace(-200, 200, 4001, device=DEVICE)
    found = results(geglu, [gate, torch.ones_like(gate)])
    wanted = results(geglu, [gate.double(), torch.ones_like(gate).double()])
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


# Of one row the backward pass has one program; of seven, the three below take 3, 3 and 1.
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (1, 7, 256), (2, 1025), (3, 8192), (0, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_its_definition_with_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("griffin.ops.triton.rms_norm._PROGRAMS", 3)
    inputs = [randn(*shape, dtype=dtype), randn(shape[-1])]
    with launches() as names:
        found = results(norm, inputs)
        assert names == NORM
        wanted = results(norm, [t.double() for t in inputs])
        with torch.inference_mode():
            assert torch.equal(norm(*inputs), found[0])
        assert names == [*NORM, NORM[0]]
    assert_near(found, wanted, TOLERANCE[dtype])
    for again in (results(norm, inputs), results(norm, [strided(t) for t in inputs])):
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("weights", [torch.float16, torch.float64])
def test_results_are_rounded_once(weights: torch.dtype) -> None:
    x, up, weight = (randn(*shape, dtype=torch.float16) for shape in ((20, 33), (20, 33), (33,)))
    weight = weight.to(weights)
    for run, inputs in ((geglu, (x, up)), (norm, (x, weight))):
        found = run(*inputs)
        assert found.dtype == torch.float16
        exact = run(*(t.double() for t in inputs))
        torch.testing.assert_close(found.double(), exact, rtol=1.01 * 2**-11, atol=1e-7)
    assert results(norm, (x, weight))[2].dtype == weights


def test_rows_that_fit_no_block_take_the_definition() -> None:
    with launches() as names:
        results(norm, [randn(1, 8193), randn(8193)])
    assert names == []


@pytest.mark.parametrize("name", ["geglu", "rms_norm"])
def test_compiled_graphs_hold_the_definition(name: str) -> None:
    """Fake tensors take it, so that a compiler sees operations that it can fuse."""
    run, inputs = (geglu, [randn(5, 8), randn(5, 8)]) if name == "geglu" else (norm, [randn(5, 8), randn(8)])
    plain = results(run, inputs)
    with launches() as names:
        compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)
    assert names == []
    assert_near(compiled, [t.double() for t in plain], TOLERANCE[torch.float32])


@pytest.mark.slow
def test_kernels_compile_without_spills() -> None:
    found = launched("tests.ops.triton.launch_pointwise")
    names = {"_conv_forward", "_conv_backward", *GEGLU, *NORM, "_cross_entropy"}
    assert {kernel["name"] for kernel in found} == names
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] < 100_000, kernel
