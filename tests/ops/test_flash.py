"""local_attention as flash attention computes it, which CPUs do not have: a stand-in takes the place of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from griffin import Griffin
from griffin.ops import attention as attention_op
from griffin.ops import device, flash, local_attention
from griffin.ops.cpu import library
from griffin.ops.flash import Sequences, sequences
from griffin.train.parallel import Recompute, prepare_blocks
from tests.ops import reference

KERNELS = (flash._forward, flash._backward)  # not the stand-in


def scores(
    q: Tensor, k: Tensor, cut: Sequences, window: int | None
) -> list[tuple[slice, slice, Tensor, Tensor]]:  # queries, keys, (H, n, m) scores, (n, m) whether it is seen
    """What FlashAttention's documentation says of causal masks, windows and cu_seqlens."""
    (_, H, K), G = q.shape, k.shape[1]
    starts = list(zip(cut.queries.tolist(), cut.keys.tolist(), strict=True))
    assert starts[0] == (0, 0)
    assert starts[-1] == (len(q), len(k))
    assert cut.queries.dtype == cut.keys.dtype == torch.int32
    found = []
    for (q0, k0), (q1, k1) in pairwise(starts):
        n, m = q1 - q0, k1 - k0
        assert 0 <= n <= cut.longest_queries <= len(q)
        assert 0 <= m <= cut.longest_keys <= len(k)
        assert n <= m  # every query sees a key, or its result were not a number
        if n:
            offset = torch.arange(m) - (torch.arange(n)[:, None] + m - n)  # aligned at the bottom right
            seen = (offset <= 0) & (offset >= -(m if window is None else window))
            keys = k[k0:k1].repeat_interleave(H // G, dim=1)
            s = torch.einsum("nhc,mhc->hnm", q[q0:q1], keys) * K**-0.5
            found.append((slice(q0, q1), slice(k0, k1), s.masked_fill(~seen, -torch.inf), seen))
    return found


def forward(q: Tensor, k: Tensor, v: Tensor, cut: Sequences, window: int | None) -> tuple[Tensor, Tensor]:
    H, G = q.shape[1], k.shape[1]
    out, log_sums = torch.full_like(q, torch.nan), q.new_full((H, len(q)), torch.nan)
    for mine, theirs, s, _ in scores(q, k, cut, window):
        out[mine] = torch.einsum("hnm,mhc->nhc", s.softmax(-1), v[theirs].repeat_interleave(H // G, dim=1))
        log_sums[:, mine] = s.logsumexp(-1)
    return out, log_sums


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, cut: Sequences, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    (_, H, K), G = q.shape, k.shape[1]
    dq, dk, dv = torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)
    for mine, theirs, s, _ in scores(q, k, cut, window):
        p = (s - log_sums[:, mine, None]).exp()
        keys, values = (t[theirs].repeat_interleave(H // G, dim=1) for t in (k, v))
        dp = torch.einsum("nhc,mhc->hnm", dout[mine], values)
        ds = p * (dp - (dout[mine] * out[mine]).sum(-1).T[..., None]) * K**-0.5
        dq[mine] = torch.einsum("hnm,mhc->nhc", ds, keys)
        dk[theirs] = torch.einsum("hnm,nhc->mhc", ds, q[mine]).unflatten(1, (G, -1)).sum(2)
        dv[theirs] = torch.einsum("hnm,nhc->mhc", p, dout[mine]).unflatten(1, (G, -1)).sum(2)
    return dq, dk, dv


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(flash, "_forward", forward)
        monkeypatch.setattr(flash, "_backward", backward)


@pytest.fixture
def _for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go where CUDA's do."""
    any_width = replace(device.FLASH, dtypes=frozenset({torch.float32, torch.float64}), multiple=1)
    monkeypatch.setattr(attention_op, "by_sequences", lambda place: True)
    monkeypatch.setattr(flash, "status", lambda place: (True, "a stand-in"))
    monkeypatch.setitem(device.OPS, "local_attention", device.Op("", cpu=any_width))


def inputs(
    B: int, T: int, S: int, H: int = 4, G: int = 2, K: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(B, T, H, K, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, S + T, G, K, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v


def rows(T: int, documents: list[tuple[int, list[int]]]) -> Tensor:
    """Each row goes on at an offset of its first document, and begins others at the tokens named."""
    positions = torch.zeros(len(documents), T, dtype=torch.int64)
    for row, (offset, starts) in zip(positions, documents, strict=True):
        row[:] = torch.arange(offset, offset + T)
        for start in sorted(starts):
            if 0 < start < T:
                row[start:] = torch.arange(T - start)
    return positions


def attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None, cut: Sequences | None = None
) -> Tensor:
    return torch.ops.griffin.flash_attention(q, k, v, positions, window, *flash.unpacked(cut))[0]  # type: ignore[no-any-return]


def check(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None, cut: Sequences | None = None) -> None:
    """Output and gradients are the definition's."""
    found = attention(q, k, v, positions, window, cut)
    wanted = local_attention(q, k, v, positions, window)
    assert_close(found, wanted)
    flow = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), flow) for out in (found, wanted)), strict=True):
        assert_close(a, b)


DOCUMENTS = st.tuples(st.integers(0, 20), st.lists(st.integers(1, 30), max_size=4))


@given(
    T=st.integers(1, 30),
    S=st.integers(0, 12),
    window=st.one_of(st.none(), st.integers(1, 20)),
    documents=st.lists(DOCUMENTS, min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2)]),
)
def test_any_documents_give_the_definition(
    T: int, S: int, window: int | None, documents: list[tuple[int, list[int]]], heads: tuple[int, int]
) -> None:
    H, G = heads
    q, k, v = inputs(len(documents), T, S, H, G)
    positions = rows(T, documents)
    check(q, k, v, positions, window)
    check(q, k, v, positions, window, sequences(positions, S))
    if all(not 0 < start < T for _, starts in documents for start in starts):
        check(q, k, v, positions, window, sequences(positions, S, inside=False))


