"""Griffin, Hawk and RecurrentGemma language models, whose memory does not grow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from griffin.checkpoint import load, load_tokenizer, save
    from griffin.config import PRESETS, GriffinConfig
    from griffin.errors import GriffinError
    from griffin.infer.conversation import Conversation
    from griffin.infer.engine import Engine
    from griffin.infer.generate import generate
    from griffin.infer.request import Request, Sampling
    from griffin.model import Griffin
    from griffin.state import State
    from griffin.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Conversation",
    "Engine",
    "Griffin",
    "GriffinConfig",
    "GriffinError",
    "Request",
    "Sampling",
    "State",
    "Tokenizer",
    "generate",
    "load",
    "load_tokenizer",
    "save",
]

# Imported on first use, so that `griffin --help` and error messages need not wait seconds for torch, and that a Ctrl-C
# in the first moments finds the command line already there.
_HOMES = {
    "PRESETS": "griffin.config",
    "Conversation": "griffin.infer.conversation",
    "Engine": "griffin.infer.engine",
    "Griffin": "griffin.model",
    "GriffinConfig": "griffin.config",
    "GriffinError": "griffin.errors",
    "Request": "griffin.infer.request",
    "Sampling": "griffin.infer.request",
    "State": "griffin.state",
    "Tokenizer": "griffin.tokenizer",
    "generate": "griffin.infer.generate",
    "load": "griffin.checkpoint",
    "load_tokenizer": "griffin.checkpoint",
    "save": "griffin.checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
