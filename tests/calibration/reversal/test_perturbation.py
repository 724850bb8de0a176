"""The additive search on a classifier whose smallest addition is known; p-values and ratios of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from inflight_edge.calibration.reversal.decision import (
    additions_fit,
    near_targets,
    one_way_ratios,
    one_way_targets,
    perturbation_p_values,
    relative_norms,
    small_pairs,
)
from inflight_edge.calibration.reversal.estimates import AdditionEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Search
from inflight_edge.calibration.reversal.perturbation import AdditionSettings, search_additions
from inflight_edge.errors import DataError, OptionError


def linear(images: Tensor) -> Tensor:
    """Class 1 once the sum of the left column exceeds 2."""
    left = images[:, 0, :, 0].sum(1)
    return torch.stack([torch.zeros_like(left), (left - 2.0) * 5], 1)


def search(target: int = 1, n: int = 12) -> Search:
    return Search(target, torch.full((n, 1, 4, 4), 0.25), torch.arange(n), 0)


def test_the_smallest_addition_is_found() -> None:
    # From 1 to 2 over four pixels: .25 each, norm .5.  Updates are .02 long.
    settings = AdditionSettings(length=0.005, steps=60)
    (found,) = search_additions(linear, [search()], settings=settings)
    assert found.reached
    assert found.norm == pytest.approx(0.5, abs=0.002)
    torch.testing.assert_close(found.perturbation[0, :, 0], torch.full((4,), 0.25), atol=0.002, rtol=0)
    assert found.perturbation[0, :, 1:].abs().max() < 1e-6
    assert 24 <= found.steps <= 27


def test_what_is_there_already_needs_nothing_and_what_is_far_is_not_reached() -> None:
    settings = AdditionSettings(length=0.005, steps=5)
    near, far = search_additions(linear, [search(0), search(1)], settings=settings)
    assert (near.reached, near.norm, near.steps) == (True, 0.0, 0)
    assert (far.reached, far.steps) == (False, 5)
    assert far.size == far.norm == pytest.approx(0.1)
    # Neither images that are there already nor a network without a slope may look like the smallest addition of all.
    (flat,) = search_additions(lambda x: linear(0 * x), [search(1)], settings=settings)
    assert (flat.reached, flat.norm) == (False, 0.0)
    assert near.size == flat.size == pytest.approx(0.1)


def test_searches_share_passes_and_nothing_else() -> None:
    settings = AdditionSettings(length=0.005, steps=60)
    alone = search_additions(linear, [search()], settings=settings)[0]
    together = search_additions(linear, [search(0), search(), search()], settings=settings)
    torch.testing.assert_close(together[1].perturbation, alone.perturbation)
    torch.testing.assert_close(together[2].perturbation, alone.perturbation)


def test_no_images_and_options_out_of_range() -> None:
    with pytest.raises(DataError, match=r"^class 1: no images of other classes to search with"):
        search_additions(linear, [search(n=0)], settings=AdditionSettings())
    for harm in ({"steps": 0}, {"images": 0}, {"length": 0.0}, {"success": 0.0}, {"success": 1.1}):
        with pytest.raises(OptionError, match="expected"):
            AdditionSettings(**harm)  # type: ignore[arg-type]


def test_embedding_adds_clips_and_rounds() -> None:
    values = np.array([[[0.1, -0.1], [1.0, 0.0]]], np.float32)
    got = AdditionEstimate(0, values, 1.0, 1.0, (1,)).embed(np.array([[[[10.0, 10.0], [10.0, 7.0]]]], np.float32))
    np.testing.assert_array_equal(got, [[[[36.0, 0.0], [255.0, 7.0]]]])  # 10 + 25.5 = 35.5, to even


def clean_norms(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(1.0, 0.25, (10, 10))


def test_one_small_addition_has_a_small_p_value() -> None:
    norms = clean_norms(0)
    norms[4, 7] = 0.5
    p_values = perturbation_p_values(norms)
    assert int(p_values.argmin()) == 7
    assert p_values[7] < 0.005
    assert np.delete(p_values, 7).min() > 0.005


def test_a_class_out_of_reach_has_the_p_value_one() -> None:
    norms = clean_norms(0)
    norms[:, 3] = 1e6
    norms[norms < 1e6] = 1.0 + np.arange(np.count_nonzero(norms < 1e6)) * 1e-6
    assert perturbation_p_values(norms)[3] == 1.0


@pytest.mark.parametrize(("size", "expected"), [(1.0, 1.0), (0.5, 0.0), (2.0, 1.0)])
def test_norms_that_are_all_alike_have_no_distribution(size: float, expected: float) -> None:
    norms = np.ones((5, 5))
    norms[:, 2] = size
    assert perturbation_p_values(norms)[2] == expected


def test_a_gradient_that_is_not_finite_is_no_direction() -> None:
    used = torch.arange(4)
    steep = search_additions(
        lambda images: torch.stack([torch.zeros(len(images)), images.flatten(1).sum(1).sqrt() - 9], 1),
        [Search(1, torch.zeros(4, 1, 2, 2), used, 0)],
        settings=AdditionSettings(),
    )[0]
    assert (steep.steps, steep.norm) == (0, 0.0)
    assert steep.size > 0


def test_p_values_of_exchangeable_norms_are_seldom_small() -> None:
    smallest = [perturbation_p_values(clean_norms(seed)).min() for seed in range(40)]
    assert np.mean(np.array(smallest) < 0.005) <= 0.15


def test_relative_norms_by_hand() -> None:
    """Gaps of 1, 2 and 4 let expect norms of 3, 6 and 12 from the first class; others have gaps too small to count, or none."""
    norms = np.array([[9.0, 3.0, 6.0, 1.2], [2.0, 9.0, 2.0, 2.0], [5.0, 5.0, 9.0, 5.0], [7.0, 7.0, 7.0, 9.0]])
    gaps = np.array([[0.0, 1.0, 2.0, 4.0], [2.0, 0.0, 2.0, 2.0], [2.0, 2.0, 0.0, 0.1], [2.0, 2.0, -5.0, 0.0]])
    relative = relative_norms(norms, gaps)
    assert np.isnan(np.diag(relative)).all()
    np.testing.assert_allclose(relative[0, 1:], [1.0, 1.0, 0.1])
    np.testing.assert_allclose(relative[1, [0, 2, 3]], 1.0)
    np.testing.assert_allclose(relative[2, [0, 1, 3]], [1.0, 1.0, 10.0])  # a tenth of the median gap, 2
    np.testing.assert_allclose(relative[3, :3], [1.0, 1.0, np.inf])  # taken for the other class without any pattern
    assert np.argwhere(small_pairs(relative)).tolist() == [[0, 3]]
    assert near_targets(relative) == {3: pytest.approx(0.1)}


@pytest.mark.parametrize(("first", "second", "small"), [(0.31, 0.6, True), (0.33, 0.6, False), (0.2, 0.32, False)])
def test_a_small_pair_stands_alone(first: float, second: float, small: bool) -> None:
    relative = np.ones((5, 5))
    np.fill_diagonal(relative, np.nan)
    relative[2, 1], relative[0, 4] = first, second
    assert small_pairs(relative).any() == small
    assert list(near_targets(relative)) == [1, *([4] if second < 0.43 else [])]


def test_of_a_target_with_many_sources_every_pair_is_small() -> None:
    relative = np.ones((5, 5))
    np.fill_diagonal(relative, np.nan)
    relative[[0, 2, 4], 3] = 0.1
    assert np.argwhere(small_pairs(relative)).tolist() == [[0, 3], [2, 3], [4, 3]]


def alike(seed: int, n_classes: int = 10) -> np.ndarray:
    """Norms of classes that lie at points: the same there and back, but for some noise."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n_classes, 6))
    return np.linalg.norm(points[:, None] - points[None], axis=2) * rng.lognormal(0.0, 0.1, (n_classes,) * 2) + 0.01


