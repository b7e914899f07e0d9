"""Our model behind transformers' AutoModelForCausalLM: one line, undone by another.

    from griffin.integrations import transformers as griffin_transformers

    griffin_transformers.register()
    model = AutoModelForCausalLM.from_pretrained("google/recurrentgemma-2b-it")

Nothing of transformers is patched: its own tables of classes get entries, which `unregister` takes out again.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from griffin.checkpoint.config_json import HF_MODEL_TYPE, OWN_MODEL_TYPE
from griffin.integrations.transformers.cache import GriffinCache
from griffin.integrations.transformers.config import OwnConfig, RecurrentGemmaConfig
from griffin.integrations.transformers.model import GriffinForCausalLM

__all__ = ["GriffinCache", "GriffinForCausalLM", "OwnConfig", "register", "unregister"]

_CONFIGS = {HF_MODEL_TYPE: RecurrentGemmaConfig, OWN_MODEL_TYPE: OwnConfig}
_ALL_CONFIGS = (*_CONFIGS.values(), transformers.RecurrentGemmaConfig)  # the last as a program makes it


def register() -> None:
    """Let AutoModelForCausalLM give GriffinForCausalLM for `recurrent_gemma` and `griffin` folders and configs.

    Calling it again changes nothing. Models that were made before stay what they are.
    """
    for model_type, config in _CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)
    for config in _ALL_CONFIGS:
        # (The mapping itself: AutoModelForCausalLM.register wants one class of configs to a class of models.)
        MODEL_FOR_CAUSAL_LM_MAPPING.register(config, GriffinForCausalLM, exist_ok=True)


def unregister() -> None:
    """Take out what `register` put in: transformers gives its own RecurrentGemmaForCausalLM again."""
    for model_type in _CONFIGS:
        CONFIG_MAPPING._extra_content.pop(model_type, None)
    for config in _ALL_CONFIGS:
        MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(config, None)
