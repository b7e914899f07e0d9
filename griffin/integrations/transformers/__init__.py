"""Our model behind transformers' AutoModelForCausalLM: one line, undone by another.

    from griffin.integrations import transformers as griffin_transformers

    griffin_transformers.register()
    model = AutoModelForCausalLM.from_pretrained("google/recurrentgemma-2b-it")

Nothing of transformers is patched: its own tables of classes get two entries, which `unregister` takes out again.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, RecurrentGemmaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from griffin.checkpoint.config_json import OWN_MODEL_TYPE
from griffin.integrations.transformers.cache import GriffinCache
from griffin.integrations.transformers.config import OwnConfig
from griffin.integrations.transformers.model import GriffinForCausalLM

__all__ = ["GriffinCache", "GriffinForCausalLM", "OwnConfig", "register", "unregister"]


def register() -> None:
    """Let AutoModelForCausalLM give GriffinForCausalLM for `recurrent_gemma` and `griffin` folders and configs.

    AutoConfig learns the type `griffin`; for `recurrent_gemma` transformers' own RecurrentGemmaConfig stays. Calling it
    again changes nothing. Models that were made before stay what they are.
    """
    AutoConfig.register(OWN_MODEL_TYPE, OwnConfig, exist_ok=True)
    for config in (RecurrentGemmaConfig, OwnConfig):
        # (The mapping itself: AutoModelForCausalLM.register wants one class of configs to a class of models.)
        MODEL_FOR_CAUSAL_LM_MAPPING.register(config, GriffinForCausalLM, exist_ok=True)


def unregister() -> None:
    """Take out what `register` put in: transformers gives its own RecurrentGemmaForCausalLM again."""
    CONFIG_MAPPING._extra_content.pop(OWN_MODEL_TYPE, None)
    for config in (RecurrentGemmaConfig, OwnConfig):
        AutoModelForCausalLM._model_mapping._extra_content.pop(config, None)
