"""The engine under load: many requests together, a mixed load with a long prompt in it, memory, speculation.

    python -m benchmarks.engine                              # 110M, bf16, two threads; half an hour on two cores
    python -m benchmarks.engine --only together --peers
    python -m benchmarks.engine --only mixed --rate 0.5 --seconds 300 --gap 0.25
    python -m benchmarks.engine --only speculation --model FOLDER     # a trained model, for text that is one
    python -m benchmarks.engine --small                      # a toy, to see that it runs

Random weights unless a folder is given: the 110M Griffin of benchmarks.cpu. Writes a JSON and prints Markdown, for
docs/serving.md.
"""

from __future__ import annotations

import argparse
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, timing
from griffin import PRESETS, Engine, Griffin, Request, Sampling, Tokenizer, load, load_tokenizer
from griffin.infer.handle import Handle
from griffin.memory import keep_freed_memory

GREEDY = Sampling(temperature=0)
JSON = '[{"id": 1, "name": "Anna", "open": true}, {"id": 2, "name": "Bert", "open": true}, {"id": 3, "name": "Carl", '
PROSE = "The sea was calm, and the sky, which had been grey since morning, was clearing. Nobody on the quay had seen "


def ids(count: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (count,), generator=generator).tolist())


def drain(engine: Engine, requests: Sequence[Request]) -> list[Handle]:
    handles = [engine.submit(request, keep_state=False) for request in requests]
    while engine.turn():
        pass
    return handles


