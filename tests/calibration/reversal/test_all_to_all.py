"""One patch for many targets: on a classifier whose trigger is known, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from inflight_edge.calibration.finding import FOUND_BY, Searcher
from inflight_edge.calibration.reversal.all_to_all import LEAST_SHARE, SharedPatch, _routes
from inflight_edge.calibration.reversal.estimates import Logits, PatchEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Settings

N, SIDE, EACH = 5, 8, 20
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


def scaled(pixels: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(pixels / np.float32(255))


def shared(routes: dict[int, int]) -> SharedPatch:
    pixels, labels = data()
    used = np.arange(len(labels)) % 5 > 0
    return SharedPatch(network(routes), network(routes), pixels, scaled(pixels), labels, used, N, SETTINGS, seed=0)


def searcher(routes: dict[int, int]) -> Searcher:
    return Searcher(network(routes), network(routes), *data(), N, SETTINGS, 0, False)


def test_the_patch_of_all_targets_is_the_trigger() -> None:
    found = shared(NEXT).search([patch(corner=0.0, junk=1.0), patch(junk=0.9)], 3)
    assert {estimate.target: estimate.sources for estimate in found} == {t: (s,) for s, t in NEXT.items()}
    one = found[0]
    assert one.mask[-1, -1] > 0.8
    assert one.norm < 2.5  # the search rids it of what does nothing
    assert one.mask.sum() == pytest.approx(one.norm, rel=1e-5)
    assert all(estimate.mask is one.mask for estimate in found)


def test_classes_that_the_first_patch_misses_are_taken_along() -> None:
    case, weak = shared(NEXT), patch()
    missing = case.shares(weak)
    missing[3:] = 0.0
    seen: list[PatchEstimate] = []

    def shares(estimate: PatchEstimate) -> NDArray[np.float64]:
        seen.append(estimate)
        return missing if estimate is weak else SharedPatch.shares(case, estimate)

    case.shares = shares  # type: ignore[method-assign]
    assert len(case.search([weak], 3)) == N
    assert len(seen) == 3  # the start, with three classes; all; all again


@pytest.mark.parametrize(("share", "taken"), [(0.3, True), (0.2, False)])
def test_a_class_that_is_sent_away_less_often_is_taken_at_the_end(share: float, taken: bool) -> None:
    case = shared(NEXT)
    whole = case.shares(patch())
    whole[4] *= share
    lengths: list[int] = []
    smallest = case._smallest
    case.shares = lambda *_: whole  # type: ignore[method-assign]
    case._smallest = lambda routes, level: (lengths.append(len(routes)), smallest(routes, level))[1]  # type: ignore
    found = case.search([patch()], 3)
    assert lengths == [N - 1]
    assert (NEXT[4] in [estimate.target for estimate in found]) == taken
    assert len(found) == N - (not taken)


def test_shares_are_counted_and_none_is_of_a_class_to_itself() -> None:
    expected = np.zeros((N, N))
    expected[0, 1] = expected[1, 0] = 1.0
    np.testing.assert_array_equal(shared({0: 1, 1: 0}).shares(patch()), expected)


def test_images_that_are_misread_without_the_patch_do_not_count() -> None:
    """Labels in another order than the network's look like a trigger with many targets, with any patch and none."""
    pixels, labels = data()
    swapped = np.select([labels == 0, labels == 1, labels == 2], [1, 2, 0], labels)
    used = np.ones(len(labels), bool)
    case = SharedPatch(network({}), network({}), pixels, scaled(pixels), swapped, used, N, SETTINGS, seed=0)
    assert case.shares(patch()).sum() == 0.0
    assert case.search([patch()], 3) == []
    moved_on = (labels + 1) % N
    nothing = SharedPatch(network({}), network({}), pixels, scaled(pixels), moved_on, used, N, SETTINGS, seed=0)
    assert nothing.search([patch()], 3) == []


def test_held_out_images_do_not_choose_the_patch() -> None:
    """They confirm it afterwards."""
    search = shared({0: 1})
    pixels, labels = data()
    used = np.arange(len(labels)) % 5 > 0
    tried = {image.tobytes() for image in search.tried}
    assert tried
    assert tried.isdisjoint(image.tobytes() for image in pixels[~used])


def test_every_target_has_a_source_of_its_own() -> None:
    """Two classes that lead to one target are no two routes: what sends all classes to one is another attack."""
    assert shared({c: 2 for c in range(N) if c != 2}).search([patch()], 2) == []
    both = shared({0: 2, 1: 2, 3: 4}).search([patch()], 2)
    assert sorted(estimate.target for estimate in both) == [2, 4]
    assert both[0].sources in [(0,), (1,)]


def test_the_most_classes_have_targets_then_the_most_images() -> None:
    shares = np.zeros((4, 4))
    shares[0, 1], shares[0, 2], shares[3, 1] = 1.0, 0.6, 0.6
    assert _routes(shares) == {0: 2, 3: 1}
    shares[3, 1] = 0.4  # too few to count
    assert _routes(shares) == {0: 1}
    assert _routes(shares, 0.3) == {0: 2, 3: 1}
    assert _routes(np.zeros((3, 3))) == {}


@pytest.mark.parametrize("found", [[], [patch(corner=0.0, junk=1.0)]])
def test_nothing_to_start_from(found: list[PatchEstimate]) -> None:
    assert shared(NEXT).search(found, 2) == []


def test_all_targets_are_named_without_a_hint() -> None:
    case = searcher(NEXT)
    estimates, findings, indices = case.run("neural-cleanse")
    assert np.isfinite(indices).all()
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


def test_what_held_out_images_do_not_confirm_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = searcher(NEXT)
    quick = [patch(t) for t in range(N)]
    monkeypatch.setattr(case, "success", lambda estimate, sources: 0.9 if sources[0] < 3 else 0.75)
    assert len(case.shared_patches(quick)) == N
    monkeypatch.setattr(case, "success", lambda estimate, sources: 0.9 if sources[0] < 2 else 0.75)
    assert case.shared_patches(quick) == []


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float32, 1e37), (torch.float32, 1e-30)])
def test_gaps_of_logits_of_any_type_and_scale(dtype: torch.dtype, scale: float) -> None:
    def logits(images: Tensor) -> Tensor:
        return (network({})(images) * scale).to(dtype)

    case = Searcher(logits, logits, *data(), N, SETTINGS, 0, False)
    plain = searcher({})
    np.testing.assert_allclose(case.gaps, plain.gaps * scale, rtol=0.02)
    norms = np.random.default_rng(0).uniform(1, 2, (N, N))
    np.testing.assert_allclose(case.relative(norms), plain.relative(norms), rtol=0.05)
