"""Labelled images: image folders, .npz archives and the standard layouts of MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from inflight_edge._text import is_name
from inflight_edge.errors import DataError
from inflight_edge.images import IMAGE_SUFFIXES, read_image, read_npz
from inflight_edge.preprocess import Preprocess

__all__ = ["ImageSet", "check_names", "load_digits", "load_images", "load_standard", "split_defence"]

UInt8 = NDArray[np.uint8]
_IDX_FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
MAX_LABEL = 1_000_000
_HOW_TO_GET = {
    "mnist": "MNIST's four files as they are distributed ({train,t10k}-{images-idx3,labels-idx1}-ubyte.gz) go to MNIST/raw",
    "fashion_mnist": "Fashion-MNIST's four files (github.com/zalandoresearch/fashion-mnist, data/fashion) go to FashionMNIST/raw",
    "cifar10": "unpack cifar-10-binary.tar.gz (www.cs.toronto.edu/~kriz/cifar.html) into the data folder",
}
_CIFAR_FOLDER = "cifar-10-batches-bin"


class _Files(Sequence[UInt8]):
    """Image files as frames, each read when it is asked for.  Raises DataError then for what is no image."""

    def __init__(self, paths: tuple[Path, ...], channels: int) -> None:
        self.paths, self.channels = paths, channels

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> UInt8: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[UInt8]: ...
    def __getitem__(self, index: int | slice) -> UInt8 | Sequence[UInt8]:
        if isinstance(index, slice):
            return _Files(self.paths[index], self.channels)
        return read_image(self.paths[index], self.channels)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Labelled 8-bit images.

    images       (N, H, W, channels) uint8, or a sequence of N frames (H, W[, channels]) uint8 of different sizes; those of a
                 folder are read whenever they are asked for, since photographs of a camera's size fill the memory.
    labels       (N,) int64 class indices.
    class_names  names in class order when the source has them, else None.
    origin       where the images are from, for messages.
    """

    images: UInt8 | Sequence[UInt8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] | None
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> ImageSet:
        """The images at the given positions (or where a mask is true), in that order."""
        positions = np.flatnonzero(index) if index.dtype == bool else index
        if isinstance(self.images, np.ndarray):
            images: UInt8 | Sequence[UInt8] = self.images[positions]
        elif isinstance(self.images, _Files):
            images = _Files(tuple(self.images.paths[int(i)] for i in positions), self.images.channels)
        else:
            images = [self.images[int(i)] for i in positions]
        return ImageSet(images, self.labels[positions], self.class_names, self.origin)

    def pixels(self, preprocess: Preprocess) -> NDArray[np.float32]:
        """All images fitted to the network's size: (N, channels, height, width) float32 in 0..255."""
        pixels = np.empty((len(self), *preprocess.input_shape), dtype=np.float32)
        for i, image in enumerate(self.images):
            try:
                pixels[i] = preprocess.pixels(image)
            except DataError as error:
                raise DataError(f"{self.origin}: image {i}: {error}") from error
        return pixels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the first image."""
        first = self.images[0]
        return (1 if first.ndim == 2 else int(first.shape[2]), int(first.shape[0]), int(first.shape[1]))

    def check_labels(self, n_classes: int, *, every_class: bool) -> None:
        """Raise DataError unless labels fit a classifier of n_classes (each having three images, if every_class)."""
        if int(self.labels.max()) >= n_classes:
            raise DataError(
                f"{self.origin}: label {int(self.labels.max())} found, but the model has {n_classes} classes "
                f"(0 to {n_classes - 1}); check the order and number of the classes"
            )
        counts = np.bincount(self.labels, minlength=n_classes)
        if every_class and counts.min() < 3:
            missing = int(np.argmin(counts))
            raise DataError(
                f"{self.origin}: class {missing} has {counts[missing]} images, expected at least 3 of each of the model's "
                f"{n_classes} classes (columns of its first two-dimensional output); add clean images (100 per class are "
                "recommended)"
            )


def load_images(path: str | Path, *, channels: int = 3, class_names: Sequence[str] | None = None) -> ImageSet:
    """Read a folder with one sub-folder per class, or an .npz with `images` and `labels`.

    channels     channel count wanted from image files: 1, 3 or 4.
    class_names  the classes in order, where they are known: sub-folders are then found by name and some may be missing.
    Otherwise sub-folders are classes in alphabetical order; names that are all integers are the class indices themselves.
    Raises DataError.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, channels, class_names)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected an .npz or a folder with one sub-folder per class")
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: expected an .npz (images, labels) or a folder with one sub-folder per class")
    return _load_npz(path)


def _load_npz(path: Path) -> ImageSet:
    images, labels = read_npz(path, ("images", "labels"))
    if images.dtype != np.uint8:
        raise DataError(f"{path}: images: expected dtype uint8 (pixels 0..255), got {images.dtype}")
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: images: expected shape (N, H, W, channels) or (N, H, W), got {images.shape}")
    if images.ndim == 4 and images.shape[3] > 4 and images.shape[1] <= 4:
        raise DataError(
            f"{path}: images: expected channels last (N, H, W, channels), got {images.shape}; transpose them"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: labels: expected integers of shape ({images.shape[0]},), got {labels.dtype} of shape {labels.shape}"
        )
    if len(labels) == 0 or 0 in images.shape:
        raise DataError(f"{path}: images: expected at least one image, got shape {images.shape}")
    if labels.min() < 0 or labels.max() > MAX_LABEL:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise DataError(f"{path}: labels: expected class indices from 0 to {MAX_LABEL}, got {got}")
    return ImageSet(images, labels.astype(np.int64), None, str(path))


