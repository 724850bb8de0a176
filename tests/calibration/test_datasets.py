"""Labelled images from every layout a user may have, or one line that says what is wrong with it."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from inflight_edge.calibration.datasets import ImageSet, load_digits, load_images, load_standard, split_defence
from inflight_edge.errors import DataError, OptionError
from inflight_edge.preprocess import Preprocess

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


# --- .npz


@pytest.mark.parametrize("images", [COLOUR, COLOUR[..., 0], COLOUR[..., :1], COLOUR[:, :2, :2]])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_npz_gives_what_was_saved(tmp_path: Path, images: Any, dtype: type) -> None:
    data = load_images(npz(tmp_path / "data.npz", images=images, labels=LABELS.astype(dtype)))
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, LABELS)
    assert data.labels.dtype == np.int64
    assert data.class_names is None
    assert len(data) == 6
    assert data.image_shape == (images.shape[3] if images.ndim == 4 else 1, images.shape[1], images.shape[2])


NPZ_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"images": COLOUR}, "expected the array `labels`, got images; use numpy.savez"),
    "no images": ({"labels": LABELS, "x": LABELS}, "expected the array `images`, got labels, x; use numpy.savez"),
    "neither": ({"x": LABELS}, "expected the array `images`, got x; use numpy.savez"),
    "float": (
        {"images": COLOUR / 255.0, "labels": LABELS},
        r"images: expected dtype uint8 \(pixels 0..255\), got float64",
    ),
    "two axes": (
        {"images": COLOUR[:, :, 0, 0], "labels": LABELS},
        r"images: expected shape \(N, H, W, channels\) or \(N, H, W\), got \(6, 4\)",
    ),
    "channels first": (
        {"images": np.zeros((6, 3, 8, 9), np.uint8), "labels": LABELS},
        r"images: expected channels last \(N, H, W, channels\), got \(6, 3, 8, 9\); transpose them",
    ),
    "float labels": (
        {"images": COLOUR, "labels": LABELS / 1.0},
        r"labels: expected integers of shape \(6,\), got float64 of shape \(6,\)",
    ),
    "names as labels": (
        {"images": COLOUR, "labels": np.array(list("abcabc"))},
        r"labels: expected integers of shape \(6,\), got <U1 of shape \(6,\)",
    ),
    "one-hot labels": (
        {"images": COLOUR, "labels": np.eye(6, dtype=np.int64)},
        r"labels: expected integers of shape \(6,\), got int64 of shape \(6, 6\)",
    ),
    "fewer labels": (
        {"images": COLOUR, "labels": LABELS[:5]},
        r"labels: expected integers of shape \(6,\), got int64 of shape \(5,\)",
    ),
    "negative label": (
        {"images": COLOUR, "labels": LABELS - 1},
        "labels: expected class indices from 0 to 1000000, got -1 to",
    ),
    "no image": (
        {"images": COLOUR[:0], "labels": LABELS[:0]},
        r"images: expected at least one image, got shape \(0, 4, 5, 3\)",
    ),
    "no pixels": (
        {"images": COLOUR[:, :, :0], "labels": LABELS},
        r"images: expected at least one image, got shape \(6, 4, 0, 3\)",
    ),
    "objects": (
        {"images": np.array([None] * 6), "labels": LABELS},
        "expected an .npz file of numpy.savez: Object arrays cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", NPZ_ERRORS)
def test_npz_that_does_not_fit(tmp_path: Path, case: str) -> None:
    arrays, message = NPZ_ERRORS[case]
    path = npz(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        load_images(path)


@pytest.mark.parametrize("data", [b"", b"not an archive\n"])
def test_file_that_is_no_npz(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"^{path}: expected an .npz file of numpy\.savez: "):
        load_images(path)


def test_other_file_and_missing_file(tmp_path: Path) -> None:
    other = tmp_path / "data.csv"
    other.write_text("1,2\n")
    with pytest.raises(DataError, match=rf"^{other}: expected an .npz \(images, labels\) or a folder with one sub-"):
        load_images(other)
    with pytest.raises(DataError, match=rf"^{tmp_path}/nope: no such file or folder; expected an .npz or a folder"):
        load_images(tmp_path / "nope")


# --- folders


def folder(path: Path, **classes: list[Any]) -> Path:
    """One sub-folder per class; a leading underscore is dropped from its name, so that it may be a number."""
    for name, frames in classes.items():
        (path / name.lstrip("_")).mkdir(parents=True)
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(path / name.lstrip("_") / f"{i}.png")
    return path


def test_folder_names_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", dog=[COLOUR[2]], cat=[COLOUR[0], COLOUR[1]])
    (path / ".cache").mkdir()
    (path / "notes.txt").write_text("x")
    (path / "cat" / "notes.txt").write_text("x")
    (path / "dog" / "more").mkdir()
    (path / "dog" / ".checkpoints").mkdir()
    for hidden in ("._0.png", ".checkpoints/0.png"):  # what other programs keep there, no image at all or one twice
        (path / "dog" / hidden).write_bytes((path / "dog" / "0.png").read_bytes())
    Image.fromarray(COLOUR[3, :2]).save(path / "dog" / "more" / "last.PNG")
    data = load_images(path)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    for frame, expected in zip(data.images, [COLOUR[0], COLOUR[1], COLOUR[2], COLOUR[3, :2]], strict=True):
        np.testing.assert_array_equal(frame, expected)


def test_integer_folder_names_are_the_class_indices(tmp_path: Path) -> None:
    data = load_images(folder(tmp_path / "data", _10=[COLOUR[0]], _2=[COLOUR[1]], _00=[COLOUR[2]]))
    assert data.class_names is None
    assert sorted(data.labels.tolist()) == [0, 2, 10]
    frames = dict(zip(data.labels.tolist(), data.images, strict=True))
    np.testing.assert_array_equal(frames[10], COLOUR[0])
    np.testing.assert_array_equal(frames[2], COLOUR[1])
    np.testing.assert_array_equal(frames[0], COLOUR[2])


@pytest.mark.parametrize(("channels", "shape"), [(1, (4, 5)), (3, (4, 5, 3)), (4, (4, 5, 4))])
def test_folder_images_get_the_wanted_channels(tmp_path: Path, channels: int, shape: tuple[int, ...]) -> None:
    data = load_images(folder(tmp_path / "data", a=[COLOUR[0]], b=[COLOUR[0, ..., 0]]), channels=channels)
    assert [frame.shape for frame in data.images] == [shape, shape]
    assert data.image_shape == (channels, 4, 5)
    with pytest.raises(OptionError, match="channels: expected 1, 3 or 4 for image files, got 2"):
        load_images(tmp_path / "data", channels=2)


def test_folder_errors(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=rf"^{empty}: expected one sub-folder per class, found none"):
        load_images(empty)
    bare = folder(tmp_path / "bare", a=[COLOUR[0]], b=[])
    with pytest.raises(DataError, match=rf"^{bare}/b: no image files \(\.bmp, .*\.webp\) found"):
        load_images(bare)
    twice = folder(tmp_path / "twice", _1=[COLOUR[0]], _01=[COLOUR[1]])
    with pytest.raises(DataError, match=rf"^{twice}: two sub-folders name the same class index; rename one"):
        load_images(twice)
    odd = folder(tmp_path / "odd", **{"a\u200bb": [COLOUR[0]]})
    with pytest.raises(
        DataError, match=rf"^{odd}: expected class names of printable characters, got 'a.u200bb'; rename"
    ):
        load_images(odd)
    broken = folder(tmp_path / "broken", a=[COLOUR[0]])
    (broken / "a" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"^{broken}/a/bad\.png: expected an image"):
        load_images(broken).pixels(Preprocess((3, 4, 5)))


def test_photographs_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """A thousand of a camera's size would fill the memory, and the network takes small ones."""
    path = folder(tmp_path / "data", a=list(COLOUR[:3]), b=list(COLOUR[3:]))
    data = load_images(path)
    assert isinstance(data.images, Sequence)
    chosen = data.subset(np.array([3, 1]))
    expected = ImageSet(COLOUR, data.labels, None, "here").subset(np.array([3, 1]))
    np.testing.assert_array_equal(chosen.pixels(Preprocess((3, 4, 5))), expected.pixels(Preprocess((3, 4, 5))))
    np.testing.assert_array_equal(np.stack(data.images[1:3]), COLOUR[1:3])
    np.testing.assert_array_equal(data.images[-1], COLOUR[-1])
    (path / "b" / "0.png").unlink()
    with pytest.raises(DataError, match=rf"^{path}/b/0\.png: cannot be read as an image: No such file"):
        chosen.pixels(Preprocess((3, 4, 5)))
    np.testing.assert_array_equal(data.images[2], COLOUR[2])


