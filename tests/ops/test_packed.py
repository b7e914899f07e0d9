"""The ops over time on packed rows: each row is what it is alone, and what another holds moves none of its bits.

The definitions in fp64 against formulas token by token, the kernels for each instruction set against each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from griffin.ops import causal_conv1d, local_attention, rg_lru
from griffin.ops.attention import packed_rows
from griffin.ops.cpu import library
from griffin.ops.packed import check_offsets
from tests.ops import reference
from tests.ops.test_cpu_kernels import INSTRUCTIONS, PATHS, serving

COUNTS = [1, 0, 2, 3, 70, 0, 1, 64, 129, 1, 0]  # around the taps, the convolution's span and a chunk; empty at the end
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(request.param):
        yield request.param


@pytest.fixture(params=INSTRUCTIONS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of these bits are promised; PyTorch's, which the definitions use, promise none across shapes and threads."""
    with serving(request.param):
        yield request.param


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)])


def slices(counts: list[int]) -> list[slice]:
    ends = list(accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def starts(counts: list[int], every: int = 3) -> Tensor:
    """The first token of every third row starts a document, and so does one inside the longest."""
    reset = torch.zeros(1, sum(counts), dtype=torch.bool)
    for b, own in enumerate(slices(counts)):
        if counts[b] and b % every == 0:
            reset[0, own.start] = True
    longest = max(range(len(counts)), key=counts.__getitem__)
    reset[0, slices(counts)[longest].start + counts[longest] // 2] = True
    return reset


def lru_inputs(counts: list[int], R: int, dtype: torch.dtype) -> list[Tensor]:
    """x, both gates, parameter and state, with decays of 0.9 to 0.999."""
    T, state = sum(counts), torch.promote_types(dtype, torch.float32)
    activations = [torch.randn(1, T, R).to(dtype) for _ in range(3)]
    return [*activations, torch.randn(R, dtype=state) - 4, torch.randn(len(counts), R, dtype=state)]


def conv_inputs(counts: list[int], R: int, taps: int, dtype: torch.dtype) -> list[Tensor]:
    """x, state, weight, bias."""
    x, state = torch.randn(1, sum(counts), R), torch.randn(len(counts), taps - 1, R)
    return [x.to(dtype), state.to(dtype), torch.randn(R, taps).to(dtype), torch.randn(R).to(dtype)]


@pytest.mark.parametrize("unscaled", [True, False])
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum))
def test_the_definitions_are_the_formulas_of_each_row_with_gradients(unscaled: bool, counts: list[int]) -> None:
    offsets, reset = offsets_of(counts), starts(counts)
    for op, formula, inputs, stated in (
        (
            lambda x, gx, ga, p, h: rg_lru(x, gx, ga, p, h, reset, offsets=offsets, unscaled_first_token=unscaled),
            lambda x, gx, ga, p, h, some: (
                y := reference.rg_lru(x, gx, ga, p, h, some, unscaled=unscaled),
                y[:, -1],
            ),
            lru_inputs(counts, 3, torch.float64),
            4,
        ),
        (
            lambda x, state, w, b: causal_conv1d(x, w, b, state, reset, offsets=offsets),
            lambda x, state, w, b, some: reference.causal_conv1d(x, w, b, state, some),
            conv_inputs(counts, 3, 4, torch.float64),
            1,
        ),
    ):
        leaves = [t.requires_grad_() for t in inputs]
        outputs, after = [], list(leaves[stated].split(1))
        for b, own in enumerate(slices(counts)):
            if counts[b]:
                row = [t[:, own] if t.shape[:2] == (1, sum(counts)) else t for t in leaves]
                row[stated] = after[b]
                y, after[b] = formula(*row, reset[:, own])
                outputs.append(y)
        wanted = (torch.cat(outputs, dim=1), torch.cat(after))
        found = op(*leaves)
        flows = [torch.randn_like(t) for t in wanted]
        for ours, exact in zip(found, wanted, strict=True):
            assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(outputs, leaves, flows, materialize_grads=True) for outputs in (found, wanted)]
        for ours, exact in zip(*grads, strict=True):
            assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 33, 600])
