"""Standard input and output that are closed, of another encoding, or left by their reader; an early Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import griffin
from griffin.cli import streams
from griffin.cli.main import run
from griffin.errors import GriffinError

ROOT = Path(griffin.__file__).parents[1]
OPTIONS = ["--max-tokens", "12", "--seed", "3", "--device", "cpu"]


class Stream(io.TextIOWrapper):
    def __init__(self, data: bytes = b"", **how: str) -> None:
        super().__init__(io.BytesIO(data), **how)  # type: ignore[arg-type]

    def bytes(self) -> bytes:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_terminal_of_any_encoding_shows_any_text(
    plain_folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, flags: list[str]
) -> None:
    model, tokenizer = griffin.load(plain_folder), griffin.load_tokenizer(plain_folder)
    [wanted] = griffin.generate(model, tokenizer, ["Once"], max_tokens=12, seed=3)
    assert "\ufffd" in wanted.text  # which cp1252 and latin-1 have not
    stdout = Stream(encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(["generate", str(plain_folder), "Once", *OPTIONS, *flags]) == 0
    used = "utf-8" if encoding == "ascii" else encoding
    if flags:
        assert json.loads(stdout.bytes().decode(used))["text"] == wanted.text
    else:
        assert stdout.bytes() == (wanted.text + "\n").encode(used, "backslashreplace")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_stdin_loses_its_byte_order_mark_and_names_what_is_no_text(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    from griffin.cli.generate import read_prompts

    monkeypatch.setattr(sys, "stdin", Stream("\ufeffé\n".encode(), encoding=encoding))
    streams.prepare()
    assert read_prompts(["-"], None) == ["é\n"]
    monkeypatch.setattr(sys, "stdin", Stream("é\n".encode() + b"\xff", encoding=encoding))
    streams.prepare()
    with pytest.raises(GriffinError, match="stdin: character 2 is the byte 0xff, which is not UTF-8"):
        read_prompts(["-"], None)
    with pytest.raises(GriffinError, match="prompt 2: character 1"):
        read_prompts(["fine", "a\udcff"], None)


def griffin_command(arguments: str, redirect: str, *, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}import sys; from griffin.cli.main import main; sys.argv[1:] = sys.argv[1].split(); main()"
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "$2" {redirect}', sys.executable, code, arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_closed_streams_are_said_in_one_line(chat_folder: Path) -> None:
    closed = "griffin: error: standard input or output is closed; give it a file, or /dev/null\n"
    done = griffin_command("--version", ">&-")
    assert (done.returncode, done.stderr) == (2, closed)
    done = griffin_command("--version", "2>&-")
    assert (done.returncode, done.stdout) == (0, f"griffin-lm {griffin.__version__}\n")
    done = griffin_command("nothing", "2>&- >&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = griffin_command(f"chat {chat_folder}", "<&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(closed)
    assert "Traceback" not in done.stderr


def test_readers_that_leave_change_no_status() -> None:
    """stdout: quietly 1. stderr: the status of the error itself, which has nobody else to tell."""
    done = griffin_command("--help", "| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode in (0, 1), done.stderr) == (True, "")  # 0 where `true` had not yet left
    done = griffin_command("nothing", "2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (2, "")
    done = griffin_command("--help", "> /dev/full")
    assert (done.returncode, done.stderr) == (2, "griffin: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("module", ["griffin.cli.app", "typer", "traceback", "griffin.cli.failure"])
def test_an_early_ctrl_c_says_nothing_but_that(module: str) -> None:
    """A signal while the command line itself is being imported."""
    before = (
        "import signal, sys, builtins; real = __import__\n"
        "def imports(name, *more):\n"
        f"    if name == '{module}': builtins.__import__ = real; signal.raise_signal({int(signal.SIGINT)})\n"
        "    return real(name, *more)\n"
        f"signal.signal({int(signal.SIGINT)}, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "builtins.__import__ = imports\n"
    )
    done = griffin_command("--version", "", before=before)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "griffin: interrupted\n")


def test_importing_the_package_imports_next_to_nothing() -> None:
    """So that the first moments, in which Ctrl-C would be a traceback, are few."""
    code = "import sys; import griffin.cli.main; print('dataclasses' in sys.modules or 'typer' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"
