"""Damaged and hostile data files end in a DataError, whatever the readers underneath raise."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inflight_edge.calibration.datasets import load_images, load_standard
from inflight_edge.errors import DataError

IMAGES, LABELS = np.zeros((6, 4, 4), np.uint8), np.arange(6)


# --- .npz


def archive() -> bytearray:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=IMAGES, labels=LABELS)
    return bytearray(buffer.getvalue())


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    return buffer.getvalue()


def members_of_text() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("images.npy", "x")
        target.writestr("labels.npy", "y")
    return buffer.getvalue()


def flipped_bits() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (60, 9, 9), dtype=np.uint8)
    np.savez_compressed(buffer, images=noise, labels=np.arange(60))
    data = bytearray(buffer.getvalue())
    data[200] ^= 0xFF
    data[260] ^= 0xFF
    return bytes(data)


def unknown_compression() -> bytes:
    data = archive()
    data[data.find(b"PK\x01\x02") + 10] = 99
    return bytes(data)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "single array": single_array,
    "members of text": members_of_text,
    "flipped bits": flipped_bits,
    "unknown compression": unknown_compression,
    "cut": lambda: bytes(archive()[:200]),
    "pickle": lambda: pickle.dumps([1]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_npz(tmp_path: Path, case: str) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(HOSTILE[case]())
    with pytest.raises(DataError, match=rf"^{path}: ") as caught:
        load_images(path)
    assert "unsafely" not in str(caught.value)  # numpy's advice is to allow pickles
    assert "\n" not in str(caught.value)


def test_npz_label_beyond_int64(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=IMAGES, labels=np.full(6, 2**63 + 5, np.uint64))
    with pytest.raises(DataError, match=rf"^{path}: labels: expected class indices from 0 to 1000000, got 9223"):
        load_images(path)


# --- folders


def test_folder_named_by_a_huge_number(tmp_path: Path) -> None:
    huge = tmp_path / ("9" * 20)
    huge.mkdir()
    Image.fromarray(IMAGES[0]).save(huge / "1.png")
    with pytest.raises(DataError, match=rf"^{tmp_path}: sub-folders named by class index: expected at most 1000000"):
        load_images(tmp_path)


# --- the standard files


def write_mnist(folder: Path, images: bytes) -> Path:
    """The test part with nine bytes in place of the labels; the path of the images."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(9)))
    path = raw / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(images)
    return path


@pytest.mark.parametrize("data", [b"", b"abc", bytes(16), bytes(16 + 700)], ids=["none", "3", "header", "cut"])
def test_idx_of_a_wrong_length(tmp_path: Path, data: bytes) -> None:
    path = write_mnist(tmp_path, gzip.compress(data))
    n_bytes = max(0, len(data) - 16)
    message = rf"^{path}: expected records of 784 bytes behind 16, got {n_bytes} bytes; fetch it again"
    with pytest.raises(DataError, match=message):
        load_standard("mnist", tmp_path, train=False)


def test_idx_damaged_inside_the_gzip(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 9, 800, dtype=np.uint8)
    data = bytearray(gzip.compress(noise.tobytes()))
    data[30:40] = b"\xff" * 10
    path = write_mnist(tmp_path, bytes(data))
    with pytest.raises(DataError, match=rf"^{path}: truncated or not gzip \(.*\); fetch the file again"):
        load_standard("mnist", tmp_path, train=False)


@pytest.mark.parametrize("n_bytes", [0, 3072])
def test_cifar_of_a_wrong_length(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.parent.mkdir()
    path.write_bytes(bytes(n_bytes))
    with pytest.raises(DataError, match=rf"^{path}: expected records of 3073 bytes behind 0, got {n_bytes} bytes"):
        load_standard("cifar10", tmp_path, train=False)
