"""The choice of a density: by held-out figures, in the stated order, without a glance at the held-out part."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.model_selection import StratifiedKFold

from inflight_edge.calibration import selection
from inflight_edge.calibration.density import GuardEstimator
from inflight_edge.calibration.selection import Candidate, Trial, candidates, fit, preference, select
from inflight_edge.errors import DataError
from inflight_edge.guard import Guard

DIAGONAL = Candidate("diagonal", 1, 0.01)
SHARED = Candidate("shared", 1, 0.01)
FULL = Candidate("full", 1, 0.01, 0.0)
THREE = [DIAGONAL, SHARED, FULL]


def blobs(n_per_class: int = 40, distance: float = 2.0, n_features: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that overlap a little."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, n_features)) * distance
    features = np.concatenate([centre + rng.normal(size=(n_per_class, n_features)) for centre in centres])
    return features.astype(np.float32), np.repeat([0, 1, 2], n_per_class)


def drawn(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that only the given form of covariance tells apart well from few samples."""
    rng = np.random.default_rng(1)
    if kind == "diagonal":  # same mean, other variances; 30 features, 35 samples
        spread = np.where(np.arange(30) % 2 == 0, 0.7, 1.3)
        parts = [rng.normal(size=(35, 30)) * spread, rng.normal(size=(35, 30)) * spread[::-1]]
    elif kind == "shared":  # strongly correlated features, means 4.2 deviations apart; 12 features, 35 samples
        root = rng.normal(size=(12, 12))
        shift = root @ np.r_[3.0, 3.0, np.zeros(10)]
        parts = [rng.normal(size=(35, 12)) @ root.T + c * shift for c in (0, 1)]
    else:  # same mean and variances, opposite correlation
        parts = [rng.normal(size=(60, 2)) @ np.array([[1.0, s * 0.97], [0.0, 0.25]]) for s in (1, -1)]
    return np.concatenate(parts).astype(np.float32), np.repeat([0, 1], len(parts[0]))


@pytest.mark.parametrize("kind", ["diagonal", "shared", "full"])
def test_the_covariance_that_made_the_data_is_chosen(kind: str) -> None:
    features, labels = drawn(kind)
    choice = select(features, labels, 0, options=THREE, progress=False)
    assert choice.best.candidate.kind == kind
    assert choice.best.verdict_error < choice.trials[1].verdict_error
    assert {trial.candidate for trial in choice.trials} == set(THREE)


def held_out(features: np.ndarray, labels: np.ndarray, candidate: Candidate, **options: Any) -> np.ndarray:
    """Log-likelihoods by an independent cross-fit with scikit-learn's splitter and the estimator."""
    scores = np.full((len(labels), len(np.unique(labels))), np.nan)
    for train, test in StratifiedKFold(shuffle=True, **options).split(features, labels):
        estimator = GuardEstimator(
            1,
            kind=candidate.kind,
            n_components=candidate.n_components,
            regularisation=candidate.regularisation,
            shrinkage=candidate.shrinkage,
        ).fit(features[train], labels[train])
        scores[test] = estimator.score_samples(features[test])
    return scores


@pytest.mark.parametrize("candidate", [*THREE, Candidate("diagonal", 2, 0.1), Candidate("full", 1, 0.1, 0.5)], ids=str)
def test_figures_are_those_of_held_out_features(candidate: Candidate) -> None:
    features, labels = blobs(distance=0.8)
    choice = select(features, labels, 1, options=[candidate], seed=3, progress=False)
    scores = held_out(features, labels, candidate, n_splits=5, random_state=3)
    clean = labels == 1
    margins = np.maximum(scores[:, 0], scores[:, 2]) - scores[:, 1]
    source = np.where(scores[:, 0] >= scores[:, 2], 0, 2)
    trial = choice.best
    assert trial.false_alarms == pytest.approx((margins[clean] >= 0).mean())
    assert trial.missed == pytest.approx((margins[~clean] < 0).mean())
    assert trial.verdict_error >= (trial.false_alarms + trial.missed) / 2
    right = (margins >= 0) & (source == labels)
    assert trial.source_error == pytest.approx(1 - right[~clean].mean())
    assert 0 < trial.verdict_error < 0.5  # the data overlap: the comparison above is not of zeros
    assert choice.clean_margins.dtype == np.float32
    np.testing.assert_allclose(choice.clean_margins, np.sort(margins[clean]), rtol=1e-4, atol=1e-4)


