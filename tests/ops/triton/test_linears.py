"""int8 and int4 linears by Triton against fp64: sizes, groups, dtypes, layouts, whole models, what the kernels need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from griffin import Griffin
from griffin.ops import dequantize, device, embed, quantize_int4, quantize_int8, quantized_embed, quantized_linear
from griffin.quantize import Quantization, quantize
from tests.ops.triton.compiled import launched

pytest.importorskip("triton", reason="the kernels are Triton's")

from griffin.ops.triton import linears

MakeModel = Callable[..., Griffin]
GROUPS = [None, 32, 64, 128]
# (rows, K, O): every count of rows with some odd K and O.
SHAPES = [(1, 1, 1), (1, 100, 257), (3, 257, 33), (16, 64, 100), (17, 33, 64), (64, 257, 33)]


def packed(w: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    return quantize_int8(w) if group is None else quantize_int4(w, group)


def bound(x: Tensor, wide: Tensor, b: Tensor | float, result: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product in fp64 and how far it may be off: fp32 sums, and one rounding to `result`."""
    exact = x.double() @ wide.double().T + b
    sums = x.double().abs() @ wide.double().abs().T + abs(b)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[result]
    return exact, 1e-6 * sums + 1.01 * rounding * exact.abs() + 1e-30


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that reach Triton's kernels."""
    calls: list[str] = []

    def noted(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            calls.append(run.__name__)
            return run(*args)

        return call

    for name in ("linear_int8", "linear_int4"):
        monkeypatch.setattr(linears, name, noted(getattr(linears, name)))
    return calls


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"group{g}")
@pytest.mark.parametrize(("N", "K", "O"), SHAPES)
def test_it_is_its_formula(served: list[str], N: int, K: int, O: int, group: int | None) -> None:
    assert torch.empty(5).isnan().all()  # so that an output left out is seen
    w, b = torch.randn(O, K), torch.randn(O)
    q, scale = packed(w, group)
    wide = dequantize(q, scale, K, group)
    cases = [(torch.float32, b, None), (torch.bfloat16, None, torch.float32)]  # the second as logits are made
    if K == 257:
        cases += [(torch.bfloat16, b.bfloat16(), None), (torch.float16, b, None)]
    for dtype, bias, result in cases:
        x = torch.randn(N, K).to(dtype)
        y = quantized_linear(x, q, scale, bias, group, result)
        assert y.dtype == (result or dtype)
        exact, off = bound(x, wide, 0.0 if bias is None else bias.double(), y.dtype)
        assert ((y - exact).abs() <= off).all()
    assert len(served) == len(cases)


@pytest.mark.parametrize("group", [None, 128], ids=lambda g: f"group{g}")
@pytest.mark.parametrize("outputs", [32, 64])
def test_larger_tiles(monkeypatch: pytest.MonkeyPatch, outputs: int, group: int | None) -> None:
    monkeypatch.setattr(linears, "_outputs", lambda O: outputs)
    x, b = torch.randn(3, 300).bfloat16(), torch.randn(70)
    q, scale = packed(torch.randn(70, 300), group)
    exact, off = bound(x, dequantize(q, scale, 300, group), b.double(), torch.float32)
    assert ((quantized_linear(x, q, scale, b, group, torch.float32) - exact).abs() <= off).all()


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"group{g}")
def test_every_number_in_every_place(group: int | None) -> None:
    """One-hot rows give back each weight: all 16 (255) numbers, in all places of a block."""
    K = 160
    w = (torch.arange(16 * K).view(16, K) * 7 % 255 - 127) * torch.logspace(-3, 3, 16)[:, None]
    q, scale = packed(w, group)
    wide = dequantize(q, scale, K, group)
    for first in range(0, K, 64):
        rows = torch.eye(K)[first : first + 64]
        y = quantized_linear(rows.bfloat16(), q, scale, None, group, torch.float32)
        assert torch.equal(y, wide.T[first : first + 64])


