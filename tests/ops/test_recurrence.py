"""linear_scan, rg_lru and causal_conv1d against their formulas in fp64: values, gradients, states, splits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from griffin.ops import causal_conv1d, geglu, linear_scan, local_attention, rg_lru, rms_norm, rope, rope_table
from griffin.ops.cpu import library
from griffin.ops.scan import scan
from tests.ops import reference

SIZES = [(1, 1, 1), (2, 2, 3), (1, 63, 33), (2, 64, 5), (3, 100, 2), (1, 257, 256), (2, 130, 300)]
FP32 = {"rtol": 2e-5, "atol": 2e-5}  # 257 fp32 steps with |a| <= 1 lose a few units in the last place


def scan_inputs(B: int, T: int, R: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(B, T, R).to(dtype), torch.rand(B, T, R).to(dtype), torch.randn(B, R, dtype=state)


def lru_inputs(B: int, T: int, R: int) -> list[Tensor]:
    """x, input_gate, recurrent_gate, recurrent_param, h0, all fp64."""
    shapes = [(B, T, R), (B, T, R), (B, T, R), (R,), (B, R)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[3] = inputs[3] - 4  # decays as initialised: 0.9 to 0.999
    return inputs


def resets(B: int, T: int, where: list[int]) -> Tensor:
    reset = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        for t in where:
            reset[b, (t + b) % T] = True
    return reset


@pytest.mark.parametrize(("B", "T", "R"), SIZES)
def test_linear_scan_is_its_formula(B: int, T: int, R: int) -> None:
    x, a, h0 = scan_inputs(B, T, R)
    expected = reference.linear_scan(x, a, h0)
    for dtype, tolerance in ((torch.float64, {"rtol": 1e-12, "atol": 1e-12}), (torch.float32, FP32)):
        state = h0.to(dtype)
        y, last = linear_scan(x.to(dtype), a.to(dtype), state)
        assert_close(y.double(), expected, **tolerance)
        assert_close(last.double(), expected[:, -1], **tolerance)


def test_linear_scan_sums_in_fp32_for_bf16() -> None:
    x, a, h0 = scan_inputs(2, 100, 7, torch.bfloat16)
    y, last = linear_scan(x, a, h0)
    expected = reference.linear_scan(x.float(), a.float(), h0)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert_close(last, expected[:, -1], **FP32)
    assert torch.equal(y, expected.bfloat16()) or (y.float() - expected).abs().max() <= expected.abs().max() / 128


@pytest.mark.parametrize("wide", [0, 10**9])
def test_chunks_side_by_side_equal_the_loop(wide: int) -> None:
    x, a, h0 = scan_inputs(2, 300, 5)
    assert_close(scan(a, x, h0, wide=wide), reference.linear_scan(x, a, h0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [1, 7, 64, 100])
def test_two_chunks_equal_one(split: int) -> None:
    x, a, h0 = scan_inputs(B=2, T=101, R=33, dtype=torch.float32)
    left, mid = linear_scan(x[:, :split], a[:, :split], h0)
    right, end = linear_scan(x[:, split:], a[:, split:], mid)
    y, last = linear_scan(x, a, h0)
    assert_close(torch.cat([left, right], dim=1), y, **FP32)
    assert_close(end, last, **FP32)


@pytest.mark.parametrize(("B", "T", "R"), SIZES)
@pytest.mark.parametrize("unscaled", [True, False])
def test_rg_lru_is_its_formula_with_gradients(B: int, T: int, R: int, unscaled: bool) -> None:
    inputs = lru_inputs(B, T, R)
    reset = resets(B, T, [0, T // 2, T - 1]) if T > 1 else resets(B, T, [])
    cotangents = torch.randn(B, T, R, dtype=torch.float64), torch.randn(B, R, dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = reference.rg_lru(*leaves, reset, unscaled=unscaled)
    loss = (expected * cotangents[0]).sum() + (expected[:, -1] * cotangents[1]).sum()
    expected_grads = torch.autograd.grad(loss, leaves)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        ours = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        y, last = rg_lru(*ours, reset, unscaled_first_token=unscaled)
        grads = torch.autograd.grad((y * cotangents[0].to(dtype)).sum() + (last * cotangents[1].to(dtype)).sum(), ours)
        names = ("y", "last", "x", "input_gate", "recurrent_gate", "recurrent_param", "h0")
        pairs = zip((y, last, *grads), (expected, expected[:, -1], *expected_grads), strict=True)
        for name, (found, wanted) in zip(names, pairs, strict=True):
            error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
            assert error < tolerance, f"{name} in {dtype}: {error:.1e}"


def test_rg_lru_without_reset_or_state() -> None:
    x, gx, ga, p, h0 = lru_inputs(2, 70, 3)
    expected = reference.rg_lru(x, gx, ga, p, torch.zeros_like(h0), resets(2, 70, []))
    assert_close(rg_lru(x, gx, ga, p)[0], expected, rtol=1e-10, atol=1e-10)


def test_sqrt_gradient_is_bounded_where_a_is_one() -> None:
    """With a = 1 to the last bit the slope of sqrt(1 - a^2) is infinite; the bound keeps the gradient finite."""
    x, gx, _, _, h0 = (t.float() for t in lru_inputs(1, 5, 4))
    p = torch.full((4,), -20.0, requires_grad=True)
    ga = torch.full((1, 5, 4), -30.0, requires_grad=True)
    for bound in (1000.0, 10.0):
        y, _ = rg_lru(x, gx, ga, p, h0, max_sqrt_gradient=bound)
        grads = torch.autograd.grad(y.sum(), (ga, p))
        assert all(torch.isfinite(grad).all() for grad in grads)
    # At a moderate slope (2 <= 1000, but above 0.01) the smaller bound must bite.
    p, ga = torch.full((4,), -5.0, requires_grad=True), torch.zeros(1, 5, 4, requires_grad=True)
    grads = [
        torch.autograd.grad(rg_lru(x, gx, ga, p, h0, max_sqrt_gradient=bound)[0].sum(), p)[0]
        for bound in (None, 1e3, 1e-2)
    ]
    assert_close(grads[0], grads[1])
    assert (grads[0] - grads[2]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [None, 1000.0])
def test_padding_changes_no_gradient(dtype: torch.dtype, bound: float | None) -> None:
    """Tokens whose recurrent gate is closed: a is 1 to the last bit, where the slope of sqrt(1 - a^2) is infinite."""
    x, gx, ga, p, h0 = (t.float() if t.dim() < 3 else t.to(dtype) for t in lru_inputs(2, 100, 5))
    h0 = h0.to(torch.promote_types(dtype, torch.float32))
    padding = torch.arange(100) >= torch.tensor([[70], [3]])
    found = []
    for T, closed in ((100, padding), (70, padding[:, :70])):
        leaves = [t.clone().requires_grad_() for t in (x[:, :T], gx[:, :T], ga[:, :T], p, h0)]
        gate = leaves[2].masked_fill(closed[..., None], -torch.inf)
        y, _ = rg_lru(leaves[0], leaves[1], gate, leaves[3], leaves[4], max_sqrt_gradient=bound)
        grads = torch.autograd.grad(y.masked_fill(closed[..., None], 0).square().sum(), leaves)
        assert all(torch.isfinite(grad).all() for grad in grads)
        found.append([grad[:, :70] if grad.dim() == 3 else grad for grad in grads])
    for with_padding, without in zip(*found, strict=True):
        assert_close(with_padding, without)


@pytest.mark.parametrize("T", [1, 70, 200])
@pytest.mark.parametrize("R", [5, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_from_before_a_reset_is_seen(bad: float, dtype: torch.dtype, R: int, T: int) -> None:
    """Not even what is not a number: in the state or in an earlier document, and backward in a later one."""
    x, gx, ga, p, h0 = (t.to(dtype) for t in lru_inputs(2, T, R))
    h0, p = h0.to(torch.promote_types(dtype, torch.float32)), p.float()
    start = torch.tensor([0, 2 * T // 3])  # of the document that counts, in each row; the rest of a row is spoiled
    before = (torch.arange(T) < start[:, None])[..., None]
    reset = torch.arange(T) == start[:, None]
    results = []
    for value in (bad, 0.0):
        spoiled = [t.masked_fill(before, value) for t in (x, gx)]
        leaves = [t.requires_grad_() for t in (*spoiled, ga.clone(), p.clone(), torch.full_like(h0, value))]
        y, last = rg_lru(*leaves, reset)
        counted = y.masked_fill(before, 0)
        # p collects from all tokens of a row, and the spoiled ones give it NaN.
        grads = torch.autograd.grad(counted.float().square().sum() + last.float().sum(), [*leaves[:3], leaves[4]])
        results.append([counted, last, *(grad.masked_fill(before, 0) if grad.dim() == 3 else grad for grad in grads)])
    for spoiled, clean in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(spoiled, clean)
    # And no gradient of a spoiled document goes back through the start of it.
    flow = torch.zeros_like(x).masked_fill(~before, bad)
    leaves = [t.clone().requires_grad_() for t in (x, gx, ga, p, h0)]
    grads = torch.autograd.grad(rg_lru(*leaves, reset)[0], leaves, flow)
    for grad in grads[:3]:
        assert (grad.masked_fill(~before, 0) == 0).all()
    assert (grads[4] == 0).all()


def test_a_closed_recurrent_gate_passes_the_state() -> None:
    x, gx, ga, p, h0 = (t.float() for t in lru_inputs(2, 9, 4))
    y, last = rg_lru(x, gx, torch.full_like(ga, -torch.inf), p, h0)
    assert torch.equal(last, h0)
    assert torch.equal(y, h0[:, None].expand_as(y))


@given(st.integers(1, 40), st.integers(1, 5), st.lists(st.integers(0, 39), max_size=4), st.data())
def test_conv_is_its_formula_in_any_split(T: int, taps: int, where: list[int], data: st.DataObject) -> None:
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, taps - 1, 3, dtype=torch.float64, requires_grad=True)
    reset = resets(2, T, where)
    expected, expected_state = reference.causal_conv1d(x, weight, bias, state, reset)
    y, last = causal_conv1d(x, weight, bias, state, reset)
    assert_close(y, expected)
    # What is behind the last reset may be kept as zero only: it must never be read again.
    assert_close(last, expected_state)
    leaves = (x, weight, bias) if taps == 1 else (x, weight, bias, state)
    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    for found, wanted in zip(
        torch.autograd.grad((y * dy).sum() + (last * dlast).sum(), leaves, allow_unused=True),
        torch.autograd.grad((expected * dy).sum() + (expected_state * dlast).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        assert_close(found, torch.zeros_like(found) if wanted is None else wanted)
    split = data.draw(st.integers(0, T))
    if 0 < split < T:
        left, mid = causal_conv1d(x[:, :split], weight, bias, state, reset[:, :split])
        right, end = causal_conv1d(x[:, split:], weight, bias, mid, reset[:, split:])
        assert_close(torch.cat([left, right], dim=1), expected)
        assert_close(end, last)


def test_strided_inputs_give_the_same() -> None:
    """Views with any strides: transposed, every second channel.

    Not bit for bit: PyTorch computes exp and its relatives of strided numbers one by one, of others several at once.
    """
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    x, gx, ga, p, h0 = lru_inputs(2, 70, 6)
    reset = resets(2, 70, [0, 9])
    expected = rg_lru(x, gx, ga, p, h0, reset)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, gx, ga)]
    for found, wanted in zip(rg_lru(*strided, p, h0, reset), expected, strict=True):
        assert_close(found, wanted, **tolerance)
    twice = torch.stack([x, x], dim=-1).flatten(2)[..., ::2]
    a = torch.sigmoid(ga)
    assert_close(linear_scan(twice, a, h0)[0], linear_scan(x, a, h0)[0], **tolerance)
    weight, bias = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found, wanted = (causal_conv1d(t, weight, bias, None, reset)[0] for t in (strided[0], x))
    assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_pass_opcheck(dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd registration, compilation: what lets kernels and torch.compile compose."""
    B, T, R = 2, 70, 4
    x, gx, ga = (torch.randn(B, T, R, dtype=dtype, requires_grad=True) for _ in range(3))
    p, h0 = torch.randn(R, requires_grad=True), torch.randn(B, R, requires_grad=True)
    reset = resets(B, T, [3])
    weight, bias = torch.randn(R, 4, requires_grad=True), torch.randn(R, requires_grad=True)
    state = torch.randn(B, 3, R, dtype=dtype, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.griffin.linear_scan.default, (x, torch.sigmoid(ga), h0), test_utils=tests)
    for mask in (reset, None):
        arguments = (x, gx, ga, p, h0, mask, 1000.0, True)
        torch.library.opcheck(torch.ops.griffin.rg_lru.default, arguments, test_utils=tests)
        conv = (x, weight, bias, state, mask)
        torch.library.opcheck(torch.ops.griffin.causal_conv1d.default, conv, test_utils=tests)


