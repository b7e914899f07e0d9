"""The process that renders chat templates: started when first needed, kept, bounded, and replaced when it dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from griffin.errors import GriffinError
from griffin.tokenizer import template_child

WALL_SECONDS = 30.0  # the child's own limit is of CPU time, which a busy machine may take long to give


class TemplateProcess:
    """Renders templates that nobody vouches for. Threads take turns; a fork starts a process of its own.

    The process ends with this object, with the interpreter, and with the interpreter's death. Ctrl-C does not reach
    it. A copy of this object, or one unpickled, starts its own.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., TemplateProcess] | None = None

    def __reduce__(self) -> tuple[type[TemplateProcess], tuple[()]]:
        return TemplateProcess, ()

    def render(
        self, template: str, chats: Sequence[Mapping[str, Any]], past: Sequence[Mapping[str, str]] = ()
    ) -> list[str]:
        """Render a template several times.

        Args:
            template: the template.
            chats: its variables for each time: "messages", and anything that JSON can hold.
            past: messages that come before those of each of `chats`.

        Raises:
            GriffinError: the template is broken, raises an error, crashes, or needs more than 5 s of CPU time, 1 GiB
                of memory or ten times the output that its input accounts for.
        """
        request = json.dumps({"template": template, "past": past, "chats": chats}).encode() + b"\n"
        if self._owner != os.getpid():  # a fork: process, pipes and perhaps a held lock are the parent's
            self.__init__()  # type: ignore[misc]
        with self._lock:
            line = self._ask(request)
        reply = json.loads(line)
        if "refused" in reply:
            raise GriffinError(f"the chat template refuses the messages: {reply['refused']}")
        if "failed" in reply:
            raise GriffinError(f"the chat template failed: {reply['failed']}; mend the template or the messages")
        texts: list[str] = reply["texts"]
        return texts

    def _ask(self, request: bytes) -> bytes:
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            child.kill()

        clock = threading.Timer(WALL_SECONDS, stop)
        clock.daemon = True
        clock.start()
        try:
            try:
                child.stdin.write(request)
                child.stdin.flush()
                line = child.stdout.readline()
            except BrokenPipeError:
                line = b""
            if line.endswith(b"\n"):
                return line
            status = child.wait()
        except BaseException:  # Ctrl-C, say: an answer may be under way, and the next request must not read it
            self._stop()
            raise
        finally:
            clock.cancel()
        self._stop()
        if late.is_set() or (sys.platform != "win32" and status == -signal.SIGPROF):
            seconds = WALL_SECONDS if late.is_set() else template_child.CPU_SECONDS
            raise GriffinError(f"the chat template took longer than {seconds:g} s; mend the template")
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise GriffinError(
            f"the chat template crashed ({how}): it nests too deeply, makes a value that holds itself, or needs more "
            f"than {template_child.MEMORY_BYTES >> 20:,} MiB; mend the template"
        )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._stop()
            found = find_spec("minijinja")
            if found is None or found.origin is None:
                raise GriffinError("chat templates need minijinja; pip install minijinja")
            # Alone (-I) and without site-packages' start-up files (-S): neither the environment nor the folder we are
            # in changes what is imported, and it starts in a third of the time.
            command = [sys.executable, "-I", "-S", template_child.__file__, str(Path(found.origin).parents[1])]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for us
            )
            self._end = weakref.finalize(self, _end, self._child, self._owner)
        return self._child

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._child = self._end = None


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # closing writes what a dead child did not take
                pipe.close()
