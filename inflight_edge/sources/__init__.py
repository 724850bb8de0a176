"""Where frames come from: one protocol, one module per kind, imported on demand."""

from __future__ import annotations

from typing import Protocol

from inflight_edge.events import Frame

__all__ = ["Source"]


class Source(Protocol):
    """Gives one frame after another.  All methods are called by one thread, but ``close`` may come from any.

    name  short, for people and metrics, without secrets (no password of a URL).
    live  True for a camera: frames keep coming whether or not they are read, so that the newest one wins by default,
          and a break is followed by opening again.  False for files: nothing is dropped, the end is the end.
    """

    name: str
    live: bool

    def open(self) -> None:
        """Connect.  Raises SourceError (of a live source: worth another try), OptionError, DependencyError."""

    def read(self) -> Frame | None:
        """The next frame, or None when none will ever follow.  Waits for it, but not for more than a few seconds.

        A frame that arrived damaged is a Frame with a ``problem``.  Raises SourceError when the stream broke off: a
        live source whose server ended or fell silent raises it too, for it may come back.
        """

    def close(self) -> None:
        """Release everything; a ``read`` that waits returns or raises soon.  May be called twice.  Never raises."""
