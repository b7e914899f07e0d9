"""Whatever whole numbers a kernel is given, it stays in its memory and is right, or says ValueError.

tests/sanitize.py runs these under AddressSanitizer and UndefinedBehaviorSanitizer: there a step outside ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from griffin import Griffin
from griffin.infer.step import DecodeStep
from griffin.ops import (
    causal_conv1d,
    dequantize,
    embed,
    linear,
    local_attention,
    next_positions_,
    quantize_int4,
    quantize_int8,
    quantized_embed,
    quantized_linear,
    rg_lru,
    ring_attention,
    ring_write_,
    rope_table,
)
from griffin.ops.cpu import attention as cpp
from griffin.ops.cpu import library

pytestmark = pytest.mark.skipif(not library.status()[0], reason=f"no kernels: {library.status()[1]}")

LEAST, MOST = -(2**63), 2**63 - 1
EDGES = [LEAST, LEAST + 1, -(2**31), -1000, -65, -7, -1, 0, 1, 2, 6, 7, 8, 64, 1000, 2**31, 2**32, MOST - 1, MOST]
HOSTILE = st.one_of(st.sampled_from(EDGES), st.integers(-9, 9), st.integers(LEAST, MOST))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=library.offered(), autouse=True)
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.using(request.param):
        yield


def rows(count: int, length: int = 1) -> st.SearchStrategy[Tensor]:
    """(count, length) int64."""
    numbers = st.lists(HOSTILE, min_size=count * length, max_size=count * length)
    return numbers.map(lambda numbers: torch.tensor(numbers, dtype=torch.int64).view(count, length))


def near(found: Tensor, wanted: Tensor) -> None:
    tolerance = 1e-2 if found.dtype == torch.bfloat16 else 1e-5
    assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 7, 65])
@given(positions=rows(3))
@torch.no_grad()
def test_ring_write_keeps_to_its_slots(S: int, dtype: torch.dtype, positions: Tensor) -> None:
    k, v = torch.randn(3, 1, 2, 5).to(dtype), torch.randn(3, 1, 2, 5).to(dtype)
    found, wanted = torch.zeros(2, 3, S, 2, 5, dtype=dtype), torch.zeros(2, 3, S, 2, 5, dtype=dtype)
    ring_write_(*found, k, v, positions)
    for b, p in enumerate(positions[:, 0].tolist()):
        wanted[0, b, p % S], wanted[1, b, p % S] = k[b, 0], v[b, 0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 7, 130])
@given(positions=rows(3))
@torch.no_grad()
def test_ring_attention_sees_slots_that_there_are(S: int, dtype: torch.dtype, positions: Tensor) -> None:
    q, k, v = (torch.randn(3, n, h, 6).to(dtype) for n, h in ((1, 4), (S, 2), (S, 2)))
    found = ring_attention(q, k, v, positions)
    with library.without_kernels():
        near(found, ring_attention(q, k, v, positions))
        near(found, ring_attention(q, k, v, positions.clamp(0, S - 1)))


@pytest.mark.parametrize("window", [None, 1, 5])
@given(positions=rows(2, 9))
def test_local_attention_sees_keys_that_there_are(window: int | None, positions: Tensor) -> None:
    q, k, v = (torch.randn(2, n, h, 6, requires_grad=True) for n, h in ((9, 4), (12, 2), (12, 2)))
    found = local_attention(q, k, v, positions, window)
    grads = torch.autograd.grad(found.sum(), (q, k, v))
    with library.without_kernels():
        wanted = local_attention(q, k, v, positions, window)
        for ours, theirs in zip((found, *grads), (wanted, *torch.autograd.grad(wanted.sum(), (q, k, v))), strict=True):
            near(ours, theirs)
    with torch.no_grad():
        near(local_attention(q, k, v, positions, window), wanted)


@given(first=rows(5), backward=st.booleans())
def test_the_softmax_of_a_block_keeps_to_its_columns(first: Tensor, backward: bool) -> None:
    left, own, G, n, r, m = 3, 4, 2, 5, 2, 9
    scores, flow = torch.randn(G, n, r, m), torch.randn(G, n, r, m)
    if backward:
        cpp._softmax_backward(torch.float32, scores, flow, first[:, 0].contiguous(), 1.0, left, own, G, n, r, m)
    else:
        cpp._softmax_forward(torch.float32, scores, first[:, 0].contiguous(), 1.0, left, own, G, n, r, m)
    near(scores.sum(dim=-1), torch.ones(G, n, r))
    for t, begin in enumerate(first[:, 0].tolist()):
        seen = range(min(max(begin - left, 0), own + t), own + t + 1)
        assert [c for c in range(m) if scores[0, t, 0, c] != 0] == list(seen)


def _tables() -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each kernel that looks up rows of a table of 7, and the table."""
    table, found = torch.randn(7, 70), []
    for dtype in DTYPES:
        narrow = table.to(dtype)
        found.append((lambda ids, narrow=narrow: embed(ids, narrow, torch.float32), narrow.float()))
    for group in (None, 32, 128):
        q, scale = quantize_int8(table) if group is None else quantize_int4(table, group)
        run = lambda ids, q=q, scale=scale, group=group: quantized_embed(ids, q, scale, 70, group, torch.float32)  # noqa: E731
        found.append((run, dequantize(q, scale, 70, group)))
    return found


