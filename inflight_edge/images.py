"""Image files to frames, with Pillow."""

from __future__ import annotations

import os
import re
import stat
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.errors import DataError, OptionError

__all__ = ["IMAGE_SUFFIXES", "find_images", "iter_images", "read_image", "read_npz", "read_npz_images"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# No format that runs another program (EPS: Ghostscript) or is no camera's.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Raw modes of more than 8 bits a channel, which Pillow would cut down to 8 without a word.
_DEEP = re.compile(r"(L|LA|RGB|RGBA|RGBX|RGBa|CMYK|I|F);?(16|32|64)")


def read_image(path: str | os.PathLike[str], channels: int) -> NDArray[np.uint8]:
    """Frame (H, W) for 1 channel (grey), else (H, W, channels) uint8: RGB or RGBA.

    The pixels as they are stored: an EXIF orientation is not applied, transparency is dropped for fewer than 4
    channels, and of an animation it is the first frame.
    Raises DataError for what is no such image (16-bit, truncated, too large, no file), OptionError, DependencyError.
    """
    if channels not in _MODES:
        raise OptionError(f"channels: expected 1, 3 or 4 for image files, got {channels}; pass the frames as .npz")
    pillow = require("PIL.Image", "pip install 'inflight-edge[camera]'")
    try:
        with warnings.catch_warnings(), _open_regular(path, "an image file") as file:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(file, formats=_FORMATS) as image:
                # Warnings are the process's: another thread may have switched them off again.
                if pillow.MAX_IMAGE_PIXELS is not None and image.width * image.height > pillow.MAX_IMAGE_PIXELS:
                    raise pillow.DecompressionBombError
                if depth := _deep(image):
                    raise DataError(f"{path}: expected 8 bits a channel, got {depth}; convert it to 8-bit pixels")
                if image.mode == "P" and "transparency" in image.info:
                    image = image.convert("RGBA")
                return np.array(image.convert(_MODES[channels]), dtype=np.uint8)
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"{path}: expected an image ({', '.join(_FORMATS)}), got something else") from error
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise DataError(f"{path}: expected at most {pillow.MAX_IMAGE_PIXELS} pixels, got more; shrink it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image: {error.strerror or _line(error)}") from error
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read as an image: it is damaged ({_line(error)})") from error


# What Pillow and NumPy raise besides OSError on damaged files.
_DAMAGED = (
    ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error,
    zipfile.BadZipFile, NotImplementedError, RuntimeError, MemoryError, AttributeError, AssertionError,
    tokenize.TokenError, UserWarning,
)  # fmt: skip


def _open_regular(path: str | os.PathLike[str], what: str) -> BinaryIO:
    """Open a regular file; a FIFO that nobody writes to must not wait for ever.  Raises DataError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: expected {what}, got a folder or device")
    return open(descriptor, "rb")


def _deep(image: Any) -> str:
    """The mode of an image with more than 8 bits a channel, or ""."""
    if image.mode == "F" or image.mode.startswith("I"):
        return f"mode {image.mode}"
    for tile in image.tile:
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if arguments and isinstance(arguments[0], str) and _DEEP.match(arguments[0]):
            return f"mode {arguments[0]}"
        if image.format == "PPM" and any(isinstance(number, int) and number > 255 for number in arguments[1:]):
            return "more"
    return ""


def read_npz(path: str | os.PathLike[str], names: Sequence[str]) -> list[NDArray[Any]]:
    """The named arrays of an .npz; other ones are ignored.  Never unpickles.  Raises DataError."""
    try:
        # Not numpy.load, which takes what is no .npz for a pickle and recommends to trust it.
        with (
            _open_regular(path, "an .npz file") as file,
            np.lib.npyio.NpzFile(file, allow_pickle=False) as archive,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error", UserWarning)  # NumPy warns of headers that it had to repair
            for name in names:
                if name not in archive.files:
                    got = ", ".join(sorted(archive.files)) or "nothing"
                    raise DataError(
                        f"{path}: expected the array `{name}`, got {got}; use numpy.savez(path, {name}=...)"
                    )
            _check_members(path, archive.zip.infolist(), names)
            arrays = [archive[name] for name in names]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or _line(error)}") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: expected an .npz file of numpy.savez: {_line(error)}; it may be cut short") from error
    except _DAMAGED as error:
        raise DataError(f"{path}: expected an .npz file of numpy.savez: {_line(error)}") from error
    for name, array in zip(names, arrays, strict=True):
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path}: {name}: expected an array, got raw bytes; write the file with numpy.savez")
    return arrays


def _check_members(path: str | os.PathLike[str], members: Sequence[zipfile.ZipInfo], names: Sequence[str]) -> None:
    """Refuse what numpy.savez does not write, and arrays that would not fit the memory: a deflated one grows 1000-fold."""
    wanted = [member for member in members if member.filename.removesuffix(".npy") in names]
    if len(wanted) != len(names):
        raise DataError(f"{path}: expected each array once, got {len(wanted)} for {', '.join(names)}; write it again")
    for member in wanted:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path}: {member.filename}: expected no other compression than numpy.savez_compressed's")
    if (size := sum(member.file_size for member in wanted)) > (limit := _memory()):
        raise DataError(
            f"{path}: expected arrays of at most {limit} bytes, this machine's memory, got {size}; split it"
        )


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_npz_images(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """``images`` of an .npz: (N, H, W) or (N, H, W, channels) uint8.  Never unpickles.  Raises DataError."""
    (images,) = read_npz(path, ("images",))
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        got = f"{images.dtype} {images.shape}"
        remedy = "convert them to 8-bit pixels 0..255" if images.dtype != np.uint8 else "stack them along a first axis"
        raise DataError(f"{path}: images: expected uint8 (N, H, W) or (N, H, W, channels), got {got}; {remedy}")
    if 0 in images.shape[1:]:  # any number of them would fit into a file of nothing
        raise DataError(f"{path}: images: expected frames with pixels, got shape {images.shape}; write it again")
    return images


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Files with an image's suffix below ``folder``, sorted; links to folders are not followed.  Raises DataError."""
    found = []
    for parent, _, names in os.walk(folder, onerror=_raise):
        found += [Path(parent, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not found:
        raise DataError(f"{folder}: expected images ({' '.join(IMAGE_SUFFIXES)}) in this folder, got none")
    return sorted(found)


def iter_images(
    paths: Iterable[str | os.PathLike[str]], channels: int
) -> Iterator[tuple[str, NDArray[np.uint8] | DataError]]:
    """Name and frame of every image, or the DataError why it cannot be read, in the order of ``paths``.

    paths: image files, folders (all images below them, sorted) and .npz files with `images`, whose frames keep
    their channels and are named ``file.npz[3]``.  channels: of the network's input, 1, 3 or 4 for image files.
    Raises DataError at once for a path that does not exist or a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: expected an image, a folder or an .npz, got no such file")
        files += find_images(path) if path.is_dir() else [path]
    return (named for file in files for named in _frames(file, channels))


def _frames(path: Path, channels: int) -> Iterator[tuple[str, NDArray[np.uint8] | DataError]]:
    try:
        if path.suffix.lower() == ".npz":
            for i, frame in enumerate(read_npz_images(path)):
                yield f"{path}[{i}]", frame
        else:
            yield str(path), read_image(path, channels)
    except DataError as error:
        yield str(path), error


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
