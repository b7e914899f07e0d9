"""docs/way.md says how a token and a batch travel: every arrow between two files is an import there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from griffin.ops import device

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/way.md").read_text()
FILES = sorted(set(re.findall(r"`(griffin/[\w/.]+)`", TEXT)))
ARROWS = sorted(set(re.findall(r"`(griffin/[\w/]+\.py)` -> `(griffin/[\w/]+\.py)`", TEXT)))


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its head or inside a function, and the files that they lie in."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {f"{name.replace('.', '/')}.py" for name in found}
    for name in found:  # a package gives what its files have
        package = ROOT / name.replace(".", "/") / "__init__.py"
        if package.exists() and package.parent.name != "griffin":
            files |= imports(package)
    return files


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_there(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize(("first", "second"), ARROWS)
def test_every_arrow_is_an_import(first: str, second: str) -> None:
    if first == "griffin/ops/device.py":  # kernels are imported when they are asked for, by the names of its table
        named = {kernels.file for op in device.OPS.values() for kernels in (op.cpu, op.cuda) if kernels is not None}
        assert second in {f"griffin/ops/{file.replace('.', '/')}.py" for file in named}
    else:
        assert second in imports(ROOT / first)


def test_there_are_arrows_to_follow() -> None:
    assert len(ARROWS) > 20
