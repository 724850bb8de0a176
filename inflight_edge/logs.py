"""Logs of the `run` command: a line for people, or a JSON object for machines, on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
from datetime import datetime, timezone

from inflight_edge._text import printable

__all__ = ["FORMATS", "configure"]

FORMATS = ("text", "json")
MAX_WAITING = 10_000
_KNOWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One object: time (ISO 8601, UTC), level, logger, message, the fields of ``extra``, and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _KNOWN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _TextFormatter(logging.Formatter):
    """Time, level and message; a name in it cannot drive the terminal, and is no line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, without a traceback."""
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Hand(logging.handlers.QueueHandler):
    """Hands records to the thread that writes them: a terminal or pipe that does not take them stalls no frame."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Drop the record when the writer is far behind."""
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Nothing to prepare: it stays in this process."""
        return record


def configure(form: str, *, quiet: bool) -> logging.handlers.QueueListener:
    """Send this package's log to standard error, from a thread of its own; ``stop`` the result in the end.

    form: one of FORMATS.  quiet: warnings and errors only.
    """
    handler = logging.StreamHandler(sys.stderr)
    # A progress line may stand where the log line begins: what is left of it is erased.
    erase = "\x1b[K" if sys.stderr.isatty() else ""
    text = _TextFormatter(f"%(asctime)s %(levelname)s %(message)s{erase}")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING)
    logger = logging.getLogger("inflight_edge")
    logger.handlers[:] = [_Hand(records)]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    listener = logging.handlers.QueueListener(records, handler)
    listener.start()
    return listener
