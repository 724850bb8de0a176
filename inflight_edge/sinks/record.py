"""An outcome as JSON, the same for every sink; docs/outcome-schema.md describes it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

from inflight_edge.events import Context, Outcome

__all__ = ["SCHEMA_VERSION", "encode", "flagged", "record", "timestamp"]

# Raised when a reader of the version before could misread a record; a new key alone does not raise it.
SCHEMA_VERSION = 1


def record(outcome: Outcome, context: Context) -> dict[str, Any]:
    """Plain values of an outcome: every key is always there, and a missing or non-finite number is None."""
    frame, verdict = outcome.frame, outcome.verdict
    judged = verdict.as_dict() if verdict is not None else _NOT_JUDGED
    return {
        "schema": SCHEMA_VERSION,
        "camera": _text(frame.camera),
        "index": int(frame.index),
        "name": _text(frame.name),
        "captured_ns": int(frame.captured_ns),
        "time": timestamp(outcome.wall_ns),
        "decision": judged["decision"],
        "passes": verdict is not None and verdict.passes,
        "label": _whole(outcome.label),
        "label_name": _class_name(outcome.label, context),
        "predicted": _whole(judged["predicted"]),
        "predicted_name": _class_name(judged["predicted"], context),
        "source": _whole(judged["source"]),
        "source_name": _class_name(judged["source"], context),
        "margin": None if judged["margin"] is None else float(judged["margin"]),
        "log_likelihoods": judged["log_likelihoods"],
        "reason": _text(judged["reason"]),
        "alarm": bool(outcome.alarm),
        "drop": _text(outcome.drop),
        "problem": _text(frame.problem),
        "stages_ns": {stage: int(nanoseconds) for stage, nanoseconds in outcome.stages.items()},
    }


_NOT_JUDGED: dict[str, Any] = {
    "decision": None, "predicted": None, "source": None, "margin": None, "log_likelihoods": {}, "reason": "",
}  # fmt: skip


def encode(outcome: Outcome, context: Context) -> bytes:
    """The record as one line of ASCII JSON, without its end of line."""
    return json.dumps(record(outcome, context), allow_nan=False, separators=(",", ":")).encode("ascii")


def flagged(outcome: Outcome) -> bool:
    """Whether the frame was judged and refused: trigger or invalid.  A drop is not."""
    return outcome.verdict is not None and not outcome.verdict.passes


def timestamp(wall_ns: int) -> str | None:
    """time.time_ns() as UTC in ISO 8601 with microseconds; None for 0, which means unknown."""
    if wall_ns <= 0:
        return None
    seconds, rest = divmod(wall_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def _class_name(index: int | None, context: Context) -> str | None:
    if index is None or not 0 <= index < len(context.class_names):
        return None
    return _text(context.class_names[index])


def _whole(number: int | None) -> int | None:
    """NumPy's integers are no JSON."""
    return None if number is None else int(number)


def _text(text: str) -> str:
    """The text, half surrogates (bytes of a file name that are no UTF-8) replaced: many readers refuse them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
