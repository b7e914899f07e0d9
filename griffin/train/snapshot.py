"""Checkpoints of a run: a model folder that anyone can load, and beside it what is needed to go on exactly.

`run/checkpoints/step_00000100/` holds the model's files, `optimizer.safetensors` (AdamW's two averages of every
parameter, by its name) and `train_state.json`. There is no random state to keep: the order of the data is a function of
the step, and nothing else is drawn after the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from griffin.checkpoint.layout import CONFIG
from griffin.checksums import SUMS, read_sums, verify, write_sums
from griffin.errors import GriffinError
from griffin.files import remove_folder, save_tensors, whole_folder
from griffin.reading import read_json
from griffin.train.config import TrainConfig, config_from_json
from griffin.train.trained import Trained

FORMAT = "griffin-train-1"
OPTIMIZER, STATE = "optimizer.safetensors", "train_state.json"
_AVERAGES = ("exp_avg", "exp_avg_sq")
# Fields of TrainConfig that decide what step N + 1 reads or what the files mean; the data has a fingerprint of its own.
# The others may change on resuming; the run is then no longer the one that would have been without the break.
FIXED = ("model", "batch_rows", "row_tokens", "grad_accumulation", "dtype", "seed")
TUNING = ("objective", "lora", "state_tokens", "state_prompt", "base", "long")  # likewise


@dataclass
class Progress:
    """How far a run is: all that a step changes besides the weights and the optimizer's averages."""

    step: int = 0  # steps done, skipped ones included
    optimizer_steps: int = 0  # steps that changed the weights
    tokens: int = 0  # predicted so far
    skipped: int = 0  # steps left out because of a number that is not finite
    skipped_in_a_row: int = 0
    seconds: float = 0.0  # of training
    logged_nats: float = 0.0  # since the last line of the metrics
    logged_tokens: int = 0


