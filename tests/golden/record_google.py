"""Record what Google's RecurrentGemma code computes, for the tests to compare with.

The code is google-deepmind/recurrentgemma at commit 2efa84dac0e68e63547a27a18fa943c98f1c312e (package 1.0.1),
Apache License 2.0, https://github.com/google-deepmind/recurrentgemma. Nothing of it is copied here: this script imports
`recurrentgemma.torch` from a checkout, gives it tiny models with random weights, and saves inputs and outputs.

To make the files again (jax, flax and orbax-checkpoint are only needed for the cross-check, which is skipped without):

    git clone https://github.com/google-deepmind/recurrentgemma && git -C recurrentgemma checkout 2efa84d
    python -m venv venv
    venv/bin/pip install torch einops jaxtyping typeguard absl-py sentencepiece safetensors jax flax orbax-checkpoint
    PYTHONPATH=recurrentgemma venv/bin/python tests/golden/record_google.py

What each file holds is in README.md beside this script. The numbers depend on PyTorch's version and on the machine only
by rounding: every input comes from NumPy's PCG64 with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recurrentgemma import common
from recurrentgemma.torch import griffin as google
from safetensors.torch import save_file
from torch import Tensor

COMMIT = "2efa84dac0e68e63547a27a18fa943c98f1c312e"
R, A = common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION

CONFIGS = {
    "recurrentgemma": common.GriffinConfig(
        vocab_size=67,
        width=32,
        mlp_expanded_width=96,
        num_heads=4,
        lru_width=32,
        block_types=(R, R, A, R, R),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8,
        logits_soft_cap=30.0,
    ),
    "griffin": common.GriffinConfig(  # the papers' choices: no embedding scale, no cap, lru_width != width
        vocab_size=61,
        width=32,
        mlp_expanded_width=48,
        num_heads=4,
        lru_width=48,
        block_types=(R, A, R),
        embeddings_scale_by_sqrt_dim=False,
        attention_window_size=5,
        logits_soft_cap=0.0,
    ),
    "hawk": common.GriffinConfig(
        vocab_size=53,
        width=32,
        mlp_expanded_width=64,
        num_heads=2,
        lru_width=40,
        block_types=(R, R, R),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8,
        logits_soft_cap=30.0,
    ),
    "attention_last": common.GriffinConfig(
        vocab_size=59,
        width=24,
        mlp_expanded_width=40,
        num_heads=3,
        lru_width=24,
        block_types=(R, A, A),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=7,
        logits_soft_cap=30.0,
    ),
}

# Per row: the indices where a document starts. Early, in the middle, within a convolution's reach of each other, last.
RESETS = {
    "recurrentgemma": (29, [[0, 11, 28], [0, 2, 17]]),
    "griffin": (21, [[0, 9, 11], [0, 1, 20]]),
    "hawk": (23, [[0, 7], [0, 1, 2, 22]]),
    # Row 1 starts at position 5: inside a document whose beginning is not there, so its first token is no reset.
    "attention_last": (26, [[0, 13, 25], [-5, 3]]),
}
GRADIENTS = ("recurrentgemma", "griffin")
BF16 = ("recurrentgemma",)
# (name, prompt tokens, decoded tokens): a prompt beyond every window, and one below the convolution's width.
DECODES = (("decode", 13, 6), ("decode_short", 2, 9))


def positions_of(num_tokens: int, starts: list[int]) -> list[int]:
    """Count from the last start at or before each index; a negative start lies before the row."""
    return [index - max(start for start in starts if start <= index) for index in range(num_tokens)]


def random_weights(model: google.Griffin, generator: np.random.Generator) -> None:
    """Give every parameter values that matter: biases, norm scales and a_param too, so that no term is zero."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("a_param"):
            value = generator.uniform(-6.5, 1.0, shape)  # decays from 0.99 a token to forgetting at once
        elif name.endswith(".scale"):
            value = generator.normal(0.0, 0.3, shape)
        elif name.endswith((".b", ".bias")):
            value = generator.normal(0.0, 0.2, shape)
        elif name.endswith("input_embedding"):
            value = generator.normal(0.0, 0.8, shape)  # logits of several units, so that the cap of 30 bends them
        elif name.endswith("conv_1d.w"):
            value = generator.normal(0.0, 0.6, shape)
        else:  # matrices; a Linear has its inputs last, an Einsum or a block-diagonal matrix last but one
            fan_in = shape[-1] if name.endswith(".weight") else shape[-2]
            # Queries and keys a little larger: attention that picks, and so shows which keys are visible.
            gain = 2.0 if "proj_q" in name or "proj_k" in name else 1.0
            value = generator.normal(0.0, gain / np.sqrt(fan_in), shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))


