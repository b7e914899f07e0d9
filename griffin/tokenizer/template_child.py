"""Render chat templates, in a process of its own.

A template is a program that came with a model. minijinja runs it without files, modules or Python, and counts its
steps; but what nests too deeply or holds itself overflows the native stack, and some single steps take for ever. It is
this process that is lost then: `griffin.template_process` starts it, keeps it, and starts another. It imports nothing
of griffin, so that it is there in 30 ms.

Usage: python -I -S template_child.py FOLDER, where minijinja is in FOLDER. Each line of stdin is a request,
{"template": text, "past": messages, "chats": [variables, ...]}, and each line of stdout its answer:
{"texts": [text, ...]}, or {"refused": message} where the template itself raised it, or {"failed": message}. The
messages of each chat follow on those of the past.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any

FUEL = 10_000_000  # template instructions, about a second
CPU_SECONDS = 5.0
MEMORY_BYTES = 1 << 30  # of address space: the interpreter takes a few per cent of it
MOST_OUTPUT = (1_000_000, 10)  # bytes, and bytes more for each byte of the request
MOST_MESSAGE = 500  # characters of an error


class RefusedError(Exception):
    """The template raised it, with its own words."""


def raise_exception(message: object) -> None:
    raise RefusedError(str(message))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's `tojson`: Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(template: str) -> Any:
    """Compile a template for `render_template("chat", ...)`, set up as transformers sets up Jinja."""
    import minijinja

    made = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, fuel=FUEL)
    made.add_global("raise_exception", raise_exception)
    made.add_filter("trim", lambda text, chars=None: str(text).strip(chars))  # Python's idea of a blank
    made.add_filter("tojson", to_json)
    made.add_template("chat", template)
    return made


def limit_process() -> None:
    """Bound the address space, and let the CPU timer end the process, whatever the parent does with the signal."""
    if sys.platform == "win32":
        return  # the parent's clock is all there is
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (ValueError, OSError):
        if sys.platform != "darwin":  # which has the limit and refuses to set it
            raise
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def limit_time(seconds: float) -> None:
    """Let the kernel end the process after so much CPU time from now on; 0 takes that back."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(line: bytes, compiled: dict[str, Any]) -> bytes:
    """Do one request; `compiled` keeps the last template."""
    try:
        request = json.loads(line)
        template = request["template"]
        if template not in compiled:
            compiled.clear()
            compiled[template] = environment(template)
        compiled[template].add_global("strftime_now", datetime.now().strftime)  # one time for all texts
        texts = []
        for variables in request["chats"]:
            messages = [*request["past"], *variables.get("messages", ())]
            messages = [dict(message) for message in messages]  # a template can change them
            texts.append(compiled[template].render_template("chat", **{**variables, "messages": messages}))
        reply = json.dumps({"texts": texts}).encode()
        fixed, each = MOST_OUTPUT
        if len(reply) <= fixed + each * len(line):
            return reply
        problem = ("failed", f"it writes {len(reply)} bytes about {len(line)}")
    except RefusedError as error:
        problem = ("refused", str(error))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        problem = ("failed", first if type(error).__module__ == "minijinja" else f"{type(error).__name__}: {first}")
    kind, message = problem
    return json.dumps({kind: message[:MOST_MESSAGE]}).encode()


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    environment("")  # imports what there is to import before memory is limited
    limit_process()
    compiled: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        limit_time(CPU_SECONDS)
        reply = answer(line, compiled)
        limit_time(0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
