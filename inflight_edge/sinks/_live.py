"""What the live page shows, in bounded memory: recent margins, latencies, flagged frames, the newest picture."""

from __future__ import annotations

import io
import math
import threading
from collections import deque
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.colour import check_frame, to_rgb
from inflight_edge.errors import InflightError
from inflight_edge.events import Context, Frame, Outcome, Status
from inflight_edge.latency import Histogram
from inflight_edge.verdict import Decision

__all__ = ["LiveView"]

# Points of the margin's plot, pictures of flagged frames, and their longest edges in pixels.
POINTS, FLAGGED, LARGE, SMALL = 600, 24, 640, 320
# At most this many new points in one message, the newest: more could not be told apart on the page.
NEWS = 300
_QUALITY = 80


class LiveView:
    """Filled by the sink's thread, read by the server's."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._encoding = threading.Lock()  # one picture at a time, however many ask: each takes memory
        self._count = 0
        self._points: deque[dict[str, Any]] = deque(maxlen=POINTS)
        self._newest: dict[str, Outcome] = {}
        self._pictures: dict[str, tuple[Frame, bytes | None]] = {}
        self._flagged: deque[tuple[dict[str, Any], bytes | None]] = deque(maxlen=FLAGGED)
        self._latency = Histogram()

    def add(self, outcome: Outcome) -> None:
        """Take an outcome.  A drop shows in the counts alone."""
        verdict = outcome.verdict
        if verdict is None:
            return
        flagged = verdict.decision in (Decision.TRIGGER, Decision.INVALID)
        picture = encode(outcome.frame, SMALL) if flagged else None
        with self._lock:
            self._count += 1
            point = self._describe(outcome)
            self._points.append(point)
            self._newest[outcome.frame.camera] = outcome
            if "whole" in outcome.stages:
                self._latency.record(outcome.stages["whole"])
            if flagged:
                likelihoods = verdict.as_dict()["log_likelihoods"]
                names = {self._name(int(c)): value for c, value in likelihoods.items()}
                self._flagged.append(({**point, "log_likelihoods": names, "picture": picture is not None}, picture))

    def _describe(self, outcome: Outcome) -> dict[str, Any]:
        verdict, frame = outcome.verdict, outcome.frame
        assert verdict is not None
        return {
            "number": self._count,
            "camera": frame.camera,
            "index": frame.index,
            "file": frame.name,
            "time_ms": outcome.wall_ns // 1_000_000,
            "decision": verdict.decision.value,
            "predicted": self._name(verdict.predicted),
            "source": self._name(verdict.source),
            "label": self._name(outcome.label),
            "margin": verdict.margin if math.isfinite(verdict.margin) else None,
            "reason": verdict.reason or frame.problem,
            "alarm": outcome.alarm,
        }

    def _name(self, label: int | None) -> str | None:
        return None if label is None else self._context.class_names[label]

    def news(self, cursor: int) -> tuple[dict[str, Any], int]:
        """A message for one browser, which has seen ``cursor`` outcomes, and its new cursor."""
        status = self._context.status()
        with self._lock:
            new = [point for point in self._points if point["number"] > cursor][-NEWS:]
            message = {
                "cameras": list(self._context.cameras),
                "bundle": self._context.bundle,
                "points": new,
                "newest": {camera: self._describe_newest(outcome) for camera, outcome in self._newest.items()},
                "flagged": [entry for entry, _ in reversed(self._flagged)],
                "latency": coarse(self._latency),
                "status": _status(status),
            }
            return message, self._count

    def _describe_newest(self, outcome: Outcome) -> dict[str, Any]:
        return {**self._describe(outcome), "picture": outcome.frame.pixels is not None}

    def latest(self, camera: str) -> bytes | None:
        """The newest frame of a camera as JPEG, or None."""
        with self._encoding:
            with self._lock:
                outcome = self._newest.get(camera)
                made = self._pictures.get(camera)
            if outcome is None:
                return None
            if made is None or made[0] is not outcome.frame:
                made = (outcome.frame, encode(outcome.frame, LARGE))
                with self._lock:
                    self._pictures[camera] = made
            return made[1]

    def flagged_picture(self, number: int) -> bytes | None:
        """A flagged frame by its number as JPEG, or None when it is no longer kept or had no pixels."""
        with self._lock:
            return next((picture for entry, picture in self._flagged if entry["number"] == number), None)


def encode(frame: Frame, longest: int) -> bytes | None:
    """The frame as JPEG, shrunk to ``longest`` pixels; small ones are enlarged so that their pixels can be seen.

    None for a frame that is no picture: no pixels, another number of channels than 1, 3 or 4.
    """
    if frame.pixels is None:
        return None
    pillow = require("PIL.Image", "pip install 'inflight-edge[camera]'")
    try:
        planes = to_rgb(_thin(check_frame(frame.pixels, frame.colour), frame.colour, longest), frame.colour)
    except InflightError:
        return None  # the verdict on it is INVALID and says why
    channels = planes.shape[2]
    if channels not in (1, 3, 4):
        return None
    pixels = np.rint(planes[:, :, : 1 if channels == 1 else 3]).astype(np.uint8)
    image = pillow.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    factor = longest / max(image.size)
    if factor < 1:
        image = image.resize(tuple(max(1, round(size * factor)) for size in image.size))
    elif factor >= 2:
        image = image.resize(tuple(size * int(factor) for size in image.size), pillow.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()


def _thin(pixels: NDArray[np.uint8], colour: str, longest: int) -> NDArray[np.uint8]:
    """Every n-th pixel of a frame that is many times larger: the conversion to float then costs little."""
    step = max(pixels.shape[:2]) // (2 * longest)
    if step < 2:
        return pixels
    if not colour.startswith("nv12"):
        return pixels[::step, ::step]
    height, width = pixels.shape[0] // 3 * 2, pixels.shape[1]
    chroma = pixels[height:].reshape(height // 2, width // 2, 2)[::step, ::step]
    rows, columns = chroma.shape[:2]
    luma = np.zeros((2 * rows, 2 * columns), np.uint8)
    for i in (0, 1):  # those of a chroma value that stays
        for j in (0, 1):
            luma[i::2, j::2] = pixels[:height][i :: 2 * step, j :: 2 * step]
    return np.concatenate([luma, chroma.reshape(rows, 2 * columns)])


def coarse(histogram: Histogram) -> list[list[float]]:
    """[upper bound in microseconds, count] of four buckets a power of two, from the first to the last that is not empty."""
    counts: dict[int, int] = {}
    for low_ns, count in histogram.buckets().items():
        bucket = math.floor(4 * math.log2(max(low_ns, 1)))
        counts[bucket] = counts.get(bucket, 0) + count
    if not counts:
        return []
    return [[2 ** ((b + 1) / 4) / 1000, counts.get(b, 0)] for b in range(min(counts), max(counts) + 1)]


def _status(status: Status) -> dict[str, Any]:
    return {
        "captured": sum(status.captured.values()),
        "judged": sum(status.judged.values()),
        "dropped": sum(status.dropped.values()),
        "lost": sum(status.lost.values()),
        "reconnects": sum(status.reconnects.values()),
        "decisions": _by_decision(status),
        "alarms": sorted(status.alarms),
        "queues": dict(status.queues),
        "stages": {name: asdict(summary) for name, summary in status.stages.items()},
        "uptime_s": status.uptime_ns / 1e9,
    }


def _by_decision(status: Status) -> dict[str, int]:
    totals = dict.fromkeys((decision.value for decision in Decision), 0)
    for (_, decision, _), count in status.decisions.items():
        totals[decision] += count
    return totals
