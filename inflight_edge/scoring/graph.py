"""CUDA graphs: work on a device's stream, recorded once and launched again and again.

Checked through doubles of driver and binding.  It has not run on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inflight_edge._optional import require
from inflight_edge.errors import ScoreError
from inflight_edge.scoring.device import Device

__all__ = ["CudaGraph", "capture", "check_status", "load_binding"]

_BINDING = "inflight_edge.scoring._cuda"
_REMEDY = "install inflight-edge again where nvcc is on the PATH, or choose another backend"


def load_binding() -> Any:
    """The binding of csrc/inflight_cuda.h.  Raises DependencyError where it was not built."""
    return require(_BINDING, _REMEDY)


def check_status(binding: Any, status: int, what: str) -> None:
    """Raise ScoreError for a status that is no success."""
    if status:
        text = binding.error_text(status)
        raise ScoreError(f"{what}: expected success, got CUDA error {status}: {text}; run doctor")


def capture(device: Device, binding: Any, enqueue: Callable[[], None]) -> CudaGraph:
    """Record what ``enqueue`` puts on the device's stream.

    Nothing of it runs now; what it uses must have run once before.  Its exception ends the capture and comes out.
    """
    with device.current():
        handle, status, error = binding.graph_capture(enqueue, device.stream)
    if error is not None:
        raise error
    check_status(binding, status, "capture")
    return CudaGraph(device, binding, handle)


def _nothing() -> None:
    pass


class CudaGraph:
    """Recorded work: addresses and shapes are fixed.  Close it before the device."""

    def __init__(self, device: Device, binding: Any, handle: int) -> None:
        self._device, self._binding, self._handle = device, binding, handle
        self.before_launch: Callable[[], None] = _nothing

    def launch(self) -> None:
        """Enqueue all of it on the device's stream.  Raises ScoreError."""
        self.before_launch()
        with self._device.current():
            status = self._binding.graph_launch(self._handle, self._device.stream)
        check_status(self._binding, status, "graph")

    def close(self) -> None:
        """Wait for the stream and free the graph; a second call does nothing."""
        if self._handle:
            self._device.synchronize()
            handle, self._handle = self._handle, 0
            with self._device.current():
                status = self._binding.graph_destroy(handle)
            check_status(self._binding, status, "graph")
