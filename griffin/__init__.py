"""Griffin, Hawk and RecurrentGemma language models, whose memory does not grow."""

from griffin.config import PRESETS, GriffinConfig
from griffin.errors import GriffinError
from griffin.model import Griffin
from griffin.state import State

__version__ = "0.1.0"
__all__ = ["PRESETS", "Griffin", "GriffinConfig", "GriffinError", "State"]
