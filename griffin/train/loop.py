"""The training loop: pre-training and going on from a model are the same loop with other weights to begin with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from griffin import checkpoint
from griffin.config import GriffinConfig
from griffin.data.examples import MANIFEST
from griffin.data.prepare import Data
from griffin.errors import GriffinError, is_panic, one_line
from griffin.files import whole_file
from griffin.lora import Coverage, LoRA, add
from griffin.machine import check_memory, check_threads, find_device
from griffin.memory import keep_freed_memory, return_freed_memory
from griffin.model import Griffin
from griffin.quantize import quantization
from griffin.tokenizer import Tokenizer
from griffin.train.config import PAIRS, TrainConfig
from griffin.train.display import Display, describe, going_on, reporting
from griffin.train.flops import flops_per_token, peak_flops
from griffin.train.metrics import METRICS, Metrics, check_tensorboard, curve, read_metrics
from griffin.train.objective import Objective
from griffin.train.optim import falling_from, learning_rate, make_optimizer, set_learning_rate
from griffin.train.parallel import prepare_blocks
from griffin.train.reading import objective_of, read_data
from griffin.train.results import Written, best_of, save_best, take_best, write_results
from griffin.train.snapshot import (
    Before,
    Progress,
    check_snapshot,
    drop_after,
    latest,
    load_snapshot,
    newest_whole,
    remove_leftovers,
    save_snapshot,
    set_aside,
)
from griffin.train.source import Prepared, Source, check_data, prepared
from griffin.train.start import Start
from griffin.train.step import StepResult, take_step
from griffin.train.stop import only_process, stop_on_signal
from griffin.train.trained import AdapterOnly, AllWeights, StartOnly, Trained, needed_files

MOST_SKIPPED = 100  # in a row: the run has diverged
# Fields that may change on resuming, and decide how the next steps change the weights.
SCHEDULE = ["steps", "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "betas", "eps", "grad_clip"]
SCHEDULE += ["schedule", "decay_steps", "beta"]
MOST_SHOWN = 10  # examples that cannot be used, of those left out

# A model, its tokenizer and a prompt (and state=, where one is tuned) to a text; training itself knows no sampling.
Sampler = Callable[..., str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    step: int
    finished: bool  # False: it was told to stop, and goes on with resume=True
    signal: int | None = None  # that told it to stop
    model_folder: Path | None  # run/model; None unless finished, or where an adapter cannot be merged
    adapter_folder: Path | None = None  # run/adapter, of LoRA
    state_file: Path | None = None  # run/state.safetensors, of state tuning
    measured: dict[str, float] = field(default_factory=dict)  # at the last validation; of the best, where that is kept
    validation_bits_per_byte: float | None  # of `measured`
    seconds: float  # of training, over all sessions


def train(
    config: TrainConfig,
    run: str | Path,
    *,
    resume: bool = False,
    source: Source | None = None,
    objective: Objective | None = None,
    sampler: Sampler | None = None,
    console: Console | None = None,
) -> Result:
    """Train until config.steps, or until Ctrl-C, SIGTERM or SIGHUP, which end the step, write a checkpoint and return.

    The run folder holds config.json, data/ (the tokens), metrics.jsonl, checkpoints/ and at the end model/. A run that
    was killed at any moment and resumed writes the same numbers as one that was not: bit for bit, on one machine's CPU
    with as many threads. What cannot be gone on with is refused before anything in the folder has changed.

    Args:
        config: what to train on what.
        run: the run's folder; it is made.
        resume: go on from the newest checkpoint; from the beginning where there is none yet.
        source: of the batches, on config.device; None: the data of config.train_data. Another source is all that is
            read then: train_data is its name, and no more.
        objective: what a step makes small, in place of config.objective's; what it keeps between steps is its own, and
            in no checkpoint.
        sampler: called with config.sample_prompt before, after and every sample_every steps; its text is shown. An
            error of it is shown too, and the run goes on.
        console: where to show things; None is the terminal. That it can be shown is not needed: the reader may leave.

    Raises:
        GriffinError: the folder has a run and resume is False; the data, a checkpoint or the config cannot be used, or
            needs more than this machine has; or MOST_SKIPPED steps in a row had a loss or gradient that is not finite.
    """
    run = Path(run)
    check_new(run, resume)
    checkpoint.check_place(run / "model", overwrite=True)  # where it will be written; after training is too late to ask
    newest, damaged = newest_whole(run, needed_files(config))
    if config.tensorboard:
        check_tensorboard()
    device = find_device(config.device)
    if config.threads is not None:
        check_threads(config.threads)
    # Once there is a checkpoint of all weights, the model that the run began with is not needed any more.
    whole = newest is not None and not config.partial
    start = newest if whole or config.init_from is None else checkpoint.resolve(config.init_from)
    if start is not None and (config.model is None or not whole):
        stored = checkpoint.read_config(start)
        if config.model not in (None, stored):
            raise GriffinError(f"{config.init_from} is of another config than model=; leave model=None to take its own")
        config = replace(config, model=stored)
    _check_memory(config, device)
    before = None if newest is None else check_snapshot(newest, config)
    if before is not None and before.step > config.steps:
        raise GriffinError(
            f"{run} has done {before.step} steps, more than steps={config.steps}: give as many or more, "
            "or begin anew in another folder (--run DIR)"
        )
    back = None
    if before is not None and (branch := _branch(before, config)) is not None:
        newest, _ = newest_whole(run, needed_files(config), branch)
        if newest is None:
            raise GriffinError(
                f"{run} has no checkpoint of step {branch}, from which its rate fell: a longer run goes on from there; "
                f"leave steps={before.config['steps']}, or begin anew in another folder (--run DIR)"
            )
        back, before = before.step, check_snapshot(newest, config)
    with going_on(console or Console()) as console, only_process(run):
        remove_leftovers(run)
        if back is not None:
            assert newest is not None
            assert before is not None
            drop_after(run, before.step)
            console.print(
                f"the run's rate fell from step {before.step} on, up to step {back}: a longer one goes on from step "
                f"{before.step}, so that the rate does not jump",
                markup=False,
                soft_wrap=True,
            )
        for folder, why in damaged.items():
            console.print(f"{why}: going on from the one before ({set_aside(folder)} is what it was)", markup=False)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        read_from: Data | Source
        if source is not None:
            read_from = source
        else:
            with reporting(console) as report:
                expected = None if before is None else before.data
                read_from, bad = read_data(config, run, start, expected, report)
            for text in bad[:MOST_SHOWN]:
                console.print(f"left out: {text}", markup=False, soft_wrap=True)
            if len(bad) > MOST_SHOWN:
                left = f"{len(bad) - MOST_SHOWN} more, named in {run / 'data' / MANIFEST}"
                console.print(f"left out: {left}", markup=False)
        return _Run(config, run, read_from, objective, console, sampler, newest, before).go()


def check_new(run: Path, resume: bool) -> None:
    """Raise GriffinError if a folder has a run, and that is not to be gone on with."""
    if not resume and (newest := latest(run)) is not None:
        raise GriffinError(
            f"{run} has a run, at {newest.name}: go on with it (--resume), or give another folder (--run DIR)"
        )


class _Run:
    """The parts of a run, so that each step of it can be read on its own."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: Data | Source,
        objective: Objective | None,
        console: Console,
        sampler: Sampler | None,
        newest: Path | None,
        before: Before | None,
    ) -> None:
        assert config.model is not None
        self.config, self.run, self.sampler = config, run, sampler
        self.device = torch.device(find_device(config.device))
        if isinstance(data, Data):
            check_data(config, config.model, data)
        elif data.tokenizer is None and config.partial:
            raise GriffinError("a source without text trains all weights: adapters and states have a tokenizer's files")
        self.newest, self.before = newest, before
        if self.device.type == "cpu":
            keep_freed_memory() if config.recompute == "none" else return_freed_memory()
        init_from = config.init_from if newest is None or config.partial else None
        self.model = _make_model(config, config.model, self.device, init_from)
        self.start = None
        if config.state_tokens:
            self.model.requires_grad_(False)
            assert data.tokenizer is not None
            self.start = Start(self.model, _state_ids(config, data.tokenizer))
        self.coverage = None if config.lora is None else _adapt(self.model, config.lora, config.seed)
        self.trained = _trained(config, self.model, self.start, data.tokenizer)
        self.objective = objective or objective_of(config, self.start)
        fresh = newest is None or config.partial
        self.source: Source = (
            prepared(config, run, data, self.objective, self.model if fresh else None, self.device)
            if isinstance(data, Data)
            else data
        )
        prepare_blocks(self.model, recompute=config.recompute, compiled=config.compile)
        self.optimizer = make_optimizer(self.trained.parameters().items(), config)
        self.peak_flops = config.peak_flops or peak_flops(self.device)
        self.flops_per_token = flops_per_token(config.model, config.row_tokens)
        self.falls = falling_from(config)
        self.progress = Progress()
        self.display = Display(console, config.steps)
        self.width, self.encoding = console.width, console.encoding
        self.measured: dict[str, float] = {}

    def go(self) -> Result:
        config, progress, newest = self.config, self.progress, self.newest
        if newest is not None:
            self.progress, changes = load_snapshot(
                newest, config, self.source.fingerprint(), self.trained, self.optimizer
            )
            progress = self.progress
            self.display.say(f"going on from step {progress.step} ({newest})")
            for change in (*changes, *self._changes()):
                self.display.say(f"  not bit for bit the unbroken run: {change}")
        with whole_file(self.run / "config.json") as file:
            file.write_text(config.to_json(), encoding="utf-8")
        step = progress.step if newest is not None else -1
        self.metrics = Metrics(self.run, step, config.tensorboard, self.display.say)
        try:
            with self.display, stop_on_signal(self.display.say) as stop:
                if newest is None:
                    self._begin()
                while progress.step < config.steps and not stop.requested:
                    self._step()
                    due = progress.step % config.checkpoint_every == 0 or progress.step in (self.falls, config.steps)
                    if due or stop.requested:
                        self._save()
        finally:
            self.metrics.close()
        return self._end(stop.signal)

    def _changes(self) -> list[str]:
        """What is set otherwise than before, of what decides the next steps; above all the learning rate's jump."""
        assert self.before is not None
        now = json.loads(self.config.to_json())
        pairs = [(name, self.before.config[name], now[name]) for name in SCHEDULE if name in self.before.config]
        texts = [f"{name} was {then}, is {value}" for name, then, value in pairs if then != value]
        if not texts:
            return []
        earlier = replace(self.config, **{name: then for name, then, _ in pairs})
        step = self.progress.step
        then, rate = learning_rate(max(0, step - 1), earlier), learning_rate(step, self.config)
        return [*texts[:-1], f"{texts[-1]}; the learning rate goes on from {then:.3g} with {rate:.3g}"]

    def _begin(self) -> None:
        config, source = self.config, self.source
        self.display.say(
            f"model      {self.model.config.num_parameters() / 1e6:.2f}M parameters, "
            f"{self.model.config.num_layers} layers\n"
            f"data       {source.describe()}"
        )
        if self.coverage is not None:
            self.display.say(f"adapter    {self.coverage}")
        if self.start is not None:
            numbers = sum(value.numel() for value in self.start.parameters())
            self.display.say(f"state      {numbers:,} numbers are trained, of {self.start.num_tokens} tokens")
        if isinstance(source, Prepared) and config.objective != "text":
            self.display.show(describe(source.data, source.rows, source.lost, config))
        self._sample("before training")
        self._validate()

    def _step(self) -> None:
        config, progress = self.config, self.progress
        began = time.perf_counter()
        set_learning_rate(self.optimizer, rate := learning_rate(progress.step, config))
        if config.lora is not None and config.lora.dropout:  # what is dropped is a function of the step, too
            torch.manual_seed(config.seed + (progress.step << 20))
        result = take_step(
            self.model, self.objective, self.optimizer, self.source.batches(progress.step), config.grad_clip
        )
        self._count(result)
        progress.seconds += (seconds := time.perf_counter() - began)
        if result.taken:
            rate_of_tokens = result.num_tokens / seconds
            self.display.step(
                progress.step, result.loss / max(1, result.count), rate_of_tokens, self._mfu(rate_of_tokens)
            )
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            self._log(rate, result, seconds)
        if progress.step % config.validate_every == 0 or progress.step == config.steps:
            self._validate()
        if config.sample_every and progress.step % config.sample_every == 0 and progress.step < config.steps:
            self._sample(f"after {progress.step} steps")

    def _mfu(self, tokens_per_s: float) -> float | None:
        """The share of the device's matrix products that the model's arithmetic is; None where its peak is unknown."""
        return None if self.peak_flops is None else tokens_per_s * self.flops_per_token / self.peak_flops

    def _count(self, result: StepResult) -> None:
        progress = self.progress
        progress.step += 1
        if result.taken:
            progress.optimizer_steps += 1
            progress.tokens += result.num_tokens
            progress.logged_nats += result.loss
            progress.logged_tokens += result.count
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        if not result.count:
            self.display.say(f"step {progress.step} skipped: its rows have no token to predict")
            return
        progress.skipped_in_a_row += 1
        self.display.say(f"step {progress.step} skipped: loss {result.loss}, gradient norm {result.grad_norm}")
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            raise GriffinError(
                f"{MOST_SKIPPED} steps in a row had a loss or gradient that is not finite, up to step {progress.step}: "
                f"the run has diverged; lower learning_rate={self.config.learning_rate:g}"
            )

    def _log(self, rate: float, result: StepResult, seconds: float) -> None:
        progress, tokens_per_s = self.progress, result.num_tokens / seconds
        mfu = self._mfu(tokens_per_s)
        self.metrics.write(
            {
                "step": progress.step,
                "loss": progress.logged_nats / progress.logged_tokens if progress.logged_tokens else float("nan"),
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                "tokens": progress.tokens,
                "skipped": progress.skipped,
                "seconds": round(progress.seconds, 3),
                "tokens_per_s": round(tokens_per_s, 1),
                **({} if mfu is None else {"mfu": round(mfu, 4)}),
            }
        )
        progress.logged_nats, progress.logged_tokens = 0.0, 0

    def _validate(self) -> None:
        self.measured = dict(self.source.measure(self.model))
        step, rest = self.progress.step, dict(self.measured)
        self.metrics.write({"step": step, **{f"validation_{name}": value for name, value in self.measured.items()}})
        rate = self.progress.tokens / self.progress.seconds if self.progress.seconds else 0.0
        speed = f"  {rate:,.0f} tokens/s" if rate else ""
        loss = rest.pop("loss")
        unit = "nats/pair" if self.config.objective in PAIRS else "nats/token"
        texts = [f"{value:.3f} {name.replace('bits_per_byte', 'bits/byte')}" for name, value in rest.items()]
        best = " *" if self._keep_best(loss) else ""
        self.display.say("  ".join([f"step {step:6d}", f"validation {loss:.3f} {unit}", *texts]) + speed + best)

    def _keep_best(self, loss: float) -> bool:
        """Keep what is trained if it is the best so far."""
        if not self.config.keep_best or not loss < best_of(self.run):
            return False
        save_best(self.run, self.trained, self.progress.step, loss)
        return True

    def _sample(self, when: str) -> None:
        if self.sampler is None or self.source.tokenizer is None:
            return
        try:
            begun = {} if self.start is None else {"state": self.start.state()}
            text = self.sampler(self.model, self.source.tokenizer, self.config.sample_prompt, **begun)
        except BaseException as error:  # whatever it is: a sample is only shown
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            kind = "" if isinstance(error, GriffinError) else f"{type(error).__name__}: "
            self.display.say(f"\nno sample {when}: {kind}{one_line(error)}\n")
            return
        if self.progress.step == 0:  # a model that knows nothing repeats itself at length
            text = "\n".join(text.splitlines()[:6])[:300]
        self.display.say(f"\n--- a sample {when} ---\n{text}\n---\n")

    def _curve(self) -> None:
        if not self.encoding.startswith("utf"):
            self.display.say(f"the loss curve needs a UTF-8 terminal; its numbers are in {self.run / METRICS}")
            return
        try:
            text = curve(read_metrics(self.run / METRICS), self.width)
        except Exception as error:  # of a library that draws
            text = f"no loss curve: {type(error).__name__}: {one_line(error)}"
        self.display.say(text)

    def _save(self) -> Path:
        return save_snapshot(
            self.run,
            self.config,
            self.source.fingerprint(),
            self.trained,
            self.optimizer,
            self.progress,
            self.falls,
        )

    def _end(self, signal: int | None) -> Result:
        finished = self.progress.step >= self.config.steps
        written = Written()
        if finished:
            if self.config.keep_best:
                step = take_best(self.run, self.trained)
                self.display.say(f"the best at validation was step {step}: that is written")
                self.measured = dict(self.source.measure(self.model))
            written = write_results(self.config, self.run, self.model, self.trained, self.start, self.source.tokenizer)
            for note in written.notes:
                self.display.say(note)
            self._sample("after training")
            self._curve()
        return Result(
            step=self.progress.step,
            finished=finished,
            signal=signal,
            model_folder=written.model,
            adapter_folder=written.adapter,
            state_file=written.state,
            measured=self.measured,
            validation_bits_per_byte=self.measured.get("bits_per_byte"),
            seconds=self.progress.seconds,
        )


