"""One forward, one state: any split, any batch, any padding, packing and forks give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from griffin import PRESETS, Griffin, State
from griffin.config import griffin_pattern
from griffin.fingerprint import of as fingerprint_of
from griffin.ops.rg_lru import C
from griffin.quantize import quantize
from griffin.state import AttentionState
from griffin.train.parallel import prepare_blocks

FAMILIES = ["griffin-tiny", "hawk-tiny", "transformer-tiny"]
SAME = {"rtol": 0, "atol": 1e-5}  # logits of order 1 after a few dozen fp32 sums in another order
MakeModel = Callable[..., Griffin]


def tokens(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 259, (B, T), generator=torch.Generator().manual_seed(seed))


def run(model: Griffin, ids: Tensor, splits: list[int], state: State | None = None, **kwargs: Tensor) -> Tensor:
    """Logits of `ids` read in pieces; positions are cut along."""
    state = model.new_state(ids.shape[0]) if state is None else state
    pieces, start = [], 0
    for stop in [*splits, ids.shape[1]]:
        if stop > start:
            cut = {name: value[:, start:stop] for name, value in kwargs.items()}
            pieces.append(model(ids[:, start:stop], state, **cut))
            start = stop
    return model.logits(torch.cat(pieces, dim=1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_length_up_to_three_windows_in_ones_and_in_one(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    T = 3 * 16
    ids = tokens(2, T)
    full = model.logits(model(ids))
    assert_close(run(model, ids, list(range(1, T))), full, **SAME)
    for length in range(1, T):  # prefill of every length, then one token
        state = model.new_state(2)
        model(ids[:, :length], state)
        assert_close(model.logits(model(ids[:, length : length + 1], state))[:, 0], full[:, length], **SAME)


@pytest.mark.parametrize("family", FAMILIES)
@given(splits=st.lists(st.integers(1, 69), max_size=6), documents=st.lists(st.integers(0, 69), max_size=4))
def test_any_split_with_resets_anywhere(
    make_model: MakeModel, family: str, splits: list[int], documents: list[int]
) -> None:
    model = make_model(family)
    ids = tokens(2, 70)
    positions = torch.arange(70).repeat(2, 1)
    for row in range(2):  # other places in each row
        for start in sorted((document + 3 * row) % 70 for document in documents):
            positions[row, start:] = torch.arange(70 - start)
    with torch.no_grad():
        full = model.logits(model(ids, positions=positions))
        assert_close(run(model, ids, sorted(splits), positions=positions), full, **SAME)


@pytest.mark.parametrize("family", FAMILIES)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_packed_documents_equal_documents_alone_with_gradients(
    make_model: MakeModel, family: str, lengths: list[int]
) -> None:
    model = make_model(family)
    ids = [tokens(1, length, seed=index) for index, length in enumerate(lengths)]
    weights = [torch.randn(1, length, 32) for length in lengths]
    packed = model(torch.cat(ids, dim=1), positions=torch.cat([torch.arange(n) for n in lengths])[None])
    alone = [model(document) for document in ids]
    assert_close(packed, torch.cat(alone, dim=1), **SAME)
    parameters = [p for name, p in model.named_parameters()]
    grads = torch.autograd.grad((packed * torch.cat(weights, dim=1)).sum(), parameters, allow_unused=True)
    loss = sum((a * w).sum() for a, w in zip(alone, weights, strict=True))
    for found, wanted in zip(grads, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    first=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    second=st.lists(st.integers(0, 30), min_size=4, max_size=4),
)
@torch.no_grad()
def test_rows_of_different_lengths_do_not_know_each_other(
    make_model: MakeModel, family: str, first: list[int], second: list[int]
) -> None:
    """Two ragged calls, then one token: each row equals the row alone, whatever the padding holds."""
    model = make_model(family)
    B = len(first)
    state = model.new_state(B)
    read: list[list[int]] = [[] for _ in range(B)]
    for call, lengths in enumerate((first, second[:B])):
        T = max(1, *lengths)
        ids = tokens(B, T, seed=call)
        hidden = model(ids, state, lengths=torch.tensor(lengths))
        for row, length in enumerate(lengths):
            read[row] += ids[row, :length].tolist()
            if length:
                alone = model(torch.tensor([read[row]]))
                assert_close(hidden[row, :length], alone[0, -length:], **SAME)
    last = tokens(B, 1, seed=9)
    hidden = model(last, state)
    for row in range(B):
        alone = model(torch.tensor([[*read[row], int(last[row])]]))
        assert_close(hidden[row, 0], alone[0, -1], **SAME)
        assert int(state.position[row]) == len(read[row]) + 1


@torch.no_grad()
def test_padding_may_hold_anything(make_model: MakeModel) -> None:
    model = make_model()
    ids = tokens(3, 9)
    left, right = ids.clone(), ids.clone()
    left[1, 4:], right[1, 4:] = -7, 10**9
    left[2], right[2] = 3, 4
    states = [model.new_state(3) for _ in range(2)]
    for padded, state in zip((left, right), states, strict=True):
        model(padded, state, lengths=torch.tensor([9, 4, 0]))
    for name, tensor in states[0].tensors().items():
        assert torch.equal(tensor, states[1].tensors()[name]), name
        assert not tensor[2].any(), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ragged_rows_with_resets_inside(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    ids = tokens(3, 20)
    positions = torch.stack([torch.arange(20), (torch.arange(20) - 7) % 20, (torch.arange(20) - 18) % 20])
    positions[1, :7], positions[2, :18] = torch.arange(7), torch.arange(18)
    lengths = torch.tensor([13, 9, 18])  # the third row stops right before its second document
    state = model.new_state(3)
    model(ids, state, positions=positions, lengths=lengths)
    following = tokens(3, 5, seed=4)
    found = model(following, state)
    for row, length in enumerate(lengths.tolist()):
        start = 7 if row == 1 else 0
        document = torch.cat([ids[row, start:length], following[row]])[None]
        assert_close(found[row], model(document)[0, -5:], **SAME)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fork_is_fresh_and_leaves_the_original_alone(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    ids, state = tokens(2, 30), model.new_state(2)
    model(ids, state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    fork = state.clone()
    a = run(model, tokens(2, 25, seed=2), [3], fork)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
    assert_close(a, model.logits(model(torch.cat([ids, tokens(2, 25, seed=2)], dim=1)))[:, 30:], **SAME)
    assert_close(run(model, tokens(2, 25, seed=2), [3], state), a, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_select_reorder_and_scatter(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    ids, state = tokens(3, 21), model.new_state(3)
    model(ids, state)
    swapped = state.rows([2, 0, 2])
    following = tokens(3, 4, seed=3)
    expected = model(torch.cat([ids[[2, 0, 2]], following], dim=1))[:, 21:]
    assert_close(model(following, swapped), expected, **SAME)
    big = model.new_state(4)
    model(tokens(4, 33, seed=5), big)
    big.set_rows_([3, 1], state.rows([0, 2]))
    found = model(tokens(4, 2, seed=6), big)
    for place, row in ((3, 0), (1, 2)):
        alone = model(torch.cat([ids[row], tokens(4, 2, seed=6)[place]])[None])
        assert_close(found[place], alone[0, 21:], **SAME)
    for wrong in ([0, 3], [-1]):
        with pytest.raises(ValueError, match=r"must be a list within 0 \.\. 2"):
            state.rows(wrong)
    with pytest.raises(ValueError, match="different rows"):
        big.set_rows_([1, 1], state.rows([0, 2]))


@torch.no_grad()
def test_state_bytes_never_grow(make_model: MakeModel) -> None:
    model = make_model()
    state = model.new_state(1)
    nbytes, pointers = state.nbytes, {name: t.data_ptr() for name, t in state.tensors().items()}
    # R = 48: h fp32 and 3 conv inputs, twice; 17 slots of keys and values 8 wide; one int64.
    assert nbytes == 2 * (48 * 4 + 3 * 48 * 4) + 2 * 17 * 8 * 4 + 8
    for T in (1, 40, 1, 7):
        model(tokens(1, T), state)
    assert state.nbytes == nbytes
    assert pointers == {name: t.data_ptr() for name, t in state.tensors().items()}


@torch.no_grad()
def test_global_attention_grows_by_doubling(make_model: MakeModel) -> None:
    state = make_model("transformer-tiny").new_state(1)
    model = make_model("transformer-tiny")
    sizes = set()
    for _ in range(40):
        model(tokens(1, 1), state)
        layer = state.layers[0]
        assert isinstance(layer, AttentionState)
        sizes.add(layer.keys.shape[1])
    assert sizes == {1, 2, 4, 8, 16, 32, 64}


def test_gradients_through_a_state_are_those_of_the_chunk(make_model: MakeModel) -> None:
    """A state carries values, not gradients; a chunk's own gradient is exact, and the state stays usable."""
    model = make_model()
    ids = tokens(2, 30)
    for split in (29, 20):
        state = model.new_state(2)
        with torch.no_grad():
            model(ids[:, :split], state)
        frozen = state.clone()
        hidden = model(ids[:, split:], state)
        assert not any(tensor.requires_grad for tensor in state.tensors().values())
        found = torch.autograd.grad(hidden.square().sum(), list(model.parameters()))
        # Finite differences along a random direction, in fp64.
        double = Griffin(model.config, dtype=torch.float64)
        double.load_state_dict(model.state_dict())
        direction = [torch.randn_like(p) for p in double.parameters()]
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                for p, d in zip(double.parameters(), direction, strict=True):
                    p += step * d
                fresh = double.new_state(2)
                for name, tensor in fresh.tensors().items():
                    tensor.copy_(frozen.tensors()[name])
                fresh.longest = frozen.longest
                values.append(double(ids[:, split:], fresh).square().sum())
        slope = (values[0] - values[1]) / 2e-6
        along = sum((g.double() * d).sum() for g, d in zip(found, direction, strict=True))
        assert_close(along, slope, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_inference_mode_may_make_and_advance_states(make_model: MakeModel) -> None:
    model = make_model()
    with torch.inference_mode():
        state = model.new_state(1)
        model(tokens(1, 5), state)
        fork = state.clone()
    model(tokens(1, 1), state)
    model(tokens(1, 1), fork)
    assert torch.equal(state.position, torch.tensor([6]))


@torch.no_grad()
def test_slots_that_grew_in_inference_mode_are_written_outside_it(make_model: MakeModel) -> None:
    model = make_model("transformer-tiny")
    ids, state = tokens(1, 20), model.new_state(1)
    with torch.inference_mode():
        pieces = [model(ids[:, :12], state), model(ids[:, 12:13], state)]
    pieces += [model(ids[:, 13:16], state), model(ids[:, 16:], state)]
    assert_close(torch.cat([piece.clone() for piece in pieces], dim=1), model(ids), **SAME)


@torch.no_grad()
def test_padding_takes_no_slots(make_model: MakeModel) -> None:
    """Global attention keeps what was read, and of each row that; whatever the padding says, or how much it is."""
    model = make_model("transformer-tiny")
    ids = tokens(2, 12)
    positions = torch.arange(12).repeat(2, 1)
    positions[0, 3:] = 200_000
    positions[1, 5:] = -7
    state = model.new_state(2)
    model(ids, state, positions=positions, lengths=torch.tensor([3, 5]))
    assert state.longest == 5
    state = model.new_state(2)
    for _ in range(50):
        hidden = model(ids, state, lengths=torch.tensor([1, 0]))
    assert state.longest == 50
    assert state.tensors()["layers.0.keys"].shape[1] <= 96  # 12 doubled until 50 fit
    assert_close(hidden[0, 0], model(ids[:1, :1].expand(1, 50))[0, -1], **SAME)
    # The longest row need not be the one that reads most.
    model(ids, state, lengths=torch.tensor([0, 12]))
    assert state.longest == 50
    model(ids, state, lengths=torch.tensor([0, 0]))
    assert state.longest == 50
    model(ids, state)
    assert state.longest == 62


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@torch.no_grad()
def test_lengths_and_positions_in_any_whole_numbers(make_model: MakeModel, dtype: torch.dtype) -> None:
    model, ids = make_model(), tokens(3, 9)
    lengths, positions = torch.tensor([0, 4, 9]), torch.arange(9).repeat(3, 1)
    states = [model.new_state(3) for _ in range(2)]
    wanted = model(ids, states[0], positions=positions, lengths=lengths)
    found = model(ids, states[1], positions=positions.to(dtype), lengths=lengths.to(dtype))
    assert torch.equal(found[1, :4], wanted[1, :4])
    assert torch.equal(found[2], wanted[2])
    for name, tensor in states[0].tensors().items():
        assert torch.equal(tensor, states[1].tensors()[name]), name


@torch.no_grad()
def test_rows_of_another_shape_are_refused_before_anything_is_written(make_model: MakeModel) -> None:
    state = make_model(window=16).new_state(2)
    grown = make_model("transformer-tiny").new_state(2)
    pointers = {name: tensor.data_ptr() for name, tensor in grown.tensors().items()}
    for mine, other, message in (
        (state, make_model(window=8), r"layers\.2\.keys is \(1, 9, 1, 8\) .* and \(2, 17, 1, 8\)"),
        (state, make_model(window=None), "other layers"),
        (state, make_model(dtype=torch.bfloat16), r"conv is .*bfloat16 in source and .*float32"),
        (state, make_model("hawk-tiny"), "other layers"),
        (grown, make_model("transformer-tiny", num_heads=2), r"keys is \(1, 12, 1, 16\)"),
    ):
        source = other.new_state(1)
        other(tokens(1, 12), source)
        with pytest.raises(ValueError, match=message):
            mine.set_rows_([0], source)
        assert not any(tensor.any() for tensor in mine.tensors().values())
    assert pointers == {name: tensor.data_ptr() for name, tensor in grown.tensors().items()}


@torch.no_grad()
def test_rows_of_a_state_may_be_exchanged_within_it(make_model: MakeModel) -> None:
    model = make_model()
    state = model.new_state(2)
    model(tokens(2, 9), state)
    wanted = state.rows([1, 0])
    state.set_rows_([1, 0], state)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), wanted.tensors().values(), strict=True))


