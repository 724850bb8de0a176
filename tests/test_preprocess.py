"""Preprocessing: exact where it can be done by hand, equal to torch's convention, and strict about frames."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight_edge import DataError, OptionError, Preprocess
from inflight_edge.preprocess import resize_bilinear


def test_constants_are_applied_per_channel() -> None:
    preprocess = Preprocess((3, 1, 1), scale=0.5, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    got = preprocess(np.array([[[2, 4, 6]]], np.uint8))
    np.testing.assert_array_equal(got, np.zeros((3, 1, 1), np.float32))
    assert got.dtype == np.float32
    assert got.flags.c_contiguous


def test_one_constant_serves_all_channels() -> None:
    got = Preprocess((3, 1, 1), 1.0, (10.0,), (5.0,))(np.array([[[10, 15, 20]]], np.uint8))
    assert got.ravel().tolist() == [0.0, 1.0, 2.0]


def test_default_maps_255_to_1() -> None:
    assert Preprocess((1, 1, 2))(np.array([[0, 255]], np.uint8)).ravel().tolist() == [0.0, pytest.approx(1.0)]


def test_axes_become_channels_first() -> None:
    frame = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(Preprocess((3, 2, 4)).pixels(frame), frame.transpose(2, 0, 1))


def test_grey_becomes_equal_channels_and_colour_becomes_luma() -> None:
    grey = np.array([[7, 9]], np.uint8)
    np.testing.assert_array_equal(Preprocess((3, 1, 2)).pixels(grey), np.repeat(grey[None], 3, axis=0))
    np.testing.assert_array_equal(Preprocess((3, 1, 2)).pixels(grey[:, :, None]), np.repeat(grey[None], 3, axis=0))
    colour = np.array([[[100, 0, 0], [0, 100, 0], [0, 0, 100], [255, 255, 255]]], np.uint8)
    got = Preprocess((1, 1, 4)).pixels(colour)
    np.testing.assert_allclose(got, [[[29.9, 58.7, 11.4, 255.0]]], rtol=1e-6)


def test_resize_by_hand() -> None:
    row = np.array([[0.0, 10.0]], np.float32)[:, :, None]
    assert resize_bilinear(row, 1, 4).ravel().tolist() == [0.0, 2.5, 7.5, 10.0]
    four = np.array([[0.0, 10.0, 20.0, 30.0]], np.float32)[:, :, None]
    assert resize_bilinear(four, 1, 2).ravel().tolist() == [5.0, 25.0]
    np.testing.assert_array_equal(resize_bilinear(four, 3, 4), np.repeat(four, 3, axis=0))


@pytest.mark.parametrize("shape", [(1, 20_000, 4), (20_000, 1, 4)])
def test_resize_of_a_strip_takes_memory_for_no_more_than_is_there(shape: tuple[int, int, int]) -> None:
    image = np.zeros(shape, np.float32)
    tracemalloc.start()
    resize_bilinear(image, 224, 224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (image.nbytes + 224 * 224 * 4 * 4)


@settings(max_examples=50, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 40)] * 4), channels=st.integers(1, 3))
def test_resize_stays_in_range_and_is_torchs(shape: tuple[int, int, int, int], channels: int) -> None:
    height, width, new_height, new_width = shape
    image = np.random.default_rng(0).uniform(0, 255, (height, width, channels)).astype(np.float32)
    got = resize_bilinear(image, new_height, new_width)
    assert got.shape == (new_height, new_width, channels)
    assert got.min() >= image.min() - 1e-3
    assert got.max() <= image.max() + 1e-3
    torch = pytest.importorskip("torch", reason="the convention is compared with torch's where torch is installed")
    batch = torch.from_numpy(image.transpose(2, 0, 1)[None])
    expected = torch.nn.functional.interpolate(batch, (new_height, new_width), mode="bilinear", align_corners=False)
    # Pixels up to 255 in float32, weights rounded once on each side.
    np.testing.assert_allclose(got, expected[0].numpy().transpose(1, 2, 0), atol=5e-3)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((2, 2)), "frame: expected a uint8 array, got float64; convert it to 8-bit pixels 0..255"),
        ([[1]], "frame: expected a uint8 array, got list"),
        (None, "frame: expected a uint8 array, got NoneType"),
        (np.zeros(4, np.uint8), r"frame: expected shape \(H, W\) or \(H, W, channels\), got \(4,\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"frame: expected shape .*, got \(1, 2, 2, 3\)"),
        (np.zeros((0, 2, 3), np.uint8), r"frame: expected shape .*, got \(0, 2, 3\)"),
        (np.zeros((2, 2, 4), np.uint8), r"frame: expected 3 channels, got shape \(2, 2, 4\)"),
    ],
)
def test_frame_that_does_not_fit(frame: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Preprocess((3, 2, 2))(frame)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (3, 2)}, r"input shape: expected \(channels, height, width\), each at least 1, got \(3, 2\)"),
        ({"input_shape": (3, 0, 2)}, "input shape: expected"),
        ({"scale": 0.0}, "scale: expected a number > 0 such as 1/255, got 0.0"),
        ({"scale": math.nan}, "scale: expected a number > 0 such as 1/255, got nan"),
        ({"mean": (1.0, 2.0)}, "mean: expected one number, or one for each of 3 channels, got 2"),
        ({"mean": ()}, "mean: expected one number, or one for each of 3 channels"),
        ({"mean": (math.inf,)}, r"mean: expected finite numbers, got \(inf,\)"),
        ({"std": (math.nan,)}, "std: expected finite numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std: expected numbers > 0"),
        ({"std": (-1.0,)}, "std: expected numbers > 0"),
    ],
)
def test_constants_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Preprocess(**({"input_shape": (3, 2, 2)} | options))
