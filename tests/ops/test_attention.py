"""local_attention, ring_attention, rope and the block-diagonal product against their formulas in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from griffin import Griffin
from griffin.ops import attention as module
from griffin.ops import block_diagonal_linear, local_attention, output_linear, ring_attention, rope, rope_table
from griffin.span import next_span_, span_of
from tests.ops import reference


def documents(B: int, T: int, start: int, where: list[int]) -> torch.Tensor:
    """Positions of B rows that go on at `start` and begin anew at the tokens named."""
    rows = []
    for b in range(B):
        position, row = start, []
        for t in range(T):
            position = 0 if (t - b) in where else position
            row.append(position)
            position += 1
        rows.append(row)
    return torch.tensor(rows)


@given(
    T=st.integers(1, 40),
    earlier=st.integers(0, 12),
    window=st.one_of(st.none(), st.integers(1, 20)),
    where=st.lists(st.integers(0, 39), max_size=3),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2)]),
)
def test_local_attention_is_its_formula(
    T: int, earlier: int, window: int | None, where: list[int], heads: tuple[int, int]
) -> None:
    H, G = heads
    q = torch.randn(2, T, H, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, earlier + T, G, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positions = documents(2, T, earlier, where)
    expected = reference.local_attention(q, k, v, positions, window)
    original, module.QUERY_CHUNK = module.QUERY_CHUNK, 7  # several chunks at these sizes
    try:
        found = local_attention(q, k, v, positions, window)
        cotangent = torch.randn_like(found)
        grads = torch.autograd.grad((found * cotangent).sum(), (q, k, v))
    finally:
        module.QUERY_CHUNK = original
    assert_close(found, expected)
    for grad, wanted in zip(grads, torch.autograd.grad((expected * cotangent).sum(), (q, k, v)), strict=True):
        assert_close(grad, wanted)


@pytest.mark.parametrize("T", [255, 256, 257, 600])
def test_chunks_of_queries_do_not_show(T: int) -> None:
    q, k, v = torch.randn(1, T, 2, 4), torch.randn(1, T, 1, 4), torch.randn(1, T, 1, 4)
    positions = torch.arange(T)[None]
    expected = reference.local_attention(q.double(), k.double(), v.double(), positions, 50)
    assert_close(local_attention(q, k, v, positions, 50).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [0, 3, 8, 9, 100])
def test_ring_equals_the_window_it_holds(position: int) -> None:
    """Nine slots hold the token and the eight before it, in any rotation."""
    window, slots = 8, 9
    q = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    k, v = (torch.randn(2, position + 1, 2, 6, dtype=torch.float64) for _ in range(2))
    ring_k, ring_v = (torch.full((2, slots, 2, 6), 7.0, dtype=torch.float64) for _ in range(2))
    for p in range(max(0, position - window), position + 1):
        ring_k[:, p % slots], ring_v[:, p % slots] = k[:, p], v[:, p]
    positions = torch.full((2, 1), position)
    assert_close(ring_attention(q, ring_k, ring_v, positions), reference.local_attention(q, k, v, positions, window))


@given(st.integers(0, 2**21), st.sampled_from([4, 8]))
def test_rope_turns_by_position_times_frequency(position: int, width: int) -> None:
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    found = rope(x, *rope_table(torch.tensor([[position]]), width))[0, 0, 0]
    n = width // 2
    for i in range(n):
        angle = math.fmod(position * 10_000 ** (-2 * i / width), 2 * math.pi)
        first, second = x[0, 0, 0, i].item(), x[0, 0, 0, i + n].item()
        assert found[i].item() == pytest.approx(first * math.cos(angle) - second * math.sin(angle), abs=1e-6)
        assert found[i + n].item() == pytest.approx(second * math.cos(angle) + first * math.sin(angle), abs=1e-6)
    assert torch.equal(found[width:], x[0, 0, 0, width:])


def test_block_diagonal_linear_is_a_matrix_with_blocks() -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    dense = torch.block_diag(*weight)
    assert_close(block_diagonal_linear(x, weight, bias), x @ dense + bias.flatten())


def test_output_linear_never_rounds_sums_to_bf16() -> None:
    hidden, weight = torch.randn(2, 3, 64).bfloat16(), torch.randn(9000, 64).bfloat16()
    with torch.no_grad():
        found = output_linear(hidden, weight)
    assert found.dtype == torch.float32
    assert_close(found.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_errors_say_what_does_not_fit() -> None:
    q, k = torch.randn(1, 4, 4, 6), torch.randn(1, 4, 3, 6)
    with pytest.raises(ValueError, match="H a multiple of G"):
        local_attention(q, k, k, torch.arange(4)[None], 2)
    with pytest.raises(ValueError, match="positions"):
        local_attention(q, k[:, :, :1], k[:, :, :1], torch.arange(3)[None], 2)
    with pytest.raises(ValueError, match="window=0"):
        local_attention(q, k[:, :, :1], k[:, :, :1], torch.arange(4)[None], 0)
    with pytest.raises(ValueError, match="12 channels"):
        block_diagonal_linear(torch.randn(1, 1, 12), torch.randn(2, 4, 4), torch.randn(2, 4))


def test_the_table_of_an_fp64_model_is_in_fp64(make_model: Callable[..., Griffin]) -> None:
    """Its cos and sin were once rounded to fp32, which moved the reference's logits by 1e-7."""
    positions = torch.tensor([[0, 1, 999_999]])
    cos, sin = rope_table(positions, 8, dtype=torch.float64)
    for i, p in enumerate(positions[0].tolist()):
        for j in range(4):
            angle = p * 10_000.0 ** (-j / 4)
            assert abs(cos[0, i, j].item() - math.cos(angle)) < 1e-9
            assert abs(sin[0, i, j].item() - math.sin(angle)) < 1e-9
    assert (cos[0, 1] - cos[0, 1].float()).abs().max() > 1e-9  # so the rounding shows
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        wanted = torch.promote_types(dtype, torch.float32)
        model = make_model(dtype=dtype)
        state, tokens = model.new_state(1), torch.ones(1, 3, dtype=torch.int64)
        for span in (
            span_of(model.config, tokens, None, None, None, None, model.activation_dtype),
            span_of(model.config, tokens, state, None, None, None, model.activation_dtype),
            next_span_(model.config, state, model.activation_dtype),
        ):
            assert span.cos.dtype == span.sin.dtype == wanted


def test_an_fp64_model_rotates_by_exact_angles(
    make_model: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model(dtype=torch.float64), torch.arange(20)[None]
    found = model(tokens)

    def exact(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n = cos.shape[-1]
        angles = torch.arange(20).double()[:, None] * 10_000.0 ** -(torch.arange(n).double() / n)
        return rope(x, angles.cos()[None], angles.sin()[None])

    monkeypatch.setattr("griffin.model.rope", exact)
    assert_close(found, model(tokens), rtol=0, atol=1e-12)