def flat_cache(cache: google.Cache) -> dict[str, Tensor]:
    """`blocks.0.rg_lru_state`, `blocks.2.keys` ...: copies, as a decode step writes into the one it is given."""
    return {
        f"{block}.{field}": tensor.detach().clone()
        for block, entries in cache.items()
        for field, tensor in entries._asdict().items()
    }


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def record(name: str) -> dict[str, Tensor]:
    """Run one model on all cases; the result is what its file holds (README.md names every entry)."""
    config = CONFIGS[name]
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    # With checkpointing off Google's model ignores return_cache=False (it returns the caches anyway): harmless here.
    model = google.Griffin(config, gradient_checkpointing=False, dtype=torch.float32)
    random_weights(model, generator)
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    out = under("weights", weights)

    num_tokens, starts = RESETS[name]
    tokens = torch.from_numpy(generator.integers(0, config.vocab_size, (2, num_tokens)))
    segment_pos = torch.tensor([positions_of(num_tokens, row) for row in starts])
    logits, cache = model(tokens, segment_pos)
    out |= {"forward.tokens": tokens, "forward.segment_pos": segment_pos, "forward.logits": logits.detach()}
    out |= under("forward.cache", flat_cache(cache))

    if name in GRADIENTS:
        cotangent = torch.from_numpy(generator.normal(0.0, 1.0, tuple(logits.shape))).float()
        (logits * cotangent).sum().backward()
        out["gradients.cotangent"] = cotangent
        out |= under("gradients.weights", {key: p.grad.detach().clone() for key, p in model.named_parameters()})

    for case, prompt_len, steps in DECODES:
        tokens = torch.from_numpy(generator.integers(0, config.vocab_size, (2, prompt_len + steps)))
        positions = torch.arange(prompt_len + steps).expand(2, -1)
        with torch.no_grad():
            logits, cache = model(tokens[:, :prompt_len], positions[:, :prompt_len])
            out |= {f"{case}.tokens": tokens, f"{case}.prompt_logits": logits}
            out |= under(f"{case}.prompt_cache", flat_cache(cache))
            step_logits = []
            for t in range(prompt_len, prompt_len + steps):
                logits, cache = model(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
                step_logits.append(logits[:, 0])
            out[f"{case}.step_logits"] = torch.stack(step_logits, dim=1)
            out |= under(f"{case}.final_cache", flat_cache(cache))

    if name in BF16:
        low = google.Griffin(config, gradient_checkpointing=False, dtype=torch.bfloat16)
        low.load_state_dict(weights)  # rounds
        with torch.no_grad():
            out["bf16.logits"] = low(out["forward.tokens"], segment_pos)[0]
    return {key: value.contiguous() for key, value in out.items()}


def description(config: common.GriffinConfig) -> str:
    """Return the file's metadata, one JSON string: safetensors writes several entries in a random order."""
    fields: dict[str, Any] = config._asdict()
    del fields["scan_type"]
    fields["block_types"] = [kind.name.lower() for kind in config.block_types]
    source = f"google-deepmind/recurrentgemma@{COMMIT}"
    return json.dumps({"config": fields, "source": source, "licence": "Apache-2.0", "torch": torch.__version__})


def report_scale(name: str, recorded: dict[str, Tensor]) -> None:
    """Print how strongly each thing recorded could reveal a mistake."""
    logits = recorded["forward.logits"]
    line = f"{name}: logits rms {logits.square().mean().sqrt():.2f}, largest {logits.abs().max():.2f}"
    gradients = {key: value for key, value in recorded.items() if key.startswith("gradients.weights.")}
    if gradients:
        weakest = min(gradients, key=lambda key: gradients[key].abs().max())
        line += f"; weakest gradient {weakest.removeprefix('gradients.weights.')} {gradients[weakest].abs().max():.2e}"
    if "bf16.logits" in recorded:
        line += f"; bf16 differs by {(recorded['bf16.logits'].float() - logits).abs().max():.3f}"
    print(line)


def jax_difference(name: str, recorded: dict[str, Tensor]) -> None:
    """Print the largest differences from Google's JAX implementation of the same model."""
    try:
        import jax
        from recurrentgemma.jax import griffin as google_jax
    except ImportError as error:
        print(f"  JAX not compared: {error}")
        return
    jnp = jax.numpy
    params: dict[str, Any] = {}
    for key, value in recorded.items():
        if not key.startswith("weights."):
            continue
        *folders, leaf = key.removeprefix("weights.").split(".")
        if folders[0] == "blocks":  # Flax has one folder "blocks.0" where torch has "blocks" and "0"
            folders[:2] = [f"blocks.{folders[1]}"]
        at = params
        for folder in folders:
            at = at.setdefault(folder, {})
        at["kernel" if leaf == "weight" else leaf] = jnp.asarray(value.T if leaf == "weight" else value)

    model = google_jax.Griffin(CONFIGS[name]._replace(scan_type=common.ScanType.LINEAR_NATIVE))
    apply = jax.jit(lambda params, *args: model.apply({"params": params}, *args))

    def array(key: str) -> Any:
        return jnp.asarray(recorded[key])

    def difference(key: str, value: Any) -> float:
        return float(np.abs(np.asarray(value) - recorded[key].numpy()).max())

    def cache_difference(prefix: str, cache: Any) -> str:
        worst: dict[str, float] = {}
        for block, entries in cache.items():
            for field, value in entries._asdict().items():
                worst[field] = max(worst.get(field, 0.0), difference(f"{prefix}.{block}.{field}", value))
        return ", ".join(f"{field} {value:.1e}" for field, value in worst.items())

    tokens, segment_pos = array("forward.tokens"), array("forward.segment_pos")
    logits, cache = apply(params, tokens, segment_pos)
    # JAX keeps the convolution's inputs from before a reset in its state, where torch zeroes them.
    line = f"logits {difference('forward.logits', logits):.1e}"
    print(f"  JAX forward: {line}; {cache_difference('forward.cache', cache)}")
    if "gradients.cotangent" in recorded:
        loss = lambda params: (apply(params, tokens, segment_pos)[0] * array("gradients.cotangent")).sum()  # noqa: E731
        paths = jax.tree_util.tree_flatten_with_path(jax.grad(loss)(params))[0]
        worst = 0.0
        for path, value in paths:
            leaf = path[-1].key
            key = ".".join([p.key for p in path[:-1]] + ["weight" if leaf == "kernel" else leaf])
            expected = recorded[f"gradients.weights.{key}"].numpy()
            value = np.asarray(value).T if leaf == "kernel" else np.asarray(value)
            worst = max(worst, float(np.abs(value - expected).max() / np.abs(expected).max()))
        print(f"  JAX gradients: largest difference relative to each parameter's largest entry {worst:.1e}")
    for case, prompt_len, steps in DECODES:
        tokens = array(f"{case}.tokens")
        positions = jnp.broadcast_to(jnp.arange(prompt_len + steps), tokens.shape)
        logits, cache = apply(params, tokens[:, :prompt_len], positions[:, :prompt_len])
        line = f"prompt {difference(f'{case}.prompt_logits', logits):.1e}"
        seen = []
        for t in range(prompt_len, prompt_len + steps):
            logits, cache = apply(params, tokens[:, t : t + 1], positions[:, t : t + 1], cache)
            seen.append(logits[:, 0])
        line += f", steps {difference(f'{case}.step_logits', jnp.stack(seen, axis=1)):.1e}"
        print(f"  JAX {case}: {line}; {cache_difference(f'{case}.final_cache', cache)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--no-jax", action="store_true", help="skip the comparison with Google's JAX code")
    arguments = parser.parse_args()
    torch.manual_seed(0)  # Google's constructors draw weights; all of them are overwritten
    for name, config in CONFIGS.items():
        recorded = record(name)
        path = arguments.out / f"google_{name}.safetensors"
        save_file(recorded, path, {"recording": description(config)})
        report_scale(name, recorded)
        if not arguments.no_jax:
            jax_difference(name, recorded)
        print(f"  {path.name}: {path.stat().st_size / 1e3:.0f} kB, {len(recorded)} tensors")


if __name__ == "__main__":
    main()
