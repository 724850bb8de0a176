"""The TensorRT library: imported with its remedy, one log for the life of the process.

Only what TensorRT 10.3, 10.13, 10.16 and 11.4 have in common is used; a test looks every name up in each of them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

from inflight_edge._optional import require
from inflight_edge.errors import EngineError

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Log", "expect", "load_tensorrt"]

_REMEDY = "JetPack: apt install python3-libnvinfer; else pip install 'inflight-edge[tensorrt]'"
_MAX_LINES = 8


class Log(Protocol):
    """TensorRT's logger, which keeps the latest errors."""

    def take(self) -> str:
        """The errors since the last call, in one line."""

    @property
    def logger(self) -> trt.ILogger:
        """What TensorRT takes."""


def load_tensorrt() -> tuple[str, Log]:
    """Version of the library and the log.  Raises DependencyError where it cannot be loaded."""
    module = require("tensorrt", _REMEDY)
    return str(module.__version__), _log(module)


# One for the life of the process: TensorRT keeps the first logger that it is given.
@functools.cache
def _log(module: object) -> Log:
    import tensorrt as trt

    class Collected(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []

        @property
        def logger(self) -> trt.ILogger:
            return self

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self._lines = [*self._lines, " ".join(msg.split())[:300]][-_MAX_LINES:]

        def take(self) -> str:
            lines, self._lines = self._lines, []
            return "; ".join(lines) or "no reason given"

    return Collected()


def expect(answer: bool, what: str, log: Log) -> None:
    """Raise EngineError when TensorRT answers that something was not done."""
    if not answer:
        raise EngineError(f"tensorrt: {what} was refused: {log.take()}")