def test_the_definition_is_the_formula_here_too() -> None:
    """Token by token: what the test above compares with shares no code with this."""
    q, k, v = inputs(3, 20, 9)
    positions = rows(20, [(0, [7, 8]), (4, [19]), (50, [])])
    assert_close(attention(q, k, v, positions, 5), reference.local_attention(q, k, v, positions, 5))


def test_sequences_of_three_rows() -> None:
    positions = rows(5, [(0, [3]), (2, []), (9, [1, 2])])
    cut = sequences(positions, 4)
    assert cut.queries.tolist() == [0, 0, 3, 5, 5, 10, 10, 11, 12, *[15] * 8]  # 9 sequences, made up to 16
    assert cut.keys.tolist() == [0, 4, 7, 9, 11, 18, 18, 23, 24, *[27] * 8]
    assert (cut.longest_queries, cut.longest_keys) == (5, 8)
    assert sequences(positions[:1], 0).queries.tolist() == [0, 3, 5]
    alone = sequences(torch.tensor([[0, 1], [7, 8]]), 4, inside=False)
    assert alone.queries.tolist() == [0, 0, 2, 2, 4]
    assert alone.keys.tolist() == [0, 4, 6, 6, 12]
    assert (alone.longest_queries, alone.longest_keys) == (2, 6)
    assert sequences(torch.tensor([[0, 1], [7, 8]]), 0, inside=False).queries.tolist() == [0, 2, 4]


def test_rows_without_documents_inside_do_not_wait() -> None:
    """On a device that has no values to read."""
    cut = sequences(torch.zeros(3, 7, dtype=torch.int64, device="meta"), 4, inside=False)
    assert cut.queries.shape == cut.keys.shape == (7,)
    assert sequences(torch.zeros(3, 1, dtype=torch.int64, device="meta"), 4).queries.shape == (7,)


def test_shapes_are_few() -> None:
    """As training brings new documents with every batch."""
    cuts = [sequences(rows(64, [(0, torch.randint(1, 64, (9,)).tolist()) for _ in range(4)]), 0) for _ in range(50)]
    assert len({(len(cut.queries), cut.longest_queries, cut.longest_keys) for cut in cuts}) <= 6


@pytest.mark.usefixtures("_for_cpu")
def test_no_rows() -> None:
    for inside in (True, False):
        cut = sequences(torch.zeros(0, 5, dtype=torch.int64), 3, inside=inside)
        assert not cut.queries.any()
        assert not cut.keys.any()
    q, k, v = inputs(0, 5, 3)
    assert local_attention(q, k, v, torch.zeros(0, 5, dtype=torch.int64), 4).shape == q.shape


def test_strides_do_not_matter() -> None:
    positions = rows(9, [(2, [4]), (0, [])])
    plain = inputs(2, 9, 3)
    wanted = local_attention(*plain, positions, 4)
    for first, second in ((0, 1), (1, 2), (1, 3), (2, 3)):
        strided = [t.transpose(first, second).contiguous().transpose(first, second) for t in plain]
        assert_close(attention(*strided, positions, 4), wanted)
    every_other = [t.repeat_interleave(2, -1)[..., ::2] for t in plain]
    assert all(flash._end_to_end(t).stride(-1) == 1 for t in every_other)
    assert_close(attention(*every_other, positions, 4), wanted)


