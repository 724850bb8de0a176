"""Which processors a thread may use."""

from __future__ import annotations

import os
from collections.abc import Iterable

from inflight_edge.errors import OptionError

__all__ = ["ROLES", "parse_cpus", "pin"]

ROLES = ("capture", "inference", "sinks")


def parse_cpus(texts: Iterable[str]) -> dict[str, frozenset[int]]:
    """Processors by role, from texts such as ``inference=1`` or ``capture=0,2-3``.  Raises OptionError."""
    found: dict[str, frozenset[int]] = {}
    usable = os.sched_getaffinity(0)
    for text in texts:
        role, _, numbers = text.partition("=")
        if role not in ROLES or role in found:
            raise OptionError(f"cpus: expected ROLE=NUMBERS with each of {', '.join(ROLES)} at most once, got {text!r}")
        try:
            ranges = [[int(end) for end in part.split("-", 1)] for part in numbers.split(",")]
        except ValueError:
            raise OptionError(f"cpus: expected numbers such as 0,2-3, got {text!r}") from None
        cpus = frozenset(cpu for ends in ranges for cpu in range(ends[0], min(ends[-1], 4096) + 1))
        if not cpus or not cpus <= usable:
            raise OptionError(f"cpus: expected some of {sorted(usable)}, got {text!r}")
        found[role] = cpus
    return found


def pin(cpus: frozenset[int]) -> None:
    """Restrict the calling thread, and those it starts, to these processors; none given: leave it.  Raises OSError."""
    if cpus:
        os.sched_setaffinity(0, cpus)
