"""The CUDA scorer: pycuda owns context, memory and stream; csrc/score_cuda.cu computes.

Checked without a GPU: the kernel on the CPU, this module through a double of the driver.  It has not run on a device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from inflight_edge.errors import OptionError, ScoreError
from inflight_edge.guard import KINDS, FloatArray, Guard
from inflight_edge.scoring.device import Device, Memory, capability
from inflight_edge.scoring.graph import CudaGraph, capture, check_status, load_binding
from inflight_edge.scoring.parameters import Parameters, prepare
from inflight_edge.scoring.verdict_record import VerdictArray, is_record, write_verdict
from inflight_edge.verdict import Decision, Verdict

__all__ = ["VERDICT", "CudaGraph", "CudaScorer", "DeviceBackend", "as_verdict", "check", "cuda_backend"]

# The structs of csrc/inflight_cuda.h; pointers are device addresses.  A test compares sizes and offsets with C's.
VERDICT = np.dtype([("decision", "i4"), ("predicted", "i4"), ("source", "i4"), ("margin", "f4")], align=True)
_POINTERS = ("offsets", "mean", "scale", "origin", "centres", "whitener", "constants")
GUARD = np.dtype(
    [(name, "i4") for name in ("kind", "n_features", "n_rows", "n_components")]
    + [(name, "u8") for name in _POINTERS]
    + [("target", "i4"), ("target_row", "i4"), ("classes", "u8")],
    align=True,
)
PARAMS = np.dtype(
    [
        (name, "i4")
        for name in ("n_guards", "n_features", "n_classes", "max_rows", "n_groups", "max_frames", "n_vectors")
    ]
    + [("guards", "u8"), ("tickets", "u8")],
    align=True,
)
OUT = np.dtype([("verdicts", "u8"), ("log_likelihoods", "u8")], align=True)

_DECISIONS = (Decision.INVALID, Decision.ACCEPT, Decision.TRIGGER, Decision.UNGUARDED)


class CudaScorer:
    """Judges frames whose features and logits lie in device memory, on a stream of its own, without waiting for it.

    guards      at least one; all with the same D, each with another target.
    n_classes   C, the number of logits.
    max_frames  largest batch; buffers are made once.
    index       of the GPU.
    memory      of the results, see Device.

    device      an open one to share, whose index and memory count then; its owner closes it.  The attribute holds the
                one in use: its stream is the one to enqueue an engine's work on, its buffers hold inputs.
    Any thread may call it, one at a time.  Close it, or use it in ``with``.
    Raises OptionError, DependencyError without pycuda, binding or GPU, and ScoreError when the driver refuses.
    """

    def __init__(
        self,
        guards: Sequence[Guard],
        n_classes: int,
        *,
        max_frames: int = 1,
        index: int = 0,
        memory: Memory = "auto",
        device: Device | None = None,
    ) -> None:
        _check_options(guards, n_classes, max_frames)
        self.guards = tuple(guards)
        self.n_features = guards[0].n_features
        self.max_rows = max(guard.classes.shape[0] for guard in guards)
        self.max_frames = max_frames
        self._n_frames = 0
        self._binding = load_binding()
        self._owned = device is None
        self.device = Device(index, memory) if device is None else device
        try:
            self._allocate(n_classes)
        except BaseException:
            self.close()
            raise

    def _allocate(self, n_classes: int) -> None:
        self._verdicts = self.device.buffer((self.max_frames,), VERDICT)
        self._scores = self.device.buffer((self.max_frames, self.max_rows), np.float32)
        table = np.stack([self._upload_guard(guard) for guard in self.guards])
        groups = [self._binding.groups(int(row["kind"]), int(row["n_rows"]), int(row["n_components"])) for row in table]
        params = np.zeros((), PARAMS)
        params["n_guards"] = len(table)
        params["n_features"] = self.n_features
        params["n_classes"] = n_classes
        params["max_rows"] = self.max_rows
        params["n_groups"] = max(groups)
        params["max_frames"] = self.max_frames
        params["n_vectors"] = 3 if any(guard.kind == "full" for guard in self.guards) else 2
        params["guards"], params["tickets"] = self.device.upload([table, np.zeros(self.max_frames, np.uint32)])
        self._params = params
        self._out = np.zeros((), OUT)
        self._out["verdicts"] = self._verdicts.address
        self._out["log_likelihoods"] = self._scores.address

    def _upload_guard(self, guard: Guard) -> NDArray[np.void]:
        """The guard's GUARD record, its arrays in device memory."""
        parameters: Parameters = prepare(guard)
        addresses = self.device.upload([*(getattr(parameters, name) for name in _POINTERS), guard.classes])
        record = np.zeros((), GUARD)
        record["kind"] = KINDS.index(guard.kind)
        record["n_features"], record["n_components"] = guard.n_features, guard.n_components
        record["n_rows"] = guard.classes.shape[0]
        for name, address in zip((*_POINTERS, "classes"), addresses, strict=True):
            record[name] = address
        record["target"], record["target_row"] = guard.target, guard.target_row
        return record

    def enqueue(self, features: int, logits: int | None, n_frames: int) -> None:
        """Enqueue the verdicts on N frames; returns at once.  May be captured into a graph.

        features: address of (N, D) float32 in device memory.  logits: of (N, C), or None: every frame is scored by the
        first guard.  Raises ScoreError when there are too many frames or the launch fails.
        """
        if not 0 <= n_frames <= self.max_frames:
            raise ScoreError(f"n_frames: expected 0 to {self.max_frames}, got {n_frames}; raise max_frames")
        self._n_frames = n_frames
        params, out = int(self._params.ctypes.data), int(self._out.ctypes.data)
        with self.device.current():
            status = self._binding.launch(params, features, logits or 0, out, n_frames, self.device.stream)
            check_status(self._binding, status, "launch")
            if n_frames:
                self._verdicts.to_host(n_frames)
                self._scores.to_host(n_frames)

    def forget(self) -> None:
        """Make the results on the host those of nobody, so that a batch that never ran cannot pass for the last one."""
        self._verdicts.host.view(np.uint8)[...] = 0

    def results(self) -> tuple[NDArray[np.void], FloatArray]:
        """Wait for the stream; the last batch's verdicts (max_frames,) VERDICT and log-likelihoods (max_frames, R).

        Both are views of the buffers that the next batch overwrites; entries past its frames are of earlier ones.
        R is the largest number of rows of a guard.
        """
        self.device.synchronize()
        return self._verdicts.host, self._scores.host

    def verdict(self, index: int) -> Verdict:
        """Verdict on frame ``index`` of the batch enqueued or launched last, after results().  Raises ScoreError."""
        if not 0 <= index < self._n_frames:
            raise ScoreError(f"index: expected 0 to {self._n_frames - 1}, a frame of the last batch, got {index}")
        return as_verdict(self._verdicts.host[index], self._scores.host[index], self.guards)

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """Record what ``enqueue`` puts on the stream (an engine's work and enqueue(), say) into a CUDA graph.

        Nothing of it runs now; what it uses must have run once before.  Its exception ends the capture and comes out.
        """
        ran = self._n_frames
        try:
            graph = capture(self.device, self._binding, enqueue)
        finally:
            recorded, self._n_frames = self._n_frames, ran

        def note() -> None:
            self._n_frames = recorded

        graph.before_launch = note
        return graph

    def close(self) -> None:
        """Wait for the stream and free everything, if the device is its own; a second call does nothing."""
        if self._owned:
            self.device.close()

    def __enter__(self) -> CudaScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DeviceScorer(Protocol):
    """What DeviceBackend needs: log-likelihoods of frames in device memory."""

    device: Device
    max_frames: int

    def enqueue(self, features: int, logits: None, n_frames: int) -> None:
        """Enqueue the scores of (N, D) float32 at an address."""

    def results(self) -> tuple[Any, FloatArray]:
        """Wait; something else, and (max_frames, R) float32."""


