"""The anomaly index by hand, and the search on a classifier whose smallest patch is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from inflight_edge.calibration.reversal.decision import MAX_INDEX, anomaly_indices, suspicious
from inflight_edge.calibration.reversal.estimates import PatchEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Patch, Search, Settings, search_patches
from inflight_edge.errors import DataError, ModelError, OptionError


def test_anomaly_index_by_hand() -> None:
    # Median 10, absolute deviations 9 1 0 2 6, their median 2, hence one unit is 2.9652.
    indices = anomaly_indices(np.array([1.0, 9.0, 10.0, 12.0, 16.0]))
    np.testing.assert_allclose(indices, np.array([9.0, 1.0, 0.0, -2.0, -6.0]) / 2.9652, rtol=1e-12)


def test_anomaly_index_of_an_even_count() -> None:
    # Median 2.5, absolute deviations 1.5 .5 .5 1.5, their median 1.
    np.testing.assert_allclose(
        anomaly_indices(np.array([4.0, 3.0, 1.0, 2.0])), np.array([-1.5, -0.5, 1.5, 0.5]) / 1.4826, rtol=1e-12
    )


def test_anomaly_index_without_deviation_is_the_largest_for_what_differs() -> None:
    """A finite one: it goes into JSON, and comes back."""
    np.testing.assert_array_equal(
        anomaly_indices(np.array([5.0, 5.0, 1.0, 5.0, 7.0])), [0.0, 0.0, MAX_INDEX, 0.0, -MAX_INDEX]
    )
    np.testing.assert_array_equal(anomaly_indices(np.array([3.0, 3.0])), [0.0, 0.0])


def test_a_class_out_of_reach_does_not_change_the_others_index() -> None:
    norms = np.array([55.0, 84, 87, 92, 98, 100, 104, 110, 113, 118, 50176])
    # Median 100, the median deviation 13.
    assert anomaly_indices(norms)[0] == pytest.approx(45 / (1.4826 * 13))
    assert suspicious(norms).tolist() == [True] + [False] * 10


N_CLASSES, SIZE = 3, 6
CORNER = (slice(0, 2), slice(0, 2))


def corner_model(images: Tensor) -> Tensor:
    """Classes 0 and 1 by the mean brightness; class 2 wins once the top left 2x2 pixels of channel 1 are bright."""
    body = images.mean((1, 2, 3))
    corner = images[:, 1, :2, :2].sum((1, 2))
    return torch.stack([-(body - 0.2) * 20, (body - 0.2) * 20, (corner - 3.0) * 20], 1)


def pixels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 40, (60, 2, SIZE, SIZE)).astype(np.float32)
    images[30:] += 40
    images[:, 1, :2, :2] = 0
    labels = np.repeat([0, 1], 30)
    return images, labels


SETTINGS = Settings(steps=250, batch=16)


def search(target: int, seed: int = 0) -> Search:
    images, labels = pixels()
    used = torch.from_numpy(np.flatnonzero(labels != target))
    return Search(target, torch.from_numpy(images / np.float32(255)), used, seed)


def found(*searches: Search, settings: Settings = SETTINGS) -> list[Patch]:
    return search_patches(corner_model, list(searches), settings=settings)


def test_the_search_finds_the_smallest_patch() -> None:
    (patch,) = found(search(2))
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[CORNER] = True
    # At least 3 of 4 pixels' brightness must be put there, so no mask below 3 succeeds.
    assert 3.0 <= patch.norm < 5.0
    assert patch.mask[inside].min() > 0.5
    assert patch.mask[~inside].max() < 0.1
    assert patch.pattern[1][CORNER].min() > 0.7
    assert (patch.mask.shape, patch.pattern.shape) == ((SIZE, SIZE), (2, SIZE, SIZE))
    assert patch.norm == pytest.approx(float(patch.mask.sum()), rel=1e-5)


def test_a_search_ends_early_without_losing_its_mask() -> None:
    (early,) = found(search(2), settings=replace(SETTINGS, steps=1000))
    (full,) = found(search(2), settings=replace(SETTINGS, steps=1000, stop=1000))
    assert early.steps < 500 < full.steps == 1000
    assert full.norm <= early.norm < 1.1 * full.norm


def test_a_class_that_no_mask_reaches_has_all_pixels() -> None:
    (patch,) = found(search(2), settings=replace(SETTINGS, steps=3))
    assert patch.norm == SIZE * SIZE


def test_logits_that_are_not_finite_with_a_patch_reach_nothing() -> None:
    """The largest of NaN is the first: class 0 would have been reached by anything, and no class would stand out."""
    images, _ = pixels()
    used = torch.arange(len(images))
    searches = [Search(target, torch.from_numpy(images / 255), used, target) for target in (0, 2)]

    def fragile(inputs: Tensor) -> Tensor:
        dark = inputs[:, 1, 0, 0] == 0.0  # there, as clean ones are
        return corner_model(inputs) * torch.where(dark, 1.0, torch.nan)[:, None]

    with pytest.raises(
        ModelError, match=r"^model: its logits are NaN or infinite for images with a patch; check --scale"
    ):
        search_patches(fragile, searches, settings=SETTINGS)


def test_no_images_to_search_with() -> None:
    empty = Search(1, torch.zeros(3, 2, SIZE, SIZE), torch.arange(0), 0)
    with pytest.raises(DataError, match=r"^class 1: no images of other classes to search with"):
        found(search(2), empty)


def test_the_search_depends_on_the_seed_alone() -> None:
    short = replace(SETTINGS, steps=20)
    runs = [found(search(2, seed), settings=short)[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0].mask, runs[1].mask)
    assert (runs[0].mask - runs[2].mask).abs().max() > 1e-3


def test_searches_side_by_side_find_what_each_finds_alone() -> None:
    short = replace(SETTINGS, steps=20)
    together = found(search(0), search(1), search(2), settings=short)
    alone = [found(search(target), settings=short)[0] for target in range(N_CLASSES)]
    for one, two in zip(together, alone, strict=True):
        torch.testing.assert_close(one.mask, two.mask, rtol=1e-4, atol=1e-5)


def test_embedding_blends_and_rounds_to_eight_bits() -> None:
    mask = np.array([[0.0, 0.5], [0.25, 1.0]], np.float32)
    pattern = np.array([[[0.9, 0.1], [1.0, 0.5]]], np.float32)
    estimate = PatchEstimate(0, mask, pattern, 1.75, 1.0)
    images = np.array([[[[7.0, 101.0], [10.0, 3.0]]]], np.float32)
    before = images.copy()
    got = estimate.embed(images)
    # 7; .5 * 101 + .5 * 25.5 = 63.25; .75 * 10 + .25 * 255 = 71.25; 127.5, to even.
    np.testing.assert_array_equal(got, [[[[7.0, 63.0], [71.0, 128.0]]]])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "^steps, batch, patience, stop: expected at least 1, got"),
        ({"batch": 0}, "^steps, batch, patience, stop: expected at least 1, got"),
        ({"stop": 0}, "^steps, batch, patience, stop: expected at least 1, got"),
        ({"patience": 0}, "^steps, batch, patience, stop: expected at least 1, got"),
        ({"success": 0.0}, r"^success in \(0, 1\] and rate > 0 expected, got"),
        ({"success": 1.1}, r"^success in \(0, 1\] and rate > 0 expected, got"),
        ({"success": float("nan")}, r"^success in \(0, 1\] and rate > 0 expected, got"),
        ({"rate": 0.0}, r"^success in \(0, 1\] and rate > 0 expected, got"),
        ({"rate": float("nan")}, r"^success in \(0, 1\] and rate > 0 expected, got"),
    ],
)
def test_settings_out_of_range(changes: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Settings(**changes)  # type: ignore[arg-type]
