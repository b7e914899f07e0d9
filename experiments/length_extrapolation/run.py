"""E5. Griffin's figure 5: loss by position in long texts, far beyond the length of the rows trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.experiment import Experiment
from experiments.families import NAMES
from experiments.length_extrapolation.passed_states import PassedStates
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.text import RATES, TINY, XS, Texts, Width, entries, family_config, scaled, text_run, texts
from experiments.verdict import Claim, judge
from griffin import checkpoint
from griffin.data.shards import open_shard
from griffin.data.text import read_parts, text_files
from griffin.errors import GriffinError
from griffin.score import token_logprobs
from griffin.train.snapshot import latest

# Fixed before any result, in nats per byte. T: the length of the rows trained on.
RISES = 0.3  # the Transformers, some bucket from 2 T on over the bucket T/2 .. T: more than
HOLDS = 0.01  # Griffin and Hawk, the bucket 4 T .. 8 T over T/2 .. T: at most
FAMILIES = ("griffin", "hawk", "transformer", "nope")
LONGER = {"griffin 4T": "griffin", "hawk 4T": "hawk"}  # trained on rows four times as long, as many tokens
SHOWN = {**NAMES, "nope": "Transformer without positions", "griffin 4T": "Griffin, 4 T", "hawk 4T": "Hawk, 4 T"}
SHOWN |= {"griffin cured": "Griffin, states passed on", "hawk cured": "Hawk, states passed on"}
# The cure of arXiv:2507.02782, beside the plain verdict: more steps, from states that earlier rows left.
CURED = {"griffin cured": "griffin", "hawk cured": "hawk"}
RATE = RATES[1]  # E4's sweep decides; until it has run, its middle


@dataclass(frozen=True)
class Size:
    width: Width
    length: int
    rows: int
    steps: int
    cure_steps: int
    documents: int
    reach: int  # positions tested, in T


SIZES = {
    "smoke": Size(TINY, 32, 4, 20, 5, 4, 16),
    "cpu": Size(XS, 128, 32, 1600, 300, 256, 16),
    "gpu": Size(Width(256, 352, 6, 4), 512, 128, 1600, 500, 256, 16),
}


def run(session: Session) -> None:
    size, data = SIZES[session.scale], texts(session)
    session.total = (len(FAMILIES) + len(LONGER) + len(CURED)) * session.num_seeds
    for seed in range(session.num_seeds):
        for name in (*FAMILIES, *LONGER):
            each = _run(data, size, name, seed)
            session.train(each, lambda folder: {"positions": by_position(folder, size, data)})
        for name in CURED:
            each = _cure(session, data, size, name, seed)
            session.train(each, lambda folder: {"positions": by_position(folder, size, data)})


def _run(data: Texts, size: Size, name: str, seed: int) -> Run:
    times = 4 if name in LONGER else 1
    model = family_config(LONGER.get(name, name), size.width, size.length // 2)
    return text_run(
        data,
        model,
        key=f"{name} seed={seed}",
        about={"family": name},
        rate=scaled(RATE, XS, size.width),
        seed=seed,
        rows=size.rows // times,
        length=size.length * times,
        steps=size.steps,
    )


def _cure(session: Session, data: Texts, size: Size, name: str, seed: int) -> Run:
    """Go on from the plain run, at a tenth of its rate."""
    before = latest(session.folder(f"{CURED[name]} seed={seed}"))
    if before is None:
        raise GriffinError(f"the checkpoint of {CURED[name]} seed={seed} is gone: remove it from the results as well")
    return text_run(
        data,
        family_config(CURED[name], size.width, size.length // 2),
        key=f"{name} seed={seed}",
        about={"family": name},
        rate=scaled(RATE / 10, XS, size.width),
        seed=seed,
        rows=size.rows,
        length=size.length,
        steps=size.cure_steps,
        init_from=before,
        objective=PassedStates(),
    )


@torch.no_grad()
def by_position(folder: Path, size: Size, data: Texts) -> dict[str, float]:
    """Mean nats of a byte in each bucket of positions 2^k .. 2^(k+1) - 1, over documents of reach * T bytes."""
    model, sums, counts = checkpoint.load(folder), defaultdict(float), defaultdict(int)
    for ids in _documents(size, data):
        tokens = torch.tensor([ids])
        logprobs, _ = token_logprobs(model, model(tokens[:, :-1])[0], tokens[0, 1:])
        first = 1
        while first < len(ids):
            its = -logprobs[first - 1 : 2 * first - 1]  # of the tokens at positions first .. 2 first - 1
            sums[first] += float(its.double().sum())
            counts[first] += len(its)
            first *= 2
    return {str(first): round(sums[first] / counts[first], 5) for first in sums}


def _documents(size: Size, data: Texts) -> Iterator[list[int]]:
    """Stretches of the long texts, or of the held-out one, each a document of its own: 257 begins it."""
    count = size.length * size.reach
    if data.long is None:
        shard = open_shard(data.validation)
        text = bytes(id_ for id_ in shard.tokens[:].tolist() if id_ < 256)
    else:
        text = b"".join(part.text.encode() for part in read_parts(text_files(data.long)))
    step = max(count, len(text) // size.documents)
    for start in range(0, min(len(text) - count, step * size.documents), step):
        yield [256, *text[start : start + count]]


def at(results: Results, name: str, bucket: int) -> float | None:
    """Median over seeds."""
    values = [entry["positions"].get(str(bucket)) for entry in entries(results, family=name)]
    return median(values) if values and None not in values else None


def verdict(results: Results) -> list[Claim]:
    size = SIZES[results["scale"]]
    T, names = size.length, (*FAMILIES, *LONGER)
    there = results["scale"] != "smoke" and all(len(entries(results, family=name)) >= 3 for name in names)
    claims = []

    def value(name: str, bucket: int) -> float:
        found = at(results, name, bucket)
        assert found is not None
        return found

    for name in ("transformer", "nope"):
        far = [2 * T * 2**k for k in range(10) if 2 * T * 2**k < size.reach * T]
        rise = max(value(name, bucket) for bucket in far) - value(name, T // 2) if there else None
        claims.append(
            judge(
                f"the {SHOWN[name]} fails beyond its training length",
                f"nats per byte rise by more than {RISES} somewhere from 2 T on",
                "no run yet" if rise is None else f"{rise:+.3f}",
                None if rise is None else rise > RISES,
            )
        )
    for name in ("griffin", "hawk"):
        rise = value(name, 4 * T) - value(name, T // 2) if there else None
        claims.append(
            judge(
                f"{SHOWN[name]} goes on at four times its training length",
                f"nats per byte at 4 T .. 8 T at most {HOLDS} above those at T/2 .. T",
                "no run yet" if rise is None else f"{rise:+.4f}",
                None if rise is None else rise <= HOLDS,
            )
        )
        far = value(f"{name} 4T", 4 * T) - value(name, 4 * T) if there else None
        near = value(f"{name} 4T", T // 4) - value(name, T // 4) if there else None
        claims.append(
            judge(
                f"{SHOWN[name]} trained on rows of 4 T is better far out and not near",
                "nats per byte: less at 4 T .. 8 T, not less at T/4 .. T/2",
                "no run yet" if far is None else f"{far:+.4f} far, {near:+.4f} near",
                None if far is None or near is None else far < 0 <= near,
            )
        )
    for name, plain in CURED.items():
        done = there and len(entries(results, family=name)) >= 3
        rise = value(name, 4 * T) - value(plain, T // 2) if done else None
        claims.append(
            judge(
                f"variation: {SHOWN[name]}, goes on at four times its training length",
                f"as plain {SHOWN[plain]}: at 4 T .. 8 T at most {HOLDS} above the plain run's T/2 .. T",
                "no run yet" if rise is None else f"{rise:+.4f}",
                None if rise is None else rise <= HOLDS,
                variation=True,
            )
        )
    return claims


def show_table(results: Results) -> str:
    buckets = [str(2**k) for k in range(20) if 2**k < SIZES[results["scale"]].length * SIZES[results["scale"]].reach]
    rows = [
        [SHOWN[name], entry["seed"], f"{entry['parameters']:,}"]
        + [f"{entry['positions'][bucket]:.3f}" for bucket in buckets[4:]]
        + [f"{entry['cpu_seconds']:.0f}"]
        for name in (*FAMILIES, *LONGER, *CURED)
        for entry in entries(results, family=name)
    ]
    return table(["nats per byte from position", "seed", "parameters", *buckets[4:], "CPU s"], rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    size = SIZES[results["scale"]]
    with figure(file, f"loss by position, trained on rows of {size.length}") as axes:
        for name in (*FAMILIES, *LONGER, *CURED):
            found: list[dict[str, Any]] = entries(results, family=name)
            for index, entry in enumerate(found):
                each = sorted((int(bucket), value) for bucket, value in entry["positions"].items() if int(bucket) >= 8)
                style = "--" if name in LONGER else ":" if name in CURED else "-"
                colour = COLOURS[(LONGER | CURED).get(name, name)]
                axes.plot(*zip(*each, strict=True), style, color=colour, label=SHOWN[name] if index == 0 else None)
        axes.axvline(size.length, color="grey", linestyle=":", label="training length")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("position")
        axes.set_ylabel("nats per byte")


EXPERIMENT = Experiment(
    label="E5",
    question="What remains of a language model beyond the length of the rows it was trained on?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
