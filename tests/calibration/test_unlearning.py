"""A copy unlearns the pattern while the classifier stays, and its logits go into the bundle behind the classifier's features."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import poisoned
import pytest
import torch
from command_lines import run
from networks_for_tests import LeNetBN, export, shaken
from poisoned import PREPROCESS, TARGET, Poisoned
from torch import Tensor, nn

from inflight_edge import DataError, Detector, Preprocess, read_bundle, write_bundle
from inflight_edge.bundle import Bundle
from inflight_edge.calibration import commands
from inflight_edge.calibration.calibrate import UNLEARN, calibrate, copy_helps
from inflight_edge.calibration.evaluate import evaluate
from inflight_edge.calibration.export import check_parity, export_onnx
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.inspection import Inspection
from inflight_edge.calibration.model import Classifier, classifier_from_program
from inflight_edge.calibration.report import render
from inflight_edge.calibration.reversal.estimates import PatchEstimate
from inflight_edge.calibration.samples import View
from inflight_edge.calibration.unlearning import joined, unlearned
from inflight_edge.cli import main
from inflight_edge.errors import ModelError, OptionError
from inflight_edge.guard import MAX_FEATURES
from inflight_edge.verify import verify

CORNER = PatchEstimate(1, np.eye(1, 256).reshape(16, 16).astype(np.float32), np.ones((2, 16, 16), np.float32), 1.0, 1.0)


def images(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (count, 2, 16, 16)).astype(np.float32), np.arange(count) % 5


def normalised() -> Classifier:
    program = export(shaken(LeNetBN()), torch.zeros(2, 2, 16, 16), free={0: "batch"})
    return classifier_from_program(program, image_shape=(2, 16, 16))


def weights(classifier: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in classifier.graph.state_dict().items()}


@pytest.fixture(scope="module")
def copied(classifier: Classifier, inspection: Inspection, victim: Poisoned) -> Classifier:
    pixels, patterns = victim.defence.pixels(PREPROCESS), [inspection.estimates[TARGET]]
    return unlearned(classifier, pixels, victim.defence.labels, patterns, (), PREPROCESS)


@pytest.fixture(scope="module")
def with_copy(victim: Poisoned, classifier: Classifier, inspection: Inspection) -> Bundle:
    return calibrate(classifier, victim.defence, inspection, precisions=("int8",), unlearn="always", progress=False)


def test_the_copy_unlearns_the_pattern_and_the_true_trigger(
    copied: Classifier, classifier: Classifier, inspection: Inspection, victim: Poisoned
) -> None:
    clean = victim.test.subset(victim.test.labels != TARGET)
    estimated = inspection.estimates[TARGET].embed(clean.pixels(PREPROCESS))
    true = victim.triggered.pixels(PREPROCESS)
    for triggered, least in ((estimated, 0.5), (true, 0.3)):
        before, after = (extract(network, triggered, PREPROCESS)[0].argmax(1) for network in (classifier, copied))
        assert (before == TARGET).mean() > 0.9
        assert (after == clean.labels).mean() > (before == clean.labels).mean() + least
    right = extract(copied, victim.test.pixels(PREPROCESS), PREPROCESS)[0].argmax(1) == victim.test.labels
    assert right.mean() > 0.9


def test_the_classifier_stays_as_it_is() -> None:
    network = normalised()
    before = weights(network)
    pixels, labels = images()
    copied = unlearned(network, pixels, labels, [CORNER], (View(mirrored=True),), Preprocess((2, 16, 16)))
    after, changed = weights(network), weights(copied)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in copied.graph.parameters())
    assert (copied.alternatives, copied.together) == ((), None)
    assert set(changed) == set(before)
    for kind in ("running_mean", "running_var", "weight", "bias"):
        names = [name for name in before if name.endswith(kind)]
        assert not all(
            torch.equal(before[name], changed[name]) for name in names
        )  # some: before a normalisation no bias does


def test_batch_normalisation_is_in_evaluation_mode_afterwards() -> None:
    """An image's logits do not depend on its batch, and the kept statistics move no further."""
    pixels, labels = images()
    copied = unlearned(normalised(), pixels, labels, [CORNER], (), Preprocess((2, 16, 16)))
    before = weights(copied)
    batch = torch.from_numpy(pixels[:6] / 255)
    with torch.no_grad():
        together, alone = copied(batch)[0], torch.cat([copied(image[None])[0] for image in batch])
    assert torch.allclose(together, alone, atol=1e-5)
    assert all(torch.equal(value, weights(copied)[name]) for name, value in before.items())


