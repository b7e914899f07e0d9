"""Trainer and pipeline, as their documentation calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

import griffin
from griffin.integrations.transformers import GriffinForCausalLM
from tests.integrations.conftest import Models, random_ids

pytest.importorskip("accelerate", reason="transformers' Trainer needs it: pip install accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Texts(Dataset):  # type: ignore[type-arg]
    def __init__(self, lengths: list[int]) -> None:
        self.rows = [random_ids(length, seed=index).tolist() for index, length in enumerate(lengths)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_trainer_packs_trains_evaluates_and_saves(tmp_path: Path, models: Models, changes: dict[str, bool]) -> None:
    texts = Texts([5, 1, 9, 12, 3, 7, 8, 2])
    with torch.no_grad():
        before = [
            models.ours(torch.tensor([row]), labels=torch.tensor([row])).loss for row in texts.rows if len(row) > 1
        ]
    right = sum(loss * (len(row) - 1) for loss, row in zip(before, (r for r in texts.rows if len(r) > 1), strict=True))
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        max_steps=6,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        **changes,
    )
    trainer = Trainer(
        models.ours, arguments, data_collator=DataCollatorWithFlattening(), train_dataset=texts, eval_dataset=texts
    )
    measured = trainer.evaluate()["eval_loss"]
    assert_close(measured, (right / 39).item(), rtol=3e-3 if changes.get("bf16") else 1e-5, atol=0)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < measured - 0.3
    trainer.save_model(str(tmp_path / "model"))
    written = dict(griffin.load(tmp_path / "model").named_parameters())
    assert all(torch.equal(parameter, written[name]) for name, parameter in models.ours.named_parameters())


def test_pipeline_writes_what_our_generate_writes(tmp_path: Path, make_model) -> None:  # type: ignore[no-untyped-def]
    griffin.save(make_model(), tmp_path / "model", griffin.Tokenizer.bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(model, GriffinForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = write("Once", max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    ours = griffin.load(tmp_path / "model")
    right = griffin.generate(ours, griffin.load_tokenizer(tmp_path / "model"), "Once", max_tokens=12, temperature=0)
    ids = tokenizer("Once", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert found == tokenizer.decode(out, skip_special_tokens=True)
    assert right[0].text == found
