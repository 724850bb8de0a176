"""The region of interest: exactly those pixels, in every layout, or an error."""

from __future__ import annotations

import re

import numpy as np
import pytest

from inflight_edge import DataError, OptionError
from inflight_edge.colour import to_rgb
from inflight_edge.region import Region


def test_region_is_those_pixels_and_a_view() -> None:
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    part = Region(2, 1, 4, 3).crop(image, "rgb")
    assert np.array_equal(part, image[1:4, 2:6])
    assert np.shares_memory(part, image)
    assert np.array_equal(Region(0, 0, 8, 6).crop(image[:, :, 0], "bgr"), image[:, :, 0])


def test_region_of_nv12_is_that_of_its_colours(rng: np.random.Generator) -> None:
    frame = rng.integers(0, 256, (12, 10), np.uint8)
    part = Region(4, 2, 6, 4).crop(frame, "nv12-bt709")
    assert part.shape == (6, 6)
    assert np.array_equal(to_rgb(part, "nv12-bt709"), to_rgb(frame, "nv12-bt709")[2:6, 4:10])


@pytest.mark.parametrize(
    ("region", "frame", "colour", "message"),
    [
        (Region(4, 0, 5, 2), np.zeros((6, 8, 3), np.uint8), "rgb", "one that holds the region 4,0,5,2, got 8x6"),
        (Region(0, 4, 2, 3), np.zeros((6, 8), np.uint8), "rgb", "one that holds the region 0,4,2,3, got 8x6"),
        (Region(0, 4, 2, 4), np.zeros((9, 8), np.uint8), "nv12-bt601", "one that holds the region 0,4,2,4, got 8x6"),
        (Region(1, 0, 2, 2), np.zeros((9, 8), np.uint8), "nv12-bt601", "even numbers for NV12, got 1,0,2,2"),
        (Region(0, 0, 1, 1), np.zeros((6, 8), np.float32), "rgb", "expected a uint8 array, got float32"),
        (Region(0, 0, 1, 1), None, "rgb", "expected a uint8 array, got NoneType"),
    ],
)
def test_frame_that_does_not_hold_the_region_is_an_error(region, frame, colour, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=message):
        region.crop(frame, colour)


def test_region_is_read_from_text() -> None:
    assert Region.parse("10,20,224,112") == Region(10, 20, 224, 112)
    assert str(Region.parse("10,20,224,112")) == "10,20,224,112"
    for text in ("", "1,2,3", "1,2,3,4,5", "-1,0,2,2", "a,0,2,2", "1.5,0,2,2", "0,0,99999999,1"):
        with pytest.raises(OptionError, match=re.escape(f"such as 0,0,224,224, got {text!r}")):
            Region.parse(text)
    with pytest.raises(OptionError, match="width, height >= 1, got 0,0,0,4"):
        Region.parse("0,0,0,4")
