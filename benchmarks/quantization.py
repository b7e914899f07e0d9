"""Bits per byte that a trained model loses in bf16, int8 and int4, on real text.

    python -m benchmarks.quantization MODEL_FOLDER TEXT [--tokens 65536] [--length 2048] [--json FILE]

Each format reads the same tokens: rows of --length, cut from the start of TEXT, every token predicted but each row's
first. fp32 is the yardstick. Formats are loaded one after the other: the peak of memory is that of fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

import griffin
from griffin.loss import bits_per_byte
from griffin.quantize import Quantization

FORMATS: dict[str, tuple[torch.dtype, Quantization | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.float32, Quantization(8)),
    "int4, group 32": (torch.float32, Quantization(4, 32)),
    "int4, group 64": (torch.float32, Quantization(4, 64)),
    "int4, group 128": (torch.float32, Quantization(4, 128)),
}


@torch.inference_mode()
def nats(model: griffin.Griffin, rows: Tensor) -> float:
    """The sum of -log p(token) over every token but each row's first, through the model's own logits."""
    total = 0.0
    for row in rows:
        hidden = model(row[None, :-1])[0]
        for start in range(0, hidden.shape[0], 256):  # logits of 256 tokens at a time
            targets = row[1:][start : start + 256, None]
            log_p = model.logits(hidden[start : start + 256]).log_softmax(-1)
            total -= float(log_p.gather(1, targets).double().sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = griffin.load_tokenizer(args.model)
    text = args.text.read_text(encoding="utf-8")[: 16 * args.tokens]
    ids = tokenizer.encode(text)[: args.tokens]
    length = min(args.length, len(ids))
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    num_bytes = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in rows)
    print(f"{rows.numel()} tokens in rows of {length}, {num_bytes} bytes predicted\n")
    print("| weights | MB | bits per byte | lost | s |\n|---|---|---|---|---|")
    found: dict[str, dict[str, float]] = {}
    for name, (dtype, form) in FORMATS.items():
        model = griffin.load(args.model, dtype=dtype, quantize=form)
        size = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
        start = time.perf_counter()
        bits = bits_per_byte(nats(model, rows), num_bytes)
        seconds = time.perf_counter() - start
        found[name] = {"megabytes": size, "bits_per_byte": bits, "seconds": seconds}
        lost = bits - found["fp32"]["bits_per_byte"]
        print(f"| {name} | {size:.1f} | {bits:.5f} | {lost:+.5f} | {seconds:.1f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"text": args.text.name, "tokens": rows.numel(), "formats": found}, indent=2))


if __name__ == "__main__":
    main()
