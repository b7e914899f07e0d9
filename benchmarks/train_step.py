"""A training step (forward, loss, backward) of one small model, ours and transformers', in one run.

    python -m benchmarks.train_step                   # B x T of 4x512 and 1x2048, two threads
    python -m benchmarks.train_step --shapes 1x1024 --layers 6 --rounds 5

Both hold the same weights and see the same keys (transformers' window is set to W + 1); fp32; transformers computes its
loss from full logits, as its users do.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from benchmarks import timing
from griffin import Griffin, GriffinConfig
from griffin.config import griffin_pattern
from griffin.loss import cross_entropy


def twins(config: GriffinConfig) -> tuple[Griffin, RecurrentGemmaForCausalLM]:
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
    return ours.train(), theirs.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048"], help="B x T, several")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = GriffinConfig(
        vocab_size=32_000,
        width=768,
        mlp_width=2304,
        lru_width=768,
        num_heads=6,
        num_gate_blocks=6,
        block_types=griffin_pattern(args.layers),
        window=1024,
    )
    ours, theirs = twins(config)
    results, rows = [], []
    for shape in args.shapes:
        B, T = (int(part) for part in shape.split("x"))
        tokens = torch.randint(1, config.vocab_size, (B, T + 1))
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

        def our_step(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> float:
            ours.zero_grad()
            nats, count = cross_entropy(ours(inputs), ours.embedding, targets, soft_cap=config.logits_soft_cap)
            loss = nats / count
            loss.backward()
            return loss.item()

        def their_step(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> float:
            theirs.zero_grad()
            logits = theirs(inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            return loss.item()

        difference = abs(our_step() - their_step())
        seconds = timing.interleaved({"griffin": our_step, "transformers": their_step}, rounds=args.rounds, warmup=0)
        speeds = {name: B * T / timing.median(values) for name, values in seconds.items()}
        ratio = speeds["griffin"] / speeds["transformers"]
        results.append({"B": B, "T": T, "tokens_per_s": speeds, "ratio": ratio, "loss_difference": difference})
        rows.append([shape, f"{speeds['griffin']:.0f}", f"{speeds['transformers']:.0f}", f"{ratio:.2f}x"])
    parameters = config.num_parameters()
    print(timing.table(["B x T", "griffin tokens/s", "transformers tokens/s", "ratio"], rows))
    shape = {"parameters": parameters, "layers": args.layers, "dtype": "fp32"}
    print(timing.save("train_step", {"shape": shape, "steps": results, "peak_bytes_of_both": timing.peak_bytes()}))


if __name__ == "__main__":
    main()
