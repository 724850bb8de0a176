"""What a guard is fitted to: places of the pattern and views of the images, tried on a classifier that can be read."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from inflight_edge import Preprocess
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.reversal.estimates import AdditionEstimate, Estimate, PatchEstimate, moved
from inflight_edge.calibration.samples import (
    FEW_IMAGES,
    MAX_SAMPLES,
    Plan,
    View,
    collect,
    judged,
    plan,
    recognised,
    spread,
)

SIZE, TARGET = 16, 2
PREPROCESS = Preprocess((1, SIZE, SIZE), 1.0)


class Reader:
    """Class 0: bright above; 1: bright below; 2, the target: a bright left half, or a white pixel in the middle column.

    Features: the sums of the rows.  Mirrored images of the target are not recognised.
    """

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        plane = images[:, 0]
        top, bottom, left = (part.mean((1, 2)) for part in (plane[:, :8], plane[:, 8:], plane[:, :, :6]))
        trigger = (plane[:, :, 8] > 250).any(1)
        logits = torch.stack([top, bottom, 1.5 * left + 1e4 * trigger], 1)
        return logits, plane.sum(2)


CLASSIFIER = Classifier(Reader(), (1, SIZE, SIZE), 3, SIZE, "rows", None)  # type: ignore[arg-type]


def data(n_each: int = 12) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).uniform(0, 20, (3 * n_each, 1, SIZE, SIZE)).astype(np.float32)
    labels = np.tile([0, 1, 2], n_each)
    images[labels == 0, :, :8] += 100
    images[labels == 1, :, 8:] += 100
    images[labels == 2, :, :, :7] += 100
    return np.rint(images), labels


def pixel(row: int = 7, column: int = 8) -> PatchEstimate:
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[row, column] = 1
    return PatchEstimate(TARGET, mask, np.ones((1, SIZE, SIZE), np.float32), 1.0, 1.0, (0, 1))


def planned(
    pixels: np.ndarray,
    labels: np.ndarray,
    estimate: Estimate,
    classifier: Classifier = CLASSIFIER,
    preprocess: Preprocess = PREPROCESS,
) -> Plan:
    views = recognised(classifier, pixels, labels, preprocess)
    return plan(classifier, pixels, labels, estimate, views, preprocess)


def test_places_are_those_where_the_pattern_still_works() -> None:
    pixels, labels = data()
    made = planned(pixels, labels, pixel())
    assert made.places == ((0, 0), (-2, 0), (2, 0))
    assert made.success == 1.0
    assert planned(pixels, labels, pixel(1)).places == ((0, 0), (2, 0))  # it leaves the image
    assert planned(pixels, labels, pixel(7, 3)).places == ((0, 0),)  # it works nowhere
    assert planned(pixels, labels, pixel(7, 3)).success == 0.0


def test_views_are_those_that_are_still_recognised() -> None:
    made = planned(*data(FEW_IMAGES), pixel())
    moved_ones = tuple(View(step=step) for step in [(-1, 0), (0, -1), (0, 1), (1, 0)])
    assert made.views == moved_ones
    report = json.loads(json.dumps(made.as_dict()))
    assert report == made.as_dict()  # lists, as a bundle wants them
    assert report["places"] == [[0, 0], [-2, 0], [2, 0]]
    assert report["views"][0] == {"mirrored": False, "step": [-1, 0], "angle": 0.0, "scale": 1.0}
    turned_ones = (*(View(angle=angle) for angle in (-10.0, 10.0)), *(View(scale=scale) for scale in (0.9, 1.1)))
    assert planned(*data(FEW_IMAGES - 1), pixel()).views == moved_ones + turned_ones


def test_many_images_have_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = data(FEW_IMAGES)
    for most, count in ((3 * len(labels), 2), (2 * len(labels) - 1, 0), (1, 0)):
        monkeypatch.setattr("inflight_edge.calibration.samples.MAX_SAMPLES", most)
        assert len(planned(pixels, labels, pixel()).views) == count
    assert MAX_SAMPLES >= 10_000


def test_every_image_is_there_in_every_view_with_the_pattern_at_one_of_the_places() -> None:
    pixels, labels = data()
    chosen = Plan(((0, 0), (-2, 0), (2, 0)), (View(step=(0, 1)), View(mirrored=True)), 1.0)
    samples = collect(CLASSIFIER, pixels, labels, pixel(), chosen, PREPROCESS)
    np.testing.assert_array_equal(samples.labels, labels[samples.images])
    others = samples.labels != TARGET
    # Mirrored images of the target are not predicted as it, so they are left out.
    assert np.bincount(samples.images).tolist() == np.where(labels == TARGET, 2, 3).tolist()
    np.testing.assert_array_equal(samples.images[samples.one_each], np.arange(len(labels)))
    np.testing.assert_array_equal(samples.one_each, np.arange(len(labels)))
    # The row of the pixel, told from the sums of the rows: a white pixel adds at least 100 to the clean image's.
    first = samples.features[samples.one_each] - pixels[:, 0].sum(2)
    rows = np.where(first[labels != TARGET] > 0)[1]
    assert sorted(set(rows.tolist())) == [5, 7, 9]
    assert np.count_nonzero(first[labels == TARGET]) == 0
    assert len(rows) == np.count_nonzero(labels != TARGET)
    assert others.sum() == 3 * np.count_nonzero(labels != TARGET)
    again = collect(CLASSIFIER, pixels, labels, pixel(), chosen, PREPROCESS)
    np.testing.assert_array_equal(again.features, samples.features)
    other = collect(CLASSIFIER, pixels, labels, pixel(), chosen, PREPROCESS, seed=1)
    assert not np.array_equal(other.features, samples.features)


def test_further_patterns_are_put_into_some_of_the_images() -> None:
    pixels, labels = data()
    chosen = Plan(((0, 0),), (), 1.0, (pixel(1), pixel(3)))
    samples = collect(CLASSIFIER, pixels, labels, pixel(), chosen, PREPROCESS)
    change = samples.features[samples.one_each] - pixels[:, 0].sum(2)
    assert set(np.where(change[labels != TARGET] > 0)[1].tolist()) == {7, 1, 3}
    assert np.count_nonzero(change[labels == TARGET]) == 0
    assert chosen.as_dict()["further"] == [{"kind": "patch", "norm": 1.0}] * 2


def test_an_image_that_is_left_out_as_it_is_has_no_views() -> None:
    """Its view's margin would be none of a frame that the guard meets."""
    pixels, labels = data()
    misread = np.flatnonzero(labels == TARGET)[:3]
    pixels[misread] = 0
    pixels[misread, :, :8] = 60  # read as class 0; moved to the right half of the time as well
    pixels[misread[0], :, :, 6:8] = 100
    chosen = Plan(((0, 0),), (View(step=(0, -1)), View(step=(0, 1))), 1.0)
    samples = collect(CLASSIFIER, pixels, labels, pixel(), chosen, PREPROCESS)
    plain = collect(CLASSIFIER, pixels, labels, pixel(), replace(chosen, views=()), PREPROCESS)
    assert set(samples.images) == set(plain.images)
    np.testing.assert_array_equal(samples.features[samples.one_each], plain.features)


