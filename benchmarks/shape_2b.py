"""The exact RecurrentGemma 2B shape, random bf16 weights: write a folder, load it, prefill, decode; time and memory.

    python -m benchmarks.shape_2b FOLDER              # FOLDER is made (5.4 GB) if it is not there

Loading and running happen in a process of their own, so that its peak of memory is theirs alone.
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


def measure(folder: Path, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    imports = timing.peak_bytes()
    start = time.perf_counter()
    model = griffin.load(folder)
    load_s, loaded = time.perf_counter() - start, timing.peak_bytes()
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt_tokens))
    state = model.new_state(1)
    with torch.no_grad():
        start = time.perf_counter()
        hidden = model(tokens, state)
        prefill_s = time.perf_counter() - start
        seconds = []
        for _ in range(decode_tokens):
            start = time.perf_counter()
            token = model.logits(hidden[:, -1:]).argmax(dim=-1)
            hidden = model(token, state)
            seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "state_bytes": state.nbytes,
        "memory_before_load_bytes": imports,
        "peak_after_load_bytes": loaded,
        "peak_after_decode_bytes": timing.peak_bytes(),
        "load_s": load_s,
        "prefill_tokens_per_s": prompt_tokens / prefill_s,
        "decode_tokens_per_s": 1 / timing.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(args.folder, args.prompt_tokens, args.decode_tokens)))
        return
    if not args.folder.exists():
        print(f"writing {args.folder} (5.4 GB) ...", file=sys.stderr)
        griffin.save(griffin.Griffin(griffin.PRESETS["recurrentgemma-2b"], dtype=torch.bfloat16), args.folder)
    command = [sys.executable, "-m", "benchmarks.shape_2b", *sys.argv[1:], "--measure"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    grown = (result["peak_after_load_bytes"] - result["memory_before_load_bytes"]) / result["weight_bytes"]
    rows = [[name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"] for name, value in result.items()]
    print(timing.table(["what", "measured"], rows))
    print(f"memory that loading takes over the weights' size: {grown:.3f}")
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != str(args.folder)]
    print(timing.save("shape_2b", {"shape": "recurrentgemma-2b, bf16", **result, "load_memory_ratio": grown}))


if __name__ == "__main__":
    main()
