"""What the pipeline counts, and how often it says so.

Each key of a dictionary is written by one thread only, and copying a dictionary is one step of the interpreter, so
that nothing here is locked.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from inflight_edge.latency import Histogram, Summary

__all__ = ["Counters", "Trouble", "summaries"]

log = logging.getLogger(__name__)

REPEAT_NS, AGAIN_NS = 10_000_000_000, 1_000_000_000


@dataclass(slots=True)
class Counters:
    """See events.Status; ``stages`` belongs to the inference thread."""

    captured: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    decisions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    reconnects: Counter[str] = field(default_factory=Counter)
    stages: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))


def summaries(histograms: Mapping[str, Histogram]) -> dict[str, Summary]:
    """Percentiles of the histograms that hold something."""
    return {name: histogram.summary() for name, histogram in dict(histograms).items() if histogram.count}


class Trouble:
    """Logs what may happen a thousand times a second: at once, then one line in ten seconds, and when it is over.

    What comes after ``over`` is told at once again, but what comes and goes with every frame once a second.

    subject  what has the trouble, such as ``sink mqtt``.   extra  fields of the structured log.
    active   whether something happened since it was last over.
    """

    def __init__(self, subject: str, extra: Mapping[str, str]) -> None:
        self._subject = subject
        self._extra = dict(extra)
        self._next_ns = 0
        self._untold = 0
        self._told = False  # since it was last over
        self.active = False
        self.total = 0

    def happened(self, text: str) -> None:
        """Count one trouble, and say so unless that was said just now."""
        self.total += 1
        self._untold += 1
        self.active = True
        now = time.monotonic_ns()
        if now >= self._next_ns:
            log.warning("%s: %s (%d since the last line)", self._subject, text, self._untold, extra=self._fields())
            self._untold, self._next_ns, self._told = 0, now + REPEAT_NS, True

    def over(self) -> None:
        """Everything is well; says so if it was said not to be."""
        self.active = False
        if self._told:
            log.info("%s: works again, after %d times", self._subject, self.total, extra=self._fields())
            self._untold, self._told = 0, False
            self._next_ns -= REPEAT_NS - AGAIN_NS

    def _fields(self) -> dict[str, str | int]:
        return {**self._extra, "count": self._untold, "total": self.total}
