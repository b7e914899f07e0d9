"""Memory and speed of preparing one .txt of made-up words, on lines and on one line, for bytes and for a BPE.

    python -m benchmarks.prepare [--megabytes 500] [--tokenizers bytes bpe:2048] [--kinds lines "one line"]

Each case is a process of its own. Speed is of all that `griffin train` does before its first step: checksum, the place
of the validation text, learning the vocabulary, tokenising, checking. Seconds of CPU are beside those of the clock,
which other work on the machine lengthens. Peak memory is of the whole process, PyTorch's 250 MB included.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import timing
from griffin.data.prepare import prepare

ENDS = {"lines": "\n", "one line": " "}
SHOWN = ("megabytes", "peak_megabytes", "megabytes_per_s", "megabytes_per_cpu_s")


def write_words(file: Path, megabytes: float, end: str) -> None:
    randomly = random.Random(0)
    words = ["".join(randomly.choices("abcdefghij", k=randomly.randint(2, 9))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < megabytes * 1e6:
            out.write("".join(" ".join(randomly.choices(words, k=12)) + end for _ in range(1000)))


def measure(file: Path, tokenizer: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        data = prepare(file, Path(folder) / "data", tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
    megabytes = file.stat().st_size / 1e6
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "megabytes": megabytes,
        "tokens": data.train.meta.num_tokens + data.validation.meta.num_tokens,
        "peak_megabytes": timing.peak_bytes() / 1e6,
        "megabytes_per_s": megabytes / seconds,
        "megabytes_per_cpu_s": megabytes / used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "bpe:2048"])
    parser.add_argument("--kinds", nargs="+", default=list(ENDS), choices=list(ENDS))
    parser.add_argument("--variant", default="", help="in the name of the result's file")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(Path(args.alone[0]), args.alone[1])))
        return
    found = []
    print("| text | tokenizer | MB | peak, MB | MB/s | MB per s of CPU |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            write_words(file := Path(folder) / "words.txt", args.megabytes, ENDS[kind])
            for tokenizer in args.tokenizers:
                command = [sys.executable, "-m", "benchmarks.prepare", "--alone", str(file), tokenizer]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                case = {"text": kind, "tokenizer": tokenizer, **json.loads(done.stdout)}
                numbers = (
                    case[key] for key in ("megabytes", "peak_megabytes", "megabytes_per_s", "megabytes_per_cpu_s")
                )
                print(
                    f"| {kind} | {tokenizer} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |", flush=True
                )
                found.append(case)
    print(timing.save("prepare", {"cases": found}, args.variant))


if __name__ == "__main__":
    main()
