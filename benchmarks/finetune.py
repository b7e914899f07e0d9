"""Fine-tuning beside others: LoRA steps beside transformers' Trainer with PEFT, examples encoded beside datasets.map.

    python -m benchmarks.finetune                     # B x T of 4x512 and 1x2048, two threads
    python -m benchmarks.finetune --parts steps --shapes 1x256 --rounds 2
    python -m benchmarks.finetune --parts 2b          # one LoRA step of the 2B shape on int8 weights: seconds, memory
    python -m benchmarks.finetune --parts data --data chats.jsonl --model FOLDER

The model of the steps has 110M parameters, fp32, the same weights, adapters of rank 16 over every linear of both, the
same random tokens, AdamW. Each runs in a process of its own: the first step is not counted, seconds are the median of
the others, and the peak is over what the process had before its model was made. "data" takes a folder whose tokenizer
both use, with its chat template, and needs `datasets`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, timing
from griffin import PRESETS, Griffin, lora
from griffin.data.packing import Batch
from griffin.memory import keep_freed_memory
from griffin.quantize import Quantization, quantize
from griffin.train.config import TrainConfig
from griffin.train.objective import LanguageModel
from griffin.train.optim import make_optimizer
from griffin.train.parallel import prepare_blocks
from griffin.train.step import take_step

OURS, THEIRS = "griffin", "transformers + peft"
RANK = 16


def tokens_of(shape: str, vocab_size: int) -> torch.Tensor:
    B, T = (int(part) for part in shape.split("x"))
    return torch.randint(1, vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))


def batch_of(tokens: torch.Tensor) -> Batch:
    B, T = tokens.shape[0], tokens.shape[1] - 1
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(T).expand(B, T))


def our_steps(model: Griffin, batch: Batch, steps: int) -> list[float]:
    """Seconds of each of our LoRA steps, after the first."""
    config = TrainConfig(model=model.config, train_data="-", steps=max(2, steps))
    optimizer = make_optimizer(lora.adapters(model).items(), config)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        assert take_step(model, LanguageModel(), optimizer, [batch], 1.0).taken
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def ours(shape: str, steps: int) -> list[float]:
    keep_freed_memory()
    model = Griffin(peers.CONFIG, generator=torch.Generator().manual_seed(0))
    lora.add(model, lora.LoRA(rank=RANK))
    return our_steps(model, batch_of(tokens_of(shape, peers.CONFIG.vocab_size)), steps)


def theirs(shape: str, steps: int) -> list[float]:
    """The same by transformers' Trainer over a model of peft's."""
    import peft
    import transformers

    keep_freed_memory()
    below = peers.twins()[1]
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(lora.TARGETS))
    model = peft.get_peft_model(below, config)
    tokens = tokens_of(shape, peers.CONFIG.vocab_size)
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()] * (steps + 1)
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(tokens),
            max_steps=steps + 1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collate = lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}  # noqa: E731
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
        trainer.train()
    return seconds[1:]


def random_int8(config: Any) -> Griffin:
    """A model in int8 with random numbers, made as such: no float weight of it is ever there."""
    model = quantize(Griffin(config, device="meta"), Quantization.named("int8"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        made = torch.empty_like(parameter, device="cpu")
        if leaf == "weight_q":
            made.random_(-127, 128, generator=generator)
        elif leaf == "weight_scale":
            made.fill_(1e-4 * (2560 / max(1, config.width)) ** 0.5)
        elif leaf == "recurrent_param":
            made.fill_(-4.0)
        else:
            made.normal_(0.0, 0.01, generator=generator)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(made, requires_grad=False))
    model.activation_dtype = torch.float32
    return model


def large(preset: str, shape: str, steps: int) -> list[float]:
    """LoRA steps of a large shape over int8 weights, a block's input alone kept."""
    model = random_int8(PRESETS[preset])
    lora.add(model, lora.LoRA(rank=RANK))
    prepare_blocks(model, recompute="all")
    return our_steps(model, batch_of(tokens_of(shape, model.config.vocab_size)), steps)


def encode(data: Path, folder: str, processes: int) -> dict[str, float]:
    """MB/s of the examples, ours and by datasets.map with transformers' apply_chat_template, once each."""
    import datasets
    import transformers

    from griffin.data.chat import Encoder
    from griffin.data.examples import prepare_examples
    from griffin.train.reading import chat_tokenizer

    size = data.stat().st_size / 1e6
    tokenizer = chat_tokenizer(folder)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(place)
        start = time.perf_counter()
        prepare_examples(data, Path(place) / "ours", Encoder(tokenizer, "chat"), workers=processes)
        found[OURS] = size / (time.perf_counter() - start)
        other = transformers.AutoTokenizer.from_pretrained(place)

        def apply(row: dict[str, Any]) -> dict[str, Any]:
            names = {"model": "assistant"}
            chat = [{**message, "role": names.get(message["role"], message["role"])} for message in row["messages"]]
            return {"input_ids": other.apply_chat_template(chat, tokenize=True)}

        start = time.perf_counter()
        table = datasets.Dataset.from_json(str(data), cache_dir=place)
        table.map(apply, num_proc=processes, remove_columns=table.column_names)
        found["datasets.map"] = size / (time.perf_counter() - start)
    return found


def alone(name: str, shape: str, steps: int, threads: int, preset: str) -> dict[str, Any]:
    """Run one of the above in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.finetune", "--alone", name, "--shapes", shape, "--preset", preset]
    command += ["--rounds", str(steps), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["steps", "2b", "data"], default=["steps"])
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048"], help="B x T, several")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", default="recurrentgemma-2b", help="of 2b")
    parser.add_argument("--data", type=Path, help="of data: a .jsonl of chats")
    parser.add_argument("--model", help="of data: a folder with a tokenizer")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        run = {OURS: ours, THEIRS: theirs}.get(args.alone, lambda *given: large(args.preset, *given))
        before = timing.peak_bytes()
        seconds = run(args.shapes[0], args.rounds)
        print(json.dumps({"s": timing.median(seconds), "peak_bytes": timing.peak_bytes() - before}))
        return
    results: dict[str, Any] = {}
    if "steps" in args.parts:
        rows = []
        for shape in args.shapes:
            found = {name: alone(name, shape, args.rounds, args.threads, args.preset) for name in (OURS, THEIRS)}
            results[shape] = found
            B, T = (int(part) for part in shape.split("x"))
            for name, one in found.items():
                base = found[THEIRS]
                over = [f"{base['s'] / one['s']:.2f}x", f"{one['peak_bytes'] / base['peak_bytes']:.2f}"]
                rows.append([shape, name, f"{B * T / one['s']:.0f}", f"{one['peak_bytes'] / 1e6:.0f}", *over])
        print(timing.table(["B x T", "", "tokens/s", "peak MB", "speed over", "memory over"], rows))
    if "2b" in args.parts:
        shape = args.shapes[0] if args.shapes != ["4x512", "1x2048"] else "1x512"
        results[args.preset] = one = {"shape": shape, **alone("large", shape, 1, args.threads, args.preset)}
        peak = one["peak_bytes"] / 1e9
        print(f"{args.preset}, int8, LoRA of rank {RANK}, {shape}: {one['s']:.1f} s, peak {peak:.2f} GB")
    if "data" in args.parts:
        if args.data is None or args.model is None:
            parser.error("--parts data needs --data and --model")
        results["data"] = found = encode(args.data, args.model, args.threads)
        print(timing.table(["encoding", "MB/s"], [[name, f"{value:.2f}"] for name, value in found.items()]))
    print(timing.save("finetune", results))


if __name__ == "__main__":
    main()
