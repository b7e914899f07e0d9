"""The experiments: verdicts from results, documents that say what the results say, runs that go on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from experiments import session as module
from experiments.experiment import Experiment, load, names
from experiments.induction_heads.run import EXPERIMENT as INDUCTION
from experiments.length_extrapolation.passed_states import PassedStates
from experiments.markdown import table
from experiments.report import SCALES, documents
from experiments.results import read_results, results_file, write_results
from experiments.selective_copying.run import EXPERIMENT as COPYING
from experiments.session import Session
from experiments.synthetic import best_learning_rate, median_or_none, steps_to
from experiments.verdict import judge, overall
from griffin import Griffin
from griffin.cli.main import run as command
from griffin.data.packing import Batch
from griffin.errors import GriffinError
from griffin.score import nats

NAMES = names()


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_without_runs_has_no_verdict(name: str) -> None:
    experiment = load(name)
    results = {"experiment": name, "scale": "cpu", "runs": {}}
    claims = experiment.verdict(results)
    assert claims
    assert {claim.outcome for claim in claims} <= {"not run yet", "not testable at this scale"}
    assert experiment.table(results).startswith("| ")


def test_documents_say_what_the_results_say() -> None:
    """`griffin experiment --docs` mends this."""
    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, path


def test_results_name_their_origin() -> None:
    for name in NAMES:
        for scale in SCALES:
            for key, entry in read_results(results_file(name, scale), name, scale)["runs"].items():
                assert {"commit", "date", "device", "threads", "torch", "python"} <= entry["from"].keys(), (name, key)


def _copying(steps: dict[str, list[int | None]]) -> dict[str, Any]:
    """Results in which each family's seeds reached 99% at these steps, at the sweep's first rate."""
    runs: dict[str, Any] = {}
    for family, reached in steps.items():
        for rate in (3e-4, 1e-3, 3e-3):
            for seed, step in enumerate(reached if rate == 3e-4 else [None]):
                history = [{"step": 0, "accuracy": 0.1, "validation_loss": 3.0}]
                history += [{"step": 400, "accuracy": 0.5 if rate == 3e-4 else 0.4, "validation_loss": 1.0}]
                history += [] if step is None else [{"step": step, "accuracy": 0.995, "validation_loss": 0.1}]
                runs[f"{family} {rate} {seed}"] = {
                    "family": family,
                    "learning_rate": rate,
                    "seed": seed,
                    "parameters": 1,
                    "cpu_seconds": 1.0,
                    "history": history,
                    "ended_early": step is not None,
                    "steps": step or 3000,
                }
    return {"scale": "cpu", "runs": runs}


@pytest.mark.parametrize(
    ("steps", "outcomes"),
    [
        ({"griffin": [900] * 3, "hawk": [1200] * 3, "transformer": [600] * 3}, "RRR"),
        ({"griffin": [950] * 3, "hawk": [1200] * 3, "transformer": [600] * 3}, "RRN"),
        ({"griffin": [900] * 3, "hawk": [1150] * 3, "transformer": [600] * 3}, "RNR"),
        ({"griffin": [900] * 3, "hawk": [500, 1200, None], "transformer": [600] * 3}, "RRR"),
        ({"griffin": [900] * 3, "hawk": [500, None, None], "transformer": [600] * 3}, "NRR"),
        ({"griffin": [900] * 3, "hawk": [1200] * 2, "transformer": [600] * 3}, "---"),
    ],
)
def test_verdict_of_selective_copying(steps: dict[str, list[int | None]], outcomes: str) -> None:
    letters = {"reproduced": "R", "not reproduced": "N", "not run yet": "-"}
    assert "".join(letters[claim.outcome] for claim in COPYING.verdict(_copying(steps))) == outcomes


def test_verdict_of_induction_heads() -> None:
    good = {"griffin": 0.95, "hawk": 0.995, "transformer": 0.3}
    runs = {
        f"{family} {seed}": {
            "family": family,
            "seed": seed,
            "sweep": False,
            "steps": 10_000,
            "history": [],
            "lengths": {str(64 * times): 1.0 if times == 1 else value for times in (1, 4, 16, 64)},
        }
        for family, value in good.items()
        for seed in range(3)
    }
    assert overall(INDUCTION.verdict({"scale": "cpu", "runs": runs})) == "reproduced"
    for family, length, value in (("hawk", "4096", 0.98), ("griffin", "1024", 0.89), ("transformer", "256", 0.51)):
        worse = copy.deepcopy(runs)
        for seed in (0, 1):
            worse[f"{family} {seed}"]["lengths"][length] = value
        assert overall(INDUCTION.verdict({"scale": "cpu", "runs": worse})) == "not reproduced"
        worse[f"{family} 1"]["lengths"][length] = good[family]  # one seed of three is not the median
        assert overall(INDUCTION.verdict({"scale": "cpu", "runs": worse})) == "reproduced"


def test_small_parts() -> None:
    history = [{"step": 0, "accuracy": 0.1}, {"step": 50, "accuracy": 0.99}, {"step": 100, "accuracy": 0.5}]
    assert (steps_to(history, 0.99), steps_to(history, 0.995)) == (50, None)
    assert median_or_none([3, None, 1]) == 3
    assert median_or_none([None, None, 1]) is None
    ends = {1e-3: (0.5, 1.0), 3e-3: (0.5, 0.9), 1e-2: (0.4, 0.1)}
    later = {"step": 200, "accuracy": 0.9, "validation_loss": 0.0}  # of the run that went on
    sweep = {
        rate: {"history": [{"step": 100, "accuracy": a, "validation_loss": b}, *([later] if rate == 1e-3 else [])]}
        for rate, (a, b) in ends.items()
    }
    assert best_learning_rate(sweep, 100) == 3e-3
    assert [judge("", "", "", holds).outcome for holds in (True, False, None)] == [
        "reproduced",
        "not reproduced",
        "not run yet",
    ]
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_passed_states_are_those_of_other_rows(make_model: Callable[..., Griffin]) -> None:
    """The second step's rows go on from the first's, each from the row before; every fourth begins anew."""
    model, objective = make_model(dtype=torch.float64), PassedStates()
    tokens = torch.randint(0, 259, (2, 4, 10), generator=torch.Generator().manual_seed(0))
    batches = [Batch(each[:, :9], each[:, 1:], torch.arange(9).expand(4, 9).contiguous()) for each in tokens]
    first, alone = (loss.item() for loss in (objective.loss(model, batches[0]), nats(model, batches[0])))
    assert first == pytest.approx(alone, rel=1e-6)
    second = objective.loss(model, batches[1])
    expected = 0.0
    for row, before in ((0, 3), (1, 0), (2, None), (3, 2)):  # row 1's state was begun anew, and went to row 2
        text = batches[1].tokens[row : row + 1]
        if before is not None:
            text = torch.cat([batches[0].tokens[before : before + 1], text], dim=1)
        logprobs = model.logits(model(text))[0, -9:].double().log_softmax(-1)
        expected -= logprobs.gather(1, batches[1].targets[row][:, None]).sum().item()
    assert second.item() == pytest.approx(expected, rel=1e-6)
    second.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_results_are_whole_and_readable(tmp_path: Path) -> None:
    content = {"runs": {"a": {"history": [{"step": 1, "accuracy": 0.5}], "from": {"commit": "x"}}}}
    write_results(tmp_path / "results.json", content)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == content
    assert '{ "accuracy": 0.5, "step": 1 }' in text


def test_runs_go_on_and_are_not_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.selective_copying import run as copying

    def session() -> Session:
        return Session.open("selective_copying", "smoke", 1, tmp_path, Console(quiet=True), tmp_path, None)

    each = copying._run(copying.SIZES["smoke"], "hawk", 1e-3, 0, 20)
    first = session().train(each)
    assert (first["steps"], first["ended_early"], len(first["history"])) == (20, False, 2)
    longer = copying._run(copying.SIZES["smoke"], "hawk", 1e-3, 0, 40)
    second = session().train(longer)
    assert second["steps"] == 40
    assert second["history"][:2] == first["history"]
    assert second["cpu_seconds"] > first["cpu_seconds"]
    monkeypatch.setattr(module, "train", None)  # nothing is left to train
    assert session().train(longer) == second
    other = copying._run(copying.SIZES["smoke"], "griffin", 1e-3, 0, 20)
    with pytest.raises(GriffinError, match="another setup"):
        session().train(module.Run(**{**vars(other), "key": each.key}))


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["experiment", "nonsense"]) == 2
    assert "there are selective_copying, induction_heads" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path) -> None:
    """The smallest scale from end to end, through the command: results, plot and verdicts, in a minute."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib (griffin-lm[experiments])")
    assert command(["experiment", name, "--scale", "smoke", "--seeds", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results-smoke.json").read_text())
    assert results["runs"]
    assert (tmp_path / "figure-smoke.png").read_bytes().startswith(b"\x89PNG")
    experiment: Experiment = load(name)
    assert overall(experiment.verdict(results)) in ("not run yet", "not testable at this scale")
    assert command(["experiment", name, "--scale", "smoke", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results-smoke.json").read_text()) == results
