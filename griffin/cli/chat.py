"""griffin chat: a conversation in the terminal, on one state."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin.cli import options, streams
from griffin.cli.failure import explain
from griffin.cli.waiting import Waiting
from griffin.errors import GriffinError, printable
from griffin.infer.request import Sampling

if TYPE_CHECKING:
    from griffin.infer.conversation import Conversation

HELP = """\
/save FILE    write the conversation: one file, the state and the text
/save! FILE   the same over a file that is not a saved conversation
/load FILE    go on with a saved conversation; nothing is read again
/fork NAME    keep the conversation as it is now under NAME, and go on here
/switch NAME  go on with NAME; this one is kept too
/list         the conversations there are
/reset        begin anew
/state        how much has been read, and what remembering it takes
/quit         leave (so does Ctrl-D; Ctrl-C stops an answer)
A message that begins with / is written with two: //"""


@options.with_sampling
def chat(
    model: options.Model,
    max_tokens: options.MaxTokens = 1024,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    stop: options.Stop = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    chunk: options.Chunk = 256,
    adapter: options.Adapter = None,
    start: options.Start = None,
    load: Annotated[str | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the speed of each answer.")] = False,
) -> None:
    """Talk to a model. A turn costs its own length, however long the conversation has become.

    /help lists what can be done inside. A model without a chat template continues the text instead.

    Examples:

        griffin chat google/recurrentgemma-2b-it

        griffin chat my-model --temperature 0.7 --top-p 0.95

        griffin chat my-model --load talk.safetensors
    """
    loaded, tokenizer = options.open_model(model, device, dtype, adapter)

    from griffin.infer.conversation import Conversation

    begin, tokenizer = options.open_start(start, loaded, tokenizer)
    settings: dict[str, Any] = dict(
        max_tokens=max_tokens,
        **asdict(sampling),
        stop=stop or (),
        prefill_chunk=chunk,
    )
    first = (
        Conversation(loaded, tokenizer, begin)
        if load is None
        else Conversation.load(Path(load).expanduser(), loaded, tokenizer, begin)
    )
    if not first.has_template:
        note("This model has no chat template: it continues your text. An empty line lets it go on.")
    note("/help lists the commands.")
    Chat(first, settings, verbose).loop()


class Chat:
    """The conversation, those kept beside it, and the commands on them.

    Args:
        conversation: to begin with.
        settings: of generation.
        verbose: whether to show the speed of each answer.
    """

    def __init__(self, conversation: Conversation, settings: dict[str, Any], verbose: bool) -> None:
        self.conversation, self.settings, self.verbose = conversation, settings, verbose
        self.name = "main"
        self.kept: dict[str, Conversation] = {}
        self.commands: dict[str, Callable[[str], None]] = {
            "/save": self.save,
            "/save!": lambda path: self.save(path, over_anything=True),
            "/load": self.load,
            "/fork": self.fork,
            "/switch": self.switch,
            "/list": self.list,
            "/reset": self.reset,
            "/state": self.state,
            "/help": lambda _: note(HELP),
        }

    def loop(self) -> None:
        """Read lines until the end, or /quit."""
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then has a history and can be edited)
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt)
            except EOFError:
                if prompt:
                    note("")
                return
            except KeyboardInterrupt:
                note("\n/quit or Ctrl-D leaves.")
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.take(line.removesuffix("\r"))
            except KeyboardInterrupt:  # in a command
                note("\nstopped")
            except BaseException as error:  # a panic of a library is no Exception
                # Whatever one line of it does, a conversation of hours goes on, as it was before.
                if (text := explain(error)) is None:
                    if not isinstance(error, Exception):
                        raise
                    note(traceback.format_exc())
                    text = "a mistake in griffin, not yours; the conversation is as it was before, and /save keeps it"
                note(f"error: {text}")

    def take(self, line: str) -> None:
        """Do a command, or answer a message."""
        streams.check_text(line, "your message")
        command = line.strip()
        if command.startswith("/") and not command.startswith("//"):
            name, _, argument = command.partition(" ")
            if name not in self.commands:
                note(f"{name} is no command; /help lists them. A message that begins with / is written with two.")
                return
            self.commands[name](argument.strip())
        elif command or not self.conversation.has_template:
            self.answer(line.replace("/", "", 1) if command.startswith("//") else line)

    def answer(self, text: str) -> None:
        """Print the answer as it comes. Ctrl-C stops it where it is, and what was said stays said."""
        waiting = Waiting("Reading")
        began, first, count = time.perf_counter(), 0.0, 0
        before = self.conversation.tokens_read
        with _interrupts() as interrupted:

            def progress(done: int, total: int) -> None:
                waiting.progress(done, total)
                if interrupted:
                    raise KeyboardInterrupt

            settings: Any = {**self.settings, "progress": progress}
            pieces = self.conversation.reply(text, **settings)
            try:
                for piece in pieces:
                    waiting.stop()
                    first = first or time.perf_counter()
                    count += len(piece.tokens)
                    options.show(str(piece))
                    if interrupted:
                        break
            except KeyboardInterrupt:  # while reading, or pressed twice: the conversation is as it was
                waiting.stop()
                note("\nstopped; this turn is forgotten")
                return
            finally:
                waiting.stop()
                pieces.close()  # type: ignore[attr-defined]
        options.show("\n")
        if interrupted:
            note("stopped")
        if self.verbose:
            ended = time.perf_counter()
            read = self.conversation.tokens_read + len(self.conversation.unread) - before - count
            rate = f", {(count - 1) / (ended - first):.1f} tokens/s" if count > 1 else ""
            note(f"[read {read} tokens in {first - began:.2f} s; {count} tokens{rate}]")

    def save(self, path: str, over_anything: bool = False) -> None:
        if not path:
            note("usage: /save FILE")
            return
        file = Path(path).expanduser()
        if not file.parent.is_dir():
            raise GriffinError(f"there is no folder {file.parent}; make it first")
        if file.is_dir():
            raise GriffinError(f"{file} is a folder; give the name of a file in it")
        if file.exists() and not over_anything and not _is_state(file):
            raise GriffinError(f"{file} is not a saved conversation; /save! {path} writes over it")
        self.conversation.save(file)
        note(f"saved to {file}")

    def load(self, path: str) -> None:
        if not path:
            note("usage: /load FILE")
            return
        here = self.conversation
        self.conversation = type(here).load(Path(path).expanduser(), here.model, here.tokenizer, here.start)
        note(f"{_turns(self.conversation)}, {self.conversation.tokens_read:,} tokens read before")
        if self.conversation.messages:
            options.show(f"… {self.conversation.messages[-1]['content'][-200:]}\n")

    def fork(self, name: str) -> None:
        if not name or name == self.name or name in self.kept:
            note(f"{name} exists; choose another name" if name else "usage: /fork NAME")
            return
        self.kept[name] = self.conversation.fork()
        note(f"kept as {name}; you are in {self.name}")

    def switch(self, name: str) -> None:
        if name not in self.kept:
            note(f"there is no {name}; /list shows what there is" if name != self.name else f"you are in {name}")
            return
        self.kept[self.name] = self.conversation
        self.name, self.conversation = name, self.kept.pop(name)
        note(f"you are in {name}: {_turns(self.conversation)}")

    def list(self, _: str) -> None:
        for name, conversation in sorted({**self.kept, self.name: self.conversation}.items()):
            note(f"{'*' if name == self.name else ' '} {name}: {_turns(conversation)}")

    def reset(self, _: str) -> None:
        here = self.conversation
        self.conversation = type(here)(here.model, here.tokenizer, here.start)
        note("a new conversation")

    def state(self, _: str) -> None:
        state = self.conversation.state
        grows = self.conversation.model.config.window is None
        note(
            f"{self.conversation.tokens_read:,} tokens read; the state is {state.nbytes:,} bytes, "
            + ("which grow with the text" if grows else "however long the text")
        )


def note(text: str) -> None:
    """Say something that is not the model's, dimmed, on stderr: stdout holds answers only."""
    typer.secho(printable(text), dim=True, err=True)


def _is_state(file: Path) -> bool:
    """Whether a file is a state of any version: what may be written over without asking."""
    from griffin.reading import open_tensors

    try:
        with open_tensors(file) as opened:
            return str((opened.metadata() or {}).get("format")).startswith("griffin-state")
    except GriffinError:
        return False


def _turns(conversation: Conversation) -> str:
    count = len(conversation.messages) // 2
    return f"{count} turn{'' if count == 1 else 's'}"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Give a list that Ctrl-C adds to. A second Ctrl-C raises KeyboardInterrupt, wherever the program is.

    The first must not raise: in the middle of a layer it would leave half a state.
    """
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
