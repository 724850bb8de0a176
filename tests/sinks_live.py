"""A pipeline's outcomes for tests of the live page: made by hand, without a pipeline."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np

from inflight_edge import Decision, Verdict
from inflight_edge.events import Context, Frame, Outcome, Status
from inflight_edge.latency import Histogram

CLASS_NAMES = ("north", "east", "south", "<b>west</b>")


class Feed:
    """Makes outcomes and counts them as a pipeline does."""

    def __init__(self, cameras: tuple[str, ...] = ("front",)) -> None:
        self.cameras = cameras
        self.captured: Counter[str] = Counter()
        self.decisions: Counter[tuple[str, str, str]] = Counter()
        self.alarms: frozenset[str] = frozenset()
        self.whole = Histogram()

    @property
    def context(self) -> Context:
        return Context(CLASS_NAMES, self.cameras, "bundles/gate", self.status)

    def status(self) -> Status:
        stages = {"whole": self.whole.summary()} if self.whole.count else {}
        return Status(
            captured=dict(self.captured),
            judged=dict(self.captured),
            dropped={},
            decisions=dict(self.decisions),
            reconnects={},
            alarms=self.alarms,
            queues={"frames": 0, "sink web": 1},
            lost={},
            stages=stages,
            uptime_ns=5_000_000_000,
        )

    def outcome(
        self,
        decision: Decision,
        *,
        camera: str = "",
        pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None = None,
        whole_us: int = 900,
        margin: float | None = None,
    ) -> Outcome:
        """The next outcome of a camera, the first one unless told."""
        camera = camera or self.cameras[0]
        index = self.captured[camera]
        self.captured[camera] += 1
        guarded = decision in (Decision.ACCEPT, Decision.TRIGGER)
        if margin is None:
            margin = {Decision.ACCEPT: -120.0, Decision.TRIGGER: 250.0}.get(decision, math.nan)
        verdict = Verdict(
            decision,
            None if decision is Decision.INVALID else 1,
            3 if decision is Decision.TRIGGER else None,
            margin,
            np.array([-300, -600, -350, -250], np.float32) if guarded else np.empty(0, np.float32),
            np.arange(4, dtype=np.int32) if guarded else np.empty(0, np.int32),
            "engine onnxruntime: it failed" if decision is Decision.INVALID else "",
        )
        self.decisions[camera, decision.value, "" if verdict.predicted is None else CLASS_NAMES[1]] += 1
        self.whole.record(whole_us * 1000)
        frame = Frame(pixels, time.monotonic_ns(), camera=camera, index=index)
        label = 1 if verdict.passes else None
        return Outcome(
            frame, verdict, "", label, camera in self.alarms, 1_800_000_000_000_000_000, {"whole": whole_us * 1000}
        )


def picture(seed: int = 0, shape: tuple[int, ...] = (48, 64, 3)) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A frame with something to see in it."""
    rows, columns = np.indices(shape[:2])
    image = np.stack([rows * 5, columns * 4, np.full(shape[:2], 40 * seed % 256)], 2).astype(np.uint8)
    return image[:, :, : shape[2]] if len(shape) == 3 else image[:, :, 0]
