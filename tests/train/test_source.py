"""A run on batches that are no text: what the loop asks of a source, and that it goes on exactly."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from griffin import PRESETS, Griffin
from griffin.data.packing import Batch
from griffin.errors import GriffinError
from griffin.score import nats
from griffin.train.config import TrainConfig
from griffin.train.loop import Result, train
from griffin.train.metrics import read_metrics
from griffin.train.snapshot import latest


@dataclass(frozen=True)
class Counting:
    """Rows that count up from a number that the step decides."""

    name: str = "counting"
    tokenizer: None = None

    def fingerprint(self) -> str:
        return self.name

    def describe(self) -> str:
        return "numbers that go up"

    def batches(self, step: int) -> list[Batch]:
        row = (torch.arange(13) + 7 * step) % 259
        tokens = torch.stack([row, row + 1])[:, :12] % 259
        return [Batch(tokens, (tokens + 1) % 259, torch.arange(12).expand(2, 12).contiguous())]

    def measure(self, model: Griffin) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(nats(model, self.batches(10**6)[0])) / 24, "wisdom": 0.5}


CONFIG = TrainConfig(
    model=replace(PRESETS["griffin-tiny"], width=16, mlp_width=16, lru_width=24, num_heads=2),
    train_data="counting",
    batch_rows=2,
    row_tokens=12,
    steps=12,
    learning_rate=1e-2,
    min_learning_rate=1.0,
    warmup_steps=2,
    validate_every=4,
    checkpoint_every=6,
    log_every=3,
    threads=1,
)


def run(config: TrainConfig, folder: Path, source: Counting = Counting()) -> tuple[Result, str]:
    console = Console(file=io.StringIO(), width=100)
    result = train(config, folder, resume=True, source=source, console=console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def test_a_run_learns_from_any_source(tmp_path: Path) -> None:
    result, said = run(replace(CONFIG, steps=60, warmup_steps=5), tmp_path)
    assert result.finished
    assert result.validation_bits_per_byte is None
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in line]
    assert [line["step"] for line in lines] == list(range(0, 64, 4))
    assert all(line["validation_wisdom"] == 0.5 for line in lines)
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"] - 0.5
    assert "numbers that go up" in said
    assert "0.500 wisdom" in said
    assert not (tmp_path / "data").exists()
    assert {"model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "model").iterdir()}
    assert not (tmp_path / "model" / "tokenizer.json").exists()


def test_more_steps_at_a_constant_rate_are_the_longer_run(tmp_path: Path) -> None:
    """Runs in segments, as experiments make them, to stop when enough is learnt."""
    run(CONFIG, tmp_path / "whole")
    for steps in (3, 6, 12):
        run(replace(CONFIG, steps=steps), tmp_path / "parts")
    whole, parts = (load_file(tmp_path / each / "model" / "model.safetensors") for each in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_another_source_is_refused(tmp_path: Path) -> None:
    run(replace(CONFIG, steps=6), tmp_path)
    with pytest.raises(GriffinError, match="trained on other data"):
        run(CONFIG, tmp_path, Counting("other"))
    assert latest(tmp_path) is not None
    assert run(CONFIG, tmp_path)[0].step == 12
