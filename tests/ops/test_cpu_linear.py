"""linear, output_linear and quantised linears against fp64: sizes, dtypes, layouts, gradients, threads."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from griffin.ops import dequantize, linear, output_linear, products, quantize_int4, quantize_int8, quantized_linear
from griffin.ops import quantized as module
from griffin.ops.cpu import library, linears
from tests.ops.test_cpu_kernels import serving

INSTRUCTIONS = library.offered() or ("portable",)
PATHS = [*INSTRUCTIONS, "torch"]

ROWS = [1, 2, 3, 5, 8, 16, 17]
SIZES = [(1, 1), (7, 33), (33, 7), (256, 129), (300, 64), (2560, 70)]  # (K, O)
DTYPES = [torch.float32, torch.bfloat16]
GROUPS = [None, 32, 64, 128]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, exact: float = 1e-5) -> None:
    """Sums of K products in fp32 lose 1e-5 of the largest; bf16 results are rounded by 2^-9."""
    assert found.isfinite().all()
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < (exact if dtype == torch.float32 else 5e-3), f"{error:.1e}"


@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize(("K", "O"), SIZES)
def test_linear_is_its_formula(path: str, N: int, K: int, O: int) -> None:
    for x_dtype in DTYPES:
        for w_dtype in DTYPES:
            x, w, b = torch.randn(N, K).to(x_dtype), torch.randn(O, K).to(w_dtype), torch.randn(O).to(w_dtype)
            expected = x.double() @ w.double().T
            y = linear(x, w, b)
            assert y.dtype == x_dtype
            close(y, expected + b.double(), x_dtype)
            close(linear(x.view(1, N, K), w)[0], expected, x_dtype)
            logits = output_linear(x, w)
            assert logits.dtype == torch.float32
            close(logits, expected, torch.float32)


@pytest.mark.parametrize(("N", "K", "O"), [(1, 1, 1), (70, 33, 9), (5, 1100, 40), (131, 2600, 6)])
def test_products_are_their_formula(path: str, N: int, K: int, O: int) -> None:
    for dtype in DTYPES:
        a, b = torch.randn(N, K).to(dtype), torch.randn(O, K)
        narrow = b.to(products.narrowest(a))  # bf16 where the CPU multiplies it
        expected = a.double() @ narrow.double().T
        close(products.product(a, narrow), expected, torch.float32)
        total = torch.ones(N, O)
        products.add_product_(total, a, narrow)
        close(total, expected + 1, torch.float32)
        turned = products.transposed(b.to(dtype))
        assert torch.equal(turned, b.to(dtype).T)
        assert turned.is_contiguous() or products.bf16_kernels(a) is None
        other = narrow[:1].expand(N, K).to(dtype)
        across = products.product(products.transposed(a), products.transposed(other))
        close(across, a.double().T @ other.double(), torch.float32)


def test_many_rows_of_bf16_give_the_bits_of_each_alone() -> None:
    """So a prompt read whole, in pieces of any size and a token at a time meets the same products."""
    if not products.bf16_kernels(torch.zeros(1, 1, dtype=torch.bfloat16)):
        pytest.skip("this CPU has no instruction for products of bf16")
    for K in (96, 1000, 3100, 7700):  # tiles of W that stay in the nearest cache, and that do not
        x, w, b = torch.randn(330, K).bfloat16(), torch.randn(21, K).bfloat16(), torch.randn(21)
        expected = linear(x, w, b)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x, w, b), expected)
            for rows in (slice(0, 1), slice(3, 5), slice(4, 100), slice(17, 329)):
                assert torch.equal(linear(x[rows], w, b), expected[rows])
            assert torch.equal(output_linear(x[:40], w), torch.cat([output_linear(row, w) for row in x[:40].split(1)]))


def test_no_rows_and_fp64(path: str) -> None:
    w, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.equal(linear(x, w, b), torch.nn.functional.linear(x, w, b))
    for dtype in DTYPES:
        assert linear(torch.zeros(0, 7, dtype=dtype), w.to(dtype), b.to(dtype)).shape == (0, 5)


@pytest.mark.parametrize("N", [2, 40])
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_gradients(path: str, N: int, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, N, 33), torch.randn(70, 33), torch.randn(70)]
    ours = [t.to(d).requires_grad_() for t, d in zip(inputs, (x_dtype, w_dtype, w_dtype), strict=True)]
    fp64 = [t.detach().double().requires_grad_() for t in ours]
    dy = torch.randn(2, N, 70)
    y = linear(*ours)
    found = torch.autograd.grad((y * dy.to(x_dtype)).sum(), ours)
    expected = torch.autograd.grad(
        (torch.nn.functional.linear(*fp64) * dy.to(x_dtype).double()).sum(),
        fp64,
    )
    for mine, wanted, leaf in zip(found, expected, ours, strict=True):
        assert mine.dtype == leaf.dtype
        close(mine, wanted, leaf.dtype)


def test_opcheck() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for dtype in DTYPES:
        x, w, b = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((3, 9), (5, 9), (5,)))
        for bias in (b, None):
            torch.library.opcheck(torch.ops.griffin.linear.default, (x, w, bias), test_utils=tests)


def test_layouts(path: str) -> None:
    """Strided and unaligned x, W and b give what plain ones give: kernels bit for bit, PyTorch but for rounding."""

    def same(found: Tensor, wanted: Tensor) -> None:
        if path == "torch":
            close(found, wanted.double(), found.dtype)  # its product may sum in another order in another layout
        else:
            assert torch.equal(found, wanted)

    for dtype in DTYPES:
        x, w, b = torch.randn(3, 33).to(dtype), torch.randn(9, 33).to(dtype), torch.randn(9).to(dtype)
        q, scale = quantize_int4(w, 32)

        def shift(t: Tensor) -> Tensor:
            store = t.new_empty(t.numel() + 1)
            store[1:] = t.flatten()
            return store[1:].view(t.shape)

        for change in (shift, lambda t: t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2]):
            same(linear(change(x), change(w), change(b)), linear(x, w, b))
            same(quantized_linear(change(x), q, scale, change(b), 32), quantized_linear(x, q, scale, b, 32))
            same(quantized_linear(x, change(q), change(scale), b, 32), quantized_linear(x, q, scale, b, 32))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_a_row_gives_the_same_bits_in_any_batch_and_on_any_number_of_threads(instructions: str) -> None:
    with serving(instructions):
        x, w = torch.randn(16, 700), torch.randn(90, 700)
        formats = [(*quantize_int8(w), None), *((*quantize_int4(w, g), g) for g in (32, 64, 128))]
        runs = [lambda x: linear(x, w), lambda x: linear(x, w.bfloat16())]
        runs += [lambda x, f=f: quantized_linear(x, f[0], f[1], None, f[2]) for f in formats]
        for run in runs:
            expected = run(x)
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                assert torch.equal(run(x), expected)
                for rows in (slice(0, 1), slice(3, 5), slice(4, 12)):
                    assert torch.equal(run(x[rows]), expected[rows])


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"group{g}")
@pytest.mark.parametrize(("K", "O"), SIZES)
def test_quantised_linear_is_its_formula(path: str, K: int, O: int, group: int | None) -> None:
    w = torch.randn(O, K)
    q, scale = quantize_int8(w) if group is None else quantize_int4(w, group)
    with library.without_kernels():
        wide = dequantize(q, scale, K, group)
    assert torch.equal(dequantize(q, scale, K, group), wide)
    step = scale.float()[:, None] if group is None else scale.float().repeat_interleave(group, dim=1)[:, :K]
    # Half a step, but for the top of an int4 group, which may be clipped to gain elsewhere.
    assert ((wide - w).abs() <= step.abs() * (0.5 if group is None else 3)).all()
    assert (wide - w).square().mean().sqrt() < (0.01 if group is None else 0.12) * w.square().mean().sqrt() + 1e-6
    for N in ROWS:
        for dtype in DTYPES:
            x, b = torch.randn(N, K).to(dtype), torch.randn(O).to(dtype)
            expected = x.double() @ wide.double().T + b.double()
            close(quantized_linear(x, q, scale, b, group), expected, dtype, exact=5e-5)
    x64 = torch.randn(2, K, dtype=torch.float64)
    close(quantized_linear(x64, q, scale, None, group), x64 @ wide.double().T, torch.float32, exact=1e-12)


def test_extreme_inputs_and_weights(path: str) -> None:
    for group in GROUPS:
        w = torch.randn(6, 300) * torch.tensor([0.0, 1e-30, 1e30, 1e-3, 1.0, 5.0])[:, None]
        w[4, 7] = 1e4  # an outlier
        q, scale = quantize_int8(w) if group is None else quantize_int4(w, group)
        wide = dequantize(q, scale, 300, group)
        assert wide.isfinite().all()
        assert not wide[0].any()
        x = torch.randn(2, 300)
        x[:, 128:256] *= 1e-3
        x[0, 3] = 1e4
        for row in range(1, 6):
            expected = x.double() @ wide[row].double()
            found = quantized_linear(x, q, scale, None, group)[:, row]
            # x is rounded by 2^-16 of the largest of its block.
            assert ((found - expected).abs() <= 2e-5 * x.abs().amax(dim=1) * wide[row].abs().sum()).all()
        assert not quantized_linear(torch.zeros(1, 300), q, scale, None, group).any()
        for bad in (torch.nan, torch.inf):
            x[1, 200] = bad
            y = quantized_linear(x, q, scale, None, group)
            assert y[0].isfinite().all()
            assert not y[1, 3:].isfinite().any()


@pytest.mark.parametrize("group", [None, 32, 128], ids=lambda g: f"group{g}")
@pytest.mark.parametrize("K", [1, 7, 63, 65, 768, 2560])
@pytest.mark.parametrize("N", [0, 17, 33, 100])
def test_many_rows_are_their_formula(path: str, N: int, K: int, group: int | None) -> None:
    """x as two 8-bit numbers is off by 2^-16 of its row's largest, so y by that times the weights' sum at the most."""
    for O in (1, 5, 33, 257):
        w, b = torch.randn(O, K), torch.randn(O)
        q, scale = quantize_int8(w) if group is None else quantize_int4(w, group)
        wide = dequantize(q, scale, K, group).double()
        for dtype in DTYPES:
            x = (torch.randn(N, K) * torch.logspace(-3, 3, N)[:, None]).to(dtype)
            top = x.double().abs().amax(dim=1, keepdim=True)
            bound = 1.05 * 2**-16 * top * wide.abs().sum(dim=1)  # and fp32 sums:
            bound = bound + 1e-6 * (x.double().abs() @ wide.abs().T) + 1e-6 * b.abs()
            for bias in (None, b, b.bfloat16()):
                expected = x.double() @ wide.T + (0 if bias is None else bias.double())
                rounding = expected.abs() * (2**-8 if dtype == torch.bfloat16 else 0)
                found = quantized_linear(x, q, scale, bias, group)
                assert found.dtype == dtype
                assert ((found - expected).abs() <= 1.02 * bound + rounding + 1e-30).all()
                plain = linear(x, wide.bfloat16(), bias)
                expected = x.double() @ wide.bfloat16().double().T + (0 if bias is None else bias.double())
                rounding = expected.abs() * (2**-8 if dtype == torch.bfloat16 else 0)
                assert ((plain - expected).abs() <= bound + rounding + 1e-30).all()


def test_products_of_many_rows_in_several_pieces(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("griffin.ops.cpu.linears._ROWS", 20)
    monkeypatch.setattr("griffin.ops.cpu.linears._PANEL", 30)
    plain = importlib.import_module("griffin.ops.linear")  # the package has a function of that name
    monkeypatch.setattr(plain, "PANEL_ROWS", 20)
    monkeypatch.setattr(plain, "PANEL_ELEMENTS", 70 * 65)
    x, w, b = torch.randn(53, 65), torch.randn(157, 65), torch.randn(157)
    for q, scale, group in ((*quantize_int8(w), None), (*quantize_int4(w, 32), 32)):
        wide = dequantize(q, scale, 65, group)
        for dtype in DTYPES:
            close(
                quantized_linear(x.to(dtype), q, scale, b, group),
                x.to(dtype).double() @ wide.double().T + b,
                dtype,
                1e-4,
            )
            w_bf16 = w.bfloat16()
            close(linear(x.to(dtype), w_bf16, b), x.to(dtype).double() @ w_bf16.double().T + b, dtype)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_do_not_saturate(instructions: str, sign: int) -> None:
    """127 times 127 for every pair, in both 8-bit parts of x: what 16-bit sums of two products cannot hold."""
    with serving(instructions):
        q, scale = torch.full((40, 768), 127 * sign, dtype=torch.int8), torch.ones(40)
        for value in (127.0, 126.5, -127.0, -126.5):
            x = torch.full((33, 768), value)
            x[:, 0] = 127  # the scale is 1; 126.5 is 126 or 127, and 127 steps of 1 / 254
            expected = x.double() @ q.double().T
            for dtype in DTYPES if value.is_integer() else DTYPES[:1]:
                found = quantized_linear(x.to(dtype), q, scale, None, None)
                assert ((found - expected).abs() <= (1e-6 if dtype == torch.float32 else 2**-8) * expected.abs()).all()


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_many_rows_of_int8_give_the_same_bits_in_any_call_layout_and_number_of_threads(instructions: str) -> None:
    with serving(instructions):
        if not linears.multiplies_int8(300):
            pytest.skip("this CPU does not multiply 8-bit numbers exactly")
        q, scale = quantize_int8(torch.randn(90, 300))
        for dtype in DTYPES:
            x, b = torch.randn(600, 300).to(dtype), torch.randn(90).to(dtype)
            expected = quantized_linear(x, q, scale, b, None)
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                assert torch.equal(quantized_linear(x, q, scale, b, None), expected)
                assert torch.equal(quantized_linear(x[5:500:3], q, scale, b, None), expected[5:500:3])
            strided = x.T.contiguous().T
            store = x.new_empty(x.numel() + 1)
            store[1:] = x.flatten()
            for other in (strided, store[1:].view(x.shape)):
                assert torch.equal(quantized_linear(other, q, scale, b, None), expected)
            assert torch.equal(
                quantized_linear(x, q.T.contiguous().T, scale.repeat_interleave(2)[::2], b, None), expected
            )


def test_a_bad_row_among_many_spoils_itself_alone(path: str) -> None:
    for group in GROUPS:
        w = torch.randn(33, 300)
        q, scale = quantize_int8(w) if group is None else quantize_int4(w, group)
        for dtype in DTYPES:
            x = torch.randn(40, 300).to(dtype)
            x[7] = 0
            good = quantized_linear(x, q, scale, None, group)
            assert not good[7].any()
            for bad in (torch.nan, torch.inf, -torch.inf):
                x[20, 3] = bad
                y = quantized_linear(x, q, scale, None, group)
                assert not y[20].isfinite().any()
                others = torch.arange(40) != 20
                assert torch.equal(y[others], good[others])


def test_an_inexact_product_of_int8_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without VNNI: the check sees saturated sums, and W is widened instead."""
    product = torch._int_mm
    monkeypatch.setattr(
        torch, "_int_mm", lambda *given, **named: product(*given, **named).clamp_(-(2**15) * 16, 2**15 * 16)
    )
    linears._int8_is_exact.cache_clear()
    try:
        assert not linears.multiplies_int8(300)
        x, (q, scale) = torch.randn(20, 300), quantize_int8(torch.randn(9, 300))
        close(
            quantized_linear(x, q, scale, None, None), x.double() @ dequantize(q, scale, 300, None).double().T, x.dtype
        )
    finally:
        linears._int8_is_exact.cache_clear()


