"""Outcomes as the pipeline makes them, of every kind, for the tests of what takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from inflight_edge.colour import Colour
from inflight_edge.events import Context, Frame, Outcome, Status
from inflight_edge.latency import Summary
from inflight_edge.verdict import Decision, Verdict, decide

CLASS_NAMES = ("north", "east", "süd", "west")
STAGES = {"queue": 1_000, "preprocess": 20_000, "engine": 2_000_000, "guard": 900, "whole": 2_021_900}
# 2026-11-24 08:00:00.123456 UTC
WALL_NS = 1_795_507_200_123_456_789


def status(**changes: Any) -> Status:
    """Counts of a pipeline that runs well."""
    counts = Status(
        captured={"front": 12, "rear": 3},
        judged={"front": 10, "rear": 3},
        dropped={("front", "newer frame"): 2},
        decisions={("front", "accept", "north"): 7, ("front", "trigger", "west"): 3, ("rear", "invalid", ""): 3},
        reconnects={"front": 0, "rear": 4},
        alarms=frozenset({"front"}),
        queues={"frames": 1, "sink stdout": 5},
        lost={"stdout": 6},
        stages={"engine": Summary(13, 2e6, 3e6, 4e6, 5_000_000), "whole": Summary(13, 2.5e6, 3.5e6, 4.5e6, 6_000_000)},
        uptime_ns=4_500_000_000,
    )
    return replace(counts, **changes)


def context(**changes: Any) -> Context:
    return replace(Context(CLASS_NAMES, ("front", "rear"), "bundle", status), **changes)


def pixels(colour: Colour = "rgb", height: int = 24, width: int = 32) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A gradient from black at the top left, red growing to the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 0] = np.linspace(0, 255, width, dtype=np.uint8)
    image[:, :, 1] = np.linspace(0, 120, height, dtype=np.uint8)[:, None]
    if colour == "rgb":
        return image
    if colour == "bgr":
        return np.ascontiguousarray(image[:, :, ::-1])
    return np.full((height * 3 // 2, width), 128, np.uint8)


def frame(index: int = 0, **changes: Any) -> Frame:
    base = Frame(pixels(), time.monotonic_ns(), name="", camera="front", index=index)
    return replace(base, **changes)


def accepted(index: int = 0, **of_frame: Any) -> Outcome:
    verdict = decide(0, np.array([-10.0, -20.5, -np.inf], np.float32), np.array([0, 1, 3], np.int32), 0)
    return Outcome(frame(index, **of_frame), verdict, label=0, wall_ns=WALL_NS + index, stages=STAGES)


def triggered(index: int = 0, alarm: bool = False, **of_frame: Any) -> Outcome:
    verdict = decide(3, np.array([-10.25, -20.5, -30.0], np.float32), np.array([0, 1, 3], np.int32), 2)
    return Outcome(frame(index, **of_frame), verdict, label=0, alarm=alarm, wall_ns=WALL_NS + index, stages=STAGES)


def unguarded(index: int = 0, **of_frame: Any) -> Outcome:
    return Outcome(frame(index, **of_frame), Verdict(Decision.UNGUARDED, 2), label=2, wall_ns=WALL_NS, stages=STAGES)


def invalid(index: int = 0, **of_frame: Any) -> Outcome:
    verdict = decide(1, np.array([np.nan, -20.5], np.float32), np.array([0, 1], np.int32), 1)
    return Outcome(frame(index, **of_frame), verdict, wall_ns=WALL_NS + index, stages=STAGES)


def unreadable(index: int = 0, **of_frame: Any) -> Outcome:
    """A frame without pixels, and so without a prediction."""
    problem = "half.png: cannot be read as an image: it is damaged"
    broken = replace(frame(index), pixels=None, problem=problem, name="half.png", **of_frame)
    return Outcome(broken, Verdict(Decision.INVALID, reason=problem), wall_ns=WALL_NS, stages={"whole": 12})


def dropped(index: int = 0, **of_frame: Any) -> Outcome:
    return Outcome(frame(index, **of_frame), None, drop="newer frame", wall_ns=WALL_NS)


def every_kind() -> Iterator[Outcome]:
    """One of each, and the frames that a sink must not stumble over."""
    makers = (accepted, triggered, unguarded, invalid, unreadable, dropped)
    for index, make in enumerate(makers):
        yield make(index)
    yield triggered(6, alarm=True, camera="rear", name="half\udcff.png", captured_ns=0)
    yield dropped(7, pixels=None)
    yield triggered(8, pixels=pixels()[:, :, 0])
    yield triggered(9, pixels=pixels("bgr"), colour="bgr")
    yield triggered(10, pixels=pixels("nv12-bt709", 48, 64), colour="nv12-bt709")
    yield triggered(11, pixels=pixels(height=1, width=1))
    yield triggered(12, pixels=np.zeros((8, 8, 4), np.uint8))
    yield triggered(13, pixels=np.zeros((8, 8, 1), np.uint8))
    yield triggered(14, pixels=np.zeros((8, 8, 5), np.uint8))  # a multi-spectral camera
    yield invalid(15, pixels=np.zeros((7, 7, 7, 7), np.uint8))
