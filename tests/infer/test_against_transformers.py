"""Greedy decoding against Hugging Face's implementation, with our weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from griffin import Griffin, Tokenizer
from griffin.infer.generate import generate

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
def test_greedy_equals_transformers_past_the_window(make_lively: Callable[..., Griffin]) -> None:
    # lru_width = width: Hugging Face's model has one gate block per head and reads no other block count.
    model = make_lively(lru_width=32)
    config = model.config
    theirs = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=2 * config.mlp_width,
            lru_width=config.lru_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_width,
            attention_window_size=(config.window or 0) + 1,  # theirs counts the token itself
            block_types=list(config.block_types),
            pad_token_id=258,
            eos_token_id=257,
            bos_token_id=256,
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    assert not unexpected
    assert set(missing) <= {"lm_head.weight", "model.normalizer"}
    tokenizer = Tokenizer.bytes()
    for prompt in ("Once", "The sea was calm, and the sky was clearing; so we sailed."):
        ids = tokenizer.encode(prompt)
        # The penalty keeps an untrained model from repeating itself, and is compared with theirs on the way.
        ours = generate(model, tokenizer, [ids], temperature=0, repetition_penalty=1.3, max_tokens=40, ignore_eos=True)[
            0
        ]
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([ids]),
                do_sample=False,
                repetition_penalty=1.3,
                max_new_tokens=40,
                min_new_tokens=40,
                eos_token_id=None,
            )
        assert len(set(ours.tokens[20:])) > 5
        assert ours.tokens == tuple(out[0, len(ids) :].tolist())
