"""A GPU through pycuda: primary context, memory and one stream, for the scorers that run there.

Checked through a double of the driver.  It has not run on a device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.errors import DependencyError, OptionError, ScoreError

__all__ = ["Buffer", "Device", "Memory", "capability"]

Memory = Literal["auto", "mapped", "copied"]

_REMEDY = "pip install pycuda (needs nvcc) on a machine with an NVIDIA GPU, or choose another backend"
# Device arrays start at multiples of this: whole cache lines, and what cudaMalloc promises.
_ALIGNMENT = 256
# CU_STREAM_NON_BLOCKING, which pycuda has no name for.  Else work of others on the legacy default stream (torch's)
# would wait for this stream's and this for theirs, and would end a capture.
_NON_BLOCKING = 1

# The primary context of each device, retained once and for the life of the process: pycuda 2026.1 hands a primary
# context that is dropped to cuCtxDetach, which is for other contexts; only an explicit detach() releases it.
_contexts: dict[tuple[int, int], tuple[Any, Any]] = {}
_contexts_lock = threading.Lock()


def _retain(driver: Any, gpu: Any, index: int) -> Any:
    with _contexts_lock:
        key = id(driver), index
        if key not in _contexts:
            _contexts[key] = driver, gpu.retain_primary_context()
        return _contexts[key][1]


def _release() -> None:
    while _contexts:
        _, (_, context) = _contexts.popitem()
        context.push()
        context.detach()


# Not atexit: finalizers run in the reverse order of their making, so that those of scorers and engines come before.
weakref.finalize(_retain, _release)


def capability(index: int = 0) -> tuple[int, int]:
    """Compute capability of a GPU, (8, 7) for one.  Makes no context.  Raises DependencyError without pycuda or GPU."""
    driver = require("pycuda.driver", _REMEDY)
    try:
        driver.init()
        major, minor = driver.Device(index).compute_capability()
    except driver.Error as error:
        raise DependencyError(f"device: expected an NVIDIA GPU with index {index}, got: {error}") from error
    return int(major), int(minor)


class Device:
    """Owns a stream and device memory in the primary context, which TensorRT and torch share.

    index   of the GPU.
    memory  of buffers: ``mapped``, host memory that the device reads and writes; ``copied``, memory on both sides;
            ``auto``, mapped where CPU and GPU share their memory.  The attribute holds the one chosen.

    stream             handle of the stream, an int; pycuda_stream is pycuda's object.
    capability         compute capability, (8, 7) for one.
    gpu                name of the GPU.
    Any thread may call it.  Raises OptionError, DependencyError without pycuda or GPU, ScoreError when the driver fails.
    """

    def __init__(self, index: int = 0, memory: Memory = "auto") -> None:
        if memory not in ("auto", "mapped", "copied"):
            raise OptionError(f"memory: expected one of auto, mapped, copied, got {memory!r}")
        self.driver: Any = require("pycuda.driver", _REMEDY)
        self.capability = capability(index)
        try:
            gpu = self.driver.Device(index)
            self._context: Any = _retain(self.driver, gpu, index)
        except self.driver.Error as error:
            raise DependencyError(f"device: expected an NVIDIA GPU with index {index}, got: {error}") from error
        if memory == "auto":
            memory = "mapped" if gpu.get_attribute(self.driver.device_attribute.INTEGRATED) else "copied"
        self.memory: str = memory
        self.gpu: str = gpu.name()
        self._allocations: list[Any] = []
        # Called by close() with the context current: pycuda frees nothing in a thread without it, and says nothing.
        self.on_close: list[Callable[[], None]] = []
        with self.current():
            self.pycuda_stream: Any = self.driver.Stream(_NON_BLOCKING)
            self.stream = int(self.pycuda_stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is current in this thread: contexts belong to threads, and engines have workers.

        The driver's errors come out as ScoreError.
        """
        if self._context is None:
            raise ScoreError("device: expected an open one, got one that was closed; make another")
        try:
            self._context.push()
        except self.driver.Error as error:
            raise ScoreError(f"driver: expected success, got: {error}; make the scorer again") from error
        try:
            yield
        except self.driver.Error as error:
            raise ScoreError(f"driver: expected success, got: {error}; make the scorer again") from error
        finally:
            self.driver.Context.pop()

    def allocate(self, n_bytes: int) -> Any:
        """Device memory, freed by close()."""
        with self.current():
            allocation = self.driver.mem_alloc(max(n_bytes, 1))
        self._allocations.append(allocation)
        return allocation

    def upload(self, arrays: Sequence[NDArray[Any]]) -> list[int]:
        """Copy arrays into one allocation; the address of each, 0 for an empty one."""
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
        base = int(self.allocate(sum(sizes)))
        addresses = []
        with self.current():
            for array, size in zip(arrays, sizes, strict=True):
                if array.nbytes:
                    # On the stream: a copy on the default one is not ordered before this one's kernels.
                    self.driver.memcpy_htod_async(base, array, self.pycuda_stream)
                addresses.append(base if array.nbytes else 0)
                base += size
            self.pycuda_stream.synchronize()
        return addresses

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Array in host memory and its twin on the device."""
        buffer = Buffer(self, shape, dtype)
        self.on_close.append(buffer.unpin)
        return buffer

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        with self.current():
            self.pycuda_stream.synchronize()

    def close(self) -> None:
        """Wait for the stream and free it, the device memory and the page-locked one; a second call does nothing.

        The buffers' arrays become ordinary ones; those that somebody else holds stay valid.
        """
        if self._context is None:
            return
        try:
            with self.current():
                try:
                    self.pycuda_stream.synchronize()
                finally:  # after a fault of a kernel too, whose error comes out of the wait
                    self.pycuda_stream = None  # pycuda destroys it only where the context is current
                    while self._allocations:
                        self._allocations.pop().free()
                    for drop in self.on_close:
                        drop()
        finally:
            self._allocations.clear()
            self.on_close.clear()
            self._context = None


class Buffer:
    """host: page-locked NumPy array.  address: where the device sees it, or its copy in device memory."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: Any) -> None:
        self._device = device
        mapped = device.memory == "mapped"
        flags = device.driver.host_alloc_flags.DEVICEMAP if mapped else 0
        with device.current():
            self.host: NDArray[Any] = device.driver.pagelocked_empty(shape, dtype, mem_flags=flags)
            pinned: Any = self.host.base
            self._copy: Any = None
            if mapped:
                self.address = int(pinned.get_device_pointer())
            else:
                self._copy = device.allocate(self.host.nbytes)
                self.address = int(self._copy)
        self.host.view(np.uint8)[...] = 0

    def unpin(self) -> None:
        """Let go of the page-locked memory, which must happen where the context is current."""
        self.host, self._copy = self.host.copy(), None

    def to_device(self, length: int | None = None) -> None:
        """Enqueue the copy to the device, if there is one to make: of the first ``length`` entries, None for all."""
        if self._copy is not None:
            with self._device.current():
                self._device.driver.memcpy_htod_async(self._copy, self.host[:length], self._device.pycuda_stream)

    def to_host(self, length: int | None = None) -> None:
        """Enqueue the copy to the host, if there is one to make: of the first ``length`` entries, None for all."""
        if self._copy is not None:
            with self._device.current():
                self._device.driver.memcpy_dtoh_async(self.host[:length], self._copy, self._device.pycuda_stream)