def _trained(config: TrainConfig, model: Griffin, start: Start | None, tokenizer: Tokenizer | None) -> Trained:
    if config.lora is not None:
        assert tokenizer is not None
        return AdapterOnly(model, tokenizer, str(config.init_from))
    return AllWeights(model, tokenizer) if start is None else StartOnly(start)


def _adapt(model: Griffin, how: LoRA, seed: int) -> Coverage:
    coverage = add(model, how, torch.Generator(model.device).manual_seed(seed))
    model.train()  # dropout; the model itself has nothing that differs
    return coverage


def _state_ids(config: TrainConfig, tokenizer: Tokenizer) -> list[int]:
    """What a state has read before it is trained: so many tokens, the text again and again."""
    ids = tokenizer.encode(config.state_prompt) or list(tokenizer.stop_ids[:1]) or [0]
    return (ids * config.state_tokens)[: config.state_tokens]


def _branch(before: Before, config: TrainConfig) -> int | None:
    """Where a run whose wsd schedule had begun to fall goes on, if it is to be longer now."""
    if before.config.get("schedule") != "wsd" or config.schedule != "wsd" or before.config["steps"] == config.steps:
        return None
    names = ("steps", "warmup_steps", "decay_steps")
    branch = falling_from(replace(config, **{name: before.config[name] for name in names}))
    return branch if branch is not None and before.step > branch else None


