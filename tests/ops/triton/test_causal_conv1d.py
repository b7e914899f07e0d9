"""The convolution's Triton kernels against its definition in fp64: values, states and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from griffin.ops import causal_conv1d
from griffin.ops.cpu.library import empty_like
from tests.ops.triton.running import DEVICE, TOLERANCE, assert_near, launches, results, strided

pytest.importorskip("triton", reason="the kernels' language is not installed")
BOTH = ["_conv_forward", "_conv_backward"]
# B, T, R, taps, whether a state is given, where documents start (None: no mask)
CASES = [
    (1, 1, 1, 4, True, [0]),
    (2, 2, 33, 4, True, [1]),
    (2, 3, 33, 8, True, []),  # fewer tokens than the state has
    (1, 63, 33, 2, True, [0, 31, 62]),
    (2, 64, 1, 4, True, [61]),
    (1, 100, 256, 4, False, None),
    (2, 125, 33, 4, True, None),  # with the state's, one tile of 128 inputs
    (2, 130, 5, 8, True, [0, 127, 128]),  # two tiles, the last of two tokens
    (1, 257, 33, 4, True, [0, 128, 256]),
    (1, 257, 5, 1, False, [100]),
]


def conv_inputs(B: int, T: int, R: int, taps: int, dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
    shapes = [(B, T, R), (R, taps), (R,), (B, taps - 1, R)]
    dtypes = [dtype, weights, weights, dtype]
    return [torch.randn(shape).to(kind).to(DEVICE) for shape, kind in zip(shapes, dtypes, strict=True)]


def mask(B: int, T: int, where: list[int] | None) -> Tensor | None:
    if where is None:
        return None
    reset = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    reset[0, where] = True  # the other rows have none, but for their last token
    if where:
        reset[1:, -1] = True
    return reset


@pytest.mark.parametrize(("B", "T", "R", "taps", "given", "where"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_is_its_definition_with_gradients(
    dtype: torch.dtype, B: int, T: int, R: int, taps: int, given: bool, where: list[int] | None
) -> None:
    inputs = conv_inputs(B, T, R, taps, dtype, torch.float32)[: 4 if given else 3]
    reset = mask(B, T, where)

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x, weight, bias, state, reset)

    with launches() as names:
        found = results(run, inputs)
        assert names == BOTH
        wanted = results(run, [t.double() for t in inputs])
        assert names == BOTH  # fp64 is the reference: never a kernel
    assert_near(found, wanted, TOLERANCE[dtype])
    assert torch.equal(found[1].double(), wanted[1])  # the state is copied
    assert not any(t.isnan().any() for t in found)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_in_fp32_and_rounded_once(weights: torch.dtype) -> None:
    x, weight, bias, state = conv_inputs(2, 40, 33, 4, torch.float16, weights)
    y, _ = causal_conv1d(x, weight, bias, state)
    exact, _ = causal_conv1d(x.double(), weight.double(), bias.double(), state.double())
    torch.testing.assert_close(y.double(), exact, rtol=1.01 * 2**-11, atol=1e-6)
    grads = results(lambda *inputs: causal_conv1d(*inputs), [x, weight, bias, state])[2:]
    assert [g.dtype for g in grads] == [torch.float16, weights, weights, torch.float16]


def test_two_chunks_equal_one() -> None:
    x, weight, bias, state = conv_inputs(2, 140, 33, 4, torch.bfloat16, torch.bfloat16)
    reset = mask(2, 140, [0, 50, 131])
    y, last = causal_conv1d(x, weight, bias, state, reset)
    for split in (1, 2, 50, 132):
        left, mid = causal_conv1d(x[:, :split], weight, bias, state, reset[:, :split])
        right, end = causal_conv1d(x[:, split:], weight, bias, mid, reset[:, split:])
        assert torch.equal(torch.cat([left, right], dim=1), y)
        assert torch.equal(end, last)


def test_nothing_passes_a_document_start_not_even_nan() -> None:
    inputs = conv_inputs(1, 20, 5, 4, torch.float32, torch.float32)
    reset = mask(1, 20, [9, 19])
    inputs[0][:, :9], inputs[3][:] = torch.nan, torch.nan
    y, last, dx, *_, dstate = results(lambda *given: causal_conv1d(*given, reset), inputs)
    assert torch.isnan(y[:, :9]).all()
    assert not torch.isnan(y[:, 9:]).any()
    assert not last[:, :2].any()
    assert torch.equal(last[:, 2], inputs[0][:, 19])
    assert not torch.isnan(dx).any()
    assert not torch.isnan(dstate).any()


def test_strides_and_repetition_do_not_change_a_bit() -> None:
    inputs, reset = conv_inputs(2, 40, 33, 4, torch.float32, torch.float32), mask(2, 40, [7])
    flows = [torch.randn(2, 40, 33, device=DEVICE), torch.randn(2, 3, 33, device=DEVICE)]
    plain = results(lambda *given: causal_conv1d(*given, reset), inputs, flows)
    for layout in (lambda t: t, strided):
        again = results(
            lambda *given, layout=layout: causal_conv1d(*given, layout(reset)),
            [layout(t) for t in inputs],
            [layout(t) for t in flows],
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_outputs_are_poisoned_here() -> None:
    """What a kernel leaves out is NaN, and the tests above would see it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(2, 3, dtype=dtype, device=DEVICE)
        assert empty_like(x).isnan().all()
        assert x.new_empty(4, dtype=torch.float32).isnan().all()


def test_more_taps_than_the_kernel_has() -> None:
    x, weight, bias, state = conv_inputs(1, 20, 3, 9, torch.float32, torch.float32)
    with launches() as names:
        results(causal_conv1d, [x, weight, bias, state])
    assert names == []


def test_conv_composes() -> None:
    """Schema, fake tensors, autograd registration; and a compiled graph calls the same kernels."""
    inputs = [t.requires_grad_() for t in conv_inputs(2, 9, 4, 4, torch.float32, torch.float32)]
    op, checks = (
        torch.ops.griffin.causal_conv1d.default,
        ("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    for reset in (mask(2, 9, [3]), None):
        torch.library.opcheck(op, (*inputs, reset), test_utils=checks)
    reset = mask(2, 9, [3])
    dy, dlast = torch.randn(2, 9, 4, device=DEVICE), torch.randn(2, 3, 4, device=DEVICE)
    x, weight, _, state = (t.detach() for t in inputs)
    backward = torch.ops.griffin.causal_conv1d_backward.default
    torch.library.opcheck(backward, (dy, dlast, x, weight, strided(state), reset), test_utils=checks)

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(*given, reset)

    plain = results(run, inputs)
    with launches() as names:
        compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)
    assert names == BOTH
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
