"""Packed rows by Triton's kernels: each row alone in fp64, and bit for bit what the same kernels make of it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are in Triton's language: pip install triton")

from griffin import Griffin
from griffin.ops import causal_conv1d, device, rg_lru
from tests.ops.test_packed import conv_inputs, lru_inputs, offsets_of, slices, starts
from tests.ops.triton.running import DEVICE, TOLERANCE, assert_near, launches

COUNTS = [1, 0, 3, 70, 129, 0]  # around the taps, a tile of either kernel, and more than one
LAUNCHED = {"rg_lru": ["_forward_kernel"], "causal_conv1d": ["_conv_forward"]}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def recurrence(
    counts: list[int], R: int, dtype: torch.dtype
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]], int]:
    """Inputs, the op of them, and which is the state."""
    return (
        lru_inputs(counts, R, dtype),
        lambda x, gx, ga, p, h, reset, **more: rg_lru(x, gx, ga, p, h, reset, **more),
        4,
    )


def convolution(
    counts: list[int], R: int, dtype: torch.dtype, taps: int = 4
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]], int]:
    return (
        conv_inputs(counts, R, taps, dtype),
        lambda x, state, w, b, reset, **more: causal_conv1d(x, w, b, state, reset, **more),
        1,
    )


def rows(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], counts: list[int], stated: int, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each alone."""
    outputs, after = [], list(inputs[stated].split(1))
    for b, own in enumerate(slices(counts)):
        if counts[b]:
            row = [t[:, own] if t.shape[:2] == (1, sum(counts)) else t for t in inputs]
            row[stated] = after[b]
            y, after[b] = op(*row, None if reset is None else reset[:, own])
            outputs.append(y)
    return torch.cat(outputs, dim=1), torch.cat(after)


@pytest.mark.parametrize("make", [recurrence, convolution])
@pytest.mark.parametrize(
    ("R", "dtype", "resets"),
    [
        (3, torch.bfloat16, True),
        pytest.param(1, torch.float32, False, marks=pytest.mark.slow),
        pytest.param(33, torch.float32, True, marks=pytest.mark.slow),
        pytest.param(33, torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_each_row_is_what_it_is_alone(make: Callable[..., object], R: int, dtype: torch.dtype, resets: bool) -> None:
    inputs, op, stated = make(COUNTS, R, dtype)
    inputs = [t.to(DEVICE) for t in inputs]
    reset = starts(COUNTS).to(DEVICE) if resets else None
    with launches() as names:
        found = op(*inputs, reset, offsets=offsets_of(COUNTS).to(DEVICE))
    assert names in LAUNCHED.values()
    for ours, alone in zip(found, rows(op, inputs, COUNTS, stated, reset), strict=True):
        assert torch.equal(ours, alone)
    exact = rows(op, [t.double() for t in inputs], COUNTS, stated, reset)
    assert_near(found, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("taps", [1, 2, 8])
def test_other_numbers_of_taps(taps: int) -> None:
    inputs, op, stated = convolution(COUNTS, 5, torch.float32, taps)
    found = op(*inputs, starts(COUNTS), offsets=offsets_of(COUNTS))
    for ours, alone in zip(found, rows(op, inputs, COUNTS, stated, starts(COUNTS)), strict=True):
        assert torch.equal(ours, alone)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("make", [recurrence, convolution])
def test_what_one_row_holds_moves_no_bit_of_another(make: Callable[..., object]) -> None:
    counts = [5, 1, 70, 9]
    inputs, op, stated = make(counts, 3, torch.float32)
    if make is recurrence:
        inputs[3].fill_(-30)  # a = 1 to the last bit
    clean = op(*inputs, None, offsets=offsets_of(counts))
    for row in (1, 2) if make is convolution else (2,):  # an interpreted scan takes a second
        spoiled = [t.clone() for t in inputs]
        for tensor in spoiled:
            if tensor.shape[:2] == (1, sum(counts)):
                tensor[0, slices(counts)[row]] = torch.nan
        spoiled[stated][row] = torch.nan
        y, last = op(*spoiled, None, offsets=offsets_of(counts))
        for other in set(range(4)) - {row}:
            own = slices(counts)[other]
            assert torch.equal(y[:, own], clean[0][:, own])
            assert torch.equal(last[other], clean[1][other])
        assert y[:, slices(counts)[row]].isnan().all()


@pytest.mark.parametrize("offsets", [[0, 9, 4], [-(2**62), 2, 4], [0, 2**62, 4], [0, 3, 2**33], [4, 0, 4]])
def test_no_offset_leads_out_of_the_tokens(offsets: list[int]) -> None:
    """Their values are not asked on a GPU; past the op's question, results are of no use and memory is whole."""
    from griffin.ops.triton import causal_conv1d as convs
    from griffin.ops.triton import rg_lru as lrus

    T, R, cut = 4, 3, torch.tensor(offsets, device=DEVICE)
    around = torch.full((3, T, R), 7.0, device=DEVICE)
    x = around[1:2]
    y, last = lrus.packed_rg_lru(x, x, x, x[0, 0], around[0, :2], None, cut, True)
    out, tail = convs.packed_causal_conv1d(x, x[0].T, x[0, 0], around[0:2, :3], None, cut)
    assert [t.shape for t in (y, last, out, tail)] == [(1, T, R), (2, R), (1, T, R), (2, 3, R)]
    assert (around == 7).all()


@pytest.mark.slow
def test_a_model_reads_packed_rows_by_them(make_model: Callable[..., Griffin]) -> None:
    model = make_model("griffin-tiny", window=4).to(DEVICE)
    ids = torch.randint(0, 259, (1, 9), device=DEVICE)
    state = model.new_state(3)
    with launches() as names:
        model(ids, state, offsets=torch.tensor([0, 2, 2, 9]))
        found = model(ids, state, offsets=torch.tensor([0, 1, 3, 9]))
    assert {"_conv_forward", "_forward_kernel"} <= set(names)
    wanted = model(torch.cat([ids[:, 2:9], ids[:, 3:9]], dim=1))[:, 7:]
    assert device.status(ids.device)[0]
    torch.testing.assert_close(found[:, 3:], wanted, rtol=0, atol=1e-5)
