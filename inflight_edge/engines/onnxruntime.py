"""ONNX Runtime on the CPU: the engine that every machine can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.engines import Optimisation, check_threads
from inflight_edge.engines._signature import OUTPUTS, Declared, Signature, line
from inflight_edge.engines._wire import refuse_external_data
from inflight_edge.errors import EngineError

__all__ = ["OnnxRuntimeEngine", "OnnxSession"]

_FATAL = 4  # the other severities would be printed to the terminal; errors are raised anyway
_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}


class OnnxSession:
    """Any ONNX model on ONNX Runtime's CPUExecutionProvider, with the options that are needed for safety.

    inputs, outputs  as the model declares them: objects with name, type and shape.
    Arguments and errors as of OnnxRuntimeEngine.
    """

    def __init__(
        self, model: bytes, *, threads: int | None = None, arena: bool = True, optimisation: Optimisation = "all"
    ) -> None:
        check_threads(threads)
        runtime = require("onnxruntime", "pip install 'inflight-edge[onnxruntime]'")
        self._errors = _error_types(require("onnxruntime.capi.onnxruntime_pybind11_state", "reinstall onnxruntime"))
        refuse_external_data(model)
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL
        # Else bytes that are ONNX for the check above could be ONNX Runtime's own format for it.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        # ONNX Runtime 1.32 dies in it on attention in float16.
        options.add_session_config_entry("optimization.disable_specified_optimizers", "MatmulTransposeFusion")
        options.enable_cpu_mem_arena = arena
        options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[optimisation])
        if threads is not None:
            options.intra_op_num_threads = threads
        self._run_options = runtime.RunOptions()
        self._run_options.log_severity_level = _FATAL
        try:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise EngineError(f"model: expected an ONNX file, got {line(error)}; export it again") from error
        self.inputs, self.outputs = self._session.get_inputs(), self._session.get_outputs()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs named, in their order.  Raises EngineError when the runtime fails."""
        try:
            arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            results: list[NDArray[Any]] = self._session.run(list(outputs), arrays, self._run_options)
        except self._errors as error:
            shapes = ", ".join(str(array.shape) for array in inputs.values())
            raise EngineError(f"onnxruntime failed on a batch {shapes}: {line(error)}") from error
        return results


class OnnxRuntimeEngine:
    """A classifier run by ONNX Runtime's CPUExecutionProvider; one object may be called by several threads.

    model    ONNX file with one float32 input (N, channels, height, width) and the float32 outputs ``logits``
             (N, C) and ``features`` (N, D).  N may be free or fixed; a fixed N is met by chunks, the last padded.
    threads  threads per call; None leaves the choice to ONNX Runtime.
    arena, optimisation  see EngineOptions.

    input_name; fixed_batch is N where it is fixed, else None.
    input_shape (channels, height, width), n_classes C and n_features D are None where the model leaves them free.
    Raises EngineError for a model that does not fit or keeps weights in other files, OptionError, and
    DependencyError without ONNX Runtime.
    """

    name = "onnxruntime"

    def __init__(
        self, model: bytes, *, threads: int | None = None, arena: bool = True, optimisation: Optimisation = "all"
    ) -> None:
        self._session = OnnxSession(model, threads=threads, arena=arena, optimisation=optimisation)
        both = self._session.inputs, self._session.outputs
        declared = ([Declared(n.name, n.type, n.shape) for n in nodes] for nodes in both)
        self._signature = Signature.of(*declared)
        self.input_name, self.fixed_batch = self._signature.input_name, self._signature.batch_size
        self.input_shape = self._signature.input_shape
        self.n_classes, self.n_features = self._signature.n_classes, self._signature.n_features

    def run(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See Engine.run."""
        return self._signature.run(batch, self._call)

    def _call(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        logits, features = self._session.run(OUTPUTS, {self._signature.input_name: batch})
        return logits, features


def _error_types(state: Any) -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions have no common base but Exception; its Python layer raises the built-in ones."""
    own = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (*own, RuntimeError, TypeError, ValueError)
