"""Preferences and starting states: against TRL, against finite differences, and that they learn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from griffin import Griffin, State
from griffin.data.packing import Batch
from griffin.errors import GriffinError
from griffin.lora import LoRA, add, off
from griffin.loss import NOT_COUNTED
from griffin.score import nats, row_nats
from griffin.train.objective import LanguageModel, Preference
from griffin.train.start import Start
from griffin.train.step import take_step
from tests.train.batch import batch_of

MakeModel = Callable[..., Griffin]


def pairs_of(model: Griffin, pairs: int = 3, T: int = 20) -> Batch:
    """Pairs of one prompt each and answers of different lengths; log p by the model as it is now."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, model.config.vocab_size, (2 * pairs, T + 1), generator=generator)
    tokens[1::2, :6] = tokens[::2, :6]
    targets = tokens[:, 1:].clone()
    targets[:, :5] = NOT_COUNTED
    for row in range(2 * pairs):
        targets[row, T - row :] = NOT_COUNTED
    batch = Batch(tokens[:, :-1].contiguous(), targets, torch.arange(T).expand(2 * pairs, T))
    with torch.no_grad():
        return Batch(batch.tokens, batch.targets, batch.positions, -row_nats(model, batch))


def moved(model: Griffin, seed: int) -> Griffin:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def test_row_nats_are_those_of_the_logits(make_model: MakeModel) -> None:
    model = make_model(dtype=torch.float64)
    batch = pairs_of(model)
    log_p = model.logits(model(batch.tokens)).double().log_softmax(-1)
    wanted = log_p.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0] * (batch.targets != NOT_COUNTED)
    assert_close(row_nats(model, batch).double(), -wanted.sum(1), rtol=1e-5, atol=1e-5)
    assert_close(nats(model, batch), row_nats(model, batch).sum())


