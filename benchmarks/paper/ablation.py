"""What lifts the verdict over the paper's plain mixture, each idea alone:
``python -m benchmarks.paper.ablation --dataset mnist --data DIR --runs RUNS --json FILE``.

An idea is judged twice: by cross-fitting on the defender's images with the estimated pattern, as the shipped choice is, and
on held-out frames with the true trigger, which no choice ever sees.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

from benchmarks.paper.classifiers import Experiment, experiment_parser, inspected, with_experiment
from inflight_edge import InflightError
from inflight_edge._text import table
from inflight_edge.calibration.calibrate import calibrate, judged
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.density import GuardEstimator, best_other, margins
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.inspection import Inspection
from inflight_edge.calibration.model import Classifier, load_classifier
from inflight_edge.calibration.selection import Candidate, select
from inflight_edge.scoring.reference import log_likelihoods

Pixels = NDArray[np.float32]
LAYERS = {"paper": "penultimate", "joined": None}
DIAGONAL = Candidate("diagonal", 1, 1e-6)


@dataclass(frozen=True, slots=True)
class Idea:
    """One change of the paper's plain mixture.

    layer     of LAYERS, or "shipped": chosen by cross-fitting among all on offer.
    density   None: chosen by cross-fitting among all forms, as shipped.
    copies    further samples: images shifted by one pixel, or the pattern at other strengths; "" for none.
    project   remove the direction of the estimated trigger before the source is inferred.
    """

    name: str
    layer: str = "paper"
    density: Candidate | None = DIAGONAL
    copies: str = ""
    project: bool = False


IDEAS = (
    Idea("plain diagonal mixture (the paper)"),
    Idea("three components", density=Candidate("diagonal", 3, 0.1)),
    Idea("regularised diagonal", density=Candidate("diagonal", 1, 0.5)),
    Idea("shared covariance", density=Candidate("shared", 1, 0.03)),
    Idea("own covariances, shrunk by .95", density=Candidate("full", 1, 0.1, 0.95)),
    Idea("joined layers before the activation", layer="joined"),
    Idea("shifted copies", copies="shift"),
    Idea("pattern at several strengths", copies="strength"),
    Idea("trigger's direction removed", project=True),
    Idea("density chosen by cross-fitting", density=None),
    Idea("joined layers and the chosen density", layer="joined", density=None),
    Idea("shipped: layers and density chosen by cross-fitting", layer="shipped", density=None),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure every idea on one classifier, print a table and write records."""
    options = experiment_parser("benchmarks.paper.ablation", __doc__).parse_args(arguments)
    try:
        records = with_experiment(options, measure)
    except InflightError as error:
        print(f"benchmarks.paper.ablation: error: {error}", file=sys.stderr)
        return 2
    identity = {key: getattr(options, key) for key in ("dataset", "attack", "setting", "seed")}
    records = [{**identity, **record} for record in records]
    keys = ("held_out_error", "held_out_source_error", "tpr", "fpr", "sia")
    print(table([(r["idea"], *(f"{r[key]:.4f}" for key in keys)) for r in records], ("idea", *keys)))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def measure(case: Experiment) -> list[dict[str, Any]]:
    """One record for each idea.  Raises InflightError when nothing is suspected."""
    with tempfile.TemporaryDirectory() as folder:
        program = export_program(case.network, case.preprocess.input_shape, Path(folder, "classifier.pt2"))
        classifiers = {
            name: load_classifier(program, image_shape=case.defence.image_shape, feature_layer=layer)
            for name, layer in LAYERS.items()
        }
    inspection = inspected(case, classifiers["joined"])
    if not inspection.suspects:
        raise InflightError("no class is suspected: there is no pattern to work with")
    target = inspection.suspects[0]
    embed = inspection.estimates[target].embed
    classifiers["shipped"] = _chosen(case, classifiers["joined"], inspection)
    of_layer = {c.feature_layer: _held_out(case, c, target) for c in classifiers.values()}
    records = []
    for idea in tqdm(IDEAS, desc="ideas", unit="idea"):
        classifier = classifiers[idea.layer]
        held_out = of_layer[classifier.feature_layer]
        records.append({"idea": idea.name, **_measure(idea, case, classifier, target, embed, held_out)})
    return records


def _chosen(case: Experiment, classifier: Classifier, inspection: Inspection) -> Classifier:
    """The classifier with the feature layers that a calibration takes."""
    layer = calibrate(classifier, case.defence, inspection, seed=case.seed, progress=False).feature_layer
    return next(option for option in (classifier, *classifier.alternatives) if option.feature_layer == layer)


