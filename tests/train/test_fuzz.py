"""The files of two checkpoints, damaged at random: the newest whole one is found, and is what was written."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import griffin
from griffin import Griffin
from griffin.reading import read_json
from griffin.train.config import TrainConfig
from griffin.train.loop import train
from griffin.train.optim import make_optimizer
from griffin.train.snapshot import STATE, Progress, load_snapshot, newest_whole, snapshots
from griffin.train.trained import AllWeights
from tests.fuzz import attack


@pytest.mark.slow
def test_fuzz_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be that is the question\n" * 40)
    config = TrainConfig(
        model=replace(griffin.PRESETS["griffin-tiny"], width=16, mlp_width=16, lru_width=24, num_heads=2),
        train_data=str(tmp_path / "text.txt"),
        tokenizer="bytes",
        batch_rows=2,
        row_tokens=16,
        steps=4,
        warmup_steps=1,
        validation_rows=2,
        checkpoint_every=2,
        threads=1,
    )
    run = tmp_path / "run"
    train(config, run, console=Console(file=io.StringIO()))
    assert config.model is not None
    model = Griffin(config.model, generator=torch.Generator().manual_seed(0))
    data = str(read_json(snapshots(run)[-1] / STATE)["data"])  # the fingerprint of what it read

    def load(folder: Path) -> tuple[Progress, list[torch.Tensor]]:
        optimizer = make_optimizer(model.named_parameters(), config)
        progress, _ = load_snapshot(folder, config, data, AllWeights(model, None), optimizer)
        averages = [state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
        return progress, [tensor.detach().clone() for tensor in (*model.parameters(), *averages)]

    written = {folder: load(folder) for folder in snapshots(run)}
    assert len(written) == 2
    seen: set[Path] = set()

    def resume() -> tuple[Path, Progress, list[torch.Tensor]]:
        newest, _ = newest_whole(run)
        assert newest is not None
        seen.add(newest)
        return newest, *load(newest)

    def same(found: tuple[Path, Progress, list[torch.Tensor]]) -> bool:
        folder, progress, tensors = found
        expected, values = written[folder]
        return progress == expected and all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))

    files = [file for folder in written for file in sorted(folder.iterdir())]
    counts = attack(files, resume, same)
    assert counts["refused"] == 0  # one of the two is whole at any time
    assert seen == set(written)
