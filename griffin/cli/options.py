"""What `generate` and `chat` have in common: their options, and opening a model."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from griffin.cli.waiting import Waiting
from griffin.infer.request import Sampling
from griffin.memory import keep_freed_memory

if TYPE_CHECKING:
    from griffin.model import Griffin
    from griffin.state import State
    from griffin.tokenizer import Tokenizer


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, or a Hugging Face id: google/recurrentgemma-2b-it.")
]
MaxTokens = Annotated[int, typer.Option(help="The most tokens to generate.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string. May be given several times.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of weights and activations. Default: as they are stored.")]
Adapter = Annotated[
    str | None, typer.Option(help="A folder with a LoRA adapter for MODEL: griffin finetune's, or PEFT's.")
]
Start = Annotated[str | None, typer.Option("--state", help="Begin in this state: griffin finetune --state wrote it.")]
Chunk = Annotated[int, typer.Option(help="Tokens of a prompt read at once: more is faster and takes more memory.")]


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `Sampling`, where its signature has `sampling`, and one of these."""
    signature = inspect.signature(command, eval_str=True)
    types = get_type_hints(Sampling)
    offered = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=Annotated[types[each.name], typer.Option(help=each.metadata["help"])],
        )
        for each in fields(Sampling)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += offered if parameter.name == "sampling" else [own]

    def run(**values: Any) -> None:
        sampling = Sampling(**{each.name: values.pop(each.name) for each in offered})
        command(**values, sampling=sampling)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def show(text: str) -> None:
    """Print generated text at once. A terminal gets no control characters but line breaks and tabs."""
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    typer.echo(text, nl=False)
    sys.stdout.flush()


def open_start(path: str | None, model: Griffin, tokenizer: Tokenizer) -> tuple[State | None, Tokenizer]:
    """Load the state to begin in; a tokenizer without a chat template gets the one that the state was trained with."""
    if path is None:
        return None, tokenizer
    from griffin.state_file import CHAT_TEMPLATE, load_both

    state, metadata = load_both(path, model)
    if tokenizer.chat_template is None and CHAT_TEMPLATE in metadata:
        tokenizer = tokenizer.with_chat_template(metadata[CHAT_TEMPLATE])
    return state, tokenizer


def open_model(name: str, device: str, dtype: Dtype | None, adapter: str | None = None) -> tuple[Griffin, Tokenizer]:
    """Load a model and its tokenizer; of an adapter the tokenizer that was written with it.

    Raises:
        GriffinError: the device is not there, or the folder cannot be loaded.
    """
    waiting = Waiting(f"Loading {name}")
    try:
        import torch

        from griffin import checkpoint
        from griffin.machine import find_device

        place = find_device(device)
        own = adapter is not None and (Path(adapter) / "tokenizer.json").is_file()
        tokenizer = checkpoint.load_tokenizer(adapter if own and adapter else name)
        kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype.value)
        model = checkpoint.load(name, device=place, dtype=kind, adapter=adapter, progress=waiting.progress)
        if model.device.type == "cpu":
            keep_freed_memory()  # after loading, whose buffers are not needed again
        return model, tokenizer
    finally:
        waiting.stop()
