"""The kernels between the larger ones of a decode step, against PyTorch's own operations in fp64 or bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from griffin.ops import (
    block_diagonal_linear,
    dequantize,
    embed,
    next_positions_,
    quantize_int4,
    quantize_int8,
    quantized_embed,
    ring_write_,
    rope_table,
    soft_cap,
)
from griffin.ops.cpu import library
from griffin.ops.cpu.record import NotRecordableError, Program, recording

pytestmark = pytest.mark.skipif(not library.status()[0], reason=f"no kernels: {library.status()[1]}")
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 7, 8, 33, 2049, 5000]


@pytest.fixture(params=library.offered(), autouse=True)
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.using(request.param), torch.no_grad():
        yield


def _unaligned(t: Tensor) -> Tensor:
    """The same values at an address that is a multiple of the element only."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return room.copy_(t)


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are called from here on: a test must not pass on the definition."""
    names: list[str] = []
    call = library.Kernel.__call__

    def counted(self: library.Kernel, *arguments: object) -> None:
        names.append(self.name)
        call(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(library.Kernel, "__call__", counted)
    return names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_sums_and_copies_are_recorded_as_kernels(n: int, dtype: torch.dtype) -> None:
    """PyTorch's own operations in a recording: the same values, and made again from what is there then."""
    x, y = _unaligned(torch.randn(n).to(dtype)), torch.randn(2 * n).to(dtype)[::2].contiguous()
    x[0] = torch.inf
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    target = torch.full((n,), torch.nan, dtype=dtype)
    with recording() as calls:
        total, cast = x + y, x.to(other)
        target.copy_(y)
        assert x.to(dtype) is x
    names = [call.function.__name__.removeprefix("griffin_").partition("_")[0] for call in calls]
    assert names == ["add", "convert", "copy"]
    again = Program(calls)
    for _ in range(2):
        assert torch.equal(total, x + y)
        assert torch.equal(cast, x.to(other))
        assert torch.equal(target, y)
        x.copy_(torch.randn(n))
        y.copy_(torch.randn(n))
        again.run()


def test_what_no_kernel_does_is_refused_in_a_recording() -> None:
    x = torch.randn(4)
    refused = (
        lambda: x + 1,
        lambda: x + torch.randn(2, 4),
        lambda: torch.add(x, x, alpha=2),
        lambda: x + x.bfloat16(),
        lambda: x.double(),
        lambda: torch.empty(8)[::2].copy_(x),
    )
    for run in refused:
        with pytest.raises(NotRecordableError), recording():
            run()


def test_casting_keeps_what_is_not_finite() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -0.0])
    torch.testing.assert_close(library.converted(x, torch.bfloat16), x.bfloat16(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_soft_cap(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _calls(monkeypatch)
    x = torch.cat([torch.randn(n) * 10 ** torch.empty(n).uniform_(-6, 4), torch.tensor([0.0, torch.inf, -torch.inf])])
    found = soft_cap(_unaligned(x), 30.0)
    torch.testing.assert_close(found.double(), 30 * torch.tanh(x.double() / 30), rtol=5e-7, atol=0)
    assert soft_cap(torch.tensor([torch.nan]), 30.0).isnan().all()
    assert soft_cap(x, None) is x
    assert names == ["soft_cap"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "width", "rows"), [(1, 1, 1), (3, 7, 2), (2, 32, 3), (4, 33, 16), (6, 128, 5)])
def test_gates(
    blocks: int, width: int, rows: int, weight_dtype: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _calls(monkeypatch)
    x = torch.randn(1, rows, 2 * blocks * width).to(dtype)[..., ::2]
    w, b = torch.randn(blocks, width, width).to(weight_dtype), torch.randn(blocks, width).to(weight_dtype)
    found = block_diagonal_linear(x, _unaligned(w), _unaligned(b))
    wanted = torch.einsum("btni,nij->btnj", x.double().unflatten(-1, (blocks, width)), w.double()) + b.double()
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    torch.testing.assert_close(found.double(), wanted.flatten(2), **tolerance)
    assert names == [f"gates_{'fp32' if weight_dtype == torch.float32 else 'bf16'}"]
    for row in range(rows):  # alone as among others
        assert torch.equal(block_diagonal_linear(x[:, row : row + 1], w, b)[0, 0], found[0, row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 65, 256])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_embed(width: int, scale: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    table, tokens = torch.randn(11, width), torch.randint(0, 11, (3, 8))[:, ::2]

    def wanted(rows: Tensor) -> Tensor:
        rows = rows.to(dtype)
        return rows if scale is None else (rows.float() * torch.tensor(scale)).to(dtype)

    names = _calls(monkeypatch)
    assert torch.equal(embed(tokens, table, dtype, scale), wanted(table[tokens]))
    narrow = table.bfloat16()
    assert torch.equal(embed(tokens, _unaligned(narrow), dtype, scale), wanted(narrow[tokens]))
    q, scales = quantize_int8(table)
    found = quantized_embed(tokens, q, scales, width, None, dtype, scale)
    assert torch.equal(found, wanted(q.float().mul(scales[:, None])[tokens]))
    for group in (32, 64, 128):
        q, scales = quantize_int4(table, group)
        with library.without_kernels():
            wide = dequantize(q, scales, width, group)
        assert torch.equal(quantized_embed(tokens, q, scales, width, group, dtype, scale), wanted(wide[tokens]))
    assert names == ["embed_fp32", "embed_bf16", "embed_int8"] + ["quantize_int4", "embed_int4"] * 3


def test_next_positions_and_their_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    names = _calls(monkeypatch)
    position = torch.tensor([0, 5, 128_000, 2**31])
    positions, reset = next_positions_(position)
    assert position.tolist() == [1, 6, 128_001, 2**31 + 1]
    assert positions.tolist() == [[0], [5], [128_000], [2**31]]
    assert reset.tolist() == [[True], [False], [False], [False]]
    many = torch.randint(0, 10**6, (3, 70))
    for at in (positions, many):
        found = rope_table(at, 24, 10_000.0)
        with library.without_kernels():
            wanted = rope_table(at, 24, 10_000.0)
        # Two fp64 angles that differ in their last bit may round to fp32 neighbours.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1.2e-7)
    assert names == ["next_positions", "rope_table", "rope_table"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ring_write(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _calls(monkeypatch)
    B, S, G, K = 3, 5, 2, 7
    ring = [torch.randn(B, S, G, K).to(dtype) for _ in range(2)]
    wanted, new = [t.clone() for t in ring], [torch.randn(B, 1, K, G).to(dtype).transpose(2, 3) for _ in range(2)]
    positions = torch.tensor([[4], [5], [13]])
    for b, slot in enumerate((4, 0, 3)):
        for mine, theirs in zip(wanted, new, strict=True):
            mine[b, slot] = theirs[b, 0]
    ring_write_(*ring, *new, positions)
    assert torch.equal(ring[0], wanted[0])
    assert torch.equal(ring[1], wanted[1])
    assert names == ["ring_write"]
    with library.without_kernels():
        ring_write_(*ring, *new, positions)
    assert torch.equal(ring[0], wanted[0])
