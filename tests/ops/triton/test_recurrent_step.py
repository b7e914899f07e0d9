"""recurrent_step_ by Triton against its formula in fp64 and the separate ops, whole models, what the kernels need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin import Griffin, State
from griffin.ops import block_diagonal_linear, causal_conv1d, device, geglu, recurrent_step_, rg_lru
from tests.ops import reference
from tests.ops.triton.compiled import launched

pytest.importorskip("triton", reason="the kernels are Triton's")

from triton.runtime.interpreter import InterpreterBuilder

from griffin.ops.triton import recurrent_step

MakeModel = Callable[..., Griffin]
NAMES = (
    *("x", "y", "conv_weight", "conv_bias", "input_gate_weight", "input_gate_bias"),
    *("recurrent_gate_weight", "recurrent_gate_bias", "recurrent_param", "conv", "h", "reset"),
)
# (B, blocks, width of a block, taps): one row and more than fit a tile, blocks narrower and wider than a slice.
SHAPES = [(1, 4, 8, 4), (3, 2, 33, 4), (17, 1, 64, 2), (70, 2, 12, 1), (2, 1, 256, 4), (5, 1, 1, 6)]


def given(B: int, blocks: int, width: int, taps: int) -> dict[str, Tensor]:
    R = blocks * width
    shapes = [(B, R), (B, R), (R, taps), (R,), (blocks, width, width), (blocks, width)]
    shapes += [(blocks, width, width), (blocks, width), (R,), (B, taps - 1, R), (B, R)]
    tensors = {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=False)}
    for gate in ("input_gate_weight", "recurrent_gate_weight"):
        tensors[gate] *= width**-0.5
    return tensors | {"recurrent_param": torch.empty(R).uniform_(-8, 2), "reset": torch.arange(B) % 3 == 1}


def changed(tensors: dict[str, Tensor], dtype: torch.dtype, parameters: torch.dtype) -> dict[str, Tensor]:
    """The activations in dtype, the parameters in another, h in fp32 (fp64 for fp64), reset as it is."""
    dtypes = dict.fromkeys(NAMES, parameters) | dict.fromkeys(("x", "y", "conv"), dtype)
    dtypes |= {"h": torch.promote_types(dtype, torch.float32), "reset": torch.bool}
    return {name: tensors[name].to(dtypes[name], copy=True) for name in NAMES}


@torch.no_grad()
def step(tensors: dict[str, Tensor], unscaled: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    given = [tensors[name] for name in NAMES]
    out = recurrent_step_(*given, unscaled_first_token=unscaled)
    return separate_ops(*given, unscaled) if out is None else out, tensors["h"], tensors["conv"]


def separate_ops(
    x: Tensor, y: Tensor, w: Tensor, b: Tensor, wi: Tensor, bi: Tensor, wr: Tensor, br: Tensor, *rest: Any
) -> Tensor:
    """What a model does where no kernel does it all."""
    p, conv, h, reset, unscaled = rest
    u, last_conv = causal_conv1d(x[:, None], w, b, conv, reset[:, None])
    gates = block_diagonal_linear(u, wi, bi), block_diagonal_linear(u, wr, br)
    states, last_h = rg_lru(u, *gates, p, h, reset[:, None], unscaled_first_token=unscaled)
    h.copy_(last_h)
    conv.copy_(last_conv)
    return geglu(y[:, None], states)[:, 0]


def formula(tensors: dict[str, Tensor], unscaled: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, y, w, b, wi, bi, wr, br, p, conv, h, reset = (tensors[name] for name in NAMES)
    u, last = reference.causal_conv1d(x[:, None], w, b, conv, reset[:, None])
    blocks = u.view(u.shape[0], *bi.shape)
    i, r = (torch.einsum("bni,nij->bnj", blocks, w) + b for w, b in ((wi, bi), (wr, br)))
    h = reference.rg_lru(u, i.reshape(u.shape), r.reshape(u.shape), p, h, reset[:, None], unscaled=unscaled)[:, 0]
    return reference.geglu(y, h), h, last


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call that reaches Triton's kernels."""
    calls: list[int] = []
    run = recurrent_step.recurrent_step_

    def noted(x: Tensor, *args: Any) -> Tensor:
        calls.append(x.shape[0])
        return run(x, *args)

    monkeypatch.setattr(recurrent_step, "recurrent_step_", noted)
    return calls


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_formula(served: list[int], shape: tuple[int, int, int, int]) -> None:
    assert torch.empty(5).isnan().all()  # so that an output left out is seen
    tensors = given(*shape)
    for unscaled in (True, False) if shape[0] == 3 else (True,):
        expected = formula(changed(tensors, torch.float64, torch.float64), unscaled)
        for found, wanted in zip(step(changed(tensors, torch.float32, torch.float32), unscaled), expected, strict=True):
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert served


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_bf16_rounds_where_the_separate_ops_do(
    served: list[int], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], parameters: torch.dtype
) -> None:
    tensors = given(*shape)
    out, h, conv = step(changed(tensors, torch.bfloat16, parameters))
    assert served
    monkeypatch.setattr(device, "_pretends_cuda", False)
    wanted_out, wanted_h, wanted_conv = step(changed(tensors, torch.bfloat16, parameters))
    assert len(served) == 1
    assert torch.equal(conv, wanted_conv)
    # Sums in another order now and then round u or a gate the other way, which moves a block's channels by its share.
    assert (h - wanted_h).abs().max() < 0.02 * wanted_h.abs().max()
    assert (h - wanted_h).abs().median() < 1e-6
    assert (out.float() - wanted_out.float()).abs().max() < 0.03 * wanted_out.abs().max()
    # The definition rounds gelu, this does not: half of the results are off by a last bit.
    exact = (torch.nn.functional.gelu(tensors["y"].bfloat16().float(), approximate="tanh") * h.bfloat16()).bfloat16()
    assert (out == exact).float().mean() > 0.99


