"""E4. Griffin's figure 1a: held-out loss against training compute, for three families and three sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.experiment import Experiment
from experiments.families import NAMES, matched
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.text import (
    S0,
    TINY,
    XS,
    XXS,
    Texts,
    Width,
    entries,
    family_config,
    loss,
    noise,
    scaled,
    sweep,
    text_run,
    texts,
)
from experiments.verdict import Claim, Outcome, judge
from griffin.train.flops import flops_per_token

# Fixed before any result.
STRAIGHT = 0.98  # R^2 of log loss over log compute
HAWK_NEAR = 0.05  # nats per byte above the Transformer, at most
SIGMAS = 2.0  # of the noise of seeds: smaller differences are none
TOKENS_PER_PARAMETER = 20  # without the embedding
FAMILIES = ("griffin", "hawk", "transformer", "matched")  # matched: the Transformer with as many parameters as Griffin
SHOWN = {**NAMES, "matched": "Transformer, parameters matched"}


@dataclass(frozen=True)
class Size:
    widths: tuple[Width, ...]
    length: int
    rows: int
    sweep_steps: int
    steps: int | None  # None: by TOKENS_PER_PARAMETER


SIZES = {
    "smoke": Size((TINY,), 32, 4, 10, 20),
    "cpu": Size((XXS, XS, S0), 256, 16, 300, None),
    "gpu": Size((Width(256, 352, 6, 4), Width(384, 512, 9, 6), Width(512, 704, 12, 8)), 1024, 64, 500, None),
}


def run(session: Session) -> None:
    size = SIZES[session.scale]
    data = texts(session)
    session.total = len(FAMILIES) * (3 + len(size.widths) * session.num_seeds)
    for family in FAMILIES:
        rate = sweep(session, lambda rate, f=family: _run(data, size, f, size.widths[0], rate, 0, swept=True))
        session.say(f"{family}: learning rate {rate:g} at width {size.widths[0].width}")
        for seed in range(session.num_seeds):
            for width in size.widths:
                session.train(_run(data, size, family, width, scaled(rate, size.widths[0], width), seed))


def _run(data: Texts, size: Size, family: str, width: Width, rate: float, seed: int, *, swept: bool = False) -> Run:
    griffin = family_config("griffin", width, size.length // 2)
    model = family_config("transformer" if family == "matched" else family, width, size.length // 2)
    model = matched(model, griffin.num_parameters()) if family == "matched" else model
    inner = model.num_parameters() - model.vocab_size * model.width
    steps = size.steps or math.ceil(TOKENS_PER_PARAMETER * inner / (size.rows * size.length))
    steps = size.sweep_steps if swept else steps
    flops = flops_per_token(model, size.length) * steps * size.rows * size.length
    about = {"family": family, "width": width.width, "sweep": swept, "flops": float(f"{flops:.4g}")}
    key = f"{'sweep ' if swept else ''}{family} width={width.width} lr={rate:g} seed={seed}"
    return text_run(
        data,
        model,
        key=key,
        about=about,
        rate=rate,
        seed=seed,
        rows=size.rows,
        length=size.length,
        steps=steps,
    )


def losses(results: Results) -> dict[str, dict[int, list[float]]]:
    """By family and width, one for each seed."""
    widths = [width.width for width in SIZES[results["scale"]].widths]
    return {
        family: {width: [loss(entry) for entry in entries(results, family=family, width=width)] for width in widths}
        for family in FAMILIES
    }


def straightness(points: Mapping[float, float]) -> float:
    """R^2 of log loss over log compute."""
    x, y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (points.keys(), points.values()))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)


def points(results: Results, family: str) -> dict[float, float]:
    """Compute to mean loss."""
    found: dict[float, list[float]] = {}
    for entry in entries(results, family=family):
        found.setdefault(entry["flops"], []).append(loss(entry))
    return {flops: mean(values) for flops, values in sorted(found.items())}


def verdict(results: Results) -> list[Claim]:
    found = losses(results)
    there = results["scale"] != "smoke" and all(len(v) >= 3 for by_width in found.values() for v in by_width.values())
    claims = []
    for family in FAMILIES:
        line = straightness(points(results, family)) if there else None
        claims.append(
            judge(
                f"{SHOWN[family]}: loss is a power of compute",
                f"R^2 of log loss over log compute, three sizes: above {STRAIGHT}",
                "no run yet" if line is None else f"{line:.4f}",
                None if line is None else line > STRAIGHT,
            )
        )
    sigma = noise([values for by_width in found.values() for values in by_width.values()])
    for other in ("transformer", "matched"):
        gaps = {w: mean(found["griffin"][w]) - mean(found[other][w]) for w in found["griffin"]} if there else {}
        outcome: Outcome = "not run yet"
        if gaps:
            clear = all(gap < -SIGMAS * sigma for gap in gaps.values())
            worse = any(gap > SIGMAS * sigma for gap in gaps.values())
            outcome = "reproduced" if clear else "not reproduced" if worse else "not testable at this scale"
        shown = ", ".join(f"{gap:+.4f} at width {width}" for width, gap in gaps.items())
        claims.append(
            Claim(
                text=f"Griffin's loss is below the {SHOWN[other]}'s",
                threshold=f"at every size by more than {SIGMAS:g} sigma of seeds; within that it matches, unresolved",
                measured=f"{shown} nats (sigma {sigma:.4f})" if gaps else "no run yet",
                outcome=outcome,
            )
        )
    gaps = {w: mean(found["hawk"][w]) - mean(found["transformer"][w]) for w in found["hawk"]} if there else {}
    values = list(gaps.values())
    claims.append(
        judge(
            "Hawk is close to the Transformer, and the gap does not grow with compute",
            f"at most {HAWK_NEAR} nats above it at every size; at the largest no more than at the smallest + 2 sigma",
            ", ".join(f"{gap:+.4f} at width {width}" for width, gap in gaps.items()) or "no run yet",
            max(values) <= HAWK_NEAR and values[-1] <= values[0] + SIGMAS * sigma if values else None,
        )
    )
    return claims


def show_table(results: Results) -> str:
    rows = [
        [
            SHOWN[entry["family"]],
            entry["width"],
            f"{entry['parameters'] - entry['embedding']:,}",
            f"{entry['tokens'] / 1e6:.1f}M",
            f"{entry['flops']:.2e}",
            entry["seed"],
            f"{entry['learning_rate']:g}",
            f"{loss(entry):.4f}",
            f"{entry['cpu_seconds']:.0f}",
        ]
        for family in FAMILIES
        for entry in entries(results, family=family)
    ]
    header = ["model", "width", "parameters, no embedding", "tokens", "FLOPs", "seed", "rate", "nats per byte", "CPU s"]
    return table(header, rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    colours: dict[str, Any] = {**COLOURS, "matched": COLOURS["nope"]}
    with figure(file, "loss against training compute") as axes:
        for family in FAMILIES:
            each = points(results, family)
            axes.plot(list(each), list(each.values()), color=colours[family], marker="o", label=SHOWN[family])
            for entry in entries(results, family=family):
                axes.plot(entry["flops"], loss(entry), ".", color=colours[family], alpha=0.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs of training")
        axes.set_ylabel("nats per byte, held out")


EXPERIMENT = Experiment(
    label="E4",
    question="How does held-out loss fall with compute, for each family?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
