"""griffin info: what a model is, what it takes, and what computes it here."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer

from griffin.cli import options
from griffin.errors import printable


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a Hugging Face id or a preset.")],
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show a model's sizes, the memory of one sequence, and which kernel serves which op here and why.

    No weights are loaded; a preset needs none.

    Examples:

        griffin info griffin-1.3b

        griffin info my-model --device cuda --json
    """
    import torch  # after --help has been answered

    from griffin.checkpoint.describe import describe
    from griffin.machine import find_device
    from griffin.ops.device import serving

    place = find_device(device)
    found = describe(model, None if dtype is None else getattr(torch, dtype.value))
    kernels, config = serving(place), found.config
    kind = str(found.dtype).removeprefix("torch.")
    if as_json:
        content = {**asdict(found), "dtype": kind, "device": place, "kernels": [asdict(row) for row in kernels]}
        typer.echo(json.dumps(content, indent=2))
        return
    layers = ", ".join(f"{count} {name}" for name, count in _counts(config.block_types).items())
    rest = found.num_parameters - found.num_embedding_parameters
    memory = f"{_size(found.state_bytes)}, however long the text"
    if found.state_bytes_per_token:
        memory = f"{_size(found.state_bytes)} and {found.state_bytes_per_token:,} bytes per token: global attention"
    rows = {
        "model": found.name,
        "parameters": f"{found.num_parameters:,} ({found.num_embedding_parameters:,} embedding, {rest:,} other)",
        "layers": f"{config.num_layers}: {layers}",
        "width": f"{config.width}, recurrence {config.lru_width}, MLP {config.mlp_width}",
        "heads": f"{config.num_heads} of {config.head_width}, {config.num_kv_heads} for keys and values",
        "window": "global" if config.window is None else f"{config.window:,} earlier tokens",
        "dtype": f"{kind}, {_size(found.weight_bytes)} of weights",
        "state": f"{memory} (per sequence)",
        "tokenizer": found.tokenizer,
        "device": place,
    }
    for name, value in rows.items():
        typer.echo(printable(f"{name:12}{value}"))
    typer.echo("\nKernels")
    widths = [max(len(getattr(row, column)) for row in kernels) + 2 for column in ("op", "kernel")]
    for row in kernels:
        typer.echo(f"  {row.op:{widths[0]}}{row.kernel:{widths[1]}}{row.reason}")


def _counts(kinds: tuple[str, ...]) -> dict[str, int]:
    return {kind: len(list(group)) for kind, group in groupby(sorted(kinds, reverse=True))}


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
