"""How the verdict holds when frames, the clean set or the target are not as wished:
``python -m benchmarks.paper.robustness --dataset mnist --data DIR --runs RUNS --json FILE [--plot FILE.svg]``.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks.paper.classifiers import Experiment, experiment_parser, inspected, with_experiment
from benchmarks.paper.further_tables import cell
from inflight_edge import Detector, InflightError
from inflight_edge._text import table
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.datasets import ImageSet, split_defence
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.evaluate import evaluate
from inflight_edge.calibration.model import Classifier, load_classifier

Images = NDArray[np.uint8]
# Seeded subsets: enough for a curve.
MAX_TRIGGERED, MAX_CLEAN = 2000, 1000
CLEAN_COUNTS = (100, 50, 20, 10, 5)
# What is changed: of a large network the clean set is dear, since each of its sizes is inspected anew.
PARTS = ("frames", "clean", "target")


def brightness(images: Images, amount: float) -> Images:
    """Pixels plus an amount, clipped."""
    return np.clip(images.astype(np.int16) + int(amount), 0, 255).astype(np.uint8)


def noise(images: Images, deviation: float) -> Images:
    """Gaussian noise, seeded."""
    added = np.random.default_rng(0).normal(0.0, deviation, images.shape)
    return np.clip(np.rint(images + added), 0, 255).astype(np.uint8)


def shift(images: Images, pixels: float) -> Images:
    """Moved to the right and down, edges repeated."""
    amount = int(pixels)
    padded = np.pad(images, ((0, 0), (amount, 0), (amount, 0), (0, 0)), mode="edge")
    return padded[:, : images.shape[1], : images.shape[2]]


def blur(images: Images, radius: float) -> Images:
    """Gaussian blur of a radius in pixels."""
    return _each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def jpeg(images: Images, quality: float) -> Images:
    """Compressed and read again."""

    def again(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return _each(images, again)


def _each(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    pictures = [change(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)) for image in images]
    return np.stack([np.asarray(picture) for picture in pictures]).reshape(images.shape)


CHANGES: dict[str, tuple[Callable[[Images, float], Images], tuple[float, ...]]] = {
    "brightness": (brightness, (-80, -40, -20, 0, 20, 40, 80)),
    "blur": (blur, (0, 0.3, 0.5, 0.7, 1.0)),
    "jpeg": (jpeg, (95, 80, 60, 40, 20)),
    "noise": (noise, (0, 4, 8, 16, 32)),
    "shift": (shift, (0, 1, 2)),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure one classifier, print a table, write records and a plot."""
    parser = experiment_parser("benchmarks.paper.robustness", __doc__)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="change these and keep the other records of the file")
    options = parser.parse_args(arguments)
    only = options.only or PARTS
    try:
        records = _others(options.json, only) + with_experiment(options, lambda case: measure(case, only))
    except InflightError as error:
        print(f"benchmarks.paper.robustness: error: {error}", file=sys.stderr)
        return 2
    records.sort(key=lambda record: PARTS.index(part(record)))
    keys = ("acc", "asr", "tpr", "fpr", "sia")
    rows = [(r["change"], f"{r['amount']:g}", *(cell(r[key]) for key in keys)) for r in records]
    print(table(rows, ("change", "amount", *keys)))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    if options.plot is not None:
        plot(records, options.plot)
    return 0


def part(record: dict[str, Any]) -> str:
    """Of which of PARTS a record is."""
    if record["change"] in CHANGES:
        return "frames"
    return "target" if record["change"].startswith("wrong") else "clean"


def _others(file: Path | None, only: Sequence[str]) -> list[dict[str, Any]]:
    """A file's records of the parts that are not measured; none without a file."""
    if file is None or not file.exists():
        return []
    return [record for record in json.loads(file.read_text()) if part(record) not in only]


def measure(case: Experiment, only: Sequence[str] = PARTS) -> list[dict[str, Any]]:
    """One record for each change and amount of some PARTS.  Raises InflightError when nothing is suspected."""
    with tempfile.TemporaryDirectory() as folder:
        program = export_program(case.network, case.preprocess.input_shape, Path(folder, "classifier.pt2"))
        classifier = load_classifier(program, image_shape=case.defence.image_shape)
    records: list[dict[str, Any]] = []

    def add(change: str, amount: float, figures: dict[str, Any]) -> None:
        records.append({"change": change, "amount": amount, **figures})

    inspection = inspected(case, classifier)
    clean, triggered = frames(case)
    if "frames" in only:
        detector = Detector(calibrate(classifier, case.defence, inspection, seed=case.seed))
        for name, (change, amounts) in CHANGES.items():
            for amount in amounts:
                changed = [replace(data, images=change(np.asarray(data.images), amount)) for data in (clean, triggered)]
                add(name, amount, figures(detector, *changed))
    if "clean" in only:
        for count in CLEAN_COUNTS:
            add("clean images a class", count, fewer(case, classifier, count))
    if "target" in only:
        wrong = next(int(row["class"]) for row in inspection.rows() if row["class"] != case.target)
        for name, chosen in (("wrong target", [wrong]), ("wrong target too", [case.target, wrong])):
            bundle = calibrate(classifier, case.defence, inspection, targets=chosen, seed=case.seed)
            add(name, wrong, figures(Detector(bundle), clean, triggered))
    return records


def frames(case: Experiment) -> tuple[ImageSet, ImageSet]:
    """Held-out clean images of the target, with as many others, and triggered ones of the sources."""
    rng = np.random.default_rng(case.seed)
    own = np.flatnonzero(case.test.labels == case.target)
    rest = rng.permutation(np.flatnonzero(case.test.labels != case.target))[: min(len(own), MAX_CLEAN)]
    clean = case.test.subset(np.concatenate([own[:MAX_CLEAN], rest]))
    sources = rng.permutation(np.flatnonzero(np.isin(case.test.labels, [c for c in case.sources if c != case.target])))
    chosen = case.test.subset(np.sort(sources[:MAX_TRIGGERED]))
    return clean, ImageSet(case.trigger.embed(np.asarray(chosen.images)), chosen.labels, None, "triggered")


def figures(detector: Detector, clean: ImageSet, triggered: ImageSet) -> dict[str, Any]:
    """Figures of the triggered frames, and of the clean ones."""
    return evaluate(detector, clean, triggered, progress=False).as_dict()


def fewer(case: Experiment, classifier: Classifier, count: int) -> dict[str, Any]:
    """The whole path from ``count`` clean images of each class; no figures when nothing is suspected."""
    chosen, _ = split_defence(case.defence.labels, count, case.seed)
    data = case.defence.subset(chosen)
    inspection = inspected(replace(case, defence=data), classifier)
    if not inspection.suspects:
        return dict.fromkeys(("acc", "asr", "tpr", "fpr", "sia")) | {"suspects": []}
    detector = Detector(calibrate(classifier, data, inspection, seed=case.seed))
    return figures(detector, *frames(case)) | {"suspects": list(inspection.suspects)}


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Curves of TPR, FPR and SIA, one picture for each change."""
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(r["change"] for r in records) if not name.startswith("wrong")]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(2, 3, place)
        own = sorted((r for r in records if r["change"] == name), key=lambda r: r["amount"])
        for key, style in (("tpr", "o-"), ("fpr", "s-"), ("sia", "^-"), ("asr", "x:")):
            known = [(r["amount"], r[key]) for r in own if r[key] is not None]
            if known:
                axes.plot(*zip(*known, strict=True), style, label=key.upper())
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    first = records[0]
    figure.suptitle(f"{first['dataset']}, {first['attack']} {first['setting']}, seed {first['seed']}")
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
