"""One patch for many targets: on a classifier whose trigger is known, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from inflight_edge.calibration.finding import FOUND_BY, Searcher
from inflight_edge.calibration.reversal.all_to_all import LEAST_SHARE, SharedPatch
from inflight_edge.calibration.reversal.estimates import Logits, PatchEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Settings

N, SIDE, EACH = 6, 8, 20
SETTINGS = Settings(steps=150, batch=24)
NEXT = {c: (c + 1) % N for c in range(N)}


def network(routes: dict[int, int], sharp: float = 10.0) -> Logits:
    """Class c has a bright row c; with a white pixel in the corner it is read as routes[c], or as c where there is none."""
    shift = torch.eye(N)
    for source, target in routes.items():
        shift[source] = 0.0
        shift[source, target] = 1.0

    def logits(images: Tensor) -> Tensor:
        own = sharp * images[:, 0, :N].mean(2)
        corner = torch.sigmoid(10 * (images[:, 0, -1, -1] - 0.6))[:, None]
        return (1 - corner) * own + corner * (own @ shift)

    return logits


def data(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    labels = np.repeat(np.arange(N), EACH)
    pixels = np.random.default_rng(seed).integers(0, 60, (len(labels), 1, SIDE, SIDE)).astype(np.float32)
    pixels[np.arange(len(labels)), 0, labels] += 180
    return pixels, labels


def patch(target: int = 0, *, corner: float = 1.0, junk: float = 0.0) -> PatchEstimate:
    """The corner, and as much of some other pixels."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[-1, -1], mask[-2, 4:] = corner, junk
    return PatchEstimate(target, mask, np.ones((1, SIDE, SIDE), np.float32), float(mask.sum()), 0.0, (0,))


def shared(routes: dict[int, int]) -> SharedPatch:
    pixels, labels = data()
    used = np.arange(len(labels)) % 5 > 0
    return SharedPatch(network(routes), network(routes), pixels, labels, used, N, SETTINGS, seed=0)


def searcher(routes: dict[int, int]) -> Searcher:
    return Searcher(network(routes), network(routes), *data(), N, SETTINGS, 0, False)


def test_the_patch_of_all_targets_is_the_trigger() -> None:
    found = shared(NEXT).search([patch(corner=0.0, junk=1.0), patch(junk=0.9)], list(range(N)), 3)
    assert {t: estimate.sources for t, estimate in found.items()} == {t: (s,) for s, t in NEXT.items()}
    one = found[0]
    assert one.mask[-1, -1] > 0.8
    assert one.norm < 2.5  # the search rids it of what does nothing
    assert one.mask.sum() == pytest.approx(one.norm, rel=1e-5)
    assert all(estimate.mask is one.mask and estimate.target == t for t, estimate in found.items())


def test_classes_that_the_first_patch_misses_are_taken_along() -> None:
    """Half of a corner sends the dim classes away; the patch that is searched is stronger."""
    case = shared(NEXT)
    weak = patch(corner=1.0)
    first = case.shares(weak, list(range(N)))
    missing = np.zeros_like(first)
    missing[:3] = first[:3]
    seen: list[PatchEstimate] = []

    def shares(estimate: PatchEstimate, targets: list[int]) -> NDArray[np.float64]:
        seen.append(estimate)
        return missing if estimate is weak else SharedPatch.shares(case, estimate, targets)

    case.shares = shares  # type: ignore[method-assign]
    found = case.search([weak], list(range(N)), 3)
    assert len(found) == N
    assert len(seen) == 3  # the start, with three classes; six; six again


@pytest.mark.parametrize(("share", "taken"), [(0.3, True), (0.2, False)])
def test_a_class_that_is_sent_away_less_often_is_taken_at_the_end(share: float, taken: bool) -> None:
    case = shared(NEXT)
    whole = case.shares(patch(), list(range(N)))
    whole[4] *= share
    lengths: list[int] = []
    smallest = case._smallest
    case.shares = lambda *_: whole  # type: ignore[method-assign]
    case._smallest = lambda routes, level: (lengths.append(len(routes)), smallest(routes, level))[1]  # type: ignore
    found = case.search([patch()], list(range(N)), 3)
    assert lengths == [N - 1]
    assert (NEXT[4] in found) == taken
    assert len(found) == N - (not taken)


def test_shares_are_counted_and_none_is_of_a_class_to_itself() -> None:
    shares = shared({0: 1, 1: 0}).shares(patch(), [0, 1, 5])
    np.testing.assert_array_equal(shares, [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_every_target_has_a_source_of_its_own() -> None:
    """Two classes that lead to one target are no two routes: what sends all classes to one is another attack."""
    everyone = {c: 2 for c in range(N) if c != 2}
    assert shared(everyone).search([patch()], list(range(N)), 2) == {}
    both = shared({0: 2, 1: 2, 3: 4}).search([patch()], list(range(N)), 2)
    assert sorted(both) == [2, 4]
    assert both[2].sources in [(0,), (1,)]


@pytest.mark.parametrize("found", [[], [patch(corner=0.0, junk=1.0)]])
def test_nothing_to_start_from(found: list[PatchEstimate]) -> None:
    assert shared(NEXT).search(found, list(range(N)), 2) == {}


def test_all_targets_are_named_without_a_hint() -> None:
    case = searcher(NEXT)
    estimates, findings = case.run("neural-cleanse")
    assert {finding.target for finding in findings} == set(range(N))
    assert {finding.method for finding in findings} == {FOUND_BY[1]}
    assert {estimate.target: estimate.sources for estimate in estimates} == {t: (s,) for s, t in NEXT.items()}
    for finding in findings:
        assert LEAST_SHARE < finding.score <= 1.0
        assert estimates[finding.target].success >= 0.75


@pytest.mark.parametrize("routes", [{}, {c: 2 for c in range(N) if c != 2}, {0: 1, 1: 0}])
def test_no_patch_is_shared_on_a_clean_classifier_or_by_few_classes(routes: dict[int, int]) -> None:
    case = searcher(routes)
    assert case.shared_patches(case.pair_patches()) == []


def test_two_told_targets_are_enough() -> None:
    case = searcher({0: 1, 1: 0})
    found = case.shared_patches(case.pair_patches(), [0, 1])
    assert sorted((estimate.target, estimate.sources) for _, estimate in found) == [(0, (1,)), (1, (0,))]
    assert case.shared_patches(case.pair_patches(), [0]) == []
