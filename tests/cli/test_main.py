from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import griffin
from griffin import GriffinError
from griffin.cli import generate as command
from griffin.cli import main as module
from griffin.cli.app import COMMANDS
from griffin.cli.main import run


def test_help_and_errors_do_not_wait_for_torch() -> None:
    code = (
        "import sys; from griffin.cli.main import run; from griffin.cli.app import COMMANDS\n"
        "assert run(['--help']) == 0 and run(['--version']) == 0\n"
        "for name in COMMANDS:\n"
        "    assert run([name, '--help']) == 0 and run([name, '--nonsense']) == 2, name\n"
        "    assert 'torch' not in sys.modules and 'numpy' not in sys.modules, name\n"
        "assert run(['tokenizer', 'train', '--help']) == 0\n"
        "assert run(['generat']) == 2 and run(['chat']) == 2 and run([]) in (0, 2)\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert f"griffin-lm {griffin.__version__}" in done.stdout


def test_every_public_name_is_there() -> None:
    for name in griffin.__all__:
        assert getattr(griffin, name) is not None
        assert name in dir(griffin)
    with pytest.raises(AttributeError, match="nothing"):
        _ = griffin.nothing


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: griffin {name}")
    assert "--help" in out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GriffinError("two\n  lines [bold]here[/bold]"), "two lines [bold]here[/bold]"),
        (ValueError("T=3 is wrong"), "T=3 is wrong"),
        (OSError(28, "No space left on device", "talk.st"), "talk.st: No space left on device"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_what_a_person_can_mend_takes_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(command.options, "open_model", fail)
    assert run(["generate", "model", "text"]) == 2
    assert capsys.readouterr() == ("", f"griffin: error: {message}\n")
    assert run(["--traceback", "generate", "model", "text"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_our_own_mistakes_and_interrupts_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise errors.pop()

    errors: list[BaseException] = [KeyError("oops"), KeyboardInterrupt()]
    monkeypatch.setattr(command.options, "open_model", fail)
    assert run(["generate", "model", "text"]) == 130
    assert capsys.readouterr().err == "griffin: interrupted\n"
    with pytest.raises(KeyError):
        run(["generate", "model", "text"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "No such command 'generat'. Did you mean 'generate'?"),
        (["--foo"], "No such option: --foo"),
        (["generate", "model", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["generate", "model"], "no prompts"),
        (["info", "/nowhere"], "/nowhere"),
        (["info", "griffin-tiny", "--device", "toaster"], "there is no such device"),
        (["info", "griffin-tiny", "--device", "cuda:77"], "cuda:77"),
    ],
)
def test_wrong_use_takes_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("griffin: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    code = f"from {module.__name__} import run; import sys; sys.exit(run(['--help']))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | true', shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