def test_states_are_written_in_their_place_alone() -> None:
    tensors = given(3, 2, 33, 4)
    around = {name: torch.full((5, *tensors[name].shape[1:]), 7.0) for name in ("h", "conv")}
    for name, whole in around.items():
        whole[1:4] = tensors[name]
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    inside = tensors | {name: whole[1:4] for name, whole in around.items()}
    out, h, conv = step(inside)
    assert all((whole[0] == 7).all() and (whole[4] == 7).all() for whole in around.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in inside.items() if name not in around)
    plain = step(tensors)
    assert all(torch.equal(found, wanted) for found, wanted in zip((out, h, conv), plain, strict=True))
    for row, first in enumerate(tensors["reset"].tolist()):
        assert torch.equal(conv[row, -1], before["x"][row])
        assert torch.equal(conv[row, :-1], torch.zeros(2, 66) if first else before["conv"][row, 1:])


def test_strided_inputs_and_states(served: list[int]) -> None:
    tensors = given(3, 2, 12, 4)
    expected = step({name: tensor.clone() for name, tensor in tensors.items()})
    spread = {
        name: t.repeat_interleave(2, dim=-1)[..., ::2] for name, t in tensors.items() if name not in ("h", "conv")
    }
    for found, wanted in zip(step(spread | {n: tensors[n].clone() for n in ("h", "conv")}), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(served) == 2
    apart = {name: tensors[name].repeat_interleave(2, dim=-1)[..., ::2] for name in ("h", "conv")}
    for found, wanted in zip(step(spread | apart), expected, strict=True):  # states are not copied: the separate ops
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(served) == 2


def test_what_a_reset_forgets_may_be_nan() -> None:
    tensors = given(3, 1, 8, 4)
    tensors["h"][1], tensors["conv"][1] = torch.nan, torch.nan
    assert all(tensor.isfinite().all() for tensor in step(tensors))


def test_decays_near_one_do_not_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with an exp off by some last bits, as a GPU's: 1 - a^2 from that would be off by a third at a = 1 - 1e-6."""
    exp = InterpreterBuilder.create_exp

    def rough(self: Any, given: Any) -> Any:
        result = exp(self, given)
        result.data = (result.data * (1 + 2e-7 * torch.randn(result.data.shape).clamp(-2, 2).numpy())).astype(
            result.data.dtype
        )
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_exp", rough)
    R = 64
    tensors = {name: torch.zeros_like(tensor) for name, tensor in given(2, 1, R, 2).items()}
    tensors["recurrent_param"] = torch.linspace(-16, 25, R)
    tensors["recurrent_gate_bias"] = torch.linspace(-3, 3, R)[torch.randperm(R)][None]
    tensors["conv_weight"][:, 1] = 1
    tensors["x"][0] = 1  # h[0] = sqrt(1 - a^2) / 2
    tensors["h"][1] = 1  # h[1] = a
    fp64 = changed(tensors, torch.float64, torch.float64)
    _, expected, _ = formula(fp64, True)
    log_a = -8 * torch.sigmoid(fp64["recurrent_gate_bias"][0]) * torch.nn.functional.softplus(fp64["recurrent_param"])
    assert torch.allclose(expected[1], log_a.exp(), atol=1e-15)
    _, h, _ = step(tensors)
    assert torch.allclose(h[0].double(), (-torch.expm1(2 * log_a)).sqrt() / 2, rtol=3e-6, atol=0)
    assert torch.allclose(h[1].double(), log_a.exp(), rtol=2e-5, atol=1e-30)
    assert ((h[1].double() - log_a.exp()).abs() <= 3e-6 * -torch.expm1(log_a) + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_decodes_as_by_the_separate_ops(
    served: list[int], monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, dtype: torch.dtype
) -> None:
    model = make_model(dtype=dtype)
    count = 6
    ids = torch.randint(0, model.config.vocab_size, (2, 5 + count))
    positions = torch.arange(5 + count).repeat(2, 1)
    positions[1, 8:] -= 8  # a new document

    def decode() -> tuple[Tensor, State]:
        state = model.new_state(2)
        model(ids[:, :5], state)
        steps = [model(ids[:, t : t + 1], state, positions=positions[:, t : t + 1]) for t in range(5, 5 + count)]
        return model.logits(torch.cat(steps, dim=1)), state

    logits, state = decode()
    assert served == [2] * (count * 2)  # two recurrent layers
    monkeypatch.setattr(device, "_pretends_cuda", False)
    wanted, wanted_state = decode()
    assert len(served) == count * 2
    off = 1e-4 if dtype == torch.float32 else 0.06
    assert (logits - wanted).abs().max() < off * wanted.std()
    for name, tensor in state.tensors().items():
        assert torch.allclose(tensor.float(), wanted_state.tensors()[name].float(), atol=off)


def test_padding_and_gradients_take_the_separate_ops(served: list[int], make_model: MakeModel) -> None:
    model = make_model("hawk-tiny")
    ids = torch.tensor([[5], [6]])
    with torch.no_grad():
        model(ids, model.new_state(2), lengths=torch.tensor([1, 0]))
        model(ids.view(1, 2), model.new_state(1))
    model(ids, model.new_state(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not served


def test_errors() -> None:
    tensors = given(3, 2, 8, 4)
    call = [tensors[name] for name in NAMES]
    assert recurrent_step_(*call) is None  # gradients are recorded
    wrong = {"h": torch.zeros(3, 15), "conv": torch.zeros(3, 3, 16).bfloat16(), "reset": torch.zeros(3)}
    wrong |= {"y": torch.zeros(2, 16), "input_gate_weight": torch.zeros(2, 8, 7), "recurrent_param": torch.zeros(1)}
    for name, tensor in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is "):
            step(tensors | {name: tensor})
    rows = {name: tensors[name][:0] for name in ("x", "y", "conv", "h", "reset")}
    assert step(tensors | rows)[0].shape == (0, 16)


def launch_all() -> None:
    """RecurrentGemma-2B's shapes."""
    for B in (1, 64):
        tensors = {name: torch.zeros_like(tensor) for name, tensor in given(B, 10, 256, 4).items()}
        for dtype in (torch.bfloat16, torch.float32):
            step(changed(tensors, dtype, dtype))


@pytest.mark.slow
def test_the_kernels_fit_a_gpu() -> None:
    launches = launched("tests.ops.triton.test_recurrent_step")
    assert [launch["name"] for launch in launches] == ["_step_kernel", "_shift_kernel"] * 4
    for launch in launches:
        assert launch["spilled"] == 0, launch
        assert launch["shared"] < 200_000, launch
