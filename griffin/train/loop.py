"""The training loop: pre-training and going on from a model are the same loop with other weights to begin with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from griffin import checkpoint
from griffin.config import GriffinConfig
from griffin.data.order import step_rows
from griffin.data.packing import count_rows, pack
from griffin.data.prepare import Data, prepare
from griffin.errors import GriffinError
from griffin.files import whole_file
from griffin.memory import keep_freed_memory, return_freed_memory
from griffin.model import Griffin
from griffin.tokenizer import Tokenizer
from griffin.train.config import TrainConfig
from griffin.train.display import Display, reporting
from griffin.train.flops import flops_per_token, peak_flops
from griffin.train.metrics import METRICS, Metrics, curve, read_metrics
from griffin.train.optim import learning_rate, make_optimizer, set_learning_rate
from griffin.train.snapshot import Progress, latest, load_snapshot, remove_leftovers, save_snapshot
from griffin.train.step import StepResult, Validation, take_step
from griffin.train.stop import only_process, stop_on_signal

MOST_SKIPPED = 100  # in a row: the run has diverged

Sampler = Callable[[Griffin, Tokenizer, str], str]  # a prompt to a text; training itself knows no sampling


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    step: int
    finished: bool  # False: it was told to stop, and goes on with resume=True
    model_folder: Path | None  # run/model; None unless finished
    validation_bits_per_byte: float | None  # the last one measured
    seconds: float  # of training, over all sessions


def train(
    config: TrainConfig,
    run: str | Path,
    *,
    resume: bool = False,
    sampler: Sampler | None = None,
    console: Console | None = None,
) -> Result:
    """Train until config.steps, or until Ctrl-C or SIGTERM, which end the step, write a checkpoint and return.

    The run folder holds config.json, data/ (the tokens), metrics.jsonl, checkpoints/ and at the end model/. A run that
    was killed at any moment and resumed writes the same numbers as one that was not: bit for bit, on one machine's CPU
    with as many threads.

    Args:
        config: what to train on what.
        run: the run's folder; it is made.
        resume: go on from the newest checkpoint; from the beginning where there is none yet.
        sampler: called with config.sample_prompt before, after and every sample_every steps; its text is shown.
        console: where to show things; None is the terminal.

    Raises:
        GriffinError: the folder has a run and resume is False; the data, a checkpoint or the config cannot be used; or
            MOST_SKIPPED steps in a row had a loss or gradient that is not finite.
    """
    run, console = Path(run), console or Console()
    newest = latest(run)
    if newest is not None and not resume:
        raise GriffinError(
            f"{run} has a run, at {newest.name}: go on with it (--resume), or give another folder (--run DIR)"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run.mkdir(parents=True, exist_ok=True)
    with only_process(run):
        remove_leftovers(run)
        # Once there is a checkpoint, the model that the run began with is not needed any more.
        start = newest if newest is not None or config.init_from is None else checkpoint.resolve(config.init_from)
        if config.model is None:
            assert start is not None  # TrainConfig sees to it
            config = replace(config, model=checkpoint.read_config(start))
        with whole_file(run / "config.json") as file:
            file.write_text(config.to_json(), encoding="utf-8")
        with reporting(console) as report:
            data = prepare(
                config.train_data,
                run / "data",
                tokenizer=config.tokenizer or str(start),
                validation=config.validation_data,
                report=report,
            )
        return _Run(config, run, data, console, sampler, newest).go()


class _Run:
    """The parts of a run, so that each step of it can be read on its own."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: Data,
        console: Console,
        sampler: Sampler | None,
        newest: Path | None,
    ) -> None:
        assert config.model is not None
        self.config, self.run, self.data, self.sampler = config, run, data, sampler
        self.device = _device(config.device)
        _check_data(config, config.model, data)
        self.num_rows = count_rows(data.train, config.row_tokens)
        self.newest = newest
        if self.device.type == "cpu":
            keep_freed_memory() if config.recompute == "none" else return_freed_memory()
        self.model = _make_model(config, config.model, self.device, None if newest is not None else config.init_from)
        if config.compile:
            self.model.compile_blocks()
        self.optimizer = make_optimizer(self.model.named_parameters(), config)
        self.peak_flops = config.peak_flops or peak_flops(self.device)
        self.flops_per_token = flops_per_token(config.model, config.row_tokens)
        self.validation = Validation.of(
            data.validation,
            data.tokenizer,
            num_rows=config.validation_rows,
            row_tokens=config.row_tokens,
            batch_rows=config.batch_rows,
            device=self.device,
        )
        self.progress = Progress()
        self.display = Display(console, config.steps)
        self.width = console.width
        self.bits_per_byte: float | None = None

    def go(self) -> Result:
        config, progress, newest = self.config, self.progress, self.newest
        if newest is not None:
            self.progress, changes = load_snapshot(newest, config, self.data.fingerprint(), self.model, self.optimizer)
            progress = self.progress
            self.display.say(f"going on from step {progress.step} ({newest})")
            for change in changes:
                self.display.say(f"  not bit for bit the unbroken run: {change}")
        self.metrics = Metrics(self.run, progress.step if newest is not None else -1, config.tensorboard)
        try:
            with self.display, stop_on_signal(self.display.say) as stop:
                if newest is None:
                    self._begin()
                while progress.step < config.steps and not stop.requested:
                    self._step()
                    due = progress.step % config.checkpoint_every == 0 or progress.step == config.steps
                    if due or stop.requested:
                        self._save()
        finally:
            self.metrics.close()
        return self._end()

    def _begin(self) -> None:
        config, meta = self.config, self.data.train.meta
        epochs = config.steps * config.grad_accumulation * config.batch_rows / self.num_rows
        self.display.say(
            f"model      {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f}M parameters, "
            f"{self.model.config.num_layers} layers\n"
            f"data       {meta.num_bytes / 1e6:.2f} MB of text, {meta.num_tokens:,} tokens "
            f"({meta.num_bytes / meta.num_tokens:.2f} bytes each), seen {epochs:.2f} times"
        )
        self._sample("before training")
        self._validate()

    def _step(self) -> None:
        config, progress = self.config, self.progress
        began = time.perf_counter()
        set_learning_rate(self.optimizer, rate := learning_rate(progress.step, config))
        first = progress.step * config.grad_accumulation
        batches = [
            pack(
                self.data.train,
                step_rows(self.num_rows, config.batch_rows, first + part, seed=config.seed),
                config.row_tokens,
            ).to(self.device)
            for part in range(config.grad_accumulation)
        ]
        result = take_step(self.model, self.optimizer, batches, config.grad_clip)
        self._count(result)
        progress.seconds += (seconds := time.perf_counter() - began)
        if result.taken:
            rate_of_tokens = result.num_tokens / seconds
            self.display.step(
                progress.step, result.nats / max(1, result.num_tokens), rate_of_tokens, self._mfu(rate_of_tokens)
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
            progress.logged_nats += result.nats
            progress.logged_tokens += result.num_tokens
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.display.say(f"step {progress.step} skipped: loss {result.nats}, gradient norm {result.grad_norm}")
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
        loss, self.bits_per_byte = self.validation.measure(self.model)
        step = self.progress.step
        self.metrics.write({"step": step, "validation_loss": loss, "validation_bits_per_byte": self.bits_per_byte})
        rate = self.progress.tokens / self.progress.seconds if self.progress.seconds else 0.0
        speed = f"  {rate:,.0f} tokens/s" if rate else ""
        self.display.say(f"step {step:6d}  validation {loss:.3f} nats/token  {self.bits_per_byte:.3f} bits/byte{speed}")

    def _sample(self, when: str) -> None:
        if self.sampler is not None:
            text = self.sampler(self.model, self.data.tokenizer, self.config.sample_prompt)
            if self.progress.step == 0:  # a model that knows nothing repeats itself at length
                text = "\n".join(text.splitlines()[:6])[:300]
            self.display.say(f"\n--- a sample {when} ---\n{text}\n---\n")

    def _save(self) -> Path:
        return save_snapshot(
            self.run,
            self.config,
            self.data.fingerprint(),
            self.model,
            self.optimizer,
            self.progress,
            self.data.tokenizer,
        )

    def _end(self) -> Result:
        finished = self.progress.step >= self.config.steps
        folder = self.run / "model" if finished else None
        if folder is not None:
            checkpoint.save(self.model, folder, self.data.tokenizer, overwrite=True)
            self._sample("after training")
            self.display.say(curve(read_metrics(self.run / METRICS), self.width))
        return Result(
            step=self.progress.step,
            finished=finished,
            model_folder=folder,
            validation_bits_per_byte=self.bits_per_byte,
            seconds=self.progress.seconds,
        )


def _make_model(config: TrainConfig, model: GriffinConfig, device: torch.device, init_from: str | None) -> Griffin:
    activations = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    if init_from is None:
        generator = torch.Generator(device).manual_seed(config.seed)
        return Griffin(
            model, device=device, activation_dtype=activations, generator=generator, recompute=config.recompute
        )
    loaded = checkpoint.load(init_from, device=device, dtype=torch.float32)
    if loaded.config != model:
        raise GriffinError(f"{init_from} is of another config than model=; leave model=None to take its own")
    loaded.activation_dtype, loaded.recompute = activations, config.recompute
    return loaded


def _check_data(config: TrainConfig, model: GriffinConfig, data: Data) -> None:
    if data.tokenizer.vocab_size > model.vocab_size:
        raise GriffinError(
            f"the tokenizer has {data.tokenizer.vocab_size} ids, the model only model.vocab_size={model.vocab_size}"
        )
    if (num_tokens := data.train.meta.num_tokens) <= config.row_tokens:
        raise GriffinError(
            f"{config.train_data}: {num_tokens} tokens to train on are less than one row and its next token "
            f"(row_tokens={config.row_tokens}); give more text, or set row_tokens lower"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GriffinError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
