"""The complex-gated recurrence against the paper's formula in complex128, one token after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import griffin
from griffin import PRESETS, Griffin
from griffin.convert.google import griffin_to_google
from griffin.errors import GriffinError
from griffin.ops import cg_lru

B, T, R = 2, 21, 10


def inputs(dtype: torch.dtype = torch.float64, T: int = T) -> list[Tensor]:
    torch.manual_seed(3)
    shapes = [(B, T, R), (B, T, R // 2), (B, T, R // 2), (R // 2,), (R // 2,), (B, R)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def by_the_paper(
    x: Tensor, i: Tensor, r: Tensor, p: Tensor, angle: Tensor, h: Tensor, reset: Tensor | None, unscaled: bool = True
) -> tuple[Tensor, Tensor]:
    """Appendix B: a~ = sigma(Lambda) exp(i theta), a~_t = a~^(c r_t), with Lambda = -p and c theta = angle."""
    x_, h_ = (torch.complex(*each.chunk(2, dim=-1)) for each in (x, h))
    a = torch.polar(torch.sigmoid(-p), angle / 8)
    found = []
    for t in range(x.shape[1]):
        a_t = torch.exp(8 * torch.sigmoid(r[:, t]) * torch.log(a))
        scale = torch.sqrt(1 - a_t.abs() ** 2)
        if reset is not None:
            starts = reset[:, t, None]
            a_t = torch.where(starts, 0, a_t)
            scale = torch.where(starts, 1.0, scale) if unscaled else scale
        h_ = a_t * h_ + scale * (torch.sigmoid(i[:, t]) * x_[:, t])
        found.append(torch.cat([h_.real, h_.imag], dim=-1))
    return torch.stack(found, dim=1), found[-1]


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("with_resets", [True, False])
def test_forward_and_gradient_are_those_of_the_formula(with_resets: bool, unscaled: bool) -> None:
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.2 if with_resets else None
    results = []
    for compute in (
        lambda *args: cg_lru(*args, reset, max_sqrt_gradient=None, unscaled_first_token=unscaled),
        lambda *args: by_the_paper(*args, reset, unscaled),
    ):
        leaves = [each.requires_grad_() for each in inputs()]
        y, h_last = compute(*leaves)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        ((y * weight).sum() + (h_last**2).sum()).backward()
        results.append((y, h_last, *(leaf.grad for leaf in leaves)))
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, atol=1e-10, rtol=1e-10)


def test_gradcheck() -> None:
    leaves = [each.requires_grad_() for each in inputs(T=5)]
    reset = torch.tensor([[True, False, False, True, False], [False] * 5])
    assert torch.autograd.gradcheck(lambda *args: cg_lru(*args, reset, max_sqrt_gradient=None), leaves)


def test_without_angles_it_is_two_real_recurrences() -> None:
    x, i, r, p, _, h0 = inputs()
    y, h_last = cg_lru(x, i, r, p, torch.zeros_like(p), h0)
    twice = [torch.cat([each, each], dim=-1) for each in (i, r, p)]
    expected = griffin.ops.rg_lru(x, *twice, h0)
    assert_close(y, expected[0], atol=1e-12, rtol=1e-12)
    assert_close(h_last, expected[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("split", [1, 7, 20])
def test_two_calls_are_one(split: int) -> None:
    *rest, h0 = inputs()
    sequences, parameters = rest[:3], rest[3:]
    whole, last = cg_lru(*rest, h0)
    left, middle = cg_lru(*(each[:, :split] for each in sequences), *parameters, h0)
    right, end = cg_lru(*(each[:, split:] for each in sequences), *parameters, middle)
    assert_close(torch.cat([left, right], dim=1), whole, atol=1e-12, rtol=1e-12)
    assert_close(end, last, atol=1e-12, rtol=1e-12)


def test_the_derivative_of_the_square_root_is_bounded_and_padding_is_passed() -> None:
    x, i, r, p, angle, h0 = (each.requires_grad_() for each in inputs())
    with torch.no_grad():
        r[:, 3:6] = -torch.inf
    y, _ = cg_lru(x, i, r, p, angle, h0)
    assert_close(y[:, 5], y[:, 2], atol=0, rtol=1e-12)
    y.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in (x, i, r, p, angle, h0))
    gradients = []
    for bound in (None, 1e-3):
        nearly_one = torch.full_like(p, -30.0).requires_grad_()  # a = 1 - 1e-13
        cg_lru(x.detach(), i.detach(), torch.ones_like(i), nearly_one, angle.detach(), max_sqrt_gradient=bound)[
            0
        ].sum().backward()
        gradients.append(float(nearly_one.grad.abs().max()))
    assert gradients[1] < 1e-3 * gradients[0]


def test_many_turns_stay_exact() -> None:
    """fp32 after 20,000 tokens, which have turned by thousands of radians, against fp64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        x, i, r, p, angle, h0 = inputs(torch.float32, T=20_000)
        results.append(cg_lru(*(each.to(dtype) for each in (x, i, r + 2, p - 6, angle.abs() + 1, h0)))[0].double())
    assert_close(results[0], results[1], atol=1e-3, rtol=0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, i, r, p, angle, _ = inputs()
    for wrong in ((x[..., :9], i, r, p, angle), (x, x, r, p, angle), (x, i, x, p, angle), (x, i, r, p, angle[:3])):
        with pytest.raises(ValueError, match="must be"):
            cg_lru(*wrong)


@pytest.fixture
def model(make_model: Callable[..., Griffin]) -> Griffin:
    return make_model(complex_recurrence=True, dtype=torch.float64)


def test_a_model_of_it(model: Griffin, tmp_path: Path) -> None:
    """Chunks, padding and documents give one forward's numbers, its file says what it is, and others refuse it."""
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())
    tokens = torch.randint(0, 259, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)
        state = model.new_state(2)
        parts = [model(tokens[:, :11], state), model(tokens[:, 11:12], state), model(tokens[:, 12:], state)]
        assert_close(torch.cat(parts, dim=1), whole, atol=1e-10, rtol=1e-10)
        state, lengths = model.new_state(2), torch.tensor([30, 12])
        assert_close(model(tokens, state, lengths=lengths)[1, :12], whole[1, :12], atol=1e-10, rtol=1e-10)
        alone = model.new_state(1)
        model(tokens[1:, :12], alone)
        for name, tensor in alone.tensors().items():
            if name.endswith((".h", ".conv")):
                assert_close(state.tensors()[name][1:], tensor, atol=1e-10, rtol=1e-10)
        positions = torch.cat([torch.arange(13), torch.arange(17)]).expand(2, 30).contiguous()
        assert_close(model(tokens, positions=positions)[:, 13:], model(tokens[:, 13:]), atol=1e-10, rtol=1e-10)
    griffin.save(model.float(), tmp_path / "model")
    again = griffin.load(tmp_path / "model")
    assert again.config == model.config
    assert '"model_type": "griffin"' in (tmp_path / "model" / "config.json").read_text()
    with pytest.raises(GriffinError, match="complex_recurrence"):
        griffin_to_google(model.config, model.state_dict())


def test_initial_angles_and_odd_widths() -> None:
    config = replace(PRESETS["hawk-tiny"], complex_recurrence=True, lru_width=4096, num_gate_blocks=16)
    angles = Griffin(config).blocks[0].temporal_block.rg_lru.recurrent_angle.detach()
    assert 0 <= float(angles.min()) < 0.01 < 0.30 < float(angles.max()) <= 0.1 * torch.pi
    with pytest.raises(ValueError, match="multiple of 2"):
        replace(PRESETS["hawk-tiny"], complex_recurrence=True, lru_width=44)