def _make_model(config: TrainConfig, model: GriffinConfig, device: torch.device, init_from: str | None) -> Griffin:
    activations = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    if init_from is None:
        generator = torch.Generator(device).manual_seed(config.seed)
        return Griffin(model, device=device, activation_dtype=activations, generator=generator)
    form = config.base if config.base in ("int8", "int4") else None
    kind = torch.bfloat16 if config.base == "bf16" else torch.float32
    loaded = checkpoint.load(init_from, device=device, dtype=kind, quantize=form)
    if not config.partial and (stored := quantization(loaded)) is not None:
        raise GriffinError(
            f"{init_from} is {stored.name}: its weights cannot be trained; adapters over them can (lora)"
        )
    loaded.activation_dtype = activations
    return loaded


def _check_memory(config: TrainConfig, device: str) -> None:
    """Refuse what cannot be trained here, by what is needed at the least."""
    assert config.model is not None
    num_parameters = config.model.num_parameters()
    # fp32 weights, their gradients and AdamW's two averages; or only weights that stay.
    each = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}[config.base] if config.partial else 16.0
    check_memory(f"training a model of {num_parameters:,} parameters", int(each * num_parameters), device)
    # A batch has three whole numbers of 8 bytes a token, and every batch of a step is there at once; the first layer's
    # input is in the activations' dtype.
    tokens = config.batch_rows * config.row_tokens
    activation = config.model.width * (2 if config.dtype == "bf16" else 4)
    check_memory(
        f"a step of batch_rows={config.batch_rows} x row_tokens={config.row_tokens} tokens, "
        f"grad_accumulation={config.grad_accumulation}",
        tokens * (24 * config.grad_accumulation + activation),
        device,
    )
