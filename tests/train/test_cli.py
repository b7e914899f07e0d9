"""`griffin train`: recipes, texts, and what a person reads when something is wrong."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import griffin
from griffin.checkpoint.config_json import is_standard
from griffin.cli.main import run
from griffin.cli.train import for_text, load_recipe
from griffin.errors import GriffinError

ROOT = Path(__file__).parents[2]
TINY = ["model.width=16", "model.num_heads=2", "model.num_gate_blocks=2", "model.mlp_width=16", "model.lru_width=16"]
TINY += ["steps=4", "warmup_steps=1", "row_tokens=16", "validation_rows=2", "threads=1", "log_every=1"]
SMALL = [argument for setting in TINY for argument in ("--set", setting)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "my text.txt"
    path.write_text("".join(f"{number} is the number after {number - 1}.\n" for number in range(1, 60)))
    return path


def test_a_text_becomes_a_model_that_writes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(text), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "chosen for about 0.0016 MB of text: a Griffin of 3 layers" in shown
    assert "--- a sample before training ---\nThe" in shown
    assert "--- a sample after training ---\nThe" in shown
    assert "griffin chat 'runs/my text/model'" in shown
    assert griffin.load("runs/my text/model").config.width == 16
    assert run(["generate", "runs/my text/model", "The", "--max-tokens", "3"]) == 0
    assert run(["train", str(text), *SMALL]) == 2
    assert "has a run, at step_00000004: go on with it (--resume)" in capsys.readouterr().err
    assert run(["train", str(text), *SMALL, "--resume"]) == 0


@pytest.mark.parametrize("lines", [5, 12, 40])
def test_a_short_text_and_few_steps_need_no_other_flag(
    tmp_path: Path, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Warm-up, rows and what else nobody set follow the text and the steps."""
    (tmp_path / "t.txt").write_text("to be or not to be that is the question\n" * lines)
    arguments = ["train", str(tmp_path / "t.txt"), "--run", str(tmp_path / "run"), "--set", "threads=1"]
    for name in ("width", "mlp_width", "lru_width"):
        arguments += ["--set", f"model.{name}=64"]
    arguments += ["--set", "model.num_heads=1", "--set", "model.num_gate_blocks=1", "--set", "steps=2"]
    assert run(arguments) == 0
    assert "trained in" in capsys.readouterr().out


def test_the_choice_grows_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("a" * 1000)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "a.txt").write_text("a" * 3_000_000)
    sizes = []
    for name in ("small.txt", "large"):
        config, chosen = for_text(tmp_path / name, None)
        assert config.model is not None
        assert is_standard(config.model)
        assert f"{config.steps} steps" in chosen
        sizes.append((config.tokenizer, config.model.num_parameters(), config.steps))
    assert sizes[0][1] < sizes[1][1]
    assert sizes[1] == ("bpe:2048", load_recipe(ROOT / "recipes" / "shakespeare.py").model.num_parameters(), 1200)  # type: ignore[union-attr]
    hawk = for_text(tmp_path / "small.txt", "hawk-tiny")[0].model
    assert hawk is not None
    assert (hawk.block_types, hawk.vocab_size) == (("recurrent", "recurrent"), 512)


def test_the_demo_recipe_is_whole() -> None:
    config = load_recipe(ROOT / "recipes" / "shakespeare.py")
    assert config.model is not None
    assert is_standard(config.model)  # transformers opens the result
    data = Path(config.train_data).read_bytes()
    readme = (ROOT / "recipes" / "data" / "README.md").read_text()
    assert hashlib.sha256(data).hexdigest() in readme
    assert hashlib.sha256(lzma.decompress(data)).hexdigest() in readme


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def config(:\n", r"recipe\.py, line 1: invalid syntax"),
        ("x = 1\n", "has no function config()"),
        ("def config():\n    return 3\n", r"config\(\) gives a int; it must give a TrainConfig"),
        ("def config():\n    x = 1\n    return y\n", r"recipe\.py, line 3: NameError: name 'y'"),
        ("import nothing_of_this_name\n", r"recipe\.py, line 1: ModuleNotFoundError"),
        (
            "from griffin.train.config import TrainConfig\ndef config():\n    return TrainConfig(steps=3)\n",
            r"recipe\.py, line 3: TypeError: .*missing.*'model' and 'train_data'",
        ),
    ],
)
def test_a_broken_recipe_is_named_with_its_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "recipe.py").write_text(source)
    with pytest.raises(GriffinError, match=message):
        load_recipe(tmp_path / "recipe.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.py"], "none.py: no such recipe"),
        (["none.txt"], "none.txt: no such file or folder"),
        (["TEXT", "--preset", "gpt"], "--preset gpt: there are"),
        (["TEXT", "--set", "stesp=3"], "did you mean steps"),
        (["RECIPE", "--preset", "hawk-tiny"], "a recipe names its own model"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path, text: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"TEXT": str(text), "RECIPE": str(ROOT / "recipes" / "shakespeare.py")}
    assert run(["train", *(names.get(argument, argument) for argument in arguments), "--run", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()
