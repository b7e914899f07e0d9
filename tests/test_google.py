"""Our model against the recorded outputs of Google's code: logits, states, gradients, decoding (golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from griffin.config import GriffinConfig
from griffin.convert.google import google_to_griffin, griffin_to_google
from griffin.model import Griffin
from griffin.state import AttentionState, State

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("recurrentgemma", "griffin", "hawk", "attention_last")
# Google's torch and JAX codes differ by 2e-5 in logits of rms 5, and by 4e-6 of a gradient's largest entry.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-5}


def load(name: str) -> tuple[Griffin, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"google_{name}.safetensors", "pt") as file:
        google = json.loads(file.metadata()["recording"])["config"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config, weights = google_to_griffin(
        {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")},
        window=google["attention_window_size"],
        logits_soft_cap=google["logits_soft_cap"],
        embedding_scale="bf16" if google["embeddings_scale_by_sqrt_dim"] else "none",
    )
    model = Griffin(config)
    model.load_state_dict(weights)
    return model, tensors


def assert_state_matches(config: GriffinConfig, state: State, recorded: dict[str, Tensor], prefix: str) -> None:
    """Compare what counts: every h and convolution tail, and the keys and values of the current document in reach."""
    for index, layer in enumerate(state.layers):
        cache = f"{prefix}.blocks.{index}"
        if not isinstance(layer, AttentionState):
            assert_close(layer.h, recorded[f"{cache}.rg_lru_state"], **TOLERANCE)
            assert_close(layer.conv, recorded[f"{cache}.conv1d_state"], **TOLERANCE)
            continue
        assert config.window is not None
        assert torch.equal(state.position, recorded[f"{cache}.num_tokens"])
        for row, position in enumerate(state.position.tolist()):
            seen = torch.arange(max(0, position - config.window), position)
            for field in ("keys", "values"):
                ours = getattr(layer, field)[row, seen % layer.keys.shape[1]]
                assert_close(ours, recorded[f"{cache}.{field}"][row, seen % config.window], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_documents_starting_anywhere(name: str) -> None:
    model, recorded = load(name)
    with torch.no_grad():
        hidden = model(recorded["forward.tokens"], positions=recorded["forward.segment_pos"])
    assert_close(model.logits(hidden), recorded["forward.logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["recurrentgemma", "griffin", "hawk"])  # a State starts at a document's start
def test_states_after_documents_starting_anywhere(name: str) -> None:
    model, recorded = load(name)
    state = model.new_state(2)
    with torch.no_grad():
        model(recorded["forward.tokens"], state, positions=recorded["forward.segment_pos"])
    assert_state_matches(model.config, state, recorded, "forward.cache")


@pytest.mark.parametrize("name", ["recurrentgemma", "griffin"])
def test_gradients(name: str) -> None:
    model, recorded = load(name)
    hidden = model(recorded["forward.tokens"], positions=recorded["forward.segment_pos"])
    (model.logits(hidden) * recorded["gradients.cotangent"]).sum().backward()
    ours = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    for key, gradient in griffin_to_google(model.config, ours).items():
        expected = recorded[f"gradients.weights.{key}"]
        assert_close(
            gradient, expected, rtol=0, atol=2e-5 * float(expected.abs().max()), msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["decode", "decode_short"])
def test_a_prompt_and_then_token_by_token(name: str, case: str) -> None:
    model, recorded = load(name)
    tokens, prompt = recorded[f"{case}.tokens"], recorded[f"{case}.prompt_logits"].shape[1]
    state = model.new_state(2)
    with torch.no_grad():
        assert_close(model.logits(model(tokens[:, :prompt], state)), recorded[f"{case}.prompt_logits"], **TOLERANCE)
        assert_state_matches(model.config, state, recorded, f"{case}.prompt_cache")
        steps = [model(tokens[:, t : t + 1], state) for t in range(prompt, tokens.shape[1])]
    assert_close(model.logits(torch.cat(steps, dim=1)), recorded[f"{case}.step_logits"], **TOLERANCE)
    assert_state_matches(model.config, state, recorded, f"{case}.final_cache")


def test_bf16_is_no_further_from_fp32_than_googles() -> None:
    model, recorded = load("recurrentgemma")
    low = Griffin(model.config, dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = low.logits(low(recorded["forward.tokens"], positions=recorded["forward.segment_pos"]))
    exact = recorded["forward.logits"]
    ours, googles = (float((x.float() - exact).square().mean().sqrt()) for x in (logits, recorded["bf16.logits"]))
    assert ours <= googles
