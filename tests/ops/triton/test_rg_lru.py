"""rg_lru by Triton's kernels against its definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels are in Triton's language: pip install triton")

from griffin.ops import rg_lru
from griffin.ops.triton import rg_lru as kernels
from griffin.ops.triton import tiles
from tests.ops.test_recurrence import lru_inputs, resets
from tests.ops.triton.running import TOLERANCE, assert_near, launches, results

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every test here must have launched a kernel."""
    with launches() as names:
        yield names
    assert names


def inputs_in(dtype: torch.dtype, B: int, T: int, R: int) -> list[Tensor]:
    """x, gates, parameter, h0 in fp64, the first three with the values they have in `dtype`."""
    *activations, p, h0 = lru_inputs(B, T, R)
    return [*(t.to(dtype).double() for t in activations), p.float().double(), h0.float().double()]


def ours(op: object, inputs: list[Tensor], dtype: torch.dtype, *rest: object) -> list[Tensor]:
    return results(
        lambda *leaves: op(*leaves, *rest), [t.to(d) for t, d in zip(inputs, [dtype] * 3 + [FP32] * 2, strict=True)]
    )


def theirs(op: object, inputs: list[Tensor], *rest: object) -> list[Tensor]:
    return results(lambda *leaves: op(*leaves, *rest), [t.double() for t in inputs])


