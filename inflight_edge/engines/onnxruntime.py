"""ONNX Runtime on the CPU: the engine that every machine can have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.engines._wire import refuse_external_data
from inflight_edge.errors import EngineError, OptionError

__all__ = ["OnnxRuntimeEngine"]

MAX_THREADS = 1024
_OUTPUTS = ("logits", "features")
_FATAL = 4  # the other severities would be printed to the terminal; errors are raised anyway


class OnnxRuntimeEngine:
    """A classifier run by ONNX Runtime's CPUExecutionProvider; one object may be called by several threads.

    model    ONNX file with one float32 input (N, channels, height, width) and the float32 outputs ``logits``
             (N, C) and ``features`` (N, D).  N may be free or fixed; a fixed N is met by chunks, the last padded.
    threads  threads per call; None leaves the choice to ONNX Runtime.

    input_name; fixed_batch is N where it is fixed, else None.
    input_shape (channels, height, width), n_classes C and n_features D are None where the model leaves them free.
    Raises EngineError for a model that does not fit or keeps weights in other files, OptionError, and
    DependencyError without ONNX Runtime.
    """

    name = "onnxruntime"

    def __init__(self, model: bytes, *, threads: int | None = None) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise OptionError(f"threads: expected an integer of at least 1 or None, got {threads!r}")
        if threads is not None and threads > MAX_THREADS:
            raise OptionError(f"threads: expected at most {MAX_THREADS}, got {threads}")
        runtime = require("onnxruntime", "pip install 'inflight-edge[onnxruntime]'")
        self._errors = _error_types(require("onnxruntime.capi.onnxruntime_pybind11_state", "reinstall onnxruntime"))
        refuse_external_data(model)
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL
        # Else bytes that are ONNX for the check above could be ONNX Runtime's own format for it.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        if threads is not None:
            options.intra_op_num_threads = threads
        self._run_options = runtime.RunOptions()
        self._run_options.log_severity_level = _FATAL
        try:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise EngineError(f"model: expected an ONNX file, got {_line(error)}; export it again") from error
        self.input_name, (self.fixed_batch, *sizes) = _only_input(self._session.get_inputs())
        self.input_shape: tuple[int | None, int | None, int | None] = (sizes[0], sizes[1], sizes[2])
        outputs = {output.name: output for output in self._session.get_outputs()}
        self.n_classes, self.n_features = (_width(outputs, name) for name in _OUTPUTS)

    def run(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See Engine.run."""
        shape = tuple("N" if size is None else size for size in (None, *self.input_shape))
        if not isinstance(batch, np.ndarray) or batch.dtype != np.float32:
            got = batch.dtype if isinstance(batch, np.ndarray) else type(batch).__name__
            raise EngineError(f"batch: expected a float32 array {shape}, got {got}; use Preprocess")
        fits = batch.ndim == 4 and all(
            wanted is None or size == wanted for size, wanted in zip(batch.shape[1:], self.input_shape, strict=True)
        )
        if not fits or batch.shape[0] < 1:
            raise EngineError(f"batch: expected shape {shape} with N >= 1, got {batch.shape}; use Preprocess")
        if self.fixed_batch is None:
            return self._call(batch)
        chunks = [self._call(chunk) for chunk in _chunks(batch, self.fixed_batch)]
        logits, features = (np.concatenate(parts)[: batch.shape[0]] for parts in zip(*chunks, strict=True))
        return logits, features

    def _call(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        try:
            inputs = {self.input_name: np.ascontiguousarray(batch)}
            outputs = self._session.run(list(_OUTPUTS), inputs, self._run_options)
        except self._errors as error:
            raise EngineError(f"onnxruntime failed on a batch {batch.shape}: {_line(error)}") from error
        for name, array in zip(_OUTPUTS, outputs, strict=True):
            if array.ndim != 2 or array.shape[0] != batch.shape[0]:
                raise EngineError(f"{name}: expected shape ({batch.shape[0]}, ...), got {array.shape}; export it again")
        return outputs[0], outputs[1]


def _chunks(batch: NDArray[np.float32], size: int) -> list[NDArray[np.float32]]:
    """Pieces of exactly ``size`` frames; zeros fill the last one."""
    missing = -batch.shape[0] % size
    if missing:
        batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.float32)])
    return [batch[start : start + size] for start in range(0, batch.shape[0], size)]


def _only_input(inputs: list[Any]) -> tuple[str, list[int | None]]:
    """Name and shape (None where free) of a model's one input."""
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs)
        raise EngineError(
            f"model: expected one input, got {len(inputs)} ({names}); export it with images as only input"
        )
    node = inputs[0]
    if node.type != "tensor(float)":
        raise EngineError(f"model: input {node.name}: expected tensor(float), got {node.type}; export it in float32")
    if len(node.shape) != 4:
        raise EngineError(f"model: input {node.name}: expected (N, channels, height, width), got {node.shape}")
    return node.name, [_size(size) for size in node.shape]


def _width(outputs: dict[str, Any], name: str) -> int | None:
    """Second size of a model's (N, width) float32 output."""
    if name not in outputs:
        got = ", ".join(outputs)
        raise EngineError(f"model: expected the outputs logits and features, got {got}; export it with inflight-edge")
    node = outputs[name]
    if node.type != "tensor(float)":
        raise EngineError(f"model: output {name}: expected tensor(float), got {node.type}; export it in float32")
    if node.shape and len(node.shape) != 2:
        raise EngineError(f"model: output {name}: expected two axes (N, width), got {node.shape}; flatten it")
    return _size(node.shape[1]) if node.shape else None


def _size(size: object) -> int | None:
    """A fixed size, or None for a free one, which has a name or nothing."""
    return size if isinstance(size, int) and size >= 1 else None


def _error_types(state: Any) -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions have no common base but Exception; its Python layer raises the built-in ones."""
    own = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (*own, RuntimeError, TypeError, ValueError)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