def test_errors_say_what_does_not_fit() -> None:
    x = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\).*\(2, 5, 3\)"):
        linear_scan(x, torch.rand(2, 5, 3))
    with pytest.raises(ValueError, match="T>0"):
        linear_scan(x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=r"h0 is \(2, 4\) torch.bfloat16"):
        linear_scan(x, x, torch.zeros(2, 4).bfloat16())
    with pytest.raises(ValueError, match="recurrent_param"):
        rg_lru(x, x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="reset"):
        rg_lru(x, x, x, torch.zeros(4), reset=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="input_gate"):
        rg_lru(x, x.bfloat16(), x, torch.zeros(4))
    with pytest.raises(ValueError, match="state is"):
        causal_conv1d(x, torch.zeros(4, 4), torch.zeros(4), torch.zeros(2, 2, 4))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate_closed_by_padding_has_no_gradient_without_a_bound(dtype: torch.dtype, kernels: bool) -> None:
    """There a = 1: the square root's derivative is unbounded, and what it is multiplied with is 0."""
    x, p = torch.randn(1, 2, 3, dtype=dtype), torch.randn(3, dtype=dtype, requires_grad=True)
    gate = torch.zeros(1, 2, 3, dtype=dtype)
    gate[:, 1] = -torch.inf
    with contextlib.nullcontext() if kernels else library.without_kernels():
        y, _ = rg_lru(x, x, gate, p, max_sqrt_gradient=None)
        (found,) = torch.autograd.grad(y[:, 0].sum(), p)
        y, _ = rg_lru(x[:, :1], x[:, :1], gate[:, :1], p, max_sqrt_gradient=None)
        (wanted,) = torch.autograd.grad(y.sum(), p)
    assert_close(found, wanted)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("place", ["h0", "x"])
