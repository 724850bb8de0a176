"""What lifts the verdict over the paper's plain mixture, each idea alone:
``python -m benchmarks.paper.ablation --dataset mnist --data DIR --runs RUNS --json FILE``.

An idea is judged twice: by cross-fitting on the defender's images with the estimated pattern, as the shipped choice is, and
on held-out frames with the true trigger, which no choice ever sees.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.paper.classifiers import Experiment, experiment_parser, inspected, with_experiment
from benchmarks.paper.further_tables import cell
from inflight_edge import InflightError, ModelError
from inflight_edge._text import table
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.density import GuardEstimator, best_other, margins
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.inspection import Inspection, further_estimates
from inflight_edge.calibration.model import Classifier, load_classifier
from inflight_edge.calibration.reversal.estimates import Estimate
from inflight_edge.calibration.samples import Plan, Samples, are_few, collect, plan, recognised
from inflight_edge.calibration.selection import Candidate, folds, select, verdict_error
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.scoring.reference import log_likelihoods

Pixels = NDArray[np.float32]
LAYERS = {"paper": "penultimate", "joined": None}
DIAGONAL = Candidate("diagonal", 1, 1e-6)


@dataclass(frozen=True, slots=True)
class Idea:
    """One change of the paper's plain mixture.

    layer     of LAYERS, or "shipped": chosen by cross-fitting among all on offer, or "copy": an unlearned copy's behind them.
    density   None: chosen by cross-fitting among all forms, as shipped.
    balance   the target weighs as much as all other classes together.
    places, views, strengths  the pattern where it works elsewhere; images mirrored and moved; weaker patterns.
    further   other patterns that lead to the target in some of the images; shipped for few images, and then in all that ships.
    project   remove the direction of the estimated trigger before the source is inferred.
    midway    the verdict changes as many standard deviations of the held-out margins from their mean with the estimate as
              without, not where the two densities are alike.
    """

    name: str
    layer: str = "paper"
    density: Candidate | None = DIAGONAL
    balance: bool = False
    places: bool = False
    views: bool = False
    strengths: bool = False
    further: bool = False
    project: bool = False
    midway: bool = False


SHARED = Candidate("shared", 1, 0.03)
SHIPPED = Idea("shipped: all of layers, density, places and views", "shipped", None, True, places=True, views=True)
IDEAS = (
    Idea("plain diagonal mixture, our reading of the paper"),
    Idea("three components", density=Candidate("diagonal", 3, 0.1)),
    Idea("regularised diagonal", density=Candidate("diagonal", 1, 0.5)),
    Idea("shared covariance", density=SHARED),
    Idea("shared covariance, target as heavy as the rest", density=SHARED, balance=True),
    Idea("own covariances, shrunk by .95", density=Candidate("full", 1, 0.1, 0.95)),
    Idea("joined layers before the activation", layer="joined"),
    Idea("layers chosen by cross-fitting, feature maps among them", layer="shipped"),
    Idea("pattern at other places", places=True),
    Idea("mirrored and moved images", views=True),
    Idea("pattern at several strengths", strengths=True),
    Idea("further patterns", further=True),
    Idea("trigger's direction removed", project=True),
    Idea("boundary midway between the held-out margins", midway=True),
    Idea("density chosen by cross-fitting", density=None, balance=True),
    Idea("joined layers and the chosen density", layer="joined", density=None, balance=True),
    SHIPPED,
    replace(SHIPPED, name="shipped, further patterns", further=True),
    replace(SHIPPED, name="shipped, boundary midway", midway=True),
    replace(SHIPPED, name="shipped, an unlearned copy", layer="copy"),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure every idea on one classifier, print a table and write records."""
    options = experiment_parser("benchmarks.paper.ablation", __doc__).parse_args(arguments)
    try:
        records = with_experiment(options, measure)
    except InflightError as error:
        print(f"benchmarks.paper.ablation: error: {error}", file=sys.stderr)
        return 2
    keys = ("held_out_error", "held_out_source_error", "tpr", "fpr", "sia")
    print(table([(r["idea"], *(cell(r[key]) for key in keys)) for r in records], ("idea", *keys)))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def measure(case: Experiment) -> list[dict[str, Any]]:
    """One record for each idea, of the copy only where a calibration does not refuse it.  Raises InflightError when nothing is
    suspected.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = export_program(case.network, case.preprocess.input_shape, Path(folder, "classifier.pt2"))
        loaded = {
            name: load_classifier(program, image_shape=case.defence.image_shape, feature_layer=layer)
            for name, layer in LAYERS.items()
        }
    inspection = inspected(case, loaded["joined"])
    if not inspection.suspects:
        raise InflightError("no class is suspected: there is no pattern to work with")
    target = inspection.suspects[0]
    estimate = inspection.estimates[target]
    pixels, labels = case.defence.pixels(case.preprocess), case.defence.labels
    views = recognised(loaded["joined"], pixels, labels, case.preprocess)
    (further,) = further_estimates(
        loaded["joined"], pixels, labels, case.preprocess, [estimate], seed=case.seed, progress=False
    )
    everywhere = plan(loaded["joined"], pixels, labels, estimate, views, case.preprocess)
    everywhere = replace(everywhere, further=further)
    networks = {name: (classifier.feature_layer, classifier) for name, classifier in loaded.items()}
    networks |= _shipped(case, loaded["joined"], inspection, copy=not are_few(labels))
    frames = {layer: _held_out(case, network, target) for layer, network in dict(networks.values()).items()}
    records = []
    for idea in tqdm([idea for idea in IDEAS if idea.layer in networks], desc="ideas", unit="idea"):
        layer, network = networks[idea.layer]
        record = {"idea": idea.name, "feature_layer": layer}
        record |= _measure(idea, _samples(idea, case, network, estimate, everywhere), frames[layer], target, case.seed)
        if idea.layer == "copy":  # it has seen all images: what it says of them is flattered
            record |= {"held_out_error": None, "held_out_source_error": None}
        records.append(record)
    return records


def _shipped(
    case: Experiment, classifier: Classifier, inspection: Inspection, *, copy: bool
) -> dict[str, tuple[str, Classifier | OnnxRuntimeEngine]]:
    """The feature layers that a calibration takes, and those with a copy, with their networks."""
    try:
        bundle = calibrate(
            classifier, case.defence, inspection, seed=case.seed, unlearn="always" if copy else "never", progress=False
        )
    except ModelError:
        if not copy:
            raise
        return _shipped(case, classifier, inspection, copy=False)
    layer = bundle.feature_layer.partition("+unlearned.")[0]
    chosen = next(option for option in (classifier, *classifier.alternatives) if option.feature_layer == layer)
    found: dict[str, tuple[str, Classifier | OnnxRuntimeEngine]] = {"shipped": (layer, chosen)}
    if copy:
        found["copy"] = bundle.feature_layer, OnnxRuntimeEngine(bundle.model)
    return found


def _measure(
    idea: Idea, samples: Samples, held_out: dict[str, tuple[Pixels, NDArray[np.int64]]], target: int, seed: int
) -> dict[str, Any]:
    features, labels, images = samples.features, samples.labels, samples.images
    direction = features[labels != target].mean(axis=0) - features[labels == target].mean(axis=0)
    density = idea.density
    if density is None:
        density = select(features, labels, target, images=images, seed=seed, progress=False).best.candidate
    classes = np.unique(labels)
    row = int(np.searchsorted(classes, target))
    scores = np.full((len(labels), len(classes)), np.nan)
    guesses = np.full(len(labels), -1)
    for held in folds(labels, images, 5, seed):
        scores[held], guesses[held] = _score(
            idea, features[~held], labels[~held], features[held], target, density, direction
        )
    margin, clean = margins(scores, row), labels == target
    boundary = _midway(margin[clean], margin[~clean]) if idea.midway else 0.0
    margin -= boundary
    right = ~(margin < 0) & (guesses == labels)
    record: dict[str, Any] = {
        "density": str(density),
        "held_out_error": verdict_error(margin[clean], margin[~clean]),
        "held_out_source_error": float(1.0 - right[~clean].mean()),
    }
    for name, (frames, truth) in held_out.items():
        rows, guessed = _score(idea, features, labels, frames, target, density, direction)
        flagged = ~(margins(rows, row) < boundary)
        record[name] = float(flagged.mean())
        if name == "tpr":
            record["sia"] = float((flagged & (guessed == truth)).mean())
    return record


def _midway(clean: NDArray[np.float64], triggered: NDArray[np.float64]) -> float:
    """The margin in nats that lies as many standard deviations from the mean of the ones as of the others."""
    share = clean.std() / (clean.std() + triggered.std())
    return float(clean.mean() + share * (triggered.mean() - clean.mean()))


def _held_out(
    case: Experiment, classifier: Classifier | OnnxRuntimeEngine, target: int
) -> dict[str, tuple[Pixels, NDArray[np.int64]]]:
    """Features and true classes of the held-out frames predicted as the target: "tpr" triggered ones, "fpr" clean ones."""
    sources = case.attacked(target)
    stamped = case.trigger.embed(np.asarray(sources.images)).transpose(0, 3, 1, 2).astype(np.float32)
    own = case.test.subset(case.test.labels == target)
    result = {}
    for name, pixels, truth in (
        ("tpr", stamped, sources.labels),
        ("fpr", own.pixels(case.preprocess), own.labels),
    ):
        logits, features = extract(classifier, pixels, case.preprocess)
        predicted = logits.argmax(1) == target
        result[name] = features[predicted], truth[predicted]
    return result


def _samples(
    idea: Idea, case: Experiment, classifier: Classifier | OnnxRuntimeEngine, estimate: Estimate, everywhere: Plan
) -> Samples:
    """What a guard is fitted to under one idea."""
    pixels, labels = case.defence.pixels(case.preprocess), case.defence.labels
    further = idea.further or (idea.places and idea.views and are_few(labels))
    chosen = replace(
        everywhere,
        places=everywhere.places if idea.places else everywhere.places[:1],
        views=everywhere.views if idea.views else (),
        further=everywhere.further if further else (),
    )
    patterns = [estimate, *(_Weaker(estimate, share) for share in (0.8, 0.9) if idea.strengths)]
    parts = [
        collect(classifier, pixels, labels, pattern, chosen, case.preprocess, seed=case.seed) for pattern in patterns
    ]
    # The target's clean images are there once.
    kept = [np.flatnonzero((part.labels != estimate.target) | (number == 0)) for number, part in enumerate(parts)]
    features, all_labels, images = (
        np.concatenate([getattr(part, name)[rows] for part, rows in zip(parts, kept, strict=True)])
        for name in ("features", "labels", "images")
    )
    return Samples(features, all_labels, images)


class _Weaker:
    """A share of what an estimated pattern changes."""

    def __init__(self, estimate: Estimate, share: float) -> None:
        self.target, self._estimate, self._share = estimate.target, estimate, np.float32(share)

    def embed(self, pixels: Pixels) -> Pixels:
        return pixels + self._share * (self._estimate.embed(pixels) - pixels)

    def moved(self, step: tuple[int, int]) -> _Weaker:
        return _Weaker(self._estimate.moved(step), float(self._share))


def _score(
    idea: Idea,
    features: Pixels,
    labels: NDArray[np.int64],
    frames: Pixels,
    target: int,
    density: Candidate,
    direction: Pixels,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-likelihoods (N, R) of frames, and the inferred source classes."""

    def rows(fitted: Pixels, judged: Pixels) -> NDArray[np.float64]:
        estimator = GuardEstimator(target, balance=idea.balance, **asdict(density))
        return log_likelihoods(estimator.fit(fitted, labels).guard_, judged)

    classes = np.unique(labels)
    scores = rows(features, frames)
    source_scores = scores
    if idea.project:
        unit = direction / np.linalg.norm(direction)
        source_scores = rows(features - np.outer(features @ unit, unit), frames - np.outer(frames @ unit, unit))
    return scores, classes[best_other(source_scores, int(np.searchsorted(classes, target)))]


if __name__ == "__main__":
    sys.exit(main())
