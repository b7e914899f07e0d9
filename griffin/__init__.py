"""Griffin, Hawk and RecurrentGemma language models, whose memory does not grow."""

from griffin.checkpoint import load, load_tokenizer, save
from griffin.config import PRESETS, GriffinConfig
from griffin.errors import GriffinError
from griffin.model import Griffin
from griffin.state import State
from griffin.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Griffin",
    "GriffinConfig",
    "GriffinError",
    "State",
    "Tokenizer",
    "load",
    "load_tokenizer",
    "save",
]
