"""ring_attention's kernels against its formula in fp64, on a GPU or interpreted; and what they compile to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are in Triton's language: pip install triton")

from griffin.ops import ring_attention
from griffin.ops.triton import ring_attention as kernel
from tests.ops.triton.compiled import launched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value. bf16 rounds weights and the result by up to 2^-9 each.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}


def inputs(
    B: int, S: int, H: int, G: int, K: int, dtype: torch.dtype, device: str = DEVICE
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(B, 1, H, K), (B, S, G, K), (B, S, G, K)]
    q, k, v = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return q, k, v


def at(*positions: int) -> Tensor:
    return torch.tensor(positions, device=DEVICE)[:, None]


def formula(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Row by row and head by head, from slots that are seen alone."""
    (B, S, G, K), H = k.shape, q.shape[2]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for b in range(B):
        seen = min(int(positions[b, 0]), S - 1) + 1
        for h in range(H):
            keys, values = (t[b, :seen, h // (H // G)].double() for t in (k, v))
            out[b, 0, h] = torch.softmax(keys @ q[b, 0, h].double() * K**-0.5, dim=0) @ values
    return out


def check(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Slots that are not seen hold NaN, as does memory that nobody has written."""
    for b, p in enumerate(positions[:, 0].tolist()):
        k[b, p + 1 :] = torch.nan
        v[b, p + 1 :] = torch.nan
    with torch.no_grad():
        found = ring_attention(q, k, v, positions)
    wanted = formula(q, k, v, positions)
    assert found.dtype == q.dtype
    assert found.shape == q.shape
    assert (found.double() - wanted).abs().max() < TOLERANCE[q.dtype] * wanted.abs().max()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("S", [1, 2, 65, 257, 1025])
def test_slots_below_and_above_the_position(S: int, dtype: torch.dtype) -> None:
    """Rows stand before, at and after the end of a block, of a split and of the ring, which then is full."""
    positions = sorted({p for p in (0, 31, 32, 64, S - 2, S - 1) if 0 <= p < S} | {S, 10**6})
    check(*inputs(len(positions), S, 2, 1, 16, dtype), at(*positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [16, 64, 256])
@pytest.mark.parametrize(("H", "G"), [(1, 1), (2, 1), (6, 3), (6, 1), (10, 1)])
def test_heads_and_widths(H: int, G: int, K: int, dtype: torch.dtype) -> None:
    check(*inputs(2, 65, H, G, K, dtype), at(64, 20))


@pytest.mark.parametrize(
    ("H", "G", "K", "dtype"),
    [
        (17, 1, 16, torch.float32),
        (40, 2, 24, torch.bfloat16),
        (3, 3, 7, torch.float32),
        (4, 1, 200, torch.bfloat16),
        (10, 1, 64, torch.float16),
    ],
)
def test_more_heads_than_a_program_takes_and_any_width(H: int, G: int, K: int, dtype: torch.dtype) -> None:
    check(*inputs(2, 70, H, G, K, dtype), at(66, 500))


def test_long_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of global attention over more slots than MOST_SPLITS splits of SPLIT hold; not all are used."""
    monkeypatch.setattr(kernel, "MOST_SPLITS", 4)
    for position in (0, 191, 192, 300, 600):
        check(*inputs(1, 601, 2, 1, 16, torch.float32), at(position))


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """Nor on how many slots a ring has beyond what it sees, nor on the run."""
    q, k, v = inputs(3, 200, 4, 2, 16, torch.float32)
    positions = at(150, 3, 7000)
    found = check(q, k, v, positions)
    assert torch.equal(found, check(q, k, v, positions))
    for b in range(3):
        assert torch.equal(found[b : b + 1], check(q[b : b + 1], k[b : b + 1], v[b : b + 1], positions[b : b + 1]))
    assert torch.equal(found[:1], check(q[:1], k[:1, :151].clone(), v[:1, :151].clone(), positions[:1]))


@pytest.mark.parametrize("size", [5.0, 100.0])
def test_large_scores_do_not_overflow(size: float) -> None:
    """Of some 100 and 40 000; fp32 rounds the latter by 2e-3."""
    q, k, v = inputs(2, 300, 2, 1, 16, torch.float32)
    for sign in (1, -1):
        with torch.no_grad():
            found = ring_attention(sign * size * q, size * k, v, at(299, 299))
        wanted = formula(sign * size * q, size * k, v, at(299, 299))
        assert (found - wanted).abs().max() < 1e-2 * wanted.abs().max()


def test_strides_and_the_type_of_positions_do_not_matter() -> None:
    q, k, v = inputs(2, 70, 4, 2, 16, torch.float32)
    positions = at(66, 500)
    with torch.no_grad():
        wanted = ring_attention(q, k, v, positions)
        for first, second in ((0, 1), (1, 2), (1, 3), (2, 3)):
            strided = [t.transpose(first, second).contiguous().transpose(first, second) for t in (q, k, v)]
            assert torch.equal(ring_attention(*strided, positions), wanted)
        assert torch.equal(ring_attention(q, k, v, positions.int()), wanted)
        assert torch.equal(ring_attention(q, k, v, positions.repeat(1, 2)[:, :1]), wanted)


@pytest.mark.filterwarnings("ignore:(All-NaN slice|invalid value) encountered:RuntimeWarning")
def test_nan_that_is_seen_is_not_lost() -> None:
    for place in range(3):
        q, k, v = inputs(2, 200, 4, 2, 16, torch.float32)
        given = (q, k, v)
        given[place][0, 0 if place == 0 else 130] = torch.nan
        with torch.no_grad():
            bad = ring_attention(q, k, v, at(150, 150)).isnan()
        assert bad[0].all()
        assert not bad[1].any()


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not fp64, gradients, wider heads, or no rows."""
    called: list[int] = []
    original = kernel.ring_attention
    monkeypatch.setattr(kernel, "ring_attention", lambda *given: (called.append(1), original(*given))[1])
    positions = at(4)
    with torch.no_grad():
        ring_attention(*inputs(1, 5, 2, 1, 16, torch.float32), positions)
        assert len(called) == 1
        ring_attention(*inputs(1, 5, 2, 1, 16, torch.float64), positions)
        ring_attention(*inputs(1, 5, 2, 1, 264, torch.float32), positions)
        assert ring_attention(*inputs(0, 5, 2, 1, 16, torch.float32), positions[:0]).shape == (0, 1, 2, 16)
    q, k, v = inputs(1, 5, 2, 1, 16, torch.float32)
    ring_attention(q.requires_grad_(), k, v, positions).sum().backward()
    assert q.grad is not None
    assert len(called) == 1


def launch_all() -> None:
    """For tests.ops.triton.compiled: RecurrentGemma's heads, and a ring of one slot, a number Triton compiles in."""
    with torch.no_grad():
        ring_attention(*inputs(2, 1, 40, 2, 24, torch.float16, "cpu"), torch.tensor([[5], [5000]]))
        for dtype in (torch.bfloat16, torch.float32):
            ring_attention(*inputs(2, 2049, 10, 1, 256, dtype, "cpu"), torch.tensor([[5], [5000]]))


def test_no_register_spills_and_two_programs_fit_a_multiprocessor() -> None:
    launches = launched("tests.ops.triton.test_ring_attention")
    assert [launch["name"] for launch in launches] == ["_split_kernel", "_combine_kernel"] * 3
    for launch in launches:
        assert launch["spilled"] == 0, launch
        assert launch["shared"] < 100_000, launch
