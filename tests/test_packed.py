"""Packed rows through the whole model: each row is what it is alone, at any length and age, and knows no other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from griffin import Griffin, State
from griffin.infer.prefill import prefill, read_chunk

FAMILIES = ["griffin-tiny", "hawk-tiny", "transformer-tiny"]
W = 16  # the window of griffin-tiny
EXACT = {"rtol": 0, "atol": 1e-12}  # fp64
SAME = {"rtol": 0, "atol": 1e-5}  # as in test_model.py: logits of order 1 after sums in another order
MakeModel = Callable[..., Griffin]


def texts(counts: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 259, (count,), generator=generator).tolist() for count in counts]


def offsets_of(pieces: list[list[int]]) -> Tensor:
    return torch.tensor([0, *accumulate(map(len, pieces))])


def packed(model: Griffin, state: State, pieces: list[list[int]]) -> list[Tensor]:
    """What the model makes of each row's tokens, (t, D)."""
    tokens = torch.tensor([list(chain.from_iterable(pieces))])
    hidden = model(tokens, state, offsets=offsets_of(pieces))
    return list(hidden[0].split([len(piece) for piece in pieces]))


def aged(model: Griffin, ages: list[int]) -> State:
    """A state whose rows have read so many tokens."""
    state = model.new_state(len(ages))
    for row, text in enumerate(texts(ages, seed=7)):
        if text:
            one = model.new_state(1)
            model(torch.tensor([text]), one)
            state.set_rows_([row], one)
    return state


