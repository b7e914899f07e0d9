"""From results to what is read: plots, each README's results, docs/experiments.md's summary."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.experiment import Experiment, load, names
from experiments.markdown import table
from experiments.results import FOLDER, Results, read_results, results_file
from experiments.verdict import overall
from griffin.files import whole_file

DOCUMENT = FOLDER.parent / "docs" / "experiments.md"
SCALES = ("cpu", "gpu")  # smoke shows nothing
_BLOCK = re.compile(
    r"(<!-- results: begin, written by `griffin experiment --docs` -->\n).*?(<!-- results: end -->)", re.S
)


def draw(experiment: Experiment, results: Results, folder: Path) -> None:
    experiment.plot(results, folder / f"figure-{results['scale']}.png")


def rewrite_documents() -> list[Path]:
    """Put the results into every README and into docs/experiments.md; give the files that changed."""
    changed = []
    for path, text in documents().items():
        if path.read_text(encoding="utf-8") != text:
            with whole_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def documents() -> Mapping[Path, str]:
    """Each document as it should read, by the results that are there now."""
    texts = {FOLDER / name / "README.md": readme(name) for name in names()}
    return texts | {DOCUMENT: _with_block(DOCUMENT, summary())}


def readme(name: str) -> str:
    experiment, parts = load(name), []
    for scale in SCALES:
        if not (file := results_file(name, scale)).exists():
            continue
        results = read_results(file, name, scale)
        claims = [[claim.text, claim.threshold, claim.measured, claim.outcome] for claim in experiment.verdict(results)]
        parts += [
            f"## Results, {scale} scale",
            f"`{results['command']}`: {where(results)}.",
            experiment.table(results),
            f"![{experiment.question}](figure-{scale}.png)",
            table(["claim", "threshold", "measured", "verdict"], claims),
        ]
    return _with_block(FOLDER / name / "README.md", "\n\n".join(parts or ["Not run yet."]))


def summary() -> str:
    """One line for each experiment, and one for each claim."""
    runs, claims = [], []
    for name in names():
        experiment = load(name)
        scales = [scale for scale in SCALES if results_file(name, scale).exists()] or ["cpu"]
        for scale in scales:
            results = read_results(results_file(name, scale), name, scale)
            judged = experiment.verdict(results)
            link = f"[{experiment.label}](../experiments/{name}/README.md)"
            command = f"`{results.get('command', f'griffin experiment {name} --scale {scale}')}`"
            runs.append([link, experiment.question, command, where(results), overall(judged)])
            claims += [
                [experiment.label, scale, each.text, each.threshold, each.measured, each.outcome] for each in judged
            ]
    return "\n\n".join(
        [
            table(["", "question", "command", "device, seeds, time", "verdict"], runs),
            "Claim by claim:",
            table(["", "scale", "claim", "threshold", "measured", "verdict"], claims),
        ]
    )


def where(results: Results) -> str:
    """Device, seeds and hours of the runs in the results."""
    runs: list[dict[str, Any]] = list(results["runs"].values())
    if not runs:
        return "not run yet"
    origins = [run["from"] for run in runs]
    devices = sorted(
        {f"{origin['device']}, {origin['threads']} thread{'s' * (origin['threads'] > 1)}" for origin in origins}
    )
    seeds = sorted({run["seed"] for run in runs if "seed" in run})
    dates = sorted({origin["date"] for origin in origins})
    commits = list(dict.fromkeys(origin["commit"] for origin in origins))
    seconds = sum(run.get("cpu_seconds", 0.0) for run in runs)
    parts = [
        "; ".join(devices),
        *([f"seeds {', '.join(map(str, seeds))}"] if seeds else []),
        f"{seconds / 3600:.2f} hours of one core's time in {len(runs)} runs",
        f"torch {origins[-1]['torch']}",
        " to ".join(dict.fromkeys([dates[0], dates[-1]])),
        f"commit {', '.join(commits)}",
    ]
    return ", ".join(parts)


def _with_block(path: Path, block: str) -> str:
    text, count = _BLOCK.subn(lambda match: f"{match[1]}\n{block}\n\n{match[2]}", path.read_text(encoding="utf-8"))
    assert count == 1, f"{path} has {count} places for results"
    return text