# --- ImageSet


def test_subset_by_positions_and_by_mask() -> None:
    frames = [COLOUR[i, : i + 1] for i in range(4)]
    for images in (COLOUR, [*frames, frames[0], frames[1]]):
        data = ImageSet(images, LABELS, ("a", "b", "c"), "here")
        part = data.subset(np.array([5, 1]))
        assert part.labels.tolist() == [2, 1]
        np.testing.assert_array_equal(part.images[0], images[5])
        np.testing.assert_array_equal(part.images[1], images[1])
        masked = data.subset(LABELS == 2)
        assert masked.labels.tolist() == [2, 2]
        np.testing.assert_array_equal(masked.images[0], images[2])
        assert (masked.class_names, masked.origin) == (("a", "b", "c"), "here")


def test_pixels_are_fitted_to_the_network() -> None:
    preprocess = Preprocess((1, 8, 8))
    pixels = ImageSet(COLOUR, LABELS, None, "here").pixels(preprocess)
    assert pixels.shape == (6, 1, 8, 8)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[3], preprocess.pixels(COLOUR[3]))
    two = ImageSet([COLOUR[0], COLOUR[1, ..., :2]], LABELS[:2], None, "here")
    with pytest.raises(DataError, match=r"^here: image 1: frame: expected 1 channels, got shape \(4, 5, 2\)"):
        two.pixels(preprocess)