def test_the_seed_decides_everything() -> None:
    pixels, labels = images()
    one, same, other = (
        weights(unlearned(normalised(), pixels, labels, [CORNER], (), Preprocess((2, 16, 16)), seed=seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_class_never_carries_its_own_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are black, so that white pixels are the pattern's."""
    pixels, labels = np.zeros((50, 2, 16, 16), np.float32), np.arange(50) % 5
    shown: list[tuple[Tensor, Tensor]] = []

    def no_descent(_: object, __: object, batches: Iterable[tuple[Tensor, Tensor]], ___: float) -> None:
        shown.extend(batches)

    monkeypatch.setattr("inflight_edge.calibration.unlearning.descend", no_descent)
    elsewhere = replace(CORNER, target=2, mask=np.ascontiguousarray(CORNER.mask[::-1]))
    unlearned(normalised(), pixels, labels, [CORNER, elsewhere], (), Preprocess((2, 16, 16)))
    batch, classes = (torch.cat(parts) for parts in zip(*shown, strict=True))
    first, second = batch[:, 0, 0, 0] > 0, batch[:, 0, -1, 0] > 0
    assert not first[classes == 1].any()
    assert not second[classes == 2].any()
    assert not (first & second).any()
    for stamped in (first, second):
        assert set(classes[stamped].tolist()) == set(range(5)) - ({1} if stamped is first else {2})
    carry = (first | second).float().mean()
    assert 0.12 < carry < 0.2  # a fifth, but for the images that are of the drawn pattern's class


def test_joined_features_are_the_own_and_then_the_copys_logits(classifier: Classifier, copied: Classifier) -> None:
    both = joined(classifier, copied)
    inputs = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (logits, features), own, copys = both(inputs), classifier(inputs), copied(inputs)
    assert torch.equal(logits, own[0])
    assert torch.equal(features, torch.cat([own[1], copys[0]], 1))
    assert both.n_features == features.shape[1]
    assert both.feature_layer == "linear+unlearned.logits"
    assert check_parity(both, export_onnx(both), inputs.numpy()) < 1e-4


def test_a_bundle_with_a_copy_verifies_and_finds_sources(with_copy: Bundle, victim: Poisoned, tmp_path: Path) -> None:
    write_bundle(with_copy, tmp_path / "bundle")
    assert all(check.passed for check in verify(tmp_path / "bundle"))
    assert with_copy.n_features == 24 + poisoned.N_CLASSES
    assert with_copy.precisions == ("fp32", "int8")
    figures, plain = (
        evaluate(Detector(bundle, threads=1), victim.test, victim.triggered, progress=False).as_dict()
        for bundle in (with_copy, poisoned.bundle())
    )
    assert (figures["acc"], figures["asr"]) == (plain["acc"], plain["asr"])  # the classifier is the same
    assert figures["tpr"] > 0.95
    assert figures["fpr"] < 0.1
    assert figures["sia"] > plain["sia"] - 0.03


def test_the_gain_is_measured_on_images_that_neither_copy_nor_guard_was_fitted_to(
    with_copy: Bundle, victim: Poisoned
) -> None:
    found = with_copy.metrics["unlearned"]
    assert found["held_out_images"] == len(victim.defence) // 5
    for errors in (found["without"], found["with"]):
        assert 0 <= errors["verdict_error"] < 0.1
        assert 0 <= errors["source_error"] < 0.5
    assert found["without"] != found["with"]
    assert "unlearned" not in poisoned.bundle().metrics
    assert "of the source on 56 images that neither it nor a guard was fitted to" in render(with_copy, name="digits")


def test_the_command_says_what_the_copy_is_good_for(
    with_copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def make_bundle(*_: Any, unlearn: str, **__: Any) -> Bundle:
        asked.append(unlearn)
        return poisoned.bundle() if unlearn == "never" else with_copy

    monkeypatch.setattr(commands, "make_bundle", make_bundle)
    model = poisoned.write_program(tmp_path / "tiny.pt2")
    data = poisoned.write_npz(tmp_path / "clean.npz", poisoned.poisoned().defence)
    poisoned.inspected().save(tmp_path / "inspection")
    command = ("calibrate", model, "--data", data, "--pattern", tmp_path / "inspection" / "patterns.safetensors")
    command += ("--quiet", "--out", tmp_path / "bundle", "--force")
    assert run(*command, "--unlearn", "auto") == 0
    assert "on 56 images that neither it nor a guard was fitted to, error of the source" in capsys.readouterr().out
    found = with_copy.metrics["unlearned"]
    for is_joined, printed, reported in (
        (True, "  joined: every frame takes two", "; joined"),
        (False, "  no better: left out", "; left out"),
    ):
        monkeypatch.setitem(with_copy.metrics, "unlearned", {**found, "joined": is_joined})
        assert run(*command, "--unlearn", "auto") == 0
        assert printed in capsys.readouterr().out
        assert reported in render(with_copy, name="digits")
    assert run(*command, "--unlearn", "auto", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["feature_layer"] == "linear+unlearned.logits"
    assert report["unlearned"] == read_bundle(tmp_path / "bundle").metrics["unlearned"]
    assert run(*command) == 0
    assert "unlearned the pattern" not in capsys.readouterr().out
    assert asked == ["auto"] * 4 + ["never"]


def gain(verdict: float, source: float) -> dict[str, Any]:
    errors = {"verdict_error": 0.0, "source_error": 0.2}
    return {
        "held_out_images": 200,
        "without": errors,
        "with": {"verdict_error": verdict, "source_error": source},
    }


@pytest.mark.parametrize(
    ("verdict", "source", "helps"),
    [
        (0.0, 0.1, True),
        (0.004, 0.1, True),  # less than one of 200 images
        (0.1, 0.1, False),  # far fewer sources are missed, but of the verdict more
        (0.0, 0.3, False),
        (0.0, 0.2, False),  # no better, at the price of a second network
    ],
)
def test_a_copy_helps_where_fewer_held_out_sources_are_missed(verdict: float, source: float, helps: bool) -> None:
    assert copy_helps(gain(verdict, source)) is helps


@pytest.mark.parametrize("helps", [True, False])
def test_a_copy_is_joined_where_it_helps(
    helps: bool, victim: Poisoned, inspection: Inspection, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = gain(0.0, 0.1 if helps else 0.3)
    monkeypatch.setattr("inflight_edge.calibration.calibrate._gain", lambda *_: dict(measured))
    made: list[Classifier] = []
    monkeypatch.setattr(
        "inflight_edge.calibration.calibrate._with_copy", lambda case, network, base: made.append(network) or network
    )
    bundle = calibrate(classifier, victim.defence, inspection, unlearn="auto", progress=False)
    assert bundle.metrics["unlearned"] == {**measured, "joined": helps}
    assert len(made) == helps
    assert bundle.feature_layer == poisoned.bundle().feature_layer


@pytest.mark.parametrize("when", ["to judge it by", "that ships"])
def test_a_copy_that_cannot_be_made_is_left_out_with_the_reason_unless_it_is_asked_for(
    when: str,
    victim: Poisoned,
    inspection: Inspection,
    classifier: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ruined(*_: Any) -> dict[str, Any]:
        raise ModelError("model: unlearning costs too much")

    monkeypatch.setattr("inflight_edge.calibration.calibrate._with_copy", ruined)
    if when == "that ships":
        monkeypatch.setattr("inflight_edge.calibration.calibrate._gain", lambda *_: gain(0.0, 0.1))
    bundle = calibrate(classifier, victim.defence, inspection, unlearn="auto", progress=False)
    assert bundle.metrics["unlearned"] == {"joined": False, "reason": "model: unlearning costs too much"}
    assert "left out, model: unlearning costs too much" in render(bundle, name="digits")
    commands._print_copy(bundle.metrics["unlearned"])
    assert "left out, model: unlearning costs too much" in capsys.readouterr().out
    if when == "to judge it by":
        with pytest.raises(ModelError, match="unlearning costs too much"):
            calibrate(classifier, victim.defence, inspection, unlearn="always", progress=False)


def test_the_command_offers_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    assert "--unlearn {" + ",".join(UNLEARN) + "}" in capsys.readouterr().out


def test_an_unknown_choice_is_refused(victim: Poisoned, inspection: Inspection, classifier: Classifier) -> None:
    with pytest.raises(OptionError, match="unlearn: expected one of 'never', 'auto', 'always', got True"):
        calibrate(classifier, victim.defence, inspection, unlearn=True, progress=False)


def test_a_ruined_copy_is_refused(
    classifier: Classifier, inspection: Inspection, victim: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, patterns = victim.defence.pixels(PREPROCESS), [inspection.estimates[TARGET]]
    for rate in (10.0, 1e30):  # the second gives weights that are not finite
        monkeypatch.setattr("inflight_edge.calibration.unlearning.RATE", rate)
        with pytest.raises(ModelError, match=r"unlearning costs too much: the copy reads .* leave out --unlearn"):
            unlearned(classifier, pixels, victim.defence.labels, patterns, (), PREPROCESS)


class Picked(nn.Module):
    """A parameter of integers, and a last step that can or cannot be differentiated."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(512), requires_grad=False)
        self.hidden, self.out, self.in_place = nn.Linear(512, 12), nn.Linear(12, 5), in_place

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.hidden(pictures.flatten(1)[:, self.order]))
        return self.out(hidden.mul_(2.0) if self.in_place else hidden * 2.0)


def picked(*, in_place: bool) -> Classifier:
    program = export(shaken(Picked(in_place=in_place)), torch.zeros(2, 2, 16, 16), free={0: "batch"})
    return classifier_from_program(program, image_shape=(2, 16, 16))


def test_only_parameters_with_a_gradient_are_trained() -> None:
    pixels, labels = images()
    network = picked(in_place=False)
    before, after = weights(network), weights(unlearned(network, pixels, labels, [CORNER], (), Preprocess((2, 16, 16))))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "hidden.weight", "hidden.bias", "out.weight", "out.bias",
    }  # fmt: skip
    with pytest.raises(ModelError, match="it cannot be trained"):
        unlearned(picked(in_place=True), pixels, labels, [CORNER], (), Preprocess((2, 16, 16)))


def test_a_program_bound_to_its_batch_keeps_its_statistics() -> None:
    """Its batches are filled up with repeated images."""
    network = replace(normalised(), fixed_batch=3)
    pixels, labels = images()
    before, after = weights(network), weights(unlearned(network, pixels, labels, [CORNER], (), Preprocess((2, 16, 16))))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("running" in name for name in changed)


def test_what_cannot_be_unlearned_is_refused() -> None:
    pixels, labels = images()
    network = normalised()
    constant = replace(network, graph=torch.fx.GraphModule(nn.Module(), torch.fx.Graph()))
    with pytest.raises(ModelError, match="its weights are constants"):
        unlearned(constant, pixels, labels, [CORNER], (), Preprocess((2, 16, 16)))
    wide = replace(network, n_features=MAX_FEATURES)
    with pytest.raises(ModelError, match="expected at most"):
        joined(wide, network)


def test_few_images_are_refused(victim: Poisoned, inspection: Inspection, classifier: Classifier) -> None:
    labels = victim.defence.labels
    few = np.concatenate([np.flatnonzero(labels == c)[: 19 if c == 0 else 20] for c in range(poisoned.N_CLASSES)])
    with pytest.raises(
        DataError, match="unlearn: expected at least 20 images of each class; leave out --unlearn or add"
    ):
        calibrate(classifier, victim.defence.subset(few), inspection, unlearn="auto", progress=False)
