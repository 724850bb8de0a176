"""Image files, folders of them and .npz files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.errors import DataError, OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.images import iter_images
from inflight_edge.sources._replay import Replay
from inflight_edge.uri import Uri, one_of, real_number

__all__ = ["ImageSource", "from_uri"]


class ImageSource(Replay):
    """An image, all images below a folder (sorted), or the `images` of an .npz; nothing is dropped.

    channels  image files are read as grey (1), RGB (3) or RGBA (4); an .npz keeps its own.
    fps, loop see Replay.
    A damaged image is a frame with a problem.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: int = 3,
        fps: float | None = None,
        loop: bool = False,
        name: str = "",
    ) -> None:
        if channels not in (1, 3, 4):
            raise OptionError(f"{path}: channels: expected 1, 3 or 4, got {channels}")
        self._path, self._channels = os.fspath(path), channels
        super().__init__(self._images, name=name or self._path, fps=fps, loop=loop)

    def open(self) -> None:
        """Find the files.  Raises SourceError when there are none, DependencyError without Pillow."""
        if not self._path.lower().endswith(".npz"):
            require("PIL.Image", "pip install 'inflight-edge[camera]'")
        super().open()

    def _images(self) -> Iterator[Frame]:
        try:
            images = iter_images([self._path], self._channels)
        except DataError as error:
            raise SourceError(str(error)) from error
        return self._each(images)

    def _each(self, images: Iterator[tuple[str, NDArray[np.uint8] | DataError]]) -> Iterator[Frame]:
        """A damaged image is a frame with a problem; an archive that cannot be read, or is empty, is no source."""
        archive, found = self._path.lower().endswith(".npz"), False
        for name, image in images:
            found = True
            if not isinstance(image, DataError):
                yield Frame(image, time.monotonic_ns(), name=name)
            elif archive:
                raise SourceError(str(image)) from image
            else:
                yield Frame(None, time.monotonic_ns(), name=name, problem=str(image))
        if not found:
            raise SourceError(f"{self._path}: expected images, got none")


def from_uri(address: Uri) -> ImageSource:
    """Source of ``images:PATH#channels=3&fps=30&loop=1``.  Raises OptionError."""
    return ImageSource(
        address.rest,
        channels=int(address.take("channels", one_of(("1", "3", "4")), "3")),
        fps=address.take("fps", real_number(0.001, 1e6), None),
        loop=address.take("loop", one_of(("0", "1")), "0") == "1",
        name=address.take("name", str, ""),
    )
