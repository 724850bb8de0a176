"""A Python function as a sink."""

from __future__ import annotations

from collections.abc import Callable

from inflight_edge.errors import SinkError
from inflight_edge.events import Context, Outcome

__all__ = ["CallbackSink"]


class CallbackSink:
    """Calls a function with every outcome, drops too, in the sink's own thread; what it raises is a SinkError.

    A slow function fills the sink's queue and then loses outcomes; it never holds the camera or the classifier.
    """

    def __init__(self, function: Callable[[Outcome], object], *, name: str = "callback") -> None:
        self.name = name
        self._function = function
        self._open = False

    def open(self, context: Context) -> None:
        """Nothing to connect."""
        self._open = True

    def write(self, outcome: Outcome) -> None:
        """Call the function.  Raises SinkError for whatever it raises."""
        if not self._open:
            raise SinkError(f"{self.name}: not open; call open first")
        try:
            self._function(outcome)
        except Exception as error:
            raise SinkError(f"{self.name}: the function raised {type(error).__name__}: {error}") from error

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing to release."""
        self._open = False
