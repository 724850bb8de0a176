"""OpenVINO on the CPU, in float32: often faster than ONNX Runtime on Intel's processors."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.engines import check_threads
from inflight_edge.engines._signature import OUTPUTS, Declared, Signature, line
from inflight_edge.engines._wire import refuse_external_data
from inflight_edge.errors import EngineError

__all__ = ["OpenVinoEngine"]

# ONNX Runtime's names for OpenVINO's.
_TYPES = {"f32": "float", "f64": "double", "f16": "float16"}


class _SignalStack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Give this thread its own stack for signals back afterwards.

    OpenVINO's CPU plugin sets one of its own and frees it with the model (seen with 2026.4): the next signal, such as a
    SIGTERM that asks for a clean stop, then ended the process.
    """
    libc, stack = _libc(), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(stack))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(stack), None)


def _release(held: dict[str, Any]) -> None:
    with _signal_stack_kept():
        held.clear()


class OpenVinoEngine:
    """A classifier run by OpenVINO's CPU plugin; one object may be called by several threads.

    model, threads  as for OnnxRuntimeEngine; only N may be free: OpenVINO answers a size that does not fit the weights.

    The arithmetic is float32: on some processors OpenVINO takes bfloat16 or float16 unless told otherwise, and the
    guards were fitted to other features then.
    input_shape (channels, height, width), n_classes C and n_features D are None where the model leaves them free.
    Raises EngineError for a model that does not fit or keeps weights in other files, OptionError, and
    DependencyError without OpenVINO.
    """

    name = "openvino"

    def __init__(self, model: bytes, *, threads: int | None = None) -> None:
        check_threads(threads)
        runtime = require("openvino", "pip install 'inflight-edge[openvino]'")
        refuse_external_data(model)
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        # All that belongs to OpenVINO, so that it goes at once.
        self._held: dict[str, Any] = {"local": local()}
        weakref.finalize(self, _release, self._held)
        try:
            with _signal_stack_kept():
                network = runtime.Core().read_model(model)
                declared = [[_declared(port) for port in ports] for ports in (network.inputs, network.outputs)]
                self._signature = Signature.of(*declared)
                compiled = self._held["compiled"] = runtime.Core().compile_model(network, "CPU", options)
                self._held["outputs"] = [compiled.output(name) for name in OUTPUTS]
                del network, compiled
        except RuntimeError as error:
            raise EngineError(f"model: expected an ONNX file, got {line(error)}; export it again") from error
        self.input_shape = self._signature.input_shape
        if None in self.input_shape:
            raise EngineError(
                f"model: expected fixed channels, height and width for openvino, got {self.input_shape}; "
                "export it with fixed sizes or choose onnxruntime"
            )
        self.n_classes, self.n_features = self._signature.n_classes, self._signature.n_features

    def run(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See Engine.run."""
        return self._signature.run(batch, self._call)

    def _call(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        try:
            with _signal_stack_kept():
                results = self._request().infer({self._signature.input_name: np.ascontiguousarray(batch)})
                # Copied: the next call overwrites its own.
                logits, features = (np.array(results[port]) for port in self._held["outputs"])
        except RuntimeError as error:
            raise EngineError(f"openvino failed on a batch {batch.shape}: {line(error)}") from error
        return logits, features

    def _request(self) -> Any:
        """Each thread has a request of its own: one cannot be called by two."""
        mine = self._held["local"]
        if not hasattr(mine, "request"):
            mine.request = self._held["compiled"].create_infer_request()
        return mine.request


def _declared(port: Any) -> Declared:
    """Name, type and axes of an input or output, as ONNX Runtime would give them."""
    shape = port.get_partial_shape()
    axes = [axis.get_length() if axis.is_static else None for axis in shape] if shape.rank.is_static else []
    kind = _TYPES.get(port.get_element_type().get_type_name(), "another type")
    names = [name for name in OUTPUTS if name in port.get_names()] or [port.get_any_name()]
    return Declared(names[0], f"tensor({kind})", axes)
