"""The loss's Triton kernel against the definition in fp64: nats, gradients, and the tanh inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from griffin import ops
from griffin.loss import cross_entropy
from tests.ops.triton.running import DEVICE, TOLERANCE, assert_near, launches, strided

triton = pytest.importorskip("triton", reason="the kernels' language is not installed")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("griffin.ops.triton.cross_entropy")


def inputs(n: int, V: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits, and targets among which are the first token, the last, and (at 1, if there) one that is not counted."""
    targets = torch.randint(0, V, (n,))
    targets[0] = V - 1
    targets[1:2], targets[2:3] = -1, 0
    return scale * torch.randn(n, V, device=DEVICE), targets.to(DEVICE)


@pytest.mark.parametrize(("n", "V"), [(1, 1), (4, 37), (3, 4096), (3, 9000)])  # one block of the vocabulary, and three
@pytest.mark.parametrize("cap", [None, 30.0, 1.5])
@pytest.mark.parametrize("slopes", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_its_definition(n: int, V: int, cap: float | None, slopes: torch.dtype) -> None:
    logits, targets = inputs(n, V, scale=3.0)
    nats, d_logits = kernels.cross_entropy(logits, targets, cap, slopes)
    wanted = ops.cross_entropy(logits.double(), targets, cap, torch.float64)
    assert d_logits.dtype == slopes
    assert_near([nats], wanted[:1], TOLERANCE[torch.float32])
    assert_near([d_logits], wanted[1:], TOLERANCE[slopes])
    alone, none = kernels.cross_entropy(logits, strided(targets), cap, None)
    assert none is None
    assert torch.equal(alone, nats)
    assert torch.equal(kernels.cross_entropy(logits, targets, cap, slopes)[1], d_logits)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_takes_the_kernel(dtype: torch.dtype, cap: float | None) -> None:
    hidden, embedding = torch.randn(2, 6, 16, device=DEVICE).to(dtype), torch.randn(300, 16, device=DEVICE).to(dtype)
    targets = torch.randint(-1, 300, (2, 6), device=DEVICE)
    targets[0, :2] = -1
    found = {}
    with launches() as names:
        for kind in (dtype, torch.float64):
            leaves = [t.to(kind).requires_grad_() for t in (hidden, embedding)]
            nats, count = cross_entropy(*leaves, targets, soft_cap=cap, chunk_tokens=5)
            found[kind] = [nats.detach(), *torch.autograd.grad(3 * nats, leaves)]
            assert int(count) == int((targets != -1).sum())
        assert names == ["_cross_entropy"] * 3  # three chunks, and none in fp64
        with torch.no_grad():
            assert torch.equal(
                cross_entropy(hidden, embedding, targets, soft_cap=cap, chunk_tokens=5)[0], found[dtype][0]
            )
        assert len(names) == 6
    assert_near(found[dtype], found[torch.float64], TOLERANCE[dtype])
    assert not found[dtype][1][0, :2].any()


def test_large_logits() -> None:
    """Where exp of a logit, or of a difference, is infinite or nothing."""
    logits, targets = inputs(3, 5000, scale=300.0)
    logits[2] = torch.linspace(-2e4, 2e4, 5000)  # each block's largest is above all before it
    for cap in (None, 30.0):
        nats, d_logits = kernels.cross_entropy(logits, targets, cap, torch.float32)
        wanted, slopes = ops.cross_entropy(logits.double(), targets, cap, torch.float64)
        assert_near([nats, d_logits], [wanted, slopes], 2e-6)


def test_rows_that_do_not_count_are_zero_whatever_they_hold() -> None:
    logits, targets = inputs(3, 37)
    logits[1, 20] = torch.nan
    nats, d_logits = kernels.cross_entropy(logits, targets, 30.0, torch.bfloat16)
    assert nats[1] == 0
    assert not d_logits[1].any()
    logits[0, 5] = torch.nan
    nats, d_logits = kernels.cross_entropy(logits, targets, 30.0, torch.bfloat16)
    assert torch.isnan(nats[0])
    assert torch.isnan(d_logits[0]).all()
    assert nats[2].isfinite()


@pytest.mark.parametrize("target", [-2, 37, 2**40])
def test_a_target_that_is_no_token_gives_nan(target: int) -> None:
    logits, targets = inputs(3, 37)
    targets[2] = target
    nats, _ = kernels.cross_entropy(logits, targets, 30.0, torch.float32)
    assert torch.isnan(nats[2])
    assert nats[:2].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # TorchDynamo does
def test_compiled_loss_holds_the_definition() -> None:
    hidden, embedding = torch.randn(1, 6, 8, device=DEVICE), torch.randn(20, 8, device=DEVICE)
    targets = torch.randint(-1, 20, (1, 6), device=DEVICE)

    def run(hidden: Tensor) -> Tensor:
        return cross_entropy(hidden, embedding, targets, soft_cap=30.0)[0]

    with launches() as names:
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden)
    assert names == []
    torch.testing.assert_close(compiled, run(hidden))


@triton.jit
def _apply_tanh(x, tanh, rest, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    t, r = kernels._tanh(value)
    tl.store(tanh + i, t, mask=i < n)
    tl.store(rest + i, r, mask=i < n)


def test_tanh_is_accurate() -> None:
    near_zero = torch.logspace(-30, 0, 4001)
    x = torch.cat([torch.linspace(-43, 43, 20_001), near_zero, -near_zero, torch.zeros(1)]).to(DEVICE)
    tanh, rest = torch.empty_like(x), torch.empty_like(x)
    _apply_tanh[(1,)](x, tanh, rest, x.numel(), BLOCK=2**15)
    torch.testing.assert_close(tanh.double(), x.double().tanh(), rtol=3e-7, atol=0)
    torch.testing.assert_close(rest.double(), x.double().cosh() ** -2, rtol=2e-6, atol=0)
