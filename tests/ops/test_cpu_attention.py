"""ring_attention's kernel against its formula in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from griffin.ops import ring_attention
from tests.ops.test_cpu_kernels import INSTRUCTIONS, PATHS, serving

SIZES = [
    (1, 1, 1, 1, 1),
    (2, 5, 3, 1, 7),
    (1, 64, 4, 2, 8),
    (3, 65, 6, 1, 33),
    (2, 129, 10, 1, 256),
    (1, 200, 8, 4, 16),
]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(request.param):
        yield request.param


def formula(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    B, _, H, K = q.shape
    for b in range(B):
        seen = min(int(positions[b]), k.shape[1] - 1) + 1
        for h in range(H):
            g = h // (H // k.shape[2])
            out[b, 0, h] = torch.softmax(k[b, :seen, g] @ q[b, 0, h] * K**-0.5, dim=0) @ v[b, :seen, g]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("B", "S", "H", "G", "K"), SIZES)
def test_ring_attention_is_its_formula(path: str, B: int, S: int, H: int, G: int, K: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((B, 1, H, K), (B, S, G, K), (B, S, G, K)))
    for first in {0, S // 2, S - 1, S + 3}:
        positions = (torch.arange(B)[:, None] * 7 + first).clamp(min=0)
        expected = formula(q.double(), k.double(), v.double(), positions)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
        with torch.no_grad():
            found = ring_attention(q, k, v, positions)
            assert found.dtype == dtype
            assert (found - expected).abs().max() < tolerance * expected.abs().max().clamp(min=0.1)
            strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (q, k, v)]
            again = ring_attention(*strided, positions)
            assert (again - found).abs().max() <= (0 if path != "torch" and dtype != torch.float64 else tolerance)


def test_slots_that_hold_nothing_are_not_read() -> None:
    q, k, v = torch.randn(2, 1, 6, 32), torch.randn(2, 100, 1, 32), torch.randn(2, 100, 1, 32)
    positions = torch.tensor([[3], [70]])
    expected = formula(q, k, v, positions)
    for t in (k, v):
        t[0, 4:] = torch.nan
        t[1, 71:] = torch.nan
    for instructions in INSTRUCTIONS:
        with serving(instructions), torch.no_grad():
            torch.testing.assert_close(ring_attention(q, k, v, positions), expected)


def test_large_scores_do_not_overflow(path: str) -> None:
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 150, 1, 16), torch.randn(1, 150, 1, 16)
    positions = torch.tensor([[149]])
    with torch.no_grad():
        for size in (1e3, -1e3):
            found = ring_attention(q * size, k, v, positions)
            torch.testing.assert_close(found.double(), formula((q * size).double(), k.double(), v.double(), positions))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_rows_and_threads_give_the_same_bits(instructions: str) -> None:
    q, k, v = torch.randn(4, 1, 6, 64), torch.randn(4, 500, 2, 64), torch.randn(4, 500, 2, 64)
    positions = torch.tensor([[3], [70], [400], [900]])
    before = torch.get_num_threads()
    with serving(instructions), torch.no_grad():
        expected = ring_attention(q, k, v, positions)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert torch.equal(ring_attention(q, k, v, positions), expected)
            assert torch.equal(ring_attention(q[2:3], k[2:3], v[2:3], positions[2:3]), expected[2:3])
    torch.set_num_threads(before)
