"""The `griffin` command: runs what is asked for, and says in one line what went wrong."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

INTERRUPTED = 130  # 128 and SIGINT's number, as shells count


def main() -> NoReturn:
    """Run the command line and exit.

    0: done. 1: a mistake of ours, with its traceback; or the reader of stdout left. 2: an error in one line on stderr.
    130: interrupted by Ctrl-C. A training that a signal stopped, with a checkpoint: 128 and the signal's number.
    """
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # so early that nothing is there yet to say so
        status = INTERRUPTED
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status.

    Raises:
        Exception: a mistake of ours (see `griffin.cli.failure`).
    """
    try:
        # Here, not above: these take as long as a quick Ctrl-C.
        import traceback
        import warnings

        from griffin.cli import streams
        from griffin.cli.app import invoke
        from griffin.cli.failure import explain
        from griffin.errors import printable
    except KeyboardInterrupt:
        return _interrupted()

    def show_warning(message: Warning | str, *_: object, **__: object) -> None:
        _say(f"griffin: warning: {printable(' '.join(str(message).split()))}\n")

    settings: dict[str, bool] = {}
    try:
        streams.prepare()
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # a person cannot use the place in a file that others show
            status = invoke(arguments, settings)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader, `head` say, has enough
        streams.let_go()
        return 1
    except BaseException as error:  # a panic of a library is no Exception
        if type(error).__name__ == "NoArgsIsHelpError":
            _say(f"{error}\n" if str(error) else "")
            return 2
        text = explain(error)
        if settings.get("traceback") and isinstance(error, Exception):
            _say(printable(traceback.format_exc()))
            return 2
        if text is None:
            raise
        _say(f"griffin: error: {text}\n")
        streams.let_go()
        return 2


def _interrupted() -> int:
    _say("griffin: interrupted\n")
    return INTERRUPTED


def _say(text: str) -> None:
    """Write to stderr. If nobody takes that, the exit status is what is left to say it."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
