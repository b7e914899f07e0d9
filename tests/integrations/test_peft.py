"""PEFT's adapters on our model, and the same adapters on transformers' own: one computes what the other does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import griffin
from tests.integrations.conftest import Models, random_ids
from tests.integrations.test_trainer import Texts

peft = pytest.importorskip("peft", reason="pip install peft")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CLOSE = {"rtol": 0, "atol": 2e-5}


def adapted(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    """With an adapter that does something: PEFT begins at zero."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": ["recurrent_gate_weight", "input_gate_weight"]},
        {"target_modules": ["linear_y"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "o_proj"]},
    ],
    ids=["all-linear", "gates", "dora", "whole-modules", "embedding"],
)
def test_an_adapter_goes_both_ways(tmp_path: Path, models: Models, options: dict[str, object]) -> None:
    ids = random_ids(2, 20)
    models.ours.save_pretrained(tmp_path / "base")
    ours = adapted(models.ours, **options)
    with torch.no_grad():
        right = ours(ids).logits
    ours.save_pretrained(tmp_path / "adapter")
    stock = peft.PeftModel.from_pretrained(models.stock, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(right, stock(ids, use_cache=False).logits, **CLOSE)
    # One token at a time, and trained: every adapter takes part.
    found = ours.generate(input_ids=ids, max_new_tokens=8)
    assert torch.equal(found, ours.generate(input_ids=ids, max_new_tokens=8, use_cache=False))
    ours(ids, labels=ids).loss.backward()
    assert all(parameter.grad.count_nonzero() for parameter in ours.parameters() if parameter.requires_grad)
    # And back: what was saved from transformers' own, on a model of ours.
    stock.save_pretrained(tmp_path / "again")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    with torch.no_grad():
        assert_close(again(ids).logits, right, **CLOSE)


def test_a_merged_adapter_is_a_model_folder(tmp_path: Path, models: Models) -> None:
    ids = random_ids(1, 20)
    model = adapted(models.ours, target_modules="all-linear")
    with torch.no_grad():
        right = model(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = griffin.load(tmp_path / "merged")
    assert_close(merged.logits(merged(ids)), right, **CLOSE)


def test_all_linear_means_those_of_the_blocks(models: Models) -> None:
    model = peft.get_peft_model(models.ours, peft.LoraConfig(target_modules="all-linear"))
    leaves = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_A" in name}
    recurrent, attention = {"linear_x", "linear_y", "linear_out"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves == recurrent | attention | {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("recompute", [False, True])
def test_trainer_trains_an_adapter_alone(tmp_path: Path, models: Models, recompute: bool) -> None:
    before = {name: parameter.clone() for name, parameter in models.ours.named_parameters()}
    model = peft.get_peft_model(models.ours, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        gradient_checkpointing=recompute,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Texts([12] * 4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0]) - 0.2
    for name, parameter in model.get_base_model().named_parameters():
        if (plain := name.replace(".base_layer", "")) in before:
            assert torch.equal(parameter, before[plain]), name