@torch.no_grad()
def test_each_row_of_a_recurrence_has_the_bits_it_has_alone(kernels: str, R: int, dtype: torch.dtype) -> None:
    counts, reset = COUNTS, starts(COUNTS)
    x, gx, ga, p, h0 = lru_inputs(counts, R, dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            y, last = rg_lru(x, gx, ga, p, h0, reset, offsets=offsets_of(counts))
        finally:
            torch.set_num_threads(1)
        for b, own in enumerate(slices(counts)):
            wanted = torch.empty(1, 0, R, dtype=dtype), h0[b : b + 1]
            if counts[b]:
                wanted = rg_lru(x[:, own], gx[:, own], ga[:, own], p, h0[b : b + 1], reset[:, own])
            assert torch.equal(y[:, own], wanted[0]), b
            assert torch.equal(last[b : b + 1], wanted[1]), b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@torch.no_grad()
def test_each_row_of_a_convolution_has_the_bits_it_has_alone(kernels: str, taps: int, dtype: torch.dtype) -> None:
    counts, reset = COUNTS, starts(COUNTS)
    for R in (1, 33, 300):
        x, state, w, b_ = conv_inputs(counts, R, taps, dtype)
        y, last = causal_conv1d(x, w, b_, state, reset, offsets=offsets_of(counts))
        for b, own in enumerate(slices(counts)):
            wanted = torch.empty(1, 0, R, dtype=dtype), state[b : b + 1]
            if counts[b]:
                wanted = causal_conv1d(x[:, own], w, b_, state[b : b + 1], reset[:, own])
            assert torch.equal(y[:, own], wanted[0]), (R, b)
            assert torch.equal(last[b : b + 1], wanted[1]), (R, b)


def attention_inputs(counts: list[int], earlier: list[int], dtype: torch.dtype, H: int, G: int) -> list[Tensor]:
    T, M, K = sum(counts), sum(earlier), 8
    shapes = [(1, T, H, K), (1, M + T, G, K), (1, M + T, G, K)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("window", [1, 16, None])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (4, 2)])
def test_each_row_of_attention_is_what_it_is_alone_with_gradients(
    path: str, window: int | None, heads: tuple[int, int]
) -> None:
    counts = [1, 0, 2, 16, 15, 17, 33, 1, 1, 5, 0]
    starting = [0, 9, 16, 0, 3, 100, 16, 40, 0, 1, 7]  # offset of each row's first token
    earlier = [0 if not n else s if window is None else min(s, window) for n, s in zip(counts, starting, strict=True)]
    earlier[5] -= (
        1  # not all that the row's first tokens might see is given: keys of the row before are not seen instead
    )
    rows = packed_rows(counts, earlier, torch.device("cpu"))
    keys_of = slices([n + s for n, s in zip(counts, earlier, strict=True)])
    positions = torch.cat([torch.arange(s, s + n) for n, s in zip(counts, starting, strict=True)])[None]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        q, k, v = (t.requires_grad_() for t in attention_inputs(counts, earlier, dtype, *heads))
        found = local_attention(q, k, v, positions, window, rows=rows)
        alone = [
            reference.local_attention(
                *(q[:, own].double(), k[:, seen].double(), v[:, seen].double()), positions[:, own], window
            )
            for own, seen in zip(slices(counts), keys_of, strict=True)
            if own.start < own.stop
        ]
        wanted = torch.cat(alone, dim=1)
        assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
        flow = torch.randn_like(found)
        grads = [torch.autograd.grad(out, (q, k, v), flow.to(out)) for out in (found, wanted)]
        for ours, exact in zip(*grads, strict=True):
            assert_close(ours, exact, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@torch.no_grad()
def test_what_one_row_holds_moves_no_bit_of_another(path: str, place: int, bad: float) -> None:
    """Not its activations, its gates, its keys nor its state; and decays near 1 carry nothing over."""
    counts = [5, 1, 70, 1, 9]
    own, offsets = slices(counts), offsets_of(counts)
    spoiled_row = [2, 1, 4][place]
    others = [b for b in range(len(counts)) if b != spoiled_row]
    x, gx, ga, p, h0 = lru_inputs(counts, 5, torch.float32)
    p = torch.full_like(p, -30)  # a = 1 to the last bit: whatever comes over stays
    conv = conv_inputs(counts, 5, 4, torch.float32)
    q, k, v = attention_inputs(counts, counts, torch.float32, 2, 1)
    rows = packed_rows(counts, counts, torch.device("cpu"))
    positions = torch.cat([torch.arange(n, 2 * n) for n in counts])[None]
    keys_of = slices([2 * n for n in counts])

    def run() -> list[Tensor]:
        y, last = rg_lru(x, gx, ga, p, h0, offsets=offsets)
        out, tail = causal_conv1d(conv[0], conv[2], conv[3], conv[1], offsets=offsets)
        seen = local_attention(q, k, v, positions, 8, rows=rows)
        return [
            torch.cat([t.flatten() for b in others for t in (y[0, own[b]], out[0, own[b]], seen[0, own[b]])]),
            torch.cat([t.flatten() for b in others for t in (last[b], tail[b])]),
        ]

    wanted = run()
    for tensor in (x, gx, ga, conv[0], q):
        tensor[0, own[spoiled_row]] = bad
    for tensor in (h0, conv[1]):
        tensor[spoiled_row] = bad
    for tensor in (k, v):
        tensor[0, keys_of[spoiled_row]] = bad
    for before, after in zip(wanted, run(), strict=True):
        assert torch.equal(before, after)


@torch.no_grad()
def test_strides_and_whole_tensors(path: str) -> None:
    counts = [3, 1, 6]
    offsets, other = offsets_of(counts), torch.stack([offsets_of(counts), torch.zeros(4).long()], dim=1)[:, 0]
    x, gx, ga, p, h0 = lru_inputs(counts, 5, torch.float32)
    far = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (x, gx, ga)]
    for found, wanted in zip(
        rg_lru(*far, p, h0, offsets=other), rg_lru(x, gx, ga, p, h0, offsets=offsets), strict=True
    ):
        if path == "torch":  # its exponentials may have other bits in another layout
            assert_close(found, wanted)
        else:
            assert torch.equal(found, wanted)
    one = rg_lru(x, gx, ga, p, h0[:1]), causal_conv1d(x, torch.ones(5, 4), p)
    whole = torch.tensor([0, 10])
    again = rg_lru(x, gx, ga, p, h0[:1], offsets=whole), causal_conv1d(x, torch.ones(5, 4), p, offsets=whole)
    for found, wanted in zip(sum(again, ()), sum(one, ()), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5], r"offsets \[0, 5\] must rise from 0 to T=4"),
        ([1, 4], "must rise from 0"),
        ([0, 3, 2, 4], "must rise"),
        ([0, -1, 4], "must rise"),
        ([0, 2**62, 4], "must rise"),
        ([], r"\(B \+ 1,\)"),
    ],
)
def test_offsets_that_do_not_cut_the_tokens(path: str, offsets: list[int], message: str) -> None:
    x, gx, ga, p, _ = lru_inputs([4], 3, torch.float32)
    cut = torch.tensor(offsets, dtype=torch.int64)
    state = torch.zeros(max(0, len(offsets) - 1), 3)
    for call in (
        lambda: rg_lru(x, gx, ga, p, state, offsets=cut),
        lambda: causal_conv1d(x, torch.ones(3, 2), p, state[:, None], offsets=cut),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="int32"):
        check_offsets(torch.tensor([0, 4], dtype=torch.int32), x)
    with pytest.raises(ValueError, match=r"\(2, 4, 3\)"):
        check_offsets(torch.tensor([0, 4]), x.expand(2, 4, 3))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("offsets", [[0, 5], [1, 4], [0, 3, 2, 4], [0, -1, 4], [0, 2**62, 4], [-(2**63), 4]])
