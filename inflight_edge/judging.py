"""A batch of frames to verdicts: the region is cut out, and what has no pixels or fails is INVALID."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from inflight_edge.colour import Colour
from inflight_edge.detector import Detector
from inflight_edge.errors import InflightError
from inflight_edge.events import Frame
from inflight_edge.region import Region
from inflight_edge.verdict import Decision, Verdict

__all__ = ["judge_frames"]


def judge_frames(
    detector: Detector, frames: Sequence[Frame], region: Region | None
) -> tuple[list[Verdict], list[dict[str, int]]]:
    """Verdict on each frame, and its nanoseconds by stage, see Detector.judge.  Never raises an Exception."""
    verdicts: dict[int, Verdict] = {}
    stages: list[dict[str, int]] = [{} for _ in frames]
    chosen: list[int] = []
    images: list[NDArray[np.uint8]] = []
    colours: list[Colour] = []
    for i, frame in enumerate(frames):
        if frame.pixels is None or frame.problem:
            verdicts[i] = _invalid(frame.problem or "the source gave no pixels")
            continue
        try:
            images.append(region.crop(frame.pixels, frame.colour) if region else frame.pixels)
        except (InflightError, MemoryError) as error:
            verdicts[i] = _invalid(str(error) or "not enough memory")
            continue
        chosen.append(i)
        colours.append(frame.colour)
    if chosen:
        try:
            judged = detector.judge(images, colours, [stages[i] for i in chosen])
            verdicts |= zip(chosen, judged, strict=True)
        except Exception as error:  # noqa: BLE001 - whatever it was, no frame of the batch may pass
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            verdicts |= {i: _invalid(reason) for i in chosen}
    return [verdicts[i] for i in range(len(frames))], stages


def _invalid(reason: str) -> Verdict:
    return Verdict(Decision.INVALID, reason=reason)
