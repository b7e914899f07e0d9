"""Our model against `transformers`' RecurrentGemmaForCausalLM, which no one here wrote.

Its window counts the token itself, so it is given W + 1 and both see W + 1 keys. It gives the padding token (id 0) no
gradient through the input embedding, which no paper asks for; tokens here start at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import griffin
from griffin import Griffin, GriffinConfig
from griffin.config import griffin_pattern

# (width, lru_width, heads, kv heads, layers, window, T)
SHAPES = [
    (32, 32, 4, 1, 3, 8, 40),  # five windows
    (32, 48, 4, 1, 5, 16, 70),  # lru_width differs; T past one chunk of the recurrence
    (64, 64, 2, 2, 4, 5, 33),  # one key head per query head
    (48, 96, 6, 3, 8, 32, 20),  # grouped heads; T inside the window
    (32, 32, 2, 1, 26, 32, 130),  # as deep as the 2B model
    (256, 256, 1, 1, 3, 300, 290),  # head width 256; more queries than one slab
]


def twins(shape: tuple[int, ...]) -> tuple[Griffin, RecurrentGemmaForCausalLM]:
    width, lru_width, heads, kv_heads, layers, window, _ = shape
    config = GriffinConfig(
        vocab_size=67,
        width=width,
        mlp_width=3 * width,
        lru_width=lru_width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_gate_blocks=heads,
        block_types=griffin_pattern(layers),
        window=window,
    )
    ours = Griffin(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    theirs = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=67,
            hidden_size=width,
            intermediate_size=6 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            lru_width=lru_width,
            attention_window_size=window + 1,
        )
    )
    unmatched = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert unmatched.unexpected_keys == []
    assert unmatched.missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_equal(shape: tuple[int, ...]) -> None:
    ours, theirs = twins(shape)
    ids = torch.randint(1, 67, (1 if shape[-1] > 200 else 2, shape[-1]))  # its backward is quadratic in T
    found, expected = ours.logits(ours(ids)), theirs(ids, use_cache=False).logits
    assert_close(found, expected, rtol=0, atol=2e-5)
    cotangent = torch.randn_like(found)
    (found * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad, reference = parameter.grad, wanted[name].grad
        assert grad is not None
        assert reference is not None
        assert (grad - reference).abs().max() <= 2e-5 * reference.abs().max().clamp(min=1), name


@torch.no_grad()
def test_decoding_with_state_equals_its_decoding_with_cache() -> None:
    """One sequence, no padding: the one case its caches are right in. Far past the window."""
    ours, theirs = twins(SHAPES[1])
    ids = torch.randint(1, 67, (1, 60))
    state, past = ours.new_state(1), DynamicCache(config=theirs.config)
    found, expected = [], []
    for start, stop in [(0, 9), *((t, t + 1) for t in range(9, 60))]:
        found.append(ours.logits(ours(ids[:, start:stop], state)))
        position_ids = torch.arange(start, stop)[None]
        out = theirs(ids[:, start:stop], position_ids=position_ids, past_key_values=past, use_cache=True)
        expected.append(out.logits)
    assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside transformers
@torch.no_grad()
def test_our_folders_open_in_transformers_and_its_folders_open_here(
    tmp_path: Path, make_model: Callable[..., Griffin]
) -> None:
    ours = make_model()
    griffin.save(ours, tmp_path / "ours", griffin.Tokenizer.bytes())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs, RecurrentGemmaForCausalLM)
    theirs.config.attention_window_size += 1
    ids = torch.randint(1, 250, (2, 50))
    expected = ours.logits(ours(ids))
    assert_close(theirs(ids, use_cache=False).logits, expected, rtol=0, atol=2e-5)
    theirs.config.attention_window_size -= 1
    theirs.save_pretrained(tmp_path / "theirs")
    back = griffin.load(tmp_path / "theirs")
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))
    assert_close(back.logits(back(ids)), expected, rtol=0, atol=2e-5)  # weights at other addresses: other bits


def test_what_transformers_cannot_compute_it_does_not_open(tmp_path: Path, make_model: Callable[..., Griffin]) -> None:
    griffin.save(make_model("transformer-tiny"), tmp_path / "model")
    with pytest.raises(ValueError, match="griffin"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert griffin.load(tmp_path / "model").config == griffin.PRESETS["transformer-tiny"]
