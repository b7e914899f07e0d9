"""Time of a many-choice task in lm-evaluation-harness: our adapter, and the harness's own transformers model.

    python -m benchmarks.harness MODEL QUESTIONS.jsonl [--questions 50] [--rounds 3] [--shots 0]

QUESTIONS is a file as `griffin eval` reads it ({"ctx", "choices", "label"}). Both answer the same requests on the same
folder, in turn; how far their log-likelihoods are apart is shown too. transformers' model takes as many rows at once,
padded to the longest. With --shots, so many questions with their answers come before each. Needs griffin-lm[eval].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from griffin.eval.choices import Question, read_questions
from griffin.eval.harness import model_class


def requests(questions: list[Question], count: int, shots: int) -> list[Any]:
    from lm_eval.api.instance import Instance

    examples = "".join(f"{context}{its}\n\n" for context, its in (q.pairs[q.label] for q in questions[:shots]))
    pairs = [(examples + context, its) for q in questions[shots : shots + count] for context, its in q.pairs]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions_file", type=Path)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    asked = requests(read_questions(arguments.questions_file) or [], arguments.questions, arguments.shots)
    ours = model_class()(arguments.model, device="cpu", dtype="float32", batch_size=arguments.rows)
    theirs = HFLM(pretrained=arguments.model, device="cpu", dtype="float32", batch_size=arguments.rows)
    answers: dict[str, list[tuple[float, bool]]] = {}
    cpu: dict[str, list[float]] = {"griffin": [], "transformers": []}

    def run(name: str, model: Any) -> Callable[[], None]:
        def answer() -> None:
            began = time.process_time()
            answers[name] = model.loglikelihood(asked, disable_tqdm=True)
            cpu[name].append(time.process_time() - began)

        return answer

    tasks = {"griffin": run("griffin", ours), "transformers": run("transformers", theirs)}
    seconds = timing.interleaved(tasks, rounds=arguments.rounds)
    apart = max(abs(a[0] - b[0]) for a, b in zip(answers["griffin"], answers["transformers"], strict=True))
    lengths = [len(ours.tok_encode(request.args[0])) for request in asked]
    results = {
        "requests": len(asked),
        "mean_context_tokens": sum(lengths) / len(lengths),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": {name: values[1:] for name, values in cpu.items()},
        "log_likelihoods_apart": apart,
    }
    rows = [[name, f"{timing.median(seconds[name]):.2f}", f"{timing.median(cpu[name][1:]):.2f}"] for name in seconds]
    print(timing.table(["", "seconds", "CPU seconds"], rows))
    ratio = timing.median(cpu["transformers"][1:]) / timing.median(cpu["griffin"][1:])
    print(
        f"{len(asked)} requests, {results['mean_context_tokens']:.0f} tokens of context each: {ratio:.2f} times faster"
    )
    print(f"log-likelihoods are at most {apart:.1e} apart (transformers sees one key less beyond the window)")
    if not arguments.no_save:
        print(timing.save("harness", results))


if __name__ == "__main__":
    main()
