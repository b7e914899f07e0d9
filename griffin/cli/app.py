"""The commands, and the options before them."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

import griffin

# A command's file is imported when the command is used, and what it needs of torch, which takes seconds, when it runs:
# --help and wrong options should not wait for that.
COMMANDS = {
    "train": ("griffin.cli.train:train", "Train a model on text."),
    "finetune": ("griffin.cli.finetune:finetune", "Teach a model by chats, completions or preference pairs."),
    "generate": ("griffin.cli.generate:generate", "Continue prompts."),
    "chat": ("griffin.cli.chat:chat", "Talk to a model in the terminal."),
    "serve": ("griffin.cli.serve:serve", "Serve a model: OpenAI's API and a chat page."),
    "info": ("griffin.cli.info:info", "Show a model's sizes, its memory and its kernels."),
    "convert": ("griffin.cli.convert:convert", "Turn Google's checkpoints into a model folder."),
    "quantize": ("griffin.cli.quantize:quantize", "Write a model in 8 or 4 bits per weight."),
    "merge": ("griffin.cli.merge:merge", "Add a LoRA adapter to a model's weights."),
    "eval": ("griffin.cli.eval:evaluate", "Measure a model on texts, questions and benchmarks."),
    "experiment": ("griffin.cli.experiment:experiment", "Measure the papers' claims again."),
    "tokenizer": ("griffin.cli.tokenizer:app", "Make tokenizers."),
    "data": ("griffin.cli.data:app", "Prepare data."),
    "plot": ("griffin.cli.plot:plot", "Draw the curves of runs."),
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


def invoke(arguments: list[str], settings: dict[str, bool]) -> int:
    """Run a command line and return its exit status; errors pass as they are.

    Not by the library's own `main`, which turns the end of an input, an interrupt and a closed pipe into other things.

    Args:
        arguments: after the program's name.
        settings: gets what stands before the command: "traceback".
    """
    try:
        with get_command(app).make_context("griffin", arguments, obj=settings) as context:
            result = context.command.invoke(context)
        return result if isinstance(result, int) else 0
    except typer.Exit as end:
        return end.exit_code
