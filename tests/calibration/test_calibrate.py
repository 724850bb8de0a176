"""From an inspection to a bundle that verifies, guards what it was asked to and refuses what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import assert_same
from poisoned import N_CLASSES, PREPROCESS, SIZE, TARGET, Poisoned

from inflight_edge import Bundle, DataError, Detector, GuardError, OptionError, Preprocess, read_bundle, write_bundle
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.datasets import split_defence
from inflight_edge.calibration.evaluate import evaluate
from inflight_edge.calibration.finding import FURTHER_PATCHES
from inflight_edge.calibration.inspection import Inspection
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.samples import FEW_IMAGES
from inflight_edge.verify import verify


def test_the_bundle_verifies(bundle: Bundle, tmp_path: Path) -> None:
    write_bundle(bundle, tmp_path / "bundle")
    checks = verify(tmp_path / "bundle")
    assert all(check.passed for check in checks), checks
    assert len(checks) > 5
    assert_same(read_bundle(tmp_path / "bundle"), bundle)


def test_what_the_bundle_holds(bundle: Bundle, inspection: Inspection, victim: Poisoned) -> None:
    (guard,) = bundle.guards
    assert guard.target == TARGET
    assert guard.classes.tolist() == list(range(N_CLASSES))
    assert guard.n_features == bundle.n_features == 24
    assert 30 <= len(guard.clean_margins) <= 40  # those of the 40 clean target images that are predicted right
    assert bundle.preprocess == inspection.preprocess
    assert bundle.class_names == tuple("0123456")
    assert bundle.feature_layer == "linear"
    metrics = bundle.metrics
    assert metrics["n_images"] == len(victim.defence)
    assert metrics["accuracy"] == inspection.accuracy
    assert 0 <= metrics["parity"] <= 1e-4
    assert metrics["inspection"] == inspection.rows()
    (report,) = metrics["guards"]
    assert report["target"] == TARGET
    assert report["asr_estimated"] > 0.95
    assert report["density"]["chosen"]["candidate"]["kind"] == guard.kind
    assert report["density"]["reason"].startswith(guard.kind)
    assert {"python", "torch", "numpy", "onnx", "inflight-edge"} <= set(bundle.versions)


def test_the_self_test_covers_both_verdicts(bundle: Bundle) -> None:
    assert {"accept", "trigger", "unguarded"} == set(bundle.self_test.decisions)
    assert bundle.self_test.frames.shape[1:] == (SIZE, SIZE, 1)
    verdicts = Detector(bundle, threads=1).run(list(bundle.self_test.frames))
    assert [v.decision.value for v in verdicts] == list(bundle.self_test.decisions)


def test_the_detector_sees_the_true_trigger(bundle: Bundle, victim: Poisoned) -> None:
    figures = evaluate(Detector(bundle, threads=1), victim.test, victim.triggered, progress=False)
    assert figures.asr is not None
    assert figures.asr > 0.9
    assert figures.tpr is not None
    assert figures.tpr > 0.95
    assert figures.fpr is not None
    assert figures.fpr < 0.1
    assert figures.sia is not None
    assert figures.sia > 0.8
    assert figures.n_invalid == 0


@pytest.fixture(scope="module")
def named(classifier: Classifier, inspection: Inspection, victim: Poisoned) -> Bundle:
    """Two targets, named classes."""
    with_names = replace(inspection, class_names=tuple("abcdefg"))
    return calibrate(classifier, victim.defence, with_names, targets=(TARGET, 1), progress=False)


def test_two_targets(named: Bundle, bundle: Bundle, victim: Poisoned, tmp_path: Path) -> None:
    assert [guard.target for guard in named.guards] == [TARGET, 1]
    assert [report["target"] for report in named.metrics["guards"]] == [TARGET, 1]
    assert named.class_names == tuple("abcdefg")
    write_bundle(named, tmp_path / "bundle")
    assert all(check.passed for check in verify(tmp_path / "bundle"))
    detector = Detector(named, threads=1)
    assert sorted(detector.guards) == [1, TARGET]
    ones = [np.asarray(victim.test.images)[i] for i in np.flatnonzero(victim.test.labels == 1)]
    assert np.mean([v.decision.value == "accept" for v in detector.run(ones)]) > 0.9


def test_the_same_again(named: Bundle, bundle: Bundle) -> None:
    """On the same feature layer the first guard does not depend on what else is guarded, nor on the run."""
    assert named.feature_layer == bundle.feature_layer
    for name in ("mean", "scale", "means", "log_weights", "whitener", "clean_margins", "offsets"):
        np.testing.assert_array_equal(getattr(named.guards[0], name), getattr(bundle.guards[0], name))


def test_no_suspect_and_no_target(classifier: Classifier, inspection: Inspection, victim: Poisoned) -> None:
    clean = replace(inspection, suspects=())
    message = "^no class looks like a backdoor's target, so there is nothing to guard; name one with --target"
    with pytest.raises(OptionError, match=message):
        calibrate(classifier, victim.defence, clean, progress=False)
    with pytest.raises(OptionError, match=message):
        calibrate(classifier, victim.defence, inspection, targets=(), progress=False)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((3, 3), r"^targets: expected each class once, got \(3, 3\)"),
        ((7,), "^target: expected a class from 0 to 6, got 7"),
        ((-1,), "^target: expected a class from 0 to 6, got -1"),
    ],
)
def test_targets_that_are_none(
    classifier: Classifier, inspection: Inspection, victim: Poisoned, targets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(classifier, victim.defence, inspection, targets=targets, progress=False)


def test_an_inspection_of_another_model(classifier: Classifier, inspection: Inspection, victim: Poisoned) -> None:
    fewer = replace(inspection, estimates=inspection.estimates[:5])
    with pytest.raises(
        DataError, match=r"^inspection: made for 5 classes and input \(1, 12, 12\), but the model has 7 "
    ):
        calibrate(classifier, victim.defence, fewer, progress=False)
    other = replace(inspection, preprocess=Preprocess((3, 12, 12)))
    with pytest.raises(
        DataError, match=r"input \(3, 12, 12\), but the model has 7 and \(1, 12, 12\); inspect this model"
    ):
        calibrate(classifier, victim.defence, other, progress=False)


def test_data_that_does_not_fit(classifier: Classifier, inspection: Inspection, victim: Poisoned) -> None:
    few = victim.defence.subset(victim.defence.labels != 2)
    with pytest.raises(DataError, match="class 2 has 0 images, expected at least 3 of each of the model's 7 classes"):
        calibrate(classifier, few, inspection, progress=False)
    order = np.argsort(victim.defence.labels, kind="stable").reshape(N_CLASSES, -1)[:, :2].ravel()
    message = (
        r"class 0 has 2 images, expected at least 3 of each of the model's 7 classes \(columns .*\); add clean images"
    )
    with pytest.raises(DataError, match=message):
        calibrate(classifier, victim.defence.subset(order), inspection, progress=False)
    wrong = replace(inspection, preprocess=replace(PREPROCESS, scale=1e-6))
    with pytest.raises(DataError, match=r"of these images right \(chance: 14\.3%\); check --scale, --mean, --std"):
        calibrate(classifier, victim.defence, wrong, progress=False)


def test_images_of_other_sizes_are_fitted(classifier: Classifier, inspection: Inspection, victim: Poisoned) -> None:
    large = [np.repeat(np.repeat(frame, 2, axis=0), 2, axis=1)[..., 0] for frame in np.asarray(victim.defence.images)]
    data = replace(victim.defence, images=large)
    assert calibrate(classifier, data, inspection, progress=False).metrics["accuracy"] > 0.9


def offering(first: Classifier, *others: Classifier) -> Classifier:
    """The first one, with the others' features to choose from."""
    networks = tuple(replace(network, alternatives=(), together=None) for network in (first, *others))

    def graph(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [network(images) for network in networks]
        return outputs[0][0], torch.cat([features for _, features in outputs], 1)

    n_features = sum(network.n_features for network in networks)
    together = replace(networks[0], graph=graph, n_features=n_features)  # type: ignore[arg-type]
    return replace(networks[0], alternatives=networks[1:], together=together)


def test_the_feature_layer_with_the_lowest_held_out_errors_is_taken(
    classifier: Classifier, inspection: Inspection, victim: Poisoned, bundle: Bundle
) -> None:
    tried = {entry["feature_layer"]: entry for entry in bundle.metrics["feature_layers"]}
    assert list(tried) == ["linear", "relu_2", "conv2d_1", "conv2d"]
    errors = {name: (entry["verdict_error"], entry["source_error"]) for name, entry in tried.items()}
    assert errors["linear"] < errors["relu_2"]
    assert bundle.feature_layer == "linear"
    other = classifier.alternatives[0]
    made = calibrate(offering(other, classifier), victim.defence, inspection, progress=False)
    assert [entry["feature_layer"] for entry in made.metrics["feature_layers"]] == ["relu_2", "linear"]
    assert_same(replace(made, metrics=bundle.metrics), bundle)


def test_of_layers_with_equal_errors_the_default_is_taken(
    classifier: Classifier, inspection: Inspection, victim: Poisoned
) -> None:
    first, second = (replace(classifier, feature_layer=name) for name in ("first", "second"))
    made = calibrate(offering(first, second), victim.defence, inspection, progress=False)
    assert made.feature_layer == "first"


class Scaled:
    """Logits of a classifier, features too large or too small to use."""

    def __init__(self, classifier: Classifier, factor: float) -> None:
        self.graph, self.factor = classifier.graph, factor

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = self.graph(images)
        return logits, features * self.factor


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [(float("inf"), DataError, "features are not finite"), (1e-42, GuardError, "scale")],
)
def test_a_layer_that_cannot_be_fitted_leaves_the_others(
    classifier: Classifier,
    inspection: Inspection,
    victim: Poisoned,
    bundle: Bundle,
    factor: float,
    error: type[Exception],
    message: str,
) -> None:
    dead = replace(classifier, graph=Scaled(classifier, factor), feature_layer="dead")  # type: ignore[arg-type]
    made = calibrate(offering(dead, classifier), victim.defence, inspection, progress=False)
    assert_same(replace(made, metrics=bundle.metrics), bundle)
    assert message in made.metrics["feature_layers"][0]["error"]
    with pytest.raises(error, match=message):
        calibrate(offering(dead), victim.defence, inspection, progress=False)


def test_what_the_guard_was_fitted_to_is_kept(bundle: Bundle, victim: Poisoned) -> None:
    samples = bundle.metrics["guards"][0]["samples"]
    assert samples["places"][0] == [0, 0]
    assert all(set(view) == {"mirrored", "step", "angle", "scale"} for view in samples["views"])
    assert 0.9 * len(victim.defence) < samples["n"] <= len(victim.defence) * (1 + len(samples["views"]))


def test_few_images_get_further_patterns_of_the_same_target(
    classifier: Classifier, inspection: Inspection, victim: Poisoned, bundle: Bundle
) -> None:
    assert bundle.metrics["guards"][0]["samples"]["further"] == []
    few, _ = split_defence(victim.defence.labels, FEW_IMAGES - 1, seed=0)
    made = calibrate(classifier, victim.defence.subset(few), inspection, progress=False)
    further = made.metrics["guards"][0]["samples"]["further"]
    assert 1 <= len(further) <= FURTHER_PATCHES + 1
    assert len({round(pattern["norm"], 6) for pattern in further}) == len(further)  # each another one
