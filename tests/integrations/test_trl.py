"""TRL's SFTTrainer and DPOTrainer, as its quick start calls them, on a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import griffin
from griffin.integrations.transformers import GriffinForCausalLM

trl = pytest.importorskip(
    "trl", reason="pip install trl: it brings 270 MB of datasets, which the test extra leaves out"
)
datasets = pytest.importorskip("datasets", reason="pip install datasets")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TEXTS = [f"{'abcdefghij'[n % 10] * (3 + 5 * n % 17)} {n} and so on" for n in range(24)]


@pytest.fixture
def folder(tmp_path: Path, make_model) -> Path:  # type: ignore[no-untyped-def]
    griffin.save(make_model(), tmp_path / "model", griffin.Tokenizer.bytes())
    return tmp_path / "model"


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    common = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    return {"output_dir": str(tmp_path / "run"), **common, **quiet, **changes}


def losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def nats(folder: Path, texts: list[str]) -> float:
    """The mean over the tokens of texts each alone, from the second on: what a trainer's first loss must be."""
    model, tokenizer = griffin.load(folder), griffin.load_tokenizer(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]])
        logits = model.logits(model(ids))[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"padding_free": True, "max_length": None}])
def test_sft_begins_at_the_loss_of_each_text_alone_and_learns(
    tmp_path: Path, folder: Path, changes: dict[str, Any]
) -> None:
    """Padded, packed and laid into one row: with the cap of the logits, which TRL knows by another name."""
    data = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    given = settings(tmp_path, **{"max_length": 512, "per_device_train_batch_size": 24, **changes})
    trainer = trl.SFTTrainer(str(folder), args=trl.SFTConfig(**given), train_dataset=data)
    assert isinstance(trainer.model, GriffinForCausalLM)
    trainer.train()
    found = losses(trainer)
    assert_close(found[0], nats(folder, TEXTS), rtol=2e-4, atol=0)
    assert found[-1] < found[0] - 0.1


def test_sft_with_lora_leaves_an_adapter_that_opens(tmp_path: Path, folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    data = datasets.Dataset.from_list([{"prompt": text[:4], "completion": text[4:]} for text in TEXTS])
    trainer = trl.SFTTrainer(
        str(folder),
        args=trl.SFTConfig(**settings(tmp_path)),
        train_dataset=data,
        peft_config=peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(model.get_base_model(), GriffinForCausalLM)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert griffin.load(tmp_path / "merged").config == griffin.load(folder).config


def test_dpo_begins_at_log_2_and_prefers_what_it_is_told(tmp_path: Path, folder: Path) -> None:
    rows = [{"prompt": text[:4], "chosen": text[4:], "rejected": text[4:][::-1]} for text in TEXTS]
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(str(folder), args=trl.DPOConfig(**settings(tmp_path, max_steps=6)), train_dataset=data)
    trainer.train()
    found = losses(trainer)
    assert_close(found[0], 0.6931472, rtol=1e-5, atol=0)
    assert found[-1] < 0.65