def test_held_out_features_touch_nothing_that_judges_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change one sample: in the fold that holds it out, standardiser and densities must stay as they were."""
    features, labels = blobs()
    changed = features.copy()
    changed[7] = 1e4
    judged: list[tuple[Guard, bool]] = []
    original = selection.log_likelihoods

    def watch(guard: Guard, held: np.ndarray) -> np.ndarray:
        judged.append((guard, bool((held == data[7]).all(axis=1).any())))
        return original(guard, held)

    monkeypatch.setattr(selection, "log_likelihoods", watch)
    runs = []
    for data in (features, changed):
        judged = []
        select(data, labels, 0, options=THREE, progress=False)
        runs.append(judged)
    assert len(runs[0]) == len(runs[1]) == 5 * len(THREE)
    assert sum(holds for _, holds in runs[0]) == len(THREE)
    for (before, holds), (after, also) in zip(*runs, strict=True):
        assert holds == also
        for name in ("mean", "scale", "means", "whitener"):
            assert np.array_equal(getattr(before, name), getattr(after, name)) == holds, name


def test_folds_depend_on_the_seed_alone() -> None:
    features, labels = blobs(distance=0.8)
    one, two, other = (select(features, labels, 0, options=THREE, seed=s, progress=False) for s in (0, 0, 1))
    assert one.trials == two.trials
    np.testing.assert_array_equal(one.clean_margins, two.clean_margins)
    assert one.trials != other.trials


# In the order that they must end up in for 120 images: verdict errors up to 1 / 120 are alike, then the source decides.
RANKED = [
    Trial(DIAGONAL, 0.0, 0.0018, 0.0009, 0.30),
    Trial(SHARED, 0.0, 0.0, 0.0001, 0.40),
    Trial(FULL, 0.0, 0.0, 0.0002, 0.40),
    Trial(Candidate("diagonal", 2, 0.1), 0.02, 0.02, 0.02, 0.0),
    Trial(Candidate("diagonal", 3, 0.1), 0.02, 0.04, 0.03, 0.0),
]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]])
def test_order_of_preference_and_its_reason(monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    figures = {trial.candidate: trial for trial in RANKED}
    monkeypatch.setattr(selection, "_trial", lambda candidate, *_: figures[candidate])
    features, labels = blobs()
    choice = select(features, labels, 0, options=[RANKED[i].candidate for i in order], progress=False)
    assert choice.trials == tuple(RANKED)
    assert choice.best is choice.trials[0]
    assert choice.reason == (
        "diagonal, 1 component, regularisation 0.01: held-out verdict error 0.0009 (false alarms 0.0000, missed 0.0018), "
        "source error 0.3000, the lowest of the 3 of 5 densities as good"
    )


def test_the_fewer_the_images_the_sooner_the_source_decides() -> None:
    def better(n_images: int) -> bool:
        return preference(0.008, 0.1, n_images) < preference(0.004, 0.3, n_images)

    assert preference(0.004, 0.3, 100) == (0.01, 0.3)
    assert [better(n_images) for n_images in (100, 125, 126, 1000)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        (RANKED[3:], r"diagonal, 2 components, .*: held-out verdict error 0\.0200 .*, the lowest of 2 densities$"),
        (RANKED[1:4], r".*, source error 0\.4000, the lowest of the 2 of 3 densities as good$"),
        (RANKED[4:], "diagonal, 3 components, regularisation 0.1: .*, the lowest of 1 densities$"),
    ],
)
def test_reason_says_what_decided(monkeypatch: pytest.MonkeyPatch, trials: list[Trial], reason: str) -> None:
    figures = {trial.candidate: trial for trial in trials}
    monkeypatch.setattr(selection, "_trial", lambda candidate, *_: figures[candidate])
    features, labels = blobs()
    choice = select(features, labels, 0, options=list(figures), progress=False)
    assert re.match(reason, choice.reason)
    plain = json.loads(json.dumps(choice.as_dict()))
    assert plain["reason"] == choice.reason
    assert plain["chosen"] == plain["trials"][0]
    assert plain["chosen"]["candidate"]["kind"] == trials[0].candidate.kind
    assert len(plain["trials"]) == len(trials)


def test_margins_close_to_zero_count_as_errors() -> None:
    """All margins are right, and lie about a deviation from 0: the error is that of the normal distribution."""
    features, labels = blobs(n_per_class=6, distance=1.5, n_features=2)
    choice = select(features, labels, 0, options=[SHARED], progress=False)
    trial, margin, clean = choice.best, choice.margins.astype(float), labels == 0
    counted = (trial.false_alarms + trial.missed) / 2
    normal = (
        norm.cdf(margin[clean].mean() / margin[clean].std()) + norm.cdf(-margin[~clean].mean() / margin[~clean].std())
    ) / 2
    assert normal > counted
    assert trial.verdict_error == pytest.approx(normal, rel=1e-4)


def test_margins_without_deviation_are_counted() -> None:
    features = np.repeat(np.array([[0.0], [1.0]], np.float32), 6, axis=0)
    assert select(features, np.repeat([0, 1], 6), 0, options=[SHARED], progress=False).best.verdict_error == 0.0
    alike = select(np.zeros((12, 1), np.float32), np.repeat([0, 1], 6), 0, options=[SHARED], progress=False)
    assert (alike.best.false_alarms, alike.best.missed, alike.best.verdict_error) == (1.0, 0.0, 0.5)


def test_views_of_an_image_are_held_out_together() -> None:
    features, labels = blobs(distance=0.8)
    images = np.arange(len(labels))
    once = select(features, labels, 0, options=THREE, progress=False)
    assert once.trials == select(features, labels, 0, images=images, options=THREE, progress=False).trials
    # Copies change no mean and no covariance, so each must be judged as the one sample was; leaked ones would not be.
    order = np.random.default_rng(0).permutation(np.repeat(images, 3))
    copies = select(features[order], labels[order], 0, images=order, options=THREE, progress=False)
    for before, after in zip(once.trials, copies.trials, strict=True):
        assert before.candidate == after.candidate
        assert after.source_error == pytest.approx(before.source_error)
        assert after.verdict_error == pytest.approx(before.verdict_error, rel=1e-5)
    np.testing.assert_allclose(copies.clean_margins, once.clean_margins, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(copies.margins, once.margins[order], rtol=1e-4, atol=1e-4)
    few = np.repeat(np.flatnonzero((labels != 2) | (images % 40 < 2)), 4)
    with pytest.raises(DataError, match=r"^expected at least 3 images of each class to choose a density, got 2"):
        select(features[few], labels[few], 0, images=few, options=THREE, progress=False)


def test_the_guard_is_fitted_to_everything_and_keeps_the_margins() -> None:
    features, labels = blobs(distance=0.8)
    choice = select(features, labels, 2, options=[Candidate("full", 1, 0.1, 0.5)], progress=False)
    guard = fit(features, labels, 2, choice)
    alone = GuardEstimator(2, kind="full", regularisation=0.1, shrinkage=0.5).fit(features, labels).guard_
    for name in ("mean", "scale", "means", "whitener", "log_weights", "offsets", "classes"):
        np.testing.assert_array_equal(getattr(guard, name), getattr(alone, name))
    np.testing.assert_array_equal(guard.clean_margins, choice.clean_margins)
    assert (guard.target, guard.kind, len(guard.clean_margins)) == (2, "full", 40)
    assert (np.diff(guard.clean_margins) >= 0).all()


@pytest.mark.parametrize(
    ("n_features", "n_classes", "kinds"),
    [
        (84, 10, {"diagonal", "shared", "full"}),
        (1024, 10, {"diagonal", "shared", "full"}),
        (1025, 10, {"diagonal", "shared"}),
        (512, 1000, {"diagonal", "shared"}),
        (4096, 2, {"diagonal", "shared"}),
        (4097, 2, {"diagonal"}),
    ],
)
def test_only_affordable_forms_are_tried(n_features: int, n_classes: int, kinds: set[str]) -> None:
    offered = candidates(n_features, n_classes)
    assert {candidate.kind for candidate in offered} == kinds
    assert len(set(offered)) == len(offered)


def test_default_candidates_are_tried_with_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    features, labels = blobs(n_per_class=12)
    choice = select(features, labels, 0)
    assert {trial.candidate for trial in choice.trials} == set(candidates(4, 3))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "densities: 100%" in captured.err
    select(features, labels, 0, options=[DIAGONAL], progress=False)
    assert capsys.readouterr().err == ""


def test_features_that_are_not_finite() -> None:
    features, labels = blobs(n_per_class=3, distance=4.0)
    features[4, 1] = np.inf
    with pytest.raises(DataError, match="features are not finite; check --scale"):
        select(features, labels, 1, options=THREE, progress=False)


def test_small_classes_lower_the_number_of_folds() -> None:
    features, labels = blobs(n_per_class=3, distance=4.0)
    choice = select(features, labels, 1, options=THREE, progress=False)
    assert len(choice.clean_margins) == 3
    scores = held_out(features, labels, choice.best.candidate, n_splits=3, random_state=0)
    np.testing.assert_allclose(choice.margins, scores[:, [0, 2]].max(1) - scores[:, 1], rtol=1e-4)
    with pytest.raises(
        DataError, match=r"^expected at least 3 images of each class to choose a density, got 2; add clean"
    ):
        select(features[:8], labels[:8], 0, options=THREE, progress=False)
