"""The server's log: one JSON object a line on stderr. What others sent is in it escaped, and no text of theirs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

_MOST = 300  # characters of one value
_NAME = "griffin.serve"


class _Lines(logging.Handler):
    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        try:
            self._stream.write(line(fields) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads stderr any more: a server goes on
            return


def line(fields: dict[str, Any]) -> str:
    """Write fields as JSON in ASCII: no control character, nothing a terminal obeys, no second line."""
    short = {
        name: value if name == "traceback" or not isinstance(value, str) or len(value) <= _MOST else f"{value[:_MOST]}…"
        for name, value in fields.items()
        if value is not None
    }
    return json.dumps(short, ensure_ascii=True, default=str).replace("\x7f", "\\u007f")


def open_log(stream: TextIO | None = None) -> logging.Logger:
    """Give the server's logger; uvicorn's own lines go through it too."""
    logger = logging.getLogger(_NAME)
    handler = _Lines(stream or sys.stderr)
    for each in (logger, logging.getLogger("uvicorn")):
        each.handlers[:] = [handler]
        each.propagate = False
    logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return logger


def say(level: int, event: str, **fields: Any) -> None:
    """Log an event."""
    logging.getLogger(_NAME).log(level, event, extra={"fields": fields})