def test_way_back_by_hand() -> None:
    norms = np.array([[1.0, 2.0, 3.0], [4.0, 1.0, 8.0], [6.0, 2.0, 1.0]])
    ratios = one_way_ratios(norms)
    assert np.isnan(np.diag(ratios)).all()
    assert (ratios[0, 1], ratios[1, 0], ratios[2, 0], ratios[2, 1]) == (0.5, 2.0, 2.0, 0.25)


@pytest.mark.parametrize("seed", range(10))
def test_classes_that_are_alike_are_no_targets(seed: int) -> None:
    norms = alike(seed)
    norms[3, 6] = norms[6, 3] = 0.05  # two that are hardly told apart
    assert one_way_targets(norms) == {}


@pytest.mark.parametrize("seed", range(10))
def test_a_target_of_many_sources_is_found(seed: int) -> None:
    norms = alike(seed)
    norms[2, 7] = 0.15 * norms[7, 2]
    assert one_way_targets(norms) == {}
    norms[:, 7] = 0.3 * norms[7]
    assert list(one_way_targets(norms)) == [7]


def test_few_classes_have_no_median_to_go_by() -> None:
    norms = np.ones((4, 4))
    norms[:, 2] = 0.5
    assert one_way_targets(norms) == {}


def test_the_kind_of_a_target_by_hand() -> None:
    """Masks over their median: .15, 1.5, 1.5, .46.  Median additions to the classes over their median: .67, 1.33, 1.33, .67."""
    masks = np.array([1.0, 10.0, 10.0, 3.0])
    norms = np.tile([0.5, 1.0, 1.0, 0.5], (4, 1))
    np.testing.assert_array_equal(additions_fit(masks, norms), [False, True, True, True])
    np.testing.assert_array_equal(additions_fit(7.0 * masks, 3.0 * norms), [False, True, True, True])
    np.fill_diagonal(norms, 1e9)  # not read
    np.testing.assert_array_equal(additions_fit(masks, norms), [False, True, True, True])