def test_one_place_and_no_view_is_the_plain_pattern() -> None:
    pixels, labels = data()
    samples = collect(CLASSIFIER, pixels, labels, pixel(), Plan(((0, 0),), (), 1.0), PREPROCESS)
    expected = pixels.copy()
    expected[labels != TARGET, 0, 7, 8] = 255
    np.testing.assert_array_equal(samples.features, expected[:, 0].sum(2))
    np.testing.assert_array_equal(samples.images, np.arange(len(labels)))
    assert pixels.max() < 255  # the images themselves are left alone


def test_what_leaves_the_image_is_gone() -> None:
    planes = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    assert moved(planes, (1, -1))[0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]
    assert moved(planes, (-1, 2), mode="edge")[0].tolist() == [[4, 4, 4, 5], [8, 8, 8, 9], [8, 8, 8, 9]]
    assert moved(planes, (0, 0)) is planes
    assert moved(planes, (5, 0)).tolist() == np.zeros((1, 3, 4)).tolist()


@pytest.mark.parametrize(
    "estimate",
    [pixel(), AdditionEstimate(TARGET, pixel().mask[None] * 0.5, 1.0, 1.0, (0, 1))],
    ids=["patch", "addition"],
)
def test_moved_patterns(estimate: Estimate) -> None:
    grey = np.full((1, 1, SIZE, SIZE), 100, np.float32)
    changed = np.argwhere(estimate.moved((-3, 2)).embed(grey)[0, 0] != 100)
    assert changed.tolist() == [[4, 10]]
    assert np.argwhere(estimate.embed(grey)[0, 0] != 100).tolist() == [[7, 8]]
    gone = estimate.moved((9, 0))
    np.testing.assert_array_equal(gone.embed(grey), grey)
    assert (gone.target, gone.sources, gone.kind) == (TARGET, (0, 1), estimate.kind)


