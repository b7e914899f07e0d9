"""One call of `griffin experiment`: what is done already, what is left, and the training runs it asks for."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from experiments.results import Results, provenance, read_results, results_file, write_results
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.files import whole_file
from griffin.train.config import TrainConfig
from griffin.train.loop import train
from griffin.train.metrics import METRICS, read_metrics
from griffin.train.objective import Objective
from griffin.train.snapshot import FIXED, latest
from griffin.train.source import Source

LOSS, BITS = "validation_loss", "validation_bits_per_byte"
Scale = Literal["smoke", "cpu", "gpu"]
Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of an experiment.

    It ends after `config.steps` steps, or after the first multiple of `segment` at which `enough` of its metrics holds:
    it is run by segments, which is the same run where the rate does not depend on the steps to come. segment=None: at
    once, with the config's checkpoints.
    """

    key: str  # its name in the results, and of its folder
    config: TrainConfig
    source: Source | None  # None: the text of config.train_data
    about: Mapping[str, Any]  # what the results say of it besides: family, learning rate, seed
    segment: int | None
    objective: Objective | None = None  # None: that of the config
    enough: Callable[[Sequence[Line]], bool] = lambda lines: False


@dataclass
class Session:
    """The results so far, and where they and the runs' checkpoints lie."""

    name: str
    scale: Scale
    num_seeds: int
    runs: Path  # checkpoints
    file: Path
    console: Console
    data: Path | None = None  # texts, for those that read any
    results: Results = field(init=False)
    origin: dict[str, Any] = field(default_factory=provenance)  # of the code as it was loaded
    total: int = 0  # runs expected, for "what is left"
    done: int = 0

    @classmethod
    def open(
        cls, name: str, scale: Scale, num_seeds: int, runs: Path, console: Console, out: Path | None, data: Path | None
    ) -> Session:
        file = results_file(name, scale) if out is None else out / f"results-{scale}.json"
        return cls(name, scale, num_seeds, runs / name / scale, file, console, data)

    def __post_init__(self) -> None:
        self.results = read_results(self.file, self.name, self.scale)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(self, key: str, entry: Mapping[str, Any]) -> None:
        """Put one run's results into the file, with where they come from."""
        self.results["runs"][key] = {**entry, "from": self.origin}
        self.results["command"] = f"griffin experiment {self.name} --scale {self.scale} --seeds {self.num_seeds}"
        write_results(self.file, self.results)

    def once(self, key: str, measure: Callable[[], Mapping[str, Any]]) -> Results:
        """Measure, unless the results have it already; give the results' entry."""
        self.done += 1
        if key not in self.results["runs"]:
            cpu = time.process_time()
            entry = {**measure(), "cpu_seconds": round(time.process_time() - cpu, 1)}
            self.record(key, entry)
            self.say(f"[{self.done} of {self.total}] {key}: {entry['cpu_seconds']:.0f} CPU s")
        return self.results["runs"][key]

    def train(self, run: Run, finish: Callable[[Path], Mapping[str, Any]] | None = None) -> Results:
        """Train, or go on, or take what is in the results already; give the results' entry.

        Args:
            run: what to train.
            finish: called with the last checkpoint, a model's folder, at the end; what it gives is in the entry too.

        Raises:
            KeyboardInterrupt: a signal ended the run after its step.
        """
        self.done += 1
        entry, setup = self.results["runs"].get(run.key), _setup(run)
        if entry is not None and entry["setup"] != setup:
            raise GriffinError(f"{self.file}: {run.key!r} was run with another setup; remove the file to begin anew")
        if entry is not None and (entry["steps"] >= run.config.steps or entry["ended_early"]):
            return entry
        folder = self.folder(run.key)
        clock = folder.with_name(f"{folder.name}.seconds.json")  # not in the run's folder: the loop wants that empty
        seconds = json.loads(clock.read_text()) if clock.exists() and folder.exists() else {"cpu": 0.0, "wall": 0.0}
        newest = latest(folder)
        step = 0 if newest is None else int(newest.name.removeprefix("step_"))
        lines = [line for line in _metrics(folder) if line["step"] <= step]
        enough = run.enough(lines)
        while step < run.config.steps and not enough:
            config = run.config
            if run.segment is not None:
                steps = min(config.steps, (step // run.segment + 1) * run.segment)
                config = replace(config, steps=steps, checkpoint_every=run.segment)
            cpu, wall = time.process_time(), time.perf_counter()
            result = train(
                config,
                folder,
                resume=True,
                source=run.source,
                objective=run.objective,
                console=Console(file=io.StringIO(), width=80),
            )
            seconds = {
                "cpu": seconds["cpu"] + time.process_time() - cpu,
                "wall": seconds["wall"] + time.perf_counter() - wall,
            }
            with whole_file(clock) as temporary:
                temporary.write_text(json.dumps(seconds))
            if result.signal is not None and not result.finished:
                raise KeyboardInterrupt  # with a checkpoint: the same command goes on
            step, lines = result.step, _metrics(folder)
            enough = run.enough(lines)
            self.say(self._progress(run, step, lines, seconds))
        entry = {
            **run.about,
            "setup": setup,
            "steps": step,
            "ended_early": enough and step < run.config.steps,
            "cpu_seconds": round(seconds["cpu"], 1),
            "wall_seconds": round(seconds["wall"], 1),
            "history": [{name: _short(value) for name, value in line.items()} for line in lines if LOSS in line],
            **({} if finish is None else finish(latest(folder) or folder)),
        }
        self.record(run.key, entry)
        return self.results["runs"][run.key]

    def folder(self, key: str) -> Path:
        """Of a run, with its checkpoints."""
        return self.runs / key.replace(" ", "-")

    def _progress(self, run: Run, step: int, lines: Sequence[Line], seconds: Mapping[str, float]) -> str:
        last = next((line for line in reversed(lines) if "validation_loss" in line), {})
        measures = "  ".join(
            f"{name} {value:.3f}" for name, value in last.items() if name != "step" and value is not None
        )
        left = seconds["cpu"] / max(step, 1) * (run.config.steps - step)
        return (
            f"[run {self.done} of {self.total}] {run.key}: step {step:,} of {run.config.steps:,}  {measures}  "
            f"{seconds['cpu']:.0f} CPU s, at most {left:.0f} more"
        )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines, what was validated by its plain name but for loss and bits per byte, which training has too."""
    return [
        {name if name in (LOSS, BITS) else name.removeprefix("validation_"): value for name, value in line.items()}
        for line in read_metrics(folder / METRICS)
    ]


def _setup(run: Run) -> str:
    """A hash of what decides a run's numbers but for how long it goes on."""
    config = asdict(run.config) | {"model": _told(run.config.model)}
    decisive = [
        config[name] for name in (*FIXED, "learning_rate", "warmup_steps", "weight_decay", "betas", "grad_clip")
    ]
    source = Path(run.config.train_data).name if run.source is None else run.source.fingerprint()
    return hashlib.sha256(json.dumps([decisive, source]).encode()).hexdigest()[:12]


def _told(model: GriffinConfig | None) -> dict[str, Any]:
    """The fields that are not at their defaults, so that a field that comes to be later changes nothing."""
    if model is None:  # that of init_from
        return {}
    return {each.name: v for each in fields(model) if (v := getattr(model, each.name)) != each.default}


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
