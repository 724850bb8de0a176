"""Where outcomes go: one protocol, one module per kind, imported on demand."""

from __future__ import annotations

from typing import Protocol

from inflight_edge.events import Context, Outcome

__all__ = ["Sink"]


class Sink(Protocol):
    """Takes the outcome of every frame.  All methods are called by one thread, the sink's own.

    name  short, for people and metrics, without secrets.
    """

    name: str

    def open(self, context: Context) -> None:
        """Connect.  Raises SinkError, OptionError, DependencyError."""

    def write(self, outcome: Outcome) -> None:
        """Deliver, or keep in bounded memory for later.  Raises SinkError when the outcome is lost; others follow."""

    def flush(self) -> None:
        """Called about once a second and before the end: hand on what is kept.  Raises SinkError."""

    def close(self) -> None:
        """Flush and release everything.  May be called twice.  Raises SinkError when something kept was lost."""
