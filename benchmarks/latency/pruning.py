"""Share of a guard's bytes that an exact verdict reads, on a trained network: python -m benchmarks.latency.pruning --data DIR.

The network: fully connected, on Fashion-MNIST, with 1000 made-up classes, each image class cut into 100 clusters of
pixels.  The features are its last hidden layer, before the activation, of 500 test images.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from benchmarks.latency.native import NativeScorer, build_shared
from inflight_edge.calibration.datasets import ImageSet, load_standard
from inflight_edge.calibration.density import GuardEstimator
from inflight_edge.guard import FloatArray, Kind
from inflight_edge.verdict import decide

__all__ = ["measure"]

CLUSTERS, FRAMES = 100, 500
# Width of the features: a full guard of 1000 classes and 512 features has 502 MiB.
SETTINGS: tuple[tuple[Kind, int], ...] = (("diagonal", 512), ("shared", 512), ("full", 128))


def main(arguments: list[str] | None = None) -> int:
    """Print the records, or write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency.pruning", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with FashionMNIST/raw")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    text = json.dumps(measure(options.data, options.epochs), indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def measure(data: Path, epochs: int, settings: tuple[tuple[Kind, int], ...] = SETTINGS) -> list[dict[str, Any]]:
    """One record for each covariance form."""
    train, test = (load_standard("fashion_mnist", data, train=part) for part in (True, False))
    pixels, others = _pixels(train), _pixels(test)
    labels = _clusters(pixels, train.labels)
    records, features = [], {}
    with tempfile.TemporaryDirectory() as folder:
        library = build_shared(Path(folder))
        for kind, width in settings:
            if width not in features:
                features[width] = _features(pixels, labels, others[:FRAMES], width, epochs)
            known, frames, accuracy = features[width]
            # 5 and more images of each class make a density; a class of 1 cannot.
            counts = np.bincount(labels, minlength=labels.max() + 1)
            used = counts[labels] >= 5
            estimator = GuardEstimator(int(labels[used].min()), kind=kind, shrinkage=0.8 if kind == "full" else 0.0)
            guard = estimator.fit(known[used], labels[used]).guard_
            records.append(
                {"kind": kind, "classes": guard.n_components, "features": width, "training accuracy": accuracy}
                | _count(library, NativeScorer(None, library, guard), guard, frames)
            )
            print(records[-1], file=sys.stderr)
    return records


def _pixels(images: ImageSet) -> FloatArray:
    """(N, H W) in 0..1."""
    array = np.asarray(images.images, np.float32) / np.float32(255.0)
    return array.reshape(len(array), -1)


def _clusters(pixels: FloatArray, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class of each image: 100 clusters of each of its dataset's classes."""
    result = np.zeros(len(labels), np.int64)
    for c in np.unique(labels):
        mine = labels == c
        clusters = MiniBatchKMeans(CLUSTERS, n_init=1, random_state=0, batch_size=1024).fit_predict(pixels[mine])
        result[mine] = c * CLUSTERS + clusters
    return result


def _features(
    pixels: FloatArray, labels: NDArray[np.int64], frames: FloatArray, width: int, epochs: int
) -> tuple[FloatArray, FloatArray, float]:
    """Train; features (N, width) of the training images and of the frames, and the last epoch's accuracy."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(pixels.shape[1], 512), torch.nn.ReLU(), torch.nn.Linear(512, width))
    network = torch.nn.Sequential(body, torch.nn.ReLU(), torch.nn.Linear(width, int(labels.max()) + 1))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, y = torch.from_numpy(pixels), torch.from_numpy(labels)
    right = 0
    for _ in range(epochs):
        right = 0
        for batch in torch.randperm(len(x)).split(256):
            logits = network(x[batch])
            loss = torch.nn.functional.cross_entropy(logits, y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            right += int((logits.argmax(1) == y[batch]).sum())
    with torch.no_grad():
        return body(x).numpy(), body(torch.from_numpy(frames)).numpy(), right / len(x)


def _count(library: ctypes.CDLL, scorer: NativeScorer, guard: Any, frames: FloatArray) -> dict[str, Any]:
    """Bytes of parameters read a frame; every verdict is first compared with that of all log-likelihoods."""
    counter = ctypes.c_uint64.in_dll(library, "ife_bytes_read")
    counter.value = 0
    scores = scorer.scores(frames)
    plain = counter.value / len(frames)
    counter.value = 0
    verdicts = scorer.verdicts(frames)
    read = counter.value / len(frames)
    for row, got in zip(scores, verdicts, strict=True):
        want = decide(guard.target, row, guard.classes, guard.target_row)
        if got["margin"] != want.margin or got["source"] != (-1 if want.source is None else want.source):
            raise AssertionError(f"expected {want.margin}, {want.source}, got {got}; not counted")
    return {
        "frames": len(frames),
        "plain_bytes": round(plain),
        "verdict_bytes": round(read),
        "share": round(read / plain, 4),
        "rows_in_full": float(np.mean(verdicts["n_scored"])),
    }


if __name__ == "__main__":
    sys.exit(main())