def assert_alone(model: Griffin, state: State, pieces: list[list[int]], tolerance: dict[str, float]) -> None:
    """Read pieces packed, and compare every result and the state with each row's own, alone."""
    singles = [state.rows([row]) for row in range(len(pieces))]
    found = packed(model, state, pieces)
    for row, (piece, single) in enumerate(zip(pieces, singles, strict=True)):
        if piece:
            assert_close(found[row], model(torch.tensor([piece]), single)[0], **tolerance)
        for name, tensor in single.tensors().items():
            mine = state.tensors()[name][row : row + 1]
            slots = min(tensor.shape[1], mine.shape[1]) if tensor.dim() > 1 else None
            assert_close(mine[:, :slots] if slots else mine, tensor[:, :slots] if slots else tensor, **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_every_length_at_every_age(make_model: MakeModel, family: str, dtype: torch.dtype) -> None:
    """Around the taps and the window: rows of one call, each beside all the others."""
    model = make_model(family, dtype=dtype)
    lengths, ages = [1, 2, 3, W - 1, W, W + 1, 2 * W], [0, 1, 2, 3, W - 1, W, W + 1, 10 * W + 5]
    pieces = texts([length for length in lengths for _ in ages])
    assert_alone(model, aged(model, ages * len(lengths)), pieces, EXACT if dtype == torch.float64 else SAME)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(
    calls=st.lists(st.lists(st.integers(0, 2 * W + 3), min_size=4, max_size=4).filter(sum), min_size=1, max_size=4),
    ages=st.lists(st.integers(0, 3 * W), min_size=4, max_size=4),
)
@torch.no_grad()
def test_any_split_is_the_text_read_alone(
    make_model: MakeModel, family: str, calls: list[list[int]], ages: list[int]
) -> None:
    """Packed calls one after another, then one token of each row by the ordinary call."""
    model = make_model(family, dtype=torch.float64)
    state = aged(model, ages)
    read = texts(ages, seed=7)
    for number, counts in enumerate(calls):
        pieces = texts(counts, seed=number)
        found = packed(model, state, pieces)
        for row, piece in enumerate(pieces):
            read[row] += piece
            if piece:
                assert_close(found[row], model(torch.tensor([read[row]]))[0, -len(piece) :], **EXACT)
    assert state.position.tolist() == [len(text) for text in read]
    assert state.longest >= max(map(len, read))
    following = texts([1] * 4, seed=99)
    found = model(torch.tensor(following), state)
    for row, piece in enumerate(following):
        assert_close(found[row, 0], model(torch.tensor([read[row] + piece]))[0, -1], **EXACT)


@pytest.mark.parametrize("taps", [1, 2, 8])
@torch.no_grad()
def test_other_numbers_of_taps(make_model: MakeModel, taps: int) -> None:
    model = make_model(conv_width=taps)
    lengths = [max(1, taps - 2), max(1, taps - 1), taps, taps + 1, 1, 0]
    assert_alone(model, aged(model, [0, 1, taps, 40, 2, 3]), texts(lengths), SAME)


@torch.no_grad()
def test_bf16(make_model: MakeModel) -> None:
    model = make_model(dtype=torch.bfloat16)
    assert_alone(model, aged(model, [0, 3, 40, 16]), texts([1, 33, 2, 17]), {"rtol": 0, "atol": 0.06})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_a_row_holds_moves_no_bit_of_another(make_model: MakeModel, family: str) -> None:
    """A state of NaN, as of a slot that was freed, and other tokens: the other rows' bits are the same."""
    model = make_model(family)
    for layer in model.blocks:
        if hasattr(layer.temporal_block, "rg_lru"):
            layer.temporal_block.rg_lru.recurrent_param.fill_(-9)  # a of 0.999 and more: nothing fades
    pieces = texts([1, 20, 3, 1, 17])
    for spoiled in (1, 3, None):
        states = [aged(model, [40, 5, 0, 16, 3]) for _ in range(2)]
        if spoiled is None:  # a row that stays out of the call
            pieces[2] = []
        row = 2 if spoiled is None else spoiled
        for name, tensor in states[1].tensors().items():
            if name != "position":
                tensor[row] = torch.nan
        left, right = (packed(model, state, pieces) for state in states)
        for other in set(range(5)) - {row}:
            assert torch.equal(left[other], right[other])
            for name, tensor in states[0].tensors().items():
                assert torch.equal(tensor[other], states[1].tensors()[name][other]), name
        if spoiled is not None:
            assert right[row].isnan().any()
            continue
        for name, tensor in states[1].tensors().items():  # of the row nothing was written (slots may have been added)
            assert name == "position" or tensor[row][:4].isnan().all(), name


@torch.no_grad()
def test_slots_of_nan_are_not_seen(make_model: MakeModel) -> None:
    """A new row in a slot that was poisoned when it was freed reads as in zeros."""
    model, pieces = make_model(), texts([1, 5, W + 3, 2])
    states = [model.new_state(4) for _ in range(2)]
    for name, tensor in states[1].tensors().items():
        if name != "position":
            tensor.fill_(torch.nan)
    for left, right in zip(*(packed(model, state, pieces) for state in states), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_state_it_is_training_on_packed_documents(make_model: MakeModel, family: str) -> None:
    model, pieces = make_model(family), texts([1, 7, 0, 20, 3])
    tokens = torch.tensor([list(chain.from_iterable(pieces))])
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])[None]
    assert torch.equal(model(tokens, offsets=offsets_of(pieces).to(torch.uint8)), model(tokens, positions=positions))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_row_alone(make_model: MakeModel, family: str) -> None:
    model = make_model(family, dtype=torch.float64)
    pieces = texts([1, 18, 3])
    with torch.no_grad():
        state = aged(model, [20, 3, 0])
    singles = [state.rows([row]) for row in range(3)]
    found = torch.cat(packed(model, state, pieces))
    wanted = torch.cat([model(torch.tensor([p]), s)[0] for p, s in zip(pieces, singles, strict=True)])
    flow, parameters = torch.randn_like(found), list(model.parameters())
    grads = [torch.autograd.grad(out, parameters, flow, allow_unused=True) for out in (found, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_view_of_a_state_is_written_where_it_lies(make_model: MakeModel) -> None:
    model, pieces = make_model(), texts([2, 19])
    state = aged(model, [5, 20, 9])
    copy = state.clone()
    packed(model, state.head(2), pieces)
    packed(model, copy, [*pieces, []])
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, copy.tensors()[name]), name


@pytest.mark.parametrize(
    ("rows", "offsets", "more", "message"),
    [
        (1, [0, 2], {}, r"tokens is \(1, 3\) and offsets \[0, 2\]"),
        (2, [0, 2, 1, 3], {}, "rise from 0 to T"),
        (2, [1, 3], {}, "rise from 0 to T"),
        (3, [0, 1, 3], {}, "offsets have 2 rows, the state 3"),
        (1, [], {}, r"must be \(rows \+ 1,\) whole numbers"),
        (1, [0, 3], {"lengths": torch.tensor([3])}, "without positions and lengths"),
        (1, [0, 3], {"positions": torch.arange(3)[None]}, "without positions and lengths"),
    ],
)
@torch.no_grad()
def test_wrong_offsets_are_refused_before_anything_is_written(
    make_model: MakeModel, rows: int, offsets: list[int], more: dict[str, Tensor], message: str
) -> None:
    model = make_model()
    state = aged(model, [4] * rows)
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[1, 2, 3]]), state, offsets=torch.tensor(offsets, dtype=torch.int64), **more)
    with pytest.raises(ValueError, match="token 999"):
        model(torch.tensor([[1, 999]]), state.rows([0]), offsets=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="float32"):
        model(torch.tensor([[1, 2, 3]]), state, offsets=torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match=r"tokens is \(3, 1\)"):
        model(torch.tensor([[1], [2], [3]]), state, offsets=torch.tensor([0, 3]))
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name


@given(counts=st.lists(st.integers(0, 2 * W), min_size=1, max_size=5).filter(sum), chunk=st.integers(1, 3 * W))
@torch.no_grad()
def test_a_chunk_gives_each_rows_last_and_prefill_is_its_loop(
    make_model: MakeModel, counts: list[int], chunk: int
) -> None:
    model, pieces = make_model(dtype=torch.float64), texts(counts)
    state = aged(model, [0, W, 3, 50, 1][: len(counts)])
    singles, again = [state.rows([row]) for row in range(len(counts))], state.clone()
    some = [row for row, piece in enumerate(pieces) if piece]
    own = [state.rows([row]) for row in some]
    found = read_chunk(model, own, [pieces[row] for row in some])
    for row, hidden, mine in zip(some, found, own, strict=True):
        assert_close(hidden, model(torch.tensor([pieces[row]]), singles[row])[0], **EXACT)
        for name, tensor in mine.tensors().items():
            assert_close(tensor, singles[row].tensors()[name], **EXACT)
    last = torch.stack([hidden[-1] for hidden in found])
    assert_close(prefill(model, again.rows(some), [pieces[row] for row in some], chunk=chunk), last, **EXACT)
