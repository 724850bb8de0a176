"""TensorRT on an NVIDIA GPU: a plan that `inflight-edge compile` made, with the guards behind it on the same stream.

Checked through doubles of TensorRT and of the driver that compute.  It has not run on a device.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from inflight_edge.engines import Wait
from inflight_edge.engines._tensorrt_session import Session
from inflight_edge.errors import EngineError, OptionError, ScoreError
from inflight_edge.guard import Guard
from inflight_edge.scoring.device import Memory
from inflight_edge.verdict import Verdict

__all__ = ["TensorRtEngine"]

FloatArray = NDArray[np.float32]
_T = TypeVar("_T")


class TensorRtEngine:
    """A classifier run by TensorRT; any thread may call it, one worker thread of its own does the work.

    plan       bytes of a plan; see plans.read_plan, which refuses one that was made elsewhere.
    guards     none: `run` alone works.  Else `judge` gives verdicts, made on the GPU by the CUDA scorer.
    n_classes  C, with guards.
    index      of the GPU.
    memory, wait, graph  see EngineOptions.

    A plan has a fixed batch size: other numbers of frames are met by chunks, the last padded.
    input_shape (channels, height, width), n_classes C, n_features D, batch_size.
    why_no_graph  "" when a frame's work is launched as one CUDA graph.
    Close it, or use it in ``with``.  Raises EngineError, and DependencyError without TensorRT, pycuda or GPU.
    """

    name = "tensorrt"

    def __init__(
        self,
        plan: bytes,
        *,
        guards: Sequence[Guard] = (),
        n_classes: int = 0,
        index: int = 0,
        memory: Memory = "auto",
        wait: Wait = "blocking",
        graph: bool = True,
    ) -> None:
        self.guards = tuple(guards)
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "inflight-edge-tensorrt")
        try:
            self._session = self._do(lambda: Session(plan, self.guards, n_classes, index, memory, wait, graph))
        except BaseException:
            self._worker.shutdown()
            self._worker = None
            raise
        # For one that nobody closed, before the driver ends with the process; no call is running then.
        self._finalize = weakref.finalize(self, self._session.close)
        self._signature = self._session.signature
        self.why_no_graph = self._session.why_no_graph
        if graph and self.why_no_graph:
            text = f"tensorrt: no CUDA graph, each piece is enqueued by itself: {self.why_no_graph}"
            warnings.warn(text, stacklevel=2)
        self.batch_size = self._signature.batch_size
        self.input_shape = self._signature.input_shape
        self.n_classes, self.n_features = self._signature.n_classes, self._signature.n_features

    def run(self, batch: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See Engine.run."""
        return self._do(lambda: self._signature.run(batch, lambda chunk: self._session.run(chunk)[:2]))

    def judge(self, batch: FloatArray) -> list[Verdict]:
        """Verdicts on a batch (N, channels, height, width) float32, N >= 1, made on the GPU; needs guards.

        Raises EngineError.
        """
        if not self.guards:
            raise OptionError("judge: expected an engine with guards, got none; make it with guards")
        verdicts: list[Verdict] = []

        def call(chunk: FloatArray) -> tuple[FloatArray, FloatArray]:
            logits, features, judged = self._session.run(chunk)
            verdicts.extend(judged)
            return logits, features

        self._do(lambda: self._signature.run(batch, call))
        return verdicts[: batch.shape[0]]  # the last chunk was padded

    def close(self) -> None:
        """Wait for the GPU and free everything; a second call does nothing."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            self._finalize.detach()
            try:
                worker.submit(self._session.close).result()
            finally:
                worker.shutdown()

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, work: Callable[[], _T]) -> _T:
        """The result of work done by the worker thread; the driver's errors come out as EngineError."""
        with self._lock:
            if self._worker is None:
                raise EngineError("tensorrt: expected an open engine, got one that was closed; make another")
            future = self._worker.submit(work)
        try:
            return future.result()
        except ScoreError as error:
            raise EngineError(f"tensorrt: {error}") from error
