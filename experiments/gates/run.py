"""E9. Griffin's appendices A and B: what the gate does to the old state and the new input, and complex recurrences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.experiment import Experiment
from experiments.families import NAMES
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.text import TINY, XXS, Texts, Width, entries, family_config, loss, noise, sweep, text_run, texts
from experiments.verdict import Claim, judge
from griffin.ops import rg_lru

# Fixed before any result.
SIGMAS = 2.0  # of the noise of seeds: a gain of the complex recurrence would be more
DECAYS = (0.5, 0.9, 0.99)  # of figure 7
LINES = ("#0b6e99", "#d9730d", "#448361")
GRID = tuple(index / 20 for index in range(21))  # the gate r
SHOWN = {**NAMES, "complex": "Hawk with complex recurrences"}


@dataclass(frozen=True)
class Size:
    width: Width
    length: int
    rows: int
    steps: int


SIZES = {
    "smoke": Size(TINY, 16, 4, 10),
    "cpu": Size(XXS, 128, 32, 800),
    "gpu": Size(Width(256, 352, 6, 4), 1024, 64, 1600),
}


def run(session: Session) -> None:
    size, data = SIZES[session.scale], texts(session)
    session.total = 1 + 2 * (3 + session.num_seeds)
    session.once("weights", lambda: {"weights": {str(a): weights(a) for a in DECAYS}})
    for family in ("hawk", "complex"):
        rate = sweep(session, lambda rate, f=family: _run(data, size, f, rate, 0, swept=True))
        for seed in range(session.num_seeds):
            session.train(_run(data, size, family, rate, seed))


def _run(data: Texts, size: Size, family: str, rate: float, seed: int, *, swept: bool = False) -> Run:
    return text_run(
        data,
        family_config(family, size.width, size.length // 2),
        key=f"{'sweep ' if swept else ''}{family} lr={rate:g} seed={seed}",
        about={"family": family, "sweep": swept},
        rate=rate,
        seed=seed,
        rows=size.rows,
        length=size.length,
        steps=max(1, size.steps // 4) if swept else size.steps,
    )


def weights(a: float) -> dict[str, list[list[float]]]:
    """Of h_{t-1} and of the input, over the gate: RG-LRU's by our op, a GRU's and Mamba's by the paper's formulas.

    GRU: 1 - r and r. Mamba: (1 - r)^A and (1 - (1 - r)^A) / A, with A = -log a (the paper does not say which).
    """
    r = torch.tensor(GRID, dtype=torch.float64)
    gate = torch.logit(r)[None, None]  # (1, 1, R): a channel for each value of the gate, before its sigmoid
    ones, zeros, opened = torch.ones_like(gate), torch.zeros_like(gate), torch.full_like(gate, 50.0)  # i = 1
    p = torch.full_like(r, math.log(math.expm1(-math.log(a))))  # softplus(p) = -log a; at r = 1 the decay is a^8
    old, _ = rg_lru(zeros, opened, gate, p, ones[:, 0], max_sqrt_gradient=None)
    new, _ = rg_lru(ones, opened, gate, p, zeros[:, 0], max_sqrt_gradient=None)
    A = -math.log(a)
    mamba = (1 - r) ** A
    return {
        "RG-LRU": [_rounded(old), _rounded(new)],
        "GRU": [_rounded(1 - r), _rounded(r)],
        "Mamba": [_rounded(mamba), _rounded((1 - mamba) / A)],
    }


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]


def losses(results: Results) -> dict[str, list[float]]:
    return {family: [loss(entry) for entry in entries(results, family=family)] for family in ("hawk", "complex")}


def verdict(results: Results) -> list[Claim]:
    curves: Mapping[str, Any] = results["runs"].get("weights", {}).get("weights", {})
    kept = {a: (each["RG-LRU"], each["GRU"], each["Mamba"]) for a, each in curves.items()}
    # At r = 0 the state stays as it is and the input is not seen; at r = 1 a^8 of the state is left, the others' is 0.
    holds = None
    if kept:
        holds = all(
            ours[0][0] == 1.0 and ours[1][0] == 0.0 and abs(ours[0][-1] - float(a) ** 8) < 1e-5 and ours[0][-1] > 0
            for a, (ours, _, _) in kept.items()
        ) and all(gru[0][-1] == 0 and mamba[0][-1] == 0 for _, gru, mamba in kept.values())
    found = losses(results)
    there = results["scale"] != "smoke" and all(len(values) >= 3 for values in found.values())
    gain = mean(found["hawk"]) - mean(found["complex"]) if there else None
    sigma = noise(list(found.values()))
    return [
        judge(
            "the gate goes from keeping the state to the LRU's update, and never discards the state",
            "weights by our op: at r = 0 (1, 0), at r = 1 a^8 > 0 of the state; a GRU's and Mamba's end at 0",
            ", ".join(f"a={a}: {ours[0][-1]:.4f}" for a, (ours, _, _) in kept.items()) or "no run yet",
            holds if results["scale"] != "smoke" else None,
        ),
        judge(
            "complex recurrences bring nothing for text",
            f"nats per byte not lower than the real ones' by more than {SIGMAS:g} sigma of seeds",
            "no run yet" if gain is None else f"{-gain:+.4f} (sigma {sigma:.4f})",
            None if gain is None else gain <= SIGMAS * sigma,
        ),
    ]


def show_table(results: Results) -> str:
    rows = [
        [
            SHOWN[family],
            f"{entry['parameters']:,}",
            entry["seed"],
            f"{entry['learning_rate']:g}",
            f"{loss(entry):.4f}",
            f"{entry['cpu_seconds']:.0f}",
        ]
        for family in ("hawk", "complex")
        for entry in entries(results, family=family)
    ]
    return table(["model", "parameters", "seed", "learning rate", "nats per byte", "CPU s"], rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import figure

    curves = results["runs"]["weights"]["weights"]
    with figure(file, "weights of the old state (solid) and of the input (dashed)", columns=len(DECAYS)) as panels:
        for axes, a in zip(panels, DECAYS, strict=True):
            for (name, (old, new)), colour in zip(
                curves[str(a)].items(), ("#0b6e99", "#d9730d", "#448361"), strict=True
            ):
                axes.plot(GRID, old, color=colour, label=name)
                axes.plot(GRID, new, "--", color=colour)
            axes.set_title(f"a = {a}")
            axes.set_xlabel("gate r")


EXPERIMENT = Experiment(
    label="E9",
    question="What does the gate do, and do complex recurrences help?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
