"""Results on disk: one JSON file per experiment and scale, whole after every run that ends."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import griffin
from griffin.files import whole_file

FOLDER = Path(__file__).parent
Results = dict[str, Any]


def results_file(name: str, scale: str) -> Path:
    return FOLDER / name / f"results-{scale}.json"


def read_results(file: Path, name: str, scale: str) -> Results:
    """The file's results; of no file, no runs."""
    if not file.exists():
        return {"experiment": name, "scale": scale, "runs": {}}
    return json.loads(file.read_text(encoding="utf-8"))


def write_results(file: Path, results: Mapping[str, Any]) -> None:
    """Write a file that is easy on a diff: one line for each innermost object."""
    text = json.dumps(results, indent=1, sort_keys=True)
    short = re.sub(r"\{[^{}\[\]]*\}", lambda found: " ".join(found[0].split()), text)
    with whole_file(file) as temporary:
        temporary.write_text(short + "\n", encoding="utf-8")


def provenance() -> dict[str, Any]:
    """What a reader needs to judge a run, and to repeat it."""
    return {
        "commit": _git("rev-parse", "--short=10", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": _device(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "griffin": griffin.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