def test_labels_must_fit_the_classifier() -> None:
    data = ImageSet(np.tile(COLOUR, (2, 1, 1, 1)), np.tile(LABELS, 2), None, "here")
    data.check_labels(3, every_class=True)
    data.check_labels(7, every_class=False)
    with pytest.raises(
        DataError, match=r"^here: label 2 found, but the model has 2 classes \(0 to 1\); check the order"
    ):
        data.check_labels(2, every_class=False)
    with pytest.raises(DataError, match=r"^here: class 3 has 0 images, expected at least 3 of each of the model's 4 "):
        data.check_labels(4, every_class=True)
    with pytest.raises(DataError, match=r"^here: class 2 has 2 images, expected at least 3 .*; add clean images"):
        data.subset(np.flatnonzero(np.cumsum(data.labels == 2) <= 2)).check_labels(3, every_class=True)


# --- the standard files


def idx(array: Any) -> bytes:
    """The idx format: two zero bytes, 8 for unsigned bytes, the number of axes, big-endian sizes, data."""
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_idx(path: Path, name: str, images: Any, labels: Any) -> Path:
    raw = path / name / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for prefix, part in (("train", slice(None)), ("t10k", slice(0, 2))):
        (raw / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[part])))
        (raw / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[part])))
    return raw


@pytest.mark.parametrize(("name", "sub"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files(tmp_path: Path, name: str, sub: str) -> None:
    images, labels = RNG.integers(0, 256, (5, 28, 28)), np.array([3, 1, 4, 1, 5])
    write_idx(tmp_path, sub, images, labels)
    for train, n_images in ((True, 5), (False, 2)):
        data = load_standard(name, tmp_path, train=train)
        np.testing.assert_array_equal(data.images, images[:n_images, :, :, None])
        np.testing.assert_array_equal(data.labels, labels[:n_images])
        assert data.image_shape == (1, 28, 28)


def test_cifar_files(tmp_path: Path) -> None:
    raw = tmp_path / "cifar-10-batches-bin"
    raw.mkdir()
    images, labels = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), RNG.integers(0, 10, 12)
    rows = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)]
    for i in range(5):
        (raw / f"data_batch_{i + 1}.bin").write_bytes(b"".join(rows[2 * i : 2 * i + 2]))
    (raw / "test_batch.bin").write_bytes(b"".join(rows[10:]))
    for train, part in ((True, slice(0, 10)), (False, slice(10, 12))):
        data = load_standard("cifar10", tmp_path, train=train)
        np.testing.assert_array_equal(data.images, images[part])
        np.testing.assert_array_equal(data.labels, labels[part])
    (raw / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=rf"^{raw}/data_batch_4\.bin: not found; unpack cifar-10-binary.tar.gz "):
        load_standard("cifar10", tmp_path, train=True)


