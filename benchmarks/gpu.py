"""Everything there is to measure on a GPU, in one command: checks first, then times beside what the device could do.

    python -m benchmarks.gpu                       # all parts, on the first CUDA device; about 25 minutes
    python -m benchmarks.gpu --only check kernels  # a minute or two
    python -m benchmarks.gpu --small --device cpu  # every line of it at toy sizes, on any machine: figures mean nothing

check    every kernel, forward and gradients, against the definition in fp64; wrong ones end the command with status 1
kernels  kernels over the copy bandwidth measured between them, at B=8, T=2048, R=2560 in bf16; fla and accelerated-scan
         on the same recurrence where they are installed
prefill  the time to the first token, RecurrentGemma 2B's exact shape, prompts of 128 to 32k tokens and 16 together
decode   RecurrentGemma 2B's exact shape with random weights: bf16, int8, int4; contexts; batches, beside a Transformer
peers    transformers' RecurrentGemma, where installed: reading 2048 tokens, decoding, a training step
train    400M and 1.3B, Griffin and the Transformer, 32k tokens a step: time, MFU, memory

Writes results/gpu-DEVICE-DATE.json after every part, and prints Markdown for docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import Any

import torch

from benchmarks import gpu_check, gpu_decode, gpu_kernels, gpu_peers, gpu_prefill, gpu_train, timing
from griffin.ops import device as ops_device

PARTS = {
    "check": gpu_check.measure,
    "kernels": gpu_kernels.measure,
    "prefill": gpu_prefill.measure,
    "decode": gpu_decode.measure,
    "peers": gpu_peers.measure,
    "train": gpu_train.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; all unless given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; try --small --device cpu, which runs the same code at toy sizes")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {"device": name, "kernels_serve": list(ops_device.status(device)), "small": args.small}
    correct = True
    # On a CPU the kernels are interpreted, where TRITON_INTERPRET=1 is set; else the definitions are run.
    on_cpu = device.type != "cuda" and gpu_check.interpreted()
    with ops_device.pretending_cuda() if on_cpu else contextlib.nullcontext():
        for part in args.only:
            print(f"\n## {part}: {name}\n", flush=True)
            result[part], text, good = PARTS[part](device, small=args.small)
            correct &= good
            print(text, flush=True)
            if not args.no_save:
                path = timing.save("gpu", result, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
                print(f"\n{path}", flush=True)
    sys.exit(0 if correct else 1)


if __name__ == "__main__":
    main()
