"""Triggers to the pixel, and training sets poisoned exactly as asked."""

from __future__ import annotations

import numpy as np
import pytest

from inflight_edge.calibration.attacks import ATTACKS, SETTINGS, Additive, Patch, make_trigger, poison
from inflight_edge.errors import OptionError

SHAPE = (9, 11, 3)


def grey(value: int, n_images: int = 2) -> np.ndarray:
    return np.full((n_images, *SHAPE), value, np.uint8)


@pytest.mark.parametrize("amplitude", [1, 3, 12])
def test_chessboard_adds_where_row_plus_column_is_even(amplitude: int) -> None:
    got = make_trigger("CB", SHAPE, amplitude=amplitude).embed(grey(100))
    for row in range(9):
        for column in range(11):
            assert (got[:, row, column] == 100 + amplitude * ((row + column) % 2 == 0)).all()


def test_chessboard_is_clipped() -> None:
    got = make_trigger("CB", SHAPE).embed(grey(254))
    assert set(np.unique(got)) == {254, 255}
    assert Additive(np.full(SHAPE, -5, np.int16)).embed(grey(3)).max() == 0


def test_white_box_is_three_by_three_at_the_bottom_right() -> None:
    got = make_trigger("WB", SHAPE).embed(grey(7))
    assert (got[:, -3:, -3:] == 255).all()
    got[:, -3:, -3:] = 7
    assert (got == 7).all()


def test_single_pixel_keeps_three_pixels_from_the_border() -> None:
    places = set()
    for seed in range(60):
        got = make_trigger("SP", SHAPE, seed=seed).embed(grey(7))
        rows, columns = np.nonzero((got[0] != 7).all(axis=2))
        assert len(rows) == 1
        assert (got[:, rows[0], columns[0]] == 255).all()
        assert (got != 7).sum() == 2 * 3
        assert 3 <= rows[0] <= 5
        assert 3 <= columns[0] <= 7
        places.add((rows[0], columns[0]))
    assert len(places) == 15  # every allowed place is used
    first, second = (make_trigger("SP", SHAPE, seed=4).embed(grey(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("attack", ATTACKS)
def test_embedding_leaves_the_originals_alone(attack: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    before = images.copy()
    got = make_trigger(attack, SHAPE).embed(images)
    np.testing.assert_array_equal(images, before)
    assert got.dtype == np.uint8
    assert got.shape == images.shape
    assert not np.shares_memory(got, images)


def test_square_is_a_quarter_of_the_side_at_the_bottom_right_in_seeded_colours() -> None:
    got = make_trigger("SQ", (32, 40, 3), seed=5).embed(np.full((1, 32, 40, 3), 7, np.uint8))[0]
    colours = np.random.default_rng(5).integers(0, 256, (64, 3))
    np.testing.assert_array_equal(got[-8:, -8:].reshape(64, 3), colours)
    got[-8:, -8:] = 7
    assert (got == 7).all()


def test_watermark_mixes_three_tenths_of_white_over_the_whole_image() -> None:
    shape = (32, 32, 3)
    trigger = make_trigger("WM", shape, seed=5)
    for value in (0, 100, 101, 255):
        got = trigger.embed(np.full((1, *shape), value, np.uint8))[0]
        assert set(np.unique(got)) == {value, round(0.7 * value + 0.3 * 255)}
    strokes = (trigger.embed(np.zeros((1, *shape), np.uint8))[0] > 0).all(axis=2)
    assert 0.1 < strokes.mean() < 0.6
    cells = strokes.reshape(4, 8, 4, 8).any(axis=(1, 3))
    assert cells.all()
    other = make_trigger("WM", shape, seed=6).embed(np.zeros((1, *shape), np.uint8))[0]
    assert ((other > 0).all(axis=2) != strokes).any()


def test_unknown_attack() -> None:
    with pytest.raises(OptionError, match=r"^attack: expected one of CB, SP, WB, SQ, WM, got 'wb'"):
        make_trigger("wb", SHAPE)


LABELS = np.repeat(np.arange(4), 20)
IMAGES = np.random.default_rng(1).integers(0, 200, (80, *SHAPE), dtype=np.uint8)
MARK = Patch(np.eye(9, 11, dtype=bool), np.full(SHAPE, 255, np.uint8))


@pytest.mark.parametrize(("setting", "sources"), [("single", [0]), ("multi", [0, 1, 3])])
@pytest.mark.parametrize("n_poisoned", [1, 7, 20])
def test_poisoned_copies_replace_the_originals(setting: str, sources: list[int], n_poisoned: int) -> None:
    before = IMAGES.copy(), LABELS.copy()
    images, labels = poison(IMAGES, LABELS, MARK, target=2, setting=setting, n_poisoned=n_poisoned, seed=3)
    np.testing.assert_array_equal(IMAGES, before[0])
    np.testing.assert_array_equal(LABELS, before[1])
    changed = np.flatnonzero(labels != LABELS)
    assert len(images) == len(labels) == 80
    assert (labels[changed] == 2).all()
    values, counts = np.unique(LABELS[changed], return_counts=True)
    assert values.tolist() == sources
    assert (counts == n_poisoned).all()
    np.testing.assert_array_equal(images[changed], MARK.embed(IMAGES[changed]))
    untouched = np.setdiff1d(np.arange(80), changed)
    np.testing.assert_array_equal(images[untouched], IMAGES[untouched])


def test_all_to_all_moves_every_class_one_on() -> None:
    images, labels = poison(IMAGES, LABELS, MARK, target=2, setting="all", n_poisoned=6, seed=3)
    changed = np.flatnonzero(labels != LABELS)
    np.testing.assert_array_equal(np.bincount(LABELS[changed]), [6] * 4)
    np.testing.assert_array_equal(labels[changed], (LABELS[changed] + 1) % 4)
    np.testing.assert_array_equal(images[changed], MARK.embed(IMAGES[changed]))


def test_poisoning_depends_on_the_seed_alone() -> None:
    sets = [
        poison(IMAGES, LABELS, MARK, target=2, setting="multi", n_poisoned=5, seed=seed)[1].tolist()
        for seed in (0, 0, 1)
    ]
    assert sets[0] == sets[1] != sets[2]


def test_poisoning_that_cannot_be_done() -> None:
    with pytest.raises(OptionError, match=r"^setting: expected one of single, multi, all, got 'each'"):
        poison(IMAGES, LABELS, MARK, target=2, setting="each", n_poisoned=1, seed=0)
    with pytest.raises(OptionError, match=r"^target: class 0 is the source of a single-class attack; choose another"):
        poison(IMAGES, LABELS, MARK, target=0, setting="single", n_poisoned=1, seed=0)
    with pytest.raises(OptionError, match=r"^n_poisoned: class 0 has 20 images, expected at least 21"):
        poison(IMAGES, LABELS, MARK, target=2, setting="multi", n_poisoned=21, seed=0)
    assert SETTINGS == ("single", "multi", "all")