def test_the_kernels_leave_no_memory_for_an_offset(instructions: str, offsets: list[int]) -> None:
    """Asked directly, past the op's own question, they say which offset it is and write nothing."""
    with serving(instructions):
        from griffin.ops.cpu import recurrence

        cut, B = torch.tensor(offsets), len(offsets) - 1
        x, h, out = torch.randn(1, 4, 3), torch.zeros(B, 3), torch.full((1, 4, 3), 7.0)
        tail, weight = torch.zeros(B, 1, 3), torch.ones(3, 2)
        wrong = recurrence._rg_lru_forward(
            torch.float32, x, x, x, h.new_zeros(3), h, None, cut, out, h, None, B, 4, 3, 1, 1
        )
        also = recurrence._causal_conv1d_forward(
            torch.float32, x, weight, h.new_zeros(3), tail, None, cut, out, tail, B, 4, 3, 2
        )
    assert wrong == also
    assert 1 <= wrong <= len(offsets)
    assert (out == 7).all()
    assert not h.any()


def test_the_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above compare the definition with itself."""
    if not library.status()[0]:
        pytest.skip(library.status()[1])
    from griffin.ops.cpu import recurrence

    called: list[str] = []

    def noted(name: str) -> Callable[..., object]:
        original = getattr(recurrence, name)
        return lambda *args: (called.append(name), original(*args))[1]

    for name in ("packed_rg_lru", "packed_causal_conv1d"):
        monkeypatch.setattr(recurrence, name, noted(name))
    x, gx, ga, p, h0 = lru_inputs([1, 3], 4, torch.float32)
    with torch.no_grad():
        rg_lru(x, gx, ga, p, h0, offsets=offsets_of([1, 3]))
        causal_conv1d(x, torch.ones(4, 4), p, offsets=offsets_of([1, 3]))
    assert called == ["packed_rg_lru", "packed_causal_conv1d"]
