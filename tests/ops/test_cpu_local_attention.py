"""local_attention's kernels, forward and backward, against its definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from griffin.ops import local_attention
from griffin.ops.cpu import attention as cpp
from griffin.ops.cpu import library
from tests.ops import reference
from tests.ops.test_cpu_kernels import INSTRUCTIONS, TOLERANCE, serving


@pytest.fixture(params=INSTRUCTIONS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(request.param):
        yield request.param


@dataclass(frozen=True)
class Case:
    """Inputs in fp64: row b of the batch has documents of its own."""

    T: int
    window: int | None
    earlier: int = 0
    B: int = 1
    H: int = 6
    G: int = 1
    K: int = 16
    documents: str = "one"

    def positions(self) -> Tensor:
        """One document that goes on at `earlier`, packed ones, one of which not all keys are given, or any numbers."""
        positions = torch.arange(self.earlier, self.earlier + self.T).repeat(self.B, 1)
        for b in range(self.B):
            if self.documents == "packed":
                for start in (self.T // 5 + b, self.T // 2 + 3 * b, self.T - 1 - b):
                    if 0 < start < self.T:
                        positions[b, start:] = torch.arange(self.T - start)
            elif self.documents == "cut":
                positions[b] += 5 * (b + 1)
            elif self.documents == "any":
                positions[b] = torch.randint(0, 90, (self.T,), generator=torch.Generator().manual_seed(b))
        return positions

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.T + 1000 * self.K)
        shapes = [(self.B, self.T, self.H, self.K)] + 2 * [(self.B, self.earlier + self.T, self.G, self.K)]
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return q, k, v


CASES = [Case(T, window) for T in (1, 2, 63, 100, 257, 700) for window in (1, 3, 64, 128, None)]
CASES += [Case(T, window, earlier=70, B=2, documents="packed") for T in (1, 64, 100, 257) for window in (3, 128, None)]
CASES += [Case(T, window, earlier=9, B=3, documents="cut") for T in (2, 65, 130) for window in (3, 64, None)]
CASES += [
    Case(257, 100, B=2, H=H, G=G, K=K, documents="packed") for H, G in ((4, 2), (6, 1)) for K in (16, 24, 128, 256)
]
CASES += [Case(130, None, earlier=5, B=2, H=H, G=G, K=7, documents="packed") for H, G in ((1, 1), (3, 3), (10, 1))]
CASES += [Case(130, window, earlier=70, B=2, documents="any") for window in (50, None)]
INPUTS = ("q", "k", "v")


def results(
    case: Case, inputs: tuple[Tensor, ...] | list[Tensor], needed: str = "qkv", positions: Tensor | None = None
) -> list[Tensor]:
    """The output, then the gradients of the inputs named."""
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in zip(INPUTS, inputs, strict=True)}
    at = case.positions() if positions is None else positions
    out = local_attention(*leaves.values(), at, case.window)
    generator = torch.Generator().manual_seed(1)
    flow = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaves[name] for name in needed], flow)]


def expected(case: Case, inputs: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    with library.without_kernels():
        return results(case, [t.double() for t in inputs])


def assert_near(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == dtype
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-2)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_definition_with_gradients(path: str, case: Case, dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) for t in case.inputs()]
    found = results(case, inputs)
    assert_near(found, expected(case, inputs), dtype)
    with torch.no_grad():
        assert torch.equal(local_attention(*inputs, case.positions(), case.window), found[0])


def test_the_definition_is_the_formula_here_too(path: str) -> None:
    """Token by token, past several blocks: what the tests above compare with shares no code with this."""
    case = Case(150, 40, earlier=20, B=2, H=4, G=2, documents="packed")
    q, k, v = case.inputs()
    wanted = reference.local_attention(q, k, v, case.positions(), case.window)
    found = local_attention(q.float(), k.float(), v.float(), case.positions(), case.window)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 16, 200])
def test_blocks_do_not_show(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(90, 30, earlier=11, B=2, H=4, G=2, documents="packed")
    monkeypatch.setattr(cpp, "BLOCK_TOKENS", (tokens, tokens))
    inputs = [t.float() for t in case.inputs()]
    with serving("native"):
        assert_near(results(case, inputs), expected(case, inputs), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "G"), [(6, 1), (4, 2)])
def test_strides_and_the_type_of_positions_do_not_matter(path: str, H: int, G: int, dtype: torch.dtype) -> None:
    case = Case(100, 20, earlier=30, B=2, H=H, G=G, K=24, documents="packed")
    inputs = [t.to(dtype) for t in case.inputs()]
    wanted = expected(case, inputs)
    for first, second in ((0, 1), (1, 2), (1, 3), (2, 3)):
        strided = [t.transpose(first, second).contiguous().transpose(first, second) for t in inputs]
        assert_near(results(case, strided), wanted, dtype)
    assert_near(results(case, [t[:, :, :, ::2] for t in (t.repeat_interleave(2, -1) for t in inputs)]), wanted, dtype)
    for positions in (case.positions().int(), case.positions().float(), case.positions().T.contiguous().T):
        assert_near(results(case, inputs, positions=positions), wanted, dtype)


def test_an_expanded_gradient_and_bf16_by_default(path: str) -> None:
    case = Case(100, 20, B=2, H=4, G=2)
    inputs = [t.float().requires_grad_() for t in case.inputs()]
    wanted = torch.autograd.grad(local_attention(*(t.double() for t in inputs), case.positions(), 20).sum(), inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = torch.autograd.grad(local_attention(*inputs, case.positions(), 20).sum(), inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_positions_below_zero_stay_inside_memory(path: str) -> None:
    """They break the contract: what such a token sees is not said, but it must not be another's memory."""
    case = Case(70, 20)
    inputs = [t.float() for t in case.inputs()]
    found, least = (results(case, inputs, positions=case.positions() * 0 - p) for p in (10**9, 0))
    assert all(torch.equal(a, b) for a, b in zip(found, least, strict=True))


