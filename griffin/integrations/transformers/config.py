"""transformers' config of a model folder, and ours: the same config.json."""

from __future__ import annotations

from transformers import PreTrainedConfig

from griffin.checkpoint.config_json import OWN_MODEL_TYPE, config_from_json
from griffin.config import GriffinConfig
from griffin.quantize import Quantization, read_quantization


class OwnConfig(PreTrainedConfig):
    """The config of `griffin` folders: architectures and weights that transformers' RecurrentGemma cannot express.

    Its attributes are the keys of config.json; `griffin.checkpoint.config_json` says which there are.
    """

    model_type = OWN_MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)
    use_cache: bool = True
    tie_word_embeddings: bool = True


def architecture(config: PreTrainedConfig) -> GriffinConfig:
    """Read the architecture from a RecurrentGemmaConfig or an OwnConfig.

    `attention_window_size` W is Google's: a query sees W earlier tokens and itself. transformers' own model, given the
    same config, sees W - 1 and itself.

    Raises:
        GriffinError: a key is missing, unknown or contradicts another.
    """
    return config_from_json(config.to_dict(), _name(config))


def quantization(config: PreTrainedConfig) -> Quantization | None:
    """Read how the folder's weights are quantised; None for floating point."""
    return read_quantization(config.to_dict(), _name(config))


def _name(config: PreTrainedConfig) -> str:
    return f"the config of {config.name_or_path}" if config.name_or_path else type(config).__name__
