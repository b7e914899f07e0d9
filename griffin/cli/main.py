"""The `griffin` command: finds the command asked for, and says in one line what went wrong."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

import griffin

# A command's file is imported when the command is used: most import torch, which takes seconds, and --help should not.
COMMANDS = {
    "train": ("griffin.cli.train:train", "Train or fine-tune a model."),
    "generate": ("griffin.cli.generate:generate", "Continue prompts."),
    "chat": ("griffin.cli.chat:chat", "Talk to a model in the terminal."),
    "info": ("griffin.cli.info:info", "Show a model's sizes, its memory and its kernels."),
    "convert": ("griffin.cli.convert:convert", "Turn Google's checkpoints into a model folder."),
    "quantize": ("griffin.cli.quantize:quantize", "Write a model in 8 or 4 bits per weight."),
    "tokenizer": ("griffin.cli.tokenizer:app", "Make tokenizers."),
}


class Commands(TyperGroup):
    """The table above as a command group."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast(Any, dict.fromkeys(COMMANDS))  # their names: a misspelt one brings a suggestion

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        target = getattr(import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command(cmd_name)(function)
        target.rich_markup_mode = None
        command = get_command(target)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"griffin-lm {griffin.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from (before the command).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Griffin, Hawk and RecurrentGemma language models, whose memory does not grow.

    griffin COMMAND --help explains a command, with examples.
    """
    context.obj["traceback"] = show_traceback


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 an error in one line on stderr, 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    settings: dict[str, bool] = {}
    try:
        result = get_command(app).main(arguments, prog_name="griffin", standalone_mode=False, obj=settings)
        sys.stdout.flush()
        if result == 130:  # Ctrl-C, as the library reports it
            return _interrupted()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:  # the reader, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if settings.get("traceback"):
            traceback.print_exc()
            return 2
        if not (isinstance(error, (ValueError, OSError, ImportError)) or hasattr(error, "format_message")):
            raise  # a mistake of ours: its traceback is what we need
        if type(error).__name__ == "NoArgsIsHelpError":
            print(str(error), end="\n" if str(error) else "", file=sys.stderr)  # noqa: T201
            return 2
        print(f"griffin: error: {one_line(error)}", file=sys.stderr)  # noqa: T201
        return 2


def one_line(error: Exception) -> str:
    """What went wrong, without line breaks."""
    if hasattr(error, "format_message"):  # a wrong use of the command line
        return " ".join(error.format_message().split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _interrupted() -> int:
    print("griffin: interrupted", file=sys.stderr)  # noqa: T201
    return 130
