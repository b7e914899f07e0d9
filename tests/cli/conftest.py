from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import griffin
from griffin import Griffin, Tokenizer
from griffin.tokenizer.chat_template import GEMMA


@pytest.fixture
def chat_folder(make_model: Callable[..., Griffin], tmp_path: Path) -> Path:
    """A model folder with a chat template."""
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 3], 270, chat_template=GEMMA)
    griffin.save(make_model(vocab_size=tokenizer.vocab_size), tmp_path / "chat", tokenizer)
    return tmp_path / "chat"


@pytest.fixture
def plain_folder(make_model: Callable[..., Griffin], tmp_path: Path) -> Path:
    """A model folder without one."""
    griffin.save(make_model(), tmp_path / "plain", Tokenizer.bytes())
    return tmp_path / "plain"
