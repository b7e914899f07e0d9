"""Training on text: the texts, one arm, and what its seeds say."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from experiments.families import paper_config
from experiments.results import Results
from experiments.session import Run, Session
from griffin.config import GriffinConfig, griffin_pattern
from griffin.data.prepare import prepare
from griffin.errors import GriffinError
from griffin.train.config import TrainConfig
from griffin.train.display import reporting
from griffin.train.objective import Objective

SHAKESPEARE = Path(__file__).parents[1] / "recipes" / "data" / "shakespeare.txt.xz"
RATES = (
    1e-3,
    2e-3,
    4e-3,
)  # the sweep of every family, at the smallest size; wider ones get rate * sqrt(smallest / width)
VOCAB_SIZE = 259  # bytes and three control tokens


@dataclass(frozen=True)
class Width:
    width: int
    lru_width: int
    depth: int
    num_heads: int


XXS, XS, S0 = Width(48, 64, 6, 2), Width(64, 80, 6, 2), Width(80, 112, 6, 2)
TINY = Width(16, 16, 3, 2)


@dataclass(frozen=True)
class Texts:
    """Folders of bytes as tokens, and the text that is long."""

    train: Path
    validation: Path
    long: Path | None
    what: str


def texts(session: Session) -> Texts:
    """The texts of --data, train/, val/ and long/ (without val/, the last 5% of train/), or Shakespeare.

    Raises:
        GriffinError: --data has no train/ or no long/.
    """
    source, validation, long = SHAKESPEARE, None, None
    if session.data is not None:
        source, validation, long = (session.data / name for name in ("train", "val", "long"))
        if not source.is_dir() or not long.is_dir():
            raise GriffinError(f"--data {session.data}: needs the folders train and long, and may have val")
        validation = validation if validation.is_dir() else None
    with reporting(Console(file=io.StringIO())) as report:
        kept = session.runs / "texts"
        data = prepare(source, kept, tokenizer="bytes", validation=validation, report=report)
    megabytes = data.train.meta.num_bytes / 1e6
    what = f"{'Shakespeare' if session.data is None else session.data.name}, {megabytes:.1f} MB to train on"
    return Texts(data.train.folder, data.validation.folder, long, what)


def family_config(family: str, size: Width, window: int) -> GriffinConfig:
    """griffin, hawk, transformer (global attention, RoPE), and of it nope (no positions) and local (a window)."""
    base = {"nope": "transformer", "local": "transformer", "complex": "hawk"}.get(family, family)
    config = paper_config(
        base,
        pattern=griffin_pattern(size.depth),
        vocab_size=VOCAB_SIZE,
        width=size.width,
        lru_width=size.lru_width,
        num_heads=size.num_heads,
        num_gate_blocks=4,
        window=window,
    )
    changes: dict[str, Any] = {
        "nope": {"rope_fraction": 0.0},
        "local": {"window": window},
        "complex": {"complex_recurrence": True},
    }
    return replace(config, **changes.get(family, {}))


def text_run(
    data: Texts,
    model: GriffinConfig,
    *,
    key: str,
    about: Mapping[str, Any],
    rate: float,
    seed: int,
    rows: int,
    length: int,
    steps: int,
    init_from: Path | None = None,
    objective: Objective | None = None,
) -> Run:
    """AdamW (0.9, 0.95), decay 0.1 of linear layers, clipped to 1, 2% of warm-up, half a cosine to a tenth."""
    config = TrainConfig(
        model=model if init_from is None else None,
        init_from=None if init_from is None else str(init_from),
        train_data=str(data.train),
        validation_data=str(data.validation),
        tokenizer="bytes",
        batch_rows=rows,
        row_tokens=length,
        steps=steps,
        learning_rate=rate,
        warmup_steps=max(1, steps // 50),
        seed=seed,
        validate_every=max(1, steps // 8),
        validation_rows=max(8, 2**18 // length if steps > 100 else 8),
        checkpoint_every=max(10, steps // 8),
        keep_checkpoints=1,
        log_every=max(1, steps // 40),
        threads=1,
    )
    told = {
        "learning_rate": rate,
        "seed": seed,
        "parameters": model.num_parameters(),
        "embedding": model.vocab_size * model.width,
        "tokens": steps * rows * length,
        "length": length,
        "data": data.what,
    }
    return Run(key=key, config=config, source=None, about={**told, **about}, segment=None, objective=objective)


def sweep(session: Session, make: Callable[[float], Run]) -> float:
    """The rate of RATES with the lowest loss at the end, seed 0."""
    losses = {rate: loss(session.train(make(rate))) for rate in RATES}
    return min(losses, key=losses.__getitem__)


def scaled(rate: float, smallest: Width, size: Width) -> float:
    """rate * sqrt(smallest width / width)"""
    return float(f"{rate * (smallest.width / size.width) ** 0.5:.4g}")


def loss(entry: Mapping[str, Any]) -> float:
    """Nats per byte of held-out text at the end of a run (a token is a byte, or an end of document)."""
    return float(entry["history"][-1]["validation_loss"])


def entries(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    """Runs whose fields are these, by seed; not those of a sweep alone."""
    found = [
        entry
        for entry in results["runs"].values()
        if not entry.get("sweep") and all(entry.get(name) == value for name, value in wanted.items())
    ]
    return sorted(found, key=lambda entry: entry["seed"])


def noise(groups: Sequence[Sequence[float]]) -> float:
    """The standard deviation of a seed's loss, pooled over groups of equal runs."""
    spread = [stdev(group) ** 2 for group in groups if len(group) > 1]
    return mean(spread) ** 0.5 if spread else 0.0