def _measure(
    idea: Idea,
    case: Experiment,
    classifier: Classifier,
    target: int,
    embed: Callable[[Pixels], Pixels],
    held_out: dict[str, tuple[Pixels, NDArray[np.int64]]],
) -> dict[str, Any]:
    features, labels, groups = _samples(idea, case, classifier, target, embed)
    direction = features[labels != target].mean(axis=0) - features[labels == target].mean(axis=0)
    original = groups < case.defence.labels.size
    density = idea.density
    if density is None:
        density = select(features[original], labels[original], target, seed=case.seed, progress=False).best.candidate
    # Copies of an image stay in its fold: a held-out image has no copy among the fitted ones.
    own_groups, first = np.unique(groups[original], return_index=True)
    folds = StratifiedKFold(5, shuffle=True, random_state=case.seed)
    scores = np.full((original.sum(), len(np.unique(labels))), np.nan)
    guesses = np.full(original.sum(), -1)
    for _, held in folds.split(own_groups, labels[original][first]):
        kept = ~np.isin(groups % case.defence.labels.size, own_groups[held])
        rows, sources = _score(idea, features[kept], labels[kept], features[original][held], target, density, direction)
        scores[held], guesses[held] = rows, sources
    record = {"density": str(density), "feature_layer": classifier.feature_layer}
    record |= _errors(scores, guesses, labels[original], target, "held_out_error", "held_out_source_error")
    row = int(np.searchsorted(np.unique(labels), target))
    result: dict[str, Any] = {}
    for name, (frames, truth) in held_out.items():
        rows, guessed = _score(idea, features, labels, frames, target, density, direction)
        flagged = ~(margins(rows, row) < 0)
        result[name] = float(flagged.mean())
        if name == "tpr":
            result["sia"] = float((flagged & (guessed == truth)).mean())
    return record | result


def _held_out(case: Experiment, classifier: Classifier, target: int) -> dict[str, tuple[Pixels, NDArray[np.int64]]]:
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
    idea: Idea, case: Experiment, classifier: Classifier, target: int, embed: Callable[[Pixels], Pixels]
) -> tuple[Pixels, NDArray[np.int64], NDArray[np.int64]]:
    """Features, labels and image numbers of what a guard is fitted to; a copy's number lies above all images' own."""
    pixels, labels = case.defence.pixels(case.preprocess), case.defence.labels
    versions: list[tuple[Pixels, Callable[[Pixels], Pixels]]] = [(pixels, embed)]
    if idea.copies == "shift":
        versions += [(np.roll(pixels, step, axis=axis), embed) for axis in (2, 3) for step in (-1, 1)]
    elif idea.copies == "strength":
        versions += [(pixels, _weaker(embed, share)) for share in (0.8, 0.9)]
    parts = []
    for number, (clean, put) in enumerate(versions):
        triggered = clean.copy()
        triggered[labels != target] = put(clean[labels != target])
        logits, features = extract(classifier, triggered, case.preprocess)
        used = judged(logits.argmax(1), labels, target)
        parts.append((features[used], labels[used], np.flatnonzero(used) + number * labels.size))
    features, all_labels, groups = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return features, all_labels, groups


def _weaker(embed: Callable[[Pixels], Pixels], share: float) -> Callable[[Pixels], Pixels]:
    return lambda pixels: pixels + np.float32(share) * (embed(pixels) - pixels)


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
        estimator = GuardEstimator(
            target,
            kind=density.kind,
            n_components=density.n_components,
            regularisation=density.regularisation,
            shrinkage=density.shrinkage,
        )
        return log_likelihoods(estimator.fit(fitted, labels).guard_, judged)

    classes = np.unique(labels)
    scores = rows(features, frames)
    source_scores = scores
    if idea.project:
        unit = direction / np.linalg.norm(direction)
        source_scores = rows(features - np.outer(features @ unit, unit), frames - np.outer(frames @ unit, unit))
    return scores, classes[best_other(source_scores, int(np.searchsorted(classes, target)))]


def _errors(
    scores: NDArray[np.float64],
    guesses: NDArray[np.int64],
    labels: NDArray[np.int64],
    target: int,
    verdict: str,
    source: str,
) -> dict[str, float]:
    flagged = ~(margins(scores, int(np.searchsorted(np.unique(labels), target))) < 0)
    clean = labels == target
    missed = 1.0 - flagged[~clean].mean()
    right = flagged & (guesses == labels)
    return {verdict: float((flagged[clean].mean() + missed) / 2), source: float(1.0 - right[~clean].mean())}


if __name__ == "__main__":
    sys.exit(main())