def test_standard_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^dataset: expected one of mnist, fashion_mnist, cifar10, got 'svhn'"):
        load_standard("svhn", tmp_path, train=True)
    raw = write_idx(tmp_path, "MNIST", np.zeros((5, 28, 28)), np.zeros(5))
    images, labels = raw / "train-images-idx3-ubyte.gz", raw / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"^{images}: truncated or not gzip \(.*\); fetch the file again"):
        load_standard("mnist", tmp_path, train=True)
    images.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=rf"^{images}: truncated or not gzip \(Not a gzipped file"):
        load_standard("mnist", tmp_path, train=True)
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(idx(np.zeros(4))))
    with pytest.raises(DataError, match=rf"^{raw}: 5 images but 4 labels; fetch the files again"):
        load_standard("mnist", tmp_path, train=True)
    labels.unlink()
    with pytest.raises(DataError, match=rf"^{labels}: not found; MNIST's four files .* go to MNIST/raw, or "):
        load_standard("mnist", tmp_path, train=True)


# --- the digits


@pytest.mark.parametrize("size", [8, 28])
def test_digits(size: int) -> None:
    data, small = load_digits(size), sklearn_digits()
    images = np.asarray(data.images)
    assert images.shape == (1797, size, size, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(data.labels, small.target)
    if size == 8:
        np.testing.assert_array_equal(images[..., 0], np.rint(small.images * 255 / 16))
    else:
        assert images.max() == 255
        # Bilinear means keep the brightness.
        assert abs(images.mean() - small.images.mean() * 255 / 16) < 2


# --- the defender's split


@given(
    st.lists(st.integers(0, 4), min_size=30, max_size=80).filter(
        lambda x: min(np.unique(x, return_counts=True)[1]) > 2
    ),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_split_never_overlaps_and_depends_on_the_seed_alone(labels: list[int], per_class: int, seed: int) -> None:
    array = np.array(labels)
    defence, rest = split_defence(array, per_class, seed)
    assert sorted([*defence, *rest]) == list(range(len(array)))
    values, counts = np.unique(array[defence], return_counts=True)
    assert values.tolist() == np.unique(array).tolist()
    assert (counts == per_class).all()
    again = split_defence(array, per_class, seed)
    np.testing.assert_array_equal(defence, again[0])
    np.testing.assert_array_equal(rest, again[1])


def test_split_differs_between_seeds_and_needs_enough_images() -> None:
    labels = np.repeat([0, 1], 50)
    assert split_defence(labels, 10, 0)[0].tolist() != split_defence(labels, 10, 1)[0].tolist()
    with pytest.raises(DataError, match=r"^class 1: 3 images, expected at least 4 for the defender"):
        split_defence(np.array([0, 0, 0, 0, 1, 1, 1]), 4, 0)


def test_archive_with_other_members_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=COLOUR, labels=LABELS, names=np.array(["a", "b", "c"]))
    path = tmp_path / "data.npz"
    path.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "x")
    np.testing.assert_array_equal(load_images(path).images, COLOUR)