def _load_folder(path: Path, channels: int, class_names: Sequence[str] | None) -> ImageSet:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"{path}: expected one sub-folder per class, found none")
    names = [folder.name for folder in folders]
    check_names(names, str(path))
    labels_of = _labels_of(path, names, class_names)
    paths: list[Path] = []
    labels: list[int] = []
    for folder, label in zip(folders, labels_of, strict=True):
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
        # Copies that other programs keep beside the images, such as .ipynb_checkpoints.
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
        if not files:
            raise DataError(f"{folder}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))}) found")
        paths += files
        labels += [label] * len(files)
    read_image(paths[0], channels)  # the others when they are asked for
    known = tuple(class_names) if class_names is not None else tuple(names)
    found = None if class_names is None and _numbered(names) else known
    return ImageSet(_Files(tuple(paths), channels), np.asarray(labels, np.int64), found, str(path))


def check_names(names: Sequence[str], origin: str) -> None:
    """Raise DataError for a class name that a bundle does not take, before the long work."""
    if odd := [name for name in names if not is_name(name)]:
        raise DataError(f"{origin}: expected class names of printable characters, got {odd[0]!r}; rename it")


def _numbered(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def _labels_of(path: Path, names: list[str], class_names: Sequence[str] | None) -> list[int]:
    """Class index of each sub-folder."""
    if class_names is not None and not _numbered(class_names):
        unknown = [name for name in names if name not in class_names]
        if unknown:
            shown = ", ".join(class_names[:8])
            raise DataError(f"{path}: sub-folder {unknown[0]!r} is none of the classes ({shown}); rename or remove it")
        return [class_names.index(name) for name in names]
    if not _numbered(names):
        if class_names is not None and len(names) != len(class_names):
            raise DataError(
                f"{path}: expected sub-folders named by class index (0 to {len(class_names) - 1}), or one per class; "
                f"got {len(names)} named otherwise"
            )
        return list(range(len(names)))
    indices = [int(name) if len(name) < 8 else MAX_LABEL + 1 for name in names]
    if max(indices) > MAX_LABEL:
        raise DataError(f"{path}: sub-folders named by class index: expected at most {MAX_LABEL}; rename them")
    if len(set(indices)) != len(indices):
        raise DataError(f"{path}: two sub-folders name the same class index; rename one")
    return indices


def load_standard(name: str, folder: str | Path, *, train: bool) -> ImageSet:
    """MNIST, Fashion-MNIST (idx.gz under MNIST/raw, FashionMNIST/raw) or CIFAR-10 (cifar-10-batches-bin).

    name    ``mnist``, ``fashion_mnist`` or ``cifar10``.   folder  where those folders lie.
    Raises DataError that says where a missing file is searched and how to get it.
    """
    folder = Path(folder)
    part = "train" if train else "test"
    if name == "cifar10":
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
        raw = np.concatenate([_records(folder / _CIFAR_FOLDER / file, name, 0, (3073,)) for file in files])
        images = raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return ImageSet(np.ascontiguousarray(images), raw[:, 0].astype(np.int64), None, f"{name} {part}")
    if name not in _IDX_FOLDERS:
        raise DataError(f"dataset: expected one of {', '.join([*_IDX_FOLDERS, 'cifar10'])}, got {name!r}")
    base, prefix = folder / _IDX_FOLDERS[name] / "raw", "train" if train else "t10k"
    images = _records(base / f"{prefix}-images-idx3-ubyte.gz", name, 16, (28, 28, 1))
    labels = _records(base / f"{prefix}-labels-idx1-ubyte.gz", name, 8, ()).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{base}: {len(images)} images but {len(labels)} labels; fetch the files again")
    return ImageSet(images, labels, None, f"{name} {part}")


def _records(path: Path, name: str, offset: int, shape: tuple[int, ...]) -> UInt8:
    """The bytes behind a header as (N, *shape), at least one record."""
    data = _read(path, name)[offset:]
    size = int(np.prod(shape))
    if not data or len(data) % size:
        raise DataError(
            f"{path}: expected records of {size} bytes behind {offset}, got {len(data)} bytes; fetch it again"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, *shape)


def _read(path: Path, name: str) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: not found; {_HOW_TO_GET[name]}, or name another data folder")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or not gzip ({error}); fetch the file again") from error


def load_digits(size: int = 28) -> ImageSet:
    """The 1,797 handwritten digits that ship with scikit-learn, (N, size, size, 1) uint8, upsampled bilinearly."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    preprocess = Preprocess((1, size, size))
    small = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    images = np.stack([np.rint(preprocess.pixels(image)).astype(np.uint8).transpose(1, 2, 0) for image in small])
    return ImageSet(images, digits.target.astype(np.int64), None, "scikit-learn digits")


def split_defence(labels: NDArray[np.int64], per_class: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Seeded split into positions for the defender (per_class of each class) and the rest; never overlapping.

    Raises DataError when a class has fewer than per_class images.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise DataError(f"class {label}: {len(members)} images, expected at least {per_class} for the defender")
        chosen.append(rng.permutation(members)[:per_class])
    defence = np.sort(np.concatenate(chosen))
    return defence, np.setdiff1d(np.arange(len(labels)), defence)
