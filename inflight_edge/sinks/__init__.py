"""Where outcomes go: one protocol, one module per kind, imported on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from inflight_edge.errors import OptionError
from inflight_edge.events import Context, Outcome
from inflight_edge.uri import Uri, one_of, whole_number

__all__ = ["SINK_FORMS", "Sink", "make_sink"]


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


def make_sink(text: str) -> Sink:
    """The sink of an address; nothing is opened yet.  Raises OptionError for one that is not understood."""
    if text == "-":
        return _jsonl(Uri("jsonl:-", frozenset({"jsonl"})))
    address = Uri(text, frozenset(_MAKERS))
    if not address.scheme:
        raise OptionError(f"{address.text}: expected the address of a sink, one of {', '.join(SINK_FORMS)}")
    return _MAKERS[address.scheme](address)


# What an address looks like, for messages; README has the options.
SINK_FORMS = ("-", "jsonl:FILE")


def _jsonl(address: Uri) -> Sink:
    from inflight_edge.sinks.jsonl import SYNCS, JsonLinesSink

    sink = JsonLinesSink(
        address.rest,
        rotate_bytes=address.take("rotate_bytes", whole_number(0), 0),
        keep=address.take("keep", whole_number(1, 10_000), 5),
        fsync=address.take("fsync", one_of(SYNCS), "no"),
    )
    address.finish()
    return sink


_MAKERS: dict[str, Callable[[Uri], Sink]] = {"jsonl": _jsonl}
