"""Image files: the pixels as stored, or one line that says why not."""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from inflight_edge import DataError, DependencyError, OptionError
from inflight_edge.images import _memory, find_images, iter_images, read_image, read_npz_images

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
RGB: Pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def save(path: Path, array: Any = RGB, **options: Any) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff", "webp"])
def test_lossless_formats_give_the_stored_pixels(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    got = read_image(path, 3)
    np.testing.assert_array_equal(got, RGB)
    assert got.dtype == np.uint8
    assert got.flags.writeable


def test_channels_follow_the_network(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    assert read_image(path, 1).shape == (2, 3)
    assert read_image(path, 4).shape == (2, 3, 4)
    assert (read_image(path, 4)[..., 3] == 255).all()
    grey = save(tmp_path / "grey.png", RGB[..., 0])
    np.testing.assert_array_equal(read_image(grey, 1), RGB[..., 0])
    np.testing.assert_array_equal(read_image(grey, 3), np.repeat(RGB[..., :1], 3, axis=2))


def test_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).quantize(4)
    image.save(tmp_path / "a.png", transparency=bytes([0, 255, 255, 255]))
    assert read_image(tmp_path / "a.png", 3).shape == (2, 3, 3)


def test_orientation_is_left_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(path, 3), RGB)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "a.gif", 1) == 0).all()


