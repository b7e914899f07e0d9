"""`griffin train`: a recipe, or just a text."""

from __future__ import annotations

import runpy
import shlex
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from griffin.cli import streams
from griffin.config import PRESETS, GriffinConfig, griffin_pattern
from griffin.errors import GriffinError, printable

if TYPE_CHECKING:
    from griffin.model import Griffin
    from griffin.tokenizer import Tokenizer
    from griffin.train.config import TrainConfig
    from griffin.train.loop import Result

# From how many bytes of text a choice holds: (bytes, tokens of the BPE, width, layers, steps). Chosen for a few minutes
# on two cores; the last one is the recipe for Shakespeare, the others learn a smaller text by heart later than that.
_CHOICES = ((0, 512, 192, 3, 600), (200_000, 1024, 192, 3, 1000), (2_000_000, 2048, 256, 3, 1200))


def train(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE_OR_TEXT", help="A recipe (.py with config()), or a text file or a folder of them."
        ),
    ],
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run: checkpoints, metrics, the model. [default: runs/NAME]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the config; may be given many times."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="For a text: an architecture by name instead of one chosen by its size.")
    ] = None,
) -> None:
    """Train a model on a text, or as a recipe says.

    Ctrl-C ends after the current step with a checkpoint, and status 130; a run that was stopped or killed goes on with
    --resume as if it had not been.

    Examples:

        griffin train my.txt

        griffin train books/ --run runs/books --set steps=5000 --set model.width=384

        griffin train recipes/shakespeare.py --run runs/shakespeare --resume

        griffin train books/ --set device=cuda --set dtype=bf16 --set compile=true --set recompute=cheap
    """
    from griffin.train.config import override  # these import torch: after --help has been answered
    from griffin.train.display import going_on
    from griffin.train.loop import train as run_training

    run = run or Path("runs") / what.name.split(".")[0]
    with going_on(Console(highlight=False)) as console:
        if what.suffix == ".py":
            if preset is not None:
                raise GriffinError(
                    f"--preset {preset}: a recipe names its own model; use --set model.width=... instead"
                )
            config = load_recipe(what)
        else:
            config, chosen = for_text(what, preset)
            console.print(printable(chosen), markup=False, soft_wrap=True)
        config = override(config, settings or [])
        result = run_training(config, run, resume=resume, sampler=sample, console=console)
        console.print(printable(what_next(config, result)), markup=False, soft_wrap=True)
    streams.let_go()  # a log that found no room does not make the training a failed one
    if result.signal is not None and not result.finished:
        raise typer.Exit(128 + result.signal)  # what a shell gives a program that the signal ended


def what_next(config: TrainConfig, result: Result) -> str:
    """How a run ended, and commands to copy that go on from there."""
    name = command_name()
    if result.model_folder is None:
        again = [name, *(argument for argument in sys.argv[1:] if argument != "--resume"), "--resume"]
        return f"stopped at step {result.step} of {config.steps}; go on with\n  {shlex.join(again)}"
    prompt = shlex.quote(config.sample_prompt.strip() or "Once")
    measured = result.validation_bits_per_byte
    quality = "" if measured is None else f", {measured:.3f} bits per byte of text it has not seen"
    folder = shlex.quote(str(result.model_folder))
    return (
        f"trained in {result.seconds / 60:.1f} minutes{quality}\n"
        f"the model is in {result.model_folder}; next:\n"
        f"  {name} generate {folder} {prompt}\n"
        f"  {name} chat {folder}\n"
        f"  {name} train your-own.txt\n"
        f"  {name} serve {folder}"
    )


def command_name() -> str:
    """How to call this command again from here: `griffin`, or its path where the shell does not find that."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "griffin" and shutil.which("griffin") is None else "griffin"


def sample(model: Griffin, tokenizer: Tokenizer, prompt: str) -> str:
    """Continue a prompt by 200 tokens, the same way each time.

    An empty prompt is BOS; where a vocabulary has none, as GPT-2's, the end of a text, behind which another begins.

    Raises:
        GriffinError: it has neither.
    """
    from griffin.infer.generate import generate

    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]
    if not ids:
        raise GriffinError(
            f"sample_prompt={prompt!r} has no tokens, and the vocabulary neither BOS nor EOS; set it to a text"
        )
    [completion] = generate(model, tokenizer, [ids], max_tokens=200, temperature=0.8, seed=0)
    return prompt + completion.text


def load_recipe(path: Path) -> TrainConfig:
    """Run a recipe file and call its config().

    Raises:
        GriffinError: there is no such file, it fails (with its line), or config() gives something else.
    """
    if not path.is_file():
        raise GriffinError(f"{path}: no such recipe")
    from griffin.train.config import TrainConfig

    try:
        names = runpy.run_path(str(path))
        if not callable(names.get("config")):
            raise GriffinError(f"{path} has no function config() that gives a TrainConfig")
        config = names["config"]()
    except GriffinError:
        raise
    except SyntaxError as error:
        raise GriffinError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # of a program that is the user's own
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {frames[-1].lineno}" if frames else ""
        raise GriffinError(f"{path}{line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise GriffinError(f"{path}: config() gives a {type(config).__name__}; it must give a TrainConfig")
    return config


def for_text(path: Path, preset: str | None) -> tuple[TrainConfig, str]:
    """Choose a model, a vocabulary and a number of steps for a text; say what was chosen.

    Raises:
        GriffinError: there is no text at `path`, or no preset of that name.
    """
    from griffin.data.text import text_files
    from griffin.train.config import TrainConfig

    files = text_files(path)
    # An .xz file holds about three times its size.
    size = sum(file.stat().st_size * (3 if file.suffix == ".xz" else 1) for file in files)
    _, vocab_size, width, num_layers, steps = max(choice for choice in _CHOICES if choice[0] <= size)
    if preset is None:
        model = small_griffin(vocab_size, width, num_layers)
    elif preset in PRESETS:
        model = replace(PRESETS[preset], vocab_size=vocab_size)
    else:
        raise GriffinError(f"--preset {preset}: there are {', '.join(sorted(PRESETS))}")
    config = TrainConfig(
        model=model,
        train_data=str(path),
        tokenizer=f"bpe:{vocab_size}",
        batch_rows=8,
        row_tokens=max(16, min(128, size // 16)),  # a text must fill one row, and some more of it be validated on
        steps=steps,
        learning_rate=4e-3,
        sample_prompt="The",
    )
    return config, (
        f"chosen for about {size / 1e6:.2g} MB of text: {preset or 'a Griffin'} of {model.num_layers} layers, "
        f"{model.width} wide, a BPE of {vocab_size} tokens, {steps} steps of {config.batch_rows} x {config.row_tokens} "
        "tokens; change any of it with --set"
    )


def small_griffin(vocab_size: int, width: int, num_layers: int) -> GriffinConfig:
    """A Griffin in RecurrentGemma's manner, which transformers opens too."""
    return GriffinConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=3 * width,
        lru_width=width,
        num_heads=width // 64,
        num_gate_blocks=width // 64,
        block_types=griffin_pattern(num_layers),
        window=128,
    )