@given(ids=rows(2, 3))
@torch.no_grad()
def test_an_embedding_has_the_row_or_says_so(ids: Tensor) -> None:
    wrong = [int(i) for i in ids.flatten() if not 0 <= i < 7]
    for run, table in _tables():
        for tokens in (ids, ids.to(torch.int32)) if not wrong or abs(wrong[0]) < 2**31 else (ids,):
            if wrong:
                with pytest.raises(ValueError, match=rf"token {wrong[0]} is not within 0 \.\. 6"):
                    run(tokens)
            else:
                assert torch.equal(run(tokens), table[ids])
        assert torch.equal(run(ids % 7), table[ids % 7])


@given(positions=rows(2, 3))
@torch.no_grad()
def test_angles_of_any_position(positions: Tensor) -> None:
    cos, sin = rope_table(positions, 24)
    assert_close(cos.square() + sin.square(), torch.ones(2, 3, 12), rtol=0, atol=1e-6)
    small = positions % 1000
    with library.without_kernels():
        wanted = rope_table(small, 24)
    assert_close(rope_table(small, 24), wanted, rtol=0, atol=1.2e-7)


@given(positions=rows(4))
@torch.no_grad()
def test_the_next_position_of_any(positions: Tensor) -> None:
    position = positions[:, 0].clone()
    at, reset = next_positions_(position)
    assert torch.equal(at, positions)
    assert torch.equal(reset, positions == 0)
    assert torch.equal(position, positions[:, 0] + 1)


@given(bytes_=st.lists(st.integers(0, 255), min_size=2 * 70, max_size=2 * 70), needs_gradient=st.booleans())
def test_resets_of_any_byte(bytes_: list[int], needs_gradient: bool) -> None:
    raw = torch.tensor(bytes_, dtype=torch.uint8).view(2, 70)
    x = torch.randn(2, 70, 5, requires_grad=needs_gradient)
    weight, bias, p = torch.randn(5, 4), torch.randn(5), torch.randn(5)
    for op in (lambda r: rg_lru(x, x, x, p, reset=r), lambda r: causal_conv1d(x, weight, bias, reset=r)):
        results = []
        for reset in (raw.view(torch.bool), raw != 0):
            y, last = op(reset)
            grads = torch.autograd.grad(y.sum() + last.sum(), x) if needs_gradient else ()
            results.append([y, last, *grads])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("N", [1, 5, 40])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@given(data=st.data())
@torch.no_grad()
def test_quantised_weights_of_any_byte(N: int, group: int | None, data: st.DataObject) -> None:
    K, O = data.draw(st.integers(1, 200)), 9
    q, scale = quantize_int8(torch.randn(O, K)) if group is None else quantize_int4(torch.randn(O, K), group)
    fill = data.draw(st.sampled_from([0, 127, 128, 255, None]))
    noise = torch.randint(0, 256, q.shape, dtype=torch.uint8) if fill is None else torch.full(q.shape, fill).byte()
    q.copy_(noise.view(q.dtype))
    x = torch.randn(N, K)
    wide = dequantize(q, scale, K, group)
    with library.without_kernels():
        near(wide, dequantize(q, scale, K, group))
    found, wanted = quantized_linear(x, q, scale, None, group), x.double() @ wide.double().T
    assert (found - wanted).abs().max() <= 1e-4 * x.abs().max() * wide.abs().max() * K


@given(position=rows(2), tokens=rows(2, 3), data=st.data())
def test_a_state_that_claims_any_position(
    make_model: Callable[..., Griffin], position: Tensor, tokens: Tensor, data: st.DataObject
) -> None:
    """What a state of elsewhere says moves no memory but the state's, in a chunk, a token or a recorded step."""
    model = make_model(data.draw(st.sampled_from(["griffin-tiny", "transformer-tiny"])))
    state = model.new_state(2)
    with torch.no_grad():
        model(torch.randint(0, 9, (2, 3)), state)
        state.position.copy_(position[:, 0])
        step = DecodeStep(model, state)
        for _ in range(3):
            assert step(torch.tensor([1, 2])).shape == (2, model.config.vocab_size)
        model(torch.randint(0, 9, (2, 1)), state)
        model(torch.randint(0, 9, (2, 4)), state)
        bad = not bool(((tokens >= 0) & (tokens < model.config.vocab_size)).all())
        for call in (lambda: model(tokens, state), lambda: step(tokens[:, 0]) if bad else None):
            try:
                call()
            except ValueError:
                assert bad