def png(colour_type: int, depth: int, row: bytes) -> bytes:
    """PNG of one pixel, which Pillow cannot write in every depth."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    )


DEEP = {
    "grey.png": png(0, 16, b"\x12\x34"),
    "rgb.png": png(2, 16, b"\x12\x34" * 3),
    "grey_alpha.png": png(4, 16, b"\x12\x34" * 2),
    "rgba.png": png(6, 16, b"\x12\x34" * 4),
    "grey.pgm": b"P5 1 1 65535 \x12\x34",
    "rgb.ppm": b"P6 1 1 65535 \x12\x34\x12\x34\x12\x34",
    "odd.ppm": b"P6 1 1 1023 \x02\x34\x02\x34\x02\x34",
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_is_refused_not_cut_down(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DEEP[name])
    with pytest.raises(DataError, match=f"{name}: expected 8 bits a channel, got .*; convert it to 8-bit pixels"):
        read_image(tmp_path / name, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_tiff_is_refused(tmp_path: Path, dtype: Any) -> None:
    path = save(tmp_path / "a.tiff", np.zeros((2, 2), dtype))
    with pytest.raises(DataError, match="expected 8 bits a channel, got mode"):
        read_image(path, 1)


def test_8_bits_made_by_hand_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(2, 8, b"\x01\x02\x03"))
    assert read_image(tmp_path / "a.png", 3).tolist() == [[[1, 2, 3]]]


def test_truncated_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "bmp"):
        path = save(tmp_path / f"a.{suffix}", noise)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(DataError, match=f"a.{suffix}: cannot be read as an image: .*truncated"):
            read_image(path, 3)


@pytest.mark.parametrize("factor", [1, 3])
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    """Pillow warns above its limit and raises above twice of it; both are refused."""
    path = save(tmp_path / "a.png", np.zeros((10, 10 * factor), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(DataError, match=r"a.png: expected at most 99 pixels, got more; shrink it"):
        read_image(path, 1)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=r"a.png: expected an image \(BMP, GIF, .*\), got something else"):
        read_image(tmp_path / "a.png", 3)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="expected an image file, got a folder or device"):
        read_image(tmp_path / "pipe.png", 3)
    with pytest.raises(DataError, match=r"none.png: cannot be read as an image: No such file or directory"):
        read_image(tmp_path / "none.png", 3)


def test_channels_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"channels: expected 1, 3 or 4 for image files, got 2; pass .* as .npz"):
        read_image(save(tmp_path / "a.png"), 2)


def test_missing_pillow_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DependencyError, match=r"PIL.Image: needed here .*; pip install 'inflight-edge\[camera\]'"):
        read_image(tmp_path / "a.png", 3)


def encoded(suffix: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.tile(RGB, (8, 8, 1))).save(file, suffix)
    return file.getvalue()


SAMPLES = [encoded(suffix) for suffix in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_never_raises_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    ((_, got),) = iter_images([tmp_path / "a"], 3)
    if isinstance(got, DataError):
        assert "\n" not in str(got)
    else:
        assert got.dtype == np.uint8
        assert got.shape[2:] == (3,)


# --- .npz


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 3), (2, 4, 5, 12), (0, 4, 5)])
def test_npz_frames_keep_their_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = npz(tmp_path / "a.npz", images=images, labels=np.zeros(2))
    np.testing.assert_array_equal(read_npz_images(path), images)
    named = list(iter_images([path], 3))
    assert [name for name, _ in named] == [f"{path}[{i}]" for i in range(shape[0])]
    for (_, got), expected in zip(named, images, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 3, 3))}, r"images: expected uint8 \(N, H, W\) or .*, got float64 \(2, 3, 3\)"),
        ({"images": np.zeros((2, 3), np.uint8)}, r"images: expected uint8 .*, got uint8 \(2, 3\)"),
        ({"x": np.zeros(2), "a": np.zeros(2)}, r"expected the array `images`, got a, x; use numpy.savez"),
        ({}, "expected the array `images`, got nothing"),
        (
            {"images": np.zeros((3_000_000_000, 0, 3), np.uint8)},
            r"expected frames with pixels, got shape \(3000000000, 0",
        ),
        (
            {"images": np.array([{}, None], object)},
            "expected an .npz file of numpy.savez: Object arrays cannot be loaded",
        ),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_npz_images(path)


def test_npz_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 3), np.uint8))
    good = npz(tmp_path / "good.npz", images=np.zeros((20, 30, 30), np.uint8)).read_bytes()
    broken = good.replace(b"NUMPY", b"NUMPI")
    other = "expected an .npz file of numpy.savez: File is not a zip file"
    for data, message in (
        (b"", other),
        (b"PK\x03\x04 hello", other),
        (b"cos\nsystem\n(S'true'\ntR.", other),
        (good[:-100], other),
        ((tmp_path / "a.npy").read_bytes(), other),
        (broken, "expected an .npz file of numpy.savez: |images: expected uint8 .*, got raw bytes"),
        (good[:300] + b"\1" + good[301:], "expected an .npz file of numpy.savez: Bad CRC-32"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_npz_images(path)
    with pytest.raises(DataError, match=r"none.npz: cannot be read: No such file or directory"):
        read_npz_images(tmp_path / "none.npz")
    with pytest.raises(DataError, match=r"expected an .npz file, got a folder or device"):
        read_npz_images(tmp_path)


# --- many


def test_folders_are_read_recursively_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.PNG", "a/9.bmp", "a/notes.txt", "a/c/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded("PNG"))
    expected = [tmp_path / name for name in ("a/9.bmp", "a/c/0.png", "b/1.PNG", "b/2.png")]
    assert find_images(tmp_path) == expected
    single = save(tmp_path / "z.png")
    assert [name for name, _ in iter_images([single, tmp_path / "b"], 3)] == [
        str(single),
        str(tmp_path / "b/1.PNG"),
        str(tmp_path / "b/2.png"),
    ]


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_images(tmp_path) == [tmp_path / "a.png"]


def test_one_bad_image_spoils_no_other(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"junk")
    npz(tmp_path / "c.npz", images=np.zeros(3))
    save(tmp_path / "d.png")
    results = list(iter_images([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.npz", tmp_path / "d.png"], 3))
    assert [isinstance(frame, DataError) for _, frame in results] == [False, True, True, False]
    assert [Path(name).name for name, _ in results] == ["a.png", "b.png", "c.npz", "d.png"]


def test_missing_path_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.png: expected an image, a folder or an .npz, got no such file"):
        iter_images([save(tmp_path / "a.png"), tmp_path / "none.png"], 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected images \(.bmp .*\) in this folder, got none"):
        iter_images([tmp_path / "empty"], 3)


# --- hostile files


def archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, times: int = 1) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")  # of the same name twice
        for _ in range(times):
            file.writestr("images.npy", content)
    return path


def member(header: str = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4), }", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + bytes(32)


def test_npz_made_by_hand_is_read(tmp_path: Path) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert read_npz_images(archive(tmp_path / "a.npz", member(), compression)).shape == (2, 4, 4)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_with_a_compression_that_numpy_never_writes(tmp_path: Path, compression: int) -> None:
    """LZMA raises errors of its own, and may ask for gigabytes."""
    with pytest.raises(DataError, match=r"expected no other compression than numpy[.]savez_compressed's"):
        read_npz_images(archive(tmp_path / "a.npz", member(), compression))


def test_npz_with_an_array_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected each array once, got 2 for images"):
        read_npz_images(archive(tmp_path / "a.npz", member(), times=2))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr':",
        "'''",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "(" * 300,
        "{'descr': '|u1', 'fortran_order': False, 'shape': (3L,4,4), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1,4,4), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,4,4), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True,4,4), }",
    ],
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_npz_header_tricks(tmp_path: Path, header: str, version: int) -> None:
    with pytest.raises(DataError, match=r"a\.npz: expected an \.npz file of numpy\.savez: "):
        read_npz_images(archive(tmp_path / "a.npz", member(header, version)))


def test_zip_bomb_is_refused_before_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.npz", member() + bytes(4 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr("inflight_edge.images._memory", lambda: 1 << 20)
    with pytest.raises(DataError, match="expected arrays of at most 1048576 bytes, this machine's memory, got 41944"):
        read_npz_images(path)


def test_memory_is_that_of_this_machine() -> None:
    assert 1 << 26 < _memory() < 1 << 50


def test_png_bomb_is_refused_whatever_the_warning_filters_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread can reset the filters between our setting them and Pillow's warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    path = save(tmp_path / "a.png")  # 6 pixels
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("inflight_edge.images.warnings.simplefilter", lambda *_: None)
        with pytest.raises(DataError, match="expected at most 5 pixels, got more; shrink it"):
            read_image(path, 3)


def test_fifo_put_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    for name in ("a.png", "a.npz"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="expected an image file, got a folder or device"):
        read_image(tmp_path / "a.png", 3)
    with pytest.raises(DataError, match=r"expected an [.]npz file, got a folder or device"):
        read_npz_images(tmp_path / "a.npz")
