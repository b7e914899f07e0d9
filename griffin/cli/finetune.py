"""`griffin finetune`: a model and examples to a model that does as they do."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from griffin.cli import streams
from griffin.cli.train import command_name
from griffin.errors import GriffinError, printable

if TYPE_CHECKING:
    from griffin.model import Griffin
    from griffin.state import State
    from griffin.tokenizer import Tokenizer
    from griffin.train.config import TrainConfig
    from griffin.train.loop import Result, Sampler

STEP_TOKENS = 4096  # read by a step, where a row is not longer than that
ROW_TOKENS = (128, 256, 512, 1024, 2048)  # the shortest that holds nearly all examples
SEVERAL_TIMES, MANY = 3, 10_000  # epochs, where there are fewer examples than that; more are read once
PROMPTS = 3  # of held-out examples, answered while training


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a Hugging Face id.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Examples: .jsonl, .parquet, a folder; or a text.")],
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run: data, checkpoints, results. [default: runs/NAME-tuned]")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", min=1, help="Train adapters of this rank, not the weights.")
    ] = None,
    state: Annotated[
        int | None, typer.Option(metavar="TOKENS", min=1, help="Train only the state that the model begins in.")
    ] = None,
    base: Annotated[
        Literal["fp32", "bf16", "int8", "int4"] | None,
        typer.Option(help="What the weights below are kept in. [default: as MODEL is, fp32 on a CPU]"),
    ] = None,
    prefer: Annotated[
        Literal["dpo", "ipo", "orpo"] | None, typer.Option(help="How pairs are learnt from. [default: dpo]")
    ] = None,
    loss: Annotated[Literal["answers", "last", "all"], typer.Option(help="What of a chat is learnt.")] = "answers",
    epochs: Annotated[float | None, typer.Option(help="Readings of each example. [default: 3, or 1 of many]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak. [default: chosen by the model's size]")] = None,
    validation: Annotated[Path | None, typer.Option(help="Examples to validate on. [default: 5% of DATA]")] = None,
    bad_rows: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do about examples that cannot be used.")
    ] = "stop",
    template: Annotated[Path | None, typer.Option(help="A chat template (Jinja) instead of the model's own.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Join prompts and completions without the chat template.")] = False,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Answer this while training; may be given many times.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the config; may be given many times."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
) -> None:
    """Teach a model by examples: chats, prompts with completions, preference pairs, or text.

    Each row of DATA is {"messages": [...]}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"} or {"text"}. The
    answers are learnt, and the best model at validation is what is written: RUN/model, with --lora also RUN/adapter in
    PEFT's form, with --state RUN/state.safetensors.

    Examples:

        griffin finetune runs/shakespeare/model chats.jsonl --lora 16

        griffin finetune google/recurrentgemma-2b-it chats/ --lora 16 --base int8

        griffin finetune my-model pairs.jsonl --lora 8 --run runs/preferred

        griffin finetune my-model chats.jsonl --state 16

        griffin finetune my-model chats.jsonl --set batch_rows=4 --set row_tokens=2048 --epochs 2
    """
    from griffin.train.config import override  # these import torch: after --help has been answered
    from griffin.train.display import going_on
    from griffin.train.loop import check_new
    from griffin.train.loop import train as run_training

    run = run or Path("runs") / f"{data.name.split('.')[0]}-tuned"
    check_new(run, resume)
    if template is not None and not template.is_file():
        raise GriffinError(f"--template {template}: no such file")
    with going_on(Console(highlight=False)) as console:
        fields: dict[str, Any] = {
            "learnt": loss,
            "validation_data": None if validation is None else str(validation),
            "bad_rows": bad_rows,
            "raw": raw,
            "chat_template": None if template is None else template.read_text(encoding="utf-8"),
        }
        config, chosen, asked = choose(
            model, data, run, console, fields, lora, state, base, prefer, epochs, learning_rate, settings or []
        )
        config = override(config, settings or [])
        console.print(printable(chosen), markup=False, soft_wrap=True)
        sampler = answering(prompts or asked)
        result = run_training(config, run, resume=resume, sampler=sampler, console=console)
        console.print(printable(what_next(model, config, result)), markup=False, soft_wrap=True)
    streams.let_go()
    if result.signal is not None and not result.finished:
        raise typer.Exit(128 + result.signal)


def choose(
    model: str,
    data: Path,
    run: Path,
    console: Console,
    fields: dict[str, Any],
    lora: int | None,
    state: int | None,
    base: str | None,
    prefer: str | None,
    epochs: float | None,
    learning_rate: float | None,
    settings: list[str],
) -> tuple[TrainConfig, str, list[str]]:
    """Choose what nobody said, by the model and the examples, which are prepared for that.

    Returns:
        The config; what was chosen, for a person; and prompts of held-out examples.

    Raises:
        GriffinError: the examples or the model cannot be used, or options do not fit.
    """
    import numpy as np

    from griffin import checkpoint
    from griffin.data.examples import find_kind
    from griffin.lora import LoRA
    from griffin.machine import find_device
    from griffin.train.config import TrainConfig, override
    from griffin.train.display import reporting
    from griffin.train.reading import read_data, rows_of, with_epochs
    from griffin.train.stop import only_process

    folder = checkpoint.resolve(model)
    parameters = checkpoint.read_config(folder).num_parameters()
    kind = find_kind(data)
    if prefer is not None and kind != "pairs":
        raise GriffinError(f"--prefer {prefer}: {data} has no pairs of chosen and rejected, but {kind}")
    device = find_device("auto")
    fraction = 1.0 if lora is None and state is None else 5.0  # of the rate: little is changed by few numbers
    rate = learning_rate or min(1e-3, 3e-4 * (1e8 / parameters) ** 0.5) * fraction * (0.1 if kind == "pairs" else 1.0)
    if state is not None and learning_rate is None:
        rate = 0.2  # of numbers near 1, not of weights
    config = TrainConfig(
        model=None,
        tokenizer=None,
        init_from=str(folder),
        train_data=str(data),
        objective={"text": "text", "chat": "chat", "pairs": prefer or "dpo"}[kind],  # type: ignore[arg-type]
        lora=None if lora is None else LoRA(rank=lora, alpha=2.0 * lora),
        state_tokens=state or 0,
        base=base or "fp32",  # type: ignore[arg-type]
        steps=1_000_000,
        learning_rate=float(f"{rate:.2g}"),
        min_learning_rate=0.1,
        schedule="wsd",
        weight_decay=0.0 if lora is not None or state is not None else 0.01,
        betas=(0.9, 0.99),
        recompute="all" if parameters > 5e8 else "none",
        dtype="bf16" if device != "cpu" else "fp32",
        device=device,
        keep_best=True,
        **fields,
    )
    config = override(config, settings)
    named = {setting.partition("=")[0].strip() for setting in settings}
    with only_process(run), reporting(console) as report:
        made, _ = read_data(config, run, folder, None, report)
    unit = 2 if kind == "pairs" else 1
    examples = made.train.meta.num_documents // unit
    if "row_tokens" not in named:
        longest = int(np.quantile(np.diff(made.train.starts), 0.98)) if kind != "text" else ROW_TOKENS[-2]
        most = max(ROW_TOKENS[0], made.train.meta.num_tokens // 4)  # of a few examples, more than a single row
        config = replace(config, row_tokens=next((T for T in ROW_TOKENS if min(longest, most) <= T), ROW_TOKENS[-1]))
    if "batch_rows" not in named:
        config = replace(config, batch_rows=max(1, STEP_TOKENS // config.row_tokens // (4 if state else unit)))
    rows, _ = rows_of(config, made.train)
    if "steps" not in named:
        times = epochs or (SEVERAL_TIMES if examples < MANY else 1)
        if "batch_rows" not in named:  # a few examples give more than a few steps
            config = replace(config, batch_rows=max(1, min(config.batch_rows, rows.count // 10)))
        config = with_epochs(config, rows, times)
    often = max(1, config.steps // 10)
    chosen = {
        "warmup_steps": min(100, config.steps // 10),
        "validate_every": often,
        "checkpoint_every": often,
        "log_every": max(1, min(10, config.steps // 20)),
        "validation_rows": 256,
    }
    config = replace(config, **{name: value for name, value in chosen.items() if name not in named})  # type: ignore[arg-type]
    what = "all weights" if not config.partial else f"LoRA of rank {lora}" if lora else f"a state of {state} tokens"
    text = (
        f"chosen for {parameters / 1e6:,.3g}M parameters and {examples:,} "
        f"{'documents' if kind == 'text' else 'pairs' if unit == 2 else 'examples'}: {what}, {config.steps} steps of "
        f"{config.batch_rows} x {config.row_tokens} tokens, a rate of {config.learning_rate:g}; change any of it with "
        "--set"
    )
    return config, text, _held_out_prompts(data if validation_of(fields) is None else validation_of(fields), kind)


def validation_of(fields: dict[str, Any]) -> Path | None:
    return None if fields["validation_data"] is None else Path(fields["validation_data"])


def _held_out_prompts(source: Path | None, kind: str) -> list[str]:
    """The first things that are said in examples, to be answered while training."""
    from griffin.data.chat import read_example
    from griffin.data.sources import read_rows, row_files

    if kind == "text" or source is None:
        return [""]
    found: list[str] = []
    for row in read_rows(row_files(source)):
        try:
            [first, *_] = read_example(row.content, kind, raw=False)  # type: ignore[arg-type]
        except GriffinError:
            continue  # said where the data is prepared
        said = [message["content"] for message in first if message["role"] == "user"] if isinstance(first, list) else []
        if said and said[0] not in found:
            found.append(said[0])
        if len(found) == PROMPTS:
            break
    return found


def answering(prompts: list[str]) -> Sampler:
    """A sampler that answers the same prompts each time, likeliest token by likeliest token."""

    def sample(model: Griffin, tokenizer: Tokenizer, _: str, state: State | None = None) -> str:
        from griffin.infer.generate import generate
        from griffin.lora import settled

        chat = tokenizer.chat_template is not None
        ids = [
            tokenizer.encode_chat([{"role": "user", "content": text}]) if chat and text else tokenizer.encode(text)
            for text in prompts
        ]
        with settled(model):
            done = generate(model, tokenizer, ids, state=state, max_tokens=60, temperature=0.0)
        pairs = zip(prompts, done, strict=True)
        return "\n".join(f"> {' '.join(prompt.split())[:300]}\n{each.text.strip()}" for prompt, each in pairs)

    return sample


def what_next(model: str, config: TrainConfig, result: Result) -> str:
    """How a run ended, and commands to copy that go on from there."""
    name = command_name()
    if not result.finished:
        again = [name, *(argument for argument in sys.argv[1:] if argument != "--resume"), "--resume"]
        return f"stopped at step {result.step} of {config.steps}; go on with\n  {shlex.join(again)}"
    measured = ", ".join(f"{value:.3f} {key.replace('_', ' ')}" for key, value in result.measured.items())
    lines = [f"tuned in {result.seconds / 60:.1f} minutes; validation: {measured}"]
    if result.adapter_folder is not None:
        lines.append(f"the adapter, in PEFT's form, is in {result.adapter_folder}")
    below, adapter, state = model, result.adapter_folder, result.state_file
    if result.model_folder is not None:
        lines.append(f"the model is in {result.model_folder}; next:")
        below, adapter = str(result.model_folder), None
    else:
        lines.append("next:")
    beside = [] if adapter is None else ["--adapter", str(adapter)]
    beside += [] if state is None else ["--state", str(state)]
    lines.append(f"  {shlex.join([name, 'chat', below, *beside])}")
    return "\n".join(lines)