def save_snapshot(
    run: Path,
    config: TrainConfig,
    data: str,
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of `progress.step`, whole or not at all, then remove all but the newest.

    Args:
        data: the fingerprint of what the run reads.
        keep: a step whose checkpoint is not removed, however old.
    """
    folder = run / "checkpoints" / f"step_{progress.step:08d}"
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "config": json.loads(config.to_json()),
        "fixed": fingerprint(config),
        "data": data,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    with whole_folder(folder) as temporary:
        trained.write(temporary)
        save_tensors(_averages(trained, optimizer), temporary / OPTIMIZER, {"format": "pt"})
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        write_sums(temporary)
    for old in snapshots(run)[: -config.keep_checkpoints]:
        if _step(old) != keep:
            remove_folder(old)
    return folder


def newest_whole(
    run: Path, needed: Sequence[str] = (CONFIG,), before: int | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest checkpoint whose files are what was written; None where there are no checkpoints.

    Args:
        run: the run's folder.
        needed: files that each must have, besides the optimizer's and the state's.
        before: of steps up to this one only; None: of all.

    Returns:
        It, and those after it, with what is wrong with each: damage, or files of another checkpoint.

    Raises:
        GriffinError: there are checkpoints, and none is whole.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(snapshots(run)):
        if before is not None and _step(folder) > before:
            continue
        try:
            sums = read_sums(folder)
            verify(folder, [*needed, OPTIMIZER, STATE, *sums], mend="it is not used")
            ours = {*needed, OPTIMIZER, STATE, *(path.name for path in folder.glob("*.safetensors"))}
            if (folder / SUMS).exists() and (missing := ours - sums.keys()):
                raise GriffinError(f"{folder / SUMS} does not vouch for {min(missing)}; it is not used")
            if (step := _read_state(folder / STATE)["progress"]["step"]) != _step(folder):
                raise GriffinError(f"{folder} holds the checkpoint of step {step}; it is not used")
        except GriffinError as error:
            damaged[folder] = str(error)
        else:
            return folder, damaged
    if damaged:
        first = next(iter(damaged.values()))
        raise GriffinError(f"{run} has no whole checkpoint: {first}; begin anew in another folder (--run DIR)")
    return None, damaged


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints behind a step: the run goes on from that one another way."""
    for folder in snapshots(run):
        if _step(folder) > step:
            remove_folder(folder)


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint another name, under which it is none: the run will write that step again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    if aside.exists():
        remove_folder(aside)
    folder.rename(aside)
    return aside


@dataclass(frozen=True)
class Before:
    """What a checkpoint says of the run that wrote it, without its tensors."""

    step: int
    data: str  # the fingerprint of what it read
    config: dict[str, Any]  # as `TrainConfig.to_json` writes it


def check_snapshot(folder: Path, config: TrainConfig) -> Before:
    """Look at a checkpoint before anything of the run is touched.

    Raises:
        GriffinError: it cannot be read, or is of another config; the message has both values.
    """
    state = _read_state(folder / STATE)
    _check_config(folder, state, config)
    return Before(state["progress"]["step"], state["data"], state["config"])


def load_snapshot(
    folder: Path, config: TrainConfig, data: str, trained: Trained, optimizer: torch.optim.Optimizer
) -> tuple[Progress, list[str]]:
    """Put a checkpoint into what is trained and its optimizer.

    Returns:
        The progress, and what differs from the machine it was written on: then the results need not be the same bits.

    Raises:
        GriffinError: a file is missing or damaged, or the checkpoint is of another config, data or model; the message
            has both values.
    """
    state = _read_state(folder / STATE)
    _check_config(folder, state, config)
    if state["data"] != data:
        raise GriffinError(
            f"{folder} was trained on other data ({state['data'][:12]}, now {data[:12]}): "
            "bring the text back as it was, or begin anew in another folder"
        )
    trained.read(folder)
    progress = Progress(**state["progress"])
    _load_averages(folder / OPTIMIZER, trained.parameters(), optimizer, progress.optimizer_steps)
    now = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return progress, [f"{name} was {state[name]}, is {value}" for name, value in now.items() if state[name] != value]


def snapshots(run: Path) -> list[Path]:
    """All whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))


def latest(run: str | Path) -> Path | None:
    """The newest checkpoint, or None."""
    return (snapshots(Path(run)) or [None])[-1]  # type: ignore[list-item]


def remove_leftovers(run: Path) -> None:
    """Remove the temporary files and folders that a killed run left; nobody else may be writing here."""
    for place in (run, run / "checkpoints"):
        for pattern in (".*.tmp", ".*.old"):
            for path in place.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def fingerprint(config: TrainConfig) -> str:
    """A sha256 of the fields that may not change within a run."""
    values = asdict(config)
    fixed: list[Any] = [values[name] for name in FIXED]
    # Of what came later only what is set: older checkpoints have no trace of it.
    later = {each.name: values[each.name] for each in fields(config) if each.name in TUNING}
    changed = {name: value for name, value in later.items() if value != _default(name)}
    return hashlib.sha256(json.dumps(fixed + [changed] * bool(changed), sort_keys=True).encode()).hexdigest()


def _default(name: str) -> Any:
    return next(each.default for each in fields(TrainConfig) if each.name == name)


def _averages(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by name; zeros before its first step."""
    averages = {}
    for name, parameter in trained.parameters().items():
        state = optimizer.state.get(parameter, {})
        for kind in _AVERAGES:
            average = state.get(kind)
            averages[f"{kind}.{name}"] = torch.zeros_like(parameter) if average is None else average
    return {name: average.detach().cpu().contiguous() for name, average in averages.items()}


def _load_averages(
    file: Path, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
) -> None:
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise GriffinError(
            f"{file} cannot be read ({error}); remove {file.parent} to go on from the one before"
        ) from error
    expected = {f"{kind}.{name}": p for name, p in trained.items() for kind in _AVERAGES}
    if stored.keys() != expected.keys():
        name = min(stored.keys() ^ expected.keys())
        raise GriffinError(f"{file}: {name!r} is {'not in it' if name in expected else 'not one of this model'}")
    for name, parameter in expected.items():
        if stored[name].shape != parameter.shape or stored[name].dtype != parameter.dtype:
            raise GriffinError(
                f"{file}: {name} is {tuple(stored[name].shape)} {stored[name].dtype}, "
                f"the model needs {tuple(parameter.shape)} {parameter.dtype}"
            )
    for name, parameter in trained.items():
        averages = {kind: stored[f"{kind}.{name}"].to(parameter.device) for kind in _AVERAGES}
        count = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": count, **averages}


def _read_state(file: Path) -> dict[str, Any]:
    state = read_json(file, mend=f"remove {file.parent} to go on from the one before")
    if state.get("format") != FORMAT:
        raise GriffinError(f"{file} is not of format {FORMAT!r}; it was not written by this version")
    kinds = {"progress": dict, "config": dict, "fixed": str, "data": str, "torch": str, "threads": int}
    for name, kind in kinds.items():
        if type(state.get(name)) is not kind:
            raise GriffinError(f"{file}: {name!r} is missing or is not of type {kind.__name__}; it is not used")
    known = {field.name: type(field.default) for field in fields(Progress)}
    progress = state["progress"]
    if progress.keys() != known.keys():
        raise GriffinError(f"{file}: 'progress' does not have {', '.join(sorted(known))}")
    for name, counts in known.items():
        if type(progress[name]) not in (counts, int) or not 0 <= progress[name] < math.inf:
            raise GriffinError(f"{file}: {name} of 'progress' is not a number from 0 up; it is not used")
    return state


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _check_config(folder: Path, state: dict[str, Any], config: TrainConfig) -> None:
    if state["fixed"] == fingerprint(config) or _same_fixed(folder, state, config):
        return
    then, now = state["config"], json.loads(config.to_json())
    differing: dict[str, tuple[Any, Any]] = {}
    if isinstance(then.get("model"), dict) and isinstance(now["model"], dict):
        differing = {f"model.{key}": (then["model"].get(key), value) for key, value in now.pop("model").items()}
    differing |= {key: (then.get(key), now[key]) for key in FIXED if key in now}
    differing |= {key: (then.get(key, _default(key)), now[key]) for key in TUNING}
    texts = [f"{key} was {a!r}, is {b!r}" for key, (a, b) in differing.items() if a != b]
    raise GriffinError(f"{folder} is of another run: {'; '.join(texts)}. Give these as they were, or another --run")


def _same_fixed(folder: Path, state: dict[str, Any], config: TrainConfig) -> bool:
    """Whether it is the same run, written before there were some of today's fields: those have their defaults."""
    try:
        then = config_from_json(json.dumps(state["config"]), str(folder))
    except GriffinError:  # a field of then is none of today's
        return False
    return fingerprint(then) == fingerprint(config)
