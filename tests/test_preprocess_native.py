"""Preprocessing in C against its definition in NumPy, and its colours against hand-made values."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight_edge import DataError, OptionError, Preprocess
from inflight_edge.colour import COLOURS, Colour, to_rgb

native = pytest.importorskip("inflight_edge._preprocess", reason="the C extension is not built")


def random_frame(rng: np.random.Generator, colour: Colour, height: int, width: int, channels: int) -> np.ndarray:
    if colour.startswith("nv12"):
        return rng.integers(0, 256, (3 * height, 2 * width), dtype=np.uint8)
    shape = (height, width) if channels == 0 else (height, width, channels)
    return rng.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("colour", COLOURS)
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 4), st.sampled_from([0, 1, 3]), st.sampled_from([1, 3]), st.booleans())
def test_equal_to_numpy(
    colour: Colour, sizes: tuple[int, int, int, int], frame_channels: int, channels: int, per_channel: bool
) -> None:
    height, width, new_height, new_width = sizes
    rng = np.random.default_rng(sum(sizes))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    n = channels if per_channel else 1
    preprocess = Preprocess((channels, new_height, new_width), mean=mean[:n], std=std[:n])
    frame = random_frame(rng, colour, height, width, frame_channels)
    got = preprocess(frame, colour)
    assert (got.dtype, got.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_allclose(got, preprocess.normalise(preprocess.pixels(frame, colour)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("colour", COLOURS)
def test_camera_frame(rng: np.random.Generator, colour: Colour) -> None:
    frame = random_frame(rng, colour, 240, 320, 3)
    preprocess = Preprocess((3, 224, 224))
    expected = preprocess.normalise(preprocess.pixels(frame, colour))
    np.testing.assert_allclose(preprocess(frame, colour), expected, rtol=0, atol=1e-5)


def test_strided_frame_is_read_as_it_looks(rng: np.random.Generator) -> None:
    frame = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)[::2, ::-1]
    preprocess = Preprocess((3, 7, 9))
    np.testing.assert_array_equal(preprocess(frame), preprocess(frame.copy()))


@pytest.mark.parametrize("shape", [(1, 28), (1, 28, 1), (1, 28, 3), (28, 1), (1, 1, 3)])
def test_frame_of_one_row_or_column(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    """NumPy gives an axis of length one any stride."""
    whole = rng.integers(0, 256, shape[1:], dtype=np.uint8)
    frame = whole[None] if shape[0] == 1 else rng.integers(0, 256, shape, dtype=np.uint8)
    preprocess = Preprocess((3 if shape[-1] == 3 else 1, 4, 4))
    expected = preprocess.normalise(preprocess.pixels(frame, "rgb"))
    np.testing.assert_allclose(preprocess(frame), expected, rtol=0, atol=1e-5)


def test_bgr_is_rgb_backwards(rng: np.random.Generator) -> None:
    frame = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    for channels in (1, 3):
        preprocess = Preprocess((channels, 4, 4))
        np.testing.assert_array_equal(preprocess(frame[:, :, ::-1], "bgr"), preprocess(frame))


# Y, U, V of the primaries as the standards tabulate them (8 bits, rounded): BT.601-7 and BT.709-6.
PRIMARIES = {
    "nv12-bt601": {(81, 90, 240): (255, 0, 0), (145, 54, 34): (0, 255, 0), (41, 240, 110): (0, 0, 255)},
    "nv12-bt709": {(63, 102, 240): (255, 0, 0), (173, 42, 26): (0, 255, 0), (32, 240, 118): (0, 0, 255)},
    "nv12-bt601-full": {(76, 85, 255): (255, 0, 0), (150, 44, 21): (0, 255, 0), (29, 255, 107): (0, 0, 255)},
    "nv12-bt709-full": {(54, 99, 255): (255, 0, 0), (182, 30, 12): (0, 255, 0), (18, 255, 116): (0, 0, 255)},
}


@pytest.mark.parametrize("colour", PRIMARIES)
def test_nv12_gives_the_primaries(colour: Colour) -> None:
    white = {(255 if colour.endswith("full") else 235, 128, 128): (255, 255, 255)}
    black = {(0 if colour.endswith("full") else 16, 128, 128): (0, 0, 0)}
    for (y, u, v), rgb in (PRIMARIES[colour] | white | black).items():
        frame = np.array([[y, y], [y, y], [u, v]], np.uint8)
        np.testing.assert_allclose(to_rgb(frame, colour), np.broadcast_to(rgb, (2, 2, 3)), atol=2.5)
        got = Preprocess((3, 2, 2), scale=1.0)(frame, colour)
        np.testing.assert_allclose(got, np.broadcast_to(np.reshape(rgb, (3, 1, 1)), (3, 2, 2)), atol=2.5)


def test_nv12_block_shares_its_chroma() -> None:
    frame = np.array([[100, 100, 100, 100], [100, 100, 100, 100], [128, 128, 200, 128]], np.uint8)
    rgb = to_rgb(frame, "nv12-bt601")
    assert (rgb[:, :2, 2] == rgb[0, 0, 2]).all()
    assert (rgb[:, 2:, 2] == rgb[0, 2, 2]).all()
    assert rgb[0, 2, 2] > rgb[0, 0, 2]


@pytest.mark.parametrize("shape", [(4, 4), (3, 3), (3,), (3, 4, 1), (0, 4)])
def test_nv12_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    message = f"frame: expected NV12 of shape (H * 3 / 2, W), H and W even, got {shape}"
    with pytest.raises(DataError, match=re.escape(message)):
        Preprocess((3, 2, 2))(np.zeros(shape, np.uint8), "nv12-bt601")


def test_unknown_colour_is_refused() -> None:
    with pytest.raises(OptionError, match=r"colour: expected one of rgb, bgr, nv12-bt601, .*, got 'yuyv'"):
        Preprocess((3, 2, 2))(np.zeros((2, 2, 3), np.uint8), "yuyv")  # type: ignore[arg-type]


def test_extension_refuses_what_does_not_fit() -> None:
    arguments = (False, False, (3, 2, 2), 1.0, (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"frame: expected rgb pixels, got shape \(2, 2\)"):
        native.preprocess(np.zeros((2, 2), np.uint8), "rgb", *arguments)
    with pytest.raises(ValueError, match="frame: expected a C-contiguous uint8 array, got float32"):
        native.preprocess(np.zeros((2, 2, 3), np.float32), "rgb", *arguments)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_the_extension_numpy_gives_the_same(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    frame = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    preprocess = Preprocess((channels, 5, 4))
    got = preprocess(frame)
    monkeypatch.setattr("inflight_edge.preprocess._native", None)
    np.testing.assert_allclose(preprocess(frame), got, rtol=0, atol=1e-5)