def test_views_leave_the_image_alone() -> None:
    pixels, _ = data()
    before = pixels.copy()
    View()(pixels)[:] = 0
    View(mirrored=True)(pixels)[:] = 0
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(View(mirrored=True)(pixels), pixels[..., ::-1])
    np.testing.assert_array_equal(View(mirrored=True, step=(0, 1))(pixels)[..., 1:], pixels[..., ::-1][..., :-1])


def test_a_view_is_turned_anticlockwise_and_scaled_about_the_middle() -> None:
    pixels = np.zeros((2, 1, 9, 15), np.float32)
    pixels[1, 0, 4, 7], pixels[1, 0, 4, 11] = 200, 100
    turned = View(angle=90.0)(pixels)
    assert not turned[0].any()
    assert {(row, column): turned[1, 0, row, column] for row, column in np.argwhere(turned[1, 0])} == {
        (4, 7): 200,
        (0, 7): 100,
    }
    larger = View(scale=2.0)(pixels)[1, 0]
    np.testing.assert_array_equal(larger[3:6, 6:9], [[50, 100, 50], [100, 200, 100], [50, 100, 50]])
    np.testing.assert_array_equal(larger[4, 12:], [0, 0, 50])  # of the other one half is left
    smaller = View(scale=0.5)(np.full((1, 3, 8, 8), 7, np.float32))
    assert (smaller == 7).all()  # the edges are repeated
    grey = View(angle=10.0)(np.random.default_rng(0).uniform(0, 255, (1, 3, 8, 8)).astype(np.float32))
    np.testing.assert_array_equal(grey, np.rint(grey))
    assert (grey.dtype, grey.min() >= 0, grey.max() <= 255) == (np.float32, True, True)


@pytest.mark.parametrize("view", [View(), View(mirrored=True), View(step=(1, 0))])
def test_resized_images_are_rounded_as_a_pattern_rounds_them(view: View) -> None:
    """Else broken values would tell the clean images of the target from all others."""
    resized = np.random.default_rng(0).uniform(0, 255, (1, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(view(resized), np.rint(view(resized)))


def test_flat_images_are_not_moved() -> None:
    """Vectors, as a network of fully connected layers takes them: there is no above and below."""
    size = (1, 1, 16)
    reader = lambda images: (images[:, 0, 0, :3], images[:, 0, 0])  # noqa: E731
    flat = Classifier(reader, size, 3, 16, "all", None)  # type: ignore[arg-type]
    labels = np.tile([0, 1, 2], 4)
    pixels = np.zeros((12, *size), np.float32)
    pixels[np.arange(12), 0, 0, labels] = 100
    mask = np.zeros((1, 16), np.float32)
    mask[0, 2] = 1
    estimate = PatchEstimate(2, mask, np.ones(size, np.float32), 1.0, 1.0, (0, 1))
    made = planned(pixels, labels, estimate, flat, Preprocess(size, 1.0))
    assert made == Plan(((0, 0),), (), 1.0)


def test_a_class_that_the_pattern_seldom_moves_keeps_all_its_images() -> None:
    labels = np.repeat([0, 1, 2], 4)
    predicted = np.array([2, 2, 2, 0, 2, 1, 1, 1, 2, 2, 2, 2])
    assert judged(predicted, labels, 2).tolist() == [True, True, True, False, *[True] * 8]
    assert spread(10, 3).tolist() == [0, 4, 9]
    assert spread(2, 3).tolist() == [0, 1]
