from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import griffin
from griffin.cli import options
from griffin.cli.main import run
from griffin.cli.waiting import Waiting

Say = Callable[..., tuple[str, str]]
OPTIONS = ["--device", "cpu", "--max-tokens", "12", "--seed", "2"]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    def lines(folder: Path, *text: str, more: list[str] | None = None) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in text)))
        assert run(["chat", str(folder), *OPTIONS, *(more or [])]) == 0
        return capsys.readouterr()

    return lines


def test_a_saved_conversation_goes_on(chat_folder: Path, tmp_path: Path, say: Say) -> None:
    whole, _ = say(chat_folder, "hello", "", "how are you?")
    file = tmp_path / "talk"
    first, _ = say(chat_folder, "hello", f"/save {file}", "/quit", "never read")
    second, _ = say(chat_folder, "how are you?", more=["--load", str(file)])
    third, notes = say(chat_folder, "something else", f"/load {file}", "how are you?")
    assert first + second == whole
    assert third.endswith(second)
    assert "1 turn," in notes


def test_forks_are_switched_between(chat_folder: Path, say: Say) -> None:
    hello, _ = say(chat_folder, "hello")
    left, _ = say(chat_folder, "hello", "left")
    right, _ = say(chat_folder, "hello", "right")
    out, notes = say(chat_folder, "hello", "/fork b", "right", "/list", "/switch b", "left", "/list", "/switch nobody")
    assert left.startswith(hello)
    assert out == right + left.removeprefix(hello)
    assert "* main: 2 turns" in notes
    assert "  b: 1 turn\n" in notes
    assert "* b: 2 turns" in notes
    assert "there is no nobody" in notes


def test_commands_that_fail_say_so_and_go_on(chat_folder: Path, tmp_path: Path, say: Say) -> None:
    lines = ["/load /nowhere", "/save", "/fork", "/fork main", "/dance", f"/save {tmp_path}", "/help", "/state"]
    out, notes = say(chat_folder, *lines, "hello", "/reset", "/state")
    assert out.strip()
    for wanted in ("/nowhere does not exist", "usage: /save", "usage: /fork", "main exists", "/dance is no command"):
        assert wanted in notes
    assert notes.count("error: ") == 2
    assert notes.count("\n0 tokens read; the state is ") == 2


def test_two_slashes_are_one(chat_folder: Path, tmp_path: Path, say: Say) -> None:
    from griffin.state_file import load_metadata

    say(chat_folder, "//help me", f"/save {tmp_path / 'talk'}")
    assert '"/help me"' in load_metadata(tmp_path / "talk")["conversation"]


def test_without_a_template_text_is_continued(plain_folder: Path, say: Say) -> None:
    out, notes = say(plain_folder, "Once", "")
    assert notes.count("no chat template") == 1
    longer, _ = say(plain_folder, "Once", more=["--max-tokens", "24", "--temperature", "0"])
    halves, _ = say(plain_folder, "Once", "", more=["--temperature", "0"])
    assert halves.replace("\n", "") == longer.replace("\n", "")
    assert out.strip()


def test_ctrl_c_stops_the_answer_and_not_the_program(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    before = signal.getsignal(signal.SIGINT)
    shown: list[str] = []
    show = options.show

    def show_and_interrupt(text: str) -> None:
        show(text)
        shown.append(text)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(options, "show", show_and_interrupt)
    _, notes = say(chat_folder, "hello", "/list", "again", "/list", more=["--verbose"])
    assert "stopped\n" in notes
    assert "; 3 tokens, " in notes
    assert "* main: 1 turn\n" in notes
    assert "* main: 2 turns\n" in notes
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_reading_forgets_the_turn(chat_folder: Path, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    plain, progress = say(chat_folder, "again")[0], Waiting.progress
    pressed: list[int] = []

    def press(self: Waiting, *at: Any) -> None:
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)
        progress(self, *at)

    monkeypatch.setattr(Waiting, "progress", press)
    monkeypatch.setattr("griffin.checkpoint.load", _without_progress())
    out, notes = say(chat_folder, "hello", "again", "/list")
    assert out == plain
    assert "this turn is forgotten" in notes
    assert "* main: 1 turn\n" in notes


def _without_progress() -> Callable[..., Any]:
    from griffin import checkpoint

    load = checkpoint.load
    return lambda name, *, progress, **options: load(name, **options)


@pytest.mark.parametrize("name", ["notes.txt", "empty", "model.safetensors", "config.json"])
def test_saving_writes_over_conversations_only(chat_folder: Path, tmp_path: Path, say: Say, name: str) -> None:
    file = tmp_path / name
    if name == "model.safetensors":
        file.write_bytes((chat_folder / name).read_bytes())
    else:
        file.write_text("" if name == "empty" else "{}")
    before = file.read_bytes()
    _, notes = say(chat_folder, "hello", f"/save {file}")
    assert f"error: {file} is not a saved conversation; /save! {file} writes over it" in notes
    assert file.read_bytes() == before
    say(chat_folder, "hello", f"/save! {file}")
    _, notes = say(chat_folder, "hello", "again", f"/save {file}", f"/load {file}")  # now it is one
    assert "error" not in notes
    assert "2 turns," in notes


def test_saving_knows_home_and_makes_no_folders(
    chat_folder: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    _, notes = say(chat_folder, "hello", "/save ~/talk", "/save typo/x/talk", "/save! typo/x/talk", "/load ~/talk")
    assert f"saved to {tmp_path / 'home' / 'talk'}" in notes
    assert "1 turn," in notes
    assert notes.count("error: there is no folder typo/x; make it first") == 2
    assert not any((tmp_path / "here").iterdir())
    _, notes = say(chat_folder, "/list", more=["--load", "~/talk"])
    assert "* main: 1 turn" in notes


class PanicException(BaseException):
    __module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "error: "),
        (KeyError("messages"), "Traceback (most recent call last)"),
        (RuntimeError("shapes cannot be multiplied"), "error: a mistake in griffin, not yours"),
        (PanicException("backtrack limit"), "error: a library gave up on this input"),
        (KeyboardInterrupt(), "stopped"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_error_loses_the_conversation(
    chat_folder: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    from griffin.infer.conversation import Conversation

    whole, _ = say(chat_folder, "hello", "how are you?")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    encode = griffin.Tokenizer.encode_chat_turn
    monkeypatch.setattr(
        griffin.Tokenizer,
        "encode_chat_turn",
        lambda self, messages: fail() if messages[-1]["content"] == "fail" else encode(self, messages),
    )
    monkeypatch.setattr(Conversation, "save", fail)
    monkeypatch.setattr(Conversation, "load", fail)
    out, notes = say(chat_folder, "hello", "fail", f"/save {tmp_path / 'x'}", "/load x", "how are you?", "/list")
    assert out == whole
    assert notes.count(said) >= 3
    assert "* main: 2 turns" in notes


def test_commands_may_stand_behind_blanks_and_notes_are_printable(chat_folder: Path, say: Say) -> None:
    out, notes = say(chat_folder, "  /state", "\t/list\r", "/\x1b[31m", "/fork \x1b]0;x\x07", "/list", "your \udcff")
    assert out == ""
    assert "0 tokens read; the state is" in notes
    assert "/\\x1b[31m is no command" in notes
    assert "  \\x1b]0;x\\x07: 0 turns" in notes
    assert "error: your message: character 5 is the byte 0xff, which is not UTF-8" in notes
    assert "\x1b]" not in notes
    assert "\x1b[31m" not in notes
