"""Training on a task made by rule: its batches and its held-out rows, for the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from experiments.session import Line, Run, Session
from griffin.config import GriffinConfig
from griffin.data.packing import Batch
from griffin.eval.synthetic.task import Task, accuracy
from griffin.model import Griffin
from griffin.train.config import TrainConfig

HELD_OUT = 2**31  # a seed that no run has
LEARNING_RATES = (3e-4, 1e-3, 3e-3)  # the sweep of every family


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """`griffin.train.source.Source`: fresh rows of `task` every step; measured on rows of `held_out`, by name."""

    task: Task
    rows: int
    seed: int
    held_out: Mapping[str, Task]
    held_out_rows: int
    tokenizer: None = field(default=None, init=False)

    def fingerprint(self) -> str:
        return f"{self.task} x {self.rows}, seed {self.seed}"

    def describe(self) -> str:
        return self.fingerprint()

    def batches(self, step: int) -> list[Batch]:
        return [self.task.batch(self.seed, step, self.rows)]

    def measure(self, model: Griffin) -> dict[str, float]:
        measures: dict[str, float] = {}
        for name, task in self.held_out.items():
            found = accuracy(model, held_out_batches(task, self.held_out_rows))
            measures |= {"loss": found.nats} if not measures else {}
            measures[name] = found.tokens
        return measures


def held_out_batches(task: Task, rows: int, tokens: int = 2**14) -> list[Batch]:
    """`rows` rows in batches of about `tokens` tokens, the same ones every time."""
    length = task.batch(HELD_OUT, 0, 1).tokens.shape[1]
    each = max(1, min(rows, tokens // length))
    return [task.batch(HELD_OUT, part, min(each, rows - part * each)) for part in range(-(-rows // each))]


def train_config(
    model: GriffinConfig, *, task: str, learning_rate: float, seed: int, rows: int, length: int, steps: int, every: int
) -> TrainConfig:
    """AdamW without decay, betas (0.9, 0.95), gradients clipped to 1, 100 steps of warm-up, then a constant rate."""
    return TrainConfig(
        model=model,
        train_data=task,
        batch_rows=rows,
        row_tokens=length,
        steps=steps,
        learning_rate=learning_rate,
        min_learning_rate=1.0,
        warmup_steps=min(100, every // 2),
        weight_decay=0.0,
        seed=seed,
        validate_every=every,
        keep_checkpoints=1,
        log_every=every,
        threads=1,
    )


def steps_to(history: Sequence[Line], accuracy: float, measure: str = "accuracy") -> int | None:
    """The first step measured at which the accuracy was at least this; None: never."""
    return next((line["step"] for line in history if line.get(measure, 0.0) >= accuracy), None)


def best_learning_rate(runs: Mapping[float, Line], sweep_steps: int) -> float:
    """The sweep's choice: the highest accuracy at its end, whatever came later; of equal ones, the lowest loss."""
    last = {rate: [line for line in run["history"] if line["step"] <= sweep_steps][-1] for rate, run in runs.items()}
    return max(last, key=lambda rate: (last[rate]["accuracy"], -last[rate]["validation_loss"]))


def sweep(session: Session, families: Iterable[str], make: Callable[[str, float], Run], steps: int) -> dict[str, float]:
    """Train every family at every learning rate for `steps` steps, and give the rate of each that did best."""
    chosen = {}
    for family in families:
        runs = {rate: session.train(make(family, rate)) for rate in LEARNING_RATES}
        chosen[family] = best_learning_rate(runs, steps)
        session.say(f"{family}: learning rate {chosen[family]:g} of {LEARNING_RATES}")
    return chosen


def median_or_none(values: Sequence[float | None]) -> float | None:
    """The median where None is larger than any number; None where that is None."""
    ranked = median([float("inf") if value is None else value for value in values])
    return None if ranked == float("inf") else ranked