@pytest.mark.parametrize("group", [None, 32], ids=lambda g: f"group{g}")
def test_layouts_and_what_is_not_served(served: list[str], group: int | None) -> None:
    x, w, b = torch.randn(6, 100), torch.randn(33, 100), torch.randn(33)
    q, scale = packed(w, group)
    expected = quantized_linear(x, q, scale, b, group)
    spread = torch.randn(6, 3, 150)
    spread[:, 1, 50:] = x
    for other in (x.T.contiguous().T, spread[:, 1, 50:], x.view(2, 3, 100)):
        assert torch.equal(quantized_linear(other, q, scale, b, group).view(6, 33), expected)
    transposed = (q.T.contiguous().T, scale.repeat_interleave(2, dim=0)[::2])
    assert torch.equal(quantized_linear(x, *transposed, b.repeat_interleave(2)[::2], group), expected)
    served.clear()
    many = torch.randn(65, 100)
    exact, off = bound(many, dequantize(q, scale, 100, group), b.double(), torch.float32)
    assert ((quantized_linear(many, q, scale, b, group) - exact).abs() <= 5 * off).all()
    assert quantized_linear(x[:0], q, scale, b, group).shape == (0, 33)
    quantized_linear(x.double(), q, scale, b, group)
    assert not served


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("group", [None, 64], ids=lambda g: f"group{g}")
def test_a_bad_row_spoils_itself_alone(group: int | None) -> None:
    q, scale = packed(torch.randn(33, 100), group)
    x = torch.randn(3, 100)
    good = quantized_linear(x, q, scale, None, group)
    for bad in (torch.nan, torch.inf):
        x[1, 99] = bad
        y = quantized_linear(x, q, scale, None, group)
        assert not y[1].isfinite().any()
        assert torch.equal(y[::2], good[::2])


@pytest.mark.parametrize("group", [None, 64], ids=lambda g: f"group{g}")
def test_rows_of_a_quantised_table(group: int | None) -> None:
    q, scale = packed(torch.randn(50, 70), group)
    wide, ids = dequantize(q, scale, 70, group), torch.tensor([[3, 49], [0, 3]])
    for dtype in (torch.float32, torch.bfloat16):
        expected = embed(ids, wide, dtype, 8.5)
        assert torch.equal(quantized_embed(ids, q, scale, 70, group, dtype, 8.5), expected)


@pytest.mark.parametrize(
    ("form", "dtype"), [(Quantization(8), torch.bfloat16), (Quantization(4, 32), torch.float32)], ids=str
)
@torch.no_grad()
def test_a_model_decodes_as_by_plain_operations(
    served: list[str], monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, form: Quantization, dtype: torch.dtype
) -> None:
    model = quantize(make_model(dtype=dtype), form)
    ids = torch.randint(0, model.config.vocab_size, (2, 2))
    monkeypatch.setattr(linears, "_outputs", lambda O: 512)  # the interpreter's time is that of programs, not of tiles

    def decode() -> Tensor:
        state = model.new_state(2)
        return torch.cat([model.logits(model(ids[:, t : t + 1], state)) for t in range(2)], dim=1)

    found = decode()
    assert len(served) == 2 * 20  # 2 recurrent layers of 3 + 3 linears, 1 of attention with 4 + 3, and the logits
    monkeypatch.setattr(device, "_pretends_cuda", False)
    expected = decode()
    assert len(served) == 2 * 20
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * expected.std()


def launch_all() -> None:
    """RecurrentGemma-2B's largest and its smallest product, and logits."""
    for O, K, groups in ((15360, 2560, (32, 64, 128)), (2560, 7680, (128,))):
        q8, s8 = torch.zeros(O, K, dtype=torch.int8), torch.ones(O)
        for N in (1, 64):
            for dtype in (torch.bfloat16, torch.float32):
                x, b = torch.zeros(N, K, dtype=dtype), torch.zeros(O, dtype=dtype)
                quantized_linear(x, q8, s8, b, None)
                for group in groups:
                    q4, s4 = torch.zeros(O, K // 2, dtype=torch.uint8), torch.ones(O, K // group, dtype=torch.bfloat16)
                    quantized_linear(x, q4, s4, b, group)
    quantized_linear(torch.zeros(1, 7680, dtype=torch.bfloat16), q8, s8, None, None, torch.float32)


@pytest.mark.slow
def test_the_kernels_fit_a_gpu() -> None:
    launches = launched("tests.ops.triton.test_linears")
    assert len(launches) == 2 * 2 * (4 + 2) + 1
    for launch in launches:
        assert launch["spilled"] <= 672, launch  # the int4 product: a choice of tiles to tune
        assert launch["shared"] < 200_000, launch
