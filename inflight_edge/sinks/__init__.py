"""Where outcomes go: one protocol, one module per kind, imported on demand."""

from __future__ import annotations

import importlib
from typing import Protocol

from inflight_edge.errors import OptionError
from inflight_edge.events import Context, Outcome
from inflight_edge.uri import Uri

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
        """Called about once a second and before the end: hand on what is kept.

        Raises SinkError; its ``lost`` says how many outcomes written before are lost.
        """

    def close(self) -> None:
        """Flush and release everything.  May be called twice.  Raises SinkError when something kept was ``lost``."""


def make_sink(text: str) -> Sink:
    """The sink of an address; nothing is opened yet.  Raises OptionError for one that is not understood."""
    address = Uri("jsonl:-" if text == "-" else text, frozenset(_MODULES))
    if not address.scheme:
        raise OptionError(f"{address.text}: expected the address of a sink, one of {', '.join(SINK_FORMS)}")
    module = importlib.import_module(f"inflight_edge.sinks.{_MODULES[address.scheme]}")
    sink: Sink = module.from_address(address)
    return sink


# What an address looks like, for messages; README has the options.
SINK_FORMS = (
    "-",
    "jsonl:FILE",
    "mqtt://HOST:PORT/TOPIC",
    "mqtts://HOST:PORT/TOPIC",
    "prometheus://127.0.0.1:PORT",
    "http://HOST/PATH",
    "https://HOST/PATH",
    "video:FILE.mp4",
    "evidence:FOLDER",
    "web:127.0.0.1:PORT",
)

# Scheme to the module that knows its options.
_MODULES = {
    "jsonl": "jsonl",
    "mqtt": "mqtt",
    "mqtts": "mqtt",
    "prometheus": "prometheus",
    "http": "webhook",
    "https": "webhook",
    "video": "video",
    "evidence": "evidence",
    "web": "web",
}