def together(
    model: Griffin, tokenizer: Tokenizer, prompts: Sequence[tuple[int, ...]], tokens: int, rounds: int, theirs: Any
) -> dict[str, Any]:
    """All prompts together, one after the other, and transformers' generate on them padded to a batch."""
    asked = [Request(prompt=prompt, max_tokens=tokens, sampling=GREEDY) for prompt in prompts]
    many = Engine(model, tokenizer, slots=len(asked), gap=math.inf)
    one = Engine(model, tokenizer, slots=1, gap=math.inf)
    tasks: dict[str, Callable[[], object]] = {
        "together": lambda: drain(many, asked),
        "one after the other": lambda: [drain(one, [each]) for each in asked],
    }
    if theirs is not None:
        longest = max(map(len, prompts))
        padded = torch.tensor([[*([0] * (longest - len(prompt))), *prompt] for prompt in prompts])
        mask = (padded != 0).long()
        tasks["transformers"] = lambda: theirs.generate(
            padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
    seconds = {name: min(each) for name, each in timing.interleaved(tasks, rounds=rounds).items()}
    made = len(asked) * tokens
    return {
        "prompts": [len(prompt) for prompt in prompts],
        "tokens_each": tokens,
        "tokens_per_s": {name: made / each for name, each in seconds.items()},
        "over": {name: each / seconds["together"] for name, each in seconds.items()},
    }


class Watch:
    """When the pieces of a request came."""

    def __init__(self, handle: Handle) -> None:
        self.begun, self.times = time.perf_counter(), list[float]()
        self.ended = threading.Event()
        handle.add_listener(self._see)

    def _see(self, piece: Any) -> None:
        self.times.append(time.perf_counter())
        if piece.finish_reason is not None:
            self.ended.set()


def mixed(
    model: Griffin, tokenizer: Tokenizer, *, rate: float, seconds: float, gap: float, most: int, long: int | None
) -> dict[str, Any]:
    """Poisson arrivals of prompts of 20 to `most` tokens and answers of 16 to 64; after a third, one of `long`."""
    dice, V = random.Random(0), model.config.vocab_size
    engine = Engine(model, tokenizer, slots=16, gap=gap, max_queue=1000, max_queue_tokens=10**9)
    engine.start()
    watched: list[Watch] = []
    began, late = time.perf_counter(), None
    at = 0.0
    while (at := at + dice.expovariate(rate)) < seconds:
        if long is not None and late is None and at > seconds / 3:
            late = Watch(engine.submit(Request(prompt=ids(long, V, 1), max_tokens=16, sampling=GREEDY)))
        time.sleep(max(0.0, began + at - time.perf_counter()))
        length = round(math.exp(dice.uniform(math.log(20), math.log(most))))
        request = Request(prompt=ids(length, V, length), max_tokens=dice.randint(16, 64), sampling=GREEDY)
        watched.append(Watch(engine.submit(request, keep_state=False)))
    for watch in [*watched, *([] if late is None else [late])]:
        watch.ended.wait()
    engine.close()
    first = [watch.times[0] - watch.begun for watch in watched]
    gaps = [b - a for watch in watched for a, b in zip(watch.times, watch.times[1:], strict=False)]
    return {
        "long_prompt": long,
        "requests": len(watched),
        "rate_per_s": rate,
        "gap_bound_s": gap,
        "first_token_s": quantiles(first),
        "gap_s": quantiles(gaps),
        "long_first_token_s": None if late is None else late.times[0] - late.begun,
        "stats": {name: getattr(engine.stats(), name) for name in ("tokens_read", "tokens_generated", "turns")},
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {name: ranked[min(len(ranked) - 1, int(p * len(ranked)))] for name, p in (("p50", 0.5), ("p99", 0.99))}


def memory(model: Griffin, tokenizer: Tokenizer, tokens: int, requests: int) -> dict[str, Any]:
    """Resident bytes after a tenth of so many tokens, and of so many requests, and at the end."""
    engine = Engine(model, tokenizer, slots=8, max_queue=64)
    found = {}
    handle = engine.submit(Request(prompt=(5, 6), max_tokens=tokens, sampling=GREEDY), keep_state=False)
    handle.add_listener(lambda _: None)
    for name, until in (("tokens, a tenth", tokens // 10), ("tokens, all", tokens)):
        while not handle.done and engine.stats().tokens_generated < until:
            engine.turn()
        found[name] = resident_bytes()
    for name, count in (("requests, a tenth", requests // 10), ("requests, all", requests - requests // 10)):
        for _ in range(0, count, 64):
            drain(engine, [Request(prompt=(5, 6), max_tokens=2, sampling=GREEDY)] * 64)
        found[name] = resident_bytes()
    return {"tokens": tokens, "requests": requests, "resident_bytes": found, "slots": engine.describe()}


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def speculation(model: Griffin, tokenizer: Tokenizer, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of one request with guesses and without, on text that repeats itself and on prose."""
    found = []
    for name, text in (("a JSON list", JSON * 3), ("prose", PROSE)):
        asked = Request(prompt=tuple(tokenizer.encode(text)), max_tokens=tokens, sampling=GREEDY)
        engines = {flag: Engine(model, tokenizer, slots=1, speculate=flag, gap=math.inf) for flag in (False, True)}
        tasks = {str(flag): partial(drain, engine, [asked]) for flag, engine in engines.items()}
        seconds = {key: min(each) for key, each in timing.interleaved(tasks, rounds=rounds).items()}
        stats = engines[True].stats()
        same = [drain(engine, [asked])[0].completion().tokens for engine in engines.values()]
        found.append(
            {
                "text": name,
                "tokens_per_s": {key: tokens / each for key, each in seconds.items()},
                "ratio": seconds["False"] / seconds["True"],
                "guessed": stats.tokens_guessed,
                "accepted": stats.tokens_accepted,
                "same_tokens": same[0] == same[1],
            }
        )
    return found


def report(result: dict[str, Any]) -> str:
    lines = []
    if (part := result.get("together")) is not None:
        rows = [[name, f"{part['tokens_per_s'][name]:.1f}", f"{over:.2f}"] for name, over in part["over"].items()]
        lines.append(timing.table(["16 requests", "tokens/s", "times as long as together"], rows))
    if (parts := result.get("mixed")) is not None:
        rows = [
            [
                str(each["long_prompt"] or "none"),
                *(f"{each[key][p]:.3f}" for key in ("first_token_s", "gap_s") for p in ("p50", "p99")),
            ]
            for each in parts
        ]
        lines.append(timing.table(["long prompt", "first p50 s", "first p99 s", "gap p50 s", "gap p99 s"], rows))
    if (part := result.get("memory")) is not None:
        rows = [[name, f"{value:,}"] for name, value in part["resident_bytes"].items()]
        lines.append(timing.table(["resident after", "bytes"], rows))
    if (parts := result.get("speculation")) is not None:
        rows = [
            [
                each["text"],
                *(f"{each['tokens_per_s'][key]:.1f}" for key in ("False", "True")),
                f"{each['ratio']:.2f}",
                f"{each['accepted']} of {each['guessed']}",
                str(each["same_tokens"]),
            ]
            for each in parts
        ]
        lines.append(timing.table(["text", "tokens/s", "with guesses", "ratio", "right", "same tokens"], rows))
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["together", "mixed", "memory", "speculation"])
    parser.add_argument("--model", type=Path, help="a model folder instead of random weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.5, help="arrivals a second of the mixed load")
    parser.add_argument("--seconds", type=float, default=240.0, help="of the mixed load, each time")
    parser.add_argument("--gap", type=float, default=0.25)
    parser.add_argument("--peers", action="store_true", help="transformers too")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    dtype, tokenizer, small = getattr(torch, args.dtype), Tokenizer.bytes(), args.small
    theirs = None
    if args.model is not None:
        model, tokenizer = load(args.model, dtype=dtype), load_tokenizer(args.model)
    elif small:
        model = Griffin(replace(PRESETS["griffin-tiny"]), dtype=dtype).eval()
    else:
        model = Griffin(peers.CONFIG, dtype=dtype).eval()
        theirs = peers.twins()[1].to(dtype) if args.peers else None
    result: dict[str, Any] = {"dtype": args.dtype, "model": str(args.model or ("toy" if small else "110M, random"))}
    wanted = [args.only] if args.only else ["together", "mixed", "memory", "speculation"]
    if "together" in wanted:
        lengths = [20 + 12 * index for index in range(16)]
        prompts = [ids(length, model.config.vocab_size, length) for length in lengths]
        result["together"] = together(model, tokenizer, prompts, 8 if small else 128, args.rounds, theirs)
    if "mixed" in wanted:
        load_of = {"rate": 20.0, "seconds": 1.5} if small else {"rate": args.rate, "seconds": args.seconds}
        result["mixed"] = [
            mixed(model, tokenizer, gap=args.gap, most=60 if small else 4000, long=long, **load_of)
            for long in (None, 500 if small else 32_768)
        ]
    if "memory" in wanted:
        result["memory"] = memory(model, tokenizer, *((200, 128) if small else (100_000, 100_000)))
    if "speculation" in wanted:
        result["speculation"] = speculation(model, tokenizer, 40 if small else 256, args.rounds)
    print(report(result))
    if not args.no_save:
        print(timing.save("engine", result, "small" if small else args.dtype))


if __name__ == "__main__":
    main()