def test_results_do_not_depend_on_what_memory_held(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*shape: object, **named: object) -> Tensor:
        t = empty(*shape, **named)
        return t.fill_(torch.nan if t.is_floating_point() else 77)

    x, w, b = torch.randn(40, 300).bfloat16(), torch.randn(70, 300), torch.randn(70)
    runs = [lambda: linear(x, w, b), lambda: linear(x, w.bfloat16(), b)]
    for group in GROUPS:
        q, scale = quantize_int8(w) if group is None else quantize_int4(w, group)
        runs.append(lambda q=q, scale=scale, group=group: quantized_linear(x, q, scale, b, group))
    before = [run() for run in runs]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(Tensor, "new_empty", lambda t, *shape: poisoned(*shape, dtype=t.dtype))
    assert all(torch.equal(run(), expected) for run, expected in zip(runs, before, strict=True))


def test_a_slab_of_rows_quantises_as_within_the_whole() -> None:
    w = torch.randn(20, 100)
    for quantise in (quantize_int8, lambda w: quantize_int4(w, 32)):
        q, scale = quantise(w)
        assert torch.equal(quantise(w[5:9])[0], q[5:9])
        assert torch.equal(quantise(w[5:9])[1], scale[5:9])


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_int4_quantises_to_the_bits_of_the_definition(instructions: str) -> None:
    """Also ties, groups of zeros, values whose scale is zero or subnormal in bf16, and the largest of fp32."""
    w = torch.randn(30, 333)
    w[1] = 0
    w[2] = torch.tensor([1.0, -1.0, 0.5]).repeat(111)
    w[3] *= 1e-39
    w[4] *= 1e-41
    w[5] *= 1e37
    w[6, ::7] *= 100
    for dtype in DTYPES:
        for group in (32, 64, 128):
            for part in (w, w[:, :1], w[:, :64], w.T):
                with serving("torch"):
                    q, scale = quantize_int4(part.to(dtype), group)
                with serving(instructions):
                    found, found_scale = quantize_int4(part.to(dtype), group)
                assert torch.equal(found_scale, scale)
                assert torch.equal(found, q)