@pytest.mark.parametrize("T", [5, 200])
def test_what_a_reset_forgets_may_be_nan(T: int, place: str, kernels: bool) -> None:
    start = T - 3
    x, h0, p = torch.randn(2, T, 3), torch.randn(2, 3), torch.randn(3)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[0, start] = True
    spoiled_x, spoiled_h0 = x.clone(), h0.clone()
    (spoiled_h0 if place == "h0" else spoiled_x[:, 1]).fill_(torch.nan)
    results = []
    with contextlib.nullcontext() if kernels else library.without_kernels():
        for given, state in ((spoiled_x, spoiled_h0), (x, h0)):
            leaves = [t.clone().requires_grad_() for t in (given, given, given)]
            y, last = rg_lru(*leaves, p, state, reset)
            grads = torch.autograd.grad(y[0, start:].sum() + last[0].sum(), leaves)
            results.append([y, last[:1], *(grad[0, start:] for grad in grads)])
    found, wanted = results
    assert found[0][1].isnan().any()
    found[0], wanted[0] = found[0][0, start:], wanted[0][0, start:]
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)


def test_second_derivatives_are_refused_not_dropped() -> None:
    """A gradient penalty on a kernel's gradient would count for nothing."""
    x, y = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(1, 4, 2, 8, requires_grad=True)
    cos, sin = rope_table(torch.arange(4)[None], 8)
    runs = (
        lambda: rms_norm(x, torch.zeros(8), 1e-6),
        lambda: geglu(x, y),
        lambda: rope(x, cos, sin),
        lambda: local_attention(x, y, y, torch.arange(4)[None], 2),
        lambda: rg_lru(x[0], x[0], x[0], torch.zeros(8))[0],
    )
    for run in runs:
        with pytest.raises(RuntimeError):
            torch.autograd.grad(torch.autograd.grad(run().sum(), x, create_graph=True)[0].sum(), x)
