"""linear_scan by Triton's kernels against its definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels are in Triton's language: pip install triton")

from griffin.ops import linear_scan
from griffin.ops.triton import linear_scan as kernels
from griffin.ops.triton import tiles
from tests.ops.triton.running import TOLERANCE, assert_near, launches, results

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every test here must have launched a kernel."""
    with launches() as names:
        yield names
    assert names


def inputs_in(dtype: torch.dtype, B: int, T: int, R: int) -> list[Tensor]:
    """x, a, h0 in fp64 with the values they have in `dtype`; a is 0 and 1 in places."""
    x, a, h0 = torch.randn(B, T, R), torch.rand(B, T, R) ** 0.1, torch.randn(B, R)
    a[:, T // 2], a[:, T // 3] = 0, 1
    return [x.to(dtype).double(), a.to(dtype).double(), h0.double()]


def ours(op: object, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return results(op, [t.to(d) for t, d in zip(inputs, [dtype, dtype, FP32], strict=True)])


def theirs(inputs: list[Tensor]) -> list[Tensor]:
    return results(linear_scan, [t.double() for t in inputs])


@pytest.mark.parametrize(
    ("B", "T", "R", "dtype"),
    [
        (2, 1, 1, FP32),
        (1, 2, 33, BF16),
        (2, 63, 1, FP32),
        (1, 64, 33, FP32),
        (1, 70, 3, torch.float16),
        (3, 100, 2, BF16),
        (1, 257, 256, FP32),
    ],
)
def test_it_is_its_definition_with_gradients(
    B: int, T: int, R: int, dtype: torch.dtype, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.ones(1).new_empty(3).isnan().all()  # so what a kernel does not write is NaN
    if R == 256:
        monkeypatch.setattr(tiles, "BD", 128)  # fewer programs: an interpreted one takes a second
    inputs = inputs_in(dtype, B, T, R)
    found = ours(linear_scan, inputs, dtype)
    assert names == ["_forward_kernel", "_forward_kernel", "_backward_kernel"]
    assert [t.dtype for t in found] == [dtype, FP32, dtype, dtype, FP32]
    assert_near(found, theirs(inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("span", [64, 128])
def test_time_may_be_split(span: int, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_in(FP32, 2, 200, 3)
    inputs[1] = torch.rand(2, 200, 3).double() ** 0.01  # such that every span counts
    whole = ours(linear_scan, inputs, FP32)
    names.clear()
    monkeypatch.setattr(tiles, "span", lambda B, T, R: span)
    split = ours(linear_scan, inputs, FP32)
    assert names.count("_summary_kernel") == 3  # forward, forward once more, backward
    assert_near(split, whole, 2e-6)
    assert_near(split, theirs(inputs), TOLERANCE[FP32])


def test_a_summary_is_what_time_does_to_any_state() -> None:
    x, a, h0 = inputs_in(FP32, 2, 100, 5)
    a = a.clamp(min=0.96875)
    product, h = kernels.summary(x.float(), a.float(), 64)
    assert_near([product[:, 0], product[:, 1]], [a[:, :64].prod(1), a[:, 64:].prod(1)], 1e-6)
    for state in (h0, 3 * h0):
        half, whole = (linear_scan(x[:, :t], a[:, :t], state)[1] for t in (64, 100))
        assert_near([product[:, 0] * state + h[:, 0]], [half], 1e-6)
        assert_near([product[:, 1] * half + h[:, 1]], [whole], 1e-6)


def test_two_parts_equal_one() -> None:
    x, a, h0 = (t.float() for t in inputs_in(FP32, 1, 100, 3))
    left, mid = linear_scan(x[:, :70], a[:, :70], h0)
    right, end = linear_scan(x[:, 70:], a[:, 70:], mid)
    y, last = linear_scan(x, a, h0)
    assert_close(torch.cat([left, right], dim=1), y, rtol=1e-6, atol=1e-6)
    assert_close(end, last, rtol=1e-6, atol=1e-6)


def test_strided_inputs_and_cotangents_give_the_same() -> None:
    x, a, h0 = (t.float() for t in inputs_in(FP32, 2, 70, 6))
    plain = [t.clone().requires_grad_() for t in (x, a)]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (x, a)]
    y, other = linear_scan(*strided, h0)[0], linear_scan(*plain, h0)[0]
    assert torch.equal(y, other)
    found = torch.autograd.grad(y, strided, torch.ones(()).expand_as(y))
    wanted = torch.autograd.grad(other, plain, torch.ones_like(other))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_same_bits_every_time() -> None:
    inputs = inputs_in(FP32, 3, 70, 3)
    first, second = (ours(linear_scan, inputs, FP32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_it_passes_opcheck(dtype: torch.dtype) -> None:
    x, a, h0 = inputs_in(dtype, 2, 66, 2)
    leaves = [*(t.to(dtype).requires_grad_() for t in (x, a)), h0.float().requires_grad_()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.griffin.linear_scan.default, tuple(leaves), test_utils=tests)


def test_torch_compile_and_checkpoint_give_the_same() -> None:
    inputs = inputs_in(FP32, 1, 66, 3)

    def layer(x: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        y, last = linear_scan(x.sin(), a, h0)
        return y * 2, last

    eager = ours(layer, inputs, FP32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (compiled, partial(checkpoint, layer, use_reentrant=False)):
        assert_close(ours(other, inputs, FP32), eager, rtol=0, atol=0)
