"""What a model declares of its input and outputs, and batches cut to fit it: the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inflight_edge.errors import EngineError

__all__ = ["FLOAT", "OUTPUTS", "Declared", "Signature", "by_chunks", "line"]

FloatArray = NDArray[np.float32]
Outputs = tuple[FloatArray, FloatArray]
FLOAT = "tensor(float)"
OUTPUTS = ("logits", "features")


class Declared(NamedTuple):
    """A model's input or output: name, type as ONNX Runtime writes it, and its axes, an int where fixed."""

    name: str
    type: str
    shape: list[object]


@dataclass(frozen=True, slots=True)
class Signature:
    """Input and outputs of a classifier with features.

    batch_size   N of the input; None where free: a fixed one is met by chunks, the last padded.
    input_shape  (channels, height, width), None where free.  n_classes C, n_features D: None where free.
    """

    input_name: str
    batch_size: int | None
    input_shape: tuple[int | None, int | None, int | None]
    n_classes: int | None
    n_features: int | None

    @classmethod
    def of(cls, inputs: Iterable[Declared], outputs: Iterable[Declared]) -> Signature:
        """Raises EngineError for a model that is no classifier with features in float32."""
        name, (batch, *sizes) = _only_input(list(inputs))
        found = {output.name: output for output in outputs}
        n_classes, n_features = (_width(found, output) for output in OUTPUTS)
        return cls(name, batch, (sizes[0], sizes[1], sizes[2]), n_classes, n_features)

    def run(self, batch: FloatArray, call: Callable[[FloatArray], Outputs]) -> Outputs:
        """Logits and features of a batch of any N >= 1 by an engine's ``call``, which gets batches that fit.

        Raises EngineError for a batch that does not fit, or outputs that are not of its frames.
        """
        self._check(batch)
        if self.batch_size is None:
            return _checked(call(batch), batch.shape[0])
        size = self.batch_size
        logits, features = by_chunks(batch, size, lambda chunk: _checked(call(chunk), size))
        return logits, features

    def _check(self, batch: FloatArray) -> None:
        shape = tuple("N" if size is None else size for size in (None, *self.input_shape))
        if not isinstance(batch, np.ndarray) or batch.dtype != np.float32:
            got = batch.dtype if isinstance(batch, np.ndarray) else type(batch).__name__
            raise EngineError(f"batch: expected a float32 array {shape}, got {got}; use Preprocess")
        fits = batch.ndim == 4 and all(
            wanted is None or size == wanted for size, wanted in zip(batch.shape[1:], self.input_shape, strict=True)
        )
        if not fits or batch.shape[0] < 1:
            raise EngineError(f"batch: expected shape {shape} with N >= 1, got {batch.shape}; use Preprocess")


def line(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:300]


def _checked(outputs: Outputs, n_frames: int) -> Outputs:
    for name, array in zip(OUTPUTS, outputs, strict=True):
        if array.ndim != 2 or array.shape[0] != n_frames:
            raise EngineError(f"{name}: expected shape ({n_frames}, ...), got {array.shape}; export it again")
    return outputs


def by_chunks(batch: FloatArray, size: int, call: Callable[[FloatArray], Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Outputs of a batch (N, ...) by a call that takes exactly ``size`` frames, without those of the padding."""
    results = [call(chunk) for chunk in _chunks(batch, size)]
    return [np.concatenate(parts)[: batch.shape[0]] for parts in zip(*results, strict=True)]


def _chunks(batch: FloatArray, size: int) -> list[FloatArray]:
    """Pieces of exactly ``size`` frames; zeros fill the last one."""
    missing = -batch.shape[0] % size
    if missing:
        batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.float32)])
    return [batch[start : start + size] for start in range(0, batch.shape[0], size)]


def _only_input(inputs: list[Declared]) -> tuple[str, list[int | None]]:
    """Name and shape (None where free) of a model's one input."""
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs)
        raise EngineError(
            f"model: expected one input, got {len(inputs)} ({names}); export it with images as only input"
        )
    node = inputs[0]
    if node.type != FLOAT:
        raise EngineError(f"model: input {node.name}: expected {FLOAT}, got {node.type}; export it in float32")
    if len(node.shape) != 4:
        raise EngineError(f"model: input {node.name}: expected (N, channels, height, width), got {node.shape}")
    return node.name, [_size(size) for size in node.shape]


def _width(outputs: dict[str, Declared], name: str) -> int | None:
    """Second size of a model's (N, width) float32 output."""
    if name not in outputs:
        got = ", ".join(outputs)
        raise EngineError(f"model: expected the outputs logits and features, got {got}; export it with inflight-edge")
    node = outputs[name]
    if node.type != FLOAT:
        raise EngineError(f"model: output {name}: expected {FLOAT}, got {node.type}; export it in float32")
    if node.shape and len(node.shape) != 2:
        raise EngineError(f"model: output {name}: expected two axes (N, width), got {node.shape}; flatten it")
    return _size(node.shape[1]) if node.shape else None


def _size(size: object) -> int | None:
    """A fixed size, or None for a free one, which has a name or nothing."""
    return size if isinstance(size, int) and size >= 1 else None