@pytest.mark.filterwarnings("ignore")  # of trl
@pytest.mark.parametrize(("kind", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_losses_and_gradients_are_trl_s_on_the_same_logits(make_model: MakeModel, kind: Any, theirs: str) -> None:
    """TRL's own function computes its loss from our logits, and its gradient is followed into our weights."""
    module = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    model = make_model()
    batch = pairs_of(model)
    moved(model, 1)
    objective = Preference(kind, 0.3)
    ours = objective.loss(model, batch) / objective.count(batch)
    gradients = torch.autograd.grad(ours, list(model.parameters()))
    found = trl_loss(module, theirs, 0.3, model, batch)
    assert_close(ours.detach(), found.detach(), rtol=1e-5, atol=1e-5)
    assert_close(gradients, torch.autograd.grad(found, list(model.parameters())), rtol=1e-3, atol=1e-5)


def trl_loss(module: Any, kind: str, beta: float, model: Griffin, batch: Batch) -> torch.Tensor:
    """`DPOTrainer._compute_loss`, which wants chosen rows before rejected ones, and log p by token."""
    order = [*range(0, len(batch.tokens), 2), *range(1, len(batch.tokens), 2)]
    counted = (batch.targets != NOT_COUNTED)[order]
    logits = model.logits(model(batch.tokens))[order]
    log_p = logits.log_softmax(-1).gather(-1, batch.targets[order].clamp(min=0)[..., None])[..., 0] * counted
    assert batch.reference is not None
    reference = batch.reference[order].chunk(2)
    outputs = SimpleNamespace(
        log_probs=log_p,
        entropy=torch.zeros_like(log_p),
        mean_logits=torch.zeros_like(log_p),
        is_top1=torch.zeros_like(log_p, dtype=torch.bool),
    )
    same: Any = lambda tensor: tensor  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
    )
    inputs = {
        "input_ids": torch.zeros(len(order), counted.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.ones(len(order), counted.shape[1] + 1),
        "completion_mask": torch.cat([torch.zeros(len(order), 1, dtype=torch.int64), counted.long()], dim=1),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return module.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.filterwarnings("ignore")  # of trl
def test_the_odds_ratio_is_trl_s(make_model: MakeModel) -> None:
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl is not installed")
    model = make_model()
    batch = pairs_of(model)
    lengths = (batch.targets != NOT_COUNTED).sum(1)
    log_p = -row_nats(model, batch).detach()
    mean = log_p / lengths
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device=torch.device("cpu")))
    ratio, *_ = module.ORPOTrainer.odds_ratio_loss(trainer, mean[::2], mean[1::2])
    assert_close(Preference("orpo", 0.4).of(log_p, batch), -mean[::2] - ratio, rtol=1e-5, atol=1e-5)


def test_preferences_are_learnt_and_the_adapter_s_absence_is_the_reference(make_model: MakeModel) -> None:
    model = make_model()
    batch = pairs_of(model)
    add(model, LoRA(rank=4))
    with torch.no_grad(), off(model):
        assert batch.reference is not None
        assert_close(-row_nats(model, batch), batch.reference)
    objective = Preference("dpo", 0.1)
    before = objective.measure(model, SimpleNamespace(batches=[batch]))  # type: ignore[arg-type]
    assert before["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(15):
        assert take_step(model, objective, optimizer, [batch], 1.0).count == 3
    after = objective.measure(model, SimpleNamespace(batches=[batch]))  # type: ignore[arg-type]
    assert after["accuracy"] == 1
    assert after["margin"] > 5
    assert after["loss"] < 0.5 * before["loss"]


@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny"])
def test_a_start_is_what_reading_its_tokens_gives(make_model: MakeModel, preset: str) -> None:
    model = make_model(preset)
    tokens = [3, 1, 4, 1, 5, 9]
    start = Start(model, tokens)
    batch = batch_of(model, B=2, T=24)
    prompt = torch.tensor(tokens).expand(2, -1)
    with torch.no_grad():
        hidden = model(torch.cat([prompt, batch.tokens], dim=1))[:, 6:]
        assert_close(model(batch.tokens, start.rows(2)), hidden, rtol=1e-4, atol=1e-4)
        state = start.state()
    assert int(state.position) == 6
    assert state.model_id == model.model_id


@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny"])
def test_a_start_s_gradient_is_that_of_finite_differences(make_model: MakeModel, preset: str) -> None:
    model = make_model(preset, dtype=torch.float64).requires_grad_(False)
    start = Start(model, [3, 1, 4]).double()
    objective, batch = LanguageModel(start), batch_of(model, B=2, T=12)
    loss = objective.loss(model, batch)
    gradients = torch.autograd.grad(loss, list(start.parameters()))
    generator = torch.Generator().manual_seed(2)
    for name, value, gradient in zip(start.names, start.parameters(), gradients, strict=True):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for step in (1e-5, -1e-5):
                value += step * direction
                ends.append(objective.loss(model, batch))
                value -= step * direction
        difference = (ends[0] - ends[1]) / 2e-5
        assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-7, msg=name)


def test_a_start_is_trained_alone_and_saved_as_a_state(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model().requires_grad_(False)
    start = Start(model, [3, 1, 4])
    objective, batch = LanguageModel(start), batch_of(model)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(start.parameters(), lr=3e-2)
    losses = [take_step(model, objective, optimizer, [batch], 1.0).loss for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    start.state().save(tmp_path / "state", model)
    state = State.load(tmp_path / "state", model)
    with torch.no_grad():
        assert_close(nats(model, batch, state.rows([0, 0])), objective.loss(model, batch))


def test_a_start_that_the_window_does_not_hold(make_model: MakeModel) -> None:
    with pytest.raises(GriffinError, match=r"a state of 17 tokens is tuned; give 1 \.\. 16"):
        Start(make_model(), [1] * 17)
    with pytest.raises(GriffinError, match="the state of global attention grows"):
        Start(make_model("transformer-tiny"), [1])
    with pytest.raises(GriffinError, match="a state of 0 tokens"):
        Start(make_model(), [])