@given(positions=rows(2, 3), lengths=rows(2))
def test_positions_and_lengths_of_a_call(
    make_model: Callable[..., Griffin], positions: Tensor, lengths: Tensor
) -> None:
    model, tokens = make_model(), torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad():
        lengths, state = lengths[:, 0], model.new_state(2)
        if ((lengths >= 0) & (lengths <= 3)).all():
            model(tokens, state, lengths=lengths)
            assert torch.equal(state.position, lengths)
        else:
            with pytest.raises(ValueError, match="lengths"):
                model(tokens, state, lengths=lengths)
            assert state.position.tolist() == [0, 0]
        try:
            model(tokens, positions=positions)
        except ValueError as error:
            assert "positions[" in str(error)  # noqa: PT017


def _wrong_shapes() -> dict[str, Callable[[], Any]]:
    ring, one = torch.zeros(2, 5, 1, 4), torch.zeros(2, 1, 1, 4)
    at, q8, q4 = (
        torch.zeros(2, 1, dtype=torch.int64),
        quantize_int8(torch.randn(6, 70)),
        quantize_int4(torch.randn(6, 70)),
    )
    ids, x = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 70)
    f32 = torch.float32
    return {
        "ring_write: positions": lambda: ring_write_(ring, ring.clone(), one, one, at[:1]),
        "ring_write: k": lambda: ring_write_(ring, ring.clone(), one[:1], one, at),
        "ring_write: v": lambda: ring_write_(ring, ring.clone(), one, one[..., :3], at),
        "ring_write: values": lambda: ring_write_(ring, ring[:, :4].clone(), one, one, at),
        "ring_write: no slots": lambda: ring_write_(ring[:, :0], ring[:, :0], one, one, at),
        "ring_attention: positions": lambda: ring_attention(one, ring, ring, at[:1]),
        "local_attention: positions": lambda: local_attention(one, one, one, at[:1], None),
        "linear: inputs": lambda: linear(x, torch.zeros(4, 60)),
        "linear: bias": lambda: linear(x, torch.zeros(4, 70), torch.zeros(3)),
        "quantized_linear: scale": lambda: quantized_linear(x, q8[0], q8[1][:5], None, None),
        "quantized_linear: bias": lambda: quantized_linear(x, *q8, torch.zeros(5), None),
        "quantized_linear: group": lambda: quantized_linear(x, *q4, None, 48),
        "quantized_linear: no group": lambda: quantized_linear(x, *q4, None, None),
        "quantized_linear: other group": lambda: quantized_linear(x, *q4, None, 32),
        "quantized_linear: dtype": lambda: quantized_linear(x, q8[0].view(torch.uint8), q8[1], None, None),
        "quantized_embed: width": lambda: quantized_embed(ids, *q8, 71, None, f32),
        "quantized_embed: scale": lambda: quantized_embed(ids, q4[0], q4[1][:, :0], 70, 128, f32),
        "dequantize: width": lambda: dequantize(*q4, 700, 128),
        "embed: float": lambda: embed(ids.float(), torch.zeros(7, 4), f32),
        "rope_table: float": lambda: rope_table(at.float(), 8),
        "next_positions: int32": lambda: next_positions_(torch.zeros(3, dtype=torch.int32)),
        "next_positions: (B, 1)": lambda: next_positions_(at),
        "conv: no taps": lambda: causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 0), torch.zeros(3)),
    }


@pytest.mark.parametrize("what", list(_wrong_shapes()))
@torch.no_grad()
def test_sizes_that_do_not_fit_are_refused(what: str) -> None:
    with pytest.raises(ValueError):
        _wrong_shapes()[what]()


def test_a_recorded_step_that_reads_no_row_says_so() -> None:
    """The check of the tokens is the step's own, but what is replayed is safe without it."""
    from griffin.ops.cpu.record import Program, recording

    tokens, table = torch.tensor([1]), torch.randn(3, 4)
    with torch.no_grad(), recording() as calls:
        embed(tokens, table, torch.float32)
    program = Program(calls)
    for wrong in (3, -1, MOST, LEAST):
        tokens.fill_(wrong)
        with pytest.raises(ValueError, match="embed_fp32"):
            program.run()
    tokens.fill_(2)
    program.run()


class _Subclass(Tensor):
    pass


def _not_to_be_read() -> dict[str, Tensor]:
    freed = torch.ones(8)
    freed.untyped_storage().resize_(0)
    return {
        "another dtype": torch.ones(8, dtype=torch.float64),
        "half as large": torch.ones(8, dtype=torch.bfloat16),
        "not contiguous": torch.ones(16)[::2],
        "meta": torch.ones(8, device="meta"),
        "a subclass": torch.ones(8).as_subclass(_Subclass),
        "freed": freed,
        "negated when read": torch._neg_view(torch.ones(8)),
        "none": None,  # type: ignore[dict-item]
        "a number": 8,  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("what", list(_not_to_be_read()))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_as_the_kernel_expects_never_reaches_it(what: str, place: int) -> None:
    arguments: list[Any] = [torch.ones(8), torch.ones(8), torch.ones(8)]
    arguments[place] = _not_to_be_read()[what]
    with pytest.raises(ValueError, match="geglu_forward"):
        library.Kernel("geglu_forward", "TT T i")(torch.float32, *arguments, 8)
