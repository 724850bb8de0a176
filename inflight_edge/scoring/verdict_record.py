"""A verdict as a NumPy record, the form that scorers write without making a Python object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inflight_edge.guard import FloatArray, Guard
from inflight_edge.verdict import Decision, decide

__all__ = ["DECISIONS", "VERDICT_DTYPE", "VerdictArray", "is_record", "write_verdict"]

# ife_verdict of csrc/inflight.h: decision is the index in DECISIONS, source a class index or -1, margin in nats,
# n_scored the rows whose parameters were read in full, of n_rows.
VERDICT_DTYPE = np.dtype(
    [("decision", np.int32), ("source", np.int32), ("margin", np.float64), ("n_scored", np.int32), ("n_rows", np.int32)]
)
DECISIONS = (Decision.INVALID, Decision.ACCEPT, Decision.TRIGGER)
VerdictArray = NDArray[np.void]


def is_record(out: object) -> bool:
    """True for a writeable C-contiguous array of shape (1,) and dtype VERDICT_DTYPE."""
    return isinstance(out, np.ndarray) and (out.shape, out.dtype) == ((1,), VERDICT_DTYPE) and out.flags.carray


def write_verdict(guard: Guard, log_likelihoods: FloatArray, out: VerdictArray) -> bool:
    """Write what verdict.decide says of (R,) float32 nats, all of them scored in full, into a record.  Returns True."""
    verdict = decide(guard.target, log_likelihoods, guard.classes, guard.target_row)
    source = -1 if verdict.source is None else verdict.source
    n_rows = guard.classes.shape[0]
    out[0] = (DECISIONS.index(verdict.decision), source, verdict.margin, n_rows, n_rows)
    return True