class DeviceBackend:
    """Backend of Scorer on a device scorer: frames come from and scores return to host memory.

    Any number of threads may call it; one at a time is inside.
    """

    def __init__(self, scorer: DeviceScorer, guard: Guard) -> None:
        self._scorer = scorer
        self._features = scorer.device.buffer((scorer.max_frames, guard.n_features), np.float32)
        self._guard, self._n_features, self._n_rows = guard, guard.n_features, int(guard.classes.shape[0])
        self._lock = threading.Lock()
        weakref.finalize(self, scorer.device.close)  # whichever thread lets go of it last

    def score_into(self, features: FloatArray, out: FloatArray) -> bool:
        """(D,) float32 -> (R,) float32.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 1, self._n_features) and _fits(out, 1, self._n_rows)):
            return False
        return self.score_batch_into(features[None], out[None])

    def score_batch_into(self, features: FloatArray, out: FloatArray) -> bool:
        """(N, D) float32 -> (N, R) float32.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 2, self._n_features) and _fits(out, 2, self._n_rows) and out.flags.writeable):
            return False
        if features.shape[0] != out.shape[0]:
            return False
        step = self._scorer.max_frames
        with self._lock:
            for start in range(0, features.shape[0], step):
                batch = features[start : start + step]
                self._features.host[: len(batch)] = batch
                self._features.to_device(len(batch))
                self._scorer.enqueue(self._features.address, None, len(batch))
                out[start : start + step] = self._scorer.results()[1][: len(batch)]
        return True

    def judge_into(self, features: FloatArray, out: VerdictArray) -> bool:
        """(D,) float32 -> (1,) VERDICT_DTYPE.  False when an array does not fit; nothing was written then."""
        scores = np.empty(self._n_rows, np.float32)
        return is_record(out) and self.score_into(features, scores) and write_verdict(self._guard, scores, out)

    def close(self) -> None:
        """Free the device's memory."""
        self._scorer.device.close()


