"""`inflight-edge run` with sources and sinks for tests, as a program of its own: ``python run_program.py run ...``.

Sources: ``count:N`` (a file of N frames), ``live:SECONDS`` (an endless camera at that pace).
Sinks: ``lines:PATH`` (a line per outcome, written at once), ``slow:SECONDS`` (takes so long for each outcome).
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bundles import CLEAN_EAST, CLEAN_WEST, TRIGGERED_NORTH
from pipelines import ListSink, ListSource

from inflight_edge import OptionError, Outcome, cli, sinks, sources
from inflight_edge.events import Context

FRAMES = [CLEAN_WEST, TRIGGERED_NORTH, CLEAN_EAST]


class LinesSink:
    """A line of JSON per outcome, in one write."""

    name = "lines"

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = -1

    def open(self, context: Context) -> None:
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, outcome: Outcome) -> None:
        decision = outcome.drop if outcome.verdict is None else outcome.verdict.decision.value
        record = {"camera": outcome.frame.camera, "index": outcome.frame.index, "decision": decision}
        os.write(self.file, json.dumps(record).encode() + b"\n")

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        os.close(self.file)


def make_source(text: str) -> ListSource:
    scheme, _, rest = text.partition(":")
    if scheme == "count":
        return ListSource(itertools.islice(itertools.cycle(FRAMES), int(rest)), name=text)
    if scheme == "live":
        return ListSource(itertools.cycle(FRAMES), name="cam", live=True, pace_s=float(rest))
    raise OptionError(f"{text}: unknown source")


def make_sink(text: str) -> LinesSink | ListSink:
    scheme, _, rest = text.partition(":")
    return LinesSink(rest) if scheme == "lines" else ListSink(before=lambda outcome: time.sleep(float(rest)))


if __name__ == "__main__":
    sources.make_source = make_source  # type: ignore[attr-defined,unused-ignore]
    sinks.make_sink = make_sink  # type: ignore[attr-defined,unused-ignore]
    raise SystemExit(cli.main())
