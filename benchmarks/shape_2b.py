"""The exact RecurrentGemma 2B shape, random weights, in bf16, int8 and int4: load, prefill, decode; time and memory.

    python -m benchmarks.shape_2b FOLDER              # FOLDER is made (5.4 GB) if it is not there
    python -m benchmarks.shape_2b FOLDER --formats int4

Each format is loaded and run in a process of its own, so that its memory is its own; int8 and int4 are made as they are
loaded. Decode is set beside a streaming read (256 MB) of the same process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import griffin
from benchmarks import timing
from benchmarks.cpu import limits
from griffin.infer.step import DecodeStep


def measure(folder: Path, form: str, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    imports = timing.peak_bytes()
    start = time.perf_counter()
    model = griffin.load(folder, quantize=None if form == "bf16" else form)
    load_s, loaded = time.perf_counter() - start, timing.peak_bytes()
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt_tokens))
    state = model.new_state(1)
    with torch.no_grad():
        start = time.perf_counter()
        hidden = model(tokens, state)
        prefill_s = time.perf_counter() - start
        seconds, step = [], DecodeStep(model, state)
        token = step(model.logits(hidden[:, -1]).argmax(dim=-1)).argmax(dim=-1)
        for _ in range(decode_tokens):
            start = time.perf_counter()
            token = step(token).argmax(dim=-1)
            seconds.append(time.perf_counter() - start)
    decoded, weights = timing.peak_bytes(), sum(p.nbytes for p in model.parameters())
    read, speed = limits()["read_bytes_per_s"], 1 / timing.median(seconds)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weights,
        "state_bytes": state.nbytes,
        "memory_before_load_bytes": imports,
        "peak_after_load_bytes": loaded,
        "peak_after_decode_bytes": decoded,
        "memory_over_weights": (decoded - imports) / weights,
        "load_s": load_s,
        "prefill_tokens_per_s": prompt_tokens / prefill_s,
        "decode_tokens_per_s": speed,
        "read_bytes_per_s": read,
        "of_read": speed * weights / read,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", nargs="+", choices=["bf16", "int8", "int4"], default=["bf16", "int8", "int4"])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(args.folder, args.measure, args.prompt_tokens, args.decode_tokens)))
        return
    if not args.folder.exists():
        print(f"writing {args.folder} (5.4 GB) ...", file=sys.stderr)
        griffin.save(griffin.Griffin(griffin.PRESETS["recurrentgemma-2b"], dtype=torch.bfloat16), args.folder)
    results: dict[str, dict[str, float]] = {}
    for form in args.formats:
        print(f"{form} ...", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.shape_2b", str(args.folder), "--measure", form]
        options = [("--prompt-tokens", args.prompt_tokens), ("--decode-tokens", args.decode_tokens)]
        command += [str(part) for option in (*options, ("--threads", args.threads)) for part in option]
        results[form] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    rows = [
        [
            name,
            *(f"{value:,.2f}" if isinstance(value := results[form][name], float) else f"{value:,}" for form in results),
        ]
        for name in next(iter(results.values()))
    ]
    print(timing.table(["what", *results], rows))
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != str(args.folder)]
    print(timing.save("shape_2b", {"shape": "recurrentgemma-2b", "formats": results}))


if __name__ == "__main__":
    main()
