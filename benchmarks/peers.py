"""What we are compared with: the same 110M shape in other people's code, given the same weights where that is possible.

A peer that is not installed is left out and named.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from griffin import Griffin, GriffinConfig
from griffin.config import griffin_pattern

CONFIG = GriffinConfig(
    vocab_size=32_000,
    width=768,
    mlp_width=2304,
    lru_width=768,
    num_heads=6,
    num_gate_blocks=6,
    block_types=griffin_pattern(12),
    window=1024,
)
THEIRS_BF16 = "transformers RecurrentGemma bf16"
THEIRS, GEMMA, GOOGLE = (
    "transformers RecurrentGemma fp32",
    "transformers Gemma (a Transformer) fp32",
    "Google torch fp32",
)
GEMMA_CPP = {"gemma.cpp bf16": "bf16", "gemma.cpp 8 bits (SFP)": "sfp"}


def twins(config: GriffinConfig = CONFIG) -> tuple[Griffin, RecurrentGemmaForCausalLM]:
    """One set of random weights in both; transformers' window counts the token itself."""
    ours = Griffin(config)
    theirs = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=2 * config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            lru_width=config.lru_width,
            attention_window_size=(config.window or 0) + 1,
        )
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    return ours.eval(), theirs.eval()


def gemma(config: GriffinConfig = CONFIG) -> GemmaForCausalLM:
    """A Transformer of the same widths and depth: multi-query attention to everything, SDPA."""
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            head_dim=config.head_width,
            max_position_embeddings=2**17,
            attn_implementation="sdpa",
        )
    ).eval()


def google(config: GriffinConfig = CONFIG) -> Any | None:
    """Google's own PyTorch code (recurrentgemma and flax, which it imports); None if it is not installed."""
    if find_spec("recurrentgemma") is None or find_spec("flax") is None:
        print("recurrentgemma (Google's package) or flax is not installed: left out")
        return None
    from recurrentgemma import common
    from recurrentgemma.torch import griffin as theirs

    kinds = {"recurrent": common.TemporalBlockType.RECURRENT, "attention": common.TemporalBlockType.ATTENTION}
    shape = common.GriffinConfig(
        vocab_size=config.vocab_size,
        width=config.width,
        mlp_expanded_width=config.mlp_width,
        num_heads=config.num_heads,
        lru_width=config.lru_width,
        block_types=tuple(kinds[kind] for kind in config.block_types),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=config.window,
        logits_soft_cap=30.0,
    )
    return theirs.Griffin(shape, gradient_checkpointing=False, dtype=torch.float32).eval()


def hf_decoder(model: Any, rows: int, context: int = 0, device: torch.device | None = None) -> Callable[[int], None]:
    """Decode greedily with a transformers model after `context` random tokens: call it with a number of tokens."""
    cache = DynamicCache(config=model.config)
    position = context

    with torch.no_grad():
        prompt = torch.randint(1, model.config.vocab_size, (rows, max(1, context)), device=device)
        token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(dim=-1)

    @torch.no_grad()
    def run(count: int) -> None:
        nonlocal token, position
        for _ in range(count):
            where = torch.full((1, 1), max(1, position), device=device)
            out = model(token, position_ids=where, past_key_values=cache, use_cache=True)
            token, position = out.logits[:, -1:].argmax(dim=-1), position + 1

    return run


def google_decoder(model: Any, rows: int) -> Callable[[int], None]:
    with torch.no_grad():
        token = torch.randint(1, CONFIG.vocab_size, (rows, 1))
        _, cache = model(token, torch.zeros(rows, 1, dtype=torch.int64))
    position = 1

    @torch.no_grad()
    def run(count: int) -> None:
        nonlocal token, position, cache
        for _ in range(count):
            logits, cache = model(token, torch.full((rows, 1), position), cache)
            token, position = logits[:, -1:].argmax(dim=-1), position + 1

    return run


@contextmanager
def gemma_cpp_decoder(driver: Path, rows: int, form: str) -> Iterator[Callable[[int], None]]:
    """Google's C++ engine, as benchmarks/gemma_cpp builds it: a process that decodes when asked and else sleeps."""
    command = [str(driver), str(torch.get_num_threads()), str(rows), form]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        to, answers = child.stdin, child.stdout
        assert to is not None
        assert answers is not None

        def answer() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended with {child.wait()}")
            found: dict[str, Any] = json.loads(line)
            return found

        def run(count: int) -> None:
            print(count, file=to, flush=True)
            answer()

        if (threads := answer()["threads"]) != torch.get_num_threads():
            raise RuntimeError(f"gemma.cpp took {threads} threads, not {torch.get_num_threads()}")
        yield run
        to.close()  # the end of its input ends it


def autocast_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """As `hf_loss`, in bf16 as its users have it: fp32 weights, torch.autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return hf_loss(model, inputs, targets)


def hf_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """From full logits, as its users compute it."""
    logits = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
