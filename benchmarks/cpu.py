"""Decode and prefill of a 110M Griffin on a CPU, ours and every installed peer's, and the machine's limits.

    python -m benchmarks.cpu                            # one and two threads; half an hour on two cores
    python -m benchmarks.cpu --threads 2 --only decode
    python -m benchmarks.cpu --lengths 512 2048 --rounds 3
    python -m benchmarks.cpu --only decode --gemma-cpp DRIVER    # Google's C++ engine too: benchmarks/gemma_cpp

Random weights: width 768 = lru_width, 12 layers R R A, 6 heads, MLP 2304, vocabulary 32,000, window 1024. Limits, of
the same run: bytes a second of a streaming read (256 MB), and fp32 operations a second of PyTorch's matrix products at
this model's shapes (2048 x 768 by 768 x 2304). Writes a JSON and prints Markdown, for docs/performance.md.
Training steps: benchmarks.train_step. The 2B shape: benchmarks.shape_2b. Bits per byte: benchmarks.quantization.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu_decode, cpu_prefill, peers, timing
from griffin import Griffin
from griffin.memory import keep_freed_memory
from griffin.ops.cpu.library import Kernel
from griffin.quantize import quantize

_stream = Kernel("stream", "AI i")


def read_memory() -> Callable[[], int]:
    """What streams 256 MB once, and gives that number of bytes."""
    memory, totals = torch.ones(64 * 2**20, dtype=torch.int32), torch.empty(2**12, dtype=torch.int32)

    def read() -> int:
        _stream(torch.float32, memory, totals, memory.nbytes)
        return memory.nbytes

    return read


def limits() -> dict[str, float]:
    """Bytes read, and fp32 multiply-adds times two, per second: the best of several."""
    read = read_memory()
    a, b = torch.randn(2048, 768), torch.randn(2304, 768)
    tasks: dict[str, Callable[[], object]] = {"read": read, "gemm": lambda: torch.nn.functional.linear(a, b)}
    seconds = timing.interleaved(tasks, rounds=15)
    return {
        "read_bytes_per_s": read() / min(seconds["read"]),
        "gemm_flop_per_s": 2 * 2048 * 768 * 2304 / min(seconds["gemm"]),
    }


def make_models() -> tuple[dict[str, Griffin], dict[str, Any]]:
    fp32, theirs = peers.twins()
    bf16 = Griffin(peers.CONFIG, dtype=torch.bfloat16).eval()
    ours = {"griffin fp32": fp32, "griffin bf16": bf16}
    for form in ("int8", "int4"):
        ours[f"griffin {form}"] = quantize(Griffin(peers.CONFIG, dtype=torch.bfloat16), form)
    others = {peers.THEIRS: theirs, peers.THEIRS_BF16: deepcopy(theirs).bfloat16(), peers.GEMMA: peers.gemma()}
    google = peers.google()
    return ours, others if google is None else others | {peers.GOOGLE: google}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32_768], help="of prefill")
    parser.add_argument("--steps", type=int, default=20, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gemma-cpp", type=Path, help="the driver that benchmarks/gemma_cpp builds: decode beside it")
    args = parser.parse_args()
    ours, others = make_models()
    keep_freed_memory()  # as the commands do; all models gain
    for threads in args.threads:
        torch.set_num_threads(threads)
        with torch.no_grad():
            result: dict[str, Any] = {"limits": limits()}
            text = [f"### {threads} thread{'s' if threads > 1 else ''}", _say(result["limits"])]
            if args.only != "prefill":
                result["decode"] = cpu_decode.batches(
                    ours, others, read_memory(), args.steps, args.rounds, args.gemma_cpp
                )
                result["contexts"] = cpu_decode.contexts(ours, args.steps, args.rounds)
                text.append(cpu_decode.table(result["decode"], result["contexts"]))
            if args.only != "decode":
                gemm = result["limits"]["gemm_flop_per_s"]
                result["prefill"] = cpu_prefill.measure(ours, others, gemm, args.lengths, min(3, args.rounds))
                text.append(cpu_prefill.table(result["prefill"]))
        print("\n\n".join(text), flush=True)
        variant = f"{threads}-threads" + (f"-{args.only}" if args.only else "")
        print(timing.save("cpu", {"shape": "110M Griffin", **result}, variant=variant))


def _say(limit: dict[str, float]) -> str:
    return (
        f"Streaming read {limit['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"fp32 matrix products {limit['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s."
    )


if __name__ == "__main__":
    main()
