"""What passes through the pipeline: a frame on its way in, its outcome on the way out, and the state of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inflight_edge.colour import Colour
from inflight_edge.latency import Summary
from inflight_edge.verdict import Verdict

__all__ = ["Context", "Frame", "Outcome", "Status"]


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One image as a source gives it.

    pixels       uint8 in the layout of ``colour``, see colour.check_frame; None when it could not be read, and in the
                 outcome of a dropped frame.  The source writes to them no more.
    captured_ns  time.monotonic_ns() when it was captured, or handed over by the library that captures.
    colour       what the bytes mean.
    name         file name or the like, "" for a camera's frames.
    problem      why there are no pixels, else "".  Such a frame is judged INVALID, never skipped.
    camera       name of the source; set by the pipeline.
    index        counts the source's frames from 0, over reconnections; set by the pipeline.
    """

    pixels: NDArray[np.uint8] | None
    captured_ns: int
    colour: Colour = "rgb"
    name: str = ""
    problem: str = ""
    camera: str = ""
    index: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of one frame: a verdict, or a drop.  Every frame that a source gave has exactly one.

    verdict  None when the frame was dropped.
    drop     why it was never judged, else "": ``late`` (another frame took its place), ``limit`` (read after the last
             frame that was asked for), ``stop`` (the stop could not wait for it).
    label    the class index that the pipeline emits: the prediction if the verdict passes; of a trigger the source
             class where the pipeline repairs; None for what is refused or dropped.
    alarm    whether the camera's alarm is on after this frame: n of its last m judged frames did not pass.
    wall_ns  time.time_ns() when the outcome was known, for people; intervals never use it.
    stages   nanoseconds by stage.  queue: captured until taken for judgement.  preprocess, guard: of this frame.
             engine: of its batch.  whole: captured until the verdict.  A stage that it did not reach is left out; a
             drop has none.
    """

    frame: Frame
    verdict: Verdict | None
    drop: str = ""
    label: int | None = None
    alarm: bool = False
    wall_ns: int = 0
    stages: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """Counts of a running pipeline since its start; a snapshot.

    captured, judged  frames by camera.               dropped     frames by (camera, reason).
    decisions         by (camera, decision value, predicted class name or "").
    reconnects        by camera.                      alarms      cameras whose alarm is on.
    queues            frames or outcomes waiting, by queue name: ``frames`` and ``sink NAME``.
    lost              outcomes that a sink did not take (queue full or failure), by sink name.
    stages            latencies by stage, and ``sink NAME``: verdict until written.   uptime_ns  since the start.
    """

    captured: Mapping[str, int]
    judged: Mapping[str, int]
    dropped: Mapping[tuple[str, str], int]
    decisions: Mapping[tuple[str, str, str], int]
    reconnects: Mapping[str, int]
    alarms: frozenset[str]
    queues: Mapping[str, int]
    lost: Mapping[str, int]
    stages: Mapping[str, Summary]
    uptime_ns: int


@dataclass(frozen=True, slots=True)
class Context:
    """What a sink may know of the pipeline that opens it.

    class_names  of the detector.     cameras  names of the sources.     bundle  folder of the bundle or "".
    status       gives a fresh snapshot; any thread may call it.
    """

    class_names: tuple[str, ...]
    cameras: tuple[str, ...]
    bundle: str
    status: Callable[[], Status]
