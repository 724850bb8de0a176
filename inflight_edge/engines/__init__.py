"""Inference engines: one protocol, one module per engine, imported on demand."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Engine"]


class Engine(Protocol):
    """A classifier that also returns its features.

    name  short name such as ``onnxruntime``.
    """

    name: str

    def run(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (N, classes) float32 and features (N, D) float32 of a batch (N, channels, height, width) float32.

        Any N >= 1 is accepted.  Raises EngineError when the engine fails or the batch does not fit.
        """
