"""What the documents say is so: their Python runs, and the files they name exist."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import griffin
from griffin import Griffin, Tokenizer

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/*.md") if path.name != "log.md")]
BLOCKS = [block for path in DOCUMENTS for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(
    block: str, make_model: Callable[..., Griffin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own, where the demo's model is a tiny one."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.bytes()
    griffin.save(make_model(vocab_size=tokenizer.vocab_size), Path("runs/shakespeare/model"), tokenizer)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_named_exist(document: Path) -> None:
    named = re.findall(r"\b(?:griffin|tests|recipes)/[\w/.-]+\.(?:py|cpp|h)\b", document.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_files_of_the_tree_exist() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree\n")[1].split("```")[1]
    there = {path.name for path in [ROOT / "setup.py", *ROOT.glob("griffin/**/*.py")]}
    assert set(re.findall(r"\b\w+\.py\b", tree)) - there == set()
