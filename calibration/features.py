"""Logits and features of many images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from inflight_edge.calibration.model import Classifier
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.preprocess import Preprocess

__all__ = ["extract"]


def extract(
    network: Classifier | OnnxRuntimeEngine,
    pixels: NDArray[np.float32],
    preprocess: Preprocess,
    *,
    batch: int = 128,
    progress: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (N, classes) and features (N, D) of pixels (N, channels, H, W) in 0..255."""
    logits = np.empty((len(pixels), network.n_classes or 0), np.float32)
    features = np.empty((len(pixels), network.n_features or 0), np.float32)
    starts = range(0, len(pixels), batch)
    for start in tqdm(starts, desc="features", unit="batch", disable=not progress, leave=False):
        part = slice(start, start + batch)
        logits[part], features[part] = _run(network, preprocess.normalise(pixels[part]))
    return logits, features


def _run(
    network: Classifier | OnnxRuntimeEngine, inputs: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if isinstance(network, OnnxRuntimeEngine):
        return network.run(inputs)
    with torch.inference_mode():
        logits, features = network(torch.from_numpy(inputs))
    return logits.float().numpy(), features.float().numpy()  # under autocast they are bfloat16
