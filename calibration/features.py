"""Logits and features of many images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from inflight_edge.calibration.model import Classifier
from inflight_edge.preprocess import Preprocess

__all__ = ["extract"]


def extract(
    classifier: Classifier,
    pixels: NDArray[np.float32],
    preprocess: Preprocess,
    *,
    batch: int = 128,
    progress: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (N, classes) and features (N, D) of pixels (N, channels, H, W) in 0..255."""
    logits = np.empty((len(pixels), classifier.n_classes), np.float32)
    features = np.empty((len(pixels), classifier.n_features), np.float32)
    with torch.inference_mode():
        starts = range(0, len(pixels), batch)
        for start in tqdm(starts, desc="features", unit="batch", disable=not progress, leave=False):
            inputs = torch.from_numpy(preprocess.normalise(pixels[start : start + batch]))
            output = classifier(inputs)
            logits[start : start + batch], features[start : start + batch] = output[0].numpy(), output[1].numpy()
    return logits, features