@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "qv", "kv"])
def test_gradients_of_only_some(needed: str) -> None:
    case = Case(100, 20, earlier=30, B=2, documents="packed")
    inputs = [t.float() for t in case.inputs()]
    with serving("native"):
        whole, some = results(case, inputs), results(case, inputs, needed)
    wanted = [whole[0], *(whole[1 + INPUTS.index(name)] for name in needed)]
    assert all(torch.equal(a, b) for a, b in zip(some, wanted, strict=True))


@pytest.mark.parametrize(("size", "tolerance"), [(5.0, 1e-4), (100.0, 1e-2)])
def test_large_scores_do_not_overflow(path: str, size: float, tolerance: float) -> None:
    """Of some 100 and 40 000, which fp32 rounds by 4e-6 and 2e-3: that is what is left of the error."""
    case = Case(150, 40, earlier=20)
    q, k, v = case.inputs()
    for sign in (1, -1):
        inputs = [(sign * size * q).float(), (size * k).float(), v.float()]
        for a, b in zip(results(case, inputs), expected(case, inputs), strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("place", [1, 2])
def test_keys_that_no_token_may_see_are_not_read(path: str, place: int) -> None:
    """Those before every window, and those of a document that ended before the first token."""
    case = Case(150, 40, earlier=60)
    inputs = [t.float() for t in case.inputs()]
    wanted = results(case, inputs)
    inputs[place][:, :20] = torch.nan
    for a, b in zip(results(case, inputs), wanted, strict=True):
        assert torch.equal(a, b)
    packed = torch.arange(150)[None]  # a new document: no earlier token is seen
    wanted = expected(case, [t.nan_to_num() for t in inputs])
    inputs[place][:, :60] = torch.nan
    found = results(case, inputs, positions=packed)
    assert all(torch.isfinite(t).all() for t in found)
    assert not found[2][:, :60].any()
    assert not found[3][:, :60].any()


def test_nan_that_is_seen_is_not_lost(path: str) -> None:
    case = Case(150, 40)
    for place in range(3):
        inputs = [t.float() for t in case.inputs()]
        inputs[place][0, 70] = torch.nan
        bad = results(case, inputs)[0].isnan().flatten(2)
        assert bad[0, 70 : 71 if place == 0 else 111].all()
        assert not bad[0, :64].any()  # the block before does not touch it


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_threads_do_not_change_a_bit_of_the_kernels(instructions: str) -> None:
    """Of the kernels: the matrix products are PyTorch's, whose sums may depend on the number of threads."""
    G, n, r, m, own = 2, 61, 3, 333, 272
    scores, flow, first = torch.randn(G, n * r, m), torch.randn(G, n * r, m), torch.randint(0, own, (n,))
    before, found = torch.get_num_threads(), []
    with serving(instructions):
        try:
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                p, again, ds = scores.clone(), scores.clone(), flow.clone()
                cpp._softmax_forward(torch.float32, p, first, 0.3, 0, own, G, n, r, m)
                cpp._softmax_backward(torch.float32, again, ds, first, 0.3, 0, own, G, n, r, m)
                found.append((p, again, ds))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    columns = torch.arange(m)
    unseen = (columns < first[:, None]) | (columns > own + torch.arange(n)[:, None])  # (n, m)
    exact = (0.3 * scores.double()).view(G, n, r, m).masked_fill(unseen[:, None], -torch.inf)
    p, again, ds = found[0]
    assert torch.equal(p, again)
    wanted = exact.softmax(-1)
    torch.testing.assert_close(p.view(wanted.shape).double(), wanted, rtol=1e-5, atol=1e-7)
    flow = flow.double().view(wanted.shape)
    wanted_ds = 0.3 * wanted * (flow - (wanted * flow).sum(-1, keepdim=True))
    torch.testing.assert_close(ds.view(wanted.shape).double(), wanted_ds, rtol=1e-5, atol=1e-7)
    for t in (p, ds):
        assert not t.view(wanted.shape)[unseen[:, None].expand(wanted.shape)].any()


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize(("window", "dtype"), [(64, torch.float32), (64, torch.bfloat16), (None, torch.float32)])
def test_memory_is_linear_in_time(window: int | None, dtype: torch.dtype) -> None:
    """No tensor is larger than the inputs, or than the scores of one block."""
    case = Case(2000, window, H=2, K=8)
    inputs = [t.to(dtype) for t in case.inputs()]
    saved: list[int] = []
    pack = lambda t: (saved.append(t.numel()), t)[1]  # noqa: E731
    with serving("native"), Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results(case, inputs)
    block = 64 * case.H * (2000 if window is None else 64 + 64)
    assert largest.elements <= max(block, inputs[0].numel())
    assert sum(saved) == sum(t.numel() for t in inputs) + 2000  # and positions


def test_it_reaches_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = library.Kernel.__call__

    def spy(kernel: library.Kernel, *arguments: Any) -> None:
        called.append(kernel.name.removeprefix("attention_softmax_"))
        original(kernel, *arguments)

    monkeypatch.setattr(library.Kernel, "__call__", spy)
    case = Case(5, 3)
    with serving("native"):
        results(case, [t.float() for t in case.inputs()])
        assert called == ["forward", "backward"]
        with torch.inference_mode():
            local_attention(*(t.bfloat16() for t in case.inputs()), case.positions(), 3)
        local_attention(*(t.bfloat16() for t in case.inputs()), case.positions(), 3)
        assert called == ["forward", "backward", "forward", "forward"]
        results(case, case.inputs())  # fp64 is the reference
        results(case, [t.half() for t in case.inputs()])
    with serving("torch"):
        results(case, [t.float() for t in case.inputs()])
    assert len(called) == 4