def test_opcheck() -> None:
    q, k, v = inputs(2, 9, 3, dtype=torch.float32)
    positions = rows(9, [(2, [4]), (0, [])])
    cut = flash.unpacked(sequences(positions, 3))
    torch.library.opcheck(torch.ops.griffin.flash_attention.default, (q, k, v, positions, 4, *cut))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    alone = (q, k, v, positions, None, None, None, 0, 0)
    torch.library.opcheck(torch.ops.griffin.flash_attention.default, alone, test_utils=tests)
    out, log_sums = (t.detach() for t in torch.ops.griffin.flash_attention(q, k, v, positions, 4, *cut))
    backward = (out, q, k, v, out, log_sums, positions, 4, *cut)
    torch.library.opcheck(
        torch.ops.griffin.flash_attention_backward.default,
        [t.detach() if isinstance(t, Tensor) else t for t in backward],
    )


@pytest.mark.usefixtures("_for_cpu")
@pytest.mark.parametrize("given_cut", [True, False])
def test_it_compiles_into_one_graph(given_cut: bool) -> None:
    q, k, v = inputs(2, 9, 3, dtype=torch.float32)
    positions = rows(9, [(2, [4]), (0, [])])
    cut = sequences(positions, 3) if given_cut else None
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    results = [op(q, k, v, positions, 4, cut) for op in (compiled, local_attention)]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in results), strict=True):
        assert_close(a, b)
    assert_close(*results)


class Counted:
    """A function that knows how often it was called."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: object, **named: object) -> object:
        self.calls += 1
        return self.function(*arguments, **named)


@pytest.mark.usefixtures("_for_cpu")
@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])  # cheap keeps the results of attention
def test_a_model_cuts_once_for_all_its_layers(
    make_model: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch, recompute: Recompute
) -> None:
    model, plain = make_model(), make_model()
    prepare_blocks(model, recompute=recompute)
    layers = model.config.block_types.count("attention")
    ids, positions = torch.randint(0, 259, (2, 40)), rows(40, [(0, [7, 30]), (0, [])])
    called, cuts = Counted(forward), Counted(sequences)
    monkeypatch.setattr(flash, "_forward", called)
    monkeypatch.setattr(flash, "sequences", cuts)
    found, wanted = model(ids, positions=positions), _by_definition(plain, ids, positions)
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), m.embedding)[0] for m, out in ((model, found), (plain, wanted))]
    assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert (called.calls, cuts.calls) == (layers * (2 if recompute == "all" else 1), 1)


def _by_definition(model: Griffin, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_op, "by_sequences", lambda place: False)
        patch.setitem(device.OPS, "local_attention", device.Op(""))
        return model(ids, positions=positions)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_for_cpu")
def test_chunks_of_a_prompt_and_padding(make_model: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go on from a state, further than the window, with different numbers of tokens that count."""
    cuts = Counted(sequences)
    monkeypatch.setattr(flash, "sequences", cuts)
    model, ids = make_model(window=16), torch.randint(0, 259, (2, 60))
    wanted = _by_definition(model, ids)
    state = model.new_state(2)
    with torch.no_grad(), library.without_kernels():
        first = model(ids[:, :25], state, lengths=torch.tensor([25, 11]))
        rest = torch.stack([ids[0, 25:50], ids[1, 11:36]])
        second = model(rest, state, lengths=torch.tensor([25, 20]))
        third = model(torch.stack([ids[0, 50:51], ids[1, 31:32]]), state)
    assert_close(torch.cat([first[0], second[0], third[0]]), wanted[0, :51], rtol=1e-4, atol=1e-4)
    assert_close(torch.cat([first[1, :11], second[1, :20], third[1]]), wanted[1, :32], rtol=1e-4, atol=1e-4)
    assert cuts.calls == 2  # one token takes ring_attention
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


