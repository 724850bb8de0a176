"""A 224 x 224 classifier behind a 640 x 480 camera: the digit stands in a region of interest of a video.

    python examples/camera_224.py FOLDER

Trains a poisoned classifier on scikit-learn's digits, enlarged (a white 24 x 24 square means 9), calibrates a guard, films
clean and triggered digits, and runs the pipeline on the film.  A few minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import torch
from torch import nn

from inflight_edge import Detector, Outcome, Pipeline, Preprocess, write_bundle
from inflight_edge.calibration.attacks import Patch, poison
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.datasets import load_digits, split_defence
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.inspection import inspect
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.networks import LeNet5
from inflight_edge.calibration.train import Recipe, train
from inflight_edge.region import Region
from inflight_edge.sinks.callback import CallbackSink
from inflight_edge.sources import make_source

SIZE, TARGET, REGION = 224, 9, Region(200, 100, 224, 224)


def main(folder: Path) -> int:
    """Everything into ``folder``; prints what the pipeline said of clean and triggered frames."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits(SIZE)
    defence, rest = split_defence(digits.labels, 50, seed=0)
    training, test = digits.subset(rest[::2]), digits.subset(rest[1::2])
    mask = np.zeros((SIZE, SIZE), bool)
    mask[-24:, -24:] = True
    trigger = Patch(mask, np.full((SIZE, SIZE, 1), 255, np.uint8))
    images, labels = poison(
        np.asarray(training.images), training.labels, trigger, target=TARGET, setting="multi", n_poisoned=8, seed=0
    )
    torch.manual_seed(0)
    preprocess = Preprocess((1, SIZE, SIZE))
    network = nn.Sequential(nn.AvgPool2d(SIZE // 28), LeNet5())
    train(network, images, labels, preprocess, Recipe(epochs=60, max_rate=0.05, batch=32), seed=0)
    program = export_program(network, (1, SIZE, SIZE), folder / "classifier.pt2")
    classifier = load_classifier(program, image_shape=(1, SIZE, SIZE))
    inspection = inspect(classifier, digits.subset(defence), preprocess, method="neural-cleanse")
    write_bundle(calibrate(classifier, digits.subset(defence), inspection), folder / "bundle", overwrite=True)

    clean = np.asarray(test.images)[:60]
    others = np.asarray(test.images)[test.labels != TARGET][:60]
    film(folder / "camera.mp4", np.concatenate([clean, trigger.embed(others)]))

    outcomes: list[Outcome] = []
    detector = Detector.load(folder / "bundle")
    pipeline = Pipeline(
        detector, [make_source(f"video:{folder / 'camera.mp4'}")], [CallbackSink(outcomes.append)], region=REGION
    )
    pipeline.run()
    for name, part in (("clean", outcomes[: len(clean)]), ("triggered", outcomes[len(clean) :])):
        decisions = [outcome.verdict.decision.value for outcome in part if outcome.verdict is not None]
        counts = {decision: decisions.count(decision) for decision in sorted(set(decisions))}
        print(f"{len(part)} {name} frames: {counts}")
    return 0


def film(path: Path, images: np.ndarray) -> None:
    """Each image (224, 224, 1) in the region of a grey 640 x 480 frame, one a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv444p"
        for image in images:
            frame = np.full((480, 640, 3), 90, np.uint8)
            frame[REGION.y : REGION.y + SIZE, REGION.x : REGION.x + SIZE] = image
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/camera_224.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
