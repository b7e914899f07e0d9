"""E8. Griffin's figure 9: a small window beside recurrences, against global and against local attention alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from experiments.experiment import Experiment
from experiments.families import NAMES
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.text import RATES, TINY, XS, Texts, Width, entries, family_config, loss, scaled, text_run, texts
from experiments.verdict import Claim, judge

# Fixed before any result: the order, and that Griffin's lead shrinks from the shortest rows to the longest.
FAMILIES = ("griffin", "transformer", "local")
SHOWN = {**NAMES, "local": "Transformer, local attention"}
RATE = RATES[1]


@dataclass(frozen=True)
class Size:
    width: Width
    window: int
    lengths: tuple[int, ...]
    tokens: int  # of a step
    steps: int


SIZES = {
    "smoke": Size(TINY, 8, (32, 64), 128, 20),
    "cpu": Size(XS, 64, (128, 256, 512), 4096, 1600),
    "gpu": Size(Width(256, 352, 6, 4), 256, (512, 1024, 2048), 65_536, 1600),
}


def run(session: Session) -> None:
    size, data = SIZES[session.scale], texts(session)
    session.total = len(FAMILIES) * len(size.lengths) * session.num_seeds
    for seed in range(session.num_seeds):
        for length in size.lengths:
            for family in FAMILIES:
                session.train(_run(data, size, family, length, seed))


def _run(data: Texts, size: Size, family: str, length: int, seed: int) -> Run:
    return text_run(
        data,
        family_config(family, size.width, size.window),
        key=f"{family} T={length} seed={seed}",
        about={"family": family},
        rate=scaled(RATE, XS, size.width),
        seed=seed,
        rows=size.tokens // length,
        length=length,
        steps=size.steps,
    )


def losses(results: Results) -> dict[str, dict[int, list[float]]]:
    lengths = SIZES[results["scale"]].lengths
    return {
        family: {
            length: [loss(entry) for entry in entries(results, family=family, length=length)] for length in lengths
        }
        for family in FAMILIES
    }


def verdict(results: Results) -> list[Claim]:
    found, lengths = losses(results), SIZES[results["scale"]].lengths
    there = results["scale"] != "smoke" and all(len(v) >= 3 for each in found.values() for v in each.values())
    means = {family: {length: mean(v) for length, v in each.items()} for family, each in found.items()} if there else {}

    def order(better: str, worse: str) -> Claim:
        gaps = {length: means[worse][length] - means[better][length] for length in lengths} if there else {}
        return judge(
            f"{SHOWN[better]} with a window of {SIZES[results['scale']].window} is no worse than {SHOWN[worse]}"
            if better == "griffin"
            else f"{SHOWN[better]}, global, is better than {SHOWN[worse]}",
            f"nats per byte {'<=' if better == 'griffin' else '<'} at every length",
            ", ".join(f"{-gap:+.4f} at T={length}" for length, gap in gaps.items()) or "no run yet",
            all(gap >= 0 if better == "griffin" else gap > 0 for gap in gaps.values()) if gaps else None,
        )

    lead = [means["transformer"][length] - means["griffin"][length] for length in lengths] if there else []
    return [
        order("griffin", "transformer"),
        order("transformer", "local"),
        judge(
            "Griffin's lead over global attention shrinks as rows grow",
            f"nats per byte at T={lengths[-1]} less ahead than at T={lengths[0]}",
            ", ".join(f"{each:+.4f}" for each in lead) or "no run yet",
            lead[-1] < lead[0] if lead else None,
        ),
    ]


def show_table(results: Results) -> str:
    lengths = SIZES[results["scale"]].lengths
    rows = [
        [SHOWN[family], *(", ".join(f"{value:.4f}" for value in each[length]) for length in lengths)]
        for family, each in losses(results).items()
    ]
    return table(["nats per byte, each seed", *(f"T={length}" for length in lengths)], rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    colours = {**COLOURS, "local": COLOURS["nope"]}
    with figure(file, "loss against the length of rows, as many tokens") as axes:
        for family, each in losses(results).items():
            there = {length: values for length, values in each.items() if values}
            axes.plot(
                list(there), [mean(v) for v in there.values()], color=colours[family], marker="o", label=SHOWN[family]
            )
            for length, values in there.items():
                axes.plot([length] * len(values), values, ".", color=colours[family], alpha=0.6)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of a row")
        axes.set_ylabel("nats per byte, held out")


EXPERIMENT = Experiment(
    label="E8",
    question="What does a small window of attention give beside recurrences?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
