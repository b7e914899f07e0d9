"""Trainer and generate of transformers, before and after `griffin.integrations.transformers.register()`.

    python -m benchmarks.huggingface                              # 110M, two threads
    python -m benchmarks.huggingface --small --no-save            # that it runs

Both models have the same weights and see the same keys. A training step is Trainer's own: forward, loss, backward,
clipping and AdamW, fp32. "no logits" is ours with model.skip_logits. Tasks alternate within a round. Peak memory is
that of a process which does two steps of one model and nothing else, over what it had before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig, Trainer, TrainingArguments

from benchmarks import peers, timing
from griffin.config import griffin_pattern
from griffin.integrations.transformers import register, unregister

BEFORE, AFTER, SKIP = "before", "after", "after, no logits"
SMALL = replace(
    peers.CONFIG, vocab_size=500, width=48, mlp_width=96, lru_width=48, block_types=griffin_pattern(3), window=16
)


def make(name: str, small: bool) -> Any:
    """The model that AutoModelForCausalLM gives before or after the line."""
    config = SMALL if small else peers.CONFIG
    window = (config.window or 0) + (name == BEFORE)  # transformers' counts the token itself
    (unregister if name == BEFORE else register)()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        RecurrentGemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=2 * config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            lru_width=config.lru_width,
            attention_window_size=window,
            eos_token_id=None,
        )
    )
    unregister()
    if name == SKIP:
        model.skip_logits = True
    return model


def trainer_step(model: Any, B: int, T: int, folder: str) -> Callable[[], object]:
    arguments = TrainingArguments(folder, report_to=[], use_cpu=True, per_device_train_batch_size=B)
    trainer = Trainer(model.train(), arguments)
    optimizer, trainer.current_gradient_accumulation_steps = trainer.create_optimizer(), 1
    ids = torch.randint(1, model.config.vocab_size, (B, T))

    def step() -> object:
        loss = trainer.training_step(model, {"input_ids": ids, "labels": ids})
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


def generation(model: Any, B: int, T: int, count: int) -> Callable[[], object]:
    ids = torch.randint(1, model.config.vocab_size, (B, T))
    return lambda: model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def peak(name: str, shape: str, small: bool, threads: int) -> int:
    words = ["--alone", name, "--shapes", shape, "--threads", str(threads), *(["--small"] if small else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.huggingface", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def sizes(shape: str) -> tuple[int, int]:
    B, T = (int(part) for part in shape.split("x"))
    return B, T


def measure(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    found = []
    before, after, skip = (make(name, args.small) for name in (BEFORE, AFTER, SKIP))
    after.load_state_dict(before.state_dict())
    for shape in args.generate:
        B, T = sizes(shape)
        for count in (1, args.tokens):
            models = ((BEFORE, before), (AFTER, after))
            tasks = {name: generation(model.eval(), B, T, count) for name, model in models}
            seconds = timing.interleaved(tasks, rounds=args.rounds)
            found.append({"what": f"generate, {B} prompts of {T}, {count} tokens", "seconds": seconds})
    for shape in args.shapes:
        models = ((BEFORE, before), (AFTER, after), (SKIP, skip))
        tasks = {name: trainer_step(model, *sizes(shape), folder) for name, model in models}
        seconds = timing.interleaved(tasks, rounds=args.rounds)
        peaks = {name: peak(name, shape, args.small, args.threads) for name in tasks}
        found.append({"what": f"Trainer step, {shape}", "seconds": seconds, "peak_bytes": peaks})
    return found


def report(found: list[dict[str, Any]]) -> str:
    rows = []
    for entry in found:
        base = timing.median(entry["seconds"][BEFORE])
        for name, seconds in entry["seconds"].items():
            s = timing.median(seconds)
            memory = f"{entry['peak_bytes'][name] / 1e6:.0f}" if "peak_bytes" in entry else ""
            rows.append([entry["what"], name, f"{s:.3f}", f"{base / s:.2f}x", memory])
    return timing.table(["what", "register()", "s", "over before", "peak MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048"], help="B x T of a training step, several")
    parser.add_argument("--generate", nargs="+", default=["1x512", "4x512"], help="prompts x tokens, several")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a toy model")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.alone:
            before = timing.peak_bytes()
            step = trainer_step(make(args.alone, args.small), *sizes(args.shapes[0]), folder)
            step()
            step()
            print(json.dumps({"peak_bytes": timing.peak_bytes() - before}))
            return
        found = measure(args, folder)
    print(report(found))
    if not args.no_save:
        shape = {"parameters": peers.CONFIG.num_parameters(), "dtype": "fp32"}
        print(timing.save("huggingface", {"shape": shape, "measured": found}))


if __name__ == "__main__":
    main()
