"""transformers' config of a model folder, and ours: the same config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import transformers
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
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})  # as below
    use_cache: bool = True
    tie_word_embeddings: bool = True

    @property
    def final_logit_softcapping(self) -> float | None:
        return self.logits_soft_cap


class RecurrentGemmaConfig(transformers.RecurrentGemmaConfig):
    """transformers' config of `recurrent_gemma` folders, which names GriffinForCausalLM as what it is of.

    TRL and others make a model by the name that they find in `architectures`, among transformers' own classes, before
    they ask AutoModelForCausalLM. (The class has the name that transformers' tables look for.)
    """

    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType(
        {}
    )  # TRL asks every config that names no class of transformers

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.architectures = ["GriffinForCausalLM"]

    @property
    def final_logit_softcapping(self) -> float:
        """The cap by Gemma 2's name, for trainers that apply the head themselves: they would leave it out."""
        return self.logits_soft_cap


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
