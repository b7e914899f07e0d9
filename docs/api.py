"""What `make docs` adds: the reference, from docstrings; and links that leave docs/ become the paths they name."""

from __future__ import annotations

import inspect
import re
import textwrap
from importlib import import_module
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# The public names, then what stands beside them for those who go further.
PARTS = {
    "griffin": None,
    "griffin.infer.step": ["DecodeStep"],
    "griffin.infer.request": ["Sampling", "Request", "Piece", "Completion"],
    "griffin.loss": ["cross_entropy", "bits_per_byte"],
    "griffin.quantize": ["quantize", "Quantization"],
    "griffin.state_file": ["save", "load"],
    "griffin.train.config": ["TrainConfig"],
    "griffin.ops": ["linear_scan", "rg_lru", "causal_conv1d", "local_attention", "rms_norm", "geglu", "rope", "linear"],
    "griffin.integrations.transformers": ["register", "unregister", "GriffinForCausalLM", "GriffinCache"],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "api.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)


def reference() -> str:
    """The page, as Markdown."""
    shapes = "Shapes are written (B, T, D): batch, time, width; [names](names.md) has all axes."
    parts = [f"# Reference\n\nFrom the docstrings. {shapes}\n"]
    for module_name, names in PARTS.items():
        try:
            module = import_module(module_name)
        except ImportError as error:
            parts.append(f"## {module_name}\n\nNot described here: {error}.\n")
            continue
        parts.append(f"## {module_name}\n\n{_text(inspect.getdoc(module) or '')}\n")
        for name in names or sorted(module.__all__):
            parts.append(_entry(f"{module_name}.{name}", getattr(module, name), 3))
    return "\n".join(parts)


def _entry(path: str, thing: Any, level: int) -> str:
    name = path.rsplit(".", 1)[-1]
    head = f"{'#' * level} {path if level == 3 else name}\n"
    if not callable(thing):
        keys = ", ".join(f"`{key}`" for key in thing) if hasattr(thing, "keys") else ""
        return f"{head}\nA {type(thing).__name__}. {keys}\n"
    text = [head, f"```python\n{name}{_signature(thing)}\n```\n", _text(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            value = getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(value) and inspect.getdoc(value):
                text.append(_entry(f"{path}.{member}", value, 4))
    return "\n".join(text) + "\n"


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing)).replace("'", "")
    except ValueError:
        return "(...)"
    if len(text) <= 100:
        return text
    return re.sub(r", (?=\w+[:=]|\*)", ",\n    ", text).replace("(", "(\n    ", 1)


def _text(docstring: str) -> str:
    """Google-style sections as Markdown: a bold heading, and a list where there are names."""
    lines: list[str] = []
    for block in re.split(r"\n(?=(?:Args|Returns|Raises|Attributes|Source|Yields):)", docstring):
        found = re.match(r"(Args|Returns|Raises|Attributes|Yields):\n(.*)", block, re.S)
        if found is None:
            lines.append(block)
            continue
        title, body = found[1], textwrap.dedent(found[2])
        body, rest = [*body.split("\n\n", 1), ""][:2] if title != "Attributes" else (body, "")
        items = [re.sub(r"^([\w, .]+):", r"`\1`:", item) for item in re.split(r"\n(?=\S)", body) if item.strip()]
        entries = "\n".join("- " + " ".join(item.split()) for item in items)
        lines.append(f"**{title}**\n\n{entries}\n\n{textwrap.dedent(rest)}")
    return "\n\n".join(lines) + "\n"