@pytest.mark.usefixtures("_for_cpu")
def test_packed_rows_are_sequences(make_model: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any lengths, beyond the window, one without tokens: one call of flash attention a layer, gradients too."""
    called = Counted(forward)
    monkeypatch.setattr(flash, "_forward", called)
    model, ids = make_model(window=16, dtype=torch.float64), torch.randint(0, 259, (3, 60))
    wanted = _by_definition(model, ids)
    state = model.new_state(3)
    with library.without_kernels():
        with torch.no_grad():
            model(torch.cat([ids[0, :3], ids[1, :25]])[None], state, offsets=torch.tensor([0, 3, 28, 28]))
        called.calls = 0
        found = model(
            torch.cat([ids[0, 3:43], ids[1, 25:26], ids[2, :5]])[None], state, offsets=torch.tensor([0, 40, 41, 46])
        )
    expected = torch.cat([wanted[0, 3:43], wanted[1, 25:26], wanted[2, :5]])[None]
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert called.calls == model.config.block_types.count("attention")
    assert torch.isfinite(torch.autograd.grad(found.square().sum(), model.embedding)[0]).all()


@pytest.mark.usefixtures("_for_cpu")
def test_padding_starts_no_documents(make_model: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch) -> None:
    model, positions = make_model(), rows(20, [(0, [4]), (0, [])])
    positions[1, 5:] = 0
    cuts: list[Sequences] = []
    monkeypatch.setattr(flash, "sequences", lambda *a, **n: cuts.append(sequences(*a, **n)) or cuts[-1])
    model(torch.randint(0, 259, (2, 20)), positions=positions, lengths=torch.tensor([20, 5]))
    assert cuts[0].queries.tolist() == [0, 4, 20, 40, 40]


@pytest.mark.usefixtures("_for_cpu")
def test_a_model_compiles_into_one_graph(make_model: Callable[..., Griffin]) -> None:
    model, ids = make_model(block_types=("attention",)), torch.randint(0, 259, (2, 40))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for positions in (None, rows(40, [(0, [7, 30]), (0, [])])):
        found = compiled(ids, positions=positions)
        assert_close(found, _by_definition(model, ids, positions), rtol=1e-4, atol=1e-4)


def test_pytorch_still_has_these_ops() -> None:
    """Fails where PyTorch renames what is called here: there, `flash.status` would quietly say no for ever."""
    flash_forward = torch.ops.aten._flash_attention_forward.default._schema
    flash_backward = torch.ops.aten._flash_attention_backward.default._schema
    names = [argument.name for argument in flash_forward.arguments]
    assert names[:10] == [*flash.ARGUMENTS[:9], "return_debug_mask"]
    assert [result.name for result in flash_forward.returns[:2]] == ["output", "softmax_logsumexp"]
    others = [argument.name for argument in flash_backward.arguments]
    gradients = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert others[:14] == [*gradients, *flash.ARGUMENTS[3:9], "rng_state", "unused"]
    assert {"window_size_left", "window_size_right"} < {a.name for a in flash_forward.arguments if a.kwarg_only}
    assert {"window_size_left", "window_size_right"} < {a.name for a in flash_backward.arguments if a.kwarg_only}


class Calls(TorchDispatchMode):
    """Keeps what operations were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made[func.__name__] = (*args, kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [7, None])
def test_pytorch_takes_the_call(window: int | None) -> None:
    """On tensors without values: the arguments, and the shapes and dtypes that the op promises to torch.compile."""
    q, k, v = (t.detach().to("meta", torch.bfloat16).flatten(0, 1) for t in inputs(2, 9, 3))
    cut = sequences(torch.zeros(2, 9, device="meta"), 3, inside=False)
    with Calls() as calls:
        out, log_sums = KERNELS[0](q, k, v, cut, window)
        grads = KERNELS[1](out, q, k, v, out, log_sums, cut, window)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (log_sums.shape, log_sums.dtype) == ((4, 18), torch.float32)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    *given, named = calls.made["_flash_attention_forward.default"]
    bounds = [cut.queries, cut.keys, 9, 12]
    assert all(a is b or a == b for a, b in zip(given, [q, k, v, *bounds, 0.0, True, False], strict=True))
    assert named == {"window_size_left": window or -1, "window_size_right": 0}
    *given, named = calls.made["_flash_attention_backward.default"]
    wanted = [out, q, k, v, out, log_sums, *bounds, 0.0, True]
    assert all(a is b or a == b for a, b in zip(given[:-2], wanted, strict=True))
    assert named == {"window_size_left": window or -1, "window_size_right": 0}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Flash Attention defaults to a non-deterministic algorithm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(10, 1, 256), (4, 2, 64)])
@pytest.mark.parametrize("window", [1, 64, 300, None])
@pytest.mark.parametrize(
    ("S", "T", "documents"),
    [(0, 500, [(0, [7, 8, 300]), (0, [])]), (130, 257, [(3, [100]), (999, [])]), (64, 1, [(70, []), (0, [])])],
)
def test_flash_on_a_gpu(
    device: torch.device,
    S: int,
    T: int,
    documents: list[tuple[int, list[int]]],
    window: int | None,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """Against the definition in fp64, on a CPU: outputs, and gradients, also of keys that no query sees."""
    q, k, v = (t.detach().to(dtype) for t in inputs(len(documents), T, S, *heads))
    positions, flow = rows(T, documents), torch.randn(len(documents), T, heads[0], heads[2]).to(dtype)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out = local_attention(*leaves, positions, window)
    wanted = [out, *torch.autograd.grad(out, leaves, flow.double())]
    leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
    assert device.kernels("local_attention", *leaves, size=leaves[0].shape[-1]) is flash
    for cut in (None, sequences(positions.to(device), S)):
        out = local_attention(*leaves, positions.to(device), window, cut)
        for a, b in zip([out, *torch.autograd.grad(out, leaves, flow.to(device))], wanted, strict=True):
            assert a.dtype == dtype
            assert (a.cpu().double() - b).abs().max() < 2e-2 * b.abs().max()