def test_packing_of_int4_is_as_documented() -> None:
    numbers = torch.arange(64) % 16
    w = (numbers - 8.0)[None]
    w[0, :16] = -8  # the largest is -8: a step of 1
    q, scale = quantize_int4(w, 64)
    assert scale.item() == 1
    words = q.view(torch.int16)[0].to(torch.int32) & 0xFFFF
    for k in range(64):
        assert (words[k % 16] >> 4 * (k // 16)) & 15 == int(w[0, k]) + 8


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize(("rows", "dtype"), [((1,), torch.float32), ((2, 3), torch.float32), ((2, 40), torch.bfloat16)])
@pytest.mark.parametrize(("K", "O"), [(200, 70), (64, 33000)])  # one panel; two
def test_the_gradient_of_a_quantised_product(
    group: int | None, rows: tuple[int, ...], dtype: torch.dtype, K: int, O: int
) -> None:
    weight = torch.randn(O, K)
    q, scale = quantize_int8(weight) if group is None else quantize_int4(weight, group)
    bias = torch.randn(O, requires_grad=True)
    x = torch.randn(*rows, K, dtype=dtype).requires_grad_()
    dy = torch.randn(*rows, O, dtype=dtype)
    y = quantized_linear(x, q, scale, bias, group)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    assert torch.equal(y, quantized_linear(x.detach(), q, scale, bias.detach(), group))
    wide = module.dequantize(q, scale, K, group).double()
    wanted = dy.double() @ wide
    assert dx.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert (dx.double() - wanted).norm() <= tolerance * wanted.norm()
    assert torch.allclose(db.double(), dy.double().reshape(-1, O).sum(0), rtol=1e-4, atol=1e-4)


def test_errors() -> None:
    q, scale = quantize_int8(torch.randn(4, 8))
    with pytest.raises(ValueError, match="x has 9 inputs"):
        quantized_linear(torch.randn(1, 9), q, scale, None, None)
    with pytest.raises(ValueError, match="group=48 must be one of 32, 64, 128"):
        quantize_int4(torch.randn(4, 8), 48)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not finite"):
            quantize_int8(torch.tensor([[1.0, bad]]))
        for group in (32, 64, 128):
            for dtype in DTYPES:
                with pytest.raises(ValueError, match="not finite"):
                    quantize_int4(torch.randn(3, 200).index_fill_(1, torch.tensor([150]), bad).to(dtype), group)
    assert module.padded_width(65, 32) == 128