def test_the_initialisations_have_their_standard_deviations() -> None:
    config = replace(
        PRESETS["griffin-tiny"],
        width=256,
        mlp_width=768,
        lru_width=512,
        num_heads=4,
        num_gate_blocks=8,
        vocab_size=500,
        init="recurrentgemma",
    )
    L, D, R, E = 3, 256, 512, 768
    for init, gates in (("recurrentgemma", R**-0.5), ("paper", (R // 8) ** -0.5)):
        model = Griffin(replace(config, init=init), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        named = dict(model.named_parameters())
        expected = {
            "model.embed_tokens.weight": D**-0.5,
            "model.layers.0.temporal_block.linear_x.weight": D**-0.5,
            "model.layers.0.temporal_block.linear_y.weight": D**-0.5,
            "model.layers.0.temporal_block.linear_out.weight": (2 / L / R) ** 0.5,
            "model.layers.0.temporal_block.conv_1d.weight": 0.05,
            "model.layers.0.temporal_block.rg_lru.input_gate_weight": gates,
            "model.layers.0.temporal_block.rg_lru.recurrent_gate_weight": gates,
            "model.layers.0.mlp_block.gate_proj.weight": (2 * D) ** -0.5,
            "model.layers.0.mlp_block.up_proj.weight": (2 * D) ** -0.5,
            "model.layers.0.mlp_block.down_proj.weight": (2 / L / E) ** 0.5,
            "model.layers.2.temporal_block.q_proj.weight": D**-0.5,
            "model.layers.2.temporal_block.o_proj.weight": (2 / L / D) ** 0.5,
        }
        for name, std in expected.items():
            assert named[name].std().item() == pytest.approx(std, rel=0.1), name
            assert abs(named[name].mean().item()) < 0.1 * std, name
        trivial = {name for name, p in named.items() if not p.any()}
        assert trivial == {name for name in named if name.endswith("bias") or "norm" in name}
        p = named["model.layers.0.temporal_block.rg_lru.recurrent_param"].double()
        a = torch.exp(-torch.nn.functional.softplus(p))
        uniform = (a**2 - 0.9**2) / (0.999**2 - 0.9**2) if init == "recurrentgemma" else (a**C - 0.9) / 0.099
        assert -1e-3 < uniform.min() < 0.02
        assert 0.98 < uniform.max() < 1 + 1e-3
        assert uniform.mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_same_generator_gives_the_same_model() -> None:
    models = [Griffin(PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert fingerprint_of(models[0]) == fingerprint_of(models[1])
    with torch.no_grad():
        models[1].embedding[5, 5] += 1.0
        models[1].model.final_norm.weight[0] += 1e-3
    assert fingerprint_of(models[0]) != fingerprint_of(models[1])


@torch.no_grad()
def test_bf16_stays_near_fp32(make_model: MakeModel) -> None:
    """bf16 weights and activations: 8 bits, so about 1% of the logits' size after a few layers, and fp32 states."""
    exact = make_model(dtype=torch.float32)
    rounded = make_model(dtype=torch.bfloat16)
    exact.load_state_dict({name: p.float() for name, p in rounded.state_dict().items()})
    ids = tokens(2, 60)
    full, state = exact.logits(exact(ids)), rounded.new_state(2)
    found = rounded.logits(rounded(ids, state))
    assert found.dtype == torch.float32
    assert state.tensors()["layers.0.h"].dtype == torch.float32
    error = (found - full).pow(2).mean().sqrt() / full.pow(2).mean().sqrt()
    assert error < 0.03
    mixed = Griffin(exact.config, activation_dtype=torch.bfloat16)
    mixed.load_state_dict(exact.state_dict())
    assert mixed(ids).dtype == torch.bfloat16
    assert_close(mixed.logits(mixed(ids)), full, rtol=0, atol=0.2)


@torch.no_grad()
def test_activations_follow_the_parameters(make_model: MakeModel) -> None:
    ids = tokens(2, 30)
    double = Griffin(make_model().config, dtype=torch.float64)
    double.load_state_dict(make_model().state_dict())
    for name, dtype in (("double", torch.float64), ("bfloat16", torch.bfloat16), ("half", torch.float16)):
        model = getattr(make_model(), name)()
        assert model.activation_dtype == dtype
        state = model.new_state(2)
        hidden = model(ids, state)
        assert hidden.dtype == state.tensors()["layers.0.conv"].dtype == dtype
        if dtype == torch.float64:
            # fp64 throughout; not bit for bit, as with a state PyTorch multiplies other shapes.
            assert_close(hidden, double(ids), rtol=1e-12, atol=1e-12)
    mixed = Griffin(double.config, activation_dtype=torch.bfloat16).double()
    assert mixed.activation_dtype == torch.bfloat16
    mixed.activation_dtype = None
    assert mixed(ids).dtype == torch.float64
    quantised = quantize(make_model(dtype=torch.bfloat16), "int8")
    assert quantised.activation_dtype == quantised(ids).dtype == torch.bfloat16
    assert quantised.float()(ids).dtype == torch.float32


@pytest.mark.parametrize("T", [1, 12, 40])  # few tokens and many take other kernels
def test_autocast_changes_nothing(make_model: MakeModel, T: int) -> None:
    model = make_model()
    ids, found = tokens(2, T), []
    for enabled in (False, True):
        state = model.new_state(2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model.logits(model(ids))
            with torch.no_grad():
                read = model.logits(model(ids, state))
                more = model.logits(model(ids[:, :1], state))
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append([logits, read, more, *gradients, *state.tensors().values()])
        assert logits.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_of_a_state_are_right_or_refused(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(1, 5)
    with torch.no_grad():
        before = model.new_state(1)
        model(tokens(1, 9, seed=2), before)
    for name in ("h", "conv", "keys", "values"):
        layer = 2 if name in ("keys", "values") else 0
        state = before.clone()
        leaf = getattr(state.layers[layer], name).requires_grad_()
        kept = leaf.detach().clone()
        with pytest.raises(ValueError, match=rf"state\.layers\.{layer}\.{name} requires a gradient"):
            model(ids, state)
        assert torch.equal(leaf, kept)
        assert int(state.position[0]) == 9
        with torch.no_grad():
            assert model(ids, state).isfinite().all()  # without gradients it is a state like others
    for name in ("h", "conv", "keys", "values"):
        layer = 2 if name in ("keys", "values") else 0
        gradient, slope = [], []
        leaf = getattr(before.layers[layer], name).clone().requires_grad_()
        direction = torch.randn_like(leaf)
        state = before.clone()
        setattr(state.layers[layer], name, leaf * 1)
        (gradient,) = torch.autograd.grad(model(ids, state).sum(), leaf)
        double = Griffin(model.config, dtype=torch.float64)
        double.load_state_dict(model.state_dict())
        for step in (1e-6, -1e-6):
            state = double.new_state(1)
            for key, tensor in state.tensors().items():
                tensor.copy_(before.tensors()[key])
            state.longest = before.longest
            getattr(state.layers[layer], name).add_(step * direction)
            with torch.no_grad():
                slope.append(double(ids, state).sum())
        assert_close((gradient * direction).sum().double(), (slope[0] - slope[1]) / 2e-6, rtol=1e-3, atol=1e-4)


def test_compiles_into_one_graph(make_model: MakeModel) -> None:
    model = make_model()
    ids = tokens(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids), model(ids), **SAME)
    found = torch.autograd.grad(compiled(ids).square().sum(), model.embedding)[0]
    assert_close(found, torch.autograd.grad(model(ids).square().sum(), model.embedding)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: (torch.zeros(2, 0, dtype=torch.int64),), "T>0"),
        (lambda m: (torch.zeros(2, 3),), "int64"),
        (lambda m: (torch.tensor([[1, 259]]),), r"token 259 is not in the vocabulary 0 \.\. 258"),
        (lambda m: (torch.tensor([[1, -2]]),), "token -2"),
        (lambda m: (tokens(2, 3), m.new_state(3)), "2 rows, the state 3"),
        (lambda m: (tokens(1, 3), None, torch.tensor([[0, 2, 3]])), r"positions\[0, 1\]=2 must be 1 .* or 0"),
        (lambda m: (tokens(1, 3), m.new_state(1), torch.tensor([[4, 5, 6]])), r"positions\[0, 0\]=4 must be 0"),
        (lambda m: (tokens(1, 3), None, torch.tensor([0, 1, 2])), "positions is"),
        (lambda m: (tokens(1, 3), None, torch.ones(1, 3, dtype=torch.bool)), "positions is .*bool"),
        (lambda m: (tokens(1, 3), None, torch.ones(1, 3, dtype=torch.complex64)), "positions is .*complex64"),
        (lambda m: (tokens(1, 3), None, None, torch.ones(1, dtype=torch.bool)), "lengths is .*bool"),
        (lambda m: (tokens(1, 3), None, None, torch.tensor([4])), r"lengths \[4\] must be within 0 \.\. T=3"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    make_model: MakeModel, arguments: Callable[[Griffin], tuple[Tensor, ...]], message: str
) -> None:
    model = make_model()
    ids, state, positions, lengths = (*arguments(model), None, None, None)[:4]
    with pytest.raises(ValueError, match=message):
        model(ids, state, positions=positions, lengths=lengths)
    if state is not None:
        assert not any(tensor.any() for tensor in state.tensors().values())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cuda_equals_cpu(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    ids = tokens(2, 200)
    expected = model.logits(model(ids))
    on_gpu = make_model(family).cuda()
    state = on_gpu.new_state(2)
    pieces = [on_gpu(ids[:, cut].cuda(), state) for cut in (slice(0, 130), slice(130, 199), slice(199, 200))]
    assert_close(
        on_gpu.logits(torch.cat(pieces, dim=1)).cpu(), expected, rtol=0, atol=1e-3
    )  # TF32 is off; order differs


@pytest.mark.gpu
def test_cuda_gradients_equal_cpu(make_model: MakeModel) -> None:
    model, on_gpu = make_model(), make_model().cuda()
    ids = tokens(2, 150)
    expected = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(on_gpu(ids.cuda()).square().sum(), list(on_gpu.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)


def test_recomputed_activations_give_the_same_gradients_from_less_memory() -> None:
    """Bit for bit, keeping little more than one input per block."""
    config = replace(PRESETS["griffin-tiny"], block_types=griffin_pattern(12))
    ids = torch.randint(0, config.vocab_size, (2, 64))
    gradients, kept = [], []
    for recompute in ("none", "all"):
        model = Griffin(config, generator=torch.Generator().manual_seed(0))
        prepare_blocks(model, recompute=recompute)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in own))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    inputs = config.num_layers * 2 * 64 * config.width * 4
    assert inputs <= kept[1] < 2 * inputs
    assert kept[1] < kept[0] / 8


class Noting(TorchDispatchMode):
    """Note the name of every operation that PyTorch sees."""

    supports_higher_order_operators = True  # torch.compile leaves some

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["griffin-tiny", "transformer-tiny"])
def test_cheap_recomputation_gives_the_same_gradients_with_kernels(preset: str, activations: torch.dtype) -> None:
    """Kernels write memory that PyTorch does not see them write: nothing of that may be taken for a result to keep."""
    ids, gradients = tokens(2, 80), []
    for recompute in ("none", "cheap"):
        generator = torch.Generator().manual_seed(0)
        model = Griffin(PRESETS[preset], activation_dtype=activations, generator=generator)
        prepare_blocks(model, recompute=recompute)
        model(ids).float().square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize("compiled", [False, True])
def test_cheap_recomputation_runs_the_recurrence_once(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """The same gradients; what is costly is kept, what is cheap is not."""
    ids = tokens(2, 40)
    gradients, memory = {}, {}
    for recompute in ("none", "cheap"):
        model = make_model(dtype=torch.float64)  # the definitions, which PyTorch sees
        torch._dynamo.reset()
        prepare_blocks(model, recompute=recompute, compiled=compiled, backend="aot_eager")
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids).square().sum()
        memory[recompute] = sum(sizes)
        calls: list[str] = []
        with Noting(calls):
            loss.backward()
        gradients[recompute] = [parameter.grad for parameter in model.parameters()]
        assert "griffin::rg_lru" not in calls
        assert "griffin::rg_lru_backward" in calls
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))
    assert memory["cheap"] < memory["none"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
@pytest.mark.parametrize(("activations", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_compiled_blocks_give_the_same_gradients(preset: str, activations: torch.dtype, tolerance: float) -> None:
    """Whole, as one graph for each kind of block; packed documents, so that no mask is left out."""
    ids, positions, gradients = tokens(2, 40), torch.arange(40).repeat(2, 1), []
    positions[0, 17:] -= 17
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        model = Griffin(PRESETS[preset], activation_dtype=activations, generator=generator)
        torch._dynamo.reset()
        counters.clear()
        prepare_blocks(model, recompute="cheap", compiled=compiled, backend="aot_eager")
        hidden = model(ids, positions=positions)
        (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert counters["stats"]["unique_graphs"] == len(set(PRESETS[preset].block_types))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_of_a_single_row_have_a_gradient(make_model: MakeModel, dtype: torch.dtype) -> None:
    model, grads = make_model(dtype=dtype), []
    row = torch.randn(model.config.width).to(dtype)
    for hidden in (row, row[None], row[None, None]):
        leaf = hidden.clone().requires_grad_()
        logits = model.logits(leaf)
        assert logits.shape == (*hidden.shape[:-1], model.config.vocab_size)
        grads += torch.autograd.grad(logits.square().sum(), [leaf, model.embedding])
    for one, other in zip(grads, grads[2:], strict=False):
        assert_close(one.flatten(), other.flatten())


@pytest.mark.parametrize("preset", ["griffin-tiny", "transformer-tiny"])
@torch.no_grad()
def test_the_head_of_a_state_is_its_first_rows(make_model: MakeModel, preset: str) -> None:
    """Read through the view, the rows are what they would be alone, and the others are untouched."""
    model, ids = make_model(preset), tokens(3, 20)
    state = model.new_state(3)
    model(ids[:, :7], state)
    state.reserve_(64)
    wanted, last = state.rows([0, 1]), state.rows([2])
    head = state.head(2)
    found = [model(ids[:2, 7:12], head), model(ids[:2, 12:13], head)]
    assert torch.equal(torch.cat(found, 1), torch.cat([model(ids[:2, 7:12], wanted), model(ids[:2, 12:13], wanted)], 1))
    for rows, alone in (([0, 1], wanted), ([2], last)):
        there = state.rows(rows).tensors()
        assert all(torch.equal(there[name], tensor) for name, tensor in alone.tensors().items())
    assert (head.longest, state.longest) == (13, 7)
    with pytest.raises(ValueError, match=r"head\(4\) of a state of 3 rows"):
        state.head(4)