@pytest.mark.parametrize(
    ("B", "T", "R", "where", "unscaled", "dtype"),
    [
        (2, 1, 1, [], True, FP32),
        (1, 1, 33, [0], False, FP32),
        (2, 2, 33, [1], True, BF16),
        (1, 63, 1, [0, 31, 62], False, FP32),
        (1, 64, 33, [63], False, BF16),
        (1, 70, 3, [0], True, torch.float16),
        (3, 100, 3, [0, 50, 98], True, FP32),
        (1, 100, 33, None, True, FP32),
        (1, 257, 256, [64, 128, 256], True, FP32),
        (1, 257, 256, None, True, BF16),
    ],
)
def test_it_is_its_definition_with_gradients(
    B: int, T: int, R: int, where: list[int] | None, unscaled: bool, dtype: torch.dtype,
    names: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert torch.ones(1).new_empty(3).isnan().all()  # so what a kernel does not write is NaN
    if R == 256:
        monkeypatch.setattr(tiles, "BD", 128)  # fewer programs: an interpreted one takes a second
    inputs = inputs_in(dtype, B, T, R)
    op = partial(rg_lru, unscaled_first_token=unscaled)
    reset = None if where is None else resets(B, T, where)
    found = ours(op, inputs, dtype, reset)
    assert names == ["_forward_kernel", "_backward_kernel"]
    assert [t.dtype for t in found] == [dtype, FP32, dtype, dtype, dtype, FP32, FP32]
    assert_near(found, theirs(op, inputs, reset), TOLERANCE[dtype])


def test_a_bf16_parameter_and_no_state() -> None:
    x, gx, ga, p, h0 = inputs_in(BF16, 1, 70, 3)
    leaf = p.bfloat16().requires_grad_()
    y, _ = rg_lru(*(t.bfloat16() for t in (x, gx, ga)), leaf)
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    exact = p.bfloat16().double().requires_grad_()
    expected, _ = rg_lru(x, gx, ga, exact, torch.zeros_like(h0))
    (expected_grad,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    assert grad.dtype == BF16
    assert_near([y, grad], [expected, expected_grad], TOLERANCE[BF16])


@pytest.mark.parametrize("span", [64, 128])
def test_time_may_be_split(span: int, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_in(FP32, 2, 200, 3)
    reset = torch.zeros(2, 200, dtype=torch.bool)
    reset[0, [0, 100, 128]] = True  # the other row has none: all spans count
    whole = ours(rg_lru, inputs, FP32, reset)
    names.clear()
    monkeypatch.setattr(tiles, "span", lambda B, T, R: span)
    split = ours(rg_lru, inputs, FP32, reset)
    assert names == ["_summary_kernel", "_forward_kernel", "_reverse_summary_kernel", "_backward_kernel"]
    assert_near(split, whole, 2e-6)
    assert_near(split, theirs(rg_lru, inputs, reset), TOLERANCE[FP32])


def test_spans_fill_the_device_and_cover_time(names: list[str]) -> None:
    names.append("no launch here")
    assert tiles.span(8, 2048, 2560) >= 2048
    for B, T, R in ((1, 2048, 2560), (1, 10**6, 2560), (1, 300, 1), (3, 5000, 70), (1, 1, 1)):
        span = tiles.span(B, T, R)
        splits = -(-T // span)
        assert span % 64 == 0
        assert 1 <= splits <= tiles.MOST_SPLITS
        if R == 2560:
            assert splits * B * R // tiles.BD >= tiles.PROGRAMS


def test_a_summary_is_what_time_does_to_any_state() -> None:
    x, gx, ga, p, h0 = inputs_in(FP32, 2, 150, 5)
    reset = resets(2, 150, [])
    reset[0, 70] = True
    a, h = kernels.summary(*(t.float() for t in (x, gx, ga, p)), reset, True, 128)
    for state in (h0, 3 * h0):
        half, whole = (rg_lru(x[:, :t], gx[:, :t], ga[:, :t], p, state, reset[:, :t])[1] for t in (128, 150))
        assert_near([a[:, 0] * state + h[:, 0]], [half], 1e-6)
        assert_near([a[:, 1] * half + h[:, 1]], [whole], 1e-6)
    assert (a[0, 0] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("span", [64, 256])
@pytest.mark.parametrize("place", ["x", "input gate", "recurrent gate", "state"])
def test_what_a_reset_forgets_may_be_nan(span: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so may the gradient of what comes after; without a reset neither is lost."""
    monkeypatch.setattr(tiles, "span", lambda B, T, R: span)
    T, start = 200, 70
    inputs = inputs_in(FP32, 2, T, 3)
    reset = resets(2, T, [])
    reset[0, start] = True
    spoiled = [t.clone() for t in inputs]
    index = ["x", "input gate", "recurrent gate", "", "state"].index(place)
    where = (slice(None), 0) if place == "state" else (slice(None), 20, 0)
    spoiled[index][where] = torch.nan
    (y, _, *grads), (wanted, _, *wanted_grads) = (ours(rg_lru, given, FP32, reset) for given in (spoiled, inputs))
    assert torch.equal(y[0, start:], wanted[0, start:])
    assert y[:, 20:start, 0].isnan().all()
    assert y[1, start:, 0].isnan().all()
    for grad, expected in zip(grads[:3], wanted_grads[:3], strict=True):
        assert torch.equal(grad[0, start:], expected[0, start:])
    flows = [torch.ones(2, T, 3), torch.zeros(2, 3)]
    wanted = results(lambda *leaves: rg_lru(*leaves, reset), [t.float() for t in inputs], flows)[2:5]
    flows[0][:, 150, 0] = torch.nan
    found = results(lambda *leaves: rg_lru(*leaves, reset), [t.float() for t in inputs], flows)[2:5]
    for grad, expected in zip(found, wanted, strict=True):
        assert torch.equal(grad[0, :start], expected[0, :start])
        assert grad[1, :150, 0].isnan().all()


def test_no_digit_is_lost_near_a_of_zero_and_one() -> None:
    """Channel by channel, a from 1e-14 to 1 - 1e-17: there the factor of the input, sqrt(1 - a^2), is 1e-8."""
    x, gx, ga, _, _ = inputs_in(FP32, 1, 40, 7)
    p = torch.tensor([4.0, 0.0, -3.0, -9.0, -16.0, -30.0, -40.0], dtype=torch.float64)
    inputs = [x, gx, ga, p, torch.zeros(1, 7, dtype=torch.float64)]
    for bound in (1000.0, None):
        op = partial(rg_lru, max_sqrt_gradient=bound)
        for found, wanted in zip(ours(op, inputs, FP32)[:5], theirs(op, inputs)[:5], strict=True):
            channels = [(t.double().reshape(-1, 7)) for t in (found, wanted)]
            error = (channels[0] - channels[1]).abs().amax(0) / channels[1].abs().amax(0)
            assert error.max() < 2e-6, error


def test_a_closed_recurrent_gate_passes_the_state() -> None:
    x, gx, ga, p, h0 = (t.float() for t in lru_inputs(2, 70, 4))
    closed = torch.full_like(ga, -torch.inf)
    for bound in (1000.0, None):
        leaves = [t.clone().requires_grad_() for t in (x, gx, closed, p, h0)]
        y, last = rg_lru(*leaves, max_sqrt_gradient=bound)
        assert torch.equal(last, h0)
        assert torch.equal(y, h0[:, None].expand_as(y))
        *grads, dh0 = torch.autograd.grad((y, last), leaves, (torch.ones_like(y), torch.ones_like(last)))
        assert all((grad == 0).all() for grad in grads)
        assert (dh0 == 71).all()


def test_gates_far_from_zero() -> None:
    x, gx, ga, p, h0 = inputs_in(FP32, 1, 5, 4)
    inputs = [x, gx * 300, ga * 300, p * 10, h0]
    assert_near(ours(rg_lru, inputs, FP32), theirs(rg_lru, inputs), TOLERANCE[FP32])


def test_the_bound_of_the_square_root_bites() -> None:
    inputs = inputs_in(FP32, 1, 20, 4)
    bounds = [partial(rg_lru, max_sqrt_gradient=bound) for bound in (None, 1000.0, 0.5)]
    none, wide, tight = (ours(op, inputs, FP32) for op in bounds)
    assert_near(tight, theirs(bounds[2], inputs), TOLERANCE[FP32])
    assert all(torch.equal(a, b) for a, b in zip(none, wide, strict=True))
    assert not torch.equal(none[4], tight[4])


def test_strided_inputs_and_cotangents_give_the_same() -> None:
    x, gx, ga, p, h0 = (t.float() for t in lru_inputs(2, 70, 6))
    reset = resets(2, 70, [0, 9])
    sparse = torch.stack([reset, ~reset], dim=-1)[..., 0]
    plain = [t.clone().requires_grad_() for t in (x, gx, ga)]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (x, gx, ga)]
    twice = torch.stack([h0, h0], dim=-1)[..., 0]
    for found, wanted in zip(rg_lru(*strided, p, twice, sparse), rg_lru(*plain, p, h0, reset), strict=True):
        assert torch.equal(found, wanted)
    one = torch.ones(())  # its expansion has strides of zero
    y, other = rg_lru(*strided, p, h0)[0], rg_lru(*plain, p, h0)[0]
    found = torch.autograd.grad(y, strided, one.expand_as(y))
    wanted = torch.autograd.grad(other, plain, torch.ones_like(other))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_without_gradients_it_is_the_same() -> None:
    x, gx, ga, p, h0 = (t.float() for t in lru_inputs(1, 70, 3))
    with torch.no_grad():
        shortcut = rg_lru(x, gx, ga, p, h0)
    for found, wanted in zip(shortcut, rg_lru(x.requires_grad_(), gx, ga, p, h0), strict=True):
        assert torch.equal(found, wanted)


def test_the_same_bits_every_time() -> None:
    inputs, reset = inputs_in(FP32, 3, 70, 3), resets(3, 70, [4])
    first, second = (ours(rg_lru, inputs, FP32, reset) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_it_passes_opcheck(dtype: torch.dtype) -> None:
    *activations, p, h0 = lru_inputs(2, 66, 2)
    leaves = [*(t.to(dtype).requires_grad_() for t in activations), *(t.float().requires_grad_() for t in (p, h0))]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for mask in (resets(2, 66, [3]), None):
        torch.library.opcheck(torch.ops.griffin.rg_lru.default, (*leaves, mask, 1000.0, True), test_utils=tests)


def test_torch_compile_and_checkpoint_give_the_same() -> None:
    inputs, reset = inputs_in(FP32, 1, 66, 3), resets(1, 66, [5])

    def layer(x: Tensor, gx: Tensor, ga: Tensor, p: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        y, last = rg_lru(x.sin(), gx, ga, p, h0, reset)
        return y * 2, last

    eager = ours(layer, inputs, FP32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (compiled, partial(checkpoint, layer, use_reentrant=False)):
        assert_close(ours(other, inputs, FP32), eager, rtol=0, atol=0)
