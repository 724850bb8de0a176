"""The CUDA scorer: pycuda owns context, memory and stream; csrc/score_cuda.cu computes.

Checked without a GPU: the kernel on the CPU, this module through a double of the driver.  It has not run on a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.errors import DependencyError, OptionError, ScoreError
from inflight_edge.guard import KINDS, FloatArray, Guard
from inflight_edge.scoring.parameters import Parameters, prepare
from inflight_edge.verdict import Decision, Verdict

__all__ = ["VERDICT", "CudaBackend", "CudaGraph", "CudaScorer", "Memory", "as_verdict"]

Memory = Literal["auto", "mapped", "copied"]

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
        for name in ("n_guards", "n_features", "n_classes", "max_rows", "n_groups", "max_frames", "two_vectors")
    ]
    + [("guards", "u8"), ("tickets", "u8")],
    align=True,
)
OUT = np.dtype([("verdicts", "u8"), ("log_likelihoods", "u8")], align=True)

_BINDING = "inflight_edge.scoring._cuda"
_BINDING_REMEDY = "install inflight-edge again where nvcc is on the PATH, or choose another backend"
_PYCUDA_REMEDY = "pip install pycuda (needs nvcc) on a machine with an NVIDIA GPU, or choose another backend"
# Device arrays start at multiples of this: whole cache lines, and what cudaMalloc promises.
_ALIGNMENT = 256
_DECISIONS = (Decision.ACCEPT, Decision.TRIGGER, Decision.UNGUARDED, Decision.INVALID)


class CudaScorer:
    """Judges frames whose features and logits lie in device memory, on a stream of its own, without waiting for it.

    guards      at least one; all with the same D, each with another target.
    n_classes   C, the number of logits.
    max_frames  largest batch; buffers are made once.
    device      index of the GPU, whose primary context is shared with TensorRT and torch.
    memory      ``mapped``: the device writes verdicts straight into host memory; ``copied``: into its own, copied
                on the stream; ``auto``: mapped where CPU and GPU share their memory.

    stream      handle of the stream (an int), for engines that shall enqueue on it.
    Any thread may call it, one at a time.  Close it, or use it in ``with``.
    Raises OptionError, DependencyError without pycuda, binding or GPU, and ScoreError when the driver refuses.
    """

    def __init__(
        self,
        guards: Sequence[Guard],
        n_classes: int,
        *,
        max_frames: int = 1,
        device: int = 0,
        memory: Memory = "auto",
    ) -> None:
        _check_options(guards, n_classes, max_frames, memory)
        self.n_features = guards[0].n_features
        self.max_rows = max(guard.classes.shape[0] for guard in guards)
        self.max_frames = max_frames
        self._binding: Any = require(_BINDING, _BINDING_REMEDY)
        self._driver: Any = require("pycuda.driver", _PYCUDA_REMEDY)
        self._guards = tuple(guards)
        try:
            self._driver.init()
            gpu = self._driver.Device(device)
            self._context: Any = gpu.retain_primary_context()
        except self._driver.Error as error:
            raise DependencyError(f"device: expected an NVIDIA GPU with index {device}, got: {error}") from error
        if memory == "auto":
            shared = gpu.get_attribute(self._driver.device_attribute.INTEGRATED)
            memory = "mapped" if shared else "copied"
        self.memory: str = memory
        self._allocations: list[Any] = []
        with self._current(), self._translated():
            try:
                self._allocate(n_classes)
            except BaseException:
                self._free()
                raise

    def _allocate(self, n_classes: int) -> None:
        self._stream: Any = self._driver.Stream()
        self.stream = int(self._stream.handle)
        self._verdicts = self.buffer((self.max_frames,), VERDICT)
        self._scores = self.buffer((self.max_frames, self.max_rows), np.float32)
        tickets = self._device_memory(4 * self.max_frames)
        self._driver.memset_d32(tickets, 0, self.max_frames)
        table = np.stack([self._upload_guard(guard) for guard in self._guards])
        groups = [self._binding.groups(int(row["kind"]), int(row["n_rows"]), int(row["n_components"])) for row in table]
        params = np.zeros((), PARAMS)
        params["n_guards"] = len(table)
        params["n_features"] = self.n_features
        params["n_classes"] = n_classes
        params["max_rows"] = self.max_rows
        params["n_groups"] = max(groups)
        params["max_frames"] = self.max_frames
        params["two_vectors"] = any(guard.kind != "diagonal" for guard in self._guards)
        params["guards"] = int(self._upload([table])[0])
        params["tickets"] = int(tickets)
        self._params = params
        self._out = np.zeros((), OUT)
        self._out["verdicts"] = self._verdicts.address
        self._out["log_likelihoods"] = self._scores.address

    def enqueue(self, features: int, logits: int | None, n_frames: int) -> None:
        """Enqueue the verdicts on N frames; returns at once.  May be captured into a graph.

        features: address of (N, D) float32 in device memory.  logits: of (N, C), or None: every frame is scored by the
        first guard.  Raises ScoreError when there are too many frames or the launch fails.
        """
        if not 0 <= n_frames <= self.max_frames:
            raise ScoreError(f"n_frames: expected 0 to {self.max_frames}, got {n_frames}; raise max_frames")
        with self._current(), self._translated():
            self._check(
                self._binding.launch(
                    self._params.ctypes.data, features, logits or 0, self._out.ctypes.data, n_frames, self.stream
                ),
                "launch",
            )
            self._verdicts.to_host(self._stream)
            self._scores.to_host(self._stream)

    def results(self) -> tuple[NDArray[np.void], FloatArray]:
        """Wait for the stream; the last batch's verdicts (max_frames,) VERDICT and log-likelihoods (max_frames, R).

        Both are views of the buffers that the next batch overwrites.  R is the largest number of rows of a guard.
        """
        with self._current(), self._translated():
            self._stream.synchronize()
        return self._verdicts.host, self._scores.host

    def verdict(self, index: int) -> Verdict:
        """Verdict on frame ``index`` of the last batch, after results()."""
        return as_verdict(self._verdicts.host[index], self._scores.host[index], self._guards)

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """Record what ``enqueue`` puts on the stream (an engine's work and enqueue(), say) into a CUDA graph.

        Nothing of it runs now; what it uses must have run once before.  Its exception ends the capture and comes out.
        """
        with self._current():
            handle, status, error = self._binding.graph_capture(enqueue, self.stream)
            if error is not None:
                raise error
            self._check(status, "capture")
        return CudaGraph(self, handle)

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Array in host memory and its twin in device memory, freed with the scorer."""
        with self._current(), self._translated():
            return Buffer(self, shape, dtype)

    def close(self) -> None:
        """Wait for the stream and free everything; a second call does nothing."""
        if self._context is None:
            return
        with self._current():
            self._stream.synchronize()
            self._free()
        self._context = None

    def _free(self) -> None:
        while self._allocations:
            self._allocations.pop().free()

    def __enter__(self) -> CudaScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The primary context is current in this thread: contexts belong to threads, and engines have workers."""
        if self._context is None:
            raise ScoreError("scorer: expected an open one, got one that was closed; make another")
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            raise ScoreError(f"driver: expected success, got: {error}; make the scorer again") from error

    def _check(self, status: int, what: str) -> None:
        if status:
            text = self._binding.error_text(status)
            raise ScoreError(f"{what}: expected success, got CUDA error {status}: {text}; see the guard's limits")

    def _device_memory(self, n_bytes: int) -> Any:
        with self._translated():
            self._allocations.append(self._driver.mem_alloc(max(n_bytes, 1)))
        return self._allocations[-1]

    def _upload(self, arrays: Sequence[NDArray[Any]]) -> list[int]:
        """Copy arrays into one allocation; the address of each, 0 for an empty one."""
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
        base = int(self._device_memory(sum(sizes)))
        addresses = []
        for array, size in zip(arrays, sizes, strict=True):
            if array.nbytes:
                with self._translated():
                    self._driver.memcpy_htod(base, array)
            addresses.append(base if array.nbytes else 0)
            base += size
        return addresses

    def _upload_guard(self, guard: Guard) -> NDArray[np.void]:
        """The guard's GUARD record, its arrays in device memory."""
        parameters: Parameters = prepare(guard)
        addresses = self._upload([*(getattr(parameters, name) for name in _POINTERS), guard.classes])
        record = np.zeros((), GUARD)
        record["kind"] = KINDS.index(guard.kind)
        record["n_features"], record["n_components"] = guard.n_features, guard.n_components
        record["n_rows"] = guard.classes.shape[0]
        for name, address in zip((*_POINTERS, "classes"), addresses, strict=True):
            record[name] = address
        record["target"], record["target_row"] = guard.target, guard.target_row
        return record


class Buffer:
    """host: page-locked NumPy array.  address: where the device sees it, or its copy in device memory."""

    def __init__(self, scorer: CudaScorer, shape: tuple[int, ...], dtype: Any) -> None:
        self._driver = driver = scorer._driver
        flags = driver.host_alloc_flags.DEVICEMAP if scorer.memory == "mapped" else 0
        self.host: NDArray[Any] = driver.pagelocked_empty(shape, dtype, mem_flags=flags)
        self._copy = None if scorer.memory == "mapped" else scorer._device_memory(self.host.nbytes)
        pinned: Any = self.host.base
        self.address = int(pinned.get_device_pointer() if self._copy is None else self._copy)

    def to_device(self, stream: Any) -> None:
        """Enqueue the copy to the device, if there is one to make."""
        if self._copy is not None:
            self._driver.memcpy_htod_async(self._copy, self.host, stream)

    def to_host(self, stream: Any) -> None:
        """Enqueue the copy to the host, if there is one to make."""
        if self._copy is not None:
            self._driver.memcpy_dtoh_async(self.host, self._copy, stream)


class CudaGraph:
    """Work recorded by CudaScorer.capture: launched again and again, addresses and shapes fixed.  Close it first."""

    def __init__(self, scorer: CudaScorer, handle: int) -> None:
        self._scorer, self._handle = scorer, handle

    def launch(self) -> None:
        """Enqueue all of it on the scorer's stream.  Raises ScoreError."""
        with self._scorer._current():
            self._scorer._check(self._scorer._binding.graph_launch(self._handle, self._scorer.stream), "graph")

    def close(self) -> None:
        """Wait for the stream and free the graph; a second call does nothing."""
        if self._handle:
            self._scorer.results()
            handle, self._handle = self._handle, 0
            with self._scorer._current():
                self._scorer._check(self._scorer._binding.graph_destroy(handle), "graph")


class CudaBackend:
    """Backend ``cuda`` of Scorer: frames come from and scores return to host memory.  One thread at a time inside."""

    def __init__(self, guard: Guard, *, max_frames: int = 64, memory: Memory = "auto") -> None:
        self._scorer = CudaScorer([guard], 1, max_frames=max_frames, memory=memory)
        self._features = self._scorer.buffer((max_frames, guard.n_features), np.float32)
        self._features.host[...] = 0.0
        self._n_rows = int(guard.classes.shape[0])
        self._lock = threading.Lock()

    def score_into(self, features: FloatArray, out: FloatArray) -> bool:
        """(D,) float32 -> (R,) float32.  False when an array does not fit; nothing was written then."""
        fits = _fits(features, 1, self._scorer.n_features) and _fits(out, 1, self._n_rows) and out.flags.writeable
        return fits and self.score_batch_into(features[None], out[None])

    def score_batch_into(self, features: FloatArray, out: FloatArray) -> bool:
        """(N, D) float32 -> (N, R) float32.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 2, self._scorer.n_features) and _fits(out, 2, self._n_rows) and out.flags.writeable):
            return False
        if features.shape[0] != out.shape[0]:
            return False
        with self._lock:
            step = self._scorer.max_frames
            for start in range(0, features.shape[0], step):
                batch = features[start : start + step]
                self._features.host[: len(batch)] = batch
                with self._scorer._current(), self._scorer._translated():
                    self._features.to_device(self._scorer._stream)
                self._scorer.enqueue(self._features.address, None, len(batch))
                out[start : start + step] = self._scorer.results()[1][: len(batch)]
        return True

    def close(self) -> None:
        """Free the device's memory."""
        self._scorer.close()


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


def _check_options(guards: Sequence[Guard], n_classes: int, max_frames: int, memory: str) -> None:
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
    if memory not in ("auto", "mapped", "copied"):
        raise OptionError(f"memory: expected one of auto, mapped, copied, got {memory!r}")


def _fits(array: object, n_axes: int, length: int) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.dtype == np.float32
        and array.ndim == n_axes
        and array.shape[-1] == length
        and array.flags.c_contiguous
        and array.flags.aligned
    )
