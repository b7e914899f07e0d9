"""The same weights three times: ours behind transformers, transformers' own model, and ours alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from griffin import Griffin
from griffin.integrations import transformers as integration
from griffin.integrations.transformers import GriffinForCausalLM
from griffin.integrations.transformers.config import architecture

WINDOW, V = 8, 67


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    integration.register()
    yield
    integration.unregister()


@dataclass
class Models:
    ours: GriffinForCausalLM
    stock: RecurrentGemmaForCausalLM  # its window counts the token itself: it has one more, and sees the same tokens
    griffin: Griffin  # the right values: of each row alone, in one call

    def alone(self, ids: Tensor) -> Tensor:
        """(1, T) -> (1, T, V)"""
        return self.griffin.logits(self.griffin(ids))

    def greedy(self, ids: Tensor, count: int) -> list[int]:
        """What follows (1, T) tokens, without any cache."""
        start = ids.shape[1]
        for _ in range(count):
            ids = torch.cat([ids, self.alone(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[0, start:].tolist()


def small_config(window: int = WINDOW, **changes: object) -> RecurrentGemmaConfig:
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 192, "lru_width": 32, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    special = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    return RecurrentGemmaConfig(**{**sizes, **heads, **special, "attention_window_size": window, **changes})


def make_models(**changes: object) -> Models:
    torch.manual_seed(7)
    config = small_config(**changes)
    ours = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.08 * torch.randn_like(parameter)
    stock = RecurrentGemmaForCausalLM(small_config(**{**changes, "window": config.sliding_window + 1}))
    stock.load_state_dict(ours.state_dict())
    griffin = Griffin(architecture(config)).eval()
    griffin.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if name != "lm_head.weight"})
    return Models(ours, stock.eval(), griffin)


@pytest.fixture
def models() -> Models:
    return make_models()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))