def check() -> None:
    """Raises DependencyError when the backend ``cuda`` cannot run here."""
    load_binding()
    capability()


def cuda_backend(guard: Guard, *, max_frames: int = 64, memory: Memory = "auto") -> DeviceBackend:
    """Backend ``cuda`` of Scorer."""
    return DeviceBackend(CudaScorer([guard], 1, max_frames=max_frames, memory=memory), guard)


def as_verdict(record: NDArray[np.void] | np.void, log_likelihoods: FloatArray, guards: Sequence[Guard]) -> Verdict:
    """Verdict from a VERDICT record and its frame's log-likelihoods (R,), which are copied."""
    decision = _DECISIONS[int(record["decision"])]
    predicted, source = (None if record[name] < 0 else int(record[name]) for name in ("predicted", "source"))
    guard = next((guard for guard in guards if guard.target == predicted), None)
    if guard is None:
        reason = "logits or features are not finite" if decision is Decision.INVALID else ""
        return Verdict(decision, predicted, reason=reason)
    scores = log_likelihoods[: guard.classes.shape[0]].copy()
    reason = "no class explains the features: a log-likelihood is NaN or all are -inf"
    reason = reason if decision is Decision.INVALID else ""
    return Verdict(decision, predicted, source, float(record["margin"]), scores, guard.classes, reason)


def _check_options(guards: Sequence[Guard], n_classes: int, max_frames: int) -> None:
    if not guards:
        raise OptionError("guards: expected at least one, got none")
    sizes = sorted({guard.n_features for guard in guards})
    if len(sizes) > 1:
        raise OptionError(f"guards: expected one number of features, got {sizes}; they belong to different models")
    targets = sorted(guard.target for guard in guards)
    if len(set(targets)) < len(targets):
        raise OptionError(f"guards: expected one guard per target, got targets {targets}")
    if n_classes < 1 or max_frames < 1:
        raise OptionError(f"n_classes, max_frames: expected at least 1, got {n_classes} and {max_frames}")


def _fits(array: object, n_axes: int, length: int) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.dtype == np.float32
        and array.ndim == n_axes
        and array.shape[-1] == length
        and array.flags.c_contiguous
        and array.flags.aligned
    )
