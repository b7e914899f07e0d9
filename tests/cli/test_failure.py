"""Whose mistake an error is, and that what others named cannot drive a terminal."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from griffin.cli import generate as command
from griffin.cli.failure import explain
from griffin.cli.main import run
from griffin.errors import GriffinError, one_line, printable


def raised(function: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


def deeper() -> None:
    deeper()


def ours_without_end() -> None:
    names: dict[str, Any] = {"__name__": "griffin.somewhere"}
    exec("def again():\n    again()\nagain()", names)


class PanicException(BaseException):
    __module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: json.loads("[" * 200_000), "nested too deeply"),
        (lambda: torch.empty(10**15), r"not enough memory: 4,000,000.0 GB were asked for at once; ask for less"),
        (lambda: torch.empty(2**62, 2**10), "not enough memory"),
        (lambda: np.empty(10**16), "not enough memory: Unable to allocate"),
        (lambda: [0] * 2**60, "not enough memory; ask for less"),
        (lambda: int("9" * 5000), "4300 digits"),
        (lambda: Path("\0").read_text(), "null byte"),
        (lambda: __import__("nothing_of_this_name"), "No module named 'nothing_of_this_name'"),
        (lambda: _throw(PanicException("backtrack limit")), "a library gave up on this input: backtrack limit"),
        (lambda: _throw(OSError(9, "Bad file descriptor")), "standard input or output is closed"),
    ],
)
def test_what_an_input_or_the_machine_caused_takes_one_line(function: Callable[[], object], said: str) -> None:
    text = explain(raised(function))
    assert text is not None
    assert said in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "function",
    [
        lambda: {}["key"],
        lambda: None.attribute,  # type: ignore[attr-defined]
        lambda: len(5),  # type: ignore[arg-type]
        lambda: [][0],
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: _throw(AssertionError()),
        lambda: _throw(NotImplementedError("Could not run 'aten::x'")),
        lambda: _throw(SystemExit(3)),
        ours_without_end,
    ],
)
def test_mistakes_of_ours_are_not_taken_for_anothers(function: Callable[[], object]) -> None:
    assert explain(raised(function)) is None


def _throw(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b]0;title\x07b", "a\\x1b]0;title\\x07b"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31mred\x7f", "\\x9b31mred\\x7f"),
        ("up\rdown\x00", "up\\rdown\\x00"),
        ("right \u202eot tfel", "right \\u202eot tfel"),
        ("ä → 語 🦅\tfine\n", "ä → 語 🦅\tfine\n"),
    ],
)
def test_control_characters_are_shown_not_obeyed(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert one_line(GriffinError(text)) == " ".join(shown.replace("\\r", " ").split()) or "\r" not in text


@pytest.mark.parametrize("error", [GriffinError("key '\x1b[31m'"), OSError(2, "No such file", "\x1b[31m.txt")])
def test_no_message_reaches_the_terminal_raw(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.options, "open_model", lambda *_: _throw(error))
    for flags in ([], ["--traceback"]):
        assert run([*flags, "generate", "model", "text"]) == 2
        shown = capsys.readouterr().err
        assert "\\x1b[31m" in shown
        assert "\x1b" not in shown


def test_a_wrong_option_reaches_it_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "m", "--\x1b[31m"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_panic_takes_one_line_in_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.options, "open_model", lambda *_: _throw(PanicException("oh")))
    assert run(["generate", "model", "text"]) == 2
    assert capsys.readouterr().err.startswith("griffin: error: a library gave up on this input: oh")


def test_a_warning_is_one_line_without_a_place_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*_: Any) -> None:
        warnings.warn("slower:\n an \x1b[31moperation", stacklevel=1)
        raise GriffinError("enough")

    monkeypatch.setattr(command.options, "open_model", warn)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run(["generate", "model", "text"]) == 2
    assert warnings.showwarning is before
    assert capsys.readouterr().err == ("griffin: warning: slower: an \\x1b[31moperation\ngriffin: error: enough\n")


def test_the_ends_of_programs_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.options, "open_model", lambda *_: _throw(SystemExit(3)))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit):
        run(["generate", "model", "text"])
