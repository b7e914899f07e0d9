"""The documentation site builds without a warning, its commands exist, and the files of a release agree."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import griffin
from griffin.cli.app import invoke

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md"]


def test_the_site_builds_with_warnings_as_errors(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make docs installs it: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reference = (tmp_path / "site" / "api.html").read_text()
    assert all(f'id="griffin{name.lower()}"' in reference for name in griffin.__all__)
    assert "Not described here" not in reference


def commands() -> list[str]:
    """Lines of shell blocks that call griffin, without their comments."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S):
            found += [
                line.split("  #")[0].strip() for line in block.splitlines() if re.match(r"\s*griffin [a-z]", line)
            ]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_pages_exists_with_its_options(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)[1:]
    command = words[: 2 if words[0] == "tokenizer" else 1]
    assert invoke([*command, "--help"], {}) == 0
    described = capsys.readouterr().out
    assert described.startswith(f"Usage: griffin {' '.join(command)} ")
    assert [word for word in words if word.startswith("--") and word.split("=")[0] not in described] == []


def test_the_files_of_a_release_agree() -> None:
    version = griffin.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    workflows = "".join(path.read_text() for path in ROOT.glob(".github/workflows/*.yml"))
    called = set(re.findall(r"run: make ([a-z]+)", workflows))
    assert called == {"lint", "test", "slow", "docs"} <= targets
