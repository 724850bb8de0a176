"""What follows from a verdict: the label that is emitted, and the alarm after n of m flagged frames."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from inflight_edge.errors import OptionError
from inflight_edge.verdict import Decision, Verdict

__all__ = ["Alarm", "AlarmRule", "label"]


def label(verdict: Verdict, *, repair: bool) -> int | None:
    """The class that is emitted: the prediction if it passes, else none; of a trigger its source where repaired."""
    if verdict.passes:
        return verdict.predicted
    return verdict.source if repair and verdict.decision is Decision.TRIGGER else None


@dataclass(frozen=True, slots=True)
class AlarmRule:
    """The alarm is on while at least ``n`` of a camera's last ``m`` judged frames did not pass.

    Triggers and invalid frames count alike: what cannot be judged is no reason for calm.  Raises OptionError unless
    1 <= n <= m <= 10000.
    """

    n: int = 1
    m: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m <= 10_000:
            raise OptionError(f"alarm: expected n/m with 1 <= n <= m <= 10000, got {self.n}/{self.m}")

    @classmethod
    def parse(cls, text: str) -> AlarmRule:
        """From ``n/m``.  Raises OptionError."""
        n, slash, m = text.partition("/")
        if not (slash and all(part.isascii() and part.isdigit() and len(part) < 8 for part in (n, m))):
            raise OptionError(f"alarm: expected n/m such as 3/5, got {text!r}")
        return cls(int(n), int(m))


class Alarm:
    """The alarm of one camera.  on: whether it is on after the frames so far."""

    def __init__(self, rule: AlarmRule) -> None:
        self._rule = rule
        self._flags: deque[bool] = deque(maxlen=rule.m)
        self._n_flagged = 0
        self.on = False

    def update(self, verdict: Verdict) -> bool:
        """Take the next frame's verdict; returns whether the alarm changed."""
        if len(self._flags) == self._rule.m:
            self._n_flagged -= self._flags[0]
        self._flags.append(not verdict.passes)
        self._n_flagged += self._flags[-1]
        before, self.on = self.on, self._n_flagged >= self._rule.n
        return self.on != before
